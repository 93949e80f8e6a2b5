"""The channels of S configurations side by side: how a prepared model's layers compute [N, S·C, H, W].

A grouped convolution serves the configurations where their inputs differ, one convolution with S·F filters where they share the image.
Nothing of the model changes: not its modes, its running statistics, nor what its gates hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import InputError
from qprune.gates import FilterGate
from qprune.modes import kept_modes
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.mixed import MixedActivation
from qprune.nn.unitparts import FilterActivation, FilterBatchNorm2d, chosen_rows

Choices = Mapping[str, Tensor]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Stack:
    """While it is entered, the model evaluates S configurations: its layers' forwards are replaced, its modes are those of evaluation."""

    def __init__(self, model: nn.Module, choices: Choices, statistics: str, weights: dict[nn.Module, Tensor] | None = None) -> None:
        """weights: the units' quantized weights (see FilterConv2d.candidate_weights), kept here for another Stack of the same model."""
        self.model, self.batch_statistics = model, statistics == "batch"
        self.weights = {} if weights is None else weights
        self.size = next(iter(choices.values())).size(0)
        self.choice: dict[nn.Module, Tensor] = {}
        for name, unit in model.named_modules():
            if isinstance(unit, FilterConv2d):
                rows = choices.get(name)
                if rows is None:
                    held = unit.gate.choice if isinstance(unit.gate, FilterGate) else torch.zeros(unit.out_channels, dtype=torch.int64)
                    rows = held.expand(self.size, -1)
                self.choice[unit.gate] = rows.to(unit.weight.device)

    def __enter__(self) -> Stack:
        self._forwards = {module: forward for module in self.model.modules() if (forward := self._forward_of(module)) is not None}
        self._before = {module: module.__dict__.get("forward") for module in self._forwards}
        with ExitStack() as entered:
            entered.enter_context(kept_modes(self.model))
            entered.enter_context(_patched(self._forwards))
            self.model.eval()
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._entered.close()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A `with` block in which the model's layers have their own forwards."""
        with _patched(self._before):
            yield

    def split(self, output: Any) -> Any:
        """[N, S·c, …] → [S, N, c, …]."""
        if not isinstance(output, Tensor):
            return output
        return output.unflatten(1, (self.size, -1)).movedim(1, 0)

    def _forward_of(self, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
        if isinstance(module, FilterConv2d):
            return lambda x: self._convolve(module, x)
        if isinstance(module, FilterActivation):
            return lambda x: self._activate(module, x)
        if isinstance(module, _NORMS):
            return lambda x: self._normalise(module, x)
        channels = _channels(module)
        return None if channels is None else _folded(module.forward, channels, self.size, isinstance(module, nn.Linear))

    def _convolve(self, layer: FilterConv2d, x: Tensor) -> Tensor:
        if x.size(1) not in (layer.in_channels, self.size * layer.in_channels):
            raise InputError(f"layer {layer.layer_name}: expected {layer.in_channels} input channels, got shape {tuple(x.shape)}")
        x = layer.quantized_input(x)
        if layer not in self.weights:
            self.weights[layer] = layer.candidate_weights()
        weight = chosen_rows(self.weights[layer], self.choice[layer.gate])
        bias = None if layer.bias is None else layer.bias.repeat(self.size)
        groups = 1
        if x.size(1) == self.size * layer.in_channels:
            groups = self.size * layer.groups
        elif layer.groups > 1:
            x, groups = x.repeat(1, self.size, 1, 1), self.size * layer.groups
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        return F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, groups)

    def _normalise(self, norm: Any, x: Tensor) -> Tensor:
        def rows(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            own = isinstance(norm, FilterBatchNorm2d) and norm.own
            return chosen_rows(t, self.choice[norm.gate]) if own else t.repeat(x.size(1) // norm.num_features)

        weight, bias = rows(norm.weight), rows(norm.bias)
        if self.batch_statistics or norm.running_mean is None:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)
        return F.batch_norm(x, rows(norm.running_mean), rows(norm.running_var), weight, bias, False, 0.0, norm.eps)

    def _activate(self, activation: FilterActivation, x: Tensor) -> Tensor:
        choice = self.choice[activation.gate].flatten()
        p = F.one_hot(choice, len(activation.quantizer.bits)).to(torch.float32)
        return activation.quantizer(x if activation.limit is None else x.clamp(max=activation.limit), p)


def _channels(module: nn.Module) -> int | None:
    """The number of input channels of a layer that does not treat all channels alike; None for one that does."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0]
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else None
    return module.channels if isinstance(module, MixedActivation) else None


def _folded(forward: Callable[[Tensor], Tensor], channels: int, size: int, features_last: bool) -> Callable[[Tensor], Tensor]:
    """A layer of `channels` channels, for x of S times as many; what one configuration's x gives is repeated for all."""

    def stacked(x: Tensor) -> Tensor:
        if features_last and x.dim() > 2:
            return forward(x)
        if x.size(1) == size * channels:
            y = forward(x.unflatten(1, (size, channels)).flatten(0, 1))
            return y.unflatten(0, (-1, size)).flatten(1, 2)
        y = forward(x)
        return y.repeat(1, size, *[1] * (y.dim() - 2))

    return stacked


@contextmanager
def _patched(forwards: Mapping[nn.Module, Callable[..., Tensor] | None]) -> Iterator[None]:
    """Modules that use other forwards for a while (None: their class's); those that had one of their own get it back."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        _set(forwards)
        yield
    finally:
        _set(before)


def _set(forwards: Mapping[nn.Module, Callable[..., Tensor] | None]) -> None:
    for module, forward in forwards.items():
        if forward is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = forward
