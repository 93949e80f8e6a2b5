"""What `make bench-gpu` runs, on a CPU and in small: the training step, and parts that end in time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qprune.benchmarks import baselines, correctness, gpu, imagenet_step, measure, selection

ROOT = Path(__file__).resolve().parents[1]


def test_imagenet_step_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    names = "float/eager,fixed/qprune,shared/qprune,shared/branches,sampled/qprune,chosen/qprune,joint/qprune"
    words = ["--network", "resnet8", "--side", "16", "--batch", "2", "--dtype", "bf16", "--rounds", "1", "--only", names, "--out", str(out)]
    assert imagenet_step.main(words) == 0
    assert "against plain" in capsys.readouterr().out
    found = json.loads(out.read_text())["rows"]
    assert {f"{row['form']}/{row['implementation']}" for row in found} == set(names.split(","))
    assert all(row["ms"] > 0 for row in found)
    with pytest.raises(SystemExit):
        imagenet_step.main(["--only", "float/branches"])
    assert "--only: expected some of float/eager" in capsys.readouterr().err
    short = imagenet_step.Setup("resnet8", 16, 2, "fp32", "cpu", 1)
    monkeypatch.setattr(imagenet_step, "check", lambda form, setup: _raise(measure.WrongResultError("dx differs")))
    assert [row.get("skipped") for row in imagenet_step.run(short, ["float/eager", "joint/qprune"], 0.0)] == [None, "dx differs"]
    monkeypatch.setattr(imagenet_step, "build", lambda form, name, setup: _raise(torch.cuda.OutOfMemoryError("no room")))
    assert imagenet_step.measure("joint", "branches", imagenet_step.Setup(rounds=1, device="cpu"))["skipped"] == "out of memory"


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize("form", ["fixed", "shared", "sampled", "chosen", "joint"])
def test_a_wrong_layer_is_not_timed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = imagenet_step.Setup("resnet8", 16, 2, "fp32", "cpu", 1)
    imagenet_step.check(form, setup)
    conv = baselines.EagerMixedConv2d._conv
    monkeypatch.setattr(baselines.EagerMixedConv2d, "_conv", lambda self, x, weight: conv(self, x, weight * 1.02))
    with pytest.raises(measure.WrongResultError, match=f"resnet8, {form}, layer layer1.0.conv1: result differs"):
        imagenet_step.check(form, setup)


def test_parts_are_boxed_and_saved_as_they_come(tmp_path: Path) -> None:
    write = "import json, sys, time; json.dump({'rows': [{'case': 'x'}]}, open(sys.argv[1], 'w')); print('written', flush=True); "
    parts = (
        gpu.Part("good", ("-c", write, "{out}"), 60),
        gpu.Part("slow", ("-c", write + "time.sleep(100)", "{out}", "{left}"), 3),
        gpu.Part("broken", ("-c", "raise ValueError('no')"), 60),
    )
    said: list[str] = []
    out = tmp_path / "results" / "gpu.json"
    assert not gpu.run(parts, out, "cpu", said.append)
    content = json.loads(out.read_text())
    assert [part["ended"] for part in content["parts"].values()] == ["done", "stopped after 3 s", "exit code 1"]
    assert content["rows"] == [{"case": "x"}, {"case": "x"}] and content["machine"]["rates"]["copy"] > 0
    assert content["parts"]["broken"]["last line"] == "ValueError: no" and said[1] == "slow: stopped after 3 s (3 s): written"
    assert sum(part.seconds for part in gpu.PARTS) <= 590


def _help(module: str, capsys: pytest.CaptureFixture[str]) -> str:
    if module == "benchmarks.imagenet_step":
        with pytest.raises(SystemExit):
            imagenet_step.main(["--help"])
        return capsys.readouterr().out
    command = [sys.executable, "-m", module, *(["benchmarks"] if module == "pytest" else []), "--help"]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_parts_call_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that a part uses is known to its command, and what it asks for is there."""
    modules = {part.command[1] for part in gpu.PARTS}
    known = {module: _help(module, capsys) for module in modules}
    for part in gpu.PARTS:
        module = part.command[1]
        assert all(word in known[module] for word in part.command if word.startswith("--") and word != "--no-header"), part.name
        if module == "benchmarks":
            asked = dict(zip(part.command[2::2], part.command[3::2], strict=True))
            lists = {name: selection.words("", asked.get(f"--{name}", "")) for name in ("shapes", "baselines")}
            directions = selection.words("", asked.get("--direction", ""))
            assert list(selection.select(selection.Request((asked["--kernel"],), directions=directions, **lists, batch=2).checked()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_gpu_says_that_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "x.json")]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_tests_in_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file with tests that pass, fail and hang: all are counted, the one that hangs as not reached."""
    folder = ROOT / "tests" / f"parallel_{os.getpid()}"
    folder.mkdir()
    try:
        body = "import pytest, time\npytestmark = pytest.mark.gpu\n"
        body += "@pytest.mark.parametrize('word', ['a b', 'c'])\ndef test_good(word): pass\n"
        body += "def test_bad(): assert 0\ndef test_hangs(): time.sleep(60)\n"
        (folder / "test_some.py").write_text(body)
        out = tmp_path / "out.json"
        words = ["--tests", str(folder.relative_to(ROOT)), "--processes", "2", "--seconds", "12", "--out", str(out)]
        assert correctness.main(words) == 1
    finally:
        shutil.rmtree(folder)
    row = json.loads(out.read_text())["rows"][0]
    assert (row["passed"], row["failed"], row["not reached"]) == (2, 1, 1)
    assert [name.split("::")[1] for name in row["failures"]] == ["test_bad"]
    assert "2 passed, 1 failed, 0 skipped tests, 1 not reached" in capsys.readouterr().out
