"""Where a run computes, and its switches of precision and speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import options, outcome, patch
from test_seeds import Silent
from torch import nn

from qprune import precision
from qprune.compare.options import CompareOptions
from qprune.errors import BackendError
from qprune.experiment import Experiment
from qprune.options import OptionError, RunOptions
from qprune.seeds import run


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
    result = run(options(device="auto"), tmp_path / "auto", Silent())
    assert moved == [torch.device("cpu")]
    assert result["environment"]["computed on"] == "cpu" and result["options"]["device"] == "auto"
    assert json.loads((tmp_path / "auto" / "environment.json").read_text())["computed on"] == "cpu"
    run(options(device="cpu"), tmp_path / "cpu", Silent())
    first, second = outcome(tmp_path / "auto"), outcome(tmp_path / "cpu")
    del first["result"]["options"]["device"], second["result"]["options"]["device"]
    assert first == second


@pytest.mark.usefixtures("small")
def test_the_task_is_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and example are asked to go where the network goes; nothing else of the task changes."""
    monkeypatch.setattr("qprune.experiment.device_of", lambda text: torch.device("meta"))
    from resume_cases import small_task

    experiment = Experiment(options(), small_task(), 0, tmp_path, Silent())
    assert {part.x.device.type for part in (experiment.task.train, experiment.task.val, experiment.task.test)} == {"meta"}
    assert experiment.example.device.type == "meta" and experiment.generator.device.type == "cpu"
