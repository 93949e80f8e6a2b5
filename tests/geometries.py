"""Geometries of ImageNet networks at 224 x 224, written down from their definitions: nothing is built or run."""

from __future__ import annotations

from qprune.geometry import Geometry, LayerGeometry


def _conv(name: str, inputs: int, filters: int, kernel: int, side: int, groups: int = 1) -> LayerGeometry:
    return LayerGeometry(name, "Conv2d", filters, inputs // groups, kernel * kernel, groups, side * side)


def _linear(name: str, inputs: int, filters: int) -> LayerGeometry:
    return LayerGeometry(name, "Linear", filters, inputs, 1, 1, 1)


def _geometry(layers: list[LayerGeometry]) -> Geometry:
    return Geometry({layer.name: layer for layer in layers})


def resnet18() -> Geometry:
    """He et al. (1512.03385), table 1, with 1x1 convolutions on the shortcuts that change width."""
    layers = [_conv("conv1", 3, 64, 7, 112)]
    width = 64
    for stage, (filters, side) in enumerate([(64, 56), (128, 28), (256, 14), (512, 7)], start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            layers += [_conv(f"{name}.conv1", width, filters, 3, side), _conv(f"{name}.conv2", filters, filters, 3, side)]
            if width != filters:
                layers.append(_conv(f"{name}.shortcut", width, filters, 1, side))
            width = filters
    return _geometry([*layers, _linear("fc", width, 1000)])


def mobilenet_v2() -> Geometry:
    """Sandler et al. (1801.04381), table 2: (expansion, filters, blocks, stride of the first)."""
    layers, width, side = [_conv("conv1", 3, 32, 3, 112)], 32, 112
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for stage, (expansion, filters, blocks, stride) in enumerate(table, start=1):
        for block in range(blocks):
            name, hidden = f"layer{stage}.{block}", width * expansion
            if expansion > 1:
                layers.append(_conv(f"{name}.expand", width, hidden, 1, side))
            side //= stride if block == 0 else 1
            layers.append(_conv(f"{name}.depthwise", hidden, hidden, 3, side, groups=hidden))
            layers.append(_conv(f"{name}.project", hidden, filters, 1, side))
            width = filters
    return _geometry([*layers, _conv("conv2", width, 1280, 1, side), _linear("fc", 1280, 1000)])
