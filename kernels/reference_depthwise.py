"""The depthwise mixed convolution in plain PyTorch: the definition, and the fallback on any device.

    X_m = Σ_{k in m} p_a[k]·A_k(x)        V_m = Σ_{k in m} p_w[c, k]·Q_k(W[c])        y[:, c] = Σ_m conv(X_m[:, c], V_m[c])

with A_k and Q_k as in reference.py and X_m padded with zeros. This file takes the mixed tensors; `depthwise_ops` makes them with
`mix_quantize`. M = 1 is the factorised form, M = number of activation quantizers the joint one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def convolve(mixed: Sequence[Tensor], weights: Sequence[Tensor], stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """y [N, C, OH, OW] from M inputs [N, C, H, W] and M weights [C, 1, kh, kw] of one dtype."""
    parts = [torch.nn.functional.conv2d(a, w, None, stride, padding, dilation, a.size(1)) for a, w in zip(mixed, weights, strict=True)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def convolve_backward(
    grad: Tensor, mixed: Sequence[Tensor], weights: Sequence[Tensor], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the M inputs and of the M weights."""
    found = [
        torch.ops.aten.convolution_backward(
            grad, a, w, None, stride, padding, dilation, False, [0, 0], a.size(1), (True, True, False)
        )
        for a, w in zip(mixed, weights, strict=True)
    ]  # fmt: skip
    return [f[0] for f in found], [f[1] for f in found]
