"""Networks of integers: equal to the fake-quantized ones but for rounding, and told where they are not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qprune
from qprune import Policy, SearchSpace, UnsupportedLayerError, VerificationError, convert, load_packed, prepare, save_packed, verify
from qprune.codes import input_codes, weight_codes
from qprune.cost import geometry_of
from qprune.errors import InputError
from qprune.integer_reference import InputGrid, IntegerLayer, signed_bits
from qprune.nn import QuantActivation, QuantConv2d, QuantLinear
from qprune.nn.codebook import to_codebook
from qprune.policy import LayerBits
from qprune.tasks import models

NETWORKS = {
    "resnet8": lambda: models.resnet8(in_channels=1),
    "thin_resnet": lambda: models.thin_resnet(in_channels=1),
    "resnet20": lambda: models.resnet20(in_channels=1),
    "mobilenet": lambda: models.mobilenet(in_channels=1),
    "lenet5": lambda: models.lenet5(in_channels=1, image_size=16),
}


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def final_model(name: str, w_bits: tuple[int, ...], a_bits: tuple[int, ...], **space: Any) -> nn.Module:
    torch.manual_seed(0)
    mixed = prepare(NETWORKS[name](), SearchSpace(w_bits, a_bits, granularity="filter", **space), example_inputs=images(2))
    qprune.calibrate(mixed, [images(16)])
    geometry = geometry_of(mixed)
    last = list(geometry.layers)[-1]
    layers = {
        layer.name: (
            tuple(w_bits[(f + i) % len(w_bits)] for f in range(layer.filters)) if layer.name != last else max(w_bits),
            a_bits[i % len(a_bits)],
        )
        for i, layer in enumerate(geometry.layers.values())
    }
    final = convert(mixed, Policy(layers, geometry)).train()
    with torch.no_grad():
        for seed in range(12):
            final(images(16, seed))
    return final.eval()


def layer(cls: type = QuantConv2d, *args: Any, signed: bool = True, x: Tensor | None = None, **options: Any) -> Any:
    torch.manual_seed(1)
    made = cls(*args, **options)
    if x is None:
        x = torch.randn(4, args[0], 9, 9) if cls is QuantConv2d else torch.randn(50, args[0])
    made.input_quantizer.calibrate(x if signed else x.relu())
    return made.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name: str) -> None:
    final = final_model(name, (2, 3, 4, 8) if name == "lenet5" else (0, 2, 3, 4, 8), (4, 8))
    found = verify(final, [(images(8, 50), torch.zeros(8, dtype=torch.int64)), (images(8, 51), torch.zeros(8, dtype=torch.int64))])
    assert found.ok, str(found)
    assert found.samples == 16 and found.agreement is not None and found.agreement >= 15 / 16
    assert {row.status for row in found.layers} == {"integer"}
    assert all(0 < row.error < 1 and row.difference < 1e-5 for row in found.layers)
    assert all(1 < row.observed_bits <= row.worst_bits <= 32 for row in found.layers)
    assert found.changed or found.difference < 1e-5
    assert found.worst is not None and found.worst.error == max(row.error for row in found.layers)
    assert found.accumulator_bits == max(row.worst_bits for row in found.layers)
    shown = str(found)
    assert all(row.name in shown for row in found.layers) and "ok: 16 samples" in shown


@pytest.mark.parametrize(
    "space", [{"weight_quantizer": "dorefa", "input_quantizer": "lsq+"}, {"weight_quantizer": "symmetric", "scales": "layer"}]
)
def test_grids_without_a_level_at_zero(space: dict[str, Any]) -> None:
    found = verify(final_model("resnet8", (1, 2, 5, 8), (1, 2, 8), **space), [images(8, 50)])
    assert found.ok and all(row.status == "integer" for row in found.layers), str(found)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1, "stride": 2},
    "same": {"padding": "same", "dilation": 2},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1, "bias": False},
}


@pytest.mark.parametrize("kind", ["pact", "lsq+"])
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_on_signed_inputs(geometry: str, bits: int, kind: str) -> None:
    conv = layer(QuantConv2d, 4, 8, 3, w_bits=(1, 2, 3, 4, 5, 6, 7, 8), a_bits=bits, input_quantizer=kind, **GEOMETRIES[geometry])
    found = verify(nn.Sequential(conv), [torch.randn(3, 4, 9, 9)])
    (row,) = found.layers
    assert found.ok and row.status == "integer" and 0 < row.error < 0.5, str(found)


def test_the_sums_are_those_of_integers() -> None:
    """Against products of unfolded int64 codes."""
    conv = layer(QuantConv2d, 4, 6, 3, w_bits=(2, 3, 4, 5, 8, 8), a_bits=5, padding=2, stride=2, dilation=2, groups=2)
    codes = input_codes(conv)
    assert codes is not None
    made = IntegerLayer(conv, weight_codes(conv), InputGrid.of(codes))
    x = made.grid.codes(codes.levels(torch.randn(2, 4, 9, 9)))
    sums = made.accumulate(x)
    columns = F.unfold(x.double(), 3, 2, 2, 2).long().view(2, 2, 1, 18, -1)
    expected = (made.codes.long().view(1, 2, 3, 18, 1) * columns).sum(3).reshape(sums.shape)
    assert sums.dtype == torch.int32 and torch.equal(sums.long(), expected)
    assert made.bound.low <= int(sums.min()) and int(sums.max()) <= made.bound.high


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("signed", [False, True])
def test_the_worst_case_is_attained(bits: int, signed: bool) -> None:
    """Every input of three features, and every part of the sums, by trying."""
    linear = layer(QuantLinear, 3, 4, w_bits=(1, 2, 3, 4), a_bits=bits, signed=signed)
    codes = input_codes(linear)
    assert codes is not None
    made = IntegerLayer(linear, weight_codes(linear), InputGrid.of(codes))
    levels = sorted({0} | {int(made.grid.codes(torch.tensor([float(q)]))) for q in range(codes.steps + 1)})
    inputs = torch.tensor(list(itertools.product(levels, repeat=3)), dtype=torch.int32)
    sums = made.accumulate(inputs)
    assert (made.bound.low, made.bound.high) == (int(sums.min()), int(sums.max()))


@pytest.mark.parametrize(
    ("low", "high", "bits"), [(0, 0, 1), (-1, 0, 1), (0, 1, 2), (-2, 1, 2), (-3, 1, 3), (-128, 127, 8), (-128, 128, 9), (0, 255, 9)]
)
def test_signed_bits(low: int, high: int, bits: int) -> None:
    assert signed_bits(low, high) == bits


def test_an_accumulator_that_may_overflow() -> None:
    linear = layer(QuantLinear, 70_000, 1, w_bits=8, a_bits=8, bias=False, signed=False)
    with torch.no_grad():
        linear.weight.fill_(5.0)
    found = verify(linear, [torch.rand(2, 70_000)])
    (row,) = found.layers
    assert row.worst_bits == 33 and row.observed_bits < 32
    assert row.status == "failed" and row.reason == "its accumulator may need 33 bits" and not found.ok
    assert row.error < 1


def test_a_wrong_scale_is_found(tmp_path: Any) -> None:
    save_packed(final_model("resnet8", (2, 4, 8), (4, 8)), tmp_path / "net")
    again = load_packed(tmp_path / "net", NETWORKS["resnet8"])
    assert verify(again, [images(8)], strict=True).ok
    wrong = dict(again.named_modules())["layer2.0.conv1"]
    assert isinstance(wrong, QuantConv2d)
    wrong.weight_quantizer.scale[5] *= 1.0001
    found = verify(again, [images(8)])
    assert not found.ok and found.worst is not None and found.worst.name == "layer2.0.conv1" and found.worst.error > 10
    assert [row.name for row in found.layers if row.status == "failed"] == ["layer2.0.conv1"]
    with pytest.raises(VerificationError, match=r"layer layer2\.0\.conv1: its output differs .* times as much as rounding") as error:
        verify(again, [images(8)], strict=True)
    assert isinstance(error.value.verification, qprune.Verification) and error.value.verification.layers == found.layers


def test_a_wrong_bias_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = layer(QuantConv2d, 2, 4, 3, w_bits=4, a_bits=4)
    forward = conv.forward
    monkeypatch.setattr(conv, "forward", lambda x: forward(x) + 1e-4)
    found = verify(nn.Sequential(conv), [torch.randn(2, 2, 9, 9)])
    assert found.layers[0].reason == "the layer itself does not compute the convolution of its codes"


def test_codes_at_a_boundary_are_told_from_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = layer(QuantLinear, 400, 3, w_bits=8, a_bits=8, signed=False)
    codes = input_codes(linear)
    assert codes is not None
    middles = ((torch.arange(400) % 250) + 0.5) * codes.scale
    x = torch.stack([torch.nextafter(middles, torch.tensor(side)) for side in (0.0, 9.0)] + [middles])
    found = verify(linear, [x])
    (row,) = found.layers
    assert found.ok and row.flips > 0 and 0 < row.ulps <= 8 and row.error < 1
    assert found.changed == row.changed and found.boundary < 1e-4
    shift = linear.input_quantizer.forward
    monkeypatch.setattr(linear.input_quantizer, "forward", lambda x, p: shift(x + 0.1 * codes.scale, p))
    found = verify(linear, [torch.rand(8, 400) * 200 * codes.scale])
    assert found.layers[0].status == "failed" and "units in the last place away from the boundary" in found.layers[0].reason
    assert not found.ok


def test_layers_that_are_not_of_integers_say_why() -> None:
    torch.manual_seed(0)
    coded = to_codebook(nn.Conv2d(2, 2, 1), torch.ones(2, 2, 1, 1, dtype=torch.bool), torch.tensor([-1.0, 1.0]))
    net = nn.ModuleDict(
        {
            "coded": coded,
            "plain": nn.Conv2d(2, 2, 1),
            "open": layer(QuantConv2d, 2, 2, 1, w_bits=4, a_bits=32),
            "none": layer(QuantConv2d, 2, 2, 1, w_bits=4, a_bits=0),
            "whole": layer(QuantConv2d, 2, 2, 1, w_bits=32, a_bits=4),
            "some": layer(QuantConv2d, 2, 2, 1, w_bits=(32, 4), a_bits=4),
            "uniq": layer(QuantConv2d, 2, 2, 1, w_bits=2, a_bits=4, weight_quantizer="uniq", input_quantizer="uniq", placement="output"),
            "idle": layer(QuantConv2d, 2, 2, 1, w_bits=4, a_bits=4),
        }
    )

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net

        def forward(self, x: Tensor) -> Tensor:
            for name, module in self.layers.items():
                x = x if name == "idle" else module(x)
            return x

    found = verify(Chain(), [torch.randn(2, 2, 5, 5)])
    assert {row.name.removeprefix("layers."): (row.status, row.reason) for row in found.layers} == {
        "coded": ("float", "its shared values are no multiples of a step"),
        "plain": ("float", "not quantized"),
        "open": ("float", "its input is at 32 bits"),
        "none": ("float", "its input is at 0 bits"),
        "whole": ("float", "all its filters are at 32 bits"),
        "some": ("integer", "1 filters at 32 bits stay float"),
        "uniq": ("float", "'uniq' weights have no integer codes: their levels are not equidistant"),
        "idle": ("float", "it was not called"),
    }
    assert found.ok and found.agreement is None


@pytest.mark.parametrize("bits", [4, (4, 8)], ids=["one scale", "scales of channels"])
def test_inputs_that_another_layer_quantized(bits: Any) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        body = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(16, 5))

    space = SearchSpace((4, 8), (4, 8), granularity="filter", placement="output", weight_quantizer="symmetric", input_quantizer="pact")
    geometry = geometry_of(prepare(build(), space, example_inputs=images(2)))
    out = bits if isinstance(bits, int) else bits * 2
    layers = {"0": LayerBits((4, 8, 4, 8), 8, out), "3": LayerBits(8, 32, out), "7": LayerBits(4, 32)}
    final = convert(build(), Policy(layers, geometry), space)
    qprune.calibrate(final, [images(8)])
    assert any(isinstance(module, QuantActivation) for module in final.modules())
    found = verify(final, [images(8)])
    first, second, third = found.layers
    assert found.ok and first.status == "integer", str(found)
    if isinstance(bits, int):
        assert second.status == "integer" and second.worst_bits > 8 and 0 < second.error < 1
        assert (third.status, third.reason) == ("float", "its input lies between the levels of the activation that it reads")
    else:
        reason = "the channels of its input have scales of their own: no plain integer dot product"
        assert (second.status, second.reason) == (third.status, third.reason) == ("float", reason)


class Block(nn.Module):
    """A grouped convolution, which keeps filters that it does not need, on a residual path, which keeps channels that others write."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.relu(self.norm(self.a(x)))))


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("round_to", [1, 4])
def test_layers_that_are_narrower_than_their_surroundings(round_to: int, remove: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block(), nn.Flatten(), nn.Linear(2048, 5))
    mixed = prepare(net, SearchSpace((0, 1, 4, 32), (1, 8), granularity="filter"), example_inputs=images(2))
    qprune.calibrate(mixed, [images(8)])
    layers = {"0": ((4, 0, 1, 4, 4, 0, 4, 1), 8), "3.a": ((0, 4, 4, 1, 0, 0, 4, 32), 8), "3.b": ((4, 1, 0, 0, 0, 4, 1, 0), 1), "5": (4, 8)}
    final = convert(mixed, Policy(layers, geometry_of(mixed)), remove=remove, round_to=round_to).eval()
    if remove:
        assert any(getattr(layer, "spread", None) is not None for layer in final.modules())
    found = verify(final, [images(8, 50)])
    assert found.ok and {row.status for row in found.layers} == {"integer"}, str(found)
    assert found.changed or found.difference < 1e-5


