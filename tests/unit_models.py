"""Small networks whose activations can be quantized where they are produced, and data that they learn in seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qprune
from qprune.gates import FilterGate
from qprune.record import record_of
from qprune.tasks.resnet import BasicBlock

PAIRS = ((3, 2), (3, 4), (4, 4), (8, 8))


def chain(layers: int = 2, filters: int = 4, groups: int = 1) -> nn.Module:
    """`layers` times conv-BN-ReLU, then pool and a classifier of 3 classes."""
    parts: list[nn.Module] = []
    for i in range(layers):
        inputs = 1 if i == 0 else filters
        conv = nn.Conv2d(inputs, filters, 3, padding=1, bias=False, groups=groups if i else 1)
        parts += [conv, nn.BatchNorm2d(filters), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, 3))


def block_net(width: int = 4) -> nn.Module:
    """A stem, an identity block and a block with a shortcut convolution, then pool and a classifier of 3 classes."""
    stem = (nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks = (BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3))


def batches(count: int, seed: int = 0, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Three classes of 8x8 images that differ in which third of the image is bright."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        y = torch.randint(0, 3, (size,), generator=g)
        x = 0.3 * torch.randn(size, 1, 8, 8, generator=g)
        for i, c in enumerate(y.tolist()):
            x[i, :, 3 * c : 3 * c + 2] += 1.0
        found.append((x, y))
    return found


def prepared(net: nn.Module, rules: dict[str, Any] | None = None, spread: float = 0.0, seed: int = 0, **space: Any) -> nn.Module:
    """The network with units, in calibrated form; logits get normal noise of standard deviation `spread`."""
    options = {
        "pairs": PAIRS,
        "granularity": "filter",
        "placement": "output",
        "weight_quantizer": "nice",
        "input_quantizer": "nice",
        **space,
    }
    data = batches(2)
    model = qprune.prepare(net, qprune.SearchSpace(**options), rules or {}, data[0][0])
    qprune.calibrate(model, [x for x, _ in data])
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FilterGate):
                module.mode = "fixed"
                module.logits += spread * torch.randn(module.logits.shape, generator=g)
    return model


def units(model: nn.Module) -> dict[str, Any]:
    """The convolutions of the units, in the order of their first use."""
    record = record_of(model)
    assert record is not None and record.geometry is not None
    modules = dict(model.named_modules())
    return {name: modules[name] for name in record.geometry.layers if hasattr(modules[name], "candidates")}
