"""What a study varies. A kind lists its points with their costs, and makes of the trained float network the one to train for a point."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from qprune.convert import convert
from qprune.cost import cost, geometry_of
from qprune.geometry import Geometry
from qprune.nn.slim import extract, flops, homogeneous, slim
from qprune.options import OptionError
from qprune.policy import LayerBits, Policy
from qprune.prepare import calibrate, prepare
from qprune.study.grid import Point, assigned, partitions, width_grid
from qprune.study.options import StudyOptions
from qprune.tasks.sources import network_of
from qprune.tasks.task import Task

INPUT_BITS = 8  # of the image, as Zur et al. count it
CALIBRATION_BATCHES = 4


class Kind(ABC):
    """options, and the task that they name.

    measure  what costs count, for axes and tables
    """

    measure: str

    def __init__(self, options: StudyOptions, task: Task) -> None:
        self.options, self.task = options, task
        self.example = task.example()

    def float_network(self) -> nn.Module:
        """A new float network, initialised from torch's global generator."""
        return network_of(self.options, self.task)

    @abstractmethod
    def points(self) -> list[Point]:
        """The whole grid, always in the same order. Raises OptionError for options that do not fit the network."""

    @abstractmethod
    def network(self, trained: nn.Module, point: Point, generator: torch.Generator) -> nn.Module:
        """The network of this point, made from the trained float one, which does not change; `generator` draws calibration batches."""


class Bits(Kind):
    """Filter-level quantization (Zur et al., 1904.09872): one layer's filters are shared out between candidate pairs, first filters first;
    all other convolutions have one pair; linear layers stay float. Networks whose varied layer has one candidate are the homogeneous
    ones."""

    measure = "BOPs"

    def points(self) -> list[Point]:
        options, geometry = self.options, self._geometry(self.float_network())
        layer = geometry.layers.get(options.layer)
        if layer is None or "Conv2d" not in layer.kind:
            known = ", ".join(name for name, g in geometry.layers.items() if "Conv2d" in g.kind)
            raise OptionError(f"layer: {options.layer!r} is no convolution of {options.model}; expected one of {known}")
        found = []
        for counts in partitions(layer.filters, len(options.pairs), options.step):
            label = " + ".join(f"{n}×{w}/{a}" for n, (w, a) in zip(counts, options.pairs) if n)
            bops = float(cost(self._policy(geometry, counts), convention=options.convention).bops)
            found.append(Point(label, counts, max(counts) == layer.filters, bops))
        return found

    def network(self, trained: nn.Module, point: Point, generator: torch.Generator) -> nn.Module:
        mixed = self._prepare(trained)
        batches = itertools.islice(self.task.loader("train", self.options.batch_size, generator), CALIBRATION_BATCHES)
        calibrate(mixed, [x for x, _ in batches])
        return convert(mixed, self._policy(geometry_of(mixed), [int(n) for n in point.choice]))

    def _prepare(self, net: nn.Module) -> nn.Module:
        return prepare(net, self.options.space(), example_inputs=self.example)

    def _geometry(self, net: nn.Module) -> Geometry:
        return geometry_of(self._prepare(net))

    def _policy(self, geometry: Geometry, counts: Sequence[int]) -> Policy:
        """Bits of every convolution; the varied layer's by `counts`."""
        layers = {}
        for name, layer in geometry.layers.items():
            if "Conv2d" not in layer.kind:
                continue
            pairs = [self.options.others] * layer.filters
            if name == self.options.layer:
                pairs = [self.options.pairs[k] for k in assigned(counts)]
            unit = geometry.units[name]
            w, out = (tuple(bits) for bits in zip(*pairs))
            layers[name] = LayerBits(w, 32 if unit.source is not None else INPUT_BITS, out if unit.activation is not None else None)
        return Policy(layers, geometry)


class Widths(Kind):
    """Filter pruning: every layer keeps the first share of its filters, one ratio per stage (layers of equal width). The homogeneous
    networks have one ratio throughout. Zur et al. train from random weights; here the kept filters start from the float network's."""

    measure = "MACs"

    def points(self) -> list[Point]:
        net = self._slim(self.float_network())
        found = []
        for ratios in width_grid(len(self._stages(net)), self.options.ratios):
            label = " · ".join(f"{ratio:g}" for ratio in ratios)
            found.append(Point(label, ratios, len(set(ratios)) == 1, float(flops(net, self._widths(net, ratios)))))
        return found

    def network(self, trained: nn.Module, point: Point, generator: torch.Generator) -> nn.Module:
        net = self._slim(trained)
        return extract(net, self._widths(net, point.choice))

    def _slim(self, net: nn.Module) -> nn.Module:
        return slim(net, self.example, self.options.ratios)

    def _stages(self, net: nn.Module) -> list[int]:
        """The full widths that occur, narrowest first."""
        return sorted(set(homogeneous(net, 1.0).values()))

    def _widths(self, net: nn.Module, ratios: Sequence[float]) -> dict[str, int]:
        share = dict(zip(self._stages(net), ratios, strict=True))
        return {name: max(1, int(width * share[width])) for name, width in homogeneous(net, 1.0).items()}


KINDS: dict[str, type[Kind]] = {"bits": Bits, "widths": Widths}
