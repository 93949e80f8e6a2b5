"""Parameters → candidate quantizers (offset β, range r, steps n, zero point z), and what all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.kernels import mix_quantize
from qprune.space import FLOAT, PRUNED

TINY = 1e-8
_SAMPLE = 1 << 16
_STRIDE = 2654435761  # a prime near 2^32 / golden ratio: its multiples spread evenly over any shape
_LOG_LIMIT = 69.0  # e^±69 = 10^±30: r and 1/r stay finite and positive in float32


def _exp(log_range: Tensor) -> Tensor:
    # F.hardtanh has clamp's values and gradients for less than clamp's overhead
    return F.hardtanh(log_range.float(), -_LOG_LIMIT, _LOG_LIMIT).exp()


class Candidates(NamedTuple):
    """What a fused operation needs: β, r and p [1 or C, K] in float32 (float64 for float64 tensors), and K numbers of each other."""

    offset: Tensor
    range: Tensor
    p: Tensor
    steps: list[float]
    zero_point: list[float]
    groups: list[int]
    pass_through: list[int]

    def mix(self, x: Tensor, axis: int, seed: Tensor | None = None) -> Tensor:
        """Σ_k p_k Q_k(x), the sums of several groups side by side along dimension 1; with a seed [1], noise instead of rounding."""
        return mix_quantize(x, *self[:5], axis, *self[5:], seed)


class Quantizer(nn.Module):
    """K candidate quantizers, and their weighted sum. bits: those of each, 0 … 8 or 32."""

    def __init__(self, bits: Sequence[int]) -> None:
        super().__init__()
        self.bits = tuple(bits)

    @property
    def searched(self) -> list[int]:
        """The candidates that do quantize."""
        return [k for k, b in enumerate(self.bits) if b not in (PRUNED, FLOAT)]

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class RangeQuantizer(Quantizer):
    """K candidate quantizers with learned ranges, and their weighted sum as one fused pass.

    log_range  [rows, K] (or [rows, 1], where all candidates share one), the logarithm of r in the unit of the tensor: r stays positive, and
               its gradient is scale-free (LSQ divides the gradient of the step by sqrt(N·n) instead). A parameter; a buffer where it is not
               learned or no candidate uses it, so that every parameter has a gradient. Candidates of 0 and 32 bits have an entry that is
               never used.
    """

    log_range: Tensor
    unused: tuple[int, ...] = (PRUNED, FLOAT)

    def __init__(
        self,
        bits: Sequence[int],
        grid: Sequence[tuple[float, float]],
        rows: int,
        device: torch.device | None,
        columns: int | None = None,
        learned: bool = True,
    ) -> None:
        super().__init__(bits)
        self.learned = learned
        self.steps = [n for n, _ in grid]
        self.zero_point = [z for _, z in grid]
        self.pass_through = [0] * len(self.bits)
        self._learn("log_range", torch.zeros(rows, len(self.bits) if columns is None else columns, device=device))

    def _learn(self, name: str, value: Tensor) -> None:
        if not self.learned or set(self.bits) <= set(self.unused):
            self.register_buffer(name, value)
        else:
            self.register_parameter(name, nn.Parameter(value))

    def learned_range(self) -> Tensor:
        """exp(log_range), float32: positive and finite whatever an optimizer did."""
        return _exp(self.log_range)

    def _candidates(
        self, x: Tensor, offset: Tensor, r: Tensor, p: Tensor, picks: Sequence[int], groups: Sequence[int] | None
    ) -> Candidates:
        """The candidates `picks` with offset, r [1 or C, K] and p [K] or [1 or C, K]."""
        p = p if p.dim() == 2 else p.unsqueeze(0)
        rows, dtype = max(r.size(0), p.size(0)), torch.float64 if x.dtype == torch.float64 else torch.float32
        # a view that changes nothing would still be a node of autograd
        offset, r, p = (t if t.size(0) == rows else t.expand(rows, -1) for t in (t.to(dtype) for t in (offset, r, p)))
        steps, zero_point = ([values[k] for k in picks] for values in (self.steps, self.zero_point))
        through, group = [self.pass_through[k] for k in picks], [0] * len(picks) if groups is None else list(groups)
        return Candidates(offset, r, p, steps, zero_point, group, through)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A float network's state_dict knows nothing of quantizers: they are not reported as missing (the layer starts them anew).
        if f"{prefix}log_range" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.log_range.size(0)}"


class CalibratedQuantizer(RangeQuantizer):
    """Quantizers whose ranges start from data.

    calibrated  bool: no batch is needed any more. The buffer `started` holds the same for state_dict
    """

    started: Tensor

    def _add_flag(self, device: torch.device | None) -> None:
        self.calibrated = not self.searched
        self.register_buffer("started", torch.full((), float(self.calibrated), device=device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}started" in state_dict:
            self.calibrated = not self.searched or bool(state_dict[f"{prefix}started"])

    def _mark_calibrated(self) -> None:
        self.calibrated = True
        self.started.fill_(1)

    def restart(self) -> None:
        """Calibrate again on the next training batch."""
        self.calibrated = not self.searched
        self.started.fill_(self.calibrated)


def learned_ranges(quantizers: Sequence[RangeQuantizer]) -> list[Tensor]:
    """`learned_range` of many quantizers, in a few operations for all of the same K and device."""
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for i, quantizer in enumerate(quantizers):
        alike.setdefault((len(quantizer.bits), quantizer.log_range.device), []).append(i)
    found: dict[int, Tensor] = {}
    for picks in alike.values():
        rows = [quantizers[i].log_range for i in picks]
        together = _exp(torch.cat(rows))
        found.update(zip(picks, together.split([t.size(0) for t in rows]), strict=True))
    return [found[i] for i in range(len(quantizers))]


def spread(r: Tensor, picks: Sequence[int]) -> Tensor:
    """Columns `picks` of r [rows, K], with gradients that are summed in a fixed order."""
    k = r.size(1)
    each = len(picks) // k
    if list(picks) == [i for i in range(k) for _ in range(each)]:
        return r if each == 1 else r.unsqueeze(2).expand(-1, -1, each).flatten(1)
    return torch.cat([r[:, i : i + 1] for i in picks], dim=1)


def sample_values(x: Tensor) -> Tensor:
    """At most 65,536 values of x, float32. They are spread over all positions: a fixed stride could meet one image column only."""
    flat = x.detach().reshape(-1)
    if flat.numel() > _SAMPLE:
        flat = flat[torch.arange(_SAMPLE, device=flat.device) * _STRIDE % flat.numel()]
    return flat.float()
