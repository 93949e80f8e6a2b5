"""The folder of a run, changed by others: reports, exports and resumed runs end in a value or in one of qprune's errors."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import fuzz, refused
from mutations import ODD, changed, damaged
from resume_cases import Killed, Small, Watcher, options, patch, small_network
from torch import Tensor

from qprune import Budget, Policy, convert, cost, exporting
from qprune.console import result_table
from qprune.errors import PolicyMismatchError
from qprune.exporting import add_onnx
from qprune.geometry import Geometry
from qprune.recipes import recipe_for
from qprune.report import write_report
from qprune.resume.statefile import read_state, write_state
from qprune.runfolder import open_run
from qprune.search import Search
from qprune.seeds import _entry, finished, run
from qprune.summary import summarise

QUICK = {"float_epochs": 1, "search_epochs": 1}
FIGURES = ("bits_by_layer", "accuracy_cost", "bits_by_filter", "evolution", "progress")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        yield
    gc.unfreeze()
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done") / "run"
    run(options(**QUICK), folder, Watcher())
    (folder / "report.html").write_text("")
    return folder


@functools.cache
def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    found["runs"][0]["damaged_images"] = {"train": {"count": 3, "names": ["a.png"]}}
    return found


def put(folder: Path, seed: int) -> None:
    text = json.dumps(changed(result(folder), seed)).encode()
    (folder / "result.json").write_bytes(damaged(text, seed) if seed % 5 == 0 else text)


@pytest.fixture
def restored(done: Path) -> Iterator[Path]:
    result(done)
    before = {path: path.read_bytes() for path in done.iterdir() if path.is_file()}
    yield done
    for path, content in before.items():
        path.write_bytes(content)


def test_finished_runs(restored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `qprune search --resume` shows of them."""

    @fuzz(1000)
    def check(seed: int) -> None:
        put(restored, seed)

        def show() -> None:
            found = finished(restored)
            assert found is not None
            result_table(found)
            assert isinstance(found["summary"]["verdict"], str)

        refused(show)

    check()


def test_runs_that_get_an_onnx_file(restored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "written", lambda *args: (exporting.Exported("onnx", "model.onnx"),))
    monkeypatch.setattr(exporting, "write_report", lambda folder: None)

    @fuzz(60)
    def check(seed: int) -> None:
        put(restored, seed)
        refused(lambda: add_onnx(restored))

    check()


def test_runs_that_are_exported(restored: Path) -> None:
    texts = {name: (restored / name).read_bytes() for name in ("options.yaml", "result.json")}

    @fuzz(150)
    def check(seed: int) -> None:
        name = ("options.yaml", "result.json")[seed % 2]
        for other, content in texts.items():
            (restored / other).write_bytes(damaged(content, seed) if other == name else content)
        refused(lambda: open_run(restored))

    check()


def test_seeds_that_are_over(done: Path, tmp_path: Path) -> None:
    seed_file = {"run": result(done)["runs"][0], "limits": result(done)["budget"]["limits"]}

    @fuzz(500)
    def check(seed: int) -> None:
        text = json.dumps(changed(seed_file, seed)).encode()
        (tmp_path / "seed.json").write_bytes(damaged(text, seed) if seed % 5 == 0 else text)
        found = _entry(tmp_path)
        if found is not None:
            summarise([found["run"]], next(iter(found["limits"])))

    check()


