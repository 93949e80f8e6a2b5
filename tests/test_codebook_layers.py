"""Layers with masks and codebooks: what they compute, what they learn, how their codebooks follow, and how they are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qprune
from qprune import CheckpointError
from qprune.cost import geometry_of
from qprune.errors import InputError, SpaceError
from qprune.geometry import float_twin
from qprune.nn.codebook import (
    CodebookConv2d,
    CodebookLayer,
    CodebookLinear,
    CodebookRefresh,
    codebook_layers,
    refresh_codebooks,
    to_codebook,
)
from qprune.policy import LayerBits
from qprune.record import Record, attach
from qprune.stored import layer_bits, stored, stored_sizes

WEIGHT = [[0.9, -0.2, 0.0, 0.45], [-1.2, 0.3, 0.7, -0.5]]
MASK = [[True, False, True, True], [True, True, False, True]]
VALUES = [-1.0, -0.5, 0.1, 1.0]
SHARED = [[1.0, 0.0, 0.1, 0.1], [-1.0, 0.1, 0.0, -0.5]]
"""By hand: the nearest of VALUES where MASK is set (midpoints -0.75, -0.2, 0.55), elsewhere 0."""


def linear_layer(**options: Any) -> CodebookLinear:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHT))
    made = to_codebook(layer, torch.tensor(MASK), torch.tensor(VALUES), **options)
    assert isinstance(made, CodebookLinear)
    return made


def conv_layer(bits: int = 3, **options: Any) -> CodebookConv2d:
    layer = nn.Conv2d(3, 5, 3, padding=1, stride=2)
    mask = torch.rand(layer.weight.shape) < 0.3
    made = to_codebook(layer, mask, torch.linspace(-0.2, 0.2, 2**bits), **options)
    assert isinstance(made, CodebookConv2d)
    return made


def test_linear_by_hand() -> None:
    layer = linear_layer()
    torch.testing.assert_close(layer.shared_weight(), torch.tensor(SHARED), atol=0, rtol=0)
    assert torch.equal(layer.weight, torch.tensor(WEIGHT) * torch.tensor(MASK)), "pruned latent weights are 0"
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(layer(x), F.linear(x, torch.tensor(SHARED), layer.bias))
    assert (layer.w_bits, layer.a_bits) == (2, 32)
    assert "w_bits=2 (shared), a_bits=32" in repr(layer)


def test_the_gradient_goes_straight_to_what_is_kept() -> None:
    layer = linear_layer()
    x = torch.randn(6, 4)
    layer(x).sum().backward()
    expected = x.sum(0).expand(2, 4) * torch.tensor(MASK)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, expected)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert not layer.weight.detach()[~torch.tensor(MASK)].any()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_conv_is_conv_with_the_shared_weight(dtype: torch.dtype, channels_last: bool) -> None:
    layer = conv_layer().to(dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    if channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    weight = layer.shared_weight()
    assert weight.stride() == layer.weight.stride() and weight.dtype == dtype
    values = set(layer.codebook.to(dtype).tolist()) | {0.0}
    assert set(weight.flatten().tolist()) <= values
    y = F.conv2d(x, weight, layer.bias, stride=2, padding=1)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    layer.refresh()
    assert layer.codebook.dtype == dtype and bool((layer.codebook.diff() >= 0).all())


def test_codebooks_follow_the_latent_weights() -> None:
    """By hand: {0.9}, {0.0, 0.45, 0.3}, {-1.2}, {-0.5} are nearest to the values; their means are the next values, and stay so."""
    layer = linear_layer()
    layer.refresh(1)
    assert layer.codebook.tolist() == pytest.approx([-1.2, -0.5, 0.25, 0.9])
    layer.refresh(50)
    assert layer.codebook.tolist() == pytest.approx([-1.2, -0.5, 0.25, 0.9])
    assert layer.shared_weight()[0].tolist() == pytest.approx([0.9, 0.0, 0.25, 0.25])


def test_an_equidistant_codebook_stays_so() -> None:
    layer = conv_layer(linear=True)
    with torch.no_grad():
        layer.weight.mul_(2).add_(0.05)
    layer.refresh()
    steps = layer.codebook.diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps))
    assert layer.codebook.max() > 0.25


def test_refresh_during_training(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(CodebookLayer, "refresh", lambda self, iterations: done.append(iterations))
    refresh = CodebookRefresh(nn.Sequential(linear_layer(), nn.ReLU()), steps_per_epoch=40, per_epoch=20)
    for step in range(1, 41):
        refresh.progress(step, 80, 0.5)
    assert done == [5] * 20
    refresh.on_epoch({}, object())
    assert done[20:] == [100]
    assert CodebookRefresh(nn.Identity(), 7).every == 1
    with pytest.raises(InputError, match="expected numbers from 1, got steps_per_epoch=0"):
        CodebookRefresh(nn.Identity(), 0)


def test_refresh_refuses_what_is_not_finite() -> None:
    layer = linear_layer()
    layer.layer_name = "fc"
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="layer fc: got weights that are NaN or infinite"):
        refresh_codebooks(nn.Sequential(layer))


def test_quantized_inputs() -> None:
    layer = linear_layer(a_bits=2)
    x = torch.rand(64, 4)
    qprune.calibrate(nn.Sequential(layer), [x])
    layer.eval()
    seen: list[Tensor] = []
    weight = layer.shared_weight()
    y = layer(x)
    r = float(layer.input_quantizer.learned_range().detach())  # type: ignore[union-attr]
    for row in (x / r).clamp(0, 1).mul(3).round().mul(r / 3):
        seen.append(F.linear(row, weight, layer.bias))
    torch.testing.assert_close(y, torch.stack(seen))
    assert layer_bits(layer) == LayerBits(2, 2)


def test_bits_of_filters() -> None:
    layer = conv_layer()
    mask = torch.ones_like(layer.mask)
    mask[[1, 4]] = False
    made = to_codebook(nn.Conv2d(3, 5, 3), mask, torch.zeros(4))
    assert layer_bits(made) == LayerBits((2, 0, 2, 2, 0), 32)


def test_a_mask_of_whole_filters_can_be_loaded_into() -> None:
    rows = torch.tensor([True, False, True, True, False]).view(5, 1, 1, 1)
    made, other = (to_codebook(nn.Conv2d(3, 5, 3), mask.expand(5, 3, 3, 3), torch.zeros(4)) for mask in (rows, ~rows))
    made.load_state_dict(other.state_dict())
    assert torch.equal(made.mask, ~rows.expand(5, 3, 3, 3)) and rows[0]


def test_sizes() -> None:
    """By hand: six of eight weights at 2 bits with a book of four, and a float layer of 16 weights."""
    found = stored_sizes(nn.Sequential(linear_layer(), nn.Linear(2, 8)))
    assert found.layers["0"].values == 12 and found.layers["0"].books == 128 and found.layers["0"].dense == 256
    assert found.layers["0"].mask == 8, "one bit per weight"
    assert found.layers["1"].total == 512 and found.total.total == 12 + 128 + found.layers["0"].index + 512
    assert stored(linear_layer()).filters is None
    whole = stored(to_codebook(nn.Linear(4, 2), torch.tensor([[True] * 4, [False] * 4]), torch.zeros(4), linear=True))
    assert (whole.filters, whole.nnz, whole.entries) == (2, 4, 2)
    mixed = qprune.convert(nn.Sequential(nn.Linear(4, 2)), qprune.Policy({"0": (4, 32)}))
    with pytest.raises(InputError, match="layer 0 is a QuantLinear, which has no codebook"):
        stored_sizes(mixed)


def test_as_plain_and_geometry() -> None:
    net = nn.Sequential(conv_layer(), nn.Flatten(), nn.Linear(80, 2))
    twin = float_twin(net)
    assert type(twin[0]) is nn.Conv2d and not twin[0]._buffers
    assert torch.equal(twin[0].weight, net[0].weight)
    x = torch.randn(1, 3, 8, 8)
    assert geometry_of(net, x) == geometry_of(twin, x)


def test_refused_settings() -> None:
    layer, mask = nn.Linear(4, 2), torch.ones(2, 4, dtype=torch.bool)
    for values in (torch.zeros(3), torch.zeros(1), torch.zeros(512), torch.zeros(2, 2)):
        with pytest.raises(SpaceError, match=r"expected a vector of 2\^b values"):
            to_codebook(layer, mask, values)
    with pytest.raises(InputError, match=r"expected the weight's shape \(2, 4\), got \(4, 2\)"):
        to_codebook(layer, mask.T, torch.zeros(4))
    with pytest.raises(SpaceError, match="0 bits of the input"):
        to_codebook(layer, mask, torch.zeros(4), a_bits=0)
    with pytest.raises(InputError, match="layer CodebookLinear: expected 4 input channels"):
        linear_layer()(torch.randn(3, 5))


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(80, 4), nn.Linear(4, 2))


def made() -> nn.Module:
    net = build()
    x = torch.randn(1, 3, 8, 8)
    attach(net, Record(geometry_of(net, x)))
    return nn.Sequential(conv_layer(a_bits=4), nn.Flatten(), net[2], linear_layer())


def test_saved_and_loaded(tmp_path: Path) -> None:
    net = made()
    net(torch.randn(4, 3, 8, 8))
    qprune.save(net, tmp_path / "net")
    again = qprune.load(tmp_path / "net", build)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(again.eval()(x), net.eval()(x))
    assert [(n, layer.settings, layer.layer_name) for n, layer in codebook_layers(again)] == [
        ("0", {"w_bits": 3, "a_bits": 4, "linear": False}, "0"),
        ("3", {"w_bits": 2, "a_bits": 32, "linear": False}, "3"),
    ]
    assert type(again[2]) is nn.Linear
    qprune.save(again, tmp_path / "second")
    first, second = load_file(tmp_path / "net"), load_file(tmp_path / "second")
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    "codebooks, problem",
    [
        ({"7": {"w_bits": 3, "a_bits": 32, "linear": False}}, "a codebook for layer '7', which is no convolution"),
        ({"0": {"w_bits": 9, "a_bits": 32, "linear": False}}, "expected 1 … 8, got 9"),
        ({"0": {"w_bits": 2, "a_bits": 4, "linear": False}}, "does not fit this network"),
        ({"0": {"bits": 2}}, "does not fit this network"),
        ([1], "its header is damaged"),
    ],
    ids=["layer", "bits", "size", "keys", "list"],
)
def test_damaged_codebooks(codebooks: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "net"
    qprune.save(made(), path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    save_file(load_file(path), path, header | {"codebooks": json.dumps(codebooks)})
    with pytest.raises(CheckpointError, match=problem) as caught:
        qprune.load(path, build)
    assert "\n" not in str(caught.value)
