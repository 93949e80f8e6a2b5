"""Nested candidates: every level of the narrower grid is a level of the wider one, so that a bit width is the sum of finer and finer
residuals (Liu et al., "Single-path Bit Sharing", 2101.04935, section 3.1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qprune.errors import SpaceError
from qprune.grids import gaussian_range, input_grid
from qprune.kernels import mix_quantize
from qprune.quantizers.base import Candidates, Quantizer
from qprune.quantizers.input import InputQuantizer
from qprune.space import FLOAT, PRUNED

_FINE = 2.0**20
"""Steps of a grid that stands for the clipped value itself: off by at most 2^−21 of the range."""
_LOG_LIMIT = 69.0


def positive(logarithm: Tensor) -> Tensor:
    """Its exponential in float32, positive and finite whatever an optimizer did."""
    return logarithm.float().clamp(-_LOG_LIMIT, _LOG_LIMIT).exp()


def check_nested(name: str, bits: Sequence[int]) -> None:
    """Raise SpaceError unless the bits, 0 aside, increase and each divides the next: 2^a − 1 divides 2^b − 1 just where a divides b."""
    widths = [b for b in bits if b != PRUNED]
    if widths == [FLOAT]:
        return
    if FLOAT in widths:
        raise SpaceError(f"{name}: 32 (float) is no level of a nested grid, got {tuple(bits)}; leave it out, 8 bits are the finest")
    for low, high in itertools.pairwise(widths):
        if high <= low or high % low:
            raise SpaceError(
                f"{name}: {high} bits behind {low} are not nested, since {low} does not divide {high}; "
                "bits must increase, each a multiple of the one before, as (2, 4, 8), (1, 2, 4) or (3, 6)"
            )


@torch.no_grad()
def residual_means(
    x: Tensor, offset: Tensor, r: Tensor, steps: Sequence[float], ratio: float, axis: int, kept: Tensor | None = None
) -> Tensor:
    """The mean of |z − z_k| over all of x for every grid k, [len(steps)] in float32 (float64 for float64 x); z = clamp((x − β)/r + ratio,
    0, 1), z_k that value on the grid of steps[k] steps.

    offset, r  [1, 1]
    ratio      zero point over steps: 0, or 1/2 for weights
    kept       [C] along `axis`, 0 where a channel counts as zero; None: none does

    Each grid takes one fused pass over x and one reduction.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    p = torch.ones(1, 2, dtype=dtype, device=x.device) if kept is None else kept.to(dtype).unsqueeze(1).expand(-1, 2)
    p = torch.cat([p[:, :1], -p[:, :1]], dim=1)
    columns = [t.to(dtype).expand(p.size(0), 2) for t in (offset, r)]
    found = []
    for n in steps:
        residual = mix_quantize(x, *columns, p, [_FINE, n], [ratio * _FINE, ratio * n], axis, [0, 0], [0, 0], None)
        found.append(torch.linalg.vector_norm(residual, 1, dtype=dtype))
    return torch.stack(found) / (max(x.numel(), 1) * r.to(dtype).squeeze())


class SharedInputQuantizer(InputQuantizer):
    """Quantizers of a layer's input with one clip for all candidates: Q_k(x) = β + r D(clamp((x − β)/r, 0, 1)), D with 2^b − 1 steps.

    signed  whether x has negative values. False: β = 0, r is the clip of PACT (1805.06085). True: β is learned too, from −r/2 on (as
            2004.09576; the paper's inputs are all rectified)
    start   of the clip: None: fitted to the first batch in training mode, by the squared error of the middle candidate

    The clip is a logarithm, where the paper takes |v| of a number v that is learned.
    """

    def __init__(self, bits: Sequence[int], signed: bool, start: float | None = 1.0, device: torch.device | None = None) -> None:
        Quantizer.__init__(self, bits)
        self.kind, self.learned = "lsq+" if signed else "pact", True
        self.steps, self.zero_point = ([grid[i] for grid in map(input_grid, bits)] for i in range(2))
        self.pass_through = [0] * len(self.bits)
        self.log_clip = nn.Parameter(torch.zeros(1, 1, device=device))
        self.register_buffer("signed", torch.full((), float(signed), device=device))
        self.register_buffer("negative_share", torch.full((1, len(self.bits)), 0.5 * signed, device=device), persistent=False)
        if signed:
            self.shift = nn.Parameter(torch.zeros(1, 1, device=device))
        self._add_flag(device)
        if start is not None:
            self.set_clip(torch.full((1, 1), start, device=device))

    @torch.no_grad()
    def set_clip(self, clip: Tensor) -> None:
        """Start from the largest magnitude that is not clipped, [1, 1]; no batch is needed any more."""
        r = clip * (2 if self.kind == "lsq+" else 1)
        self.log_clip.copy_(r.log())
        if self.kind == "lsq+":
            self.shift.copy_(-r / 2)
        self._mark_calibrated()

    @property
    def log_range(self) -> Tensor:  # type: ignore[override]
        return self.log_clip.expand(-1, len(self.bits))

    @property
    def offset(self) -> Tensor:  # type: ignore[override]
        return self._shift(positive(self.log_clip)).expand(-1, len(self.bits))

    def _shift(self, r: Tensor) -> Tensor:
        return self.shift if self.kind == "lsq+" else torch.zeros_like(r)

    def learned_range(self) -> Tensor:
        return positive(self.log_clip).expand(-1, len(self.bits))

    def offsets(self, r: Tensor) -> Tensor:
        return self.offset

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Start from the clip that suits the middle candidate best."""
        middle = InputQuantizer("pact", self.bits[len(self.bits) // 2 : len(self.bits) // 2 + 1], x.device)
        middle.signed.copy_(self.signed)
        middle.calibrate(x)
        self.set_clip(middle.learned_range() * (0.5 if self.kind == "lsq+" else 1.0))

    def candidates(self, x: Tensor, p: Tensor | None, learned: Tensor | None = None) -> Candidates:
        """As InputQuantizer; p may have one row for every channel of x."""
        if not self.calibrated and self.training:
            self.calibrate(x)
        return super().candidates(x, p)

    def residual_means(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Of every candidate but the last on the input x [N, C, …], or [N, C] for a linear layer (see `residual_means`)."""
        if not self.calibrated and self.training:
            self.calibrate(x)
        r = positive(self.log_clip.detach())
        return residual_means(x.detach(), self._shift(r).detach(), r, self.steps[:-1], 0.0, 1, kept)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)  # type: ignore[no-untyped-call]
        if f"{prefix}started" in state_dict:
            self.calibrated = bool(state_dict[f"{prefix}started"])

    def extra_repr(self) -> str:
        return f"bits={self.bits}, {self.kind}, one clip"


def middle_range(steps: Sequence[float], zero_point: Sequence[float]) -> float:
    """The range of least squared error for N(0, 1) on the grid in the middle of a list."""
    middle = len(steps) // 2
    return gaussian_range(steps[middle], zero_point[middle]) if steps[middle] > 1 else 2 * math.sqrt(2 / math.pi)
