"""From finished trials to the sentence: matched cost, corrections, decisions, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qprune.study.analysis import analyse, compare_at_cost, decide, holm
from qprune.study.grid import Point
from qprune.study.page import study_page
from qprune.study.progress import seconds_left
from qprune.study.queue import Finished, Progress
from qprune.study.statistics import one_way

POINTS = [Point("low", (4, 0), True, 100.0), *(Point(f"mix {i}", (2, 2), False, 100.0 + 10 * i) for i in range(1, 10))]
POINTS += [Point("high", (0, 4), True, 200.0), Point("beyond", (1, 3), False, 210.0)]


def trials(accuracy: Callable[[int, int], float], seeds: int = 4, missing: tuple[tuple[int, int], ...] = ()) -> list[Finished]:
    def one(index: int, seed: int) -> Finished:
        value = accuracy(index, seed)
        names = ("val_accuracy", "test_accuracy", "test_loss", "val_loss", "train_loss")
        result = {**dict.fromkeys(names, value), "label": POINTS[index].label, "cost": POINTS[index].cost}
        return Finished((index, seed), result, 2.0)

    return [one(i, s) for i in range(len(POINTS)) for s in range(seeds) if (i, s) not in missing]


def line(index: int, seed: int) -> float:
    """On the homogeneous line of every seed: 0.5 at cost 100, 0.7 at cost 200."""
    return 0.3 + 0.002 * POINTS[index].cost + 0.01 * seed


def test_matched_cost_is_paired_by_seed() -> None:
    def accuracy(index: int, seed: int) -> float:
        return line(index, seed) + (0.01 * index + 0.001 * (seed % 2) if POINTS[index].label.startswith("mix") else 0.0)

    result = analyse(POINTS, trials(accuracy), 1.0, "BOPs")
    by_label = {row["label"]: row["matched"] for row in result["points"]}
    assert by_label["low"] is None and by_label["beyond"] is None
    for i in range(1, 10):
        matched = by_label[f"mix {i}"]
        assert matched["difference"] == pytest.approx(0.01 * i + 0.0005)
        # differences d, d + 0.001, d, d + 0.001: s = 0.001/√3, t(0.975, 3) = 3.182446
        assert matched["half_95"] == pytest.approx(3.182446 * 0.001 / np.sqrt(3) / 2, rel=1e-6)
        assert matched["runs"] == 4 and matched["p_holm"] < 0.05
    summary = result["matched"]
    assert (summary["compared"], summary["above"], summary["better"], summary["worse"]) == (9, 9, 9, 0)
    assert summary["best"]["label"] == "mix 9"
    assert "9 of 9 heterogeneous networks are higher; 9 significantly, and 0 significantly lower" in result["sentence"]


def test_a_seed_that_is_missing_somewhere_is_left_out_there() -> None:
    result = analyse(POINTS, trials(line, missing=((0, 2), (3, 1))), 1.0, "BOPs")
    runs = {row["label"]: row["matched"]["runs"] for row in result["points"] if row["matched"]}
    assert (runs["mix 3"], runs["mix 4"]) == (2, 3)
    assert "blocked" not in result["variance"] and result["variance"]["one_way"]["df_w"] == 29


def test_only_the_neighbours_on_the_line_count() -> None:
    points = [("a", True, 1.0, 0.2), ("b", True, 2.0, 0.6), ("c", True, 4.0, 0.4), ("m", False, 3.0, 0.55)]
    rows: list[dict[str, Any]] = [
        {"label": n, "homogeneous": h, "cost": c, "runs": [{"seed": 0, "test_accuracy": y}], "val_accuracy": {"mean": y}}
        for n, h, c, y in points
    ]
    compare_at_cost(rows)
    assert rows[3]["matched"]["difference"] == pytest.approx(0.55 - 0.5)
    assert rows[3]["matched"]["half_95"] is None and rows[3]["matched"]["p"] is None


def test_holm() -> None:
    # sorted 0.01·4, 0.02·3, 0.03·2 → not below 0.06, 0.5·1
    assert holm([0.02, 0.5, 0.01, None, 0.03]) == [pytest.approx(0.06), 0.5, pytest.approx(0.04), None, pytest.approx(0.06)]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def noisy(between: float, within: float, seed: int) -> Callable[[int, int], float]:
    rng = np.random.default_rng(seed)
    shift, noise = rng.normal(0, between, 12), rng.normal(0, within, (12, 40))
    return lambda index, run: line(index, 0) + float(shift[index] + noise[index, run])


@pytest.mark.parametrize(
    ("between", "within", "answer", "words"),
    [
        (0.05, 0.002, "yes", "larger than seed noise? Yes:"),
        (0.0, 0.01, "no", "larger than seed noise? No:"),
        (0.01, 0.01, "undecided", "Undecided:"),
    ],
)
def test_the_sentence(between: float, within: float, answer: str, words: str) -> None:
    result = analyse(POINTS, trials(noisy(between, within, 1), seeds=20), 1.0, "BOPs")
    assert result["decision"]["answer"] == answer
    assert words in result["sentence"]
    assert result["decision"]["analysis"] == "blocked_cost"
    found = result["variance"]["blocked_cost"]
    assert f"{100 * found['within'] ** 0.5:.2f} between seeds" in result["sentence"]


def test_a_seed_s_common_effect_does_not_hide_differences() -> None:
    accuracy = noisy(0.01, 0.002, 4)
    plain = analyse(POINTS, trials(accuracy), 1.0, "BOPs")["decision"]
    shifted = analyse(POINTS, trials(lambda index, seed: accuracy(index, seed) + 0.05 * seed), 1.0, "BOPs")
    assert plain["answer"] == "yes" and shifted["decision"] == plain
    assert shifted["variance"]["one_way_cost"]["within"] > 100 * shifted["variance"]["blocked_cost"]["within"]


def test_costs_over_a_wide_range_are_taken_by_their_logarithm() -> None:
    points = [Point(str(i), (i, 1), False, 10.0 * 3**i) for i in range(6)]
    noise = np.random.default_rng(9).normal(0, 0.001, (6, 4))
    results = [
        Finished((i, s), dict.fromkeys(("val_accuracy", "test_accuracy", "test_loss"), 0.5 + 0.05 * i + float(noise[i, s])), 1.0)
        for i in range(6)
        for s in range(4)
    ]
    variance = analyse(points, results, 1.0, "MACs")["variance"]
    assert variance["blocked"]["between"] > 0.006 and variance["blocked_cost"]["between"] < 1e-5


def test_undecided_says_what_would_decide() -> None:
    rng = np.random.default_rng(5)
    values = [list(rng.normal(0, 0.4) + rng.normal(0, 1, 2)) for _ in range(20)]
    decision = decide({"one_way": one_way(values)}, 1.0)
    assert decision.answer == "undecided" and decision.seeds is not None
    assert f"About {decision.seeds} seeds per configuration would decide." in decision.text
    few = decide({"one_way": one_way(values[:4])}, 1.0)
    assert few.seeds is None and "With 4 configurations no number of seeds would decide" in few.text


def test_the_threshold_moves_the_question() -> None:
    components = one_way([list(np.random.default_rng(i).normal(0.5 * i, 1, 8)) for i in range(10)])
    assert decide({"one_way": components}, 0.2).answer == "yes"
    decision = decide({"one_way": components}, 9.0)
    assert decision.answer == "no" and "larger than 9 times seed noise" in decision.text


@pytest.mark.parametrize("seeds", [0, 1])
def test_too_few_runs_for_an_answer(seeds: int) -> None:
    result = analyse(POINTS, trials(line, seeds=seeds), 1.0, "BOPs")
    assert result["decision"] == {"answer": "undecided", "seeds": None, "analysis": "", "text": result["decision"]["text"]}
    assert "Too few runs" in result["sentence"]


def result_of(**changes: Any) -> dict[str, Any]:
    options = {"kind": "bits", "layer": "conv1", "model": "resnet8", "data": "digits", "seeds": 4}
    counts = {"done": 48, "total": 48, "seconds_mean": 2.0, "seconds_total": 96.0}
    basis = {"options": options, "environment": {"torch": "2"}, "measure": "BOPs", "trials": counts, "errors": []}
    return {**basis, **analyse(POINTS, trials(noisy(0.01, 0.01, 3)), 1.0, "BOPs"), **changes}


def test_the_page_stands_alone() -> None:
    result = result_of()
    page = study_page(result)
    assert page == study_page(json.loads(json.dumps(result, allow_nan=False)))
    assert "Grid study: conv1 of resnet8 on digits" in page and result["decision"]["text"].split("?")[0] in page
    assert page.count("<svg") == 2 and "http:" not in page and "https:" not in page and "<script" not in page
    for text in ("Variance components", "At matched cost", "mix 4", "Homogeneous networks", "12 configurations · 4 seeds · 48 of 48"):
        assert text in page
    assert "unfinished" not in page


def test_the_page_of_an_unfinished_study() -> None:
    counts = {"done": 1, "total": 48, "seconds_mean": None, "seconds_total": 0.0}
    empty = analyse(POINTS, trials(line, seeds=0), 1.0, "BOPs")
    errors = [{"label": "mix <1>", "seed": 2, "error": "NonFiniteError: loss is nan"}]
    page = study_page({**result_of(trials=counts, errors=errors), **empty})
    assert "This study is unfinished: 47 trials are missing" in page
    assert "mix &lt;1&gt;" in page and "loss is nan" in page and "no trial is finished yet" in page


def test_runs_without_spread_can_be_written() -> None:
    result = result_of(**analyse(POINTS, trials(lambda index, seed: 1.0), 1.0, "BOPs"))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "0.00 between seeds" in study_page(result)


def test_time_left() -> None:
    assert seconds_left(Progress(0, 2, 8, 0, 10, ())) is None
    assert seconds_left(Progress(4, 2, 4, 0, 10, (2.0, 3.0, 3.0, 40.0))) == pytest.approx(3.0 * 6 / 2)
