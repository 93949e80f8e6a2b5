"""What every database must do for the queue of a study."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qprune.study.queue import Point, Queue

POINTS = [(policy, seed) for policy in range(5) for seed in (3, 4)]


def opened(storage: str, name: str = "grid", points: list[Point] = POINTS, **options: Any) -> Queue:
    return Queue(storage, name, points, options or {"epochs": 2}, heartbeat=1, grace=3)


def succeed(point: Point) -> tuple[float, Mapping[str, Any]]:
    return 0.5, {"point": list(point)}


def drain(queue: Queue) -> None:
    while queue.work(succeed):
        pass


def worker(storage: str, log: str, stuck: Point | None) -> None:
    """Empties the queue, noting every run that ended; hangs in the point `stuck`."""
    queue = opened(storage)

    def run(point: Point) -> tuple[float, Mapping[str, Any]]:
        if point == stuck:
            with Path(log).open("a") as file:
                file.write(f"stuck {os.getpid()}\n")
            time.sleep(60)
        time.sleep(0.05)
        with Path(log).open("a") as file:
            file.write(f"{point[0]},{point[1]} {os.getpid()}\n")
        return succeed(point)

    while queue.progress().left:
        if not queue.work(run):
            queue.repair()
            time.sleep(0.1)
    queue.close()


def killed_and_taken_up(storage: str, log: Path) -> None:
    """One of two processes is killed inside a trial; the other does everything, that trial too, exactly once."""
    queue = opened(storage)
    queue.fill()
    context = multiprocessing.get_context("spawn")
    victim = context.Process(target=worker, args=(storage, str(log), POINTS[0]))
    victim.start()
    deadline = time.monotonic() + 60
    while "stuck" not in (log.read_text() if log.exists() else ""):
        assert victim.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    survivor = context.Process(target=worker, args=(storage, str(log), None))
    survivor.start()
    victim.kill()
    victim.join()
    survivor.join(60)
    assert survivor.exitcode == 0
    assert queue.progress().done == len(POINTS)
    lines = [line.split()[0] for line in log.read_text().splitlines()]
    assert sorted(lines) == sorted(["stuck", *(f"{policy},{seed}" for policy, seed in POINTS)])
    assert [trial.point for trial in queue.finished()] == POINTS
    states = sorted(trial.state.name for trial in queue.study.get_trials(deepcopy=False))
    assert states == ["COMPLETE"] * len(POINTS) + ["FAIL"]
    queue.close()


def claimed_together(storage: str) -> None:
    """Three connections reach for every waiting trial at the same moment: one of them gets it."""
    points = [(policy, 0) for policy in range(15)]
    queues = [opened(storage, "claims", points) for _ in range(3)]
    queues[0].fill()
    running = queues[0].optuna.trial.TrialState.RUNNING
    waiting = [trial._trial_id for trial in queues[0].study.get_trials(deepcopy=False)]
    barrier = threading.Barrier(len(queues))
    won: list[int] = []

    def claim(queue: Queue) -> None:
        for trial in waiting:
            barrier.wait()
            if queue.database.set_trial_state_values(trial, running):
                won.append(trial)

    threads = [threading.Thread(target=claim, args=(queue,)) for queue in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(waiting)
    for queue in queues:
        queue.close()
