"""The public names, and what importing the package does and does not do."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qprune

NAMES = [
    *("SearchSpace", "Policy", "Budget", "prepare", "convert", "cost", "Search", "allocate", "arch_parameters", "weight_parameters"),
    *("channel_groups", "save", "load", "save_packed", "load_packed", "backend", "report", "plot", "nn", "functional", "calibrate"),
    *("set_gates", "sample_gates", "verify", "Verification", "VerificationError"),
    *("QPruneError", "UnsupportedLayerError", "InfeasibleBudgetError", "PolicyMismatchError", "CheckpointError", "NonFiniteError"),
    *("export_onnx", "export_qonnx", "ExportError", "fold", "recalibrate", "removal_report"),
    "__version__",
]
ERRORS = [name for name in NAMES if name.endswith("Error")]
ROOT = Path(qprune.__file__).resolve().parents[1]


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", NAMES)
def test_public_name(name: str) -> None:
    assert name in qprune.__all__
    assert getattr(qprune, name) is not None


def test_all_is_complete_and_sorted() -> None:
    assert len(set(qprune.__all__)) == len(qprune.__all__)
    assert list(qprune.__all__) == sorted(qprune.__all__)
    assert set(qprune.__all__) == set(NAMES)


def test_star_import() -> None:
    namespace: dict[str, object] = {}
    exec("from qprune import *", namespace)
    assert set(NAMES) <= set(namespace)


@pytest.mark.parametrize("name", ["MixedConv2d", "MixedLinear", "MixedActivation", "QuantConv2d", "QuantLinear"])
def test_layers(name: str) -> None:
    assert name in qprune.nn.__all__
    assert issubclass(getattr(qprune.nn, name), torch.nn.Module)


def test_function() -> None:
    assert list(inspect.signature(qprune.functional.mix_quantize).parameters)[:6] == ["x", "offset", "range", "p", "steps", "zero_point"]


@pytest.mark.parametrize("name", ERRORS)
def test_errors_have_one_base(name: str) -> None:
    assert issubclass(getattr(qprune, name), qprune.QPruneError)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("nn", "functional", "__version__")])
def test_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(qprune, name))


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("prepare", ["model", "space", "rules", "example_inputs"]),
        ("convert", ["model", "policy", "space", "remove", "round_to"]),
        ("cost", ["model_or_policy", "example_inputs", "convention"]),
        ("channel_groups", ["model", "example_inputs"]),
        ("calibrate", ["model", "batches"]),
        ("recalibrate", ["model", "loader", "batches", "momentum"]),
        ("fold", ["model", "example_inputs"]),
        ("arch_parameters", ["model"]),
        ("weight_parameters", ["model"]),
    ],
)
def test_signature(function: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(qprune, function)).parameters)[: len(parameters)] == parameters


def test_import_is_light_and_sets_nothing() -> None:
    code = """
import random, sys, torch
before, numbers = set(sys.modules), random.getstate()
state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
import qprune
heavy = {"triton", "matplotlib", "torch_pruning", "sklearn", "onnx", "torchvision"}
assert torch.equal(state, torch.get_rng_state()) and random.getstate() == numbers
assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == (threads, dtype, True)
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & heavy))
"""
    assert python(code) == "[]"


def test_works_without_triton_and_matplotlib() -> None:
    code = """
import logging, sys
logging.disable(logging.CRITICAL)
import torch
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
for name in ("triton", "matplotlib", "sklearn"):
    sys.modules[name] = None
import qprune
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
model = qprune.prepare(net, qprune.SearchSpace(w_bits=(0, 2, 4)), example_inputs=torch.randn(1, 3, 8, 8))
model(torch.randn(2, 3, 8, 8)).sum().backward()
print(all(p.grad is not None for p in model.parameters()), qprune.cost(model).bops.item() > 0)
"""
    assert python(code) == "True True"
