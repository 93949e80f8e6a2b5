"""The geometry of a network: what costs are computed from. Found by running the network once, whatever its control flow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune.errors import InputError
from qprune.geometry_checks import check_geometry
from qprune.modes import kept_modes
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.surgery import copy_model, plain, replace_modules

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class LayerGeometry:
    """A layer with weights. macs = positions · filters · inputs · kernel, per sample, over all calls of a shared layer.

    filters    rows of the weight (output channels, or features)
    inputs     input channels that one filter sees (C / groups)
    kernel     weights per filter and input channel (kh · kw; 1 for a linear layer)
    groups     convolution groups
    positions  output positions per sample (input positions for a transposed convolution)
    """

    name: str
    kind: str
    filters: int
    inputs: int
    kernel: int
    groups: int
    positions: int

    @property
    def macs(self) -> int:
        return self.positions * self.weights

    @property
    def weights(self) -> int:
        return self.filters * self.inputs * self.kernel

    @property
    def channels(self) -> int:
        return self.inputs * self.groups

    @property
    def depthwise(self) -> bool:
        """Every filter sees one channel of its own: what it produces is what came in, or nothing."""
        return self.groups > 1 and self.inputs == 1


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that go from the same producers to the same consumers. Channel r of the group is produced by filter producers[layer][r] of
    every producer (several where a residual adds them) and read as input channel i by every pair (i, r) in consumers[layer]: it can be
    removed there once all those filters are pruned.

    carriers   modules that hold an entry per channel on the way (normalisations, nn.PReLU): pairs (entry i, channel r), where the entry
               gets channel r of all producers and nothing else
    removable  whether a channel whose producers are all pruned can be taken out of every tensor that it goes through. Where not, it stays
               there as zeros, and only the layers at its ends become narrower
    why        the reason, where it cannot
    """

    size: int
    producers: dict[str, tuple[int, ...]]
    consumers: dict[str, tuple[tuple[int, int], ...]]
    carriers: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    removable: bool = False
    why: str = ""


