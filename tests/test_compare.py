"""The parts of a comparison: options, baselines, sizes, statistics, tables."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import pytest
import torch
import typer
from torch import nn

import qprune
from qprune import arguments
from qprune.budget import Budget
from qprune.compare.baselines import Pruning, uniform_bits
from qprune.compare.options import CompareOptions
from qprune.compare.page import compare_page
from qprune.compare.summary import float_row, rows_of, sentence
from qprune.compare.tables import cells_csv, markdown, table_csv
from qprune.convert import convert
from qprune.cost import cost, geometry_of
from qprune.errors import InfeasibleBudgetError, InputError, StudyError
from qprune.geometry import Geometry, trace_geometry
from qprune.options import OptionError, RunOptions
from qprune.overhead import overhead
from qprune.policy import LayerBits, Policy
from qprune.prepare import prepare
from qprune.recipes import BitRecipe
from qprune.sizes import mask_bits
from qprune.space import SearchSpace
from qprune.study.queue import check_options
from qprune.tasks import data, models
from qprune.usage import MEASURES, Meter

FIXED = {"conv1": LayerBits(8, 8), "fc": LayerBits(8, 8)}


def geometry() -> Geometry:
    return Geometry(trace_geometry(models.resnet8(in_channels=1), torch.zeros(1, 1, 16, 16)))


def bops(w: int, a: int) -> float:
    return float(cost(Policy.uniform(geometry(), w, a, FIXED)).bops)


def test_uniform_bits_lie_around_the_budget() -> None:
    limits = {"bops": 0.5 * (bops(3, 3) + bops(3, 4))}
    assert uniform_bits(geometry(), FIXED, limits) == (3, 3)
    assert uniform_bits(geometry(), FIXED, limits, above=True) == (3, 4)
    exactly = {"bops": bops(3, 3)}
    assert uniform_bits(geometry(), FIXED, exactly) == uniform_bits(geometry(), FIXED, exactly, above=True) == (3, 3)
    # 7 · 1 is nearer to this budget than 3 · 2, but nobody would use it
    assert uniform_bits(geometry(), FIXED, {"bops": bops(7, 1)}) == (2, 3)
    assert uniform_bits(geometry(), FIXED, {"size_bits": float(cost(Policy.uniform(geometry(), 4, 2, FIXED)).size_bits)}) == (4, 4)
    assert uniform_bits(geometry(), FIXED, {"bops": 1e15}, above=True) == (8, 8)


def test_uniform_bits_keep_every_limit() -> None:
    size = float(cost(Policy.uniform(geometry(), 2, 2, FIXED)).size_bits)
    assert uniform_bits(geometry(), FIXED, {"bops": bops(6, 6), "size_bits": size}) == (2, 3)


def test_no_uniform_network_is_cheap_enough() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"no uniform network is within the budget: w1a1 has bops .*, the limit is 10;"):
        uniform_bits(geometry(), FIXED, {"bops": 10.0})


@pytest.fixture(scope="module")
def recipe() -> BitRecipe:
    return BitRecipe(RunOptions(), data.load("digits").train.x[:2])


@pytest.mark.parametrize("budget", ["w3a3", "1.5%", "bops=w4a4,size=w2a2"])
def test_pruning_makes_room_for_wider_bits(recipe: BitRecipe, budget: str) -> None:
    net = models.for_task("resnet8", data.load("digits"))
    pruning = Pruning(recipe, Budget.parse(budget))
    limits = pruning.limits(net)
    before = pruning.bits(net, limits)
    smaller, kept = pruning.prune(net)
    w, a = pruning.bits(smaller, limits)
    final = recipe.at_bits(smaller, w, a, [data.load("digits").train.x[:8]])
    found = cost(final)
    assert 0 < kept < 1 and (w, a) == tuple(bits + 1 for bits in before)
    assert all(float(getattr(found, name)) <= limit * (1 + 1e-9) for name, limit in limits.items())
    # a filter more in the widest layer would not fit
    wider, _ = Pruning(recipe, Budget.parse(budget), share=(kept + 1 / 64) ** 2 * 1.1).prune(net)
    assert float(cost(wider, recipe.example).macs) > float(cost(smaller, recipe.example).macs)


def test_pruning_to_a_share_takes_the_least_important_filters(recipe: BitRecipe) -> None:
    torch.manual_seed(3)
    net = models.for_task("lenet5", data.load("digits"))
    assert isinstance(net, nn.Module)
    conv = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        conv.weight[0] *= 1e-3
    smaller, kept = Pruning(recipe, Budget(bops="w3a3"), share=0.6).prune(net)
    left = next(module for module in smaller.modules() if isinstance(module, nn.Conv2d))
    assert kept < 1 and left.out_channels < conv.out_channels
    norms = conv.weight.detach().abs().sum((1, 2, 3))
    expected = norms.sort(descending=True).values[: left.out_channels].sort().values
    torch.testing.assert_close(left.weight.detach().abs().sum((1, 2, 3)).sort().values, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ("edmips", "guess")},
            r"methods: 'guess' cannot be compared; expected some of edmips, darts.*prune-then-quantize",
        ),
        ({"methods": ("slimmable",)}, r"methods: 'slimmable' cannot be compared"),
        ({"methods": ("edmips", "edmips")}, r"methods: expected at least one, every one once, got edmips, edmips"),
        ({"budgets": ()}, r"budgets: expected at least one, every one once, got none"),
        ({"budgets": ("macs=50%",)}, r"'macs=50%' limits multiplications, which do not depend on bits"),
        ({"settings": {"zur": {"samples": 3}}}, r"settings: 'zur' is none of the methods, which are edmips, uniform"),
        ({"settings": {"edmips": {"samples": 3}}}, r"settings: edmips has no option 'samples'; it has w_bits"),
        ({"settings": {"uniform": {"share": 0.3}}}, r"settings: uniform has no option 'share'"),
        (
            {"methods": ("prune-then-quantize",), "settings": {"prune-then-quantize": {"share": 1.5}}},
            r"share of the multiplications in",
        ),
        ({"methods": ("prune-then-quantize",), "settings": {"prune-then-quantize": {"order": "l2"}}}, r"order: expected one of l1, gamma"),
        ({"seeds": 0}, r"seeds must be positive"),
        ({"model": "resnet9"}, r"model: 'resnet9' is unknown"),
    ],
)
def test_options_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CompareOptions(**changes)


def test_settings_reach_their_method_only() -> None:
    settings = {"zur": {"samples": 3, "pairs": [[2, 2], [4, 4]]}, "uniform": {"search_lr": 0.5}}
    options = CompareOptions(methods=("zur", "edmips", "uniform"), settings=settings)
    zur, edmips = options.run_options("zur", "w3a3"), options.run_options("edmips", "w3a3")
    assert (zur.method, zur.method_options, zur.pairs) == ("zur", {"samples": 3}, ((2, 2), (4, 4)))
    assert (edmips.method, edmips.method_options, edmips.pairs, edmips.search_lr) == ("edmips", {}, (), 0.02)
    assert options.run_options("uniform", "w3a3").search_lr == 0.5


def test_a_cell_keeps_its_number() -> None:
    few = CompareOptions(methods=("edmips", "uniform"), budgets=("w3a3",)).cells()
    many = CompareOptions(methods=("edmips", "uniform", "darts"), budgets=("w3a3", "w2a2")).cells()
    assert len(many) == 6 and few.items() <= many.items()


def test_what_may_grow() -> None:
    growing = ("seeds", "methods", "budgets", "settings")
    old = CompareOptions(methods=("edmips",), seeds=2, settings={"edmips": {"arch_lr": 0.1}}).as_dict()

    def check(**changes: Any) -> None:
        values = {"methods": ("edmips",), "seeds": 2, "settings": {"edmips": {"arch_lr": 0.1}}, **changes}
        check_options(old, CompareOptions(**values).as_dict(), "here", growing)

    check()
    check(methods=("edmips", "zur"), settings={"edmips": {"arch_lr": 0.1}, "zur": {"samples": 2}})
    check(seeds=3, budgets=("w3a3", "w2a2"))
    for changes in ({"seeds": 1}, {"methods": ("uniform", "edmips")}, {"settings": {"edmips": {"arch_lr": 0.2}}}, {"lr": 0.3}):
        with pytest.raises(StudyError, match="here was begun with"):
            check(**changes)


def test_words() -> None:
    assert arguments.words("w3a3, w2a2") == ("w3a3", "w2a2")
    assert arguments.words("bops=w3a3,size=20%; w2a2") == ("bops=w3a3,size=20%", "w2a2")
    assert arguments.words("bops=w3a3,size=20%;") == ("bops=w3a3,size=20%",)
    found = arguments.method_settings(["zur.samples=3", "prune-then-quantize.share=0.5", "zur.pairs=[[2, 2]]"])
    assert found == {"zur": {"samples": 3, "pairs": [[2, 2]]}, "prune-then-quantize": {"share": 0.5}}
    with pytest.raises(typer.BadParameter, match=r"expected method\.name=value, got samples=3"):
        arguments.method_settings(["samples=3"])


def test_overhead() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    example = torch.rand(2, 1, 6, 6)
    mixed = prepare(net, SearchSpace((0, 2, 4), (4,), granularity="filter"), {"5": None}, example)
    with pytest.raises(InputError, match="layer 0 is being searched"):
        overhead(mixed)
    policy = Policy({"0": LayerBits((0, 2, 2, 2, 0, 2), 4), "2": LayerBits((2, 4, 4, 4), 4)}, geometry_of(mixed))
    # layer 0: a mask of 6 filters; layer 2: 4 widths; ranges: one per filter and one for the input
    masked = overhead(convert(mixed, policy, remove=False))
    assert masked == {"index": mask_bits(6, 4) + 4 * 4, "codebooks": 32 * (6 + 1 + 4 + 1)}
    # a network that lost its two filters needs no mask and no ranges of theirs
    assert overhead(convert(mixed, policy)) == {"index": 4 * 4, "codebooks": 32 * (4 + 1 + 4 + 1)}
    assert overhead(net) == {"index": 0, "codebooks": 0}


def test_meter() -> None:
    meter = Meter()
    with meter.phase("big"):
        block = torch.ones(30_000_000)
        total = float(block.sum())
        del block
    with meter.phase("small"):
        total += float(torch.ones(1000).sum())
    big, small = meter.phases["big"], meter.phases["small"]
    assert total == 30_001_000 and big.measure in MEASURES and big.seconds > 0 and big.cpu_seconds > 0
    if big.measure == "rss":
        assert 110e6 < big.memory - big.before < 160e6 and small.memory - small.before < 10e6
    with pytest.raises(ValueError, match="no"), meter.phase("failed"):
        raise ValueError("no")
    assert set(meter.as_dict()) == {"big", "small"}


def cell(method: str, seed: int, accuracy: float, size: int = 1000, budget: str = "w3a3", cpu: float = 6.0) -> dict[str, Any]:
    usage = {"seconds": 2 * cpu, "cpu_seconds": cpu, "memory": 5_000_000 + seed, "before": 4_000_000, "measure": "rss"}
    return {
        "budget": budget, "method": method, "seed": seed, "label": method, "test_accuracy": accuracy, "val_accuracy": accuracy - 0.01,
        "bops": 9e6, "macs": 1e6, "size_bits": size, "w_bits": 3.0, "a_bits": 3.0,
        "size": {"values": size, "index": 100, "codebooks": 20}, "usage": {"search": usage, "finetune": usage},
        "float_network": "00", "host": "h", "pid": 1,
    }  # fmt: skip


def float_cell(seed: int, cpu: float) -> dict[str, Any]:
    usage = {"seconds": 9.0, "cpu_seconds": cpu, "memory": 3_000_000, "before": 0, "measure": "rss"}
    return {**cell("float", seed, 0.95), "usage": {"float": usage}, "float_epochs": 4}


FLOATS = [float_cell(0, 8.0), float_cell(1, 12.0), float_cell(2, 16.0)]
CELLS = [
    *(cell("uniform", seed, accuracy) for seed, accuracy in enumerate((0.90, 0.92, 0.91))),
    *(cell("edmips", seed, accuracy, 800) for seed, accuracy in enumerate((0.92, 0.939, 0.931))),
    *(cell("darts", seed, accuracy) for seed, accuracy in enumerate((0.91, 0.91))),
]
ORDER = [("w3a3", method) for method in ("edmips", "darts", "zur", "uniform")]


def rows() -> list[dict[str, Any]]:
    return rows_of(CELLS, FLOATS, ORDER, {"w3a3": {"bops": 10e6}})


def test_rows() -> None:
    edmips, darts, uniform = rows()
    assert [row["method"] for row in (edmips, darts, uniform)] == ["edmips", "darts", "uniform"]
    # differences 0.020, 0.019, 0.021: mean 0.02, s = 0.001, t(0.975, 2) = 4.30265, t = 20√3: p = 1 − t/√(2 + t²)
    assert edmips["difference"]["mean"] == pytest.approx(0.02)
    assert edmips["difference"]["half_95"] == pytest.approx(4.30265 * 0.001 / math.sqrt(3), rel=1e-5)
    t = 20 * math.sqrt(3)
    assert edmips["difference"]["p"] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert edmips["difference"]["p_holm"] == pytest.approx(2 * edmips["difference"]["p"])
    # only two seeds in common, +0.01 and −0.01
    assert darts["difference"]["runs"] == 2 and darts["difference"]["mean"] == pytest.approx(0.0) and darts["difference"]["p"] == 1.0
    assert uniform["difference"] is None and uniform["baseline"] and not edmips["baseline"]
    # 12 s over 2, 3 and 4 s per float epoch
    assert edmips["epochs"] == pytest.approx(4.0)
    assert edmips["size"] == {"values": 800.0, "index": 900.0, "codebooks": 920.0}
    assert edmips["of_budget"] == pytest.approx(0.9) and edmips["within"]
    assert (edmips["memory"], edmips["memory_used"]) == (5_000_002, 1_000_002)


def test_above_the_budget() -> None:
    (row,) = rows_of(CELLS[:3], FLOATS, [("w3a3", "uniform")], {"w3a3": {"bops": 10e6, "size_bits": 500.0}})
    assert row["of_budget"] == 2.0 and not row["within"]


def test_sentences() -> None:
    found = rows()
    assert sentence(found, "w3a3") == (
        "At w3a3, against the uniform network (uniform): significantly better: edmips (+2.00 ± 0.25 points); no significant difference for "
        "1 of 2 methods (paired by seed, 5 %, Holm)."
    )
    single = rows_of([c for c in CELLS if c["seed"] == 0], FLOATS, ORDER, {"w3a3": {"bops": 10e6}})
    assert "the best search is edmips with +2.00 points; one seed says nothing" in sentence(single, "w3a3")
    assert sentence(found, "w2a2") == "At w2a2 there is nothing to compare yet."


def test_tables() -> None:
    first = float_row(FLOATS)
    assert first is not None
    text = markdown([first, *rows()])
    lines = text.splitlines()
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1 and all(line.startswith("| ") or line[1] == "-" for line in lines)
    assert "93.00 ± 2.37 %" in lines[3] and "+2.00 ± 0.25" in lines[3] and "90.0%" in lines[3]
    table = list(csv.DictReader(io.StringIO(table_csv([first, *rows()]))))
    assert [row["method"] for row in table] == ["float", "edmips", "darts", "uniform"]
    assert float(table[1]["difference"]) == pytest.approx(0.02) and table[3]["difference"] == "" and table[1]["size_codebooks"] == "920.0"
    cells = list(csv.DictReader(io.StringIO(cells_csv(CELLS))))
    assert len(cells) == 8 and cells[3]["cpu_seconds"] == "12.000" and cells[3]["seed"] == "0"


def page_content() -> dict[str, Any]:
    return {
        "options": CompareOptions(methods=("edmips", "darts", "zur", "uniform")).as_dict(), "environment": {"torch": torch.__version__},
        "limits": {"w3a3": {"bops": 8e6}}, "cells": {"done": 8, "total": 12, "seconds_total": 99.0}, "float": float_row(FLOATS),
        "rows": rows_of(CELLS, FLOATS, ORDER, {"w3a3": {"bops": 8e6}}), "sentences": ["A & B"],
        "errors": [{"budget": "w3a3", "method": "zur", "seed": 1, "error": "ValueError: <bad>"}],
    }  # fmt: skip


def test_page() -> None:
    result = page_content()
    page = compare_page(result)
    assert page == compare_page(result)
    for text in ("A &amp; B", "4 of 12 cells are missing", "&lt;bad&gt;", "Above the budget: edmips at w3a3", "<svg", "bops ≤ 8e+06"):
        assert text in page, text
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert qprune.__version__
    empty = {**result, "rows": [], "float": None, "errors": []}
    assert "no cell is finished yet" in compare_page(empty)
