"""The progress bar of a study: trials done of all, over every worker of every machine, and the time left from measured trial times."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from qprune.study.queue import Progress


def seconds_left(progress: Progress) -> float | None:
    """Median trial time times trials left, over the workers that are running trials now; None before the first trial is done."""
    if not progress.seconds:
        return None
    return statistics.median(progress.seconds) * progress.left / max(1, progress.running)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "–:––"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class StudyBar:
    """A `with` block that shows the bar; `watch` moves it. unit: what is counted, in the plural."""

    def __init__(self, console: Console, unit: str = "trials") -> None:
        columns = (TextColumn(unit), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        self.bar = Bar(*columns, console=console)
        self.task = self.bar.add_task(unit, total=None, state="starting workers")

    def __enter__(self) -> StudyBar:
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.update(self.task, visible=self.bar.tasks[0].total is not None)
        self.bar.stop()

    def watch(self, progress: Progress) -> None:
        failed = f", {progress.failed} failed" if progress.failed else ""
        state = f"{progress.running} running{failed}, {_clock(seconds_left(progress))} left" if progress.left else f"finished{failed}"
        self.bar.update(self.task, completed=progress.done + progress.failed, total=progress.total, state=state)
