"""Everything that is to be measured on a GPU, in under ten minutes: `make bench-gpu`, or `python -m benchmarks.gpu`.

Each part is a process of its own with a limit of its own; what a part has written when its time is up is kept. The results of all parts so
far are in one file, benchmarks/results/<device>.json, which is written anew after each part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import machine, rates, table
from .machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
Line = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """A command; {out} in it is a JSON file whose rows are collected, {left} its seconds. seconds: when it is stopped."""

    name: str
    command: tuple[str, ...]
    seconds: int


def _bench(name: str, seconds: int, *words: str) -> Part:
    return Part(name, ("-m", "benchmarks", *words, "--out", "{out}", "--seconds", "{left}"), seconds)


PARTS = (
    Part("correctness", ("-m", "benchmarks.correctness", "--out", "{out}", "--seconds", "{left}"), 170),
    _bench("mix_quantize", 50, "--kernel", "mix_quantize", "--baselines", "eager,compile", "--direction", "forward,backward"),
    Part("training step", ("-m", "benchmarks.imagenet_step", "--out", "{out}", "--seconds", "{left}"), 140),
    _bench("multi", 30, "--kernel", "multi", "--shapes", "resnet50", "--baselines", "compile,layers", "--direction", "both"),
    _bench("mixed_conv2d", 100, "--kernel", "mixed_conv2d", "--baselines", "eager,compile,cudnn", "--direction", "both"),
    _bench("depthwise", 30, "--kernel", "depthwise", "--baselines", "eager,cudnn", "--direction", "both"),
    _bench("int8", 30, "--kernel", "int8", "--shapes", "resnet50", "--baselines", "cudnn"),
    Part(
        "pytest-benchmark",
        ("-m", "pytest", "-q", "benchmarks", "--benchmark-only", "-k", "qprune", "--seconds", "{left}", "--benchmark-json", "{out}"),
        30,
    ),
)
"""The limits add up to 580 seconds."""
GRACE = 10
"""Seconds between the moment when a part begins nothing more and the one when it is stopped."""


def run_part(part: Part, out: Path, say: Line) -> tuple[dict[str, Any], list[Any]]:
    """How the part ended, in words ("done" if well), after how many seconds, with what last line; and the rows it left."""
    given = {"{out}": str(out), "{left}": str(max(part.seconds - GRACE, 1))}
    words = [given.get(word, word) for word in part.command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    printed, start = out.with_suffix(".txt"), time.perf_counter()
    with printed.open("w", encoding="utf-8") as file:
        # a group of its own, so that compiler processes end with it
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=part.seconds)
            ended = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {part.seconds} s"
        except BaseException:
            _end(process)
            raise
        _end(process)
    found = {"ended": ended, "seconds": round(time.perf_counter() - start), "last line": _last_line(printed.read_text(encoding="utf-8"))}
    say(f"{part.name}: {ended} ({found['seconds']} s): {found['last line']}")
    return found, _rows(out)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no output"


def _rows(out: Path) -> list[Any]:
    """The rows of a file of ours; the benchmarks of pytest-benchmark's, without its raw data; nothing if there is no whole file."""
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if "rows" in content:
        return list(content["rows"])
    return [
        {
            "kernel": "pytest-benchmark",
            "case": b["fullname"],
            "group": b["group"],
            "unit": "ms",
            "value": b["stats"]["median"] * 1e3,
            "values": {},
        }
        for b in content.get("benchmarks", [])
    ]


def run(parts: Sequence[Part], out: Path, device: str, say: Line) -> bool:
    """Run the parts one after the other and write what there is after each. True if all ended well."""
    described = machine.describe(device)
    described["rates"] = {"name": described["device"], **rates.measure(device, quick=True)}
    if device == "cuda":
        torch.cuda.empty_cache()
    found: list[Any] = []
    ended: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, part in enumerate(parts):
            ended[part.name], rows = run_part(part, Path(folder) / f"{i}.json", say)
            found += rows
            table.write_json(out, found, described, "make bench-gpu", parts=ended)
    return all(part["ended"] == "done" for part in ended.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure everything on this machine's GPU.")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>.json")
    parser.add_argument("--only", help="names of parts, with commas: " + ", ".join(part.name for part in PARTS))
    options = parser.parse_args(arguments)
    known = {part.name: part for part in PARTS}
    names = list(known) if options.only is None else options.only.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print(
            "bench-gpu: torch sees no CUDA device, so there is nothing to measure (predictions: python -m benchmarks.roofline)",
            file=sys.stderr,
        )
        return 1
    device = torch.cuda.get_device_name().replace(" ", "-")
    out = options.out or RESULTS / f"{device}.json"
    start = time.perf_counter()
    well = run([known[name] for name in names], out, "cuda", lambda text: print(text, flush=True))
    print(f"{out} ({time.perf_counter() - start:.0f} s); tables: python -m benchmarks.report {out}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
