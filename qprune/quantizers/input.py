"""Quantizers of a layer's input: learned clips, and offsets, per tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qprune.grids import gaussian_range, input_grid, negative_share
from qprune.quantizers.base import TINY, CalibratedQuantizer, Candidates, sample_values
from qprune.ranks import mean_over_ranks


class InputQuantizer(CalibratedQuantizer):
    """Quantizers of an activation, per tensor: "pact" (clip learned) or "lsq+" (clip and offset learned).

    Whether the input can be negative is a buffer, not structure: a signed input has the two's-complement grid, expressed by a negative
    offset. It is found, with starting ranges, by `calibrate`, or by the first training batch.
    """

    signed: Tensor
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
        self._add_flag(device)
        self._default_ranges()

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
        self._mark_calibrated()
        self.observe_sign(x)
        self.signed.copy_(mean_over_ranks(self.signed) > 0)
        flat = sample_values(x)
        low, high = flat.amin(), flat.amax()
        peak = torch.where(self.signed > 0, flat.abs().amax(), high).clamp_min(TINY)
        spread = (flat != 0).any()
        fractions = torch.linspace(0.02, 1.0, 50, device=flat.device) ** 1.5
        for k in self.searched:
            n, below = self.steps[k], negative_share(self.bits[k])
            if self.kind == "lsq+":
                r = (high.clamp_min(0) - low.clamp_max(0)).clamp_min(TINY) * fractions
                beta = low.clamp_max(0) * fractions
            else:
                r = peak * fractions * (1 + self.signed * (1 / below - 1))
                beta = -self.signed * r * below
            best = _squared_errors(flat, beta, r, n).argmin().reshape(1)  # an index tensor: r[int] would read it back to the host
            best_range = torch.where(spread, r.index_select(0, best), self.log_range[:, k].float().exp())
            self.log_range[:, k] = mean_over_ranks(best_range).log()
            if self.kind == "lsq+":
                self.offset[:, k] = mean_over_ranks(beta.index_select(0, best))

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


def _squared_errors(x: Tensor, beta: Tensor, r: Tensor, n: float) -> Tensor:
    """The mean squared error on the values x for every (beta, r)."""
    shifted, r = x - beta.unsqueeze(1), r.unsqueeze(1)
    q = torch.round((shifted / r).clamp(0, 1) * n)
    return (shifted - q * (r / n)).square().mean(1)
