"""The tables of docs/scale.md are what the script gives, and follow from their assumptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qprune import scale
from qprune.benchmarks import operations
from qprune.benchmarks import scale as tables
from qprune.benchmarks.scale import DOCUMENT
from qprune.benchmarks.scale_assumptions import ASSUMED, Assumptions


def test_the_committed_tables_are_those_of_the_script() -> None:
    text = DOCUMENT.read_text()
    assert tables.put(text, tables.document()) == text, "run python -m benchmarks.scale --write"


def test_texts_are_written_between_their_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "document", lambda: {"one": "new", "two": "newer"})
    begins = [f"<!-- {name}: python -m benchmarks.scale --write -->" for name in ("one", "two")]
    path = tmp_path / "scale.md"
    path.write_text(f"a\n{begins[0]}\nold\n<!-- end of one -->\nb\n{begins[1]}\n<!-- end of two -->\nc\n")
    assert tables.main(["--write"], path) == 0
    new = f"a\n{begins[0]}\n\nnew\n\n<!-- end of one -->\nb\n{begins[1]}\n\nnewer\n\n<!-- end of two -->\nc\n"
    assert path.read_text() == new
    assert tables.put(new, {"one": "new", "two": "newer"}) == new


def test_what_dominates_follows_from_the_assumptions() -> None:
    def dominant(ranks: int, given: Assumptions = ASSUMED, slow: bool = False) -> str:
        return scale.step(tables.parts(ranks, given, slow), tables.plan(ranks, 1024), "search").dominant

    assert [dominant(ranks) for ranks in (1, 8, 64)] == ["computing", "computing", "launching"]
    assert dominant(8, replace(ASSUMED, workers=2)) == "loading"
    assert dominant(16, replace(ASSUMED, ethernet=1e9, operation=0.0), slow=True) == "communication"


def test_memory_grows_with_the_batch_and_less_when_mixed_again() -> None:
    lean, full = tables.size(recompute=True), tables.size()
    assert lean.kept < full.kept
    assert scale.largest_batch(lean, 141e9, 8, 2) > scale.largest_batch(full, 141e9, 8, 2) > 0


def test_counted_operations() -> None:
    found = operations.operations("resnet8")
    # 9 convolutions, 9 normalisations, 7 ReLUs, ...: forward and backward
    assert 60 < found["float"] < found["fixed"] < found["search"]


def test_operations_of_the_tables() -> None:
    found = operations.operations("resnet50")
    for name, count in ASSUMED.operations:
        assert found[name] == pytest.approx(count, rel=0.15), name
