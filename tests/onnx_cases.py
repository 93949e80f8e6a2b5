"""Networks, policies, and the comparison of an ONNX file with the network that it was made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import qprune
from qprune.export.parity import ParityReport, parity
from qprune.export.plain import Rectified, Rounded, deployable
from qprune.policy import LayerBits
from qprune.record import record_of

BITS = (2, 3, 4, 5, 8, 32)


class Wired(nn.Module):
    """Convolutions with bias and without normalisation, a residual addition, a depthwise one, a concatenation and a pool, on 12 x 12."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.act1, self.pool = nn.Conv2d(3, 8, 3, padding=1), activation(), nn.MaxPool2d(2)
        self.left, self.norm, self.act2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        self.depthwise, self.act3 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()
        self.head, self.act4 = nn.Conv2d(16, 12, 1), nn.ReLU()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act1(self.stem(x)))
        y = self.act2(self.norm(self.left(x)) + x)
        y = torch.cat([self.act3(self.depthwise(y)), y], 1)
        return self.fc(self.act4(self.head(y)).mean((2, 3)))


def images(size: int = 12, channels: int = 3, batch: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def converted(
    build: Callable[[], nn.Module],
    x: Tensor,
    bits: Sequence[int] = BITS,
    per_filter: bool = True,
    a_bits: Sequence[int] | None = None,
    **space: Any,
) -> nn.Module:
    """The network with random weights and bits, after calibration on x; normalisations have statistics and scales of their own."""
    draw = random.Random(len(bits) + per_filter)
    torch.manual_seed(1)
    net = build()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    net.train()(x)
    a_bits = [b for b in bits if b] if a_bits is None else a_bits
    granularity = "filter" if per_filter else "layer"
    output = space.get("placement") == "output"
    pairs = {"pairs": [(b, b) for b in bits]} if output else {"w_bits": tuple(bits), "a_bits": tuple(a_bits)}
    model = qprune.prepare(net, qprune.SearchSpace(granularity=granularity, **pairs, **space), example_inputs=x)
    qprune.calibrate(model, [x])
    record = record_of(model)
    assert record is not None and record.geometry is not None
    layers = {}
    for name, layer in record.geometry.layers.items():
        chosen = tuple(draw.choice(bits) for _ in range(layer.filters)) if per_filter else draw.choice([b for b in bits if b])
        unit = record.geometry.units.get(name)
        if not output:
            layers[name] = LayerBits(chosen, draw.choice(a_bits))
        else:
            own = unit is None or unit.source is None
            layers[name] = LayerBits(chosen, 8 if own else 32, None if unit is None or unit.activation is None else chosen)
    return qprune.convert(model, qprune.Policy(layers, record.geometry)).eval()


def assert_parity(path: Path, model: nn.Module, x: Tensor) -> ParityReport:
    """Outputs are equal to 1e-5, with optimisations and without, but in samples where an activation lies at a rounding boundary: their
    first codes that differ do so by one, where the value is a rounding error away from the middle of two levels."""
    report = parity(path, model, x)
    for difference, optimised in ((report.exact, False), (report.optimised, True)):
        assert difference.values > 0 and difference.largest < 1
        if difference.share:
            flips, share = first_flips(path, model, x, optimised)
            assert share <= 1e-3
            assert len(flips) >= difference.samples * len(x), "outputs differ in samples whose codes are equal"
            for name, distance, step in flips.values():
                assert step < 1.001 and distance < 2e-3, f"{name}: codes differ by {step}, {distance} off the middle of two levels"
            assert difference.samples <= 0.25
    return report


def first_flips(path: Path, model: nn.Module, x: Tensor, optimised: bool) -> tuple[dict[int, tuple[str, float, float]], float]:
    """For every sample with differing codes, the first quantizer where they differ: its name, and over the differing values the largest
    distance of value/scale from the middle of two levels, and the largest difference in levels. And the share of all codes that differ."""
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    plain = deployable(model)
    for name, module in plain.named_modules():
        if isinstance(module, Rounded | Rectified):
            module.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (args[0], y, m.step)}))
    plain(x)
    proto = onnx.load(path)
    outputs = {}
    for node in proto.graph.node:
        owner = node.name.split("/")[0].removesuffix(".rounded")
        if node.op_type == "DequantizeLinear" and owner in seen:
            outputs[owner] = node.output[0]
    assert outputs
    known = {item.name for item in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=value) for value in outputs.values() if value not in known)
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = list(outputs.values())
    values = dict(zip(names, session.run(names, {session.get_inputs()[0].name: x.numpy()}), strict=True))
    flips: dict[int, tuple[str, float, float]] = {}
    differing, total = 0, 0
    for name, (before, after, step) in seen.items():
        if name not in outputs:
            continue  # the same values on the same grid as another's, which torch.onnx has merged
        scale = step.view(-1, *[1] * (before.dim() - 2)) if step.dim() else step
        levels = ((torch.from_numpy(np.asarray(values[outputs[name]])) - after) / scale).abs()
        distance = ((before / scale) % 1 - 0.5).abs()
        differing, total = differing + int((levels > 0.5).sum()), total + levels.numel()
        for sample in range(len(x)):
            differs = levels[sample] > 0.5
            if sample not in flips and differs.any():
                flips[sample] = (name, float(distance[sample][differs].max()), float(levels[sample][differs].max()))
    return flips, differing / total


def codes_of(path: Path) -> dict[str, onnx.TensorProto]:
    """The integer weights of a file by layer."""
    return {item.name.split(".weight.codes")[0]: item for item in onnx.load(path).graph.initializer if ".weight.codes" in item.name}
