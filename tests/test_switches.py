"""Where a run computes, and its switches of precision and speed."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import Block, options, outcome, patch, small_network, small_task
from test_seeds import Silent
from torch import nn

from qprune import precision
from qprune.budget import Budget
from qprune.compare.options import CompareOptions
from qprune.errors import BackendError, InputError, NonFiniteError
from qprune.experiment import Experiment
from qprune.options import OptionError, RunOptions
from qprune.precision import LossScale
from qprune.prepare import prepare
from qprune.resume.statefile import read_state, write_state
from qprune.search.driver import Search
from qprune.seeds import run
from qprune.space import SearchSpace
from qprune.tasks.train import Trainer


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were two, of which the second is the present one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("text", "expected"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")], ids=lambda value: value
)
def test_device_with_gpus(text: str, expected: str) -> None:
    assert precision.device_of(text) == torch.device(expected)
    assert precision.described(precision.device_of("cuda:0")) == "GPU cuda:0"
    with pytest.raises(BackendError, match=r"cuda:2.*2 CUDA GPUs"):
        precision.device_of("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_device_without_gpus(tmp_path: Path) -> None:
    assert precision.device_of("auto") == precision.device_of("cpu") == torch.device("cpu")
    with pytest.raises(BackendError, match="no CUDA GPU here"):
        run(RunOptions(device="cuda"), tmp_path / "run", Silent())
    assert not (tmp_path / "run" / "options.yaml").exists()


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "meta", "", "cpu:0", 0], ids=str)
def test_no_device(text: Any) -> None:
    with pytest.raises(OptionError, match="device: expected auto, cpu, cuda or cuda:N"):
        RunOptions(device=text)


def test_comparisons_stay_on_the_cpu() -> None:
    assert CompareOptions().run_options("edmips", "w3a3").device == "cpu"


@pytest.mark.usefixtures("small", "no_gpu")
def test_run_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    to = nn.Module.to

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        moved.extend(arg for arg in args if isinstance(arg, torch.device))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", recorded)
    result = run(brief("edmips", device="auto"), tmp_path / "auto", Silent())
    assert moved == [torch.device("cpu")]
    assert result["environment"]["computed on"] == "cpu" and result["options"]["device"] == "auto"
    assert json.loads((tmp_path / "auto" / "environment.json").read_text())["computed on"] == "cpu"
    run(brief("edmips", device="cpu"), tmp_path / "cpu", Silent())
    first, second = outcome(tmp_path / "auto"), outcome(tmp_path / "cpu")
    del first["result"]["options"]["device"], second["result"]["options"]["device"]
    assert first == second


@pytest.mark.usefixtures("small")
def test_the_task_is_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and example are asked to go where the network goes; nothing else of the task changes."""
    monkeypatch.setattr("qprune.experiment.device_of", lambda text: torch.device("meta"))
    experiment = Experiment(options(), small_task(), 0, tmp_path, Silent())
    assert {part.x.device.type for part in (experiment.task.train, experiment.task.val, experiment.task.test)} == {"meta"}
    assert experiment.example.device.type == "meta" and experiment.generator.device.type == "cpu"


def brief(case: str, **changes: Any) -> RunOptions:
    return options(case, float_epochs=1, search_epochs=1, finetune_epochs=0, **changes)


def lines(folder: Path, phase: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if line["phase"] == phase]


CASES = [
    ("edmips", "bf16"), ("edmips", "fp16"), ("darts-first", "bf16"), ("zur", "bf16"), ("zur-epochs", "fp16"), ("slimmable", "fp16"),
    ("sbs", "bf16"), ("annc", "bf16"),
]  # fmt: skip


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("case", "amp"), CASES, ids=lambda value: value)
def test_amp(case: str, amp: str, tmp_path: Path) -> None:
    """Losses of whole runs are near those in float32, and not the same: half precision was in use. Files are float32."""
    case, more = ("darts", {"method_options": {}}) if case == "darts-first" else (case, {})
    plain = run(brief(case, **more), tmp_path / "plain", Silent())
    mixed = run(brief(case, amp=amp, **more), tmp_path / "mixed", Silent())
    for phase in ("float", "search"):
        (expected,), (found,) = lines(tmp_path / "plain", phase), lines(tmp_path / "mixed", phase)
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)
        assert found["loss"] != expected["loss"]
        assert ("skipped" in found) is (amp == "fp16")
    assert set(plain["runs"][0]["networks"]) == set(mixed["runs"][0]["networks"])
    tensors = outcome(tmp_path / "mixed")["first tensors"]
    assert {kind for kind, _, _ in tensors.values()} <= {"torch.float32", "torch.int64", "torch.bool"}


