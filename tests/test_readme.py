"""The README's code runs, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import qprune
from qprune import cli
from qprune.tasks import models

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
_CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = _CODE.findall(README)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(8, 3, 16, 16)
    return [(x, torch.randint(0, 10, (8,))) for _ in range(count)]


@pytest.mark.parametrize("code", [pytest.param(code, id=f"block-{i}") for i, code in enumerate(BLOCKS)])
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loader = batches(2)
    names: dict[str, Any] = {"net": models.resnet8(), "x": loader[0][0], "loader": loader}
    exec(compile(code, "README.md", "exec"), names)
    if "final" in names:
        assert type(names["final"].layer1[0].conv1).__name__ == "QuantConv2d"
        assert (tmp_path / "net.safetensors").exists()


def test_the_code_of_the_systems_of_zur_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = [block.replace("epochs=20", "epochs=1") for block in _CODE.findall((ROOT / "docs" / "zur.md").read_text())]
    assert len(code) == 3
    loader = batches(2)
    names: dict[str, Any] = {"net": models.resnet8(), "x": loader[0][0], "weight_loader": loader, "arch_loader": batches(1)}
    for block in code[:2]:
        exec(compile(block, "zur.md", "exec"), names)
    assert any(isinstance(module, qprune.nn.QuantActivation) for module in names["final"].modules())
    names["search"].policy().save(tmp_path / "runs" / "slim" / "policy.json")
    qprune.save(names["smaller"], tmp_path / "runs" / "slim" / "model.safetensors")
    names["resnet8"] = lambda in_channels: models.resnet8()
    exec(compile(code[2], "zur.md", "exec"), names)
    assert torch.equal(names["net"].eval()(names["x"]), names["smaller"].eval()(names["x"]))


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 2


def test_commands_exist() -> None:
    for command, options in re.findall(r"^    qprune (\w+)(.*)$", README, re.MULTILINE):
        shown = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200).output
        for option in re.findall(r"--[a-z-]+", options.partition("#")[0]):
            assert option in shown, f"{command} has no {option}"
