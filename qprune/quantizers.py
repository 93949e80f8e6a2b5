"""Parameters → candidate quantizers (offset β, range r, steps n, zero point z), and their starting values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.grids import gaussian_range, input_grid, negative_share, weight_grid
from qprune.kernels import mix_quantize
from qprune.space import FLOAT, PRUNED

_TINY = 1e-8
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

    def mix(self, x: Tensor, axis: int) -> Tensor:
        """Σ_k p_k Q_k(x), the sums of several groups side by side along dimension 1."""
        return mix_quantize(x, *self[:5], axis, *self[5:], None)


class Quantizer(nn.Module):
    """K candidate quantizers with learned ranges, and their weighted sum as one fused pass.

    log_range  [rows, K], the logarithm of r in the unit of the tensor: r stays positive, and its gradient is scale-free (LSQ divides the
               gradient of the step by sqrt(N·n) instead). A parameter; a buffer where no candidate uses it, so that every parameter has a
               gradient. Candidates of 0 and 32 bits have an entry that is never used.
    """

    log_range: Tensor
    unused: tuple[int, ...] = (PRUNED, FLOAT)

    def __init__(self, bits: Sequence[int], grid: Sequence[tuple[float, float]], rows: int, device: torch.device | None) -> None:
        super().__init__()
        self.bits = tuple(bits)
        self.steps = [n for n, _ in grid]
        self.zero_point = [z for _, z in grid]
        self.pass_through = [0] * len(self.bits)
        self._learn("log_range", torch.zeros(rows, len(self.bits), device=device))

    def _learn(self, name: str, value: Tensor) -> None:
        if set(self.bits) <= set(self.unused):
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

    @property
    def searched(self) -> list[int]:
        """The candidates that do quantize."""
        return [k for k, b in enumerate(self.bits) if b not in (PRUNED, FLOAT)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A float network's state_dict knows nothing of quantizers: they are not reported as missing (the layer starts them anew).
        if f"{prefix}log_range" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, rows={self.log_range.size(0)}"


def learned_ranges(quantizers: Sequence[Quantizer]) -> list[Tensor]:
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


class WeightQuantizer(Quantizer):
    """Signed quantizers of a weight [F, …] along dimension 0: "lsq", "symmetric" or "dorefa" grids (see SearchSpace).

    One bit is sign(w) · mean|w| (1603.05279), its range taken from the weight at every call, with the gradient passed through.
    """

    unused = (PRUNED, 1, FLOAT)

    def __init__(self, kind: str, bits: Sequence[int], rows: int, device: torch.device | None = None) -> None:
        super().__init__(bits, [weight_grid(kind, b) for b in bits], rows, device)
        self.kind = kind
        self.pass_through = [int(b == 1) for b in bits]

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Ranges that minimise the squared error of a Gaussian with the rows' root mean square."""
        w = weight.detach().float().reshape(self.log_range.size(0), -1)
        if w.numel() == 0:
            return
        rms = w.square().mean(1).sqrt()
        fallback = torch.full_like(rms, _TINY) if self.kind == "dorefa" else rms.square().mean().sqrt().expand_as(rms)
        fallback = torch.where(fallback > 0, fallback, 1.0)
        rms = torch.where(rms > 0, rms, fallback)
        for k in self.searched:
            self.log_range[:, k] = (rms * gaussian_range(self.steps[k], self.zero_point[k])).log()

    def ranges(self, weight: Tensor, learned: Tensor | None = None) -> Tensor:
        """r [rows, K]; learned: what `learned_range` gives, if it is known already."""
        r = self.learned_range() if learned is None else learned
        if 1 not in self.bits:
            return r
        magnitude = weight.detach().float().abs()
        mean = magnitude.flatten(1).mean(1) if r.size(0) > 1 else magnitude.mean().reshape(1)
        binary = (2 * mean).clamp_min(_TINY).unsqueeze(1)
        return torch.cat([binary if b == 1 else r[:, k : k + 1] for k, b in enumerate(self.bits)], dim=1)

    def candidates(self, weight: Tensor, p: Tensor, picks: Sequence[int] | None = None, groups: Sequence[int] | None = None) -> Candidates:
        """The candidates with p [K] or [F, K] for weight [F, C, …]; picks and groups as in `forward`."""
        picks = range(len(self.bits)) if picks is None else picks
        r = spread(self.ranges(weight), picks)
        return self._candidates(weight, torch.zeros_like(r), r, p, picks, groups)

    def forward(self, weight: Tensor, p: Tensor, picks: Sequence[int] | None = None, groups: Sequence[int] | None = None) -> Tensor:
        """Σ_k p_k Q_k(weight). weight [F, C, …], p [K] or [F, K].

        With joint candidates, picks[i] is the weight candidate of pair i and groups[i] the number of its activation quantizer; p has one
        column per pair, and the result is [F, M·C, …].
        """
        return self.candidates(weight, p, picks, groups).mix(weight, axis=0)


