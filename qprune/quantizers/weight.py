"""Quantizers of weights: grids with learned ranges, per filter or per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qprune.grids import gaussian_range, weight_grid
from qprune.quantizers.base import TINY, Candidates, Quantizer, spread
from qprune.space import FLOAT, PRUNED


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
        mean = magnitude.flatten(1).mean(1) if r.size(0) > 1 else magnitude.mean().reshape(1)
        binary = (2 * mean).clamp_min(TINY).unsqueeze(1)
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
