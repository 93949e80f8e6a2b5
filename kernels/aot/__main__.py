"""Compile every kernel for sm_80 and sm_90 and check its budget; exits with 1 if a row breaks it. Must run without TRITON_INTERPRET."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .table import FAMILIES, table

COLUMNS = {"kernel": 26, "case": 40, "arch": 4, "registers": 9, "shared": 7, "ldg128": 6, "stg128": 6, "mma": 4, "slots": 6}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qprune.kernels.aot", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a representative subset, under a minute")
    parser.add_argument("--only", choices=FAMILIES, help="the kernels of one module")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = []
    print("  ".join(name.rjust(width) for name, width in COLUMNS.items()))
    for row in table(arguments.quick, arguments.only):
        rows.append(row)
        cells = (("" if row[name] is None else str(row[name])).rjust(width) for name, width in COLUMNS.items())
        print("  ".join(cells), *(f"  ! {what}" for what in row["violations"]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["violations"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
