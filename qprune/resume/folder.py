"""The folder of a run: held by one process at a time, and what it says of the run that began there."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from qprune.config import RUN, Form, Options, checked
from qprune.errors import CheckpointError
from qprune.files import write_atomically
from qprune.options import OptionError, RunOptions
from qprune.plainjson import parse
from qprune.plainyaml import dumped, read_mapping

log = logging.getLogger("qprune")
OPTIONS, ENVIRONMENT, RESULT, SEED, STATES, LOCK = (
    "options.yaml", "environment.json", "result.json", "seed.json", "checkpoints", ".lock",
)  # fmt: skip
CHANGEABLE = ("accumulate",)
"""Options that a run may go on with changed: they decide how it computes, and its results up to rounding."""
_DECIDING = ("qprune", "torch", "numpy", "device")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and hold it until the end, or until the process ends. Raises CheckpointError if another process holds it, or if it
    cannot be written."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            who = file.read().strip()
            raise CheckpointError(
                f"{folder} is in use by another process{f' ({who})' if who else ''}; wait for it, or choose another folder"
            ) from None
        with suppress(OSError):  # for people to read; on a full disk the run itself says what is wrong
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield


def stored_options(folder: Path) -> RunOptions | None:
    """The options of the run that the folder holds; None if none was begun. Raises CheckpointError as `options_in`."""
    found: RunOptions | None = options_in(folder, RUN)
    return found


def options_in(folder: Path, form: Form) -> Any:
    """The options, of the form's kind, that work in the folder began with; None if none was begun. Raises CheckpointError for a damaged
    file, and for the options of another version or another command."""
    path = folder / OPTIONS
    if not path.exists():
        return None
    try:
        return form.kind(**checked(read_mapping(path), form=form))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, or of another version or command ({' '.join(str(error).split())})") from None


def check_same(stored: Options, folder: Path, given: Mapping[str, Any], threads: int = 0) -> None:
    """Raise OptionError unless every option that is given is what the run in the folder began with, or may change. given: by their
    names; threads: 0 if they are not given."""
    began = stored.as_dict()
    pairs = {name: (_plain(began[name]), _plain(value)) for name, value in given.items()}
    if threads:
        pairs["threads"] = (_threads(folder), threads)
    for name, (old, new) in pairs.items():
        if old is not None and new != old and name not in CHANGEABLE:
            raise OptionError(
                f"{name}: the run in {folder} began with {old!r}, got {new!r}; leave it out to go on, or choose another folder"
            )


def begin(folder: Path, options: Options, environment: Mapping[str, str]) -> None:
    """Record what a run is about to do."""
    write_atomically(folder / ENVIRONMENT, json.dumps(environment, indent=1).encode())
    record_options(folder, options)


def record_options(folder: Path, options: Options) -> None:
    write_atomically(folder / OPTIONS, dumped(options.as_dict()))


def take_up(folder: Path, environment: Mapping[str, str]) -> None:
    """Compute as the run in the folder began to: with as many threads. Reports other versions and devices, whose results may differ in the
    last bits. Raises CheckpointError for another number of processes, which the checkpoints are not for."""
    threads, began = _threads(folder), _environment(folder)
    processes = began.get("processes", "1"), environment.get("processes", "1")
    if processes[0] != processes[1]:
        raise CheckpointError(
            f"the run in {folder} began with {processes[0]} processes, and there are {processes[1]}; go on with as many "
            "(torchrun --nproc_per_node)"
        )
    if threads is None:
        log.warning("qprune: cannot read %s; the number of threads may differ from before", folder / ENVIRONMENT)
        return
    torch.set_num_threads(threads)
    changed = [f"{name} {began.get(name)} → {environment[name]}" for name in _DECIDING if began.get(name) != environment[name]]
    if changed:
        log.warning("qprune: the run began with other versions (%s): results may differ in the last bits", ", ".join(changed))


def _environment(folder: Path) -> dict[str, Any]:
    """What a run began with; empty if that is not known."""
    try:
        found = parse((folder / ENVIRONMENT).read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _threads(folder: Path) -> int | None:
    found = str(_environment(folder).get("threads"))
    return int(found) if found.isdecimal() and 0 < int(found) <= 4096 else None


def _plain(value: Any) -> Any:
    """As files have it: lists for tuples."""
    return json.loads(json.dumps(value))
