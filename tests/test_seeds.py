"""Statistics over seeds, the choice of the uniform baseline, and a whole small run."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import qprune
from qprune.cost import cost
from qprune.errors import CheckpointError
from qprune.geometry import Geometry, trace_geometry
from qprune.options import OptionError, RunOptions
from qprune.policy import LayerBits, Policy
from qprune.recipes.bits import uniform_above
from qprune.resume.session import open_folder
from qprune.seeds import run
from qprune.summary import student_interval, summarise, verdict
from qprune.tasks import data, models


class Silent:
    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int]] = []
        self.steps = 0

    def phase(self, name: str, seed: int, steps: int) -> None:
        self.phases.append((name, seed, steps))

    def step(self, values: Any) -> None:
        self.steps += 1

    def epoch(self, values: Any) -> None:
        pass


def tiny(**changes: Any) -> RunOptions:
    values = {"float_epochs": 2, "search_epochs": 2, "finetune_epochs": 1, "batch_size": 128, "budget": "w2a3"}
    return RunOptions(**{**values, **changes})


def test_student_interval() -> None:
    assert student_interval([0.5]) is None
    # two values: t(0.975, 1) = 12.7062, s = |a−b|/√2
    assert student_interval([0.0, 1.0]) == pytest.approx(12.7062 * (1 / math.sqrt(2)) / math.sqrt(2), rel=1e-5)
    # five values: t(0.975, 4) = 2.77645, s = √2.5
    assert student_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.77645 * math.sqrt(2.5) / math.sqrt(5), rel=1e-5)


def seed_result(searched: float, uniform: float, search_seconds: float = 8.0) -> dict[str, Any]:
    def network(label: str, accuracy: float, bops: float) -> dict[str, Any]:
        return {
            "label": label,
            "accuracy": accuracy,
            "bops": bops,
            "macs": 5.0,
            "size_bits": 7.0,
            "index_bits": 0,
            "codebook_bits": 0,
            "w_bits": 3.0,
            "a_bits": 3.0,
        }

    networks = {
        "float": network("float", 0.99, 1e9),
        "searched": network("searched", searched, 9e6),
        "uniform": network("uniform w3a3", uniform, 1e7),
    }
    return {"networks": networks, "seconds": {"search": search_seconds, "float_epoch": 2.0}}


def test_summary() -> None:
    summary = summarise([seed_result(0.98, 0.97), seed_result(0.96, 0.97), seed_result(0.97, 0.95, 12.0)])
    assert summary["searched"]["accuracy_mean"] == pytest.approx(0.97)
    assert summary["searched"]["accuracy_ci95"] == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    assert summary["difference_mean"] == pytest.approx((0.01 - 0.01 + 0.02) / 3)
    assert summary["search_in_float_epochs"] == 4.0


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        pytest.param([(0.98, 0.97)], ["better than uniform w3a3 by 1.00 points", "10.0% fewer", "one seed says nothing"], id="one-seed"),
        pytest.param([(0.95, 0.97), (0.94, 0.97)], ["worse than uniform w3a3 by 2.50 points", "not significant"], id="worse"),
        pytest.param([(0.97, 0.97), (0.96, 0.96)], ["equals uniform w3a3", "over 2 seeds"], id="equal"),
        pytest.param(
            [(0.98, 0.95), (0.981, 0.951), (0.98, 0.95)], ["better than uniform w3a3 by 3.00 points", "(95 % interval"], id="significant"
        ),
    ],
)
def test_verdict_is_plain(pairs: list[tuple[float, float]], words: list[str]) -> None:
    summary = summarise([seed_result(*pair) for pair in pairs])
    sentence = verdict(summary, len(pairs))
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".") and "\n" not in sentence


def geometry_of_resnet8() -> Geometry:
    return Geometry(trace_geometry(models.resnet8(in_channels=1), torch.zeros(1, 1, 16, 16)))


@pytest.mark.parametrize("budget", ["w3a3", "w2a4", "1.3%", "0.2%", "bops=w3a3,size=w4a4", "size=w5a5"])
def test_uniform_baseline_is_the_cheapest_above_the_budget(budget: str) -> None:
    geometry = geometry_of_resnet8()
    fixed = {"conv1": LayerBits(8, 8), "fc": LayerBits(8, 8)}
    limits = qprune.Budget.parse(budget).limits(geometry, fixed)

    def ratios(w: int, a: int) -> list[float]:
        c = cost(Policy.uniform(geometry, w, a, fixed))
        return [float(getattr(c, name)) / limit for name, limit in limits.items()]

    chosen = ratios(*uniform_above(geometry, fixed, limits))
    assert min(chosen) >= 1 - 1e-9
    for w, a in itertools.product(range(1, 9), repeat=2):
        if min(ratios(w, a)) >= 1 - 1e-9:
            assert max(chosen) <= max(ratios(w, a)) + 1e-9


def test_uniform_baseline_of_its_own_budget() -> None:
    geometry = geometry_of_resnet8()
    assert uniform_above(geometry, {}, qprune.Budget(bops="w3a3").limits(geometry)) == (3, 3)
    assert uniform_above(geometry, {}, {"bops": 1e15}) == (8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet9"}, "model: 'resnet9' is unknown; expected one of resnet8"),
        ({"data": "mnist"}, "data: 'mnist' is unknown"),
        ({"method": "x"}, "method: 'x' is unknown; expected one of edmips, darts"),
        ({"seeds": 0}, "seeds must be positive, got 0"),
        ({"finetune_epochs": -1}, "finetune_epochs must not be negative"),
        ({"convention": "flops"}, "convention: 'flops' is unknown"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        tiny(**changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Silent]:
    folder, watcher = tmp_path_factory.mktemp("runs") / "two-seeds", Silent()
    return folder, run(tiny(seeds=2, w_bits=(2, 4), a_bits=(2, 4), granularity="filter"), folder, watcher), watcher


def test_run_folder(finished: tuple[Path, dict[str, Any], Silent]) -> None:
    folder, result, watcher = finished
    assert yaml.safe_load((folder / "options.yaml").read_text()) == result["options"]
    assert json.loads((folder / "result.json").read_text()) == result
    policy = qprune.Policy.load(folder / "policy.json")
    assert float(cost(policy).bops) <= result["budget"]["limits"]["bops"]
    assert (folder / "seed-1" / "policy.json").exists()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["float"] * 2 + ["search"] * 2 + ["finetune"] + ["uniform"] * 3
    assert sum(steps for _, _, steps in watcher.phases) == watcher.steps
    assert "Bit search: resnet8 on digits" in (folder / "report.html").read_text()


def test_saved_model_gives_the_reported_accuracy(finished: tuple[Path, dict[str, Any], Silent]) -> None:
    from qprune.tasks.train import evaluate

    folder, result, _ = finished
    task = data.load("digits")
    model = qprune.load(folder / "model.safetensors", lambda: models.for_task("resnet8", task))
    assert evaluate(model, task.loader("test", 256))[1] == result["runs"][0]["networks"]["searched"]["accuracy"]
    assert float(cost(model, task.train.x[:1]).bops) == pytest.approx(result["runs"][0]["networks"]["searched"]["bops"])


def test_uniform_trains_as_long_as_search_and_finetuning(finished: tuple[Path, dict[str, Any], Silent]) -> None:
    _, result, watcher = finished
    steps = {name: count for name, seed, count in watcher.phases if seed == 0}
    assert steps["uniform"] == steps["search"] + steps["finetune"]
    networks = result["runs"][0]["networks"]
    assert networks["uniform"]["bops"] >= networks["searched"]["bops"]
    assert networks["uniform"]["label"] == "uniform w2a3"


def test_a_folder_is_not_overwritten_unasked(finished: tuple[Path, dict[str, Any], Silent]) -> None:
    folder, _, _ = finished
    with pytest.raises(CheckpointError, match="already holds a run; go on with it"):
        open_folder(folder, overwrite=False)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        run(tiny(), tmp_path / "file" / "run", Silent())
