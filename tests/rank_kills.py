"""A run of two processes, of which one is killed or told to stop, again and again: python rank_kills.py FOLDER ROUNDS. Prints what it did
as JSON. As resume_kills, whose processes these are."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import resume_cases
import resume_kills
import torch

from qprune import seeds

WORDS = ["--accumulate", "2", "--rank-timeout", "0.5"]


def pair(folder: Path) -> list[int]:
    """The processes of a run as torchrun starts them, without torchrun, which would end one when the other ends."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def as_rank(rank: int) -> int:
        def prepare() -> None:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})

        return resume_kills.started([*resume_kills.WORDS, str(folder), *WORDS], prepare)

    return [as_rank(0), as_rank(1)]


def ended(children: list[int], seconds: float) -> list[int | None]:
    """Their exit codes, minus the signal that killed them; None for what still runs after that time, and is killed then."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in set(children) - set(codes):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in set(children) - set(codes):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [codes.get(child) for child in children]


def interrupted(folder: Path, number: int, victim: int, dice: random.Random) -> dict[str, Any]:
    """The run goes on a few steps more, then one of its processes gets a signal: what became of both, and how long that took."""
    before = resume_kills.steps_of(folder)
    children = pair(folder)
    deadline = time.monotonic() + 120
    while resume_kills.steps_of(folder) < before + 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05 * dice.random())
    start = time.monotonic()
    os.kill(children[victim], number)
    codes = ended(children, 90)
    return {"signal": number, "victim": victim, "codes": codes, "seconds": time.monotonic() - start}


def main(folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    write_report = seeds.write_report
    resume_cases.patch(resume_kills._Patch)
    seeds.write_report = write_report
    resume_kills.warm_up()
    dice = random.Random(0)
    codes = ended(pair(folder / "whole"), 300)
    cases = [(number, victim) for number in (signal.SIGKILL, signal.SIGTERM) for victim in (0, 1)]
    events = [interrupted(folder / "cut", *cases[i % len(cases)], dice) for i in range(rounds)]
    last = ended(pair(folder / "cut"), 300)
    print(json.dumps({"whole": codes, "events": events, "last": last}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
