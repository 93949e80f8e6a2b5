"""The report of a run: what the page says, that it needs nothing from outside, and what it does with missing or damaged files."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

from qprune import figures
from qprune.errors import CheckpointError
from qprune.report import plot, report, write_report
from qprune.result import read_result, si

RESNET8 = ["conv1", *(f"layer{stage}.0.conv{i}" for stage in (1, 2, 3) for i in (1, 2)), "fc"]
MOBILENET = ["features.0.0", *(f"features.{i // 3 + 1}.conv.{i % 3}.0" for i in range(58)), "classifier.1"]


def _network(label: str, accuracy: float, bops: float, size: float, w: float, a: float) -> dict[str, Any]:
    return {
        "label": label,
        "accuracy": accuracy,
        "val_accuracy": accuracy,
        "bops": bops,
        "macs": 1e6,
        "size_bits": size,
        "w_bits": w,
        "a_bits": a,
        "index_bits": 0 if w == 32 else 4000,
        "codebook_bits": 0 if w == 32 else 3200,
    }


def _run(rng: random.Random, seed: int, layers: list[dict[str, Any]], per_filter: bool, epochs: int) -> dict[str, Any]:
    policy: dict[str, Any] = {}
    for layer in layers[1:]:
        drawn = [rng.choice((0, 2, 4, 8)) for _ in range(layer["filters"])]
        policy[layer["name"]] = {"w_bits": drawn if per_filter else rng.choice((2, 4, 8)), "a_bits": rng.choice((2, 4, 8))}
    expected = {name: {"w_bits": 3.5, "a_bits": 4.5} for name in policy}
    history = [
        {
            "epoch": e,
            "loss": 2 / e,
            "accuracy": 1 - 0.5 / e,
            "cost_ratio": 1 + 1 / e,
            "entropy": 1 / e,
            "multiplier": 0.1,
            "expected": expected,
        }
        for e in range(1, epochs + 1)
    ]
    networks = {
        "float": _network("float", 0.985, 1.62e9, 1.1e6, 32.0, 32.0),
        "searched": _network("searched (edmips)", 0.972 + 0.001 * seed, 1.74e7, 121600.0, 3.5, 3.7),
        "uniform": _network("uniform w3a3", 0.961, 1.78e7, 132800.0, 3.4, 3.3),
    }
    seconds = {"float_epoch": 0.8, "float": 20.1, "search": 6.2, "finetune": 9.1, "uniform": 20.0}
    return {"seed": seed, "networks": networks, "seconds": seconds, "policy": policy, "search_history": history}


def fake_result(names: list[str] = RESNET8, seeds: int = 1, per_filter: bool = False, epochs: int = 6) -> dict[str, Any]:
    rng = random.Random(0)
    layers = [
        {"name": name, "kind": "conv", "filters": 16 * (1 + i // 3), "macs": 10000 * (i + 1), "weights": 2304}
        for i, name in enumerate(names)
    ]
    interval = 0.0034 if seeds > 1 else None
    totals = {"float": (0.985, 1.62e9, 1.1e6), "searched": (0.972, 1.74e7, 121600.0), "uniform": (0.961, 1.78e7, 132800.0)}
    summary: dict[str, Any] = {
        name: {"accuracy_mean": accuracy, "accuracy_ci95": interval, "bops": bops, "size_bits": size}
        for name, (accuracy, bops, size) in totals.items()
    }
    summary |= {"search_in_float_epochs": 7.4, "verdict": "The searched network is 1.1 points more accurate than uniform w3a3."}
    return {
        "format": 1,
        "options": {"data": "digits", "model": "resnet8", "method": "edmips", "lr": 0.01, "resume": None},
        "environment": {"torch": "2.9.1", "device": "cpu"},
        "budget": {"text": "w3a3", "limits": {"bops": 1.78e7}},
        "layers": layers,
        "runs": [_run(rng, seed, layers, per_filter, epochs) for seed in range(seeds)],
        "summary": summary,
    }


def _write(folder: Path, result: dict[str, Any]) -> str:
    (folder / "result.json").write_text(json.dumps(result))
    return write_report(folder).read_text(encoding="utf-8").replace("\u00a0", " ")


def _self_contained(page: str) -> bool:
    loads = re.findall(r'(?:src|href|data|action)="(?!#|data:)[^"]*"|url\((?!#)[^)]*\)|@import|<(?:script|link|iframe|object)\b', page)
    return not loads and "http://" not in page and "https://" not in page


def test_page_of_one_run_per_layer(tmp_path: Path) -> None:
    page = _write(tmp_path, fake_result())
    assert "The searched network is 1.1 points more accurate than uniform w3a3." in page
    for value in (
        "98.50 %",
        "97.20 %",
        "96.10 %",
        "1.62 G",
        "17.4 M",
        "1.07 %",
        "15.2 kB",
        "138 kB",
        "11.1 %",
        "7.4 ×",
        "3.5",
        "3.7",
        "97.8 % of budget",
    ):
        assert value in page, value
    assert page.count("<svg ") == 4
    assert "Choices were made per layer" in page and "One seed: no interval" in page
    assert "unfinished" not in page and "None" not in page
    assert _self_contained(page)


def test_page_of_several_runs_per_filter(tmp_path: Path) -> None:
    page = _write(tmp_path, fake_result(seeds=3, per_filter=True))
    assert "97.20 ± 0.34 %" in page and "Mean over 3 seeds" in page
    assert "Seed 0, the first of 3" in page and "pruned (0)" in page
    assert "Test accuracy of every seed" in page and "97.40 %" in page
    assert page.count("<svg ") == 4 and _self_contained(page)


def test_page_of_a_deep_network_names_every_layer(tmp_path: Path) -> None:
    page = _write(tmp_path, fake_result(MOBILENET, per_filter=True, epochs=6))
    assert page.count("<svg ") == 4 and len(page) < 1_500_000
    assert all(f">{name}</text>" in page for name in MOBILENET)


def test_ids_are_unique_and_every_reference_is_met(tmp_path: Path) -> None:
    page = _write(tmp_path, fake_result(seeds=2, per_filter=True))
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_two_writes_give_the_same_bytes_whatever_the_matplotlib_settings(tmp_path: Path) -> None:
    _write(tmp_path, fake_result(seeds=2, per_filter=True))
    first = (tmp_path / "report.html").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        settings = dict(matplotlib.rcParams)
        assert report(tmp_path).read_bytes() == first
        assert dict(matplotlib.rcParams) == settings


def test_unfinished_run(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"phase": "float", "seed": 0, "epoch": e, "loss": 1 / e, "accuracy": 0.9} for e in (1, 2, 3)]
    rows += [{"phase": "search", "seed": 0, **row} for row in fake_result()["runs"][0]["search_history"][:2]]
    # The run was killed while it wrote the last line.
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"phase": "sea')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "This run is unfinished" in page and page.count("<svg ") == 2
    assert "0.3333" in page and "90.00 %" in page and "75.00 %" in page
    assert _self_contained(page)


def test_unfinished_run_before_its_first_epoch(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no epoch has ended yet" in write_report(tmp_path).read_text(encoding="utf-8")


def test_text_is_escaped(tmp_path: Path) -> None:
    result = fake_result(["<b>conv</b>", "$x_1$", "层", "fc"])
    evil = '<script>alert("x")</script>&'
    result["options"] = {"model": evil, evil: evil}
    result["summary"]["verdict"] = result["budget"]["text"] = result["environment"]["host"] = evil
    result["runs"][0]["networks"]["uniform"]["label"] = evil
    page = _write(tmp_path, result)
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;" in page and ">$x_1$</text>" in page and ">层</text>" in page


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    result = fake_result()
    result["summary"] = {"searched": {"accuracy_mean": math.nan, "accuracy_ci95": None}}
    for network in result["runs"][0]["networks"].values():
        del network["accuracy"], network["size_bits"]
    page = _write(tmp_path, result)
    assert "no accuracy was recorded" in page and '<td class="n">–</td>' in page and "nan" not in page


@pytest.mark.parametrize(
    "broken",
    [
        {"runs": [{}]},
        {"runs": [None], "layers": [None], "summary": [], "options": 3, "budget": "w3a3"},
        {"runs": [{"policy": {"a": {"w_bits": ["x"], "a_bits": None}}, "search_history": [1, {"epoch": 1}]}], "layers": [{"name": "a"}]},
        {
            "runs": [{"policy": {}, "search_history": 5}],
            "layers": [{"name": "a", "filters": 4}, {"name": "a" * 90}],
            "budget": {"limits": {}},
        },
    ],
    ids=["empty-run", "wrong-types", "wrong-values", "all-float"],
)
def test_incomplete_result_still_gives_a_page(tmp_path: Path, broken: dict[str, Any]) -> None:
    assert _write(tmp_path, {"format": 1, **broken}).count("<svg ") == 4


def test_size_budget_has_no_line_in_the_picture(tmp_path: Path) -> None:
    result = fake_result()
    result["budget"] = {"text": "size=12%", "limits": {"size_bits": 132800}}
    page = _write(tmp_path, result)
    assert "at most 16.6 kB" in page and "of budget" not in page


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", b'{"format": 1,', "damaged"),
        ("result.json", b"\xff\xfe{}", "damaged"),
        ("result.json", b"[]", "not the result of a run"),
        ("result.json", b'{"format": 1, "runs": []}', "not the result of a run"),
        ("result.json", b'{"format": 2, "runs": [{}]}', "format 2"),
        ("metrics.jsonl", b'{"phase": \n{"phase": "float"}\n', "line 1 is damaged"),
        ("metrics.jsonl", b"3\n", "line 1: expected an object"),
        ("notes.txt", b"", "neither result.json nor metrics.jsonl"),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "report.html").exists()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


def test_plot_gives_the_four_figures(tmp_path: Path) -> None:
    _write(tmp_path, fake_result(per_filter=True))
    drawn = plot(tmp_path)
    assert list(drawn) == ["accuracy_cost", "bits_by_layer", "bits_by_filter", "evolution"]
    assert all(isinstance(figure, Figure) for figure in drawn.values())


@pytest.mark.parametrize(
    ("accuracies", "half"),
    [((1.0, 1.0, 1.0), None), ((0.99, 0.985, 0.985), 0.03), ((1.0, 0.9999, 0.9998), 0.0001), ((0.9916, 0.9916, 0.9916), None)],
    ids=["all", "intervals", "near", "equal"],
)
def test_accuracies_end_at_100_percent(accuracies: tuple[float, float, float], half: float | None) -> None:
    result = fake_result()
    for name, accuracy in zip(("float", "searched", "uniform"), accuracies):
        result["runs"][0]["networks"][name]["accuracy"] = accuracy
        result["summary"][name] |= {"accuracy_mean": accuracy, "accuracy_ci95": half}
    for axis in figures.accuracy_cost(result).axes:
        low, high = axis.get_ylim()
        assert low < 100 * min(accuracies) and 100 * max(accuracies) < high <= 100 + 0.05 * (100 - low)
        assert not [tick for tick in axis.get_yticks() if 100 + 1e-9 < tick <= high]


def test_per_filter_bits_fill_every_column() -> None:
    result = fake_result(per_filter=True)
    bars: Any = figures.bits_by_filter(result).axes[0].patches
    tops = [0.0] * len(RESNET8)
    for bar in bars:
        column = round(bar.get_x() + bar.get_width() / 2)
        tops[column] = max(tops[column], bar.get_y() + bar.get_height())
    assert tops == pytest.approx([1.0] * len(RESNET8))


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (12.34, "12.3"), (999.6, "1 k"), (12345678.0, "12.3 M"), (1.5e9, "1.5 G"), (2e12, "2 T")]
)
def test_si(value: float | None, text: str) -> None:
    assert si(value).replace("\u00a0", " ") == text


def test_read_result_returns_what_was_written(tmp_path: Path) -> None:
    result = fake_result()
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_result(tmp_path) == result


def test_sizes_three_ways(tmp_path: Path) -> None:
    page = _write(tmp_path, fake_result())
    table = page[page.index("+ index") :].split("</table>")[0]
    searched = [re.sub("<[^>]+>", "", cell).replace("\u00a0", " ") for cell in re.findall(r"<td.*?</td>", table.split("</tr>")[2])]
    # 121,600 bits of values, 125,600 with the index and 128,800 with the ranges, of 1,100,000
    assert searched == ["15.2 kB", "9.0 ×", "15.7 kB", "8.8 ×", "16.1 kB", "8.5 ×"]


def test_a_run_without_sizes_has_no_table_of_them(tmp_path: Path) -> None:
    result = fake_result()
    for network in result["runs"][0]["networks"].values():
        del network["index_bits"], network["codebook_bits"]
    assert "+ index" not in _write(tmp_path, result)
