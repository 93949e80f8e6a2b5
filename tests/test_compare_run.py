"""A whole comparison in its folder: begun, interrupted, gone on with, grown, refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import qprune as package
from qprune.compare.cell import Comparison
from qprune.compare.options import CompareOptions, methods
from qprune.compare.run import CompareJob, open_folder, run
from qprune.errors import CheckpointError, InfeasibleBudgetError, StudyError
from qprune.study.worker import work
from qprune.tasks import models
from qprune.tasks.train import evaluate
from tests.test_cli import qprune

TINY = CompareOptions(
    model="lenet5",
    methods=("edmips", "uniform", "prune-then-quantize"),
    seeds=1,
    float_epochs=1,
    search_epochs=1,
    finetune_epochs=1,
    batch_size=256,
)
WORDS = ["compare", "--model", "lenet5", "--methods", ",".join(TINY.methods), "--budgets", "w3a3", "--seeds", "1", "--batch-size", "256"]
WORDS += ["--float-epochs", "1", "--search-epochs", "1", "--finetune-epochs", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cell was filled when the worker was interrupted, another was killed half-way; the command line goes on."""
    folder = tmp_path_factory.mktemp("runs") / "compare"
    open_folder(folder, TINY)
    folder.mkdir()
    (folder / "options.yaml").write_text(yaml.safe_dump(TINY.as_dict()))
    comparison = Comparison(TINY, folder)
    comparison.check()
    queue = CompareJob(TINY, folder).queue()
    queue.fill()
    done: list[int] = []

    def one(index: int, seed: int) -> tuple[float, dict[str, Any]]:
        if done:
            raise KeyboardInterrupt
        done.append(index)
        return comparison.run(index, seed)

    with pytest.raises(KeyboardInterrupt):
        work(queue, one)
    queue.close()
    half = comparison.place("w3a3", "uniform", 0)
    half.mkdir(parents=True)
    (half / "metrics.jsonl").write_text('{"phase": "finetune"}\n')
    went_on = qprune(*WORDS, "--out", str(folder))
    assert went_on.returncode == 0, went_on.stderr
    assert "3/3 finished" in went_on.stdout and "| Budget | Method " in went_on.stdout and "one seed says nothing" in went_on.stdout
    assert len((half / "metrics.jsonl").read_text().splitlines()) == 2
    return folder


def cells_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parts[-3]: json.loads(path.read_text()) for path in folder.glob("cells/*/*/seed-0/result.json")}


