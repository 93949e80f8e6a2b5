"""Whole small runs of the methods of Zur et al., as `qprune search` makes them, and the words they are asked for with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import qprune
from qprune import arguments
from qprune.cost import cost
from qprune.errors import BudgetError, InfeasibleBudgetError
from qprune.nn import QuantActivation
from qprune.nn.slim import current_widths, extract, flops, slim, widths_of
from qprune.options import OptionError, RunOptions
from qprune.recipes.widths import ratio_above
from qprune.seeds import run
from qprune.tasks import data, models
from qprune.tasks.train import evaluate


class Silent:
    def phase(self, name: str, seed: int, steps: int) -> None:
        self.left = steps

    def step(self, values: Any) -> None:
        self.left -= 1

    def epoch(self, values: Any) -> None:
        pass


def options(**changes: Any) -> RunOptions:
    values = {"float_epochs": 1, "search_epochs": 1, "finetune_epochs": 1, "batch_size": 128}
    return RunOptions(**{**values, **changes})


@pytest.fixture(scope="module")
def zur(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "zur"
    chosen = options(method="zur", budget="w3a3", pairs=((2, 2), (2, 4), (4, 4)), method_options={"samples": 3})
    return folder, run(chosen, folder, Silent())


@pytest.fixture(scope="module")
def slimmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "slimmable"
    chosen = options(method="slimmable", budget="macs=40%", method_options={"samples": 3, "order": "l1", "ratios": [0.5, 1.0]})
    return folder, run(chosen, folder, Silent())


def test_zur(zur: tuple[Path, dict[str, Any]]) -> None:
    folder, result = zur
    policy, networks = qprune.Policy.load(folder / "policy.json"), result["runs"][0]["networks"]
    assert float(cost(policy).bops) <= result["budget"]["limits"]["bops"] <= networks["uniform"]["bops"]
    assert networks["searched"]["bops"] == pytest.approx(float(cost(policy).bops))
    assert networks["uniform"]["label"] == "uniform w3a3"
    task = data.load("digits")
    model = qprune.load(folder / "model.safetensors", lambda: models.for_task("resnet8", task))
    assert any(isinstance(module, QuantActivation) for module in model.modules())
    assert evaluate(model, task.loader("test", 256))[1] == networks["searched"]["accuracy"]
    page = (folder / "report.html").read_text()
    assert "Bits per layer" in page and "method zur" in page
    history = result["runs"][0]["search_history"][0]
    assert set(history["expected"]) == set(policy.layers) and 0.9 < history["entropy"] <= 1


def test_zur_with_weights_of_their_own(tmp_path: Path) -> None:
    chosen = options(method="zur", pairs=((2, 2), (4, 4)), method_options={"samples": 2, "shared_weights": False})
    assert not chosen.space().shared_weights
    networks = run(chosen, tmp_path / "run", Silent())["runs"][0]["networks"]
    assert networks["searched"]["bops"] <= networks["uniform"]["bops"]


def test_zur_in_the_papers_loop(tmp_path: Path) -> None:
    watcher = Silent()
    result = run(
        options(method="zur", pairs=((2, 2), (4, 4)), model="resnet8", loop="epochs", finetune_epochs=0), tmp_path / "run", watcher
    )
    assert watcher.left == 0
    assert {"arch_loss", "likely_loss", "val_accuracy"} <= set(result["runs"][0]["search_history"][0])


def test_slimmable(slimmed: tuple[Path, dict[str, Any]]) -> None:
    folder, result = slimmed
    task = data.load("digits")
    example = task.train.x[:2]
    limit, networks = result["budget"]["limits"]["macs"], result["runs"][0]["networks"]

    def build() -> torch.nn.Module:
        model = slim(models.for_task("resnet8", task), example)
        return extract(model, widths_of(model, qprune.Policy.load(folder / "policy.json")))

    model = slim(models.for_task("resnet8", task), example)
    widths = widths_of(model, qprune.Policy.load(folder / "policy.json"))
    assert flops(model, widths) <= limit
    smaller = qprune.load(folder / "model.safetensors", build)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in models.for_task("resnet8", task).parameters())
    assert evaluate(smaller, task.loader("test", 256))[1] == networks["searched"]["accuracy"]
    assert networks["uniform"]["label"].startswith("uniform width 0.")
    page = (folder / "report.html").read_text()
    assert "Width search" in page and "Filters kept" in page and "Bits per layer" not in page


def test_ratio_above_is_the_narrowest() -> None:
    model = slim(models.resnet8(), torch.zeros(1, 3, 16, 16))
    full = flops(model)
    for share in (0.1, 0.5, 0.9):
        ratio = ratio_above(model, share * full)
        costs = [flops(model, {n: max(1, int(f * r)) for n, f in current_widths(model).items()}) for r in (ratio, ratio - 1 / 64)]
        assert costs[0] >= share * full > costs[1]
    assert ratio_above(model, 2.0 * full) == 1.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "zur", "w_bits": (2, 3), "a_bits": (4,)}, OptionError, r"method zur chooses pairs of bits: give pairs, or a number"),
        ({"method": "zur", "quantizer": "lsq"}, qprune.QPruneError, r"input_quantizer: expected one of"),
        ({"method": "zur", "pairs": ((1, 2), (2, 2))}, qprune.QPruneError, r"nice weights need at least 2 bits, got 1"),
        ({"method": "zur", "pairs": ((0, 2), (2, 2))}, qprune.QPruneError, r"nice weights need at least 2 bits, got 0"),
        ({"method": "edmips", "quantizer": "nice"}, OptionError, r"quantizer: 'nice' goes with method zur"),
        ({"method": "darts", "loop": "epochs"}, OptionError, r"loop: 'epochs' goes with method zur, got darts"),
        ({"method": "zur", "loop": "days"}, OptionError, r"loop: expected steps or epochs, got 'days'"),
        ({"method": "zur", "method_options": {"sample": 3}}, OptionError, r"method zur has no option 'sample'; it has estimator, samples"),
        (
            {"method": "zur", "method_options": {"shared_weights": "no"}},
            qprune.QPruneError,
            r"shared_weights: expected True or False, got 'no'",
        ),
        ({"method": "edmips", "method_options": {"x": 3}}, OptionError, r"method edmips has no option 'x'; it has none"),
    ],
)
def test_options_refuse(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        options(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "slimmable", "budget": "w3a3"}, BudgetError, r"widths cost multiplications, got a budget of bops; use macs='50%'"),
        ({"method": "slimmable", "budget": "macs=0.001%"}, InfeasibleBudgetError, r"macs"),
        ({"method": "zur", "budget": "0.1%"}, InfeasibleBudgetError, r"no policy meets the budget"),
        ({"method": "zur", "method_options": {"estimator": "guess"}}, qprune.QPruneError, r"estimator must be one of"),
    ],
)
def test_runs_refuse(changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        run(options(**changes), tmp_path / "run", Silent())


def test_words() -> None:
    assert arguments.bits("2,4,8") == (2, 4, 8)
    assert arguments.pairs("2/2, 2/4,8") == ((2, 2), (2, 4), (8, 8)) and arguments.pairs("") == ()
    found = arguments.settings(["samples=4", "estimator=score", "clip-grad=null", "freeze=[0.8, 10]", "lmbda=0.5"])
    assert found == {"samples": 4, "estimator": "score", "clip_grad": None, "freeze": [0.8, 10], "lmbda": 0.5}
    assert json.dumps(found)
    for read, text in ((arguments.bits, "2,x"), (arguments.pairs, "2/x"), (arguments.pairs, "2/2/2"), (arguments.settings, ["samples"])):
        with pytest.raises(typer.BadParameter, match="expected"):
            read(text)  # type: ignore[operator]
