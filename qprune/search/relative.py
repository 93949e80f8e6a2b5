"""The loss of a configuration relative to a homogeneous network of the same cost: Method IV of Zur et al. (1904.09872)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_SHARE = 0.1


def interpolate(cost: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """The piecewise-linear function through (knots [R], values [R]) at cost [...], float64. Below the first knot the first segment goes on.

    Ours: above the last knot (a shortcut can make a configuration dearer than the full network) it stays at the last value, knots of equal
    cost count as one, with the smallest value, and nothing falls below a tenth of the smallest value, so that it can be divided by. A
    single knot gives a constant.
    """
    knots, values, cost = knots.double(), values.double(), cost.double()
    x, place = knots.unique(return_inverse=True)
    y = torch.full_like(x, torch.inf).scatter_reduce(0, place, values, "amin")
    if len(x) == 1:
        return y.expand_as(cost).clone()
    i = torch.searchsorted(x, cost.contiguous()).clamp(1, len(x) - 1)
    slope = (y[i] - y[i - 1]) / (x[i] - x[i - 1])
    at = y[i - 1] + slope * (cost.clamp_max(float(x[-1])) - x[i - 1])
    return at.clamp_min(_LEAST_SHARE * float(y.min()))


def relative_loss(loss: Tensor, cost: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """LeakyReLU_0.1(x) + 0.1 with x = (loss − E) / E, E = interpolate(cost, knots, values): how much worse a configuration is than a
    homogeneous network of its cost. Better ones count a tenth.

    knots, values  cost and loss of the homogeneous networks, on the same data as `loss` (the original compared the loss on test images
                   with theirs on training images)
    """
    expected = interpolate(cost, knots, values)
    return F.leaky_relu((loss.double() - expected) / expected, 0.1) + 0.1