METRICS = [
    {"phase": phase, "seed": seed, "epoch": epoch, "loss": 0.5, "accuracy": 0.3, "expected": {"conv1": {"w_bits": 3.0, "a_bits": 4.0}}}
    for seed in (0, 1) for phase in ("float", "search") for epoch in (0, 1)
]  # fmt: skip


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize(("drawn", "examples"), [(False, 500), (True, 8)], ids=["text", "figures"])
def test_reports(unfinished: bool, drawn: bool, examples: int, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not drawn:
        figures, report = importlib.import_module("qprune.figures"), importlib.import_module("qprune.report")
        for name in FIGURES:
            monkeypatch.setattr(figures, name, lambda *args: None)
        monkeypatch.setattr(report, "figure_section", lambda *args: "")

    @fuzz(examples)
    def check(seed: int) -> None:
        if unfinished:
            lines = "\n".join(json.dumps(row) for row in changed(METRICS, seed)).encode()
            (tmp_path / "metrics.jsonl").write_bytes(damaged(lines, seed) if seed % 5 == 0 else lines)
        else:
            (tmp_path / "result.json").write_text(json.dumps(changed(result(done), seed)))
        refused(lambda: write_report(tmp_path))

    check()


def mutated(value: Any, seed: int) -> Any:
    """As `mutations.changed`, of a state with tensors."""
    chance, value = random.Random(seed), copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        all_of_it = list(_places(value))
        holder, key = chance.choice(all_of_it)
        kind, old = chance.randrange(5), holder[key]
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(old, Tensor):
            holder[key] = chance.choice(
                (old.flatten()[:-1], old.double(), old.unsqueeze(0), torch.zeros(0), old.to(torch.int64), old.bool())
            )
        elif kind == 2:
            other, place = chance.choice(all_of_it)
            holder[key] = copy.deepcopy(other[place])
        else:
            holder[key] = copy.deepcopy(chance.choice([odd for odd in ODD if odd != "\ud800"]))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        yield value, key
        yield from _places(item)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_checkpoints_whose_digest_fits(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(options(**QUICK), tmp_path, Watcher(8), minutes=1e-9)
    states = tmp_path / "checkpoints"
    newest = max(states.glob("*-search.safetensors"))
    state, whole = read_state(newest), {path: path.read_bytes() for path in states.glob("*-end.safetensors")}

    @fuzz(50)
    def check(seed: int) -> None:
        for path in states.iterdir():
            path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # of what a checkpoint cannot hold
            write_state(newest, mutated(state, seed))

        def go_on() -> None:
            with contextlib.suppress(Killed):
                run(options(**QUICK), tmp_path, Watcher(2), resume=True, minutes=0)

        refused(go_on)

    check()


@functools.cache
def units_text() -> str:
    """A policy with bits of what is produced, and channels of activations in its geometry."""
    x = torch.randn(4, 1, 8, 8)
    mixed = recipe_for(options("zur"), x[:2]).prepare(small_network(), [x])
    return Search(mixed, Budget.parse("w3a3"), "zur").policy().to_json()


def test_channels_that_nobody_produces() -> None:
    data = json.loads(units_text())
    name, unit = next((name, unit) for name, unit in data["geometry"]["units"].items() if unit["source"] in data["layers"])
    layer = next(layer for layer in data["geometry"]["layers"] if layer["name"] == name)
    for last in (7, 8):
        unit["channels"] = [*range(layer["inputs"] * layer["groups"] - 1), last]
        data["layers"][unit["source"]]["out_bits"] = [2, 4] * 4
        data["fingerprint"] = Geometry.from_json(data["geometry"]).fingerprint
        policy = Policy.from_json(json.dumps(data))
        if last == 7:
            assert cost(policy).bops > 0
    with pytest.raises(PolicyMismatchError, match=rf"layer {name} reads channel 8 of {unit['source']}, which has bits for 8"):
        cost(policy)


@fuzz(500)
def test_policies_with_units(seed: int) -> None:
    assert '"units"' in units_text()
    data = json.loads(units_text())
    if seed % 2:
        data = changed(data, seed)
    else:
        data["geometry"] = changed(data["geometry"], seed)
        with contextlib.suppress(Exception):  # then the file has the old fingerprint, and is refused for that
            data["fingerprint"] = Geometry.from_json(data["geometry"]).fingerprint

    def use() -> None:
        policy = Policy.from_json(json.dumps(data))
        if policy.geometry is not None:
            cost(policy)
        convert(Small(), policy)

    refused(use)
