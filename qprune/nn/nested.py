"""Layers with nested candidates behind gates, and how a prepared model gets them: Liu et al., "Single-path Bit Sharing" (2101.04935).

All candidates of a tensor share one clip, so that the sum of its gated residuals is the mixture Σ_k p_k Q_k of the fused operation, and a
layer costs one pass over its input and one over its weight, whatever the number of candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qprune.errors import InputError, SpaceError
from qprune.gates import Constant, make_gate
from qprune.geometry import Geometry
from qprune.nn.bitgates import BitGate, PruningGate
from qprune.nn.mixed import MixedConv2d, MixedLinear
from qprune.nn.mixing import Mixing, QuantizedLayer, Ready
from qprune.nn.prunable import prunable_chains
from qprune.nn.surgery import plain, replace_modules, take_over
from qprune.quantizers.input import InputQuantizer
from qprune.quantizers.nested import SharedInputQuantizer, check_nested
from qprune.quantizers.normalised import NormalisedWeightQuantizer
from qprune.space import FLOAT, PRUNED, SearchSpace

CLIPS = ("one", "fitted")


@dataclass
class Pruning:
    """A filter gate and the layer from whose weight the importance of the filters is taken. Call it for f [filters]."""

    gate: PruningGate
    source: nn.Module

    @property
    def weight(self) -> Tensor:
        return self.source.get_parameter("weight")

    def __call__(self) -> Tensor:
        return self.gate(self.weight)  # type: ignore[no-any-return]


class NestedWeightGate(nn.Module):
    """p over the weight candidates of a layer: [K], or [F, 1 + K] where filters can be pruned, the first column for 0 bits.

    bits  the gates of the candidates that are not 0; a Constant for one
    """

    pruning: Pruning | None = None
    mode = "fixed"

    def __init__(self, candidates: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.bits = _gate(candidates, device)

    def forward(self) -> Tensor:
        p: Tensor = self.bits()
        if self.pruning is None:
            return p
        kept = self.pruning().unsqueeze(1)
        return torch.cat([1 - kept, kept * p], dim=1)

    def distribution(self) -> Tensor:
        """What the costs expect: p."""
        return self()  # type: ignore[no-any-return]


def _gate(candidates: int, device: torch.device | None) -> BitGate | Constant:
    if candidates > 1:
        return BitGate(candidates, device)
    gate = make_gate(1, None, device)
    assert isinstance(gate, Constant)
    return gate


class NestedLayer(Mixing):
    """Mixin of NestedConv2d and NestedLinear: y = layer(f_in · Σ_j r_j A_j(x), Σ_k p_k Q_k(W)).

    filter_gate  of the layer's own filters, where it is the first of a chain (see `qprune.nn.prunable`)
    pruned_out   the gate of its filters, whoever has it, or None: it says which weights the normalisation counts, and what the layer costs
    pruned_in    the gate of the filters that make its input, or None: closed channels are read as zero

    The paper multiplies the activation behind normalisation and rectifier by the gate; here the only reader of that activation does, in
    the pass that quantizes it, so that dL/df sees quantized values. In training mode the gates take the batch's residuals; in eval mode
    those of the last batch in training mode.
    """

    weight_gate: Any
    input_gate: Any
    weight_quantizer: Any
    pruned_out: Pruning | None = None
    pruned_in: Pruning | None = None
    premixed = False

    def setup_nested(self, space: SearchSpace, clips: str) -> None:
        """Give a layer that is mixed already nested candidates. Its input quantizer says if the input is signed."""
        before, device = self.input_quantizer, self.weight.device
        start, signed = 1.0 if clips == "one" else None, bool(before.signed > 0)
        quantizers: dict[str, Any] = {"weight_quantizer": "dorefa", "scales": "layer", "input_quantizer": "lsq+" if signed else "pact"}
        self.space = space = replace(space, **quantizers)
        self.picks = [space.w_bits.index(w) for w, _ in space.candidates]
        self.pair_groups = [space.a_bits.index(a) for _, a in space.candidates]
        self.weight_quantizer = NormalisedWeightQuantizer(space.w_bits, start, device)
        self.weight_gate = NestedWeightGate(len(self.weight_quantizer.widths), device)
        self.input_gate = _gate(len(space.a_bits), device)
        if space.a_bits != (FLOAT,):
            self.input_quantizer = SharedInputQuantizer(space.a_bits, signed, start, device)
            if clips == "fitted" and before.calibrated:
                self.input_quantizer.set_clip(_clip_of(before, space.a_bits[len(space.a_bits) // 2], signed))

    def refresh(self, x: Tensor) -> Ready:
        """The mixed weight and the coefficients for the input x [N, C, …]; takes the residuals in training mode."""
        kept = None if self.pruned_in is None else self.pruned_in()
        weight_gate, input_gate = self.weight_gate.bits, self.input_gate
        centred = self.weight_quantizer.centred(self.weight, self.kept_weights())
        if self.training and isinstance(weight_gate, BitGate) and not weight_gate.held:
            weight_gate.observe(self.weight_quantizer.residual_means(centred), share=False)
        if self.training and isinstance(input_gate, BitGate) and not input_gate.held:
            assert isinstance(self.input_quantizer, SharedInputQuantizer)
            input_gate.observe(self.input_quantizer.residual_means(x, None if kept is None else kept.detach()))
        p, input_p = weight_gate(), input_gate()
        weight = self.weight_quantizer.candidates(centred, p).mix(centred, axis=0)
        return Ready(weight, p, input_p if kept is None else kept.unsqueeze(1) * input_p)

    def kept_weights(self) -> Tensor | None:
        """0 or 1 for every weight, broadcasting; None where nothing can be pruned."""
        kept, shape = None, [1] * (self.weight.dim() - 2)
        if self.pruned_out is not None:
            kept = self.pruned_out().detach().view(-1, 1, *shape)
        if self.pruned_in is not None:
            channels = self.pruned_in().detach().view(1, -1, *shape)
            kept = channels if kept is None else kept * channels
        return kept

    def _silenced(self, x: Tensor) -> Tensor:
        """x, with zeros in closed channels where no quantizer puts them."""
        if self.pruned_in is None or self.space.a_bits != (FLOAT,):
            return x
        return x * self.pruned_in().to(x.dtype).view(-1, *[1] * (x.dim() - 2))

    def as_plain(self) -> nn.Module:
        """The torch layer with the weight w − μ: what its quantizers quantize, so that their ranges fit it."""

        def drop(layer: nn.Module) -> None:
            layer._parameters["weight"] = nn.Parameter(self.weight_quantizer.centred(self.weight.detach(), self.kept_weights()))
            layer._modules.pop("filter_gate", None)
            for name in ("pruned_out", "pruned_in"):
                layer.__dict__.pop(name, None)

        base = MixedConv2d if isinstance(self, nn.Conv2d) else MixedLinear
        return plain(take_over(base, self, drop))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super(QuantizedLayer, self)._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


class NestedConv2d(NestedLayer, MixedConv2d):
    """A MixedConv2d with nested candidates. `nest` makes it."""

    @classmethod
    def from_mixed(cls, layer: MixedConv2d, space: SearchSpace, clips: str) -> NestedConv2d:
        return take_over(cls, layer, lambda nested: nested.setup_nested(space, clips))

    def forward(self, input: Tensor) -> Tensor:
        self.__dict__["ready"] = self.refresh(input if input.dim() == 4 else input.unsqueeze(0))
        try:
            return super().forward(self._silenced(input))
        finally:
            del self.__dict__["ready"]


class NestedLinear(NestedLayer, MixedLinear):
    """A MixedLinear with nested candidates."""

    @classmethod
    def from_mixed(cls, layer: MixedLinear, space: SearchSpace, clips: str) -> NestedLinear:
        return take_over(cls, layer, lambda nested: nested.setup_nested(space, clips))

    def forward(self, input: Tensor) -> Tensor:
        self.__dict__["ready"] = self.refresh(input.reshape(-1, self.in_features))
        try:
            return super().forward(input)
        finally:
            del self.__dict__["ready"]


def _clip_of(quantizer: InputQuantizer, bits: int, signed: bool) -> Tensor:
    """The clip that a quantizer has learned for one of its candidates, [1, 1]."""
    k = quantizer.bits.index(bits)
    return quantizer.learned_range().detach()[:, k : k + 1] * (0.5 if signed else 1.0)


def nested_spaces(layers: Mapping[str, Mixing], geometry: Geometry, prune: bool = True) -> dict[str, SearchSpace]:
    """The spaces of the layers that a nested search changes: those with several candidates, and those that read prunable channels.

    Bits are put in order; 0 remains, if `prune`, where the filters form a chain. Raises SpaceError for spaces that cannot be nested.
    """
    spaces = {name: _sorted(name, layer) for name, layer in layers.items() if not layer.space.is_fixed}
    prunable = {name for name, space in spaces.items() if PRUNED in space.w_bits}
    able = {name for name, layer in layers.items() if not {1, FLOAT} & set(layer.space.w_bits) and not layer.input_quantizer.signed > 0}
    chains = [chain for chain in prunable_chains(geometry, prunable) if chain.consumer in able and prune]
    chained = {name for chain in chains for name in chain.producers}
    for name in prunable - chained:
        spaces[name] = replace(spaces[name], w_bits=tuple(b for b in spaces[name].w_bits if b != PRUNED))
    for chain in chains:
        spaces.setdefault(chain.consumer, layers[chain.consumer].space)
    return spaces


def _sorted(name: str, layer: Mixing) -> SearchSpace:
    space = layer.space
    if space.joint:
        raise SpaceError(f"layer {name}: nested bits of weights and inputs are chosen apart; leave out pairs and joint")
    if space.granularity != "layer":
        raise SpaceError(
            f"layer {name}: nested bits are chosen per layer, got granularity {space.granularity!r}; filters choose 0 bits only"
        )
    w_bits, a_bits = tuple(sorted(space.w_bits)), tuple(sorted(space.a_bits))
    if PRUNED in a_bits:
        raise SpaceError(f"layer {name}: a_bits: 0 is no nested candidate of an input; put it in w_bits, to prune filters")
    if 1 in w_bits or FLOAT in w_bits or w_bits == (PRUNED,):
        raise SpaceError(f"layer {name}: w_bits: nested weights have 2 to 8 bits, and 0 for pruned filters, got {w_bits}")
    check_nested(f"layer {name}: w_bits", w_bits)
    check_nested(f"layer {name}: a_bits", a_bits)
    return replace(space, w_bits=w_bits, a_bits=a_bits)


def nest(
    model: nn.Module,
    geometry: Geometry,
    clips: str = "one",
    group_size: int = 4,
    max_pruning: float = 0.5,
    per_group: bool = False,
    prune: bool = True,
) -> None:
    """Give the searched layers of a prepared model nested candidates and gates, in place. Models that have them already stay as they are.

    geometry     of the model, with its channel groups
    clips        where all clips start: "one" (the paper), of normalised weights and of inputs; "fitted": to a normal distribution, and to
                 what `calibrate` or the first batch found
    group_size   filters per gate (the paper: 4 on CIFAR, 16 for ResNet-18, 8 for MobileNetV2)
    max_pruning  largest share of a layer's filters that may be pruned. Reconstruction: the paper's value is not known
    per_group    a threshold for every group instead of one per layer
    prune        False: no filters are pruned, whatever w_bits say

    w_bits with 0 ask for pruning; 0 is left out where a filter's channel is added to others, read by several layers, or
    not rectified. Quantizers become
    normalised DoReFa weights and PACT inputs, whatever the space named. Raises SpaceError for bits that do not divide each other, for joint
    candidates and for bits per filter, InputError for options out of range.
    """
    if clips not in CLIPS:
        raise InputError(f"clips: expected one of {', '.join(CLIPS)}, got {clips!r}")
    if group_size < 1 or not 0 < max_pruning < 1:
        raise InputError(f"expected group_size ≥ 1 and 0 < max_pruning < 1, got {group_size} and {max_pruning}")
    if any(isinstance(module, NestedLayer) for module in model.modules()):
        return
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MixedConv2d | MixedLinear)}
    if "" in layers:
        raise InputError("a layer on its own cannot be nested; put it into an nn.Sequential")
    swaps: dict[str, Any] = {}
    for name, space in nested_spaces(layers, geometry, prune).items():
        layer: Any = layers[name]
        is_conv = isinstance(layer, MixedConv2d)
        swaps[name] = NestedConv2d.from_mixed(layer, space, clips) if is_conv else NestedLinear.from_mixed(layer, space, clips)
    replace_modules(model, {layers[name]: new for name, new in swaps.items()})
    for chain in prunable_chains(geometry, {name for name, new in swaps.items() if PRUNED in new.space.w_bits}):
        first, last = swaps[chain.producers[0]], swaps[chain.producers[-1]]
        pruning = Pruning(PruningGate(chain.size, group_size, max_pruning, per_group, first.weight.device), last)
        first.add_module("filter_gate", pruning.gate)
        for name in chain.producers:
            swaps[name].__dict__["pruned_out"] = swaps[name].weight_gate.__dict__["pruning"] = pruning
        swaps[chain.consumer].__dict__["pruned_in"] = pruning
