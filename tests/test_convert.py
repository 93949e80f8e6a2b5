"""From a mixed model and a policy to the final network: the same outputs, plain modules, nothing lost, and clear refusals."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qprune import Policy, PolicyMismatchError, SearchSpace, calibrate, convert, prepare, set_gates
from qprune.checkpoint import policy_of
from qprune.convert import check_survivors, has_bypass, survives
from qprune.cost import geometry_of
from qprune.geometry import weighted_layers
from qprune.nn import QuantConv2d, QuantLinear
from qprune.nn.mixing import Mixing
from qprune.policy import LayerBits
from qprune.removal_plan import plan_removal
from qprune.tasks import models

X = torch.randn(2, 1, 16, 16)
SPACES = {
    "layer": SearchSpace((0, 2, 4, 8), (2, 4, 8)),
    "filter": SearchSpace((0, 2, 4, 8), (2, 4, 8), granularity="filter"),
    "joint": SearchSpace((2, 4), (2, 8), joint=True),
    "joint-filter": SearchSpace((0, 2, 4), (2, 8), granularity="filter", joint=True),
    "symmetric-lsq+-layer": SearchSpace((2, 4), (4, 32), weight_quantizer="symmetric", input_quantizer="lsq+", scales="layer"),
    "dorefa": SearchSpace((1, 3, 32), (3, 8), weight_quantizer="dorefa"),
}


def mixed_model(space: SearchSpace) -> nn.Module:
    return copy.deepcopy(_mixed_model(space))


@functools.cache
def _mixed_model(space: SearchSpace) -> nn.Module:
    """With ranges that are no longer those of the start."""
    mixed = prepare(models.resnet8(in_channels=1), space, {"conv1": SearchSpace.fixed(8, 8), "fc": None}, example_inputs=X)
    mixed.train()(torch.randn(4, 1, 16, 16))
    with torch.no_grad():
        for parameter_name, parameter in mixed.named_parameters():
            if parameter_name.endswith("log_range"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return mixed.eval()


def random_policy(mixed: nn.Module, seed: int = 0) -> Policy:
    """Any candidate for every row, and bits for at least one filter."""
    g = torch.Generator().manual_seed(seed)

    def pick(values: tuple[int, ...]) -> int:
        return values[int(torch.randint(len(values), (), generator=g))]

    layers = {}
    for name, layer in weighted_layers(mixed):
        if isinstance(layer, Mixing):
            alive = tuple(b for b in layer.space.w_bits if b)
            rows = tuple(pick(layer.space.w_bits) for _ in range(layer.weight.size(0) - 1))
            w = (pick(alive), *rows) if layer.space.granularity == "filter" else pick(alive)
            layers[name] = LayerBits(w, pick(layer.space.a_bits))
    return Policy(layers, geometry_of(mixed))


def pin(mixed: nn.Module, policy: Policy) -> None:
    """Fix the gates to the policy."""
    set_gates(mixed, mode="fixed")
    for name, layer in weighted_layers(mixed):
        if isinstance(layer, Mixing) and not layer.space.is_fixed:
            bits, space = policy.bits(name), layer.space
            per_filter = bits.per_filter(len(layer.weight))
            rows = [space.candidates.index((w, bits.a_bits)) if space.joint else space.w_bits.index(w) for w in per_filter]
            choice = layer.weight_gate.choice
            choice.copy_(torch.tensor(rows if choice.dim() else rows[0]))
            if layer.input_gate is not None:
                layer.input_gate.choice.fill_(space.a_bits.index(bits.a_bits))


def silence(mixed: nn.Module, policy: Policy) -> None:
    """Let the normalisations behind pruned filters give zero: those filters are gone in a converted model."""
    modules = dict(mixed.named_modules())
    for name, carrier in plan_removal(geometry_of(mixed), policy.pruned(), remove=False).carriers.items():
        for part in ("weight", "bias", "running_mean"):
            getattr(modules[name], part).data[list(carrier.silent)] = 0


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_equal_those_of_the_mixed_model(space: str, training: bool) -> None:
    mixed = mixed_model(SPACES[space])
    for seed in range(3):
        policy = random_policy(mixed, seed)
        final = convert(mixed, policy).train(training)
        pinned = copy.deepcopy(mixed).train(training)
        pin(pinned, policy)
        silence(pinned, policy)
        torch.testing.assert_close(final(X), pinned(X), rtol=1e-6, atol=1e-6)
        assert {n: b.per_filter(1) for n, b in policy_of(final).layers.items()} == {n: b.per_filter(1) for n, b in policy.layers.items()}


def test_layers_of_the_result() -> None:
    mixed = mixed_model(SPACES["filter"])
    policy = random_policy(mixed)
    final = convert(mixed, policy, remove=False)
    kinds = {name: type(layer) for name, layer in weighted_layers(final)}
    assert kinds.pop("fc") is nn.Linear
    assert set(kinds.values()) == {QuantConv2d}
    assert not any(isinstance(module, Mixing) for module in final.modules())
    pruned = policy.pruned()
    assert pruned
    for name, layer in weighted_layers(final):
        gone = [f for f in range(len(layer.weight)) if not layer.weight[f].any()]
        assert gone == pruned.get(name, [])
    partial = Policy({name: bits for name, bits in policy.layers.items() if name != "layer1.0.conv1"}, policy.geometry)
    assert type(convert(mixed, partial).get_submodule("layer1.0.conv1")) is nn.Conv2d


def test_the_given_model_is_not_changed() -> None:
    mixed = mixed_model(SPACES["filter"])
    before = {name: value.clone() for name, value in mixed.state_dict().items()}
    final = convert(mixed, random_policy(mixed))
    with torch.no_grad():
        for parameter in final.parameters():
            parameter.fill_(3.0)
    assert all(torch.equal(value, before[name]) for name, value in mixed.state_dict().items())
    assert all(isinstance(layer, Mixing) or name == "fc" for name, layer in weighted_layers(mixed))
    assert not mixed.training
    assert not final.training
    assert convert(mixed.train(), random_policy(mixed)).training


def test_settings_of_a_convolution_survive() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, (3, 1), (2, 1), "valid", 2, 2, False, "reflect"), nn.Conv2d(6, 2, 3, padding="same"))
    x = torch.randn(2, 4, 12, 9)
    mixed = calibrate(prepare(net, SearchSpace((4, 8), (8,)), example_inputs=x), [x]).eval()
    final = convert(mixed, Policy({"0": (8, 8), "1": (8, 8)}))
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        assert [getattr(layer, name) for layer in final] == [getattr(layer, name) for layer in net]
    assert final[0].bias is None
    assert (final(x) - net(x)).abs().max() < 0.03 * net(x).abs().max()


def test_float_model() -> None:
    net = models.lenet5(image_size=16)
    policy = Policy({"conv1": (8, 8), "fc2": ((8,) * 9 + (4,), 8)})
    final = convert(net, policy, SearchSpace(weight_quantizer="symmetric", scales="layer"))
    assert {name: type(layer) for name, layer in weighted_layers(final)} == {
        "conv1": QuantConv2d, "conv2": nn.Conv2d, "fc1": nn.Linear, "fc2": QuantLinear,
    }  # fmt: skip
    assert final.conv1.space.weight_quantizer == "symmetric"
    assert final.conv1.weight_quantizer.log_range.shape == (1, 1)
    by_name = convert(net, policy, {"fc2": SearchSpace(input_quantizer="lsq+")})
    assert (by_name.conv1.space.input_quantizer, by_name.fc2.space.input_quantizer) == ("pact", "lsq+")
    assert final.train()(X).shape == (2, 10)
    assert type(convert(nn.Linear(3, 2), Policy({"": (4, 4)}))) is QuantLinear


def test_wrong_policies() -> None:
    mixed = mixed_model(SPACES["filter"])
    other = prepare(models.resnet8(in_channels=1, num_classes=3), SPACES["filter"], example_inputs=X)
    for policy, problem in [
        (Policy({"conv9": (4, 4)}), "'conv9', which this network does not have"),
        (Policy({"layer1.0.conv1": ((4, 4), 4)}), "w_bits for 2 filters, the layer has 16"),
        (
            Policy({"layer1.0.conv1": (3, 4)}),
            r"layer1.0.conv1: 3 bits is not a candidate; it has w_bits \(0, 2, 4, 8\), a_bits \(2, 4, 8\)",
        ),
        (Policy({"layer1.0.conv1": (4, 3)}), "layer1.0.conv1: 3 bits is not a candidate"),
        (Policy({"conv1": (4, 4)}), "conv1: [48] bits is not a candidate"),
        (random_policy(other), "made for another network"),
    ]:
        with pytest.raises(PolicyMismatchError, match=problem):
            convert(mixed, policy)
    for model in (models.resnet8(in_channels=1), models.resnet20(in_channels=1), models.resnet8(in_channels=1, preactivation=True)):
        with pytest.raises(PolicyMismatchError, match="made for another network"):
            convert(model, random_policy(other))
    with pytest.raises(PolicyMismatchError, match="ConvTranspose2d cannot be quantized"):
        convert(nn.Sequential(nn.ConvTranspose2d(1, 2, 3)), Policy({"0": (4, 4)}))
    with pytest.raises(PolicyMismatchError, match="w_bits for 3 filters, the layer has 2"):
        convert(nn.Sequential(nn.Conv2d(1, 2, 3)), Policy({"0": ((4, 4, 4), 4)}))


@pytest.mark.parametrize(
    "name, gone, refused",
    [
        ("resnet8", ["layer1.0.conv2"], None),
        ("resnet8", ["layer2.0.shortcut", "layer3.0.shortcut"], None),
        ("resnet8", ["conv1"], "conv1"),
        ("resnet8", ["layer1.0.conv1"], "layer1.0.conv1"),
        ("resnet8", ["layer2.0.conv2", "layer2.0.shortcut"], "layer2.0.conv2"),
        ("resnet8", ["fc"], "fc"),
        ("mobilenet", ["layer2.1.project", "layer3.1.project"], None),
        ("mobilenet", ["layer2.0.project"], "layer2.0.project"),
        ("mobilenet", ["layer2.0.depthwise"], "layer2.0.depthwise"),
        ("mobilenet", ["layer2.0.expand"], "layer2.0.expand"),
    ],
)
def test_losing_all_filters(name: str, gone: list[str], refused: str | None) -> None:
    """Allowed where a residual path carries the signal around the layer, and refused by name elsewhere."""
    mixed = prepare(models.get(name)(in_channels=1), SearchSpace((0, 4), (4,)), example_inputs=X)
    policy = Policy.uniform(geometry_of(mixed), 4, 4, dict.fromkeys(gone, LayerBits(0, 4)))
    assert survives(policy.layers, geometry_of(mixed)) == (refused is None)
    if refused is not None:
        with pytest.raises(PolicyMismatchError, match=f"layer {refused}: all its filters are at 0 bits and no residual path"):
            convert(mixed, policy)
        return
    assert all(has_bypass(geometry_of(mixed), layer) for layer in gone)
    final = convert(mixed, policy).train()
    x = torch.randn(4, 1, 16, 16, requires_grad=True)
    final(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.any()


def test_signal_must_pass_a_depthwise_layer() -> None:
    """Filters that remain in it must have an input channel that remains."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 1))
    geometry = geometry_of(prepare(net, SearchSpace((0, 4), (4,), granularity="filter"), example_inputs=X))
    check_survivors(Policy({"0": ((0, 4), 4), "1": ((0, 4), 4)}, geometry), geometry)
    with pytest.raises(PolicyMismatchError, match="layer 1: all its filters"):
        check_survivors(Policy({"0": ((0, 4), 4), "1": ((4, 0), 4)}, geometry), geometry)
    with pytest.raises(PolicyMismatchError, match="layer 1: all its filters"):
        check_survivors(Policy({"1": (4, 0)}, geometry), geometry)


