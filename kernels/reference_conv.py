"""The mixed convolution with M activation quantizers in plain PyTorch: the definition, and the fallback on any device.

    y = Σ_m conv(A_m(x), V_m)        A_m(x) = β_m + (q_m − z_m)·r_m/n_m, as in reference.py, padded with zeros

With V_m = Σ_{k in m} p_k Q_k(W) this is the sum over all pairs of candidates, since a convolution is linear in its weight. The V_m lie side
by side along the weight's input channels, as `mix_quantize` returns them. float64 inputs are computed in float64, all others in float32.
One quantized input exists at a time, and none is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input: (height, width) pairs, and the number of groups of channels."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def output_size(self, height: int, width: int, kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = zip((height, width), kernel, self.stride, self.padding, self.dilation, strict=True)
        h, w = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
        return h, w


def _inputs(
    x: Tensor, weight: Tensor, offset: Tensor, range: Tensor, steps: Sequence[float], zero_point: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, list[float], list[float]]]]:
    """For every m: A_m(x), V_m, and the candidate's β, r, p = 1, n, z."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = weight.to(dtype).chunk(len(steps), dim=1)
    for m, (n, z) in enumerate(zip(steps, zero_point, strict=True)):
        beta, r = offset[m].reshape(1, 1), range[m].reshape(1, 1)
        candidate = (beta, r, torch.ones_like(r), [n], [z])
        yield reference.mix_quantize(x, *candidate, 1, [0], None)[0], parts[m], candidate


def mixed_conv2d(
    x: Tensor, weight: Tensor, offset: Tensor, range: Tensor, steps: Sequence[float], zero_point: Sequence[float], geometry: Geometry
) -> Tensor:
    """y [N, CO, OH, OW] in float32 (float64 for float64 x).

    x              [N, C, H, W]
    weight         [CO, M·C/groups, kh, kw]: V_1 … V_M side by side along dimension 1
    offset, range  [M]: β and r of the activation quantizers; steps, zero_point: M numbers n and z
    """
    g = geometry
    out: Tensor | None = None
    for a, v, _ in _inputs(x, weight, offset, range, steps, zero_point):
        y = torch.nn.functional.conv2d(a, v, None, g.stride, g.padding, g.dilation, g.groups)
        out = y if out is None else out + y
    assert out is not None
    return out


def mixed_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    range: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mixed_conv2d` with respect to x, weight, offset and range, in float32 (float64 for float64 x).

    dA_m = convᵀ(dy, V_m)      dx = Σ_m inside_m · dA_m      dβ_m = Σ dA_m · ∂A_m/∂β      dr_m = Σ dA_m · ∂A_m/∂r
    """
    g = geometry
    dx: Tensor | None = None
    d_weight, d_offset, d_range = [], [], []
    for a, v, candidate in _inputs(x, weight, offset, range, steps, zero_point):
        shape: tuple[object, ...] = (None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, (True, True, False))
        da, dv, _ = torch.ops.aten.convolution_backward(grad.to(a.dtype), a, v, *shape)
        d_m, d_beta, d_r, _ = reference.mix_quantize_backward([da], x, *candidate, 1, [0], [0], None)
        dx = d_m if dx is None else dx + d_m
        d_weight.append(dv)
        d_offset.append(d_beta.reshape(1))
        d_range.append(d_r.reshape(1))
    assert dx is not None
    return dx, torch.cat(d_weight, 1), torch.cat(d_offset), torch.cat(d_range)


def chosen_only(d_weight: Tensor, choice: Tensor, m: int) -> Tensor:
    """d_weight [CO, M·C, kh, kw] with zeros in every group but choice[f] of filter f."""
    chosen = torch.nn.functional.one_hot(choice, m).bool().view(-1, m, 1, 1, 1)
    return torch.where(chosen, d_weight.unflatten(1, (m, -1)), 0.0).flatten(1, 2)
