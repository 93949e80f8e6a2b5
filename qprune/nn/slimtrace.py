"""Which layer's width another layer sees, and what widths cost: the structure of a chain of convolutions and residual blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qprune.errors import InputError, UnsupportedLayerError
from qprune.geometry import ExampleInputs, run
from qprune.modes import kept_modes
from qprune.nn.slimlayers import ResidualBlock

Widths = Mapping[str, int]


@dataclass(frozen=True)
class SlimLayer:
    """A convolution whose width is free.

    filters    at full width          inputs     input channels at full width
    kernel     weights per filter and input channel
    positions  output positions per sample
    source     the convolution whose width its input has; None for the network's input
    """

    name: str
    filters: int
    inputs: int
    kernel: int
    positions: int
    source: str | None


@dataclass(frozen=True)
class SlimShortcut:
    """The shortcut of a residual block, from the width of `source` (None: `inputs` channels) to that of conv2.

    own  the name of the network's own convolution there, None where the shortcut is the identity as long as both widths agree
    """

    block: str
    source: str | None
    inputs: int
    target: str
    kernel: int
    positions: int
    own: str | None


@dataclass(frozen=True)
class SlimStructure:
    """layers     convolutions with a free width, in the order of their use (shortcuts follow their block's conv2)
    shortcuts  of all residual blocks
    norms      normalisation → the convolution whose width it has
    linears    linear layer → the convolution whose width its input has, if it has one
    """

    layers: dict[str, SlimLayer] = field(default_factory=dict)
    shortcuts: tuple[SlimShortcut, ...] = ()
    norms: dict[str, str] = field(default_factory=dict)
    linears: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.layers)

    @property
    def filters(self) -> tuple[int, ...]:
        return tuple(layer.filters for layer in self.layers.values())

    def homogeneous(self, ratio: float) -> dict[str, int]:
        """The widths at one share of all filters, rounded down, at least 1."""
        if not 0 < ratio <= 1:
            raise InputError(f"width ratio: expected a number in (0, 1], got {ratio!r}")
        return {name: max(1, int(layer.filters * ratio)) for name, layer in self.layers.items()}

    def streams(self) -> list[tuple[str, ...]]:
        """Layers whose outputs identity shortcuts add up, each group in order; every layer is in one group."""
        stream = {name: [name] for name in self.layers}
        for shortcut in self.shortcuts:
            if shortcut.own is None and shortcut.source is not None:
                joined = stream[shortcut.source]
                joined.append(shortcut.target)
                stream[shortcut.target] = joined
        return list(dict.fromkeys(tuple(group) for group in stream.values()))

    def flops(self, widths: Tensor) -> Tensor:
        """Multiplications per sample of all convolutions at these widths [..., layers] (in the order of `names`) → int64 [...].

        Zur et al.: Σ k² w_in w_out H W; a 1x1 shortcut is counted, and exists, where the network has one and where block input and conv2
        differ in width; linear layers are not counted.
        """
        columns = dict(zip(self.layers, widths.long().unbind(-1), strict=True))
        total = torch.zeros_like(widths[..., 0], dtype=torch.int64)
        for layer in self.layers.values():
            channels = layer.inputs if layer.source is None else columns[layer.source]
            total = total + layer.positions * layer.kernel * columns[layer.name] * channels
        for s in self.shortcuts:
            source = torch.full_like(total, s.inputs) if s.source is None else columns[s.source]
            cost = s.positions * s.kernel * source * columns[s.target]
            total = total + (cost if s.own is not None else torch.where(source == columns[s.target], 0, cost))
        return total

    def vector(self, widths: Widths) -> Tensor:
        return torch.tensor([widths[name] for name in self.layers])

    def check(self, widths: Widths) -> None:
        """Raise InputError unless every layer is one of the network's, with 1 … filters as its width."""
        for name, width in widths.items():
            if name not in self.layers:
                raise InputError(f"widths: no convolution {name!r} has a width of its own; those that have: {', '.join(self.layers)}")
            if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= self.layers[name].filters:
                raise InputError(f"widths: layer {name} has 1 to {self.layers[name].filters} filters, got {width!r}")


def trace_structure(model: nn.Module, example_inputs: ExampleInputs) -> SlimStructure:
    """Run the model once and follow the order of its calls, as if they were a chain of convolutions and ResidualBlocks. Whether the
    network is one, running it at other widths shows (`watching`). Raises UnsupportedLayerError for a layer that is called twice."""
    calls: list[tuple[str, nn.Module, int]] = []
    names = {module: name for name, module in model.named_modules()}

    def called(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append((names[module], module, output[0, 0].numel() if output.dim() == 4 else 1))

    handles = []
    for module in names:
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            handles.append(module.register_forward_hook(called))
        if isinstance(module, ResidualBlock):
            handles.append(module.register_forward_pre_hook(lambda module, args: calls.append((names[module], module, 0))))
            handles.append(module.register_forward_hook(called))
    try:
        with kept_modes(model), torch.no_grad():
            run(model.eval(), example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return _follow(calls)


def _follow(calls: list[tuple[str, nn.Module, int]]) -> SlimStructure:
    structure, current = SlimStructure(), None
    shortcuts: list[SlimShortcut] = []
    inside: tuple[str, ResidualBlock, str | None] | None = None
    seen: set[str] = set()
    for name, module, positions in calls:
        if isinstance(module, ResidualBlock):
            inside, current = (None, current) if inside else ((name, module, current), current)
            if inside and module.shortcut is None:
                shortcuts.append(SlimShortcut(name, current, module.conv1.in_channels, f"{name}.conv2".lstrip("."), 1, 0, None))
            continue
        if name in seen:
            raise UnsupportedLayerError(f"layer {name} is called more than once, so its width is tied to itself; give every place its own")
        seen.add(name)
        if inside is not None and module is inside[1].shortcut:
            assert isinstance(module, nn.Conv2d)
            kernel = module.weight[0, 0].numel()
            shortcuts.append(SlimShortcut(inside[0], inside[2], module.in_channels, current or "", kernel, positions, name))
        elif isinstance(module, nn.Conv2d):
            kernel = module.weight[0, 0].numel()
            structure.layers[name] = SlimLayer(name, module.out_channels, module.in_channels, kernel, positions, current)
            current = name
        elif isinstance(module, nn.Linear):
            if current is not None:
                structure.linears[name] = current
            current = None
        elif current is not None:
            structure.norms[name] = current
    where = {s.target: structure.layers[s.target].positions for s in shortcuts}
    done = tuple(s if s.own else SlimShortcut(**{**vars(s), "positions": where[s.target]}) for s in shortcuts)
    return SlimStructure(structure.layers, done, structure.norms, structure.linears)


@contextmanager
def watching(model: nn.Module, structure: SlimStructure, widths: Widths) -> Iterator[None]:
    """Raise UnsupportedLayerError where a layer's input has not as many channels as the structure says."""
    expected: dict[str, tuple[int, int]] = {}
    for layer in structure.layers.values():
        expected[layer.name] = (1, layer.inputs if layer.source is None else widths[layer.source])
    expected |= {name: (1, widths[source]) for name, source in structure.norms.items()}
    modules = dict(model.named_modules())
    for name, source in structure.linears.items():
        linear = modules[name]
        assert isinstance(linear, nn.Linear)
        expected[name] = (-1, linear.in_features // structure.layers[source].filters * widths[source])

    def check(name: str) -> Any:
        axis, channels = expected[name]

        def hook(module: nn.Module, args: Any) -> None:
            if args[0].size(axis) != channels:
                raise UnsupportedLayerError(
                    f"layer {name}: its input has {args[0].size(axis)} channels where a chain of convolutions and residual blocks "
                    f"would have {channels}; only such networks can be made slim"
                )

        return hook

    handles = [modules[name].register_forward_pre_hook(check(name)) for name in expected]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
