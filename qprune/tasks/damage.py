"""Images that cannot be read: counted, skipped up to a limit, and told of in the result."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .order import DataError
from .task import Task

log = logging.getLogger("qprune")
NAMED = 5


class DamagedImageError(DataError):
    """One image that cannot be read."""


@dataclass
class Damage:
    """Images that could not be read, and how many of them are too many.

    names  name → why
    parts  name → the part of the data set that it is in
    """

    limit: int = 0
    names: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str, part: str = "") -> None:
        """Raises DataError for the first image beyond the limit."""
        if name in self.names:
            return
        self.names[name], self.parts[name] = reason, part
        self._check()
        log.warning("skipped damaged image %d of at most %d: %s: %s", len(self.names), self.limit, name, reason)

    def _check(self) -> None:
        if len(self.names) > self.limit:
            worst = "; ".join(f"{name}: {reason}" for name, reason in list(self.names.items())[-5:])
            raise DataError(f"damaged images: {len(self.names)}, allowed: {self.limit} (option max_damaged); the last: {worst}")

    def forget(self) -> None:
        """Begin to count anew."""
        self.names.clear()
        self.parts.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"names": dict(self.names), "parts": dict(self.parts)}

    def join(self, states: Iterable[Mapping[str, Mapping[str, str]]]) -> None:
        """Count those of these states, too. Raises DataError as `add`."""
        for state in states:
            for mine, theirs in ((self.names, state["names"]), (self.parts, state["parts"])):
                mine.update({str(name): str(value) for name, value in theirs.items()})
        self._check()

    def summary(self) -> dict[str, dict[str, Any]]:
        """Part → how many there are (count) and what the first ones, by name, are called (names)."""
        found: dict[str, list[str]] = {}
        for name, part in self.parts.items():
            found.setdefault(part, []).append(name)
        return {part: {"count": len(names), "names": sorted(names)[:NAMED]} for part, names in sorted(found.items())}


def damage_of(task: Task) -> Damage:
    """Where the images of a task are counted that cannot be read; for data without any, a place where nothing is."""
    found = getattr(task.train, "damage", None)
    return found if isinstance(found, Damage) else Damage()
