"""What every layer reads, as a function of what the others produced: one run of the network, with gradients cut at every layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qprune.geometry import ChannelGroup, ExampleInputs, channel_axis, first_input, run, weighted_layers

_TOLERANCE = 1e-4


class Probe:
    """read: layer or carrier name → its inputs, one per call; made: layer name → the outputs it seemed to give, random leaves of autograd
    instead of the real ones, so that no dead ReLU hides a path; foreign: other leaves (the network's input, embeddings)."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, carriers: Collection[str] = ()) -> None:
        self.read: dict[str, list[Tensor]] = {}
        self.made: dict[str, list[Tensor]] = {}
        self.foreign: list[Tensor] = []
        self.random = torch.Generator().manual_seed(0)
        self.axes = {name: channel_axis(layer) for name, layer in weighted_layers(model)}
        handles = [layer.register_forward_hook(self._cut(name), with_kwargs=True) for name, layer in weighted_layers(model)]
        handles += [
            module.register_forward_hook(self._cut(None), with_kwargs=True)
            for module in model.modules()
            if isinstance(module, nn.Embedding)
        ]
        handles += [model.get_submodule(name).register_forward_pre_hook(self._watch(name), with_kwargs=True) for name in carriers]
        inputs = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
        try:
            run(model, tree_map(self._leaf, inputs))
        finally:
            for handle in handles:
                handle.remove()

    def _cut(self, name: str | None):  # type: ignore[no-untyped-def]
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
            leaf = torch.randn(y.shape, generator=self.random).to(y).requires_grad_()
            if name is None:
                self.foreign.append(leaf)
            else:
                self.made.setdefault(name, []).append(leaf)
                self.read.setdefault(name, []).append(first_input(args, kwargs).clone())
            return leaf.clone()

        return hook

    def _watch(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = first_input(args, kwargs)
            self.axes[name] = 1 - x.dim()
            self.read.setdefault(name, []).append(x.clone())

        return hook

    def _leaf(self, value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        self.foreign.append(value.detach().clone().requires_grad_())
        return self.foreign[-1].clone()

    def sources(self, group: ChannelGroup, reader: str) -> frozenset[str]:
        """The producers that input channel i of a consumer or carrier is a function of, for the pairs (i, r) that the group claims: a
        function of their channel r and of nothing else. Empty if that is not so.

        With a random weight per r, the gradient of the weighted inputs must be the gradient of the unweighted ones, weighted.
        """
        weights = torch.rand(group.size, generator=self.random).double() + 0.5
        pairs = group.consumers[reader] if reader in group.consumers else group.carriers[reader]
        found = [self._sources(x, group, pairs, self.axes[reader], weights) for x in self.read.get(reader, [])]
        return frozenset().union(*found) if all(found) else frozenset()

    def _sources(self, x: Tensor, group: ChannelGroup, pairs: tuple[tuple[int, int], ...], axis: int, weights: Tensor) -> frozenset[str]:
        if not x.requires_grad:
            return frozenset()
        claimed = torch.zeros(x.size(axis), dtype=torch.float64)
        claimed[[i for i, _ in pairs]] = weights[[r for _, r in pairs]]
        claimed = claimed.view(-1, *[1] * (-1 - axis)).to(x)
        plain = torch.randn(x.shape, generator=self.random).to(x) * (claimed > 0)
        leaves = [(name, leaf) for name, leaves in self.made.items() for leaf in leaves] + [("", leaf) for leaf in self.foreign]
        tensors = [leaf for _, leaf in leaves]
        first = torch.autograd.grad(x, tensors, plain, retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(x, tensors, plain * claimed, retain_graph=True, allow_unused=True)
        reached = set()
        for (name, leaf), one, two in zip(leaves, first, second, strict=True):
            if one is None or two is None or not (one.any() or two.any()):
                continue
            if name not in group.producers:
                return frozenset()
            reached.add(name)
            expected = torch.zeros(leaf.size(self.axes[name]), dtype=torch.float64)
            expected[list(group.producers[name])] = weights
            scaled = one * expected.view(-1, *[1] * (-1 - self.axes[name])).to(one)
            tolerance = max(_TOLERANCE, 8 * torch.finfo(one.dtype).eps)
            if not bool((two - scaled).abs().max() <= tolerance * one.abs().max()):
                return frozenset()
        return frozenset(reached)


def confirmed(groups: tuple[ChannelGroup, ...], probe: Probe) -> tuple[ChannelGroup, ...]:
    """The tracer's groups, split by what every consumer and carrier really gets: in a residual stage, the layers before it; behind a
    depthwise layer, that layer. Those that the probe contradicts anywhere are left out; a group whose producers nobody reads together
    remains without.
    """
    sources = [{name: probe.sources(group, name) for name in (*group.consumers, *group.carriers)} for group in groups]
    wrong = {name for found in sources for name, names in found.items() if not names}
    split = []
    for group, found in zip(groups, sources, strict=True):
        for names in dict.fromkeys([*(found[name] for name in found if name not in wrong), frozenset(group.producers)]):
            right = {name for name in found if name not in wrong and found[name] == names}
            split.append(
                replace(
                    group,
                    producers={name: filters for name, filters in group.producers.items() if name in names},
                    consumers={name: pairs for name, pairs in group.consumers.items() if name in right},
                    carriers={name: pairs for name, pairs in group.carriers.items() if name in right},
                )
            )
    return tuple(split)
