"""Runs that end early: asked to by a signal, by numbers that are not finite, or for want of memory. What is stored, and how it is read."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import Small, options, outcome, patch, small_network, small_task
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from qprune import Budget, SearchSpace, cli, prepare
from qprune.commands import shared
from qprune.console import Bars
from qprune.errors import CheckpointError, NonFiniteError, OutOfMemoryError
from qprune.files import write_atomically
from qprune.resume import statefile
from qprune.resume.checkpoints import Checkpoints
from qprune.resume.failures import advice
from qprune.resume.folder import stored_options
from qprune.resume.hidden import hidden_state, load_hidden_state
from qprune.resume.phase import Phase
from qprune.resume.randomness import restore, seed_all, snapshot
from qprune.resume.signals import Stop, Stopped
from qprune.resume.statefile import read_state, write_state
from qprune.search import Search
from qprune.seeds import run
from qprune.tasks.train import Trainer
from qprune.usage import Meter, Usage
from qprune.watch import Several

WORDS = [
    "search", "--w-bits", "0,2,4", "--granularity", "filter", "--float-epochs", "2", "--search-epochs", "2", "--finetune-epochs", "1",
    "--batch-size", "16", "--no-onnx",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    patch(monkeypatch)
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


class Watcher:
    def __init__(self, phase: str = "", act: Callable[[], None] | None = None, step: int = 1) -> None:
        self.wanted, self.act, self.left, self.now = phase, act, step, ""

    def phase(self, name: str, seed: int, steps: int, done: int = 0) -> None:
        self.now = name

    def step(self, values: Any) -> None:
        if self.now == self.wanted and self.act is not None:
            self.left -= 1
            if self.left == 0:
                self.act()

    def epoch(self, values: Any) -> None:
        pass


def command(*words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(err):
        monkeypatch.setattr(sys, "argv", ["qprune", *words])
        monkeypatch.setattr(shared, "console", Console(file=out, width=100, soft_wrap=True))
        with pytest.raises(SystemExit) as stop:
            cli.main()
    code = stop.value.code
    return (code if isinstance(code, int) else int(bool(code))), out.getvalue(), err.getvalue()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, before = 0, signal.getsignal(number)
    step = Bars.step

    def counting(self: Bars, values: Any) -> None:
        nonlocal steps
        step(self, values)
        steps += 1
        if steps == 17:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Bars, "step", counting)
    ended, _, err = command(*WORDS, "--out", str(tmp_path))
    assert ended == code
    assert err == f"qprune: stopped at phase search, epoch 2, step 2; go on with: qprune search --resume --out {tmp_path}\n"
    assert signal.getsignal(number) == before
    assert read_state(max((tmp_path / "checkpoints").glob("*.safetensors")))["steps"] == 17
    ended, _, err = command("search", "--resume", "--out", str(tmp_path), "--budget", "w2a2")
    assert ended == 2 and "budget: the run in" in err and "began with 'w3a3', got 'w2a2'" in err
    ended, _, err = command("search", "--resume", "--out", str(tmp_path), "--threads", "2")
    assert ended == 2 and "threads: the run in" in err and "began with 1, got 2" in err
    ended, out, err = command("search", "--resume", "--out", str(tmp_path), "--no-onnx", "--batch-size", "16")
    assert (ended, err) == (0, "") and steps == 40
    ended, out, err = command("search", "--resume", "--out", str(tmp_path), "--no-onnx")
    assert (ended, err) == (0, "") and "holds a finished run" in out and steps == 40


def test_a_signal_behind_the_agreement_waits_for_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has looked whether to stop goes on together with the others, and nothing stops without a checkpoint of the step."""
    stop, wanted = Stop(), Checkpoints.wanted

    def late(self: Checkpoints) -> bool:
        found = wanted(self)
        self.stop.asked = signal.SIGTERM
        return found

    monkeypatch.setattr(Checkpoints, "wanted", late)
    with pytest.raises(Stopped, match="stopped at phase float, epoch 1, step 2"):
        run(options(), tmp_path, Several([]), minutes=0, stop=stop)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000002-float.safetensors"]


def test_the_second_signal_is_not_held_back() -> None:
    child = os.fork()
    if child == 0:
        with Stop().listening():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def poison(folder: Path, phase: str, monkeypatch: pytest.MonkeyPatch) -> NonFiniteError:
    """A run whose training images become NaN in the third step of a phase."""
    task = small_task()
    monkeypatch.setattr("qprune.seeds.task_of", lambda options: task)
    with pytest.raises(NonFiniteError) as caught:
        run(options(), folder, Watcher(phase, lambda: task.train.x.fill_(math.nan), step=2))
    return caught.value


