"""Integer weight codes and the convolution on integer codes in plain PyTorch: the definition, and the fallback on any device.

Sums of codes are taken in float64, where they are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fits(steps: float, zero_point: float) -> bool:
    """Whether the weight codes of a candidate (n, z) are integers of 8 bits. A candidate of 0 steps is; full precision is not."""
    if steps < 0:
        return False
    doubled = 1 if zero_point % 1 == 0 else 2
    return doubled * zero_point <= 128 and doubled * (steps - zero_point) <= 127


def weight_codes(weight: Tensor, range: Tensor, steps: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of a weight that is quantized with one candidate per filter, without offset.

    weight                    [F, C/g, kh, kw], any float dtype
    range, steps, zero_point  [F] float32; every (n, z) such that `fits`

    Returns codes [F, C/g, kh, kw] int8 (channels_last in memory), total [F] int32 (the sums of codes), scale [F] float32. scale · codes is
    what `reference.mix_quantize` gives for the same candidates. Codes are q − z with scale d, or 2q − 2z with scale d/2 for a half-integer
    z. Filters of 0 steps have codes and scale 0. A filter with a NaN has scale NaN, since codes cannot say so.
    """
    column = (-1, *[1] * (weight.dim() - 1))
    n, z = torch.where(steps > 0, steps, 1.0), zero_point.to(torch.float32)
    doubled = 1.0 + (z % 1 != 0)
    u = weight.to(torch.float32) * (1.0 / range).view(column) + (z / n).view(column)
    q = torch.round(u.clamp(0, 1) * n.view(column))
    codes = ((q - z.view(column)) * torch.where(steps > 0, doubled, 0.0).view(column)).to(torch.int8)
    codes = codes.contiguous(memory_format=torch.channels_last)
    scale = torch.where(steps > 0, range / n / doubled, 0.0).masked_fill(weight.isnan().flatten(1).any(1), torch.nan)
    return codes, codes.flatten(1).sum(1, dtype=torch.int32), scale


def input_levels(x: Tensor, offset: Tensor, range: Tensor, steps: float) -> Tensor:
    """x / d rounded and clipped to the grid that starts at β: integers q + β/d as floats. NaN becomes the lowest level."""
    u = (x - offset) * (1.0 / range)
    q = torch.round(u.nan_to_num(0.0, torch.inf, -torch.inf).clamp(0, 1) * steps)
    return q + torch.round(offset / (range / steps))


def quant_conv2d_int8(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    range: Tensor,
    steps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """d_a·d_f·Σ (integer codes) + bias: float32 (float64 for float64 x). Arguments as in `int8_ops`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    offset, range, scale = offset.to(dtype), range.to(dtype), scale.to(dtype)
    levels = input_levels(x.to(dtype), offset, range, steps)
    total = F.conv2d(levels.double(), codes.double(), None, tuple(stride), tuple(padding), tuple(dilation), groups)
    y = total.to(dtype) * (range / steps * scale).view(1, -1, 1, 1)
    return y if bias is None else y + bias.to(dtype).view(1, -1, 1, 1)
