"""The convolutions of a mixed layer that are more than one mixed input and one mixed weight: joint candidates, and depthwise layers.

Joint: y = Σ_m conv(A_m(x), V_m) over M activation quantizers, by one of two routes. "library": one fused pass writes [A_1(x) … A_M(x)] and
one library convolution consumes it. "fused": a kernel quantizes x while it convolves and writes no quantized copy; where every filter has
chosen one quantizer it computes each filter once. `kernels.routes` picks by shape.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune import kernels
from qprune.kernels import IDENTITY, ConvGeometry, routes
from qprune.quantizers import Candidates
from qprune.recompute import recomputing_conv2d


def window_of(conv: nn.Conv2d) -> ConvGeometry | None:
    """Stride, padding, dilation and groups, or None where the padding is not one number of zeros on both sides."""
    if conv.padding_mode != "zeros":
        return None
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    if (left, top) != (right, bottom):
        return None
    (s0, s1), (d0, d1) = conv.stride, conv.dilation
    return ConvGeometry((s0, s1), (top, left), (d0, d1), conv.groups)


def split_for_groups(separate: Tensor, m: int, groups: int) -> Tensor:
    """[A_1(x) … A_M(x)] [N, M·C, H, W] in the order that a convolution with groups expects: [group, m, channel of the group]."""
    if m == 1 or groups == 1:
        return separate
    if separate.is_contiguous(memory_format=torch.channels_last) and not separate.is_contiguous():
        return separate.movedim(1, 3).unflatten(3, (m, groups, -1)).transpose(3, 4).flatten(3, 5).movedim(3, 1)
    return separate.unflatten(1, (m, groups, -1)).transpose(1, 2).flatten(1, 3)


def library_conv2d(x: Tensor, weight: Tensor, a: Candidates, bias: Tensor | None, window: ConvGeometry, recompute: bool = False) -> Tensor:
    """The mixed input, or the M of them side by side, in one library convolution with weight [F, M·C/groups, kh, kw].

    recompute  keep x for the backward pass and mix it again there, instead of keeping the mixed input
    """
    m = max(a.groups) + 1
    if recompute and torch.is_grad_enabled() and (m == 1 or window.groups == 1):
        return recomputing_conv2d(x, weight, a, bias, window)
    mixed = split_for_groups(a.mix(x, axis=1), m, window.groups)
    return F.conv2d(mixed, weight, bias, window.stride, window.padding, window.dilation, window.groups)


def joint_conv2d(
    x: Tensor,
    weight: Tensor,
    a: Candidates,
    bias: Tensor | None,
    window: ConvGeometry,
    choice: Tensor | None,
    all_groups: bool,
    route: str | None = None,
    recompute: bool = False,
) -> Tensor:
    """Σ_m conv(A_m(x), V_m) + bias, [N, F, OH, OW].

    x, weight  [N, C, H, W], [F, M·C/groups, kh, kw] with V_1 … V_M side by side
    a          the M activation quantizers, one group each
    choice     [F] int64 if every filter has one quantizer only; all_groups: whether its weight needs a gradient in the others too
    route      "library", "fused", or None: what kernels.routes says
    recompute  on the library route, as for `library_conv2d`
    """
    m, taps = len(a.steps), weight.size(2) * weight.size(3)
    shape = routes.Shape(taps, x.size(1) // window.groups, weight.size(0) // window.groups, m, choice is not None)
    if (route or routes.joint(shape, x)) == "fused":
        y = kernels.mixed_conv2d(
            x, weight, a.offset.flatten(), a.range.flatten(), a.steps, a.zero_point, choice, all_groups,
            window.stride, window.padding, window.dilation, window.groups,
        )  # fmt: skip
        return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)
    return library_conv2d(x, weight, a, bias, window, recompute)


def mixed_already(weight: Tensor) -> Candidates:
    """The candidates of a weight [C, M, kh, kw] whose M sums are what a depthwise convolution shall use."""
    m = weight.size(1)
    one = torch.ones(1, m, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32, device=weight.device)
    return Candidates(torch.zeros_like(one), one, one, [IDENTITY] * m, [0.0] * m, list(range(m)), [0] * m)


def depthwise_conv2d(x: Tensor, weight: Tensor, a: Candidates, w: Candidates, bias: Tensor | None, window: ConvGeometry) -> Tensor:
    """Σ_m conv(X_m, V_m) + bias with one channel per group, X_m and V_m mixed from x and weight while they are convolved."""
    per_tensor = (t.flatten() for t in (a.offset, a.range, a.p))
    y = kernels.mixed_depthwise(
        x, weight, *per_tensor, a.steps, a.zero_point, a.groups, *w, window.stride, window.padding, window.dilation
    )  # fmt: skip
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)
