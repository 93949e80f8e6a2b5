"""Evaluation on integer codes: QuantConv2d layers with at most 8 bits convolve in int8 where gradients are off.

The result is that of the float path up to rounding. Codes and scales of a layer are made once and kept until one of the tensors that they
come from is changed or the layer changes between train() and eval().
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from qprune.convolution import window_of
from qprune.kernels import quant_conv2d_int8
from qprune.kernels.launch_int8 import MAX_SUM
from qprune.kernels.reference_int8 import fits, weight_codes
from qprune.nn.quantizing import Quantizing
from qprune.quantizers import StoredWeightQuantizer, WeightQuantizer

_VECTOR = 16  # channels that a load moves at once; the kernels take other numbers too, one by one
_on = False


class enabled:
    """Let eligible layers evaluate on integer codes: `with enabled(): …`, or `enabled()` and `enabled(False)` as calls. Off by default.

    Eligible is a QuantConv2d in eval mode, outside of autograd and compilation, with 2 to 8 bits for the input ("pact"), weight codes that
    fit 8 bits (not 8-bit "dorefa"), zero padding, and a multiple of 16 input channels per group. A NaN in the input counts as its lowest
    level: codes cannot carry it. The kernels are for CUDA; on other devices the reference runs, in float64.
    """

    def __init__(self, on: bool = True) -> None:
        global _on
        self.previous = _on
        _on = on

    def __enter__(self) -> enabled:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _on
        _on = self.previous


@dataclass(frozen=True)
class _Codes:
    """The operands of a layer, with the tensors that they were made of and how these looked then."""

    sources: tuple[Tensor, ...]
    versions: tuple[tuple[int, int], ...]
    weight: tuple[Tensor, Tensor, Tensor]
    offset: Tensor
    range: Tensor


_kept: weakref.WeakKeyDictionary[nn.Module, _Codes] = weakref.WeakKeyDictionary()


def forget(layer: nn.Module) -> None:
    """Make the codes of a layer anew at its next evaluation. Needed by hand only after a change through `.data`, which PyTorch does not
    count, in a layer that stays in eval mode."""
    _kept.pop(layer, None)


def _wanted(x: Tensor) -> bool:
    if not _on or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return type(x) is Tensor and x.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _expressible(layer: Quantizing) -> bool:
    channels, w, a = layer.weight.size(1), layer.weight_quantizer, layer.input_quantizer
    return (
        isinstance(w, WeightQuantizer)
        and w.kept is None
        and 2 <= layer.a_bits <= 8
        and a.kind == "pact"
        and channels % _VECTOR == 0
        and layer.weight[0].numel() <= MAX_SUM
        and layer.weight.dtype != torch.float64
        and all(fits(n, z) for n, z in zip(w.steps, w.zero_point, strict=True))
    )


def _make(layer: Quantizing, sources: tuple[Tensor, ...], versions: tuple[tuple[int, int], ...]) -> _Codes:
    w, a = layer.weight_quantizer, layer.input_quantizer
    assert isinstance(w, WeightQuantizer)
    chosen = layer.one_hot.unbind(1)
    # sums over the candidates with Python numbers as factors: nothing is copied to the device
    steps = torch.stack([p * n for p, n in zip(chosen, w.steps, strict=True)]).sum(0)
    zero_point = torch.stack([p * z for p, z in zip(chosen, w.zero_point, strict=True)]).sum(0)
    w_range = (w.ranges(layer.weight) * layer.one_hot).sum(1)
    a_range = a.learned_range()
    codes = weight_codes(layer.weight, w_range, steps, zero_point)
    return _Codes(sources, versions, codes, a.offsets(a_range).flatten().float(), a_range.flatten())


def _codes(layer: Quantizing) -> _Codes:
    w, a = layer.weight_quantizer, layer.input_quantizer
    assert isinstance(w, WeightQuantizer)
    sources = (layer.weight, layer.one_hot, w.scale if isinstance(w, StoredWeightQuantizer) else w.log_range, a.log_range, a.signed)
    capturing = layer.weight.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or any(t.is_inference() for t in sources):
        # a captured graph shall follow the weights, and PyTorch does not count the changes of inference tensors
        return _make(layer, sources, ())
    versions = tuple((t.data_ptr(), t._version) for t in sources)
    kept = _kept.get(layer)
    if kept is None or kept.versions != versions or any(s is not t for s, t in zip(kept.sources, sources, strict=True)):
        kept = _kept[layer] = _make(layer, sources, versions)
    return kept


def conv2d(layer: Quantizing, x: Tensor) -> Tensor | None:
    """The layer's output for x [N, C, H, W] on integer codes, or None where the float path has to be taken."""
    assert isinstance(layer, nn.Conv2d)
    if layer.training or not _wanted(x) or not _expressible(layer):
        return None
    window = window_of(layer)
    if window is None:
        return None
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    c = _codes(layer)
    return quant_conv2d_int8(
        x, *c.weight, layer.bias, c.offset, c.range, layer.input_quantizer.steps[0],
        window.stride, window.padding, window.dilation, window.groups, dtype,
    )  # fmt: skip
