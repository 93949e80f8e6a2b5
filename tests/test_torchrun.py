"""The command line in several processes: one is killed, or told to stop, and the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ranks import ROOT
from tests.resume_cases import outcome

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "qprune"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("kills")
    done = run(sys.executable, str(ROOT / "tests" / "rank_kills.py"), str(folder), "4")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_dead_rank_ends_the_other_and_the_run_goes_on(killed: tuple[Path, dict[str, Any], str]) -> None:
    folder, found, said = killed
    for event in found["events"]:
        codes = [143, 143]
        if event["signal"] == 9:
            codes = [2, 2]
            codes[event["victim"]] = -9
        assert event["codes"] == codes, said
        assert event["seconds"] < 60
    assert (found["whole"], found["last"]) == ([0, 0], [0, 0])
    assert outcome(folder / "cut") == outcome(folder / "whole")
    assert said.count("another process of the run ended, or does not answer") == 1
    assert said.count("stopped at phase") == 2 and "qprune search --resume --out" in said


def test_torchrun(tmp_path: Path) -> None:
    words = ["--float-epochs", "1", "--search-epochs", "1", "--finetune-epochs", "1", "--batch-size", "256", "--out", str(tmp_path / "run")]
    done = run(*LAUNCHER, "search", "--model", "lenet5", "--data", "synthetic", "--data-option", "in_channels=1", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report:") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["environment"]["processes"] == "2"
    assert yaml.safe_load((tmp_path / "run" / "options.yaml").read_text())["batch_size"] == 256
    assert (tmp_path / "run" / "model.onnx").exists() and (tmp_path / "run" / "report.html").exists()
    refused = run(*LAUNCHER, "search", "--batch-size", "33", "--out", str(tmp_path / "other"))
    assert refused.returncode != 0
    assert refused.stderr.count("qprune: batch_size: 33 samples, those of all processes, cannot be shared equally by 2") == 1
    assert not (tmp_path / "other" / "options.yaml").exists()
