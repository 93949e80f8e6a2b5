"""Two processes of one distributed job, for tests whose file is also what each of them runs."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent


def two_ranks(script: str, store: Path, timeout: float = 240) -> tuple[Any, Any]:
    """What `python script store 0` and `python script store 1` print, as JSON, when they run together; both have to succeed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(store), str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=timeout) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    first, second = (json.loads(out) for out, _ in outputs)
    return first, second


def be_one_of_two(work: Callable[[int], object]) -> None:
    """Print, as JSON, what a rank of two gives: for a file that `two_ranks` runs."""
    store, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    result = work(rank)
    gc.collect()  # wrappers hold the group, and with it threads, in reference cycles
    dist.destroy_process_group()
    print(json.dumps(result))
