"""A whole study in its folder: begun, interrupted, gone on with, refused; by workers of its own and from the command line."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qprune.errors import CheckpointError, StudyError
from qprune.study.options import StudyOptions
from qprune.study.queue import Progress
from qprune.study.run import open_folder, run
from qprune.study.trial import Bench
from qprune.study.worker import Job, work
from tests.test_cli import qprune

ROOT = Path(__file__).resolve().parent.parent
TINY = StudyOptions(pairs=((2, 2), (4, 4)), step=8, seeds=2, float_epochs=1, epochs=1, batch_size=256)
WORDS = ["study", "--pairs", "2/2,4/4", "--step", "8", "--seeds", "2", "--float-epochs", "1", "--epochs", "1", "--batch-size", "256"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(TINY, tmp_path_factory.mktemp("bench"))


def test_a_trial_is_reproducible_and_leaves_the_float_network_alone(bench: Bench) -> None:
    first_value, first = bench.run(1, 0)
    stored = (bench.folder / "float-0.safetensors").read_bytes()
    second_value, second = bench.run(1, 0)
    assert first_value == second_value == first["val_accuracy"]
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}
    assert (bench.folder / "float-0.safetensors").read_bytes() == stored
    other = bench.run(2, 0)[1]
    assert other["float_network"] == first["float_network"] and other["val_loss"] != first["val_loss"]
    assert bench.run(1, 1)[1]["float_network"] != first["float_network"]


def test_float_networks_of_two_processes_are_equal(bench: Bench, tmp_path: Path) -> None:
    elsewhere = Bench(TINY, tmp_path)
    assert elsewhere.float_network(0)[1] == bench.float_network(0)[1]


def test_a_damaged_float_network_is_named(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "float-5.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"float-5\.safetensors"):
        Bench(TINY, tmp_path).float_network(5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Begun by a worker that is interrupted in its third trial, then gone on with from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "grid"
    job = Job(TINY, folder, f"sqlite:///{folder / 'study.db'}", folder.name)
    open_folder(folder, TINY, None)
    bench = Bench(TINY, folder)
    queue = job.open(bench)
    queue.fill()
    done: list[tuple[int, int]] = []

    def two(index: int, seed: int) -> tuple[float, dict[str, Any]]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((index, seed))
        return bench.run(index, seed)

    with pytest.raises(KeyboardInterrupt):
        work(queue, two)
    queue.close()
    command, environment = [sys.executable, "-W", "error", "-m", "qprune", *WORDS, "--out", str(folder)], {**os.environ, "COLUMNS": "99"}
    went_on = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False, env=environment)
    assert went_on.returncode == 0, went_on.stderr
    assert "6/6 finished" in went_on.stdout and "Too few runs to tell" in went_on.stdout
    return folder


def test_the_folder_of_a_finished_study(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert yaml.safe_load((finished / "options.yaml").read_text()) == result["options"] == TINY.as_dict()
    assert result["trials"]["done"] == result["trials"]["total"] == 6 and result["errors"] == []
    with (finished / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["policy"]), int(row["seed"])) for row in rows] == [(p, s) for p in range(3) for s in range(2)]
    assert [row["homogeneous"] for row in rows[::2]] == ["True", "False", "True"]
    assert len({row["pid"] for row in rows}) == 2
    assert len({row["float_network"] for row in rows if row["seed"] == "0"}) == 1
    points = {row["index"]: row for row in result["points"]}
    assert points[1]["test_accuracy"]["mean"] == pytest.approx(sum(float(row["test_accuracy"]) for row in rows[2:4]) / 2)
    assert "Grid study" in (finished / "report.html").read_text()


def test_a_finished_study_is_only_reported_on(finished: Path) -> None:
    (finished / "report.html").unlink()
    before = (finished / "trials.csv").read_text()
    done = qprune(*WORDS, "--out", str(finished), "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert (finished / "report.html").exists() and (finished / "trials.csv").read_text() == before


def test_other_options_are_refused(finished: Path) -> None:
    done = qprune(*WORDS, "--out", str(finished), "--lr", "0.5")
    assert done.returncode == 2
    assert "was begun with lr=0.03, not 0.5; give the same options" in done.stderr and done.stderr.count("\n") == 1


def test_seeds_may_be_added(finished: Path, tmp_path: Path) -> None:
    for name in ("options.yaml", "study.db"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    result = run(replace(TINY, seeds=3), tmp_path, name=finished.name, workers=0)
    assert (result["trials"]["done"], result["trials"]["total"]) == (6, 9)
    assert yaml.safe_load((tmp_path / "options.yaml").read_text())["seeds"] == 3
    with pytest.raises(StudyError, match="was begun with seeds=3, not 2"):
        run(TINY, tmp_path, workers=0)


def test_a_damaged_study_is_refused(finished: Path, tmp_path: Path) -> None:
    for name in ("options.yaml", "study.db"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "study.db").write_bytes((finished / "study.db").read_bytes()[:100] + b"\xff" * 4000)
    with pytest.raises(StudyError, match=r"study\.db"):
        run(TINY, tmp_path)
    (tmp_path / "options.yaml").write_text("pairs: [")
    with pytest.raises(StudyError, match=r"options\.yaml is damaged"):
        run(TINY, tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(StudyError, match="holds something else than a study"):
        run(TINY, tmp_path)


def test_workers_that_all_end_early(tmp_path: Path) -> None:
    """A worker that is killed from outside ends the command with what to do; nothing is lost."""
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.running and not killed:
            for child in multiprocessing.active_children():
                killed.append(child.pid or 0)
                os.kill(child.pid or 0, signal.SIGKILL)

    with pytest.raises(StudyError, match=r"all workers ended \(exit codes -9\) with 6 of 6 trials left; run the command again"):
        run(replace(TINY, epochs=400), tmp_path, workers=1, watch=kill)
    assert killed


def test_ctrl_c_puts_the_trial_back(tmp_path: Path) -> None:
    options = replace(TINY, float_epochs=400)

    def interrupt(progress: Progress) -> None:
        if progress.running:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(options, tmp_path, workers=1, watch=interrupt)
    queue = Job(options, tmp_path, f"sqlite:///{tmp_path / 'study.db'}", tmp_path.name).open(Bench(options, tmp_path))
    assert (queue.progress().running, queue.progress().waiting) == (0, 6)
    queue.close()
    assert not (tmp_path / "report.html").exists() and not multiprocessing.active_children()
