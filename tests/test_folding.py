"""Folded normalisations: the same outputs, the same codes, and everything that must not be folded in place."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import unit_models
from lookalikes import LOOKALIKES, SHAPE, build
from lookalikes.idioms import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune import (
    CheckpointError,
    Policy,
    SearchSpace,
    UnsupportedLayerError,
    calibrate,
    convert,
    fold,
    load,
    load_packed,
    prepare,
    save,
    save_packed,
)
from qprune.codes import weight_codes
from qprune.cost import cost, geometry_of
from qprune.errors import InputError
from qprune.geometry import weighted_layers
from qprune.nn import QuantActivation, QuantConv2d, QuantLinear, integer
from qprune.nn.codebook import to_codebook
from qprune.nn.quantizing import Quantizing
from qprune.policy import LayerBits
from qprune.tasks import models

BITS = (0, 1, 2, 3, 4, 5, 8, 32)
X = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def tensors(y: object) -> list[Tensor]:
    return [value for value in tree_leaves(y) if isinstance(value, Tensor)]


def assert_same_outputs(a: nn.Module, b: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        for here, there in zip(tensors(a(x)), tensors(b(x)), strict=True):
            torch.testing.assert_close(here, there, rtol=tolerance, atol=tolerance)


def season(norm: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and parameters as of a trained norm; every third scale is negative."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=g))
        norm.running_var.copy_(torch.rand(norm.num_features, generator=g) + 0.5)
        if norm.weight is not None:
            norm.weight.copy_(torch.rand(norm.num_features, generator=g) + 0.5)
            norm.weight[::3] *= -1
            norm.bias.copy_(torch.randn(norm.num_features, generator=g))
    return norm


def unit(kind: str, w_bits: object = BITS * 2, scales: str = "filter", bias: bool = False, **options: object) -> nn.Sequential:
    """A quantized convolution with a normalisation behind it."""
    torch.manual_seed(0)
    conv = QuantConv2d(3, 16, 3, bias=bias, w_bits=w_bits, a_bits=8, weight_quantizer=kind, scales=scales, **options)
    with torch.no_grad():
        conv.weight[[f for f, b in enumerate(conv.w_bits) if b == 0]] = 0
    net = nn.Sequential(conv, season(nn.BatchNorm2d(16)))
    calibrate(net, [X])
    return net.eval()


KINDS = [("lsq", BITS), ("symmetric", BITS), ("dorefa", BITS), ("nice", (2, 3, 4, 5, 8, 32))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scales", ["filter", "layer"])
@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_codes_stay_and_scales_take_the_factor(kind: str, bits: tuple[int, ...], scales: str, bias: bool) -> None:
    net = unit(kind, (bits * 3)[:16], scales, bias)
    before = copy.deepcopy(net.state_dict())
    done = fold(net, X)
    assert isinstance(done[1], nn.Identity) and isinstance(net[1], nn.BatchNorm2d)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert_same_outputs(done, net, X)
    old, new, factor = weight_codes(net[0]), weight_codes(done[0]), net[1].weight / (net[1].running_var + net[1].eps).sqrt()
    assert torch.equal(old.levels, new.levels)
    assert torch.equal(old.steps, new.steps) and torch.equal(old.zero_point, new.zero_point) and old.bits == new.bits
    torch.testing.assert_close(new.scale, old.scale * factor.detach())
    assert (new.scale < 0).any()
    torch.testing.assert_close(new.values(), done[0].weight_quantizer(done[0].weight, done[0].one_hot), rtol=1e-6, atol=0)


def test_the_norm_of_uniq_weights_stays() -> None:
    net = unit("uniq", (2, 3, 4, 8) * 4, placement="output", input_quantizer="pact")
    assert norms(fold(net, X)) == ["1"]
    with pytest.raises(UnsupportedLayerError, match=r"'1'.*'uniq' weights share"):
        fold(net, X, ["1"])


@pytest.mark.parametrize(("weights", "activations"), [("nice", "nice"), ("lsq", "pact")])
def test_activations_that_their_producers_quantize(weights: str, activations: str, tmp_path: Path) -> None:
    x = torch.randn(4, 1, 8, 8)
    net = unit_models.block_net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            season(module)
    model = unit_models.prepared(net, weight_quantizer=weights, input_quantizer=activations)
    geometry = geometry_of(model)
    layers = {}
    for name, layer in geometry.layers.items():
        if layer.kind == "Conv2d":
            pairs, of = [unit_models.PAIRS[f % 4] for f in range(layer.filters)], geometry.units[name]
            out = tuple(a for _, a in pairs) if of.activation else None
            layers[name] = LayerBits(tuple(w for w, _ in pairs), 32 if of.source else 8, out)
    final = convert(model.eval(), Policy(layers, geometry))
    done = fold(final, x)
    assert not norms(done) and sum(isinstance(m, QuantActivation) for m in done.modules()) == 5
    assert_same_outputs(copy.deepcopy(done).double(), copy.deepcopy(final).double(), x.double(), 1e-6)
    for write, read in ((save, load), (save_packed, load_packed)):
        write(done, tmp_path / "file")
        assert torch.equal(read(tmp_path / "file", unit_models.block_net).eval()(x), done(x))


@pytest.mark.parametrize("kind", ["symmetric", "dorefa"])
def test_without_negative_scales_the_codes_change_sign(kind: str) -> None:
    net = unit(kind, (1, 2, 4, 8) * 4)
    done = fold(net, X, negative_scales=False)
    assert not norms(done)
    assert_same_outputs(done, net, X)
    old, new = weight_codes(net[0]), weight_codes(done[0])
    assert (new.scale > 0).all()
    negative = net[1].weight < 0
    assert torch.equal(new.levels[~negative], old.levels[~negative])
    assert torch.equal(new.levels[negative], (old.steps.view(-1, 1, 1, 1) - old.levels)[negative])


def test_where_twos_complement_has_no_room_for_the_other_sign_the_norm_stays(caplog: pytest.LogCaptureFixture) -> None:
    net = unit("lsq", 2)
    assert (weight_codes(net[0]).levels[net[1].weight < 0] == 0).any()
    with caplog.at_level(logging.INFO, "qprune"):
        done = fold(net, X, negative_scales=False)
    assert isinstance(done[1], nn.BatchNorm2d) and "lowest level" in caplog.text
    assert torch.equal(done(X), net(X))
    with pytest.raises(UnsupportedLayerError, match=r"'1'.*lowest level"):
        fold(net, X, ["1"], negative_scales=False)
    with torch.no_grad():
        net[1].weight.abs_()
    assert not norms(fold(net, X, negative_scales=False))


def test_a_factor_of_zero_leaves_the_codes_readable() -> None:
    net = unit("lsq", (2, 3, 4, 8) * 4)
    with torch.no_grad():
        net[1].weight[:4] = 0
    done = fold(net, X)
    assert torch.equal(weight_codes(done[0]).levels, weight_codes(net[0]).levels)
    assert_same_outputs(done, net, X)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda: nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (2, 4, 9)),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 9, 9)),
        (lambda: nn.Conv3d(4, 6, 2, bias=False), nn.BatchNorm3d, (2, 4, 5, 5, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), nn.BatchNorm2d, (2, 4, 5, 5)),
        (lambda: nn.Linear(4, 6, bias=False), nn.BatchNorm1d, (5, 4)),
        (lambda: QuantLinear(4, 6, w_bits=(2, 3, 4, 5, 8, 32), a_bits=32), nn.BatchNorm1d, (5, 4)),
        (lambda: nn.Conv2d(4, 6, 3), nn.SyncBatchNorm, (2, 4, 9, 9)),
    ],
)
def test_every_kind_of_layer(layer: object, norm: type[nn.Module], shape: tuple[int, ...], affine: bool) -> None:
    net = nn.Sequential(layer(), season(norm(6, affine=affine))).eval()  # type: ignore[operator]
    x = torch.randn(shape)
    done = fold(net, x)
    assert not norms(done)
    assert_same_outputs(done, net, x)


def test_double_and_half_stay_what_they_are() -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.1)):
        net = unit("lsq", (2, 4) * 8).to(dtype)
        done = fold(net, X.to(dtype))
        assert {p.dtype for p in done.parameters() if p.dim() == 4} == {dtype} == {done[0].bias.dtype}
        assert_same_outputs(done, net, X.to(dtype), tolerance)


class Net(nn.Module):
    """conv → norm by a function; layers by keyword."""

    def __init__(self, forward: object, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, season(layer) if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None else layer)
        self.way = forward

    def forward(self, x: Tensor) -> object:
        return self.way(self, x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3, padding=1)


class Other(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Loud(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def _in_place(net: nn.Module, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.mul_(2)
    return net.norm(y)


def _peeks(net: nn.Module, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) * (1 + (y.detach().mean() > 0).float())


STAYS = {
    "another reader": (lambda n, x: n.norm(y := n.conv(x)) + y, {}, "something besides"),
    "returned too": (lambda n, x: (n.norm(y := n.conv(x)), {"raw": y}), {}, "something besides"),
    "read without gradient": (_peeks, {}, "something besides"),
    "addition": (lambda n, x: n.norm(n.conv(x) + 1), {}, "no layer's output"),
    "concatenation": (lambda n, x: n.norm(torch.cat([n.conv(x)], 1)), {}, "no layer's output"),
    "pooled before": (lambda n, x: n.norm(F.avg_pool2d(n.conv(x), 2)), {}, "no layer's output"),
    "changed in place": (_in_place, {}, "in place"),
    "norm twice": (lambda n, x: n.norm(n.norm(n.conv(x))), {}, "called 2 times"),
    "layer twice": (lambda n, x: n.conv(x) + n.norm(n.conv(x)), {}, "called 2 times"),
    "not called": (lambda n, x: n.conv(x), {}, "not called"),
    "subclass of a layer": (lambda n, x: n.norm(n.conv(x)), {"conv": Other(3, 4, 3)}, "code of its own"),
    "subclass of a norm": (lambda n, x: n.norm(n.conv(x)), {"norm": Loud(4)}, "something besides normalising"),
    "no statistics": (lambda n, x: n.norm(n.conv(x)), {"norm": nn.BatchNorm2d(4, track_running_stats=False)}, "no running statistics"),
    "computed weight": (
        lambda n, x: n.norm(n.conv(x)),
        {"conv": nn.utils.parametrizations.weight_norm(conv())},
        "code of its own",
    ),
    "codebook": (
        lambda n, x: n.norm(n.conv(x)),
        {"conv": to_codebook(conv(), torch.rand(4, 3, 3, 3) > 0.5, torch.linspace(-0.2, 0.2, 4))},
        "shared by all filters",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_cannot_be_folded_stays_and_says_why(case: str, caplog: pytest.LogCaptureFixture) -> None:
    way, layers, reason = STAYS[case]
    net = Net(way, **({"conv": conv(), "norm": nn.BatchNorm2d(4)} | copy.deepcopy(layers))).eval()
    with caplog.at_level(logging.INFO, "qprune"):
        done = fold(net, X)
    assert norms(done) == ["norm"]
    assert f"norm ({reason}" in caplog.text or reason in caplog.text
    assert_same_outputs(done, net, X, 0)
    with pytest.raises(UnsupportedLayerError, match=f"'norm'.*{reason}"):
        fold(net, X, ["norm"])


def test_one_bad_pair_does_not_keep_the_others() -> None:
    def way(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x)
        return net.norm2(net.conv2(F.relu(net.norm(y) + y)))

    net = Net(way, conv=conv(), norm=nn.BatchNorm2d(4), conv2=nn.Conv2d(4, 5, 1), norm2=nn.BatchNorm2d(5)).eval()
    done = fold(net, X)
    assert norms(done) == ["norm"]
    assert_same_outputs(done, net, X)


def test_on_integer_codes_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(QuantConv2d(16, 16, 3, w_bits=(2, 3, 4, 8) * 4, a_bits=4), season(nn.BatchNorm2d(16))).eval()
    x = torch.randn(2, 16, 8, 8).relu()
    calibrate(net, [x])
    done = fold(net, x)
    with torch.no_grad(), integer.enabled():
        here = integer.conv2d(done[0], x)
    assert here is not None
    torch.testing.assert_close(here, net(x).detach(), rtol=1e-5, atol=1e-5)


def test_what_another_layer_reads_shows_too() -> None:
    def way(net: nn.Module, x: Tensor) -> Tensor:
        return net.norm2(net.conv2(_peeks(net, x)))

    net = Net(way, conv=conv(), norm=nn.BatchNorm2d(4), conv2=nn.Conv2d(4, 5, 1), norm2=nn.BatchNorm2d(5)).eval()
    assert norms(fold(net, X)) == ["norm"]


def test_two_norms_of_one_layer_stay() -> None:
    net = Net(lambda n, x: n.norm(y := n.conv(x)) + n.norm2(y), conv=conv(), norm=nn.BatchNorm2d(4), norm2=nn.BatchNorm2d(4)).eval()
    done = fold(net, X)
    assert norms(done) == ["norm", "norm2"]
    assert_same_outputs(done, net, X, 0)


@pytest.mark.parametrize("name", ["resnet_basic", "vgg_bn", "antialiased"])
def test_files_of_folded_networks(name: str, tmp_path: Path) -> None:
    model = calibrate(prepare(build(name), SearchSpace(BITS, (4, 8), granularity="filter"), example_inputs=X), [X])
    layers = {
        layer: LayerBits(tuple(BITS[1 + f % 7] for f in range(shape.filters)), 8) for layer, shape in geometry_of(model).layers.items()
    }
    done = fold(convert(model.eval(), Policy(layers, geometry_of(model))), X)
    for write, read in ((save, load), (save_packed, load_packed)):
        write(done, tmp_path / "file")
        back = read(tmp_path / "file", lambda: LOOKALIKES[name]()).eval()
        assert not norms(back)
        assert all(torch.equal(a, b) for a, b in zip(tensors(back(X)), tensors(done(X)), strict=True))
    with pytest.raises(CheckpointError):
        read(tmp_path / "file", lambda: nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_float_networks_too(tmp_path: Path) -> None:
    net = build("mobilenet_v2")
    done = fold(net, X)
    assert not norms(done)
    save(done, tmp_path / "file")
    back = load(tmp_path / "file", LOOKALIKES["mobilenet_v2"]).eval()
    assert torch.equal(back(X), done(X))


def test_only_those_that_are_named() -> None:
    net = build("vgg_bn")
    first, *others = norms(net)
    assert norms(fold(net, X, [first])) == others
    with pytest.raises(UnsupportedLayerError, match="no BatchNorm"):
        fold(net, X, ["features.0"])


def test_a_norm_with_an_activation_of_its_own_leaves_it() -> None:
    net = nn.Sequential(conv(), season(BatchNormAct2d(4)))
    net[1].act = nn.PReLU(4)
    done = fold(net.eval(), X)
    assert not norms(done) and isinstance(done[1].act, nn.PReLU)
    assert_same_outputs(done, net, X)


def test_a_model_in_search_or_without_outputs_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="candidates"):
        fold(prepare(build("vgg_bn"), SearchSpace()), X)
    with pytest.raises(UnsupportedLayerError, match="candidates"):
        fold(unit_models.prepared(unit_models.chain()), torch.randn(2, 1, 8, 8))
    net = Net(lambda n, x: None, conv=conv(), norm=nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="no tensor"):
        fold(net, X)


@functools.cache
def converted(name: str) -> nn.Module:
    model = prepare(build(name), SearchSpace((0, 2, 4, 8, 32), (4, 8, 32), granularity="filter"), example_inputs=X)
    calibrate(model, [X])
    g = torch.Generator().manual_seed(0)
    layers = {}
    for layer_name, layer in geometry_of(model).layers.items():
        if layer.kind != "ConvTranspose2d":
            picks = torch.randint(5, (layer.filters,), generator=g).tolist()
            layers[layer_name] = LayerBits(tuple((2, 2, 4, 8, 32)[k] for k in picks), (4, 8, 32)[picks[0] % 3])
    return convert(model.double().eval(), Policy(layers, geometry_of(model)))


KEPT = {"preactivation": 4, "densenet": 6, "shared": 2}
"""Normalisations that stand before the convolution, or whose convolution is called twice."""


@pytest.mark.parametrize("name", [name for name in LOOKALIKES if norms(build(name))])
def test_whole_networks(name: str) -> None:
    net, x = copy.deepcopy(converted(name)), X.double()
    done = fold(net, x)
    assert len(norms(done)) == KEPT.get(name, 0), norms(done)
    assert_same_outputs(done, net, x, 1e-9)
    before = dict(weighted_layers(net))
    for layer_name, layer in weighted_layers(done):
        if isinstance(layer, Quantizing):
            assert torch.equal(weight_codes(layer).levels, weight_codes(before[layer_name]).levels)
    assert cost(done).bops == cost(net).bops


@pytest.mark.parametrize("name", ["resnet8", "mobilenet"])
def test_networks_of_the_examples_in_float32(name: str) -> None:
    x = torch.randn(4, 1, 16, 16)
    net = models.get(name)(in_channels=1).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            season(module)
    policy = Policy({layer: LayerBits(4, 32) for layer, module in weighted_layers(net)})
    final = convert(net, policy)
    done = fold(final, x)
    assert not norms(done)
    assert_same_outputs(done, final, x)
    calls = [module for module in done.train().modules() if isinstance(module, Quantizing)]
    sum(y.square().sum() for y in tensors(done(x))).backward()
    assert calls and all(layer.weight.grad is not None for layer in calls)
