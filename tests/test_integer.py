"""QuantConv2d on integer codes against its float path, and when it takes which. Without a GPU the reference of the operator runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qprune.nn import QuantConv2d, integer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call of the operator."""
    seen: list[int] = []
    original = integer.quant_conv2d_int8

    def counted(*args: Any) -> Tensor:
        seen.append(1)
        return original(*args)

    monkeypatch.setattr(integer, "quant_conv2d_int8", counted)
    return seen


def conv(*args: Any, signed: bool = False, **kwargs: Any) -> QuantConv2d:
    """A calibrated layer in eval mode; by default 16 → 12 channels, 3×3."""
    layer = QuantConv2d(*(args or (16, 12, 3)), **{"padding": 1, **kwargs})
    x = torch.randn(4, layer.in_channels, 8, 8)
    if layer.a_bits != 32:
        layer.input_quantizer.calibrate(x if signed else x.relu())
    return layer.eval()


def both(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), integer.enabled(True):
        got = layer(x)
        with integer.enabled(False):
            want = layer(x)
    return got, want


MIXED = tuple((0, 2, 4, 8)[f % 4] for f in range(12))
LAYERS = {
    "8-bit": lambda: conv(),
    "signed": lambda: conv(signed=True),
    "2-bit signed": lambda: conv(a_bits=2, w_bits=2, signed=True),
    "mixed": lambda: conv(w_bits=MIXED, a_bits=4),
    "mixed, one scale": lambda: conv(w_bits=MIXED, a_bits=4, scales="layer"),
    "symmetric": lambda: conv(w_bits=MIXED, weight_quantizer="symmetric"),
    "dorefa": lambda: conv(w_bits=tuple((0, 1, 4, 7)[f % 4] for f in range(12)), weight_quantizer="dorefa", signed=True),
    "one-bit weight": lambda: conv(w_bits=1, a_bits=3),
    "all pruned": lambda: conv(w_bits=0),
    "1x1": lambda: conv(32, 24, 1, padding=0),
    "groups": lambda: conv(32, 12, 3, groups=2, bias=False),
    "stride, dilation": lambda: conv(16, 12, (3, 5), stride=(2, 1), padding=(2, 4), dilation=2),
    "same": lambda: conv(16, 12, 3, padding="same"),
    "channels_last": lambda: conv().to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_the_float_path(name: str, calls: list[int]) -> None:
    layer = LAYERS[name]()
    x = torch.randn(2, layer.in_channels, 9, 7)
    got, want = both(layer, x)
    assert len(calls) == 1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want.abs().amax() > 0.1 or name == "all pruned"


def test_one_image_without_a_batch(calls: list[int]) -> None:
    got, want = both(conv(), torch.randn(16, 9, 7))
    assert len(calls) == 1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, calls: list[int]) -> None:
    layer, x = conv(), torch.randn(2, 16, 9, 7)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = both(layer, x)
    for got, want in (under_autocast, both(layer.to(dtype), x.to(dtype))):
        assert got.dtype == want.dtype == dtype
        torch.testing.assert_close(got, want, rtol=4e-2, atol=4e-2)
    assert len(calls) == 2


NOT_ELIGIBLE = {
    "3 channels": lambda: conv(3, 12, 3),
    "depthwise": lambda: conv(16, 16, 3, groups=16),
    "full-precision input": lambda: conv(a_bits=32),
    "one-bit input": lambda: conv(a_bits=1),
    "full-precision filters": lambda: conv(w_bits=tuple((8, 32)[f % 2] for f in range(12))),
    "8-bit dorefa": lambda: conv(weight_quantizer="dorefa"),
    "learned offset": lambda: conv(input_quantizer="lsq+"),
    "circular padding": lambda: conv(padding_mode="circular"),
    "even kernel, same": lambda: conv(16, 12, 2, padding="same"),
    "training": lambda: conv().train(),
    "float64": lambda: conv().double(),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NOT_ELIGIBLE)
def test_layers_that_stay_on_the_float_path(name: str, calls: list[int]) -> None:
    layer = NOT_ELIGIBLE[name]()
    with torch.no_grad(), integer.enabled(True):
        assert layer(torch.randn(2, layer.in_channels, 9, 7, dtype=layer.weight.dtype)).isfinite().all()
    assert not calls


def test_only_where_it_is_wanted(calls: list[int]) -> None:
    layer, x = conv(), torch.randn(2, 16, 9, 7)
    with integer.enabled(True):
        assert layer(x).requires_grad
        with torch.no_grad():
            torch.compile(layer, backend="eager", fullgraph=True)(x)
            with integer.enabled(False):
                layer(x)
    with torch.no_grad():
        layer(x)
    assert not calls
    with torch.inference_mode(), integer.enabled(True):
        layer(x)
    assert len(calls) == 1


@torch.no_grad()
def _optimizer(layer: QuantConv2d) -> None:
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.SGD(layer.parameters(), 0.1).step()


def _load(layer: QuantConv2d) -> None:
    layer.load_state_dict(conv(signed=True).state_dict())


def _data_between_modes(layer: QuantConv2d) -> None:
    layer.train()
    layer.weight.data.mul_(-1)
    layer.eval()


def _replace(layer: QuantConv2d) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def _sign(layer: QuantConv2d) -> None:
    layer.input_quantizer.observe_sign(torch.tensor([-1.0]))


def _range(layer: QuantConv2d) -> None:
    with torch.no_grad():
        layer.input_quantizer.log_range += 1


def _forget(layer: QuantConv2d) -> None:
    layer.weight.data.mul_(-1)
    integer.forget(layer)


@pytest.mark.parametrize("change", [_optimizer, _load, _data_between_modes, _replace, _sign, _range, _forget])
def test_codes_follow_the_layer(change: Callable[[QuantConv2d], None]) -> None:
    layer, x = conv(), torch.randn(2, 16, 9, 7)
    before, _ = both(layer, x)
    change(layer)
    got, want = both(layer, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - before).abs().amax() > 1e-3


def test_codes_are_made_once_and_stay_out_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = conv(), torch.randn(2, 16, 9, 7)
    made: list[int] = []
    original = integer._make
    monkeypatch.setattr(integer, "_make", lambda *args: (made.append(1), original(*args))[1])
    both(layer, x)
    both(layer, x)
    assert len(made) == 1
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(-1)
    got, want = both(twin, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(made) == 2
    kept = len(integer._kept)
    del twin
    assert len(integer._kept) == kept - 1
    assert set(layer.state_dict()) == set(conv().state_dict())
