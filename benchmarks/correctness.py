"""The tests of the kernels on this machine's GPU, in several processes at once, since compiling takes most of their time.

    python -m benchmarks.correctness [--seconds 170] [--processes 8] [--out results.json]

What was not reached when the time is up is counted, and so are failures, by name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .machine import ROOT

_RESULT = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", re.MULTILINE)


def _pytest(*words: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider", *words]


def collect(tests: str) -> list[str]:
    """The names of the tests that run on a GPU."""
    done = subprocess.run(_pytest("--collect-only", "-q", "-m", "gpu", tests), cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if "::" in line and " " not in line.split("::")[0]]


def run(names: Sequence[str], processes: int, seconds: float) -> dict[str, Any]:
    """Run the tests and say how they ended, as a row of results. Neighbours share kernels, so a process gets a run of them."""
    shares = [names[i * len(names) // processes : (i + 1) * len(names) // processes] for i in range(processes)]
    start, running = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for i, share in enumerate(filter(None, shares)):
            listed, printed = Path(folder) / f"{i}.txt", Path(folder) / f"{i}.log"
            listed.write_text("\n".join(share), encoding="utf-8")
            with printed.open("w", encoding="utf-8") as file:
                process = subprocess.Popen(_pytest("-v", f"@{listed}"), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            running.append((process, printed))
        for process, _ in running:
            try:
                process.wait(timeout=max(seconds - (time.perf_counter() - start), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        found = dict(pair for _, printed in running for pair in _RESULT.findall(printed.read_text(encoding="utf-8")))
    ends = Counter(found.values())
    return {
        "kernel": "correctness", "case": "pytest -m gpu", "unit": "", "values": {}, "seconds": round(time.perf_counter() - start),
        "passed": ends["PASSED"], "failed": ends["FAILED"] + ends["ERROR"], "skipped tests": ends["SKIPPED"],
        "not reached": len(names) - len(found), "failures": sorted(name for name, end in found.items() if end in ("FAILED", "ERROR")),
    }  # fmt: skip


def sentence(row: dict[str, Any]) -> str:
    """A row in one line."""
    counts = ", ".join(f"{row[name]} {name}" for name in ("passed", "failed", "skipped tests", "not reached"))
    return f"{counts} in {row['seconds']} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correctness", description="Test the kernels on the GPU, in parallel.")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after so many")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--tests", default="tests", help="file or folder of tests")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    options = parser.parse_args(arguments)
    names = collect(options.tests)
    if not names:
        print(f"correctness: no tests marked gpu in {options.tests}", file=sys.stderr)
        return 1
    row = run(names, options.processes, options.seconds)
    if options.out is not None:
        options.out.write_text(json.dumps({"rows": [row]}, indent=1) + "\n", encoding="utf-8")
    for name in row["failures"]:
        print(f"FAILED {name}")
    print(sentence(row))
    return int(row["failed"] > 0 or row["not reached"] > 0)


if __name__ == "__main__":
    sys.exit(main())