def test_nothing_of_the_model_changes() -> None:
    final = final_model("lenet5", (2, 4), (4,)).train()
    before = {name: value.clone() for name, value in final.state_dict().items()}
    random = torch.get_rng_state()
    verify(final, [images(4)])
    assert final.training and all(module.training for module in final.modules())
    assert all(torch.equal(value, before[name]) for name, value in final.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in final.modules())


def test_only_so_many_batches_are_read() -> None:
    loader = iter([images(4, seed) for seed in range(9)])
    assert verify(final_model("lenet5", (2, 4), (4,)), loader, batches=2).samples == 8
    assert len(list(loader)) == 7


class Classes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


def test_every_sample_has_a_first_change_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer behind a change is no excuse for samples that had none."""
    first, second = (layer(QuantLinear, 40, 40, w_bits=8, a_bits=8, signed=False) for _ in range(2))
    codes = input_codes(first)
    assert codes is not None
    middles = ((torch.arange(40) % 250) + 0.5) * codes.scale
    x = torch.stack(
        [torch.nextafter(middles, torch.tensor(9.0)), torch.nextafter(middles, torch.tensor(0.0)), torch.ones(40) * codes.scale]
    )
    net = nn.Sequential(first, second)
    found = verify(net, [x])
    assert found.ok and found.layers[0].changed > 0 and 0 < found.boundary < 1e-4
    calls = []

    def drifting(y: Tensor) -> Tensor:
        calls.append(1)
        return y + 0.2 * second_scale * (len(calls) % 2) * torch.tensor([[0.0], [0.0], [1.0]])

    grid = input_codes(second)
    assert grid is not None
    second_scale = grid.scale
    monkeypatch.setattr(net, "forward", lambda x: second(drifting(first(x))))
    drifted = verify(net, [x])
    assert not drifted.ok and drifted.boundary > 1e-2
    with pytest.raises(VerificationError, match="steps from a boundary"):
        verify(net, [x], strict=True)


def test_refusals() -> None:
    final = final_model("lenet5", (2, 4), (4,))
    with pytest.raises(InputError, match="no batches"):
        verify(final, [])
    with pytest.raises(UnsupportedLayerError, match="still has candidates"):
        verify(prepare(NETWORKS["lenet5"](), SearchSpace()), [images(2)])
    with pytest.raises(InputError, match=r"parameters of torch.bfloat16, expected float32; call model.float\(\)"):
        verify(final.bfloat16(), [images(2).bfloat16()])
    with pytest.raises(InputError, match="no output of floating point"):
        verify(nn.Sequential(layer(QuantLinear, 3, 2, w_bits=4, a_bits=4), Classes()), [torch.randn(2, 3)])
    broken = layer(QuantLinear, 3, 2, w_bits=4, a_bits=4)
    found = verify(broken, [torch.tensor([[1.0, torch.nan, 0.0]])])
    assert found.layers[0].reason == "its input is NaN: codes cannot say so" and not found.ok
