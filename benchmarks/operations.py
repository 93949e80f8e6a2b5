"""How many operations PyTorch is asked for in a training step, which is what the host has to do when a GPU computes:
`python -m benchmarks.operations [--network resnet50]`. Counted on the CPU, forward and backward, without the optimizers (which take a few
operations for all parameters together on a GPU)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qprune.budget import Budget
from qprune.convert import convert
from qprune.geometry import weighted_layers
from qprune.prepare import calibrate, prepare
from qprune.search.driver import Search
from qprune.space import SearchSpace

from .shapes import NETWORKS

SIDES = {"resnet50": 64}
"""Pixels of the images where the network's own size would only take time."""
W_BITS, A_BITS = (2, 3, 4, 6), (2, 4, 8)


class Counter(TorchDispatchMode):
    """Counts what is asked for."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def counted(function: Callable[[], object]) -> int:
    with Counter() as counter:
        function()
    return counter.count


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A named network and two images."""
    factory, side = NETWORKS[name]
    torch.manual_seed(0)
    side = SIDES.get(name, side)
    return factory(), torch.randn(2, 3, side, side)


def searching(net: nn.Module, x: Tensor) -> Search:
    """EdMIPS on a network whose first and last layer are at 8 bits, bits per layer, budget w3a3."""
    names = [name for name, _ in weighted_layers(net)]
    edge = SearchSpace.fixed(8, 8)
    model = prepare(net, SearchSpace(W_BITS, A_BITS), rules={names[0]: edge, names[-1]: edge}, example_inputs=x)
    return Search(calibrate(model, [x]), Budget(bops="w3a3"))


def operations(name: str) -> dict[str, int]:
    """Of the steps of a float training, a search, and a network with fixed bits."""
    net, x = network(name)
    y = torch.zeros(len(x), dtype=torch.int64)
    found = {"float": counted(lambda: F.cross_entropy(net(x), y).backward())}
    search = searching(net, x)
    search.step(lambda m: F.cross_entropy(m(x), y))
    final = convert(search.model, search.policy())
    nothing: Any = lambda: None  # noqa: E731
    search.method.optimizers.step_weights = search.method.optimizers.step_arch = nothing
    found["search"] = counted(lambda: search.step(lambda m: F.cross_entropy(m(x), y)))
    found["fixed"] = counted(lambda: F.cross_entropy(final(x), y).backward())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operations", description="Operations of a training step.")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet50")
    for name, count in operations(parser.parse_args(arguments).network).items():
        print(f"{name}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
