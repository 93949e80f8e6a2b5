"""The routes of a mixed layer's convolution give the same result and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qprune import SearchSpace
from qprune.gates import Gate
from qprune.kernels import InputError, routes
from qprune.nn import MixedConv2d
from qprune.nn.premix import Premix

JOINT = SearchSpace((2, 4, 8), (2, 4, 8), joint=True, granularity="filter")
LAYERS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "3x3": ((6, 8, 3), {"padding": 1, "bias": False}),
    "1x1 with bias": ((6, 8, 1), {}),
    "strided, dilated": ((6, 8, 3), {"stride": (2, 1), "padding": (2, 1), "dilation": (2, 1)}),
    "groups": ((6, 9, 3), {"padding": 1, "groups": 3}),
    "same": ((6, 8, 5), {"padding": "same"}),
}


def _layer(name: str, space: SearchSpace = JOINT) -> MixedConv2d:
    arguments, options = LAYERS[name]
    layer = MixedConv2d(*arguments, **options, space=space)
    for module in layer.modules():
        if isinstance(module, Gate):
            nn.init.normal_(module.logits)
    layer.input_quantizer.calibrate(_input())
    return layer


def _input(channels: int = 6, signed: bool = False) -> Tensor:
    x = torch.randn(2, channels, 9, 8, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    return x if signed else x.relu()


def _results(layer: nn.Module, x: Tensor, route: str) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with routes.forced(route):
        y = layer(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}}


def _assert_same(layer: nn.Module, x: Tensor) -> None:
    want, got = _results(layer, x, "library"), _results(layer, x, "fused")
    assert got.keys() == want.keys() == {"y", "x", *(name for name, _ in layer.named_parameters())}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mode", ["relaxed", "sampled", "fixed"])
@pytest.mark.parametrize("name", LAYERS)
def test_joint(name: str, mode: str) -> None:
    layer = _layer(name)
    layer.weight_gate.mode = mode
    _assert_same(layer, _input())


def test_a_signed_input_with_learned_offset() -> None:
    space = SearchSpace((2, 4), (4, 8), joint=True, input_quantizer="lsq+")
    layer = _layer("3x3", space)
    layer.input_quantizer.calibrate(_input(signed=True))
    _assert_same(layer, _input(signed=True))


@pytest.mark.parametrize("space", [SearchSpace((2, 4, 8), (2, 4, 8), granularity="filter"), JOINT], ids=["factorised", "joint"])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "premixed"])
def test_depthwise(space: SearchSpace, together: bool) -> None:
    layer = MixedConv2d(6, 6, 3, padding=1, groups=6, space=space)
    layer.input_quantizer.calibrate(_input())
    model: nn.Module = nn.Sequential(layer, MixedConv2d(6, 4, 1, space=space))
    model[1].input_quantizer.calibrate(layer(_input()))  # type: ignore[index, operator]
    if not together:
        _assert_same(model, _input())
        return
    with Premix(model):
        _assert_same(model, _input())


def test_every_filter_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard gate tells the fused kernel which quantizer each filter uses; straight-through gates need all of the weight's gradient."""
    import qprune.kernels as kernels

    calls: list[tuple[Any, ...]] = []
    original = kernels.mixed_conv2d
    monkeypatch.setattr(kernels, "mixed_conv2d", lambda *a: (calls.append(a), original(*a))[1])
    layer = _layer("3x3")
    for mode in ("relaxed", "sampled", "fixed"):
        layer.weight_gate.mode = mode
        with routes.forced("fused"):
            layer(_input())
    choices, every = [a[6] for a in calls], [a[7] for a in calls]
    assert choices[0] is None
    chosen = layer.weight_gate.logits.argmax(1)
    assert choices[1].tolist() == [layer.pair_groups[int(k)] for k in chosen]
    assert choices[2].tolist() == [layer.pair_groups[int(k)] for k in layer.weight_gate.choice]
    assert every == [True, True, False]


def test_other_padding_takes_the_library() -> None:
    layer = MixedConv2d(6, 8, 3, padding=1, padding_mode="circular", space=JOINT)
    layer.input_quantizer.calibrate(_input())
    _assert_same(layer, _input())


def test_a_measured_shape_goes_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(routes.MEASURED, (9, 64, 64, 3), "fused")
    assert routes.by_table(routes.Shape(9, 64, 64, 3)) == "fused"
    assert routes.by_table(routes.Shape(9, 64, 64, 2)) == "library"


def test_routes() -> None:
    x = torch.zeros(1)
    assert routes.joint(routes.Shape(1, 64, 256, 3), x) == "library"  # no fused kernel on a CPU
    assert not routes.depthwise(x)
    assert routes.by_table(routes.Shape(1, 64, 256, 3)) == "fused"
    assert routes.by_table(routes.Shape(1, 256, 1024, 3)) == "library"
    assert routes.by_table(routes.Shape(9, 64, 64, 3)) == "library"
    assert routes.by_table(routes.Shape(1, 64, 256, 1)) == "library"
    assert routes.by_table(routes.Shape(9, 64, 64, 3, sampled=True)) == "fused"
    with routes.forced("fused"), routes.forced(None):
        assert routes.joint(routes.Shape(1, 64, 256, 3), x) == "library"
    with pytest.raises(InputError, match="route: expected one of library, fused, got 'gpu'"):
        routes.forced("gpu")
