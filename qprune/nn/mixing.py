"""What the mixed layers share: gates, quantizers, and the mixed weight and input that the plain layer then consumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qprune.constants import constant
from qprune.errors import InputError, SpaceError
from qprune.gates import make_gate
from qprune.quantizers import InputQuantizer, UniqWeightQuantizer, WeightQuantizer
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
    weight_quantizer: WeightQuantizer | UniqWeightQuantizer
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


@dataclass(frozen=True)
class Ready:
    """What a mixed layer needs besides its input.

    weight       Σ_k p_k Q_k(W) [F, C/g, …]; for joint candidates the M sums V_m side by side
    p            of the weight gate
    input_p      of the input gate; None for joint candidates
    input_range  r of the input quantizer [1, K_a], or None: to be taken from it
    """

    weight: Tensor
    p: Tensor
    input_p: Tensor | None = None
    input_range: Tensor | None = None


class Mixing(QuantizedLayer):
    """Mixin of MixedConv2d and MixedLinear: y = layer(Σ_j r_j A_j(x), Σ_k p_k Q_k(W)) with factorised candidates, and the sum over pairs,
    collapsed to one convolution over M·C input channels, with joint ones.

    weight_gate, input_gate   p over w_bits ([K] or [F, K]) and over a_bits ([K]); with joint candidates weight_gate is over pairs and
                              input_gate is None
    weight_quantizer, input_quantizer
    recompute                 whether a convolution mixes its input again in the backward pass instead of keeping the mixed input
    ready                     set while `Premix` mixes the weights of the whole network at once
    premixed                  whether it may: the mixture does not depend on the input
    """

    weight_quantizer: WeightQuantizer
    quantizer_of_pair: Tensor
    ready: Ready | None = None
    recompute = False
    premixed = True

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
        self.register_buffer("quantizer_of_pair", torch.tensor(self.pair_groups, device=device), persistent=False)
        self.weight_quantizer.start(self.weight)

    def prepared(self) -> Ready:
        """The mixed weight and the coefficients: those that `Premix` made for the whole network, else made here."""
        if self.ready is not None:
            return self.ready
        p = self.weight_gate()
        if self.input_gate is None:
            return Ready(self.weight_quantizer(self.weight, p, self.picks, self.pair_groups), p)
        return Ready(self.weight_quantizer(self.weight, p), p, self.input_gate())

    def mixed_input(self, x: Tensor, ready: Ready) -> Tensor:
        """Σ_a r_a A_a(x) with factorised candidates; [A_1(x) … A_M(x)] along dimension 1 with joint ones."""
        if self.space.a_bits == (FLOAT,):
            return x
        return self.input_quantizer(x, ready.input_p, ready.input_range)  # type: ignore[no-any-return]

    def filter_probabilities(self, weight_p: Tensor | None = None) -> Tensor:
        """p over (weight candidate, activation candidate) per filter: [F, K_w, K_a] or [1, K_w, K_a] when all filters share one choice.

        weight_p  instead of what the weight gate gives
        """
        p = self.weight_gate() if weight_p is None else weight_p
        p = p if p.dim() == 2 else p.unsqueeze(0)
        if self.input_gate is not None:
            return p.unsqueeze(2) * self.input_gate()
        table = p.new_zeros(p.size(0), len(self.space.w_bits) * len(self.space.a_bits))
        cell = constant(tuple(w * len(self.space.a_bits) + a for w, a in zip(self.picks, self.pair_groups)), torch.int64, p.device)
        return table.index_add(1, cell, p).unflatten(1, (len(self.space.w_bits), len(self.space.a_bits)))
