"""What runs on a GPU up to the launch itself: arguments bound, specialised and compiled, kernels counted. See launches.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

MIX = {"mix_quantize_fwd_kernel": 1, "mix_quantize_bwd_kernel": 1, "mix_quantize_bwd_kernel_finish": 1}
MANY = {"mix_quantize_many_fwd_kernel": 1, "mix_quantize_many_bwd_kernel": 1}
CONV = ("pack_kernel", "mixed_conv_fwd_kernel", "pack_grad_kernel", "mixed_conv_dx_kernel", "mixed_conv_dx_kernel_finish")
CONV = dict.fromkeys((*CONV, "mixed_conv_dw_kernel", "mixed_conv_dw_kernel_finish"), 1)
EXPECTED: dict[str, dict[str, int]] = {
    "activation": MIX,
    "activation, one clip": MIX,
    "activation per channel": MIX,
    "weight": MIX,
    "conv 3x3": CONV,
    "conv 1x1, fp32": CONV,
    "conv 7x7, stride 2, odd": CONV,
    "conv 3x3, sampled": {**CONV, "filter_table_kernel": 3, "sort_grad_kernel": 2},
    "int8 3x3": {"encode_kernel": 1, "conv_int8_kernel": 1},
    "int8 1x1": {"conv_int8_kernel": 1},
}


@pytest.fixture(scope="module")
def launches() -> dict[str, Counter[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "launches.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Counter(kernels) for name, kernels in json.loads(done.stdout).items()}


@pytest.mark.parametrize("case", EXPECTED)
def test_an_operation_launches(case: str, launches: dict[str, Counter[str]]) -> None:
    assert launches[case] == EXPECTED[case]


@pytest.mark.parametrize("case", ["network", "network, joint"])
def test_the_weights_of_a_network_take_one_launch_in_each_pass(case: str, launches: dict[str, Counter[str]]) -> None:
    """With joint candidates the fixed layer has other candidates than the rest, and mixes alone."""
    families = 2 if case == "network, joint" else 1
    assert {name: launches[case][name] for name in MANY} == dict.fromkeys(MANY, families)
    assert launches[case]["depthwise_fwd_kernel"] == launches[case]["depthwise_bwd_kernel"] == 1
    assert launches[case]["mixed_conv_fwd_kernel"] == (2 if case == "network, joint" else 0)