@dataclass(frozen=True)
class Unit:
    """What stands between a layer and the readers of its activation; needed where activations are quantized by their producer.

    norm        the BatchNorm2d that gets exactly this layer's output
    activation  the rectifier that its output, normalised or not, feeds directly or through additions; None if there is none, or if another
                branch of an addition owns it
    source      the layer whose activation this layer reads, through pooling or flattening; None for the network's input and for what no
                rectifier made. Input channel i is made of filter i · filters / channels of the source
    channels    where a network was made smaller: for every input channel, the channel of the source's activation that it is made of
    """

    norm: str | None = None
    activation: str | None = None
    source: str | None = None
    channels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Geometry:
    """All layers in the order of their first use, the channel groups that tie them (empty where they could not be traced), and, where
    activations may be quantized by their producers, the unit of every layer."""

    layers: dict[str, LayerGeometry]
    groups: tuple[ChannelGroup, ...] = field(default=())
    units: Mapping[str, Unit] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A short hash of the layers: a policy made for one network is refused by another."""
        rows = [asdict(layer) for layer in self.layers.values()]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        data = {"layers": [asdict(layer) for layer in self.layers.values()], "groups": [asdict(group) for group in self.groups]}
        return data | ({"units": {name: _unit_json(unit) for name, unit in self.units.items()}} if self.units else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Geometry:
        """Read `to_json`'s values; groups of layers that are not among the layers say nothing, and are left out. Raises ValueError,
        TypeError, KeyError or AttributeError for anything else."""
        layers = {row["name"]: LayerGeometry(**row) for row in data["layers"]}
        groups = tuple(
            ChannelGroup(
                row["size"],
                {name: tuple(filters) for name, filters in row["producers"].items()},
                {name: tuple((i, r) for i, r in pairs) for name, pairs in row["consumers"].items() if pairs},
                {name: tuple((i, r) for i, r in pairs) for name, pairs in row.get("carriers", {}).items() if pairs},
                bool(row.get("removable", False)),
                str(row.get("why", "")),
            )
            for row in data["groups"]
        )
        known = tuple(group for group in groups if group.producers and {*group.producers, *group.consumers} <= layers.keys())
        units = {name: Unit(**{**unit, "channels": _channels(unit.get("channels"))}) for name, unit in data.get("units", {}).items()}
        found = cls(layers, known, units)
        check_geometry(found)
        return found


def _channels(listed: Any) -> tuple[int, ...] | None:
    return None if listed is None else tuple(listed)


def _unit_json(unit: Unit) -> dict[str, Any]:
    """Without `channels`, where it is None: files then stay readable for versions that do not know it."""
    return {key: value for key, value in asdict(unit).items() if key != "channels" or value is not None}


def run(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call the model with a tensor, a tuple of arguments or a dict of keyword arguments, moved to the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(example_inputs, Tensor):
        return model(move(example_inputs))
    if isinstance(example_inputs, Mapping):
        return model(**{name: move(value) for name, value in example_inputs.items()})
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return model(*(move(value) for value in example_inputs))
    raise InputError(f"example_inputs: expected a tensor, a tuple of arguments or a dict of keywords, got {type(example_inputs).__name__}")


def weighted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions (any dimension, transposed too) and linear layers, each once, under its first name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            yield name, module


def describe(name: str, layer: nn.Module, positions: int) -> LayerGeometry:
    layer = plain(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    kernel = weight.shape[2:].numel()
    kind = getattr(layer, "kind", type(layer).__name__)
    groups = layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1
    return LayerGeometry(name, kind, weight.size(0), weight.size(1), kernel, groups, positions)


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a layer was called with, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


class observing:
    """A `with` block in which `callback(name, layer, x, y)` sees the input and output of every weighted layer."""

    def __init__(self, model: nn.Module, callback: Any) -> None:
        self.model, self.callback = model, callback

    def __enter__(self) -> None:
        def hook(name: str) -> Any:
            return lambda layer, args, kwargs, output: self.callback(name, layer, first_input(args, kwargs), output)

        self.handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in weighted_layers(self.model)]

    def __exit__(self, *exception: Any) -> None:
        for handle in self.handles:
            handle.remove()


def run_observed(model: nn.Module, inputs: Iterable[ExampleInputs], callback: Any) -> None:
    """Run the model in eval mode, without gradients, on several inputs, with `callback` as in `observing`. Modes are put back."""
    with kept_modes(model), observing(model.eval(), callback), torch.no_grad():
        for batch in inputs:
            run(model, batch)


def trace_geometry(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, LayerGeometry]:
    """Run the model once in eval mode, without gradients, and describe its layers in the order of their first use. Layers that were not
    called are left out. Nothing of the model changes."""
    if any(isinstance(module, FilterConv2d) for module in model.modules()):
        model = float_twin(model)  # units carry several branches
    positions: dict[str, int] = {}
    layers = dict(weighted_layers(model))
    batch = _batch_size(example_inputs)

    def record(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        nonlocal batch
        spread = x if getattr(layer, "transposed", False) else y
        axis = channel_axis(layer)
        if x.dim() < 1 - axis:
            batch = 1  # a convolution of [C, …], or a linear layer of [F]: the example is one sample
        positions[name] = positions.get(name, 0) + (spread.numel() // spread.size(axis) if spread.numel() else 0)

    run_observed(model, [example_inputs], record)
    return {name: describe(name, layers[name], -(-count // batch)) for name, count in positions.items()}


def channel_axis(layer: nn.Module) -> int:
    """The dimension of channels, or features, in the input and output of a weighted layer, counted from the end."""
    return -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1


def _batch_size(example_inputs: ExampleInputs) -> int:
    """The leading dimension of the first tensor of the example; 1 if that has one dimension only."""
    values = tree_leaves(dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs)
    first = next((value for value in values if isinstance(value, Tensor)), None)
    return max(first.size(0), 1) if first is not None and first.dim() > 1 else 1


def float_twin(model: nn.Module) -> nn.Module:
    """A deep copy in which every mixed or quantized module is the plain module it came from."""
    twin = copy_model(model)
    swaps = {module: plain(module) for module in twin.modules()}
    return replace_modules(twin, {module: layer for module, layer in swaps.items() if layer is not module})