def scaled_by(scale: float) -> LossScale:
    made = LossScale(torch.device("cpu"))
    made.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return made


def fp16_trainer(scale: float) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(small_network(), 3, lr=0.05, autocast=torch.float16)
    trainer.loss_scale = scaled_by(scale)
    return trainer


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_overflow_in_training_leaves_updates_out() -> None:
    loader = small_task().loader("train", 16)
    trainer = fp16_trainer(2.0**20)
    before, states = parameters(trainer.model), []
    trainer.run_epoch(loader, lambda step, total, loss: states.append((trainer.loss_scale.skipped, parameters(trainer.model))))  # type: ignore[union-attr]
    skips = [skipped for skipped, _ in states]
    assert skips[0] == 1 and 1 <= skips[-1] < len(skips)  # the factor fell until gradients were finite
    for last, (skipped, now) in zip([0, *skips], states, strict=False):
        unchanged = all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        assert unchanged == (skipped > last)
        before = now
    assert trainer.history[0]["skipped"] == skips[-1]


def test_a_gradient_that_never_gets_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "limit", 3)
    trainer = fp16_trainer(2.0**120)
    before, steps = parameters(trainer.model), []
    with pytest.raises(NonFiniteError, match=r"the gradient of .* is NaN or infinite at step 3") as error:
        trainer.run_epoch(small_task().loader("train", 16), lambda *values: steps.append(values))
    assert len(steps) == 3 and error.value.batch is not None and error.value.index == 3
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer.model), strict=True))


def test_fp16_training_goes_on_from_its_state() -> None:
    first = fp16_trainer(2.0**20)
    loader = small_task().loader("train", 16)
    first.run_epoch(loader)
    second = Trainer(small_network(), 3, lr=0.05, autocast=torch.float16)
    second.load_state_dict(deepcopy(first.state_dict()))
    assert second.loss_scale is not None and first.loss_scale is not None
    assert second.loss_scale.state_dict() == first.loss_scale.state_dict()
    torch.manual_seed(1)
    expected = first.run_epoch(loader)
    torch.manual_seed(1)
    found = second.run_epoch(loader)
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def fp16_search(scale: float, method: str = "edmips") -> Search:
    torch.manual_seed(0)
    space = SearchSpace(w_bits=(2, 4), a_bits=(2, 4))
    model = prepare(small_network(), space, example_inputs=small_task().example())
    search = Search(model, Budget.parse("w3a3"), method, autocast=torch.float16)
    search.method.loss_scale = scaled_by(scale)
    return search


def test_overflow_in_a_search_leaves_updates_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = fp16_search(2.0**120)
    loader = small_task().loader("train", 16)
    search.model(small_task().example(16))  # sets the ranges of inputs
    before = parameters(search.model)
    monkeypatch.setattr(LossScale, "limit", 6)
    (entry,) = search.fit(loader)
    assert entry["skipped"] == len(loader) and entry["loss"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(search.model), strict=True))
    with pytest.raises(NonFiniteError, match="is NaN or infinite at step 6"):
        search.fit(loader)
    again = fp16_search(1.0)
    write_state(tmp_path / "state", search.state_dict())
    again.load_state_dict(read_state(tmp_path / "state"))
    assert again.method.loss_scale is not None and again.method.loss_scale.skipped == 7
    assert again.method.loss_scale.scaler.get_scale() == 2.0**113


