"""Work in a folder of its own: one job at a time does it, it is begun once, gone on with after any end, and done once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qprune.config import Form, Options
from qprune.environment import environment
from qprune.errors import CheckpointError
from qprune.files import write_atomically
from qprune.options import OptionError, RunOptions
from qprune.precision import check
from qprune.ranks import ALONE, Ranks
from qprune.resume.checkpoints import Checkpoints
from qprune.resume.failures import REPLAY
from qprune.resume.folder import ENVIRONMENT, OPTIONS, RESULT, SEED, STATES, begin, check_same, held, options_in, record_options, take_up
from qprune.resume.phase import METRICS
from qprune.resume.randomness import be_deterministic
from qprune.resume.signals import Stop, Stopped

PROBE = ".probe"
"""Written first; under the name of a file of the run it would pass for a damaged one, if the process ended here."""
OURS = (
    OPTIONS,
    METRICS,
    RESULT,
    SEED,
    ENVIRONMENT,
    REPLAY,
    "policy.json",
    "model.safetensors",
    "model.onnx",
    "checkpoint.safetensors",
    "report.html",
)


Finished = Callable[[Path], dict[str, Any] | None]


@dataclass(frozen=True)
class Terms:
    """How work is done, whatever it is.

    overwrite  replace work that the folder holds
    resume     go on with it: with the same options it ends with the numbers that it would have had. If nothing was begun there, begin
    minutes    between two checkpoints within an epoch, 0 for none; there is one at every epoch's end in any case
    keep       checkpoints that are kept
    stop       who may ask to stop
    ranks      that do it together, all with the same calls; rank 0 has the folder

    Raises OptionError for numbers that cannot be.
    """

    overwrite: bool = False
    resume: bool = False
    minutes: float = 10.0
    keep: int = 3
    stop: Stop | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        if self.minutes < 0 or self.keep < 1:
            raise OptionError(f"expected checkpoint minutes from 0 and at least 1 checkpoint to keep, got {self.minutes} and {self.keep}")


@dataclass(frozen=True)
class Session:
    """done: the result of the work, if it was over before."""

    folder: Path
    options: Options
    device: str
    terms: Terms
    began: bool
    done: dict[str, Any] | None

    @property
    def ranks(self) -> Ranks:
        return self.terms.ranks

    def begin(self) -> None:
        """Record what is about to be done, unless that was begun before. To be called when nothing can be wrong with what it needs: other
        work that the folder held is gone then."""
        if not self.began:
            self.ranks.from_main(self._begin)

    def _begin(self) -> None:
        open_folder(self.folder, self.terms.overwrite)
        begin(self.folder, self.options, self.environment())

    def checkpoints(self, place: Path) -> Checkpoints:
        return Checkpoints(place / STATES, self.terms.minutes, self.terms.keep, self.terms.stop, self.ranks)

    def environment(self) -> dict[str, str]:
        return environment(self.device, self.ranks)


@contextmanager
def session(
    folder: Path, options: Options, form: Form, run: RunOptions, command: str, finished: Finished, terms: Terms
) -> Iterator[Session]:
    """Within, the folder is this job's, and torch computes as the options say.

    form      of the options
    run       those of them that are a run's
    command   that makes such work, for messages
    finished  finds the result in the folder, None if there is none

    Raises CheckpointError for a folder that cannot be written, is damaged, in use, or holds other work, OptionError for other options than
    the work began with, BackendError for a device that is not there, and Stopped with the words to go on with.
    """
    ranks = terms.ranks
    with ExitStack() as holding:
        ranks.from_main(holding.enter_context, held(folder))
        try:
            found = ranks.from_main(_found, folder, options, form, run.device, finished, ranks) if terms.resume else (False, None)
            if found[1] is None:
                check(run, ranks)
                if run.deterministic:
                    be_deterministic()
                torch.set_num_threads(ranks.from_main(torch.get_num_threads))
            yield Session(folder, options, run.device, terms, *found)
        except Stopped as stopped:
            raise Stopped(stopped.number, f"{stopped}; go on with: qprune {command} --resume --out {folder}") from None


def _found(folder: Path, options: Options, form: Form, device: str, finished: Finished, ranks: Ranks) -> tuple[bool, dict[str, Any] | None]:
    """(whether work was begun in the folder, its result if it is over). It goes on with as many threads as it began with."""
    began = options_in(folder, form)
    if began is None:
        return False, None
    check_same(began, folder, options.as_dict())
    _sweep(folder)
    done = finished(folder)
    if done is not None:
        tidy(folder)
        return True, done
    take_up(folder, environment(device, ranks))
    if options != began:
        record_options(folder, options)
    return True, None


def open_folder(folder: Path, overwrite: bool) -> None:
    """Make the run folder, or empty it of an earlier run. Raises CheckpointError if it cannot be written, or holds a run and must not
    be."""
    if not overwrite and any((folder / name).exists() for name in OURS[:3]):
        raise CheckpointError(f"{folder} already holds a run; go on with it (--resume), choose another folder, or pass --overwrite")
    write_atomically(folder / PROBE, b"")
    (folder / PROBE).unlink()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    for place in (folder, *folder.glob("seed-*")):
        shutil.rmtree(place / STATES, ignore_errors=True)
        for name in OURS:
            (place / name).unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what writes left that were cut short."""
    for place in (folder, *folder.glob("seed-*")):
        for path in (path for name in OURS for path in place.glob(f".{name}.*")):
            path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    for place in (folder, *folder.glob("seed-*")):
        shutil.rmtree(place / STATES, ignore_errors=True)
        (place / SEED).unlink(missing_ok=True)
