"""Quantizers of weights: uniform grids with one range per filter or per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qprune.grids import gaussian_range, weight_grid
from qprune.kernels import IDENTITY
from qprune.quantizers.base import TINY, Candidates, RangeQuantizer, spread
from qprune.quantizers.staging import StagedQuantizer, uniform
from qprune.quantizers.uniq import UniqWeightQuantizer
from qprune.space import FLOAT, PRUNED

NICE_DEVIATIONS = 3.45
NOISY_SHARE = 0.05
_MASK_KEY = 0x5DEECE66D  # makes the seed of the mask from that of the noise


class WeightQuantizer(RangeQuantizer, StagedQuantizer):
    """Signed quantizers of a weight [F, …] along dimension 0: "lsq", "symmetric", "dorefa" or "nice" grids (see SearchSpace).

    One bit is sign(w) · mean|w| (1603.05279), its range taken from the weight at every call, with the gradient passed through.

    "nice" (1810.00162, as used by 1904.09872): the symmetric grid with one clip c = |μ| + 3.45 σ of the whole weight (σ unbiased) for all
    filters and candidates. `start` sets it and nothing moves it afterwards: log_range, the logarithm of 2c, is a buffer. The gradient
    reaches every weight, also those that are clipped. `rows` is ignored.

    Stage "noisy" of any kind: each weight, with probability 0.05, gets clip(w + u, lowest level, highest level) with u ~ U(−d/2, d/2), d
    the step of its own candidate; the others are quantized (1904.09872's program). Both draws are functions of the seed.
    """

    unused = (PRUNED, 1, FLOAT)

    def __init__(self, kind: str, bits: Sequence[int], rows: int, device: torch.device | None = None) -> None:
        nice = kind == "nice"
        super().__init__(bits, [weight_grid(kind, b) for b in bits], 1 if nice else rows, device, learned=not nice)
        self.kind = kind
        self.pass_through = [int(b == 1 or nice) for b in bits]
        self._add_seed(device)
        self._add_kept()

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Ranges that minimise the squared error of a Gaussian with the rows' root mean square; for "nice" those of its clip."""
        w = weight.detach().float().reshape(self.log_range.size(0), -1)
        if w.numel() == 0:
            return
        if self.kind == "nice":
            deviation, mean = torch.std_mean(w, correction=min(1, w.numel() - 1))
            clip = mean.abs() + NICE_DEVIATIONS * deviation
            self.log_range.copy_((2 * torch.where(clip > 0, clip, 1.0)).log())
            return
        rms = w.square().mean(1).sqrt()
        fallback = torch.full_like(rms, TINY) if self.kind == "dorefa" else rms.square().mean().sqrt().expand_as(rms)
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
        if self.kept is None:
            mean = magnitude.flatten(1).mean(1) if r.size(0) > 1 else magnitude.mean().reshape(1)
        else:
            there = self.kept.expand_as(magnitude).to(magnitude.dtype)
            total, count = (t.flatten(1).sum(1) for t in (magnitude * there, there))
            mean = total / count.clamp_min(1) if r.size(0) > 1 else (total.sum() / count.sum().clamp_min(1)).reshape(1)
        binary = (2 * mean).clamp_min(TINY).unsqueeze(1)
        return torch.cat([binary if b == 1 else r[:, k : k + 1] for k, b in enumerate(self.bits)], dim=1)

    def candidates(self, weight: Tensor, p: Tensor, picks: Sequence[int] | None = None, groups: Sequence[int] | None = None) -> Candidates:
        """The candidates with p [K] or [F, K] for weight [F, C, …]; picks and groups as in `forward`. They know of the stage "float", not
        of noise."""
        picks = range(len(self.bits)) if picks is None else picks
        r = spread(self.ranges(weight), picks)
        found = self._candidates(weight, torch.zeros_like(r), r, p, picks, groups)
        if self.active_stage != "float":
            return found
        return found._replace(steps=[n if n == 0 else IDENTITY for n in found.steps])

    def forward(self, weight: Tensor, p: Tensor, picks: Sequence[int] | None = None, groups: Sequence[int] | None = None) -> Tensor:
        """Σ_k p_k Q_k(weight). weight [F, C, …], p [K] or [F, K].

        With joint candidates, picks[i] is the weight candidate of pair i and groups[i] the number of its activation quantizer; p has one
        column per pair, and the result is [F, M·C, …].
        """
        found = self.candidates(weight, p, picks, groups)
        quantized = found.mix(weight, axis=0)
        if self.kept is not None:
            quantized = quantized * self.kept
        if self.active_stage != "noisy":
            return quantized
        noisy = found.mix(weight, axis=0, seed=self.seed)
        if self.kept is not None:
            noisy = noisy * self.kept
        chosen = uniform(self.seed ^ _MASK_KEY, weight) < NOISY_SHARE
        return torch.where(torch.cat([chosen] * (max(found.groups) + 1), dim=1), noisy, quantized)


def make_weight_quantizer(
    kind: str, bits: Sequence[int], rows: int, device: torch.device | None = None
) -> WeightQuantizer | UniqWeightQuantizer:
    """The quantizer that SearchSpace.weight_quantizer names. rows: number of ranges, for the kinds that have one per filter."""
    return UniqWeightQuantizer(bits, device) if kind == "uniq" else WeightQuantizer(kind, bits, rows, device)
