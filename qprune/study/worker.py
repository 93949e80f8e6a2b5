"""Processes that work on a queue: each claims trials one after the other until every point is done."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from qprune.errors import QPruneError, StudyError
from qprune.study.options import StudyOptions
from qprune.study.queue import GRACE, HEARTBEAT, Progress, Queue
from qprune.study.trial import Bench

POLL = 0.5  # seconds between looks at the queue
Run = Callable[[int, int], tuple[float, dict[str, Any]]]
"""(configuration, seed) → (value to record, JSON result)"""


class Work(Protocol):
    """What a worker process is given; it can be pickled."""

    def start(self) -> tuple[Queue, Run]:
        """The queue, and what is to be done with its points."""


@dataclass(frozen=True)
class Job:
    """All that a worker of a study needs to know: it can be another process, or another machine."""

    options: StudyOptions
    folder: Path
    storage: str
    name: str
    heartbeat: int = HEARTBEAT
    grace: int = GRACE

    def open(self, bench: Bench) -> Queue:
        """The study's queue, made if it is not there."""
        grid = [(index, seed) for index in range(len(bench.points)) for seed in self.seeds]
        return Queue(self.storage, self.name, grid, self.options.as_dict(), self.heartbeat, self.grace)

    def start(self) -> tuple[Queue, Run]:
        bench = Bench(self.options, self.folder)
        return self.open(bench), bench.run

    @property
    def seeds(self) -> range:
        return range(self.options.seed, self.options.seed + self.options.seeds)


def work(queue: Queue, run: Run) -> None:
    """Run trials until every point is complete or failed. While others finish the last ones it stays, to take over what they drop."""
    while queue.progress().left:
        if not queue.work(lambda point: run(*point)):
            queue.repair()
            if queue.progress().left:
                time.sleep(POLL)


def _process(job: Work) -> None:
    """A worker process: one thread, ended by SIGTERM or Ctrl-C with its trial put back."""
    signal.signal(signal.SIGTERM, _interrupt)
    torch.set_num_threads(1)
    try:
        work(*job.start())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except QPruneError as error:
        raise SystemExit(f"qprune: {' '.join(str(error).split())}") from None


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def run_workers(job: Work, queue: Queue, count: int, watch: Callable[[Progress], None]) -> None:
    """Start so many worker processes and wait; `watch` is told how far the queue is, by all its workers together.

    Raises StudyError if all of them end before the queue is empty. On KeyboardInterrupt they are ended, their trials put back.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [context.Process(target=_process, args=(job,), name=f"worker-{i}") for i in range(count)]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            watch(queue.progress())
            time.sleep(POLL)
        last = queue.progress()
        watch(last)
        if last.left:
            codes = ", ".join(str(process.exitcode) for process in processes)
            raise StudyError(f"all workers ended (exit codes {codes}) with {last.left} of {last.total} trials left; run the command again")
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()