def test_a_converted_model_is_an_ordinary_module() -> None:
    mixed = mixed_model(SPACES["filter"])
    policy = random_policy(mixed)
    final = convert(mixed, policy)
    expected = final(X)
    twin = copy.deepcopy(final)
    torch.testing.assert_close(twin(X), expected, rtol=0, atol=0)
    with torch.no_grad():
        twin.conv1.weight.mul_(2)
    assert not torch.equal(twin(X), expected)
    twin.load_state_dict(final.state_dict(), strict=True)
    torch.testing.assert_close(twin(X), expected, rtol=0, atol=0)
    assert final.double()(X.double()).dtype == torch.float64


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_without_a_break(training: bool) -> None:
    mixed = mixed_model(SPACES["filter"])
    final = convert(mixed, random_policy(mixed)).train(training)
    compiled = torch.compile(copy.deepcopy(final), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(compiled(x), final(x), rtol=1e-5, atol=1e-5)


def test_training_a_converted_model_keeps_pruned_filters_out() -> None:
    mixed = mixed_model(SPACES["filter"])
    policy = random_policy(mixed)
    final = convert(mixed, policy, remove=False).train()
    optimizer = torch.optim.SGD(final.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        final(torch.randn(4, 1, 16, 16)).square().mean().backward()
        optimizer.step()
    for name, filters in policy.pruned().items():
        layer = final.get_submodule(name)
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))  # type: ignore[misc]
        final.eval()(X)
        handle.remove()
        assert not seen[0][:, filters].any()


def test_runs_without_triton(tmp_path: Path) -> None:
    """A blocked import stands for a machine that has none."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, qprune\n"
        "from qprune.tasks import models\n"
        "x = torch.randn(1, 1, 16, 16)\n"
        "mixed = qprune.prepare(models.resnet8(in_channels=1), qprune.SearchSpace((2, 4), (4,)), example_inputs=x)\n"
        "final = qprune.convert(mixed, qprune.Policy({'conv1': (4, 4)}))\n"
        "assert final.eval()(x).isfinite().all()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
