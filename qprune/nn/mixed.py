"""Layers that hold several candidate bit widths: MixedConv2d, MixedLinear, MixedActivation."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qprune.convolution import depthwise_conv2d, joint_conv2d, library_conv2d, mixed_already, split_for_groups, window_of
from qprune.errors import SpaceError
from qprune.gates import make_gate
from qprune.kernels import ConvGeometry, routes
from qprune.nn.mixing import Mixing, check_input
from qprune.nn.surgery import take_over
from qprune.quantizers import InputQuantizer
from qprune.space import FLOAT, SearchSpace, split_fields


class MixedConv2d(Mixing, nn.Conv2d):
    """nn.Conv2d with candidate bits for its weight and its input.

    Takes nn.Conv2d's arguments, then a SearchSpace as `space=`, or its fields (w_bits=, a_bits=, granularity=, …). `weight` and `bias` are
    nn.Conv2d's, so a float state_dict loads with strict=True. The input [N, C, H, W] (or [C, H, W]) is quantized per tensor, the weight per
    filter or per layer; the output is

        y[:, f] = Σ_{w,a} p[f, w, a] · conv(A_a(x), Q_w(W[f])) + bias[f]

    evaluated as one convolution. Starting ranges of the input come from `qprune.calibrate`, or from the first batch in training mode. With
    `layer.recompute = True` the mixed input is made again in the backward pass instead of being kept.
    """

    def __init__(self, *args: Any, space: SearchSpace | None = None, **options: Any) -> None:
        layer, fields = split_fields(options, _SPACE_FIELDS)
        nn.Conv2d.__init__(self, *args, **layer)
        self.setup_mixing(_chosen(space, fields))

    @classmethod
    def from_float(cls, conv: nn.Conv2d, space: SearchSpace) -> MixedConv2d:
        """The mixed layer with the parameters, buffers, hooks, device, dtype and mode of `conv`, sharing its tensors."""
        return take_over(cls, conv, lambda mixed: mixed.setup_mixing(space))

    def forward(self, input: Tensor) -> Tensor:
        check_input(self, input, (3, 4), self.in_channels, -3)
        y = self._convolve(input if input.dim() == 4 else input.unsqueeze(0))
        return y if input.dim() == 4 else y.squeeze(0)

    def _convolve(self, x: Tensor) -> Tensor:
        window, depthwise = window_of(self), self.groups == self.in_channels == self.out_channels > 1
        if window is not None and depthwise and routes.depthwise(x):
            return self._depthwise(x, window)
        ready = self.prepared()
        if window is None or self.space.a_bits == (FLOAT,):
            m = len(self.space.a_bits) if self.space.joint else 1
            return self._conv_forward(split_for_groups(self.mixed_input(x, ready), m, self.groups), ready.weight, self.bias)
        a = self.input_quantizer.candidates(x, ready.input_p, ready.input_range)
        if not self.space.joint:
            return library_conv2d(x, ready.weight, a, self.bias, window, self.recompute)
        mode = self.weight_gate.mode
        choice = None if mode == "relaxed" else self.quantizer_of_pair[ready.p.argmax(-1)].expand(self.out_channels)
        return joint_conv2d(x, ready.weight, a, self.bias, window, choice, mode != "fixed", recompute=self.recompute)

    def _depthwise(self, x: Tensor, window: ConvGeometry) -> Tensor:
        ready = self.prepared() if self.weight_quantizer.active_stage == "noisy" else self.ready
        if ready is None:
            p = self.weight_gate()
            w = self.weight_quantizer.candidates(self.weight, p, *([self.picks, self.pair_groups] if self.space.joint else []))
            input_p = None if self.input_gate is None else self.input_gate()
            a = self.input_quantizer.candidates(x, input_p)
            return depthwise_conv2d(x, self.weight, a, w, self.bias, window)
        a = self.input_quantizer.candidates(x, ready.input_p, ready.input_range)
        return depthwise_conv2d(x, ready.weight, a, mixed_already(ready.weight), self.bias, window)


class MixedLinear(Mixing, nn.Linear):
    """nn.Linear with candidate bits for its weight and its input; arguments and behaviour as MixedConv2d. Input [*, in_features]."""

    def __init__(self, *args: Any, space: SearchSpace | None = None, **options: Any) -> None:
        layer, fields = split_fields(options, _SPACE_FIELDS)
        nn.Linear.__init__(self, *args, **layer)
        self.setup_mixing(_chosen(space, fields))

    @classmethod
    def from_float(cls, linear: nn.Linear, space: SearchSpace) -> MixedLinear:
        """The mixed layer with the parameters, buffers, hooks, device, dtype and mode of `linear`, sharing its tensors."""
        return take_over(cls, linear, lambda mixed: mixed.setup_mixing(space))

    def forward(self, input: Tensor) -> Tensor:
        check_input(self, input, tuple(range(1, 9)), self.in_features, -1)
        ready = self.prepared()
        mixed = self.mixed_input(input.reshape(-1, self.in_features), ready)
        return F.linear(mixed, ready.weight, self.bias).reshape(*input.shape[:-1], self.out_features)


class MixedActivation(nn.Module):
    """Candidate bits for an activation where it is produced: y = Σ_k p_k A_k(x), p for the tensor or for every channel.

    a_bits    candidate bits
    channels  None: one choice for the tensor; a number: one choice per channel of dimension 1 (Zur et al., 1904.09872)
    """

    def __init__(self, a_bits: tuple[int, ...] = (2, 4, 8), channels: int | None = None, input_quantizer: str = "pact") -> None:
        super().__init__()
        self.space = SearchSpace((FLOAT,), a_bits, input_quantizer=input_quantizer)
        self.channels = channels
        self.gate = make_gate(len(self.space.a_bits), channels)
        self.quantizer = InputQuantizer(input_quantizer, self.space.a_bits)

    def forward(self, x: Tensor) -> Tensor:
        check_input(self, x, tuple(range(2, 6)), self.channels or (x.size(1) if x.dim() > 1 else 0), 1)
        return self.quantizer(x, self.gate())  # type: ignore[no-any-return]


_SPACE_FIELDS = tuple(name for name in SearchSpace.__dataclass_fields__ if name != "candidates")


def _chosen(space: SearchSpace | None, fields: dict[str, Any]) -> SearchSpace:
    if space is None:
        return SearchSpace(**fields)
    if fields:
        raise SpaceError(f"space: give a SearchSpace or its fields, got both (space= and {', '.join(f'{name}=' for name in fields)})")
    return space
