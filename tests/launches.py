"""Every launcher on a GPU that is not there: arguments are bound, specialised and compiled for sm_90 as on one; the launch is only noted.

Run as a script, without TRITON_INTERPRET, since Triton decides at its import how kernels run; prints {case: [kernel, …]} as JSON. Results
are what was in memory: only that it runs, and what it launches, means something.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from qprune import SearchSpace, prepare
from qprune.functional import mix_quantize
from qprune.kernels import backend, candidates, dispatch, launch, mixed_conv2d, quant_conv2d_int8, routes
from qprune.kernels.reference_int8 import weight_codes
from qprune.nn.premix import Premix

launched: list[str] = []


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *args: Any, **options: Any) -> None:
        launched.append(self.name)


class _Utilities:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, name, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}


class _Driver:
    """What Triton asks of a device, answered as an H200 would."""

    utils, launcher_cls = _Utilities(), _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _pretend() -> None:
    """CPU tensors take the Triton path and get the launch parameters of an H200."""
    driver.set_active(_Driver())
    dispatch.interpreting = lambda: True
    ours, original = launch.Device(132, 90), candidates.device_of
    for operation in dispatch.OPERATIONS["triton"]:
        importlib.import_module(f"qprune.kernels.{operation}")
    for name, module in list(sys.modules.items()):
        if name.startswith("qprune.kernels") and getattr(module, "device_of", None) is original:
            module.device_of = lambda x: ours  # type: ignore[attr-defined]


def _image(channels: int, side: int = 14, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(4, channels, side, side).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def _mix(x: Tensor, rows: int, axis: int, one_clip: bool = False) -> None:
    shape = (rows, 3) if rows > 1 else (3,)
    p, r = torch.ones(shape, requires_grad=True), torch.ones((rows, 1) if one_clip else shape, requires_grad=True)
    r_all = r.expand(rows, 3) if one_clip else r
    offset = torch.zeros(rows, 1).expand(rows, 3) if one_clip else torch.zeros(shape)
    y = mix_quantize(x, offset, r_all, p, [3, 15, 255], [0, 0, 0], axis=axis)
    y.backward(torch.ones_like(y))


def _conv(
    filters: int, kernel: int, stride: int = 1, choice: bool = False, dtype: torch.dtype = torch.bfloat16, channels: int = 64
) -> None:
    x = _image(channels, dtype=dtype)
    weight = torch.randn(filters, 3 * channels, kernel, kernel).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    offset, range = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    chosen = torch.randint(3, (filters,)) if choice else None
    window = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
    y = mixed_conv2d(x, weight, offset, range, [3, 15, 255], [0, 0, 0], chosen, not choice, *window)
    y.backward(torch.ones_like(y))


def _int8(kernel: int) -> None:
    weight = torch.randn(64, 64, kernel, kernel).contiguous(memory_format=torch.channels_last)
    codes, total, scale = weight_codes(weight, torch.ones(64), torch.full((64,), 15.0), torch.full((64,), 8.0))
    x, pad = _image(64).detach(), (kernel // 2, kernel // 2)
    quant_conv2d_int8(x, codes, total, scale, None, torch.zeros(1), torch.ones(1), 255.0, (1, 1), pad, (1, 1), 1, torch.bfloat16)


def _network(joint: bool) -> None:
    x = torch.rand(2, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    net = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(1600, 5)
    )
    space = SearchSpace((2, 4, 8), (2, 4, 8), granularity="filter", joint=joint)
    model = prepare(net.to(memory_format=torch.channels_last), space, rules={"4": SearchSpace.fixed(8, 8)}).train()  # type: ignore[call-overload]
    for module in model.modules():
        if hasattr(module, "calibrated"):
            module.calibrated = True
    with Premix(model), routes.forced("fused"), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.sum().backward()


CASES: dict[str, Callable[[], None]] = {
    "activation": lambda: _mix(_image(64), 1, 1),
    "activation, one clip": lambda: _mix(_image(64), 1, 1, one_clip=True),
    "activation per channel": lambda: _mix(_image(64), 64, 1),
    "weight": lambda: _mix(torch.randn(64, 32, 3, 3, requires_grad=True), 64, 0),
    "conv 3x3": lambda: _conv(64, 3),
    "conv 1x1, fp32": lambda: _conv(96, 1, dtype=torch.float32),
    "conv 7x7, stride 2, odd": lambda: _conv(30, 7, 2, channels=3),
    "conv 3x3, sampled": lambda: _conv(64, 3, choice=True),
    "int8 3x3": lambda: _int8(3),
    "int8 1x1": lambda: _int8(1),
    "network": lambda: _network(joint=False),
    "network, joint": lambda: _network(joint=True),
}


def main() -> None:
    _pretend()
    found = {}
    with backend("triton"):
        for name, run in CASES.items():
            launched.clear()
            run()
            found[name] = list(launched)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