def test_gradients_are_those_of_the_loss() -> None:
    """Whatever the factor is, as long as nothing overflows or underflows."""
    found = []
    for scale in (1.0, 1024.0):
        search = fp16_search(scale)
        search.model.eval()  # no dropout
        x, y = next(iter(small_task().loader("train", 16)))
        search.step(lambda model: nn.functional.cross_entropy(model(x), y))  # noqa: B023
        found.append(torch.cat([p.grad.flatten() for p in search.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)


def test_what_fp16_cannot_do() -> None:
    model = prepare(small_network(), SearchSpace(w_bits=(2, 4), a_bits=(2, 4)), example_inputs=small_task().example())
    with pytest.raises(InputError, match="second_order=True cannot leave out updates"):
        Search(model, Budget.parse("w3a3"), "darts", autocast=torch.float16, second_order=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amp": "fp8"}, "amp: expected bf16 or fp16"),
        ({"amp": "fp16", "cuda_graph": True}, "amp: fp16 does not go with cuda_graph"),
        ({"amp": "fp16", "method": "darts", "method_options": {"second_order": True}}, "amp: fp16 does not go with second_order"),
        ({"cuda_graph": True, "method": "zur"}, "cuda_graph: the steps of method zur cannot be recorded"),
        ({"cuda_graph": True, "compile": True}, "cuda_graph: does not go with compile"),
    ],
    ids=["amp", "fp16-graph", "fp16-second-order", "zur-graph", "compile-graph"],
)
def test_switches_that_exclude_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RunOptions(**changes)


@pytest.mark.usefixtures("no_gpu")
def test_cuda_graphs_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cuda_graph: needs a CUDA GPU"):
        run(RunOptions(cuda_graph=True), tmp_path / "run", Silent())
    assert not (tmp_path / "run" / "options.yaml").exists()


@pytest.mark.parametrize(("tf32", "expected"), [(True, "tf32"), (False, "ieee")], ids=["on", "off"])
def test_tf32(tf32: bool, expected: str) -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, conv.fp32_precision
    with pytest.raises(ZeroDivisionError), precision.switched(RunOptions(tf32=tf32, device="cpu")):
        assert (matmul.fp32_precision, conv.fp32_precision) == (expected, expected)
        raise ZeroDivisionError
    assert (matmul.fp32_precision, conv.fp32_precision) == before
    with precision.switched(RunOptions(device="cpu")):
        assert (matmul.fp32_precision, conv.fp32_precision) == before


@pytest.mark.usefixtures("small")
def test_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain layout everywhere, or channels_last everywhere; the losses agree."""
    seen: set[tuple[bool, bool]] = set()
    forward = Block.forward

    def watched(self: Block, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            seen.add((x.is_contiguous(), self.conv1.weight.is_contiguous()))
        return forward(self, x)

    monkeypatch.setattr(Block, "forward", watched)
    entries = {}
    for channels_last in (True, False):
        seen.clear()
        folder = tmp_path / str(channels_last)
        run(brief("edmips", channels_last=channels_last), folder, Silent())
        assert seen == {(not channels_last, not channels_last)}
        entries[channels_last] = [line["loss"] for phase in ("float", "search") for line in lines(folder, phase)]
    assert entries[False] == pytest.approx(entries[True], rel=1e-3)


@pytest.mark.usefixtures("small")
def test_compiled_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses agree, and names of parameters are what they were. aot_eager captures and differentiates, without a C++ compiler."""
    captured: list[str] = []
    compile_module = nn.Module.compile

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        captured.append(type(self).__name__)
        compile_module(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "compile", noted)
    monkeypatch.setattr(precision, "COMPILER", "aot_eager")
    run(brief("edmips", batch_size=24), tmp_path / "plain", Silent())
    assert not captured
    run(brief("edmips", batch_size=24, compile=True), tmp_path / "compiled", Silent())
    assert len(captured) == 4
    for phase in ("float", "search"):
        (expected,), (found,) = lines(tmp_path / "plain", phase), lines(tmp_path / "compiled", phase)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    plain, compiled = outcome(tmp_path / "plain"), outcome(tmp_path / "compiled")
    assert set(plain["first tensors"]) == set(compiled["first tensors"])
    assert plain["first header"] == compiled["first header"]


def test_compiled_ends() -> None:
    model = small_network()
    with precision.compiled(model):
        assert model._compiled_call_impl is not None
    assert model._compiled_call_impl is None
    with precision.compiled(model, on=False):
        assert model._compiled_call_impl is None
