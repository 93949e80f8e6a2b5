"""What a run with method `annc` does with a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qprune.budget import Budget
from qprune.codebooks import codebooks
from qprune.convert import survives, without_pruned
from qprune.geometry import Geometry, trace_geometry
from qprune.groups import channel_groups
from qprune.nn.codebook import CodebookConv2d, CodebookLinear, codebook_layers, to_codebook
from qprune.nn.surgery import copy_model, replace_modules
from qprune.options import RunOptions
from qprune.policy import Policy
from qprune.prepare import calibrate
from qprune.record import Record, attach, record_of
from qprune.search.annc import Annc
from qprune.search.driver import Search
from qprune.search.sparsity import keep_filters, keep_weights
from qprune.stored import layer_bits


class CodebookRecipe:
    """The method that prunes weights and shares the rest. Its networks are to be fine-tuned with a CodebookRefresh."""

    def __init__(self, options: RunOptions, example: Tensor) -> None:
        self.options, self.example = options, example

    def check(self, net: nn.Module) -> None:
        """Raise InfeasibleBudgetError if nothing that the search could return is within the budget."""
        Annc.check(self._recorded(net), Budget.parse(self.options.budget), self.options.convention)

    def prepare(self, net: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        """A copy of the float network, with its geometry."""
        return self._recorded(net)

    def _recorded(self, net: nn.Module) -> nn.Module:
        copied = copy_model(net)
        attach(copied, Record(Geometry(trace_geometry(copied, self.example), channel_groups(copied, self.example))))
        return copied

    def finish(self, search: Search, policy: Policy, batches: Sequence[Tensor]) -> nn.Module:
        """The network with codebooks, without the filters that have no weight left; the policy is only its summary."""
        return self._calibrated(without_empty_filters(_annc(search).network()), batches)

    def uniform(self, net: nn.Module, search: Search, batches: Sequence[Tensor]) -> tuple[str, nn.Module]:
        """(label, network): the trained float network pruned once to the same share in every layer, all at the bits that the search starts
        from, by magnitude; it costs at least the budget."""
        method = _annc(search)
        bits = self.options.of_search().get("bits", 3)
        width = bits if isinstance(bits, int) else round(sum(bits.values()) / len(bits))
        uniform, share = uniform_network(self._recorded(net), method, width)
        return f"uniform {width} bits, {100 * share:.3g} % kept", self._calibrated(uniform, batches)

    def _calibrated(self, net: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        if any(layer.input_quantizer is not None for _, layer in codebook_layers(net)):
            calibrate(net, batches)
        return net


def without_empty_filters(net: nn.Module) -> nn.Module:
    """A network with codebooks, changed in place, of which the filters that have no weight left are taken out."""
    record = record_of(net)
    if record is None or record.geometry is None:
        return net
    policy = Policy({name: layer_bits(layer) for name, layer in codebook_layers(net)}, record.geometry)
    return without_pruned(net, record, policy) if policy.pruned() and survives(policy.layers, record.geometry) else net


def uniform_network(net: nn.Module, method: Annc, bits: int) -> tuple[nn.Module, float]:
    """(network, share): a copy of `net` in which every layer that `method` compresses keeps the same share of its weights, or filters, the
    largest ones, and all have a codebook of so many bits: the cheapest such network that costs at least the budget, or all weights.
    Layers of which `method` prunes no filter are whole."""
    final = copy_model(net)
    modules = dict(final.named_modules())
    counts = {name: weight.numel() for name, weight in method.weights.items()}
    whole = sum(count for name, count in counts.items() if name in method.whole)
    share = min(1.0, max(method.limit / bits - whole, 0.0) / max(sum(counts.values()) - whole, 1))
    swaps: dict[nn.Module, nn.Module] = {}
    kept_in_all = 0
    for name, a_bits in method.a_bits_of_layers().items():
        layer = modules[name]
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        mask = _largest(layer.weight.detach(), 1.0 if name in method.whole else share, method.granularity)
        book = codebooks({name: layer.weight.detach()[mask]}, (bits,), False, method.linear)[name][bits]
        made: CodebookConv2d | CodebookLinear = to_codebook(layer, mask, book.values, a_bits, method.linear)
        made.layer_name = name
        swaps[layer] = made
        kept_in_all += int(mask.sum())
    final = replace_modules(final, swaps)
    record = record_of(net)
    if record is not None:
        attach(final, record)
    return final, kept_in_all / sum(counts.values())


def _largest(weight: Tensor, share: float, granularity: str) -> Tensor:
    """The mask of the largest weights, or filters: the share, rounded up."""
    items = weight.numel() if granularity == "weight" else len(weight)
    count = max(1, math.ceil(share * items - 1e-9))
    if granularity == "weight":
        return keep_weights({"": weight}, {"": 1}, count).masks[""]
    rows = keep_filters({"": weight}, {"": 1}, count * (weight.numel() // items)).masks[""]
    return rows.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight) & torch.ones_like(weight, dtype=torch.bool)


def _annc(search: Search) -> Annc:
    assert isinstance(search.method, Annc)
    return search.method