@pytest.mark.parametrize(("phase", "last"), [("search", "000000010-float-end"), ("uniform", "000000025-finetune-end")])
def test_a_loss_that_is_not_finite(phase: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = poison(tmp_path, phase, monkeypatch)
    assert "loss is nan at step 2: first non-finite output in layer 'conv1'" in str(error)
    assert f"batch 2 of epoch 0, phase {phase}, is kept in {tmp_path / 'nonfinite.safetensors'}" in str(error)
    assert str(error).endswith(f"the last good state is in {tmp_path / 'checkpoints' / last}.safetensors")
    with safe_open(str(tmp_path / "nonfinite.safetensors"), "pt") as file:
        place = file.metadata()
        assert file.get_tensor("x").shape == (16, 1, 8, 8) and bool(file.get_tensor("x").isnan().all()) and len(file.get_tensor("y")) == 16
    assert {name: place[name] for name in ("phase", "seed", "epoch", "batch", "step", "layer")} == {
        "phase": phase, "seed": "0", "epoch": "0", "batch": "2", "step": "2", "layer": "conv1",
    }  # fmt: skip


def test_states_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    net, meter = small_network(), Meter()
    phase = Phase("float", net, Trainer(net, 1), torch.Generator(), meter, tmp_path, Checkpoints(tmp_path / "states"))
    with meter.phase("float"):
        phase.epoch()
        net.bn1.running_mean[0] = math.inf
        phase.checkpoints.steps = 5
        phase.epoch()
    assert [path.stem for path in (tmp_path / "states").iterdir()] == ["000000000-float"]


class Rooted(nn.Module):
    """0 for every input, with a gradient that is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv(x).mean((2, 3)) * 0).sqrt()


def test_a_gradient_that_is_not_finite() -> None:
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8) % 4
    net = Rooted()
    before = net.conv.weight.clone()
    with pytest.raises(
        NonFiniteError, match=r"the gradient of conv\.weight is NaN or infinite at step 0, where the loss is 1\.386"
    ) as caught:
        Trainer(net, 1).run_epoch([(x, y)])
    assert (caught.value.layer, caught.value.index) == ("conv", 0) and caught.value.batch is not None
    assert torch.equal(net.conv.weight, before)
    search = Search(prepare(Rooted(), SearchSpace((2, 4), (2, 4)), example_inputs=x), Budget(bops="w4a4"))
    state = {name: value.clone() for name, value in search.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"the gradient of conv\.\S+ is NaN or infinite at step 0") as caught:
        search.fit([(x, y)])
    assert caught.value.index == 0
    learned = dict(search.model.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in learned.items() if "log_range" not in name)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {},
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            ["--accumulate 2", "--batch-size 8", "fewer candidates"],
        ),
        ({"accumulate": 12}, MemoryError(), ["--accumulate 16)"]),
        ({"pairs": ((2, 2), (4, 4)), "w_bits": ()}, MemoryError(), ["--batch-size 8", "--pairs", "shared form"]),
        ({}, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), ["can't allocate memory"]),
    ],
)
def test_out_of_memory(changes: dict[str, Any], error: BaseException, words: list[str], tmp_path: Path) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(OutOfMemoryError) as caught:
        run(options(**changes), tmp_path, Watcher("search", fail))
    assert str(caught.value).startswith("phase search: out of memory") and "float-end.safetensors" in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_advice_has_what_can_be_done() -> None:
    assert "--accumulate" not in advice("search", options(accumulate=16))
    assert "--accumulate" not in advice("search", options(cuda_graph=True))


def test_going_on_in_more_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is out of memory goes on where it was, with batches in parts; what is behind it is not done again."""
    step, steps = Bars.step, 0

    def counting(self: Bars, values: Any) -> None:
        nonlocal steps
        step(self, values)
        steps += 1
        if steps == 17:
            raise MemoryError

    monkeypatch.setattr(Bars, "step", counting)
    code, _, err = command(*WORDS, "--threads", "1", "--checkpoint-minutes", "0.00001", "--out", str(tmp_path))
    assert code == 2 and "split batches into more parts (--accumulate 2" in err
    sizes: set[int] = set()
    forward = Small.forward
    monkeypatch.setattr(Small, "forward", lambda self, x: (sizes.add(len(x)) if torch.is_grad_enabled() else None, forward(self, x))[1])
    code, _, err = command("search", "--resume", "--out", str(tmp_path), "--no-onnx", "--accumulate", "2")
    assert (code, err, steps) == (0, "", 41)
    assert max(sizes) == 8
    assert json.loads((tmp_path / "result.json").read_text())["options"]["accumulate"] == 2
    stored = stored_options(tmp_path)
    assert stored is not None and (stored.accumulate, stored.batch_size) == (2, 16)


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match=r"^size mismatch$"):
        run(options(), tmp_path, Watcher("search", fail))


