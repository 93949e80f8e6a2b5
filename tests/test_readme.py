"""The README's code runs, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qprune import cli
from qprune.tasks import models

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", [pytest.param(code, id=f"block-{i}") for i, code in enumerate(BLOCKS)])
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = torch.randn(8, 3, 16, 16)
    names: dict[str, Any] = {"net": models.resnet8(), "x": x, "loader": [(x, torch.randint(0, 10, (8,))) for _ in range(2)]}
    exec(compile(code, "README.md", "exec"), names)
    if "final" in names:
        assert type(names["final"].layer1[0].conv1).__name__ == "QuantConv2d"
        assert (tmp_path / "net.safetensors").exists()


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 2


def test_commands_exist() -> None:
    for command, options in re.findall(r"^    qprune (\w+)(.*)$", README, re.MULTILINE):
        shown = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200).output
        for option in re.findall(r"--[a-z-]+", options.partition("#")[0]):
            assert option in shown, f"{command} has no {option}"
