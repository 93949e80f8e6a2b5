"""A small grid study from Python: 15 ways to split conv1's filters, 3 seeds, two local workers. Takes a few minutes on two cores.

    python examples/study_grid.py runs/example_study

Prints the answer and the five best heterogeneous networks by validation accuracy. Run it again to go on after an interruption.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from qprune.study.options import StudyOptions
from qprune.study.progress import StudyBar
from qprune.study.run import run


def main(folder: Path) -> None:
    options = StudyOptions(pairs=((2, 2), (3, 3), (4, 4)), others=(2, 2), step=4, seeds=3, epochs=8)
    with StudyBar(Console()) as bar:
        result = run(options, folder, workers=2, watch=bar.watch)
    print(result["sentence"])
    mixed = [row for row in result["points"] if not row["homogeneous"]]
    for row in sorted(mixed, key=lambda row: -row["val_accuracy"]["mean"])[:5]:
        val, test = (100 * row[metric]["mean"] for metric in ("val_accuracy", "test_accuracy"))
        print(f"{row['label']:32} {row['cost'] / 1e6:7.2f} M BOPs  validation {val:.2f} %  test {test:.2f} %")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example_study"))
