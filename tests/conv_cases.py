"""The table of mixed convolutions that every backend is tested on, and how two results are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qprune.kernels import IDENTITY, backend, mixed_conv2d

BITS = {1: ([15], [0]), 2: ([3, 255], [0, 0]), 3: ([3, 15, 255], [0, 0, 0])}


@dataclass(frozen=True)
class Case:
    """x [batch, channels, *size], weight [filters, M·channels/groups, *kernel]; signed: inputs of both signs with negative offsets."""

    name: str
    channels: int
    filters: int
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (7, 6)
    m: int = 3
    batch: int = 2
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    signed: bool = False
    offset: float = 0.0
    special: str = ""
    steps: tuple[float, ...] | None = None

    @property
    def grid(self) -> tuple[list[float], list[float]]:
        if self.steps is not None:
            return list(self.steps), [0.0] * len(self.steps)
        steps, zero = BITS[self.m]
        return [float(n) for n in steps], [float(z) for z in zero]


CASES = [
    Case("3x3", 8, 16),
    Case("1x1", 16, 24, (1, 1), padding=(0, 0)),
    Case("5x5", 5, 9, (5, 5), padding=(2, 2)),
    Case("7x7-stride-2", 3, 16, (7, 7), (15, 13), stride=(2, 2), padding=(3, 3)),
    Case("3x3-stride-2-odd", 7, 11, stride=(2, 2)),
    Case("1x1-stride-2", 8, 12, (1, 1), stride=(2, 2), padding=(0, 0)),
    Case("dilation", 6, 10, size=(9, 9), padding=(2, 2), dilation=(2, 2)),
    Case("rectangular", 4, 6, (3, 1), (9, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 1)),
    Case("no-padding", 8, 8, padding=(0, 0)),
    Case("wide-padding", 4, 8, (1, 1), padding=(1, 1)),
    Case("groups-2", 8, 12, groups=2),
    Case("groups-4-stride-2", 12, 8, groups=4, stride=(2, 2)),
    Case("batch-1", 9, 17, batch=1),
    Case("one-quantizer", 8, 16, m=1),
    Case("two-quantizers", 8, 16, m=2),
    Case("contiguous", 8, 16, channels_last=False),
    Case("signed", 8, 12, signed=True),
    Case("learned-offset", 8, 12, signed=True, offset=0.17),
    Case("full-precision", 8, 12, steps=(3, 15, IDENTITY)),
    Case("pruned-input", 8, 12, steps=(0, 15, 255)),
    Case("fp16", 16, 16, dtype=torch.float16),
    Case("bf16", 16, 16, dtype=torch.bfloat16),
    Case("bf16-signed-groups", 16, 16, dtype=torch.bfloat16, signed=True, groups=2),
    Case("many-channels", 70, 40, size=(5, 5)),
    Case("nan", 4, 6, special="nan"),
    Case("zeros", 4, 6, special="zeros"),
]
PARAMS = [pytest.param(case, id=case.name) for case in CASES]


@dataclass
class Problem:
    case: Case
    x: Tensor
    weight: Tensor
    offset: Tensor
    range: Tensor
    choice: Tensor
    grad: Tensor

    def run(
        self, name: str | None, device: str = "cpu", double: bool = False, sampled: bool = False, all_groups: bool = True
    ) -> dict[str, Tensor]:
        """Output and all gradients. sampled: each filter keeps its weight in the group of its choice only."""

        def leaf(t: Tensor) -> Tensor:
            return (t.to(device, torch.float64) if double else t.to(device)).detach().requires_grad_()

        case = self.case
        weight = self.weight
        if sampled:
            keep = torch.nn.functional.one_hot(self.choice, case.m).to(weight.dtype).view(-1, case.m, 1, 1, 1)
            weight = (weight.unflatten(1, (case.m, -1)) * keep).flatten(1, 2)
        x, weight, offset, range_ = (leaf(t) for t in (self.x, weight, self.offset, self.range))
        choice = self.choice.to(device) if sampled else None
        with backend(name):
            y = mixed_conv2d(
                x, weight, offset, range_, *case.grid, choice, all_groups, case.stride, case.padding, case.dilation, case.groups
            )  # fmt: skip
            y.backward(self.grad.to(device=device, dtype=y.dtype))
        values = {"y": y.detach(), "x": x.grad, "weight": weight.grad, "offset": offset.grad, "range": range_.grad}
        return {k: v.cpu() for k, v in values.items() if v is not None}


def problem(case: Case, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(case.batch, case.channels, *case.size, generator=g)
    x = x if case.signed else x.relu()
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    m = len(case.grid[0])
    weight = torch.randn(case.filters, m * case.channels // case.groups, *case.kernel, generator=g) / math.sqrt(case.channels)
    range_ = 1.0 + 2.0 * torch.rand(m, generator=g)
    offset = torch.zeros(m) if not case.signed else -0.5 * range_ + case.offset
    if case.special == "zeros":
        x = torch.zeros_like(x)
    elif case.special == "nan":
        x[0, 1, 2, 3] = math.nan
    choice = torch.randint(m, (case.filters,), generator=g)
    with torch.no_grad():
        shape = torch.nn.functional.conv2d(
            x, weight[:, : case.channels // case.groups], None, case.stride, case.padding, case.dilation, case.groups
        ).shape
    grad = torch.randn(shape, generator=g)
    return Problem(case, x.to(case.dtype), weight.to(case.dtype), offset, range_, choice, grad)
