"""Quantizers of activations where they are produced: behind the normalisation and a residual addition, with bits per output filter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.grids import input_grid
from qprune.quantizers.base import CalibratedQuantizer, spread
from qprune.quantizers.staging import Staged
from qprune.quantizers.uniq import quantize_activation, straight_mixture
from qprune.ranks import mean_over_ranks
from qprune.space import FLOAT

DEVIATIONS = 5.0
_SHARE = 0.1  # of a new batch in the moving averages


class OutputQuantizer(Staged, CalibratedQuantizer):
    """Quantizers of a pre-activation x [N, C, …], rectifier included: y = Σ_k p_k A_k(x) (Zur et al., 1904.09872).

    kind    "nice" (1810.00162): y = round(min(relu(x), c) s) / s, s = (2^b − 1) / c, with the clip c = mean + 5 deviations of x, taken
            once from data and kept. Gradient to x: 1 for 0 < x ≤ c (the float32 next to c may count as c)
            "pact": the same with c learned, by dL/dc = Σ g (1[x > c] + 1[x > 0] (y − min(x, c)) / c)
            "uniq" (1804.10969): `quantize_activation` with the statistics of the batch in training mode, and with their moving average in
            eval mode (the original: with the batch's there too). Gradient to x: 1 for x ≥ 0
    bits    of each candidate, 1 … 8 or 32 (the rectifier alone); bits may repeat
    own     whether each candidate has a clip of its own; all start alike

    stage    what training mode uses: "quantized", or "clamped": min(relu(x), c) without rounding ("uniq" has no clip: relu(x)). Eval mode
             quantizes always. Not part of state_dict. Raises QPruneError for another value
    average  [3], buffer: moving averages of mean and deviation (unbiased) of x over the observed batches, momentum 0.9, from 0, and of 1,
             by which they are divided: this correction of the start is ours
    """

    average: Tensor
    stages = ("quantized", "clamped")

    def __init__(self, kind: str, bits: Sequence[int], own: bool = False, device: torch.device | None = None) -> None:
        columns = len(bits) if own else 1
        super().__init__(bits, [input_grid(b) for b in bits], 1, device, columns, learned=kind == "pact")
        self.kind, self.own = kind, own
        nn.init.constant_(self.log_range, math.log(DEVIATIONS))  # of a pre-activation of zero mean and unit deviation
        self.register_buffer("average", torch.zeros(3, device=device))
        self._add_flag(device)

    def restart(self) -> None:
        """Forget what was observed, and calibrate again on the next training batch."""
        super().restart()
        self.average.zero_()

    @torch.no_grad()
    def observe(self, x: Tensor, deviations: float = DEVIATIONS) -> None:
        """Take the pre-activations x into the averages, and set the clip to mean + deviations · deviation. No host sync.

        In a distributed job all ranks agree on the mean. Where that is not positive, the clip stays as it is.
        """
        if not self.searched or not x.numel():
            return
        self._average(x, together=True)
        self._mark_calibrated()
        mean, deviation = self.statistics()
        clip = mean + deviations * deviation
        self.log_range.copy_(torch.where(clip > 0, clip.log(), self.log_range))

    def calibrate(self, x: Tensor, deviations: float = DEVIATIONS) -> None:
        """`observe`, with nothing else observed."""
        self.restart()
        self.observe(x, deviations)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation [] of the pre-activations observed so far; 0 and 1 if there were none."""
        mean, deviation, observed = self.average.unbind()
        started = observed > 0
        return torch.where(started, mean / observed, 0.0), torch.where(started, deviation / observed, 1.0)

    @torch.no_grad()
    def _average(self, x: Tensor, together: bool) -> tuple[Tensor, Tensor]:
        """The mean and deviation of x, which enter the averages."""
        deviation, mean = torch.std_mean(x.detach().float(), correction=min(1, x.numel() - 1))
        seen = torch.stack([mean, deviation, torch.ones_like(mean)])
        self.average.lerp_(mean_over_ranks(seen) if together else seen, _SHARE)
        return mean, deviation

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        """Σ_k p_k A_k(x) for x [N, C, …] and p [C, K] or [K], whose rows sum to 1."""
        return self._mix(x, p, range(len(self.bits)))

    def candidate(self, x: Tensor, k: int) -> Tensor:
        """A_k(x) for x [N, C, …]."""
        return self._mix(x, torch.ones(1, device=x.device), [k])

    def _mix(self, x: Tensor, p: Tensor, picks: Sequence[int]) -> Tensor:
        if self.kind != "uniq" and not self.calibrated and self.training:
            self.calibrate(x)
        clamped = self.training and self._stage == "clamped"
        if self.kind == "uniq":
            return self._quantiles(x, p, picks, clamped)
        if clamped:
            return self._clamped(x, p, picks)
        if (torch.is_grad_enabled() and x.requires_grad) or any(self.bits[k] == FLOAT for k in picks):
            # without it the quantizers clip at zero as well, but x = 0 gets a gradient
            x = F.relu(x)
        r = self.learned_range()
        r = spread(r, picks) if self.own else r.expand(-1, len(picks))
        return self._candidates(x, r.new_zeros(1, 1).expand_as(r), r, p, picks, None).mix(x, axis=1)

    def _clamped(self, x: Tensor, p: Tensor, picks: Sequence[int]) -> Tensor:
        rectified, clips = F.relu(x), self.learned_range().flatten().to(x.dtype)
        shares: dict[int | None, list[Tensor]] = {}
        for share, k in zip(p.unbind(-1), picks, strict=True):
            shares.setdefault(None if self.bits[k] == FLOAT else k if self.own else 0, []).append(share)
        # not relu(x) - relu(x - c): that is not c above c
        parts = {i: rectified if i is None else torch.where(x > clips[i], clips[i], rectified) for i in shares}
        if len(parts) == 1:
            return parts.popitem()[1]
        shape = [1, -1, *[1] * (x.dim() - 2)] if p.dim() == 2 else [1] * x.dim()
        return sum((torch.stack(shares[i]).sum(0).view(shape).to(x.dtype) * part for i, part in parts.items()), torch.zeros_like(x))

    def _quantiles(self, x: Tensor, p: Tensor, picks: Sequence[int], clamped: bool) -> Tensor:
        if self.training and x.numel():
            mean, deviation = self._average(x, together=False)
            if not self.calibrated:
                self._mark_calibrated()
        else:
            mean, deviation = self.statistics()
        rectified = torch.where(x < 0, 0.0, x)  # the gradient of x = 0 is 1
        if clamped:
            return rectified
        values = x.detach() if x.dtype == torch.float64 else x.detach().float()
        mixed = [values.relu() if self.bits[k] == FLOAT else quantize_activation(values, mean, deviation, self.bits[k]) for k in picks]
        return straight_mixture(rectified, mixed, p, axis=1)
