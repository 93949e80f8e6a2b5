"""Gates that compare a statistic with a learned threshold: Liu et al., "Single-path Bit Sharing" (2101.04935), section 3.2.

    g = 1[A > α]        backward: as σ(A − α), so dg/dα = −σ'(A − α) and dg/dA = σ'(A − α)

A bit gate per candidate asks whether the residual that the narrower one leaves is large, a filter gate per group of filters whether its
weights are. With them open or closed the layer is a mixture of its candidates: p_0 = 1 − f, p_1 = f (1 − g_2), p_2 = f g_2 (1 − g_3), …,
p_K = f g_2 … g_K, the first for 0 bits. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qprune.ranks import mean_over_ranks


def opened(statistic: Tensor, threshold: Tensor) -> Tensor:
    """1[statistic > threshold] in the dtype of the statistic, with the gradient of the sigmoid of their difference to both."""
    margin = statistic - threshold.to(statistic.dtype)
    hard, soft = (margin > 0).to(margin.dtype), margin.sigmoid()
    return hard + (soft - soft.detach())


def nested_mixture(gates: Tensor) -> Tensor:
    """p [K] of gates g_2 … g_K [K − 1]: p_k = g_2 … g_k (1 − g_{k+1})."""
    one = torch.ones_like(gates[:1])
    reached = torch.cat([one, *(gates[: k + 1].prod(0, keepdim=True) for k in range(gates.size(0)))])
    return reached * (1 - torch.cat([gates, torch.zeros_like(one)]))


class BitGate(nn.Module):
    """The gates of K nested candidates of one tensor, K − 1 thresholds: 0 at the start, so that all are open.

    errors   buffer [K − 1]: the mean residual that candidate k leaves, as `observe` got it last; 1, above all that can occur, before that
    forward  p [K], float32, one-hot

    mode     "fixed": `qprune.gates.probabilities` calls it, as a Constant
    teller   is told what `observe` is given, in place of errors; None: nobody

    A_j is the residual of the candidate that the gates before j have reached: the residual of the gated output. The gates in it count as
    constants (ours). Under straight-through rounding dA_j/dz is 1 − 1 = 0, so no gradient reaches weights or clips through it.
    """

    thresholds: nn.Parameter
    errors: Tensor
    mode = "fixed"
    teller: Callable[[Tensor], None] | None = None

    def __init__(self, candidates: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.thresholds = nn.Parameter(torch.zeros(candidates - 1, device=device))
        self.register_buffer("errors", torch.ones(candidates - 1, device=device))
        self.held = False

    @torch.no_grad()
    def observe(self, errors: Tensor, share: bool = True) -> None:
        """Take over new residuals [K − 1] (see `residual_means`), those that are finite; nothing if the gate is held. share: average them
        over the ranks."""
        if self.teller is not None:
            self.teller(errors)
        elif not self.held:
            errors = (mean_over_ranks(errors) if share else errors).to(self.errors.dtype)
            self.errors.copy_(torch.where(errors.isfinite(), errors, self.errors))

    def statistic(self) -> Tensor:
        """A [K − 1]."""
        errors, thresholds = self.errors.unbind(), self.thresholds.detach().unbind()
        found, open_so_far = [errors[0]], torch.ones_like(errors[0], dtype=torch.bool)
        for error, threshold in zip(errors[1:], thresholds[:-1], strict=True):
            open_so_far = open_so_far & (found[-1] > threshold)
            found.append(torch.where(open_so_far, error, found[-1]))
        return torch.stack(found)

    def forward(self) -> Tensor:
        return nested_mixture(opened(self.statistic(), self.thresholds))

    def distribution(self) -> Tensor:
        """What the costs expect: p."""
        return self()  # type: ignore[no-any-return]

    def margins(self) -> Tensor:
        """Residual of every candidate but the last, minus the threshold of the next, [K − 1]: whatever the gates before say."""
        return self.errors - self.thresholds.detach()

    def extra_repr(self) -> str:
        return f"candidates={len(self.thresholds) + 1}"


class PruningGate(nn.Module):
    """One gate per group of filters, with one threshold for all of them, or one each.

    filters   split by index into ⌊filters / group_size⌋ groups; what remains belongs to the last
    closable  the most groups that `clamp` lets close
    forward   f [filters] from a weight [filters, …]: open where the group's mean |w| / max |w| is above the threshold. Differentiable in
              the weight too
    """

    thresholds: nn.Parameter
    members: Tensor
    held: Tensor

    def __init__(
        self, filters: int, group_size: int = 4, closable: float = 0.5, per_group: bool = False, device: torch.device | None = None
    ) -> None:
        super().__init__()
        groups = max(filters // group_size, 1)
        index = (torch.arange(filters, device=device) // group_size).clamp_max(groups - 1)
        self.closable = min(max(1, int(filters * closable / group_size)), groups - 1)
        self.thresholds = nn.Parameter(torch.zeros(groups if per_group else 1, device=device))
        self.register_buffer("members", nn.functional.one_hot(index, groups).float(), persistent=False)
        self.register_buffer("held", torch.full((groups,), -1.0, device=device))

    def importance(self, weight: Tensor) -> Tensor:
        """The mean of |w| / max |w| of every group [groups], in [0, 1]."""
        magnitude = weight.float().abs().flatten(1)
        means = (magnitude / magnitude.amax().clamp_min(torch.finfo(torch.float32).tiny)).mean(1)
        return (means.unsqueeze(1) * self.members).sum(0) / self.members.sum(0)  # a matrix product would follow autocast

    def forward(self, weight: Tensor) -> Tensor:
        live = opened(self.importance(weight), self.thresholds)
        return (self.members * torch.where(self.held >= 0, self.held, live)).sum(1)

    def margins(self, weight: Tensor) -> Tensor:
        """Importance minus threshold, per group."""
        return (self.importance(weight) - self.thresholds).detach()

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """From now on the gates stay as they are."""
        self.held.copy_((self.margins(weight) > 0).float())

    @torch.no_grad()
    def clamp(self, weight: Tensor) -> None:
        """Keep the thresholds between 0 and the `closable`-th smallest importance; at 0 where no group may close."""
        if self.closable == 0:
            self.thresholds.zero_()
            return
        bound = self.importance(weight).kthvalue(self.closable).values
        self.thresholds.copy_(torch.minimum(self.thresholds.clamp_min(0), bound))

    def extra_repr(self) -> str:
        return f"filters={self.members.size(0)}, groups={self.members.size(1)}, closable={self.closable}"
