"""What the kernels of the mixed convolution share: quantizers as scalars, a quantized tile as integer codes, and the matrix product.

A quantizer's output is A(x) = β + (q − z)·d = d·(q + center) with center = β/d − z. The products run on tiles of q, or of q + center, which
a signed or unsigned grid makes an integer or a half: at most 8 bits, exact in every dtype of the tensor cores. d goes into the weight.
"""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import dispatch
from .candidates import FULL, MAGIC

INTERPRETED = tl.constexpr(dispatch.interpreting())


@triton.jit
def inside(position, size):
    """0 ≤ position < size: as unsigned numbers, negative positions are beyond every size."""
    return position.to(tl.uint32) < size


@triton.jit
def dot(b_a, b_b, acc, PRECISION: tl.constexpr):
    """acc + a·b in float32. The interpreter multiplies the bit patterns of bfloat16, so there it gets float32."""
    if INTERPRETED:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, acc, input_precision=PRECISION)


@triton.jit
def load_quantizers(p_offset, p_range, M: tl.constexpr, STEPS: tl.constexpr, ZERO: tl.constexpr, BLOCKS: tl.constexpr = False):
    """1/r, z/n − β/r, β/d − z and d of the M quantizers, as tuples of float32 scalars: 0, 0, 0, 1 for FULL, all 0 for no steps.

    BLOCKS  blocks [1, 1] instead of scalars. Triton quantizes a tile in the registers that a product takes it from only if all that
            enters the arithmetic was loaded as a block; else it does so in the layout of the load, and sends every tile of codes through
            shared memory.
    """
    if BLOCKS:
        p_offset += tl.zeros((1, 1), tl.int32)
        p_range += tl.zeros((1, 1), tl.int32)
    inverse = ()
    shift = ()
    center = ()
    step = ()
    for m in tl.static_range(M):
        b_offset = tl.load(p_offset + m)
        b_range = tl.load(p_range + m)
        if STEPS[m] > 0:
            b_inverse = tl.div_rn(tl.full(b_range.shape, 1.0, tl.float32), b_range)
            b_step = tl.div_rn(b_range, tl.full(b_range.shape, STEPS[m], tl.float32))
            inverse += (b_inverse,)
            shift += (ZERO[m] / STEPS[m] - b_offset * b_inverse,)
            center += (tl.div_rn(b_offset, b_step) - ZERO[m],)
            step += (b_step,)
        else:
            zero = tl.zeros(b_range.shape, tl.float32)
            inverse += (zero,)
            shift += (zero,)
            center += (zero,)
            step += (tl.full(b_range.shape, 1.0 if STEPS[m] == FULL else 0.0, tl.float32),)
    return inverse, shift, center, step


@triton.jit
def largest(step, M: tl.constexpr):
    """The largest of M scalars, 1 where that is 0."""
    b_max = step[0]
    for m in tl.static_range(1, M):
        b_max = tl.where(step[m] > b_max, step[m], b_max)
    return tl.where(b_max == 0.0, 1.0, b_max)


@triton.jit
def pick(i_m, values, M: tl.constexpr):
    """values[i_m] of M scalars or constants as float32, for an i_m that is known on the device only; 0 where it is not one of 0 … M − 1."""
    found = tl.zeros(i_m.shape, tl.float32)
    for m in tl.static_range(M):
        found = tl.where(i_m == m, values[m], found)
    return found


@triton.jit
def zero_code(shift, n):
    """The code of x = 0, without its center."""
    return (tl.clamp(shift, 0.0, 1.0) * n + MAGIC) - MAGIC


@triton.jit
def codes(b_x, inverse, shift, n):
    """q of a float32 tile. n: the steps, a number, a scalar or a block."""
    return (tl.clamp(b_x * inverse + shift, 0.0, 1.0) * n + MAGIC) - MAGIC


@triton.jit
def code_tile(b_x, b_center, inverse, shift, n, NAN: tl.constexpr):
    """q + center of a float32 tile. n: the steps, a number, a scalar or a block.

    With NAN a NaN of x stays one. It reaches every sum that it takes part in, so one of several quantizers of a tile is enough.
    """
    if NAN:
        # a choice between codes and x itself would be made after the conversion to 16 bits, without packed instructions
        b_center = tl.where(b_x == b_x, b_center, b_x)
    return codes(b_x, inverse, shift, n) + b_center


def precision(dtype: torch.dtype) -> str:
    """How operands of a dtype are multiplied: float32 in TF32 where PyTorch's own convolutions would."""
    cudnn: Any = torch.backends.cudnn
    return "tf32" if dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32" else "ieee"
