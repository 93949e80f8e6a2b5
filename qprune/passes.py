"""Passes over data that can be left after any batch and taken up elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

from qprune.errors import InputError


class Passes:
    """Is told where a loop over batches is: who resumes one then sets the random numbers that it goes on with. Does nothing itself."""

    def begin(self) -> None:
        """A pass begins: its order has not been drawn yet. One that is taken up again begins anew."""

    def ready(self) -> None:
        """The batches that a pass had before it was left are behind; the next one is used."""


def following(loader: Iterable[Any], done: int) -> Iterator[Any]:
    """The batches of a pass behind the first `done`, drawn as in a whole pass. A loader with a method `following(done)` gives them without
    making the others."""
    if done and hasattr(loader, "following"):
        return iter(loader.following(done))
    return islice(loader, done, None)


def endless(loader: Iterable[Any], done: int = 0) -> Iterator[Any]:
    """Passes over `loader`, one after the other, behind the first `done` batches of all. The loader needs a length if any are done."""
    if done:
        if not isinstance(loader, Sized):
            raise InputError(f"a pass can only go on over a loader with a length, got {type(loader).__name__}")
        passes, done = divmod(done, len(loader))
        for _ in range(passes):
            next(iter(loader))
        yield from following(loader, done)
    while True:
        yield from loader
