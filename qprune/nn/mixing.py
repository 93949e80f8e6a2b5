"""What the mixed layers share: gates, quantizers, and the mixed weight and input that the plain layer then consumes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qprune.errors import InputError, SpaceError
from qprune.gates import make_gate
from qprune.quantizers import InputQuantizer, WeightQuantizer
from qprune.space import FLOAT, SearchSpace


def check_input(module: nn.Module, x: Tensor, ranks: tuple[int, ...], channels: int, axis: int) -> None:
    """Raise InputError unless x is a floating-point tensor of one of the ranks with the layer's number of input channels."""
    name = getattr(module, "layer_name", "") or type(module).__name__
    if not x.is_floating_point():
        raise InputError(f"layer {name}: the input must be floating point, got {x.dtype}: convert it with x.float() first")
    if x.dim() not in ranks:
        raise InputError(f"layer {name}: expected an input of rank {' or '.join(map(str, ranks))}, got shape {tuple(x.shape)}")
    if x.size(axis) != channels:
        raise InputError(f"layer {name}: expected {channels} input channels in dimension {axis}, got shape {tuple(x.shape)}")


class QuantizedLayer(nn.Module):
    """What mixed and fixed layers share: quantizers that start anew when a float state_dict brings another weight."""

    weight: Tensor
    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer
    layer_name: str = ""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" not in state_dict:
            return
        if f"{prefix}weight_quantizer.log_range" not in state_dict:
            self.weight_quantizer.start(self.weight)
        if f"{prefix}input_quantizer.log_range" not in state_dict:
            self.input_quantizer.restart()


class Mixing(QuantizedLayer):
    """Mixin of MixedConv2d and MixedLinear: y = layer(Σ_j r_j A_j(x), Σ_k p_k Q_k(W)) with factorised candidates, and the sum over pairs,
    collapsed to one convolution over M·C input channels, with joint ones.

    weight_gate, input_gate   p over w_bits ([K] or [F, K]) and over a_bits ([K]); with joint candidates weight_gate is over pairs and
                              input_gate is None
    weight_quantizer, input_quantizer
    """

    def setup_mixing(self, space: SearchSpace) -> None:
        """Add gates and quantizers for `space` to a layer whose weight exists."""
        if not isinstance(space, SearchSpace):
            raise SpaceError(f"space: expected a SearchSpace, got {type(space).__name__}")
        device, filters = self.weight.device, self.weight.size(0)
        rows = filters if space.granularity == "filter" else None
        self.space = space
        self.weight_quantizer = WeightQuantizer(space.weight_quantizer, space.w_bits, filters if space.scales == "filter" else 1, device)
        self.input_quantizer = InputQuantizer(space.input_quantizer, space.a_bits, device)
        self.weight_gate = make_gate(len(space.candidates) if space.joint else len(space.w_bits), rows, device)
        self.input_gate = None if space.joint else make_gate(len(space.a_bits), None, device)
        self.picks = [space.w_bits.index(w) for w, _ in space.candidates]
        self.pair_groups = [space.a_bits.index(a) for _, a in space.candidates]
        self.weight_quantizer.start(self.weight)

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed input [N, C, …] and weight [F, C/g, …]; both with M times the input channels for joint candidates."""
        p = self.weight_gate()
        if self.input_gate is not None:
            return self._mix_input(x), self.weight_quantizer(self.weight, p)
        weight = self.weight_quantizer(self.weight, p, self.picks, self.pair_groups)
        return self._split_input(x), weight

    def _mix_input(self, x: Tensor) -> Tensor:
        if self.space.a_bits == (FLOAT,):
            return x
        assert self.input_gate is not None
        return self.input_quantizer(x, self.input_gate())  # type: ignore[no-any-return]

    def _split_input(self, x: Tensor) -> Tensor:
        """[A_1(x) … A_M(x)] along dimension 1, in the order that a convolution with groups expects: [group, m, channel of the group]."""
        out: Tensor = self.input_quantizer(x, self.weight_gate(), split=True)
        m, groups = len(self.space.a_bits), getattr(self, "groups", 1)
        if m == 1 or groups == 1:
            return out
        if out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous():
            return out.movedim(1, 3).unflatten(3, (m, groups, -1)).transpose(3, 4).flatten(3, 5).movedim(3, 1)
        return out.unflatten(1, (m, groups, -1)).transpose(1, 2).flatten(1, 3)

    def filter_probabilities(self) -> Tensor:
        """p over (weight candidate, activation candidate) per filter: [F, K_w, K_a] or [1, K_w, K_a] when all filters share one choice."""
        p = self.weight_gate()
        p = p if p.dim() == 2 else p.unsqueeze(0)
        if self.input_gate is not None:
            return p.unsqueeze(2) * self.input_gate()
        table = p.new_zeros(p.size(0), len(self.space.w_bits) * len(self.space.a_bits))
        cell = torch.tensor([w * len(self.space.a_bits) + a for w, a in zip(self.picks, self.pair_groups)], device=p.device)
        return table.index_add(1, cell, p).unflatten(1, (len(self.space.w_bits), len(self.space.a_bits)))
