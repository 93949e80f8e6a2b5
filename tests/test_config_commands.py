"""--config, KEY=VALUE and --print-config of the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import qprune

from qprune.compare.options import CompareOptions
from qprune.config import Form, Options, read_file
from qprune.study.options import StudyOptions

COMPARE = CompareOptions(
    budgets=("bops=w3a3,size=20%", "w2a2"), methods=("zur", "uniform", "prune-then-quantize"), w_bits=(0, 2, 4), data_options={"size": 3},
    settings={"zur": {"samples": 4, "pairs": [[2, 2], [2, 4]]}, "prune-then-quantize": {"share": 0.25}}, seeds=2, lr=1e-3,
)  # fmt: skip
STUDY = StudyOptions(pairs=((2, 2), (3, 4)), others=(2, 4), weight_quantizer="uniq", threshold=2.0, float_lr=0.2, weights="a.pth")
WIDTHS = StudyOptions(kind="widths", ratios=(0.25, 1.0), data="my.module:loaders")
OPTIONS = [
    pytest.param("compare", COMPARE, id="compare"),
    pytest.param("study", STUDY, id="study"),
    pytest.param("study", WIDTHS, id="widths"),
]


def printed(command: str, *words: str) -> dict[str, Any]:
    done = qprune(command, "--print-config", *words)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


def refused(command: str, *words: str) -> str:
    done = qprune(command, "--print-config", *words)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    return done.stderr


@pytest.mark.parametrize(("command", "options"), OPTIONS)
def test_what_is_printed_is_read_again(command: str, options: Options, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump(options.as_dict()))
    assert type(options)(**read_file(path, Form(type(options), "it"))).as_dict() == options.as_dict()
    assert printed(command, "--config", str(path)) == options.as_dict()


@pytest.mark.parametrize("command", ["compare", "study"])
def test_nothing_is_begun(command: str, tmp_path: Path) -> None:
    printed(command, "--out", str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


def test_the_last_place_counts(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text("methods: edmips,zur,uniform\nseeds: 2\nlr: 1e-3\nsettings: {zur: {samples: 4, estimator: score}}\n")
    words = (
        "seeds=3",
        "search-lr=0.5",
        "settings.zur.samples=8",
        "settings.edmips.arch-lr=1",
        "--search-lr",
        "0.25",
        "--set",
        "zur.clip-grad=3",
    )
    found = printed("compare", "--config", str(path), *words)
    assert (found["seeds"], found["lr"], found["search_lr"], found["float_epochs"]) == (3, 0.001, 0.25, 40)
    assert found["settings"] == {"edmips": {"arch_lr": 1}, "zur": {"samples": 8, "estimator": "score", "clip_grad": 3}, "uniform": {}}
    assert printed("compare", "--config", str(path), "--seeds", "5")["seeds"] == 5, "a flag counts though it says the default"


def test_methods_without_settings_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(qprune("compare", "--print-config").stdout)
    assert printed("compare", "--config", str(path), "methods=darts,uniform")["settings"] == {"darts": {}, "uniform": {}}


def test_one_flag_for_two_options() -> None:
    assert printed("study", "--quantizer", "uniq")["input_quantizer"] == "uniq"
    found = printed("study", "weight_quantizer=uniq", "others=2/4", "pairs=[[2, 2], [3, 3]]")
    assert (found["weight_quantizer"], found["input_quantizer"]) == ("uniq", "nice")
    assert (found["others"], found["pairs"]) == ([2, 4], [[2, 2], [3, 3]])
    assert printed("study", "weight_quantizer=uniq", "--quantizer", "nice")["weight_quantizer"] == "nice"


def test_a_quick_study_is_printed_as_it_is_run() -> None:
    assert printed("study", "--quick", "seeds=9")["seeds"] == 2


@pytest.mark.parametrize(
    ("command", "word", "message"),
    [
        pytest.param("compare", "methds=zur", "'methds' is no option of a comparison; did you mean methods?", id="near"),
        pytest.param("compare", "workers=2", "'workers' is no option of a comparison; give it as --workers", id="flag"),
        pytest.param("compare", "budgets=[3]", "budgets: expected words like [w3a3, w2a2], got [3]", id="words"),
        pytest.param("compare", "settings.zur=3", "settings: expected names, each with names and plain values", id="settings"),
        pytest.param("compare", "settings.zur.nothing=3", "zur has no option 'nothing'", id="setting"),
        pytest.param("compare", "settings.nope.samples=3", "'nope' cannot be compared", id="method"),
        pytest.param("compare", "budget=w3a3", "did you mean budgets?", id="budget"),
        pytest.param("study", "thresold=2", "'thresold' is no option of a study; did you mean threshold?", id="near-study"),
        pytest.param("study", "quantizer=uniq", "'quantizer' is no option of a study; give it as --quantizer", id="flag-study"),
        pytest.param("study", "others=2/2,3/3", "others: expected a pair of weight and activation bits like [3, 3]", id="pair"),
        pytest.param("study", "others=[3]", "others: expected a pair", id="pair-list"),
        pytest.param("study", "ratios=half", "ratios: expected numbers like [0.5, 1], got 'half'", id="numbers"),
        pytest.param("study", "ratios=[0.5, true]", "ratios: expected numbers", id="numbers-list"),
        pytest.param("study", "data_dir.x=3", "data_dir has no entries", id="entries"),
    ],
)
def test_refused(command: str, word: str, message: str) -> None:
    assert message in refused(command, word)
