"""The checkpoints of one seed: a file now and then, the newest ones kept, and one for the end of every phase."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from qprune.errors import CheckpointError
from qprune.ranks import ALONE, Ranks
from qprune.resume.signals import Stop
from qprune.resume.statefile import read_state, write_state
from qprune.tasks.damage import Damage

log = logging.getLogger("qprune")
END = "-end"
DIGITS = 9
_NUMBER = "[0-9]" * DIGITS


class Checkpoints:
    """Files <steps of the seed>-<phase>.safetensors, and <steps>-<phase>-end.safetensors, in a folder of their own.

    minutes  between two checkpoints within an epoch; 0: only at the end of epochs
    keep     how many are kept, besides the ends of phases
    stop     who may ask to stop
    ranks    of which rank 0 has the files; all of them make every call here
    asked    the signal that `stop` had when all ranks last looked; 0 if none
    steps    done of this seed, over all phases
    metrics  bytes of metrics.jsonl that the newest state knows
    damage   images that could not be read; at every checkpoint each rank gets to know those of the others
    """

    def __init__(self, folder: Path, minutes: float = 10.0, keep: int = 3, stop: Stop | None = None, ranks: Ranks = ALONE) -> None:
        self.folder, self.minutes, self.keep, self.stop, self.ranks = folder, minutes, keep, stop or Stop(), ranks
        self.steps = self.metrics = self.asked = 0
        self.damage = Damage()
        self._saved_at = time.monotonic()
        if ranks.main:
            for left in folder.glob(".*"):  # of writes that were cut short
                left.unlink(missing_ok=True)

    @property
    def due(self) -> bool:
        """It is time for one within an epoch."""
        return bool(self.minutes) and time.monotonic() - self._saved_at >= 60 * self.minutes

    def wanted(self) -> bool:
        """Is one due, or was any rank asked to stop? Then `asked` is the signal on all of them, and on none before."""
        due, self.asked = self.ranks.largest(self.ranks.main and self.due, self.stop.asked)
        return bool(due or self.asked)

    def save(self, phase: str, state: dict[str, Any], end: bool = False) -> Path:
        """Write a checkpoint and remove those that are too many. Raises CheckpointError where it cannot be written; the others stay."""
        path = self.folder / f"{self.steps:0{DIGITS}d}-{phase}{END if end else ''}.safetensors"
        self.damage.join(self.ranks.gathered(self.damage.state_dict()))
        self.ranks.from_main(self._write, path, state | {"steps": self.steps, "end": end, "damage": self.damage.state_dict()})
        self._saved_at = time.monotonic()
        return path

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        try:
            write_state(path, state)
        except CheckpointError as error:
            last = self.last()
            raise CheckpointError(f"{error}; the last good checkpoint is {last}" if last else str(error)) from None
        for old in self._files()[: -self.keep]:
            old.unlink(missing_ok=True)

    def forget_later(self) -> None:
        """Remove what is of later steps than the present one, when a phase goes on from an earlier one."""
        for path in self.folder.glob(f"{_NUMBER}-*.safetensors") if self.ranks.main else ():
            if int(path.name[:DIGITS]) > self.steps:
                path.unlink(missing_ok=True)

    def load(self, phase: str) -> dict[str, Any] | None:
        """The newest state of a phase that can be read, its end before all others; None if there is none. Damaged ones are reported and
        removed."""
        state = self.ranks.from_main(self._newest, phase)
        if state is not None:
            self.steps, self.metrics = state["steps"], state["metrics"]
            self.damage.join([state["damage"]])
        return state

    def _newest(self, phase: str) -> dict[str, Any] | None:
        ends = sorted(self.folder.glob(f"{_NUMBER}-{phase}{END}.safetensors"))
        for path in [*ends[::-1], *sorted(self.folder.glob(f"{_NUMBER}-{phase}.safetensors"), reverse=True)]:
            try:
                state = _checked(path, read_state(path))
            except CheckpointError as error:
                log.warning("qprune: %s; going on from the one before", error)
                path.unlink(missing_ok=True)
                continue
            return state
        return None

    def last(self) -> Path | None:
        """The newest file."""
        return max(self.folder.glob(f"{_NUMBER}-*.safetensors"), key=lambda path: path.stem, default=None)

    def clear(self) -> None:
        """Remove the folder."""
        if self.ranks.main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{_NUMBER}-*.safetensors") if not path.stem.endswith(END))


def _checked(path: Path, state: Any) -> dict[str, Any]:
    """A state with what `save` adds to it. Raises CheckpointError for one without."""
    fits = False
    with suppress(KeyError, TypeError):
        numbers, tables = [state[name] for name in ("steps", "metrics")], [state["damage"][name] for name in ("names", "parts")]
        fits = all(type(number) is int and number >= 0 for number in numbers) and all(isinstance(table, dict) for table in tables)
    if not fits:
        raise CheckpointError(f"{path} lacks what a checkpoint of this version of qprune has")
    return dict(state)