def test_deterministic_runs(tmp_path: Path) -> None:
    try:
        for name in ("one", "two"):
            run(options("darts", deterministic=True, float_epochs=1, search_epochs=1), tmp_path / name, Watcher())
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    state = {
        "tensors": [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.tensor(True), torch.zeros(0), torch.tensor(2.5)],
        "optimizer": {0: {"step": 3, "betas": (0.5, 0.999)}, 7: {}},
        "plain": [None, True, 1, 0.1, math.inf, "é", [], {}, ()],
        "half": torch.randn(3).to(torch.bfloat16),
    }
    write_state(tmp_path / "state.safetensors", state)
    found = read_state(tmp_path / "state.safetensors")
    assert found["plain"] == state["plain"] and found["optimizer"] == state["optimizer"]
    for one, other in zip([*state["tensors"], state["half"]], [*found["tensors"], found["half"]], strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()
        assert other.data_ptr() % 64 == 0
    write_state(tmp_path / "wide.safetensors", torch.arange(6.0).view(2, 3)[:, :2].expand(2, 2))
    assert read_state(tmp_path / "wide.safetensors").tolist() == [[0.0, 1.0], [3.0, 4.0]]
    for bad in ({"x": object()}, {1.5: 2}, {"x": {True: 1}}):
        with pytest.raises(TypeError, match="a checkpoint cannot hold"):
            write_state(tmp_path / "bad.safetensors", bad)
    write_atomically(tmp_path / "other.safetensors", (0).to_bytes(8, "little"))
    with pytest.raises(CheckpointError):
        read_state(tmp_path / "other.safetensors")


@pytest.mark.parametrize("text", ["[", '{"dict": 3}', '{"tensor": "b"}', '{"tensor": "a", "stride": [1000000000, 1]}', '{"what": 1}'])
def test_states_of_others_are_refused(text: str, tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 2)}
    header = {"format": statefile.FORMAT, "version": statefile.VERSION, "state": text, "digest": statefile._digest(text, tensors)}
    write_atomically(tmp_path / "state.safetensors", to_bytes(tensors, header))
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        read_state(tmp_path / "state.safetensors")


def test_a_network_that_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(options(), tmp_path, Watcher("search", _interrupt))

    def larger(*args: Any, **kwargs: Any) -> nn.Module:
        net = small_network()
        net.fc = nn.Linear(8, 5)
        return net

    monkeypatch.setattr("qprune.seeds.network_of", larger)
    monkeypatch.setattr("qprune.experiment.network_of", larger)
    with pytest.raises(CheckpointError, match=r"the checkpoint of phase float in .* does not fit this run \(.*size mismatch for fc"):
        run(options(), tmp_path, Watcher(), resume=True)


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_random_numbers_go_on() -> None:
    import random

    import numpy as np

    def draw() -> list[Any]:
        python, numpy = random.gauss(0, 1), np.random.standard_normal(3).tolist()
        return [torch.rand(3, generator=generator).tolist(), torch.randn(2).tolist(), python, numpy]

    generator = torch.Generator().manual_seed(1)
    seed_all(5)
    draw()
    state = snapshot(generator)
    first = draw()
    restore(state, generator)
    assert draw() == first


def test_hidden_state() -> None:
    def network() -> nn.Module:
        net = small_network()
        net.register_buffer("extra", torch.zeros(2), persistent=False)
        net.flag = False
        return net

    net, other = network(), network()
    net.extra.fill_(3.0)
    net.flag = True
    net.block.eval()
    load_hidden_state(other, hidden_state(net))
    assert torch.equal(other.extra, net.extra) and other.flag is True
    assert not other.block.bn1.training and other.bn1.training


def test_usage_adds_up() -> None:
    meter = Meter()
    with meter.phase("first", Usage(100.0, 50.0, 2**60, 7, "rss")):
        assert meter.so_far().seconds >= 100.0
    found = meter.phases["first"]
    assert 100.0 <= found.seconds < 101.0 and found.cpu_seconds >= 50.0 and (found.memory, found.before) == (2**60, 7)