def test_the_folder(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert yaml.safe_load((finished / "options.yaml").read_text()) == result["options"] == TINY.as_dict()
    assert result["cells"]["done"] == result["cells"]["total"] == 3 and result["errors"] == []
    cells = cells_of(finished)
    assert set(cells) == set(TINY.methods) and len({cell["pid"] for cell in cells.values()}) == 2
    assert len({cell["float_network"] for cell in cells.values()}) == 1
    rows = {row["method"]: row for row in result["rows"]}
    for method, cell in cells.items():
        assert rows[method]["test_accuracy"]["mean"] == cell["test_accuracy"] and rows[method]["within"]
        assert rows[method]["size"]["values"] == cell["size_bits"] and rows[method]["epochs"] > 0
    expected = cells["edmips"]["test_accuracy"] - cells["uniform"]["test_accuracy"]
    assert rows["edmips"]["difference"]["mean"] == pytest.approx(expected)
    with (finished / "table.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["float", *TINY.methods]
    assert (finished / "table.md").read_text().count("\n") == 6
    assert "Comparison: lenet5 on digits" in (finished / "report.html").read_text()


def test_budget_and_epochs(finished: Path) -> None:
    """Everybody is within the budget, has trained as long as the others, and the networks are those that were measured."""
    comparison, cells = Comparison(TINY, finished), cells_of(finished)
    limit = comparison.targets["w3a3"].limits["bops"]
    assert cells["uniform"]["label"] == "w3a3" and cells["uniform"]["bops"] == limit
    assert "w4a4" in cells["prune-then-quantize"]["label"] and 0.9 * limit < cells["prune-then-quantize"]["bops"] <= limit
    assert 0.9 * limit < cells["edmips"]["bops"] <= limit
    for method, phases in (("edmips", 2), ("uniform", 2), ("prune-then-quantize", 2)):
        lines = (comparison.place("w3a3", method, 0) / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == phases
    place = comparison.place("w3a3", "uniform", 0)
    net = package.load(place / "model.safetensors", lambda: models.for_task("lenet5", comparison.task))
    assert evaluate(net, comparison.task.loader("test", 256))[1] == cells["uniform"]["test_accuracy"]


def test_a_cell_is_reproducible(finished: Path, tmp_path: Path) -> None:
    for name in ("float-0.safetensors", "float-0.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    before = cells_of(finished)["edmips"]
    other = Comparison(TINY, tmp_path)
    index = next(index for index, cell in other.cells.items() if cell == ("w3a3", "edmips"))
    torch.rand(3)
    again = other.run(index, 0)[1]
    varying = ("usage", "pid", "host")
    assert {k: v for k, v in again.items() if k not in varying} == {k: v for k, v in before.items() if k not in varying}


def test_a_lost_result_is_restored_and_a_damaged_one_named(finished: Path) -> None:
    path = Comparison(TINY, finished).place("w3a3", "edmips", 0) / "result.json"
    before = path.read_text()
    path.unlink()
    done = qprune(*WORDS, "--out", str(finished), "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text()) == json.loads(before)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"edmips.seed-0.result\.json is damaged .* delete it to go on"):
        run(TINY, finished, workers=0)
    path.write_text(before)


def test_it_may_grow(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    for source in finished.rglob("*.*"):
        if source.is_file() and source.suffix in (".json", ".yaml", ".db"):
            target = folder / source.relative_to(finished)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    more = replace(TINY, seeds=2, methods=(*TINY.methods, "uniform-above"), budgets=("w3a3", "w2a2"))
    result = run(more, folder, workers=0)
    assert (result["cells"]["done"], result["cells"]["total"]) == (3, 16)
    with pytest.raises(StudyError, match="was begun with budgets="):
        run(TINY, folder, workers=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"finetune_lr": 0.5}, StudyError, r"was begun with finetune_lr=0\.03, not 0\.5"),
        ({"methods": ("uniform",)}, StudyError, r"was begun with methods="),
        ({"seeds": 2, "budgets": ("w3a3", "0.1%")}, InfeasibleBudgetError, r"no uniform network is within the budget"),
    ],
)
def test_refusals(finished: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(replace(TINY, **changes), finished, workers=1)
    assert yaml.safe_load((finished / "options.yaml").read_text()) == TINY.as_dict()


def test_a_method_that_cannot_be_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    options = replace(TINY, model="mobilenet", methods=("uniform", "prune-then-quantize"))
    with pytest.raises(package.QPruneError, match=r"prune-then-quantize at w3a3: layer layer1\.0\.depthwise: .* cannot be made slim"):
        run(options, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_method_runs(finished: Path, tmp_path: Path) -> None:
    others = tuple(name for name in methods() if name not in TINY.methods and "zur" not in name)
    comparison = Comparison(replace(TINY, methods=others), tmp_path)
    for name in ("float-0.safetensors", "float-0.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    comparison.check()
    target = comparison.targets["w3a3"]
    for index, (_, method) in comparison.cells.items():
        value, result = comparison.run(index, 0)
        assert result["method"] == method and value == result["val_accuracy"] and 0 < result["test_accuracy"] < 1
        if method == "annc":
            layers = json.loads((comparison.place("w3a3", "annc", 0) / "policy.json").read_text())["layers"]
            assert 0.9 * target.size < result["size_bits"] <= target.size
            assert [layer["a_bits"] for layer in layers.values()] == [8, 3, 3, 3]
        else:
            assert result["bops"] <= target.limits["bops"] * (1 + 1e-9)


def test_a_budget_means_the_same_for_all(tmp_path: Path) -> None:
    """Method zur leaves linear layers float: "w3a3" of its own network would be more."""
    with pytest.raises(InfeasibleBudgetError, match=r"zur at w3a3: no policy meets the budget"):
        Comparison(replace(TINY, methods=("zur",)), tmp_path).check()
    comparison = Comparison(replace(TINY, model="resnet8", methods=("zur", "uniform-zur", "annc")), tmp_path)
    comparison.check()
    target = comparison.targets["w3a3"]
    assert comparison.run_options("zur", "w3a3").budget == f"bops={target.limits['bops']!r}"
    annc = comparison.run_options("annc", "w3a3")
    assert annc.budget == f"size={target.size!r}" and annc.method_options == {"a_bits": 3}
