"""Which normalisation reads exactly one layer's output: found by running the network, whatever its code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from qprune.errors import InputError
from qprune.geometry import ExampleInputs, channel_axis, first_input, run
from qprune.modes import kept_modes


class Stays(Exception):
    """Why a normalisation cannot be folded."""


@torch.no_grad()
def normalised_layers(model: nn.Module, example_inputs: ExampleInputs, wanted: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(normalisation → the layer whose output it reads and nothing else depends on, normalisation → why there is none), for `wanted`.

    The model runs in eval mode with example_inputs, then again with the outputs of those layers replaced by NaN behind which the
    normalisations give what they gave before: whatever code lies between, what depends on the outputs by another way shows it, in what
    the model returns or in what one of those layers reads. Raises InputError for a model that returns no tensor.
    """
    seen = _Calls()
    with _hooked(model, seen):
        before = _outputs(model, example_inputs)
    if not before:
        raise InputError("the model returned no tensor for example_inputs, so nothing shows who reads what")
    found, reasons = dict[str, str](), dict[str, str]()
    for norm in wanted:
        try:
            found[norm] = seen.layer_of(norm)
        except Stays as reason:
            reasons[norm] = str(reason)

    def alone(pairs: Mapping[str, str]) -> bool:
        cut = _Cut(pairs, seen)
        with _hooked(model, cut):
            try:
                after = _outputs(model, example_inputs)
            except Exception:  # whatever a network makes of NaN
                return False
        return cut.same and len(before) == len(after) and all(map(_same, before, after))

    if len(set(found.values())) < len(found) or not alone(found):
        for norm, layer in list(found.items()):
            if not alone({norm: layer}):
                del found[norm]
                reasons[norm] = f"something besides it depends on the output of layer {layer}"
    return found, reasons


def _same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x, y) or (x.shape == y.shape and x.is_floating_point() and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True))


def _outputs(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with kept_modes(model), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return [value.clone() for value in tree_leaves(run(model.eval(), example_inputs)) if isinstance(value, Tensor)]


class _Calls:
    """What layers and norms read and made in one run. Tensors are kept, so that an identity is one."""

    def __init__(self) -> None:
        self.made: dict[str, list[tuple[Tensor, int]]] = {}
        self.read: dict[str, list[tuple[Tensor, int]]] = {}
        self.inputs: dict[str, Tensor] = {}
        self.normalised: dict[str, Tensor] = {}
        self.axes: dict[str, int] = {}

    def on_layer(self, name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        self.made.setdefault(name, []).append((y, y._version))
        self.inputs[name], self.axes[name] = x.clone(), channel_axis(layer)

    def on_norm(self, name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        self.read.setdefault(name, []).append((x, x._version))
        self.normalised[name] = y.clone()

    def layer_of(self, norm: str) -> str:
        reads = self.read.get(norm, [])
        if len(reads) != 1:
            raise Stays("it is not called" if not reads else f"it is called {len(reads)} times")
        x, version = reads[0]
        layer = next((name for name, calls in self.made.items() if any(y is x for y, _ in calls)), None)
        if layer is None:
            raise Stays("what it reads is no layer's output as it is")
        if len(self.made[layer]) != 1:
            raise Stays(f"layer {layer} is called {len(self.made[layer])} times")
        if self.made[layer][0][1] != version:
            raise Stays(f"the output of layer {layer} is changed in place before")
        if x.dim() + self.axes[layer] != 1:
            raise Stays(f"it normalises another dimension than the filters of layer {layer}")
        return layer


class _Cut(_Calls):
    """Layers give NaN, and their norms nevertheless what they gave before. same: every such layer still read what it had read."""

    def __init__(self, pairs: Mapping[str, str], seen: _Calls) -> None:
        self.pairs, self.layers, self.seen, self.same = pairs, set(pairs.values()), seen, True

    def on_layer(self, name: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:  # type: ignore[override]
        if name not in self.layers:
            return None
        self.same &= _same(x, self.seen.inputs[name])
        return torch.full_like(y, torch.nan)

    def on_norm(self, name: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:  # type: ignore[override]
        return self.seen.normalised[name].clone() if name in self.pairs else None


@contextmanager
def _hooked(model: nn.Module, calls: _Calls) -> Iterator[None]:
    def hook(name: str, callback: Callable[[str, nn.Module, Tensor, Tensor], Any]) -> Any:
        return lambda module, args, kwargs, y: callback(name, module, first_input(args, kwargs), y)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear | _BatchNorm):
            callback = calls.on_norm if isinstance(module, _BatchNorm) else calls.on_layer
            handles.append(module.register_forward_hook(hook(name, callback), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
