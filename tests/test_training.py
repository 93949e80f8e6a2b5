"""qprune train: checkpoints, and going on bit by bit."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import options as search_options
from resume_cases import patch, trained
from test_cli import qprune
from test_resume import Killed, Watcher

from qprune.checkpoint import read
from qprune.commands.train import train
from qprune.console import Bars
from qprune.errors import CheckpointError
from qprune.experiment import Experiment
from qprune.options import OptionError, RunOptions
from qprune.resume.checkpoints import Checkpoints
from qprune.tasks.sources import task_of
from qprune.training import TrainOptions, run

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 3
STEPS = 15


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # a run collects garbage before it measures; what was there before need not be looked at
    patch(monkeypatch)
    yield
    gc.unfreeze()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{"epochs": EPOCHS, "batch_size": 16, **changes})


@pytest.mark.parametrize(
    ("changes", "kills"),
    [
        pytest.param({}, range(1, STEPS + 1), id="plain"),
        pytest.param({"amp": "bf16", "channels_last": False, "deterministic": True, "seed": 3}, (1, 6, 13), id="bf16"),
        pytest.param({"amp": "fp16", "accumulate": 2}, (4, 5, 15), id="fp16"),
    ],
)
def test_goes_on_from_any_step(changes: dict[str, Any], kills: Sequence[int], tmp_path: Path) -> None:
    chosen, watcher = options(**changes), Watcher()
    run(chosen, tmp_path / "whole", watcher)
    assert watcher.steps == STEPS
    for at in kills:
        with pytest.raises(Killed):
            run(chosen, tmp_path / f"{at}", Watcher(at), resume=True, minutes=1e-9)
        last = Watcher()
        run(chosen, tmp_path / f"{at}", last, resume=True)
        assert last.steps == STEPS - at + 1, "only the step that was killed is done again"
        assert trained(tmp_path / f"{at}") == trained(tmp_path / "whole")
        assert not (tmp_path / f"{at}" / "checkpoints").exists()


def test_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(options(), tmp_path / "whole", Watcher())
    dice, kills = random.Random(5), 0
    monkeypatch.setattr(Checkpoints, "due", property(lambda self: dice.random() < 0.4))
    while True:
        try:
            run(options(), tmp_path / "parts", Watcher(dice.randint(2, 6)), resume=True)
            break
        except Killed:
            kills += 1
    assert kills >= 2
    assert trained(tmp_path / "parts") == trained(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(options(), tmp_path / "whole", Watcher())
    steps, step = 0, Bars.step

    def counting(self: Bars, values: Any) -> None:
        nonlocal steps
        step(self, values)
        steps += 1
        if steps == 7:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Bars, "step", counting)
    place = tmp_path / "parts"
    done = qprune("train", "--epochs", str(EPOCHS), "--batch-size", "16", "--out", str(place))
    assert done.returncode == code
    assert done.stderr == f"qprune: stopped at phase float, epoch 2, step 2; go on with: qprune train --resume --out {place}\n"
    assert "epochs: the run in" in qprune("train", "--resume", "--out", str(place), "epochs=4").stderr
    assert "threads: the run in" in qprune("train", "--resume", "--out", str(place), "--threads", "2").stderr
    done = qprune("train", "--resume", "--out", str(place), "batch_size=16")
    assert (done.returncode, steps) == (0, STEPS), done.stderr
    assert trained(place) == trained(tmp_path / "whole")
    again = qprune("train", "--resume", "--out", str(place))
    assert (again.returncode, steps) == (0, STEPS)
    assert again.stdout.rpartition("test accuracy")[2] == done.stdout.rpartition("test accuracy")[2]


def test_it_is_the_float_network_of_a_search(tmp_path: Path) -> None:
    run(options(epochs=2), tmp_path, Watcher())
    chosen = search_options(float_epochs=2)
    experiment = Experiment(chosen, task_of(chosen), chosen.seed, tmp_path / "search", Watcher())
    experiment.folder.mkdir()
    net = experiment.network()
    experiment.train("float", net, chosen.float_epochs, chosen.lr)
    tensors = read(tmp_path / "model.safetensors")[1]
    assert all(torch.equal(value, tensors[name]) for name, value in net.state_dict().items())


def test_every_option_has_a_flag_and_a_place_in_a_search() -> None:
    names = {field.name for field in fields(TrainOptions)}
    assert names <= set(signature(train).parameters)
    assert names - {"epochs"} <= {field.name for field in fields(RunOptions)}


def test_parts_of_a_batch_may_change(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(options(), tmp_path / "run", Watcher(8), minutes=1e-9)
    done = qprune("train", "--resume", "--out", str(tmp_path / "run"), "--accumulate", "4")
    assert done.returncode == 0, done.stderr
    assert trained(tmp_path / "run")["result"]["options"]["accumulate"] == 4
    assert "accumulate: 4" in (tmp_path / "run" / "options.yaml").read_text()


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    run(options(), tmp_path / "float", Watcher())
    before = trained(tmp_path / "float")
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(options(), tmp_path / "float", Watcher())
    done = qprune("search", "--resume", "--out", str(tmp_path / "float"))
    assert done.returncode == 2 and "of another version or command ('epochs' is no option of a run" in done.stderr
    assert trained(tmp_path / "float") == before
    (tmp_path / "float" / "result.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"result\.json is damaged \(it is not the result of a training\)"):
        run(options(), tmp_path / "float", Watcher(), resume=True)
    run(options(epochs=1), tmp_path / "float", Watcher(), overwrite=True)
    assert trained(tmp_path / "float")["result"]["options"]["epochs"] == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        pytest.param("epochs=0", "epochs must be positive, got 0", id="epochs"),
        pytest.param("batch_size=0", "batch_size must be positive", id="batch"),
        pytest.param("amp=fp8", "amp: expected bf16 or fp16, got 'fp8'", id="amp"),
        pytest.param("epoch=3", "'epoch' is no option of a training; did you mean epochs?", id="near"),
        pytest.param("keep=3", "give it as --keep", id="flag"),
        pytest.param("device=tpu", "device: expected auto, cpu, cuda", id="device"),
    ],
)
def test_options_refused(word: str, message: str, tmp_path: Path) -> None:
    done = qprune("train", word, "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_options_are_printed_and_read(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(qprune("train", "--print-config", "--amp", "bf16", "--compile", "--no-channels-last", "epochs=7").stdout)
    done = qprune("train", "--print-config", "--config", str(path), "lr=1")
    assert done.stdout == path.read_text().replace("lr: 0.1\n", "lr: 1.0\n")
    for line in ("epochs: 7", "amp: bf16", "compile: true", "channels_last: false"):
        assert line in done.stdout


def test_checkpoints_must_be_possible(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected checkpoint minutes from 0"):
        run(options(), tmp_path, Watcher(), keep=0)
