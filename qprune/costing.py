"""`qprune cost`: the cost of a named network with a policy, from the words of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from qprune.cost import Cost, cost, geometry_of
from qprune.errors import InputError
from qprune.geometry import Geometry
from qprune.groups import channel_groups
from qprune.policy import LayerBits, Policy
from qprune.record import Record, attach
from qprune.tasks import models


def cost_report(
    model: str,
    policy_file: Path | None,
    bits: str,
    edge_bits: int,
    input_shape: str,
    num_classes: int,
    convention: str,
    preactivation: bool,
) -> tuple[str, Cost, Geometry]:
    """(title, cost, geometry). Raises InputError for words that cannot be read, PolicyMismatchError for a policy of another network."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", input_shape)
    if not match or "0" in match.groups():
        raise InputError(f"input_shape: expected channels x height x width like 3x32x32, got {input_shape!r}")
    channels, height, width = (int(n) for n in match.groups())
    if policy_file is not None and bits:
        raise InputError("give a policy file or --bits, not both")
    options = {"preactivation": True} if preactivation else {}
    net = models.for_task(model, _Shape(channels, height, num_classes), **options)
    example = torch.zeros(1, channels, height, width)
    geometry = Geometry(geometry_of(net, example).layers, channel_groups(net, example))
    attach(net, Record(geometry))
    policy = _policy(geometry, policy_file, bits, edge_bits, net)
    what = str(policy_file) if policy_file is not None else bits or "float"
    return f"{model}, {input_shape}, {what}, BOPs by convention {convention!r}", cost(net, convention=convention, policy=policy), geometry


class _Shape:
    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        self.in_channels, self.image_size, self.num_classes = in_channels, image_size, num_classes


def _policy(geometry: Geometry, file: Path | None, bits: str, edge_bits: int, net: nn.Module) -> Policy | None:
    if file is not None:
        return Policy.load(file)
    if not bits:
        return None
    match = re.fullmatch(r"w(\d+)a(\d+)", bits)
    if not match:
        raise InputError(f"bits: expected a uniform policy like w4a4, got {bits!r}")
    names = list(geometry.layers)
    edge = LayerBits(edge_bits, edge_bits)
    return Policy.uniform(geometry, int(match[1]), int(match[2]), {names[0]: edge, names[-1]: edge})
