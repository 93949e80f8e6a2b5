"""Which normalisation and which activation belong to which layer: found from the autograd graph of one run of the float network."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune.errors import UnsupportedLayerError
from qprune.geometry import ExampleInputs, Unit, first_input, float_twin, run, weighted_layers
from qprune.wrappers import unwrap

RECTIFIERS = (nn.ReLU, nn.ReLU6)
_RECTIFYING = ("ReluBackward", "HardtanhBackward", "ClampBackward", "ClampMinBackward", "ThresholdBackward")
_KEEPING_CHANNELS = (
    "MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "Mean", "View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze",
    "NativeDropout", "Clone", "ToCopy", "Alias", "Slice", "ConstantPad", "UpsampleNearest", "MkldnnAdaptiveAvgPool",
)  # fmt: skip
_Node = Any


def find_units(model: nn.Module, example_inputs: ExampleInputs, layers: Collection[str] = ()) -> dict[str, Unit]:
    """The unit of every convolution and linear layer that one call with example_inputs reaches (see Unit), in the order of first use.

    layers  those whose activation has to be known: raises UnsupportedLayerError where one has a normalisation or a rectifier that cannot be
            its own alone. In other layers such a normalisation or rectifier counts as none

    The rectifiers are nn.ReLU and nn.ReLU6 modules. Where several branches meet in an addition, the one with the longest chain of layers
    behind it owns the rectifier (of several, the one that was called last). The model is not changed.
    """
    trace = _Trace(unwrap(model), example_inputs)
    units, problems = trace.units()
    for name in layers:
        if name in problems:
            raise UnsupportedLayerError(f"layer {name}: its activation cannot be quantized where it is produced: {problems[name]}")
    return units


@dataclass
class _Calls:
    """The nodes of autograd that a module read and made, one per call."""

    read: list[_Node] = field(default_factory=list)
    made: list[_Node] = field(default_factory=list)


class _Trace:
    """One run of a float copy in eval mode with gradients, and who made which node of its graph."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        twin = float_twin(model).eval().requires_grad_(True)
        self.layers = dict(weighted_layers(twin))
        self.modules = {name: m for name, m in twin.named_modules() if name in self.layers or isinstance(m, (nn.BatchNorm2d, *RECTIFIERS))}
        self.calls = {name: _Calls() for name in self.modules}
        self.order: dict[str, None] = {}
        handles = [module.register_forward_pre_hook(self._before(name), with_kwargs=True) for name, module in self.modules.items()]
        handles += [module.register_forward_hook(self._after(name)) for name, module in self.modules.items()]
        try:
            with torch.enable_grad():
                result = run(twin, example_inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.maker = {node: name for name, calls in self.calls.items() for node in calls.made if node is not None}
        self.readers = _readers([value.grad_fn for value in tree_leaves(result) if isinstance(value, Tensor)])
        self.depths: dict[_Node, int] = {}

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.order.setdefault(name)
            self.calls[name].read.append(first_input(args, kwargs).grad_fn)

        return hook

    def _after(self, name: str) -> Any:
        return lambda module, args, y: self.calls[name].made.append(y.grad_fn)

    def units(self) -> tuple[dict[str, Unit], dict[str, str]]:
        """The units, and for layers whose normalisation or rectifier is not theirs alone the reason."""
        problems: dict[str, str] = {}
        norms = self._norms(problems)
        owners = self._activations(norms, problems)
        activation = {layer: name for name, layer in owners.items()}
        called = [name for name in self.order if name in self.layers]
        return {name: Unit(norms.get(name), activation.get(name), self._source(name, owners)) for name in called}, problems

    def _norms(self, problems: dict[str, str]) -> dict[str, str]:
        """Layer → the BatchNorm2d that gets its output."""
        norms: dict[str, str] = {}
        for name in (name for name in self.order if isinstance(self.modules[name], nn.BatchNorm2d)):
            for node in self.calls[name].read:
                layer = self.maker.get(node)
                if layer in self.layers:
                    if len(self.calls[name].read) > 1 or len(self.calls[layer].made) > 1:
                        problems[layer] = f"{name} or the layer itself is called more than once; give every place modules of its own"
                    elif len(self.readers.get(node, ())) > 1:
                        problems[layer] = f"something besides {name} reads the layer's output, as in a pre-activation network"
                    else:
                        norms[layer] = name
                    continue
                for behind in self._summands(node):
                    if behind in self.layers:
                        problems[behind] = f"its output is added to others before {name} normalises it, as in a pre-activation network"
        return norms

    def _activations(self, norms: dict[str, str], problems: dict[str, str]) -> dict[str, str]:
        """Rectifier → the layer that owns it."""
        layer_of = {norm: layer for layer, norm in norms.items()}
        owners: dict[str, str] = {}
        for name in (name for name in self.order if isinstance(self.modules[name], RECTIFIERS)):
            reads = self.calls[name].read
            behind = [layer_of.get(made, made) for node in reads for made in self._summands(node)]
            behind = [layer for layer in dict.fromkeys(behind) if layer in self.layers and layer not in problems]
            if not behind:
                continue
            owner = max(behind, key=lambda layer: (self._depth(self.calls[layer].made[-1]), list(self.order).index(layer)))
            if len(reads) > 1 or len(self.calls[owner].made) > 1:
                for layer in behind:
                    problems[layer] = f"{name} or the layer is called more than once; give every place an nn.ReLU of its own"
                continue
            end = self.calls[norms.get(owner, owner)].made[-1]
            if not self._leads_only_to(end, reads[0]):
                problems[owner] = f"something besides {name} reads what {name} rectifies, as in a pre-activation network"
                continue
            owners[name] = owner
        owned = set(owners.values())
        self._anonymous({name for name in self.layers if name not in owned}, layer_of, problems)
        return owners

    def _leads_only_to(self, node: _Node, end: _Node) -> bool:
        """Whether one addition after the other reads `node`, up to `end`, and one rectifier reads that."""
        while len(self.readers.get(node, ())) == 1:
            if node is end:
                return True
            (node,) = self.readers[node]
        return False

    def _anonymous(self, layers: set[str], layer_of: dict[str, str], problems: dict[str, str]) -> None:
        """Find rectifiers that are no module: F.relu in somebody's forward."""
        rectified = {node for name, calls in self.calls.items() if isinstance(self.modules[name], RECTIFIERS) for node in calls.made}
        nodes = {node for found in self.readers.values() for node in found}
        for node in nodes:
            if node in rectified or not node.name().startswith(_RECTIFYING):
                continue
            for made in self._summands(node.next_functions[0][0]):
                layer = layer_of.get(made, made)
                if layer in layers and layer not in problems:
                    problems[layer] = "it is rectified by a function (F.relu, torch.relu, clamp); use an nn.ReLU module there"

    def _summands(self, node: _Node) -> Iterator[str]:
        """The modules whose outputs reach `node` through nothing but additions."""
        if node is None:
            return
        if node in self.maker:
            yield self.maker[node]
        elif node.name().startswith("AddBackward"):
            for parent, _ in node.next_functions:
                yield from self._summands(parent)

    def _depth(self, node: _Node) -> int:
        """The number of layers on the longest way from the input to `node`."""
        stack = [node]
        while stack:
            here = stack[-1]
            parents = [parent for parent, _ in here.next_functions if parent is not None]
            missing = [parent for parent in parents if parent not in self.depths]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            self.depths[here] = max((self.depths[p] for p in parents), default=0) + (self.maker.get(here) in self.layers)
        return self.depths[node]

    def _source(self, name: str, owners: dict[str, str]) -> str | None:
        """The layer whose activation `name` reads in every call, with channels in their order."""
        found = {self._activation_behind(node) for node in self.calls[name].read}
        activation = found.pop() if len(found) == 1 else None
        source = owners.get(activation) if activation is not None else None
        if source is None:
            return None
        layer, maker = self.layers[name], self.layers[source]
        assert isinstance(layer.weight, Tensor) and isinstance(maker.weight, Tensor)
        return source if layer.weight.size(1) * getattr(layer, "groups", 1) % maker.weight.size(0) == 0 else None

    def _activation_behind(self, node: _Node) -> str | None:
        while node is not None and node not in self.maker:
            if not node.name().startswith(_KEEPING_CHANNELS):
                return None
            node = node.next_functions[0][0]
        return self.maker.get(node)


def _readers(ends: Collection[_Node]) -> dict[_Node, set[_Node]]:
    """Node → the nodes that read what it made, in the graph that ends in `ends`."""
    readers: dict[_Node, set[_Node]] = {}
    stack, seen = [end for end in ends if end is not None], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for parent, _ in node.next_functions:
            if parent is not None:
                readers.setdefault(parent, set()).add(node)
                stack.append(parent)
    return readers
