"""Runs whose files cannot be written to the end: python disk_faults.py cut|full FOLDER. Prints what happened as JSON.

cut   a run killed in the middle of writing each of its files, one after the other, and gone on with
full  a run on a disk of a few kilobytes, which grows whenever it was full; FOLDER is where it is mounted, so this needs a mount namespace
      of its own (unshare --mount)

Processes are forked from one that has imported everything, as in resume_kills.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import resume_cases
import torch
from resume_kills import WORDS, _Patch, started, warm_up

from qprune import seeds
from qprune.checkpoint import read
from qprune.policy import Policy
from qprune.result import read_result
from qprune.resume.folder import stored_options
from qprune.resume.statefile import read_state

WRITES = (
    "environment.json", "options.yaml", "000000003-float", "metrics.jsonl", "000000005-float-end", "policy.json", "000000017-finetune",
    "model.safetensors", "seed.json", "result.json", "report.html", "model.onnx", "result.json",
)  # fmt: skip
"""In the order of a run; the last is result.json with the ONNX file in it."""


class Cut:
    """An open file of which half of the first write arrives, and then the process is gone."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *error: object) -> None: ...

    def write(self, content: Any) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def cut_at(name: str) -> Callable[[], None]:
    """Prepares a process to be killed while it writes a file whose name begins so."""

    def prepare() -> None:
        mkstemp, fdopen, opened = tempfile.mkstemp, os.fdopen, Path.open
        now = ""

        def named(*args: Any, **kwargs: Any) -> Any:
            nonlocal now
            now = str(kwargs.get("prefix", ""))
            return mkstemp(*args, **kwargs)

        def half(*args: Any, **kwargs: Any) -> Any:
            file = fdopen(*args, **kwargs)
            return Cut(file) if now.startswith(f".{name}") else file

        def appended(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = opened(self, mode, *args, **kwargs)
            return Cut(file) if mode == "a" and self.name == name else file

        tempfile.mkstemp, os.fdopen, Path.open = named, half, appended  # type: ignore[assignment, method-assign]

    return prepare


def whole(folder: Path) -> list[str]:
    """The files of a run, all of which can be read to their end. Those that a write left begin with a dot."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    for name in names:
        path = folder / name
        if path.parent.name == "checkpoints":
            read_state(path)
        elif path.suffix == ".safetensors":
            read(path)
        elif name == "options.yaml":
            stored_options(folder)
        elif name == "policy.json":
            Policy.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif name == "report.html":
            assert path.read_text().rstrip().endswith("</html>")
    if {"metrics.jsonl", "result.json"} & set(names):
        read_result(folder)
    return names


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cut(folder: Path) -> dict[str, Any]:
    assert ended(started([*WORDS, str(folder / "whole")])) == 0
    found, part = [], folder / "parts"
    plain = [word for word in WORDS if word != "--no-onnx"]
    for number, name in enumerate(WRITES):
        words = plain if number >= WRITES.index("model.onnx") else WORDS
        code = ended(started([*words, str(part)], cut_at(name)))
        left = [path.name for path in part.rglob(f".{name}*")]
        found.append([name, code, left, whole(part)])
    assert ended(started([*plain, str(part)])) == 0
    return {"kills": found, "left": [str(path) for path in part.rglob(".*") if path.name != ".lock"]}


def full(folder: Path, outside: Path) -> dict[str, Any]:
    """Folders are copied out of the disk, which is gone when this process is."""

    def disk(size: int, *more: str) -> None:
        options = ",".join((f"size={size}k", *more))
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "disk", str(folder)], check=True)

    assert ended(started([*WORDS, str(outside / "whole")])) == 0
    size, told, errors = 8, outside / "stderr", []
    disk(size)

    def say() -> None:
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)

    while (code := ended(started([*WORDS, str(folder / "run")], say))) == 2:
        errors.append([size, told.read_text(), whole(folder / "run")])
        size += 48
        disk(size, "remount")
    assert code == 0, told.read_text()
    subprocess.run(["cp", "-r", str(folder / "run"), str(outside / "parts")], check=True)
    return {"errors": errors, "size": size}


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    write_report = seeds.write_report
    resume_cases.patch(_Patch)
    seeds.write_report = write_report
    warm_up()
    if kind == "cut":
        told = cut(folder)
    else:
        (folder / "disk").mkdir()
        told = full(folder / "disk", folder)
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
