"""Writes that do not arrive: disks that are full, folders that cannot be written, processes that are gone in the middle of a write."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_faults import WRITES
from resume_cases import Watcher, options, outcome, patch

from qprune import cli
from qprune.errors import CheckpointError
from qprune.files import write_atomically
from qprune.resume.folder import held, stored_options
from qprune.resume.session import open_folder
from qprune.resume.statefile import read_state
from qprune.seeds import run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch(monkeypatch)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Meanwhile this process writes no file of more bytes: errno EFBIG, as Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def faults(*words: str, before: tuple[str, ...] = ()) -> dict[str, Any]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [*before, sys.executable, str(ROOT / "tests" / "disk_faults.py"), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_processes_killed_while_they_write(tmp_path: Path) -> None:
    told = faults("cut", str(tmp_path))
    assert [name for name, *_ in told["kills"]] == list(WRITES)
    for name, code, left, files in told["kills"]:
        assert code == -9, name
        # half of the file is under another name, and the name itself has what was there before, or nothing
        assert len(left) == (name != "metrics.jsonl"), name
        assert (name in files) == (name == "metrics.jsonl") or (name == "result.json" and "model.onnx" in files), name
    assert told["left"] == []
    parts, whole = outcome(tmp_path / "parts"), outcome(tmp_path / "whole")
    assert [entry.pop("files")[0]["file"] for entry in parts["result"]["runs"]] == ["model.onnx"]
    assert parts == whole


@functools.cache
def mountable() -> bool:
    """A disk of one's own can be mounted, which nobody else sees."""
    if shutil.which("unshare") is None:
        return False
    words = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "disk", "/mnt"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not mountable(), reason="needs the right to mount a disk in a namespace of its own")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    told = faults("full", str(tmp_path), before=("unshare", "--map-root-user", "--mount"))
    folder = tmp_path / "disk" / "run"
    assert len(told["errors"]) >= 5
    for size, error, files in told["errors"]:
        assert error.startswith(f"qprune: cannot write {folder}") and error.count("\n") == 1, (size, error)
        assert "No space left on device" in error
        last = max((folder / name for name in files if name.startswith("checkpoints")), key=lambda path: path.stem, default=None)
        assert error.rstrip().endswith(f"; the last good checkpoint is {last}" if last else "on device")
    phases = {error.split("/checkpoints/")[-1].split(".")[0].split("-", 1)[-1] for _, error, _ in told["errors"]}
    assert {"float", "search"} <= phases
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.usefixtures("small")
def test_metrics_that_cannot_be_written(tmp_path: Path) -> None:
    watcher = Watcher(2, lambda: (tmp_path / "metrics.jsonl").symlink_to("/dev/full"))
    with pytest.raises(
        CheckpointError, match=r"cannot write .*metrics\.jsonl: No space left on device; the last good state is in "
    ) as caught:
        run(options(), tmp_path, watcher, minutes=1e-9)
    assert read_state(Path(str(caught.value).rpartition(" ")[2]))["steps"] == 5


def test_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, b"old")
    with files_up_to(1000), pytest.raises(CheckpointError, match=r"cannot write .*result\.json: File too large"):
        write_atomically(path, bytes(1001))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_held_without_a_word_of_whom(tmp_path: Path) -> None:
    with files_up_to(0), held(tmp_path):
        assert (tmp_path / ".lock").read_text() == ""
    with held(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith("process ")


@pytest.mark.usefixtures("small")
def test_a_process_that_ends_before_anything_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What opening the folder leaves is no run, and the same command begins one."""

    def gone(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("qprune.resume.session.shutil.rmtree", gone)
        open_folder(tmp_path, overwrite=False)
    assert stored_options(tmp_path) is None
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("qprune.resume.session.begin", gone)
        run(options(), tmp_path, Watcher(), resume=True)
    watcher = Watcher(1, gone)
    with pytest.raises(KeyboardInterrupt):
        run(options(), tmp_path, watcher, resume=True)
    assert watcher.steps == 1


def command(*words: str) -> tuple[int, str]:
    """(exit code, standard error) of the command line, in this process."""
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        monkeypatch.setattr(sys, "argv", ["qprune", *words])
        cli.main()
    code = stop.value.code
    return (code if isinstance(code, int) else int(bool(code))), err.getvalue()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("place", ["{file}", "{file}/run", "/proc/run", "/dev/null/run"])
@pytest.mark.parametrize("words", ["search", "search --resume", "train --epochs 1", "study --quick", "compare --workers 0"])
def test_folders_that_cannot_be_written(words: str, place: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a file")
    code, err = command(*words.split(), "--out", place.format(file=file))
    assert code == 2 and err.count("\n") == 1, err
    assert err.startswith(f"qprune: cannot write {place.format(file=file)}"), err
    assert file.read_text() == "a file"
