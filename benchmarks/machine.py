"""What a number depends on: processor or GPU, versions, threads, load, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve()
ROOT = _HERE.parents[1] if (_HERE.parents[1] / "qprune").is_dir() else _HERE.parents[2]
"""The folder that `qprune` lies in: the checkout, or site-packages."""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def describe(device: str) -> dict[str, Any]:
    """The machine, for the header of the table and for JSON files."""
    gpu = device == "cuda"
    checkout = (ROOT / "setup.py").is_file()
    commit = (_output("git", "rev-parse", "--short=12", "HEAD") if checkout else "") or "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", "kernels", "qprune", "benchmarks/*.py")
    return {
        "device": torch.cuda.get_device_name() if gpu else f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "",
        "cuda": torch.version.cuda if gpu else "",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit + (" with changes" if changed else ""),
    }


def headline(machine: dict[str, Any]) -> str:
    """One line for the top of the table."""
    gpu = f", driver {machine['driver']}, CUDA {machine['cuda']}" if machine["cuda"] else f", {machine['threads']} threads"
    versions = f"torch {machine['torch']}, Python {machine['python']}"
    return f"{machine['device']}{gpu}, {versions}, commit {machine['commit']}, {machine['date']}, load before {machine['load']}"
