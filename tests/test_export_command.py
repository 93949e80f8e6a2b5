"""`qprune export`: formats of a run folder, and folders that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from test_cli import qprune

from qprune.checkpoint import save
from qprune.exporting import FILES, add_onnx, export_run, formats_of
from qprune.options import RunOptions
from qprune.policy import Policy
from qprune.result import read_result
from qprune.runfolder import open_run
from qprune.seeds import run as search
from qprune.tasks.train import evaluate

SHORT = {"float_epochs": 1, "search_epochs": 1, "finetune_epochs": 1, "batch_size": 512, "model": "lenet5"}
SHORT |= {"data": "synthetic", "data_options": {"in_channels": 1, "image_size": 16, "train": 64, "val": 32, "test": 32}}


class Silent:
    def phase(self, name: str, seed: int, steps: int) -> None:
        self.name = name

    def step(self, values: Any) -> None:
        self.values = values

    def epoch(self, values: Any) -> None:
        self.values = values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two seeds."""
    place = tmp_path_factory.mktemp("export") / "run"
    search(RunOptions(**SHORT, seeds=2), place, Silent())
    return place


def test_every_format_computes_what_the_network_does(folder: Path, tmp_path: Path) -> None:
    place, files = export_run(folder, formats_of("all"), tmp_path / "files", samples=8)
    assert [file.format for file in files] == list(FILES) and not [file.error for file in files if file.error]
    for file in files:
        assert file.bytes == (place / file.file).stat().st_size > 0
        assert file.samples == 8 and file.parity
        for program, found in file.parity.items():
            assert found.values == 80, program
            assert found.agreement == 1 or found.share > 0
            assert found.largest < 1e-4 or program == "onnxruntime"
    by_name = {file.format: file for file in files}
    assert by_name["onnx"].operators["QuantizeLinear"] > 0 and by_name["qonnx"].operators["Quant"] > 0
    assert sum(by_name["onnx"].operators.values()) == len(onnx.load(place / "model.onnx").graph.node)
    assert by_name["packed"].bytes < by_name["safetensors"].bytes / 2
    listed = json.loads((place / "export.json").read_text())
    assert [entry["format"] for entry in listed["files"]] == list(FILES)


def test_the_network_is_the_run_s(folder: Path) -> None:
    results = read_result(folder)["runs"]
    for seed, entry in enumerate(results):
        run = open_run(folder, seed)
        accuracy = evaluate(run.model, run.task.loader("test", 256))[1]
        assert accuracy == entry["networks"]["searched"]["accuracy"]
    assert open_run(folder).seed == 0


def test_networks_with_fewer_filters(tmp_path: Path) -> None:
    search(RunOptions(**{**SHORT, "method": "slimmable", "budget": "macs=50%", "model": "resnet8"}), tmp_path / "run", Silent())
    place, (file,) = export_run(tmp_path / "run", ("safetensors",), samples=4)
    assert file.parity["qprune"].largest == 0
    run = open_run(tmp_path / "run")
    widths = {name: sum(b != 0 for b in bits.per_filter(64)) for name, bits in Policy.load(tmp_path / "run" / "policy.json").layers.items()}
    made = dict(run.model.named_modules())
    assert place.name == "export" and all(made[name].out_channels == width for name, width in widths.items() if "shortcut" not in name)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    done = qprune("export", str(folder), "--format", "packed,safetensors", "--out", str(tmp_path), "--seed", "1", "--samples", "5")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("packed", "kB", "5 test samples", "100.0%", "model.packed.safetensors"))
    assert json.loads((tmp_path / "export.json").read_text())["seed"] == 1


def test_what_a_search_adds(folder: Path) -> None:
    result = add_onnx(folder, samples=8)
    assert (folder / "model.onnx").exists() and (folder / "seed-1" / "model.onnx").exists()
    assert [entry["files"][0]["file"] for entry in result["runs"]] == ["model.onnx", "model.onnx"]
    assert read_result(folder) == json.loads(json.dumps(result))
    assert "seed-1/model.onnx" in (folder / "report.html").read_text()
    written = (folder / "model.onnx").stat().st_mtime_ns
    assert add_onnx(folder) == read_result(folder)
    assert (folder / "model.onnx").stat().st_mtime_ns == written


def test_a_missing_package_is_named_and_stops_no_other_format(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for package in ("onnx", "onnxscript"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    done = qprune("export", str(folder), "--format", "onnx,packed", "--out", str(tmp_path), "--samples", "2")
    assert done.returncode == 2
    assert "onnx: " in done.stderr and "qprune[onnx]" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / FILES["packed"]).exists() and not (tmp_path / FILES["onnx"]).exists()
    result = json.loads((folder / "result.json").read_text())
    for entry in result["runs"]:
        entry.pop("files", None)
    (folder / "result.json").write_text(json.dumps(result))
    assert "files" not in add_onnx(folder)["runs"][0]
    assert len([line for line in caplog.messages if "qprune[onnx]" in line]) == 1


def test_folders_that_hold_no_finished_run(tmp_path: Path) -> None:
    def message(*words: str) -> str:
        done = qprune("export", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    place = tmp_path / "run"
    assert "is not a folder" in message(str(place))
    place.mkdir()
    assert "no run" in message(str(place))
    (place / "options.yaml").write_text("")
    save(torch.nn.Linear(2, 2), place / "model.safetensors")
    assert "a network of qprune train" in message(str(place))
    (place / "options.yaml").write_text("data: digits\n")
    assert f"--resume --out {place}" in message(str(place))
    (place / "options.yaml").write_text("data: digits\nwings: 2\n")
    assert "another version" in message(str(place))
    (place / "cells.csv").write_text("")
    assert "a comparison" in message(str(place))
    (place / "study.db").write_text("")
    assert "a study" in message(str(place))


def test_mistakes(folder: Path) -> None:
    for words, text in (
        (("--format", "tflite"), "tflite is unknown; expected some of onnx, qonnx, packed, torch, safetensors"),
        (("--format", ""), "nothing is unknown"),
        (("--seed", "7"), "has no seed 7; it has 0, 1"),
        (("--samples", "0"), "at least 1"),
    ):
        done = qprune("export", str(folder), *words)
        assert done.returncode == 2 and text in done.stderr
