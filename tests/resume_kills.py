"""A run as the command line makes it, killed again and again: python resume_kills.py FOLDER KILLS. Prints what it did as JSON.

Processes are forked from one that has imported everything: importing torch would take longer than the run.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import resume_cases
import torch

from qprune import cli, seeds
from qprune.recipes import recipe_for

WORDS = [
    "search", "--method", "edmips", "--w-bits", "0,2,4", "--granularity", "filter", "--float-epochs", "1", "--search-epochs", "2",
    "--finetune-epochs", "1", "--no-onnx", "--batch-size", "16", "--threads", "1", "--checkpoint-minutes", "0.00001", "--resume", "--out",
]  # fmt: skip
PHASES = {"float", "search", "finetune", "uniform", "report"}


class _Patch:
    setattr = staticmethod(setattr)


def started(words: Sequence[str], prepare: Callable[[], None] | None = None) -> int:
    """The process of a command line; it calls `prepare` first."""
    child = os.fork()
    if child == 0:
        if prepare is not None:
            prepare()
        sys.argv = ["qprune", *words]
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            cli.main()
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else int(bool(end.code)))
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(70)
    return child


def phase_of(folder: Path) -> str:
    """What the run was doing, by the newest of its files."""
    if (folder / "result.json").exists():
        return "report"
    if (folder / "model.safetensors").exists():
        return "measuring"
    last = max((folder / "checkpoints").glob("*.safetensors"), default=None)
    return "start" if last is None else last.stem.split("-", 1)[1]


def steps_of(folder: Path) -> int:
    """How far the newest checkpoint is."""
    return max((int(path.name[:9]) for path in (folder / "checkpoints").glob("*.safetensors")), default=0)


def warm_up() -> None:
    """Import what runs import only when they need it, without a backward pass, after which torch cannot be forked."""
    import matplotlib.pyplot  # noqa: F401

    net = resume_cases.small_network()
    options = resume_cases.options()
    recipe_for(options, torch.zeros(2, 1, 8, 8)).check(net)
    torch.optim.SGD(net.parameters(), 0.1)
    gc.collect()
    gc.freeze()


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    write_report = seeds.write_report
    resume_cases.patch(_Patch)
    seeds.write_report = write_report
    warm_up()
    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(started([*WORDS, str(folder / "whole")]), 0)[1]) == 0
    whole, dice = time.monotonic() - begun, random.Random(3)
    done: list[str] = []
    chain = 0
    while len(done) < kills or not set(done) >= PHASES:
        chain, part = chain + 1, folder / f"parts-{chain + 1}"
        code = -9
        while code == -9:
            child = started([*WORDS, str(part)])
            begun, first, more = time.monotonic(), steps_of(part), dice.choice((0, 1, 1, 2, 3))
            # after some steps, or at any moment of the first, or of what comes before and after training
            while time.monotonic() - begun < max(2 * whole, 20.0) and steps_of(part) < first + more:
                if (part / "model.safetensors").exists() or os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                time.sleep(0.002)
            if (part / "model.safetensors").exists():
                time.sleep(whole * dice.uniform(0.0, 0.2 + 0.2 * done.count("report")))
            else:
                time.sleep(dice.uniform(0.0, 0.03) if more else whole * dice.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == -9:
                done.append(phase_of(part))
        assert code == 0, code
    print(json.dumps({"kills": done, "chains": chain}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