class InputQuantizer(Quantizer):
    """Quantizers of an activation, per tensor: "pact" (clip learned) or "lsq+" (clip and offset learned).

    Whether the input can be negative is a buffer, not structure: a signed input has the two's-complement grid, expressed by a negative
    offset. It is found, with starting ranges, by `calibrate`, or by the first training batch.

    calibrated  bool: no batch is needed any more. The buffer `started` holds the same for state_dict
    """

    signed: Tensor
    started: Tensor
    offset: Tensor
    negative_share: Tensor

    def __init__(self, kind: str, bits: Sequence[int], device: torch.device | None = None) -> None:
        super().__init__(bits, [input_grid(b) for b in bits], 1, device)
        self.kind = kind
        self.register_buffer("signed", torch.zeros((), device=device))
        below = [[negative_share(b) for b in bits]]
        self.register_buffer("negative_share", torch.tensor(below, device=device), persistent=False)
        if kind == "lsq+":
            self._learn("offset", torch.zeros(1, len(self.bits), device=device))
        self.calibrated = not self.searched
        self.register_buffer("started", torch.full((), float(self.calibrated), device=device))
        self._default_ranges()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}started" in state_dict:
            self.calibrated = not self.searched or bool(state_dict[f"{prefix}started"])

    def restart(self) -> None:
        """Calibrate again on the next training batch."""
        self.calibrated = not self.searched
        self.started.fill_(self.calibrated)

    @torch.no_grad()
    def _default_ranges(self) -> None:
        """Ranges for an input of unit variance, until something better is known."""
        for k in self.searched:
            self.log_range[:, k] = math.log(gaussian_range(self.steps[k], 0.0) if self.steps[k] > 1 else 1.0)

    def offsets(self, r: Tensor) -> Tensor:
        """β [1, K] for ranges r [1, K]."""
        if self.kind == "lsq+":
            return self.offset
        return r * (-self.signed * self.negative_share)

    @torch.no_grad()
    def observe_sign(self, x: Tensor) -> None:
        """Remember if x has negative values."""
        if x.numel():
            self.signed.copy_(torch.maximum(self.signed, (x.detach().amin() < 0).to(self.signed.dtype)))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the sign and the ranges (and offsets) that minimise the squared error on x, on at most 65,536 of its values; no host sync.

        In a distributed job all ranks agree on the mean. Where x is zero everywhere, nothing can be learned and the ranges stay.
        """
        if not self.searched or not x.numel():
            return
        self.calibrated = True
        self.started.fill_(1)
        self.observe_sign(x)
        self.signed.copy_(_mean_over_ranks(self.signed) > 0)
        flat = sample_values(x)
        low, high = flat.amin(), flat.amax()
        peak = torch.where(self.signed > 0, flat.abs().amax(), high).clamp_min(_TINY)
        spread = (flat != 0).any()
        fractions = torch.linspace(0.02, 1.0, 50, device=flat.device) ** 1.5
        for k in self.searched:
            n, below = self.steps[k], negative_share(self.bits[k])
            if self.kind == "lsq+":
                r = (high.clamp_min(0) - low.clamp_max(0)).clamp_min(_TINY) * fractions
                beta = low.clamp_max(0) * fractions
            else:
                r = peak * fractions * (1 + self.signed * (1 / below - 1))
                beta = -self.signed * r * below
            best = _squared_errors(flat, beta, r, n).argmin().reshape(1)  # an index tensor: r[int] would read it back to the host
            best_range = torch.where(spread, r.index_select(0, best), self.log_range[:, k].float().exp())
            self.log_range[:, k] = _mean_over_ranks(best_range).log()
            if self.kind == "lsq+":
                self.offset[:, k] = _mean_over_ranks(beta.index_select(0, best))

    def candidates(self, x: Tensor, p: Tensor | None, learned: Tensor | None = None) -> Candidates:
        """The candidates for the input x, from which ranges are set if this is the first training batch.

        p        [K] or [C, K] for one mixture; None for all Q_k(x) on their own, K groups with p = 1
        learned  what `learned_range` gives, if it is known already
        """
        if not self.calibrated and self.training:
            self.calibrate(x)
            learned = None
        r = self.learned_range() if learned is None else learned
        k = range(len(self.bits))
        return self._candidates(x, self.offsets(r), r, torch.ones_like(r) if p is None else p, k, k if p is None else None)

    def forward(self, x: Tensor, p: Tensor | None, learned: Tensor | None = None) -> Tensor:
        """Σ_k p_k Q_k(x) for x [N, C, …] and p [K] or [C, K]; all Q_k(x) side by side along dimension 1 for p = None."""
        return self.candidates(x, p, learned).mix(x, axis=1)


def sample_values(x: Tensor) -> Tensor:
    """At most 65,536 values of x, float32. They are spread over all positions: a fixed stride could meet one image column only."""
    flat = x.detach().reshape(-1)
    if flat.numel() > _SAMPLE:
        flat = flat[torch.arange(_SAMPLE, device=flat.device) * _STRIDE % flat.numel()]
    return flat.float()


def _squared_errors(x: Tensor, beta: Tensor, r: Tensor, n: float) -> Tensor:
    """The mean squared error on the values x for every (beta, r)."""
    shifted, r = x - beta.unsqueeze(1), r.unsqueeze(1)
    q = torch.round((shifted / r).clamp(0, 1) * n)
    return (shifted - q * (r / n)).square().mean(1)


def _mean_over_ranks(value: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value
