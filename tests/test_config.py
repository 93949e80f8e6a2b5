"""Options from a file, from key=value words and from flags."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import qprune

from qprune import config
from qprune.commands.search import search
from qprune.environment import environment
from qprune.errors import CheckpointError
from qprune.options import OptionError, RunOptions
from qprune.resume.folder import OPTIONS, begin, check_same, stored_options

ZUR = RunOptions(
    method="zur", pairs=((2, 2), (4, 8)), method_options={"samples": 4, "estimator": "score"}, budget="bops=w4a4,size=20%", lr=1e-3,
    data="my.module:loaders", data_options={"size": 32, "names": ["a", "b"], "deep": {"x": None}}, deterministic=True, seed=-3,
)  # fmt: skip


def printed(*words: str) -> dict[str, Any]:
    done = qprune("search", "--print-config", *words)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def refused(*words: str) -> str:
    done = qprune("search", "--print-config", *words)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    return done.stderr


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("options", [pytest.param(RunOptions(), id="default"), pytest.param(ZUR, id="zur")])
def test_what_is_printed_is_read_again(options: RunOptions, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(options))
    assert RunOptions(**config.read_file(path)) == options
    done = qprune("search", "--config", str(path), "--print-config")
    assert done.stdout == path.read_text()


def test_search_sets_every_option() -> None:
    assert {field.name for field in fields(RunOptions)} <= set(signature(search).parameters)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        pytest.param(["--w-bits", "2,4", "--pairs", "2/2,3"], {"w_bits": [2, 4], "pairs": [[2, 2], [3, 3]]}, id="bits"),
        pytest.param(["--method", "zur", "--set", "samples=4"], {"method_options": {"samples": 4}}, id="set"),
        pytest.param(["--data-option", "a=1", "--data-option", "b=x"], {"data_options": {"a": 1, "b": "x"}}, id="data-option"),
        pytest.param(
            ["--compile", "--no-tf32", "--no-channels-last"], {"compile": True, "tf32": False, "channels_last": False}, id="switches"
        ),
    ],
)
def test_flags_are_read(words: list[str], found: dict[str, Any]) -> None:
    whole = printed(*words)
    assert {name: whole[name] for name in found} == found


def test_nothing_is_begun(tmp_path: Path) -> None:
    assert printed("--out", str(tmp_path / "run"))["float_epochs"] == 40
    assert not (tmp_path / "run").exists()


def test_the_last_place_counts(tmp_path: Path) -> None:
    file = write(tmp_path, "method: zur\nseeds: 2\nlr: 1e-3\nmethod_options: {samples: 4, estimator: score}\npairs: 2/2,4/4\n")
    found = printed("--config", file, "seeds=3", "search-lr=0.5", "method_options.samples=8", "--search-lr", "0.25", "--set", "clip_grad=3")
    assert (found["seeds"], found["lr"], found["search_lr"], found["batch_size"]) == (3, 0.001, 0.25, 64)
    assert found["method_options"] == {"samples": 8, "estimator": "score", "clip_grad": 3}
    assert found["pairs"] == [[2, 2], [4, 4]]
    assert printed("--config", file, "--seeds", "1")["seeds"] == 1, "a flag counts though it says the default"


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        pytest.param("w_bits=2,4", "w_bits", (2, 4), id="bits"),
        pytest.param("w_bits=[0, 8]", "w_bits", (0, 8), id="list"),
        pytest.param("a_bits=", "a_bits", (), id="none"),
        pytest.param("pairs=3,2/8", "pairs", ((3, 3), (2, 8)), id="pairs"),
        pytest.param("pairs=[[2, 4]]", "pairs", ((2, 4),), id="pairs-list"),
        pytest.param("budget=bops=w4a4,size=20%", "budget", "bops=w4a4,size=20%", id="equals"),
        pytest.param("data_dir=2024", "data_dir", "2024", id="text"),
        pytest.param("lr=1e-3", "lr", 0.001, id="power"),
        pytest.param("lr=1", "lr", 1.0, id="whole"),
        pytest.param("deterministic=true", "deterministic", True, id="truth"),
        pytest.param("method_options={samples: 4}", "method_options", {"samples": 4}, id="entries"),
    ],
)
def test_words(word: str, name: str, value: Any) -> None:
    found = config.read_words([word])
    assert found == {name: value} and type(found[name]) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        pytest.param("--w-bits=2,x", "w_bits: expected bits like [2, 4, 8], got '2,x'", id="flag-bits"),
        pytest.param("search_epoch=3", "'search_epoch' is no option of a run; did you mean search_epochs?", id="near"),
        pytest.param("metod=zur", "did you mean method?", id="near-method"),
        pytest.param("zzzzzz=3", "'zzzzzz' is no option of a run\n", id="far"),
        pytest.param("threads=2", "give it as --threads", id="flag"),
        pytest.param("seeds=many", "seeds: expected a whole number, got 'many'", id="whole"),
        pytest.param("seeds=2.5", "seeds: expected a whole number, got 2.5", id="fraction"),
        pytest.param("seeds=true", "seeds: expected a whole number, got True", id="truth"),
        pytest.param("deterministic=1", "deterministic: expected true or false, got 1", id="not-truth"),
        pytest.param("lr=fast", "lr: expected a number, got 'fast'", id="number"),
        pytest.param("lr=inf", "lr: expected a number, got 'inf'", id="infinite"),
        pytest.param("w_bits=2,x", "w_bits: expected bits like [2, 4, 8], got '2,x'", id="bits"),
        pytest.param("w_bits=[2, 4.5]", "w_bits: expected bits", id="bits-list"),
        pytest.param("pairs=[[2, 2, 2]]", "pairs: expected pairs", id="pairs"),
        pytest.param("seeds", "expected key=value, got 'seeds'", id="no-value"),
        pytest.param("=3", "expected key=value", id="no-key"),
        pytest.param("method_options.=3", "expected key=value", id="no-entry"),
        pytest.param("seeds.first=3", "seeds has no entries", id="entry"),
        pytest.param("method_options=3", "method_options: expected names and plain values, got 3", id="mapping"),
        pytest.param("data_options.day=2024-02-30", "data_options: expected a value of YAML", id="date"),
        pytest.param("method_options.samples=[", "method_options: expected a value of YAML, got '['", id="yaml"),
        pytest.param("method_options.nothing=3", "method edmips has no option 'nothing'", id="method-option"),
        pytest.param("seeds=0", "seeds must be positive", id="value"),
        pytest.param("seed=18446744073709551615", "seed: expected", id="seed"),
    ],
)
def test_words_refused(word: str, message: str) -> None:
    assert message in refused(word)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("sedes: 3", "run.yaml: 'sedes' is no option of a run; did you mean seeds?", id="unknown"),
        pytest.param("seeds: [3]", "run.yaml: seeds: expected a whole number, got [3]", id="type"),
        pytest.param("weights:", "run.yaml: weights: expected text, got None", id="nothing"),
        pytest.param("seeds: 3\nseeds: 4", "'seeds' is there twice", id="twice"),
        pytest.param("- 3", "expected names and values, got [3]", id="list"),
        pytest.param("", "expected names and values, got None", id="empty"),
        pytest.param("seeds: {", "cannot read the configuration", id="damaged"),
        pytest.param("data: !!python/object/apply:os.system [ls]", "could not determine a constructor", id="code"),
        pytest.param("data: &a [x]\ndata_dir: *a", "aliases (*name) are not read", id="alias"),
    ],
)
def test_files_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refused("--config", write(tmp_path, text))


def test_a_missing_file() -> None:
    assert "cannot read the configuration nowhere.yaml: No such file" in refused("--config", "nowhere.yaml")


def test_a_resumed_run_checks_files_and_words(tmp_path: Path) -> None:
    """They say what the run began with, or it does not go on; what they leave out is as it was."""
    run = tmp_path / "run"
    run.mkdir()
    begin(run, ZUR, environment())
    same = write(tmp_path, config.dump(ZUR))
    words = ("--resume", "--out", str(run))
    assert printed(*words, "--config", same, "method_options.samples=4", "w_bits=") == ZUR.as_dict()
    assert "seeds: the run in" in refused(*words, "--config", same, "seeds=7")
    assert "method_options: the run in" in refused(*words, "method_options.samples=5")
    assert "w_bits: the run in" in refused(*words, "w_bits=2")


def test_options_of_a_folder(tmp_path: Path) -> None:
    begin(tmp_path, ZUR, environment())
    stored = stored_options(tmp_path)
    assert stored == ZUR
    check_same(stored, tmp_path, ZUR.as_dict())
    for text in ("seeds: x", "sedes: 3", "method: nope", "a: &a [*a]", "!!int ''", "lr: 2001-99-99"):
        (tmp_path / OPTIONS).write_text(text)
        with pytest.raises(CheckpointError, match="is damaged, or of another version"):
            stored_options(tmp_path)


def test_options_must_be_finite() -> None:
    with pytest.raises(OptionError, match="lr must be finite, got inf"):
        RunOptions(lr=float("inf"))


def test_a_switch_may_be_left_open() -> None:
    assert config.read_words(["tf32=true"]) == {"tf32": True}
    assert config.read_words(["tf32=null"]) == {"tf32": None}
    with pytest.raises(OptionError, match="tf32: expected true, false or null"):
        config.read_words(["tf32=fast"])
