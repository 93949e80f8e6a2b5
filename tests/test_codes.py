"""Codes and grids against what the layers compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qprune.codes import grid_of, input_codes, output_codes, weight_codes
from qprune.errors import UnsupportedLayerError
from qprune.nn.activation import QuantActivation
from qprune.nn.quant import QuantConv2d, QuantLinear
from qprune.quantizers import InputQuantizer

BITS = (0, 1, 2, 3, 4, 5, 8, 32)


def conv(kind: str, w_bits: tuple[int, ...] | int, scales: str = "filter", **options: object) -> QuantConv2d:
    torch.manual_seed(0)
    return QuantConv2d(3, 16, 3, w_bits=w_bits, weight_quantizer=kind, scales=scales, **options)


@pytest.mark.parametrize("scales", ["filter", "layer"])
@pytest.mark.parametrize("kind", ["lsq", "symmetric", "dorefa"])
def test_codes_give_the_layers_weight_bit_for_bit(kind: str, scales: str) -> None:
    layer = conv(kind, BITS * 2, scales)
    codes = weight_codes(layer)
    quantized = layer.weight_quantizer(layer.weight, layer.one_hot)
    assert torch.equal(codes.values(), quantized)
    assert codes.levels.amin() >= 0 and (codes.levels.flatten(1).amax(1) <= codes.steps).all()
    for f, bits in enumerate(codes.bits):
        assert codes.steps[f] < 2 ** (bits if bits != 32 else 0)
        assert (codes.scale[f] == 0) == (bits in (0, 32))


@pytest.mark.parametrize("kind", ["lsq", "symmetric", "dorefa"])
def test_signed_codes_are_integers_of_the_same_values(kind: str) -> None:
    codes = weight_codes(conv(kind, (1, 2, 3, 8) * 4))
    signed, scale = codes.signed()
    assert signed.dtype == torch.int32
    torch.testing.assert_close(signed * scale.view(-1, 1, 1, 1), codes.values(), rtol=2e-7, atol=0)
    one_bit = signed[::4]
    assert set(one_bit.unique().tolist()) <= {-1, 1}


def test_a_linear_layer_has_codes_too() -> None:
    torch.manual_seed(0)
    layer = QuantLinear(5, 4, w_bits=(0, 2, 4, 8), a_bits=4)
    assert torch.equal(weight_codes(layer).values(), layer.weight_quantizer(layer.weight, layer.one_hot))


def test_levels_that_are_not_equidistant_are_refused_by_name() -> None:
    layer = QuantConv2d(3, 4, 3, w_bits=2, weight_quantizer="uniq", placement="output")
    layer.layer_name = "features.0"
    with pytest.raises(UnsupportedLayerError, match=r"features\.0.*uniq"):
        weight_codes(layer)


def test_a_weight_with_nan_is_refused_by_name() -> None:
    layer = conv("lsq", 4)
    layer.layer_name = "stem"
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UnsupportedLayerError, match=r"stem.*NaN"):
        weight_codes(layer)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["pact", "lsq+"])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_the_input_grid_is_the_quantizers(bits: int, kind: str, signed: bool) -> None:
    random = torch.Generator().manual_seed(bits)
    x = torch.randn(4, 3, 9, 9, generator=random) * 2
    x = x if signed else x.relu()
    quantizer = InputQuantizer(kind, (bits,))
    quantizer.calibrate(x)
    grid = grid_of(quantizer)
    values = quantizer(x, torch.ones(1))
    torch.testing.assert_close(grid.offset + grid.levels(x) * grid.scale, values, rtol=1e-5, atol=1e-6)
    assert grid.levels(x).amax() <= grid.steps == 2**bits - 1
    if kind == "pact":
        assert grid.zero_point == (None if signed and bits == 1 else 2 ** (bits - 1) if signed else 0)
    elif signed:
        assert grid.zero_point is None


def test_an_input_of_0_or_32_bits() -> None:
    assert input_codes(conv("lsq", 4, a_bits=32)) is None
    grid = input_codes(conv("lsq", 4, a_bits=0))
    assert grid is not None and not grid.levels(torch.randn(5)).any()


@pytest.mark.parametrize("kind", ["nice", "pact"])
def test_the_output_grid_is_the_activations(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    activation = QuantActivation((2, 3, 8, 32), kind)
    activation.quantizer.calibrate(x)
    grid = output_codes(activation)
    y = activation.eval()(x)
    steps, scale = grid.steps.view(-1, 1, 1), grid.scale.view(-1, 1, 1)
    levels = (y[:, :3] / scale[:3]).round()
    torch.testing.assert_close(levels * scale[:3], y[:, :3])
    assert (levels <= steps[:3]).all() and levels[:, 2].amax() > 3
    assert torch.equal(y[:, 3], x[:, 3].relu()) and grid.steps[3] == 0


def test_output_levels_that_are_not_equidistant_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"relu1.*uniq"):
        output_codes(QuantActivation(4, "uniq"), "relu1")


def test_codes_do_not_follow_the_layers_gradients() -> None:
    layer = conv("lsq", 4)
    assert not weight_codes(layer).values().requires_grad
    assert isinstance(layer, nn.Conv2d)
