"""mix_quantize of many weights in one launch: the module that `dispatch` loads for mix_quantize_many.

The addresses of the tensors are arguments of the kernel, as tuples, so a call copies nothing to the device and a CUDA graph can capture it
(after a first call, which compiles the kernel and uploads the table of tiles). A program looks up its tile, picks the addresses of its
weight, and works through its rows with the block shape that suits them; the shapes are compiled into the kernel side by side.

The backward pass is in multi_grad.py, the table in launch_multi.py.
"""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import quantize
from .candidates import FULL, aligned, code, guard, load_candidates
from .launch_multi import Network
from .multi_grad import backward_many
from .multi_table import constants, launches, load_tile, pick, wide

__all__ = ["backward_many", "forward_many"]


@triton.jit
def forward_rows(
    p_x,
    p_y,
    p_offset,
    p_range,
    p_p,
    rows,
    row,
    repeat,
    inner,
    K: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUPS: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """V_1 … V_M of `rows` rows, from the first ones at p_x and p_y on; rows row … of the parameters."""
    inner = aligned(inner, VECTOR)
    o_r = tl.arange(0, BR)[:, None]
    o_i = tl.arange(0, BI)[None, :]
    for i_r in range(0, rows, BR):
        m_r = o_r < rows - i_r
        inverse, shift, weight, scale, constant = load_candidates(p_offset, p_range, p_p, row + i_r + o_r, m_r, K, STEPS, ZERO)
        for j in range(repeat):
            run = (i_r + o_r).to(tl.int64) * repeat + j
            for i_i in range(0, inner, BI):
                mask = m_r & (o_i < inner - i_i)
                b_x = tl.load(wide(p_x, run * inner + i_i + o_i, VECTOR), mask=mask, other=0.0).to(tl.float32)
                for m in tl.static_range(M):
                    # the saturation swallows a NaN, so the sum starts from it
                    b_y = tl.where(b_x == b_x, 0.0, b_x)
                    b_constant = tl.zeros((BR, 1), tl.float32)
                    for k in tl.static_range(K):
                        if GROUPS[k] == m:
                            if STEPS[k] == FULL:
                                b_y += weight[k] * b_x
                            elif STEPS[k] != 0:
                                b_u = tl.clamp(b_x * inverse[k] + shift[k], 0.0, 1.0)
                                b_y += scale[k] * code(b_u, STEPS[k], ZERO[k], False)
                                b_constant += constant[k]
                    at_y = (run * M + m) * inner + i_i + o_i
                    tl.store(wide(p_y, at_y, VECTOR), (b_y + b_constant).to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("xs", "ys"))
def mix_quantize_many_fwd_kernel(
    xs,  # addresses of the weights, int64
    ys,  # addresses of the outputs, int64
    p_table,  # [tiles, 7] int32, see launch_multi.COLUMNS
    p_offset,  # [R, K] float32
    p_range,  # [R, K] float32
    p_p,  # [R, K] float32
    X: tl.constexpr,
    Y: tl.constexpr,
    LAYERS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUPS: tl.constexpr,
    SHAPES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_VECTOR: tl.constexpr,
):
    """Reads each x once, writes M tensors for each."""
    layer, block, first, rows, row, repeat, inner = load_tile(p_table)
    start = first * repeat * inner
    p_x = pick(xs, layer, LAYERS).to(tl.pointer_type(X)) + start
    p_y = pick(ys, layer, LAYERS).to(tl.pointer_type(Y)) + start * M
    for b in tl.static_range(SHAPES):
        if block == b:
            forward_rows(
                p_x, p_y, p_offset, p_range, p_p, rows, row, repeat, inner, K, M, STEPS, ZERO, GROUPS,
                BLOCK_ROWS[b], BLOCK_INNER[b], BLOCK_VECTOR[b],
            )  # fmt: skip


def options(warps: int, k: int) -> dict[str, Any]:
    """Triton's options. Without a bound on registers the assembler aims at one of its own, for one candidate with a spill."""
    return {"num_warps": warps, "enable_fp_fusion": True, "maxnreg": 64 if k <= 8 else None}


def forward_many(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    groups: Sequence[int],
    net: Network,
) -> None:
    """Write the M outputs of each x into its place in `outs`.

    xs, outs          dense as `net` describes them, any float dtypes
    offset, range, p  [R, K] float32, contiguous

    One launch for up to launch_multi.MOST weights whose rows lie one after the other, of equal dtypes; one for each other weight.
    """
    todo, alone = launches(net, xs, outs)
    with guard(p):
        for part in todo:
            mix_quantize_many_fwd_kernel[part.grid](
                part.addresses(xs), part.addresses(outs), part.table, offset, range, p, X=part.dtypes[0], Y=part.dtypes[1],
                **constants(part.blocks, len(part.layers), steps, zero_point, groups), **options(part.warps, len(steps)),
            )  # fmt: skip
    params = [t.split(net.rows) for t in (offset, range, p)] if alone else []
    for i in alone:
        if xs[i].numel() > 0:
            b, r, q = (t[i] for t in params)
            quantize.forward(xs[i], outs[i], b, r, q, steps, zero_point, groups, None, net.layouts[i])
