"""torch.export of converted networks, and networks where Triton or qprune are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_cases import Wired, converted, images
from torch import nn

import qprune
from qprune.errors import ExportError
from qprune.export.plain import deployable
from qprune.nn.codebook import to_codebook

ROOT = Path(qprune.__file__).resolve().parents[1]
BATCH = {0: torch.export.Dim("batch")}

CASES: dict[str, dict[str, Any]] = {
    "filters": {},
    "pruned": {"bits": (0, 1, 2, 8)},
    "offsets": {"bits": (1, 3, 8), "weight_quantizer": "dorefa", "input_quantizer": "lsq+", "scales": "layer"},
    "outputs": {"bits": (2, 3, 8, 32), "placement": "output", "input_quantizer": "nice", "weight_quantizer": "nice"},
    "clips": {"bits": (2, 4), "placement": "output", "input_quantizer": "pact", "shared_weights": False},
}


def run(code: str, folder: Path) -> str:
    """What a fresh interpreter prints that starts in `folder` and finds qprune only if the code says so."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", CASES)
def test_a_deployable_copy_computes_the_same_bit_for_bit(name: str) -> None:
    model = converted(Wired, images(), **CASES[name])
    copy = deployable(model)
    for seed in range(3):
        x = images(seed=seed)
        assert torch.equal(copy(x), model(x))
    assert not any(type(module).__name__.startswith("Quant") for module in copy.modules())
    assert not any(p.requires_grad for p in copy.parameters())


def test_a_deployable_copy_of_quantiles_differs_at_the_edges_of_cells_only() -> None:
    model = converted(Wired, images(), (2, 4, 32), placement="output", input_quantizer="uniq", weight_quantizer="uniq")
    x = images(seed=5)
    difference = (deployable(model)(x) - model(x)).abs().amax(1)
    assert (difference < 1e-5).float().mean() >= 0.9 and difference.amax() < 1e-2


def test_a_deployable_copy_of_codebooks() -> None:
    torch.manual_seed(0)
    net = Wired().eval()
    mask = torch.rand_like(net.left.weight) < 0.5
    net.left = to_codebook(net.left, mask, torch.tensor([-0.2, 0.0, 0.1, 0.3]), a_bits=4)
    net.left.input_quantizer.calibrate(images(channels=8).relu())
    copy, x = deployable(net), images(seed=1)
    assert torch.equal(copy(x), net(x))
    assert set(copy.left.weight().unique().tolist()) <= set(net.left.codebook.tolist()) | {0.0}


def test_a_model_in_search_is_refused_by_layer() -> None:
    with pytest.raises(ExportError, match=r"'stem' \(MixedConv2d\)"):
        deployable(qprune.prepare(Wired(), qprune.SearchSpace()))


@pytest.mark.parametrize("strict", [False, True])
def test_the_converted_network_itself_can_be_captured(strict: bool, tmp_path: Path) -> None:
    """Its program has qprune's operations, which `import qprune` brings."""
    model = converted(Wired, images(), (0, 2, 4, 8))
    program = torch.export.export(model, (images(batch=2),), dynamic_shapes=(BATCH,), strict=strict)
    torch.export.save(program, tmp_path / "net.pt2")
    x = images(batch=5, seed=2)
    assert torch.equal(torch.export.load(tmp_path / "net.pt2").module()(x), model(x))


def test_a_deployable_program_runs_where_qprune_is_not_installed(tmp_path: Path) -> None:
    model = converted(Wired, images(), (0, 2, 4, 8, 32))
    program = torch.export.export(deployable(model), (images(batch=2),), dynamic_shapes=(BATCH,))
    assert {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")} == {"aten"}
    x = images(batch=5, seed=2)
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "xy.pt")
    code = """
import sys, torch
sys.modules["qprune"] = None
xy = torch.load("xy.pt", weights_only=True)
print(torch.equal(torch.export.load("net.pt2").module()(xy["x"]), xy["y"]))
"""
    assert run(code, tmp_path) == "True"


def test_a_saved_network_loads_and_runs_without_triton(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = images()
    policy = {"0": ((0, 2, 3, 4, 5, 8, 32, 0), 8), "3": (4, 4)}
    model = qprune.convert(qprune.prepare(net, qprune.SearchSpace((0, 2, 3, 4, 5, 8, 32), (4, 8)), example_inputs=x), qprune.Policy(policy))
    model.train()(x)
    qprune.save(model.eval(), tmp_path / "net.safetensors")
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "xy.pt")
    code = f"""
import logging, sys
logging.disable(logging.CRITICAL)
import torch
from torch import nn
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
for name in ("triton", "onnx", "onnxscript", "onnxruntime", "qonnx"):
    sys.modules[name] = None
sys.path.insert(0, {str(ROOT)!r})
import qprune
build = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
model = qprune.load("net.safetensors", build).eval()
xy = torch.load("xy.pt", weights_only=True)
print(torch.equal(model(xy["x"]), xy["y"]))
try:
    qprune.export_onnx(model, "net.onnx", xy["x"])
except qprune.ExportError as error:
    print("qprune[onnx]" in str(error))
"""
    assert run(code, tmp_path).splitlines() == ["True", "True"]
