"""Shapes of the networks, the model that predicts times, and reports from files of results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qprune.benchmarks import machine, predict, report, roofline, shapes
from qprune.benchmarks.targets import TARGETS
from qprune.errors import InputError


@pytest.mark.parametrize(
    "name, count, distinct, weights",
    [("resnet18", 20, 11, 11_678_912), ("resnet50", 53, 23, 25_502_912), ("mobilenetv2", 52, 30, 3_469_760)],
)
def test_layers_of_the_networks(name: str, count: int, distinct: int, weights: int) -> None:
    every, some = shapes.convolutions(name, 256, distinct=False), shapes.convolutions(name, 256)
    assert len(every) == count and len(some) == distinct and sum(shape.count for shape in some) == count
    assert sum(torch.Size(shape).numel() for shape in shapes.weights(name)) == weights


def test_a_written_shape_is_that_of_the_network() -> None:
    traced = shapes.convolutions("resnet18", 256)[1]
    assert (
        dataclasses.replace(traced, name="", count=1) == shapes.convolution("256x64x56x56:64x3x3/1")
        and str(traced) == "256x64x56x56:64x3x3/1"
    )
    with pytest.raises(InputError, match="--shapes: expected positive numbers"):
        shapes.convolution("1x3x2x2:4x0x3")


def test_predictions_by_hand() -> None:
    """Two shapes: a 3x3 convolution that is bound by its dot products, and a 1x1 one that is bound by its bytes."""
    gpu = predict.Gpu("round", copy=1e12, matmul=1e15, slots=1e15, launch=1e-6, library=0.5, fused=0.5)
    dense = shapes.convolution("1x64x8x8:64x3x3/1")
    assert dense.flops == 2 * 64 * 64 * 9 * 64
    x, w = 64 * 64 * 2, 64 * 64 * 9 * 2
    forward, backward = predict.library(dense, dataclasses.replace(gpu, matmul=1e11))
    assert forward == pytest.approx(1e-6 + dense.flops / 0.5e11) and backward == pytest.approx(2 * forward)
    assert predict.library(dense, gpu)[0] == pytest.approx(1e-6 + (2 * x + w) / 1e12)
    wide = shapes.convolution("2x16x4x4:32x1x1/1")
    x, y, w = 2 * 16 * 16 * 2, 2 * 16 * 32 * 2, 3 * 16 * 32 * 2
    fused = predict.joint_fused(wide, 3, gpu)
    assert fused.forward == pytest.approx(1e-6 + (x + y + w) / 1e12)
    assert fused.backward == pytest.approx(2e-6 + (2 * x + y + w) / 1e12 + 2e-6 + (x + y + w) / 1e12)
    library = predict.joint_library(wide, 3, gpu)
    assert library.forward == pytest.approx(1e-6 + 4 * x / 1e12 + 1e-6 + (3 * x + y + w) / 1e12)
    assert predict.joint_route(wide, 3, dataclasses.replace(gpu, launch=0.0)) == "fused"


def test_roofline_prints_tables_and_routes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"machine": {"rates": {"name": "a machine", "copy": 4e12, "matmul": 8e12}}, "rows": []}))
    assert roofline.main(["--network", "resnet18", "--rates", str(rates), "--matmul", "7e14"]) == 0
    text = capsys.readouterr().out
    assert (
        "copy=4000000000000.0, matmul=700000000000000.0" in text and "256x64x56x56:64x3x3/1" in text and "search step of ResNet-18" in text
    )
    assert roofline.main(["--routes"]) == 0
    found: dict[str, Any] = {}
    exec(capsys.readouterr().out, found)
    assert found["MEASURED"][1, 256, 64, 3] == "fused" and found["MEASURED"][9, 512, 512, 3] == "library"
    assert found["MEASURED"] == roofline.route_table()


def test_slow_instructions_send_a_layer_to_the_library() -> None:
    layer = shapes.convolution("256x64x56x56:256x1x1/1")
    assert predict.joint_route(layer, 3) == "fused"
    assert predict.joint_route(layer, 3, dataclasses.replace(predict.H200, slots=1e12)) == "library"


def _step(form: str, implementation: str, ms: float, peak: int | None = None) -> dict[str, Any]:
    row = {"kernel": "imagenet_step", "case": f"resnet18 step, {form}", "form": form, "implementation": implementation, "unit": "ms"}
    return {**row, "ms": ms, "value": ms, "values": {implementation: ms}, "band": [ms, ms], "rounds": 1, "peak_bytes": peak}


def _gpu_results() -> dict[str, Any]:
    """A file as `make bench-gpu` writes it; the numbers are made up."""
    facts: dict[str, Any] = {"unit": "ms", "value": 1.0, "candidates": 5, "x_bytes": 1 << 27}
    forward = {
        **facts,
        "case": "input a",
        "kernel": "mix_quantize",
        "direction": "forward",
        "value": 1.0,
        "of_copy": 0.95,
        "ratios": {},
        "values": {"qprune": 1.0},
    }
    backward = {**forward, "direction": "backward", "of_copy": 0.80, "ratios": {"compile-reference": 0.4, "compile": 0.5}}
    small = {**forward, "x_bytes": 1 << 20, "of_copy": 0.1}
    conv = {
        **facts,
        "case": "conv",
        "kernel": "mixed_conv2d",
        "direction": "both",
        "value": 1.0,
        "shape": "256x64x56x56:256x1x1/1",
        "quantizers": 3,
    }
    conv |= {"ratios": {"eager": 0.5, "compile": 0.8, "cudnn": 2.0}, "values": {"qprune-library": 2.0, "qprune-fused": 1.0}}
    steps = [
        _step("float", "eager", 10.0, 1000),
        _step("float", "graph", 8.0),
        _step("shared", "branches", 90.0),
        _step("shared", "qprune", 12.0),
    ]
    steps += [
        _step("shared", "search", 10.0),
        _step("shared", "lean", 9.0, 1040),
        {**_step("joint", "eager", 0.0), "skipped": "out of memory"},
    ]
    del steps[-1]["ms"]
    described = {
        **machine.describe("cpu"),
        "device": "NVIDIA H200",
        "driver": "0",
        "cuda": "0",
        "rates": {"name": "NVIDIA H200", "copy": 4e12, "matmul": 7e14},
    }
    parts = {"correctness": {"ended": "done"}, "int8": {"ended": "stopped after 30 s"}}
    return {"command": "make bench-gpu", "machine": described, "rows": [forward, backward, small, conv, *steps], "parts": parts}


def test_report_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, chart = tmp_path / "gpu.json", tmp_path / "docs" / "speed.svg"
    results.write_text(json.dumps(_gpu_results()))
    assert report.main([str(results), "--chart", str(chart)]) == 0
    text = capsys.readouterr().out
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:6]] for line in text.splitlines() if line.startswith("|")
    }
    assert cells[TARGETS[0].what][2:] == ["95%", "met"]
    assert cells[TARGETS[1].what][2:] == ["80%", "missed"]
    assert cells[TARGETS[2].what][2:] == ["2.50x", "met"]
    assert cells[TARGETS[3].what][2:] == ["not measured", "not measured"]
    assert cells[TARGETS[4].what][2:] == ["1.25x", "missed"]  # against the better one of eager and compiled
    assert cells[TARGETS[5].what][2:] == ["1.25x", "missed"]  # the whole search step against the faster plain one
    assert cells[TARGETS[9].what][2:] == ["9.00x", "met"]
    assert cells[TARGETS[10].what][2:] == ["1.04x", "met"]
    assert cells[TARGETS[11].what][2:] == ["1.12x", "met"]
    assert "- int8: stopped after 30 s" in text and "correctness" not in text
    assert "| joint | eager | out of memory |" in text
    assert chart.read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert report.main([str(results), "--routes"]) == 0
    assert capsys.readouterr().out == 'MEASURED = {\n    (1, 64, 256, 3): "fused",\n}\n'


def test_report_without_a_gpu_claims_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = _gpu_results()
    cpu["machine"] |= {"cuda": "", "device": "a processor"}
    (tmp_path / "cpu.json").write_text(json.dumps(cpu))
    for arguments in ([], [str(tmp_path / "cpu.json")]):
        assert report.main(arguments) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if " | at " in line]
        assert len(lines) == len(TARGETS) and all(line.endswith("| not measured | not measured |") for line in lines)
    assert report.main([str(tmp_path / "nowhere.json")]) == 2
    assert capsys.readouterr().err.startswith("report: results: expected a JSON file")


def test_readme_has_the_predictions_of_the_model() -> None:
    """Where this fails the model changed: put what `python -m benchmarks.report` prints into benchmarks/README.md."""
    readme = Path(shapes.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert report.targets(None) in readme
