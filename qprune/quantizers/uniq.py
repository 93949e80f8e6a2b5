"""UNIQ (1804.10969): quantizers whose cells are equally likely for a Gaussian with the tensor's own mean and deviation.

With Φ the distribution function of N(mean, deviation²), a tensor is carried to (0, 1) by Φ, quantized there to the centres of equal cells,
and carried back. Constants (least deviation, edges of the noise, the stretch of activations) are those that Zur et al. (1904.09872) used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from qprune.quantizers.staging import StagedQuantizer, uniform
from qprune.space import FLOAT, PRUNED

LEAST_DEVIATION = 1e-5
NOISE_EDGE = 1e-5
STRETCH = 3.0


class UniqWeightQuantizer(StagedQuantizer):
    """k-quantile quantizers of a weight [F, …], k = 2^b for b in 1 … 8 (32: the weight itself; 0: zero), without anything to learn.

        Q(w) = Φ⁻¹((round(k Φ(w) − 1/2) + 1/2) / k, at least 1/(2k), at most 1 − 1/(2k))

    μ and σ (unbiased, at least 1e-5) are those of the whole weight as it is at the call. The gradient is passed straight to w, through
    neither Φ nor μ and σ. Stage "noisy": every weight gets Φ⁻¹(Φ(w) + u, at least 1e-5, at most 1 − 1e-5), u ~ U(−1/(2k), 1/(2k)).
    """

    kind = "uniq"

    def __init__(self, bits: Sequence[int], device: torch.device | None = None) -> None:
        super().__init__(bits)
        self._add_seed(device)
        self._add_kept()

    def start(self, weight: Tensor) -> None:
        """Nothing: the statistics are taken from the weight at every call."""

    @torch.no_grad()
    def _values(self, weight: Tensor) -> list[Tensor | None]:
        w = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
        stage = self.active_stage
        if stage == "float" or w.numel() == 0:
            return [None if bits == PRUNED else w for bits in self.bits]
        deviation, mean = self._statistics(w)
        deviation = deviation.clamp_min(LEAST_DEVIATION)
        t = ndtr((w - mean) / deviation)
        noise = uniform(self.seed, weight) - 0.5 if stage == "noisy" else None
        values: list[Tensor | None] = []
        for bits in self.bits:
            if bits in (PRUNED, FLOAT):
                values.append(w if bits == FLOAT else None)
                continue
            k = 2.0**bits
            if noise is None:
                q = (((t * k - 0.5).round() + 0.5) / k).clamp(0.5 / k, 1 - 0.5 / k)
            else:
                q = (t + noise / k).clamp(NOISE_EDGE, 1 - NOISE_EDGE)
            values.append(mean + deviation * ndtri(q))
        return values

    def forward(self, weight: Tensor, p: Tensor) -> Tensor:
        """Σ_k p_k Q_k(weight) for p [K] or [F, K]."""
        mixed = straight_mixture(weight, self._values(weight), p, axis=0)
        return mixed if self.kept is None else mixed * self.kept

    def _statistics(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Deviation (unbiased) and mean []."""
        if self.kept is None:
            return torch.std_mean(w, correction=min(1, w.numel() - 1))
        there = self.kept.expand_as(w).to(w.dtype)
        count = there.sum()
        mean = (w * there).sum() / count.clamp_min(1)
        return (((w - mean) * there).square().sum() / (count - 1).clamp_min(1)).sqrt(), mean


def straight_mixture(x: Tensor, values: Sequence[Tensor | None], p: Tensor, axis: int) -> Tensor:
    """Σ_k p_k values_k in x's dtype, p [K] or [C, K] along `axis` of x. The values are constants that x's gradient passes by; None is a
    pruned candidate, which adds nothing to either."""
    shape = [1] * x.dim()
    if p.dim() == 2:
        shape[axis] = -1
    gradient = x - x.detach()  # zero
    total = gradient * 0
    for value, share in zip(values, p.unbind(-1), strict=True):
        if value is not None:
            total = total + share.view(shape) * (gradient + value)
    return total.to(x.dtype)


@torch.no_grad()
def quantize_activation(x: Tensor, mean: Tensor, deviation: Tensor, bits: int) -> Tensor:
    """UNIQ's quantizer of a rectified activation: n = 2^b − 1 cells between Φ(0) and 1, and zero for negative x.

        m = (Φ(x) − Φ(0)) / (1 − Φ(0)),   q = (round(m n − 1/2) + 1/2) / n,   y = Φ⁻¹(q (1 − Φ(0)) + Φ(0))

    Φ has three times the deviation; its argument y is kept between 1/2^(b+1) and 1 − 1/2^(b+1). x float32 or float64; mean and deviation
    [] of the pre-activation.
    """
    n, edge = 2.0**bits - 1, 0.5 ** (bits + 1)
    deviation = (STRETCH * deviation).clamp_min(LEAST_DEVIATION)
    zero = ndtr(-mean / deviation)
    m = (ndtr((x - mean) / deviation) - zero).clamp_min(0) / (1 - zero)
    q = ((m * n - 0.5).round() + 0.5) / n * (1 - zero) + zero
    positive = mean + deviation * ndtri(q.clamp(edge, 1 - edge))
    kept = zero.clamp(edge, 1 - edge)
    # Φ⁻¹(Φ(0)) is 0 but for rounding
    negative = torch.where(kept == zero, torch.zeros_like(zero), mean + deviation * ndtri(kept))
    return torch.where(x < 0, negative, positive)
