"""`python -m benchmarks` is `qprune bench` in a checkout that is not installed."""

from __future__ import annotations

import sys

from qprune import cli

if __name__ == "__main__":
    sys.argv = ["python -m benchmarks", "bench", *sys.argv[1:]]
    cli.main()
