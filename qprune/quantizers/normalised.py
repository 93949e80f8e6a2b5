"""Quantizers of normalised weights: Liu et al., "Single-path Bit Sharing" (2101.04935)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qprune.grids import weight_grid
from qprune.quantizers.base import TINY, Candidates
from qprune.quantizers.nested import middle_range, positive, residual_means
from qprune.quantizers.staging import StagedQuantizer
from qprune.space import PRUNED


class NormalisedWeightQuantizer(StagedQuantizer):
    """Quantizers of a weight that is normalised over the whole layer, with one clip for all candidates and filters:

        ŵ = (w − μ) / σ,    z = (clamp(ŵ / v, −1, 1) + 1) / 2,    Q_k(w) = σ v (2 D_k(z) − 1),    D_k with 2^b − 1 steps

    μ and σ are constants of a step, as in the paper, and taken over the weights that are kept. Reconstruction: σ is unbiased. v is learned,
    as a logarithm. Gradients: straight through inside the clip. The levels are those of "dorefa" weights: none is zero.

    Ours: the factor σ. Behind a normalisation only its running statistics see it; without one the layer keeps its scale.

    widths the candidates that are not 0 bits
    bits   of the candidates, 0 (pruned) among them where filters have that choice
    start  of v; None: the clip of least squared error of a normal distribution, for the middle candidate
    """

    def __init__(self, bits: Sequence[int], start: float | None = 1.0, device: torch.device | None = None) -> None:
        super().__init__(bits)
        self.widths = [b for b in self.bits if b != PRUNED]
        self.steps, self.zero_point = ([weight_grid("dorefa", b)[i] for b in self.bits] for i in range(2))
        self.pass_through = [0] * len(self.bits)
        self.levels = [n for n in self.steps if n > 0]
        clip = middle_range(self.levels, [n / 2 for n in self.levels]) / 2 if start is None else start
        self.log_clip = nn.Parameter(torch.full((1, 1), math.log(clip), device=device))
        self.register_buffer("deviation", torch.ones(1, 1, device=device), persistent=False)
        self._add_seed(device)

    deviation: Tensor

    @property
    def active_stage(self) -> str:
        """Neither quantized nor noisy nor float as it is: nobody but the layer mixes this weight."""
        return "normalised"

    @property
    def log_range(self) -> Tensor:
        """log(2 v σ) [1, K], σ of the last call: the range of the same quantizers of w − μ."""
        return (self.log_clip.float() + (2 * self.deviation).log()).expand(-1, len(self.bits))

    def centred(self, weight: Tensor, kept: Tensor | None = None) -> Tensor:
        """w − μ; remembers σ. kept: 0 or 1 for every weight, broadcasting; None: all are kept."""
        with torch.no_grad():
            w = weight.double() if weight.dtype == torch.float64 else weight.float()
            if kept is None:
                variance, mean = torch.var_mean(w, correction=min(1, w.numel() - 1))
            else:
                share = kept.to(w.dtype).expand_as(w)
                count = share.sum().clamp_min(1)
                mean = (w * share).sum() / count
                variance = ((w - mean).square() * share).sum() / (count - 1).clamp_min(1)
            deviation = variance.sqrt().clamp_min(TINY)
            self.deviation = deviation.reshape(1, 1)
        return weight - mean.to(weight.dtype)

    def candidates(self, centred: Tensor, p: Tensor) -> Candidates:
        """The candidates that quantize w − μ, with p [K] over those that are not 0 bits."""
        r = (2 * positive(self.log_clip) * self.deviation).expand(-1, len(self.widths))
        dtype = torch.float64 if centred.dtype == torch.float64 else torch.float32
        zero = torch.zeros(1, 1, dtype=dtype, device=centred.device).expand_as(r)
        none = [0] * len(self.levels)
        return Candidates(zero, r.to(dtype), p.to(dtype).unsqueeze(0), self.levels, [n / 2 for n in self.levels], none, none)

    def residual_means(self, centred: Tensor) -> Tensor:
        """The mean of |z − z_k| for every candidate but the last."""
        r = 2 * positive(self.log_clip.detach()) * self.deviation
        return residual_means(centred.detach(), torch.zeros_like(r), r, self.levels[:-1], 0.5, 0)

    def forward(self, weight: Tensor, p: Tensor, kept: Tensor | None = None) -> Tensor:
        """Σ_k p_k Q_k(weight) for weight [F, C, …] and p [K]."""
        centred = self.centred(weight, kept)
        return self.candidates(centred, p).mix(centred, axis=0)
