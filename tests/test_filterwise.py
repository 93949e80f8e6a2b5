"""Layers whose filters choose their own bits: the dense evaluation gives what filters computed one by one give."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qprune.benchmarks.perfilter import per_filter, quantized_activation, quantized_weight
from qprune.errors import InputError, PolicyMismatchError
from qprune.gates import sample_gates, set_gates
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.unitparts import FilterActivation, FilterBatchNorm2d
from qprune.prepare import calibrate, prepare
from qprune.space import SearchSpace

PAIRS = ((2, 2), (2, 4), (3, 3), (8, 8))
SPACE = SearchSpace(pairs=PAIRS, granularity="filter", placement="output", weight_quantizer="nice", input_quantizer="nice")
OWN = pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
MODES = pytest.mark.parametrize("mode", ["fixed", "sampled", "relaxed"])
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are not worth waking other threads for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """A residual block with stride 2 and a downsample branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(6, 10, 3, 2, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(10, 10, 3, 1, 1, groups=2), nn.BatchNorm2d(10), nn.ReLU()
        self.down, self.down_bn = nn.Conv2d(6, 10, 1, 2), nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.down_bn(self.down(x)))


def images(n: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 6, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)


def searched(own: bool, mode: str = "fixed", space: SearchSpace = SPACE, dtype: torch.dtype = torch.float64, **rules: Any) -> nn.Module:
    """The block in float64, where no rounding flips a quantized value, with random normalisation, its clips calibrated and choices drawn.

    Candidates with parameters of their own get different ones."""
    block = Block()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    x = images(dtype=torch.float32)
    model = calibrate(prepare(block, replace(space, shared_weights=not own), rules, x), [x, x]).to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if own and isinstance(module, FilterConv2d | FilterBatchNorm2d):
                for value in [*module._parameters.values(), module._buffers.get("running_mean")]:
                    if value is not None:
                        value.mul_(torch.empty_like(value).uniform_(0.6, 1.4))
    for unit in units(model).values():
        unit.gate.choice.copy_(torch.randint(len(unit.candidates), (10,)))
        unit.gate.logits.data.normal_()
    set_gates(model, mode)
    sample_gates(model)
    return model.to(memory_format=torch.channels_last)


def units(model: nn.Module) -> dict[str, FilterConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FilterConv2d)}


def choose(model: nn.Module, k: int) -> None:
    """Every filter of every unit takes candidate k, or its last."""
    set_gates(model, "fixed")
    for unit in units(model).values():
        unit.gate.choice.fill_(min(k, len(unit.candidates) - 1))


@OWN
@TRAINING
def test_dense_evaluation_is_the_per_filter_one(own: bool, training: bool) -> None:
    model = searched(own).train(training)
    each = per_filter(model)
    outputs, gradients = [], []
    x = images()
    g = torch.randn(5, 10, 4, 4, dtype=torch.float64)
    for net in (model, each):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        y.backward(g)
        outputs.append(y.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-10)
    for name, unit in units(model).items():
        other = each.get_submodule(name)
        rows = torch.stack([torch.zeros_like(w[0]) if w.grad is None else w.grad[0] for w in other.weights])
        rows = rows if own else rows.unflatten(0, (len(unit.candidates), -1)).sum(0)
        torch.testing.assert_close(unit.weight.grad, rows, rtol=1e-9, atol=1e-10)
        if unit.bias is not None:
            torch.testing.assert_close(unit.bias.grad, other.bias.grad, rtol=1e-9, atol=1e-10)
    for name, norm in model.named_modules():
        if isinstance(norm, FilterBatchNorm2d):
            singles = each.get_submodule(name).norms
            for key in ("running_mean", "running_var"):
                expected = torch.cat([single.get_buffer(key) for single in singles])
                torch.testing.assert_close(norm.get_buffer(key).flatten(), expected, rtol=1e-9, atol=1e-10)
            for key in ("weight", "bias"):
                grads = [
                    torch.zeros(1, dtype=torch.float64) if (p := single.get_parameter(key)).grad is None else p.grad for single in singles
                ]
                torch.testing.assert_close(norm.get_parameter(key).grad.flatten(), torch.cat(grads), rtol=1e-9, atol=1e-10)


def test_one_unit_in_float32() -> None:
    net = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    x = images(dtype=torch.float32)
    model = calibrate(prepare(net, SPACE, example_inputs=x), [x]).eval()
    model[0].gate.choice.copy_(torch.arange(12) % 4)
    set_gates(model, "fixed")
    far = (model(x) - per_filter(model)(x)).abs() > 1e-6
    step = model[2].quantizer.learned_range().item() / 3
    assert far.float().mean() < 1e-3 and (model(x) - per_filter(model)(x)).abs().max() < step * 1.01  # a rounding may flip


@OWN
def test_statistics_move_for_the_chosen_candidates_only(own: bool) -> None:
    model = searched(own).train()
    model.bn1.running_mean.fill_(1)
    before = copy.deepcopy(model.bn1.state_dict())
    model(images())
    choice = model.conv1.gate.choice
    for key in ("running_mean", "running_var"):
        moved = model.bn1.get_buffer(key) != before[key]
        if own:
            assert torch.equal(moved, F.one_hot(choice, 4).t().bool())
        else:
            assert moved.all()
    if own:
        assert torch.equal(model.bn1.num_batches_tracked, F.one_hot(choice, 4).t())


def test_plain_averages_of_statistics_count_each_candidate_for_itself() -> None:
    model = searched(own=True).train()
    model.bn1.momentum = None
    model.bn1.reset_running_stats()
    seen: dict[tuple[int, int], list[Tensor]] = {}
    model.conv1.register_forward_hook(lambda layer, args, y: [
        seen.setdefault((k, f), []).append(y[:, f].mean()) for f, k in enumerate(layer.gate.choice.tolist())
    ] and None)  # fmt: skip
    for _ in range(3):
        model.conv1.gate.choice.copy_(torch.randint(4, (10,)))
        model(images())
    for (k, f), means in seen.items():
        torch.testing.assert_close(model.bn1.running_mean[k, f], torch.stack(means).mean().detach())
        assert model.bn1.num_batches_tracked[k, f] == len(means)


@OWN
@TRAINING
def test_relaxation_is_the_sum_over_branches(own: bool, training: bool) -> None:
    model = searched(own, "relaxed").train(training)
    unit = [model.conv1, model.bn1, model.relu1]
    x, g = images(), torch.randn(5, 10, 4, 4, dtype=torch.float64)
    residual = torch.randn(5, 10, 4, 4, dtype=torch.float64)

    def run() -> Tensor:
        z: Tensor = unit[1](unit[0](x)) + residual
        return unit[2](z)  # type: ignore[no-any-return]

    p = model.conv1.gate.distribution().double()
    y = run()
    y.backward(g)
    learned = model.conv1.gate.logits.grad.clone()
    branches = []
    for k in range(4):
        choose(model, k)
        branches.append(run().detach())
    torch.testing.assert_close(y, sum(p[k] * branch for k, branch in enumerate(branches)), rtol=1e-9, atol=1e-6)
    gain = torch.stack([(g * branch).sum() for branch in branches])
    torch.testing.assert_close(learned.double(), (p * (gain - (p * gain).sum())).detach(), rtol=1e-4, atol=1e-4)


def test_relaxation_without_an_activation_is_summed_behind_the_normalisation() -> None:
    model = searched(own=True, mode="relaxed").eval()
    x = images()
    y = model.down_bn(model.down(x))
    p = model.down.gate.distribution().double()
    assert y.shape == (5, 10, 4, 4) and len(p) == 3
    branches = []
    for k in range(3):
        choose(model, k)
        branches.append(model.down_bn(model.down(x)))
    torch.testing.assert_close(y, sum(p[k] * branch for k, branch in enumerate(branches)), rtol=1e-6, atol=1e-6)


def test_relaxed_shared_statistics_move_by_the_weighted_mean_of_the_branches() -> None:
    model = searched(own=False, mode="relaxed").train()
    before, x = model.down_bn.running_mean.clone(), images()
    p = model.down.gate.distribution().double()
    model(x)
    moved = model.down_bn.running_mean
    means = [branch.mean((0, 2, 3)) for branch in model.down(x)]
    expected = before + 0.1 * (sum(p[k] * mean for k, mean in enumerate(means)) - before)
    torch.testing.assert_close(moved, expected.detach(), rtol=1e-6, atol=1e-7)


def test_sampled_is_the_drawn_choice_with_the_gradient_of_the_mixture() -> None:
    model = searched(own=True, mode="sampled").eval()
    x = images()
    y = model(x)
    y.sum().backward()
    drawn = {name: unit.gate().argmax(1) for name, unit in units(model).items()}
    assert all((unit.gate.logits.grad != 0).any() for unit in units(model).values())
    set_gates(model, "fixed")
    for name, unit in units(model).items():
        assert len(drawn[name].unique()) > 1
        unit.gate.choice.copy_(drawn[name])
    torch.testing.assert_close(y, model(x), rtol=1e-12, atol=1e-12)


def test_one_choice_for_all_filters_of_a_layer() -> None:
    model = searched(own=False, mode="sampled", space=replace(SPACE, granularity="layer"))
    for unit in units(model).values():
        assert len(unit.gate().argmax(1).unique()) == 1 and unit.gate().shape == (10, len(unit.candidates))


@OWN
@MODES
@pytest.mark.parametrize("stage", ["quantized", "noisy", "float"])
def test_every_parameter_has_a_gradient(own: bool, mode: str, stage: str) -> None:
    model = searched(own, mode, replace(SPACE, weight_quantizer="symmetric", input_quantizer="pact")).train()
    for unit in units(model).values():
        unit.weight_quantizer.stage = stage
    model.relu1.quantizer.stage = "clamped"
    model(images()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    if own and mode != "relaxed":
        unchosen = model.conv1.gate().argmax(1).ne(torch.arange(4).unsqueeze(1)).flatten()
        assert (model.conv1.weight.grad[unchosen] == 0).all()
        assert (model.conv1.weight.grad[~unchosen] != 0).any()


def test_the_input_gradient_is_taken_with_the_quantized_weight() -> None:
    model = searched(own=False).train()
    x = (0.3 * images()).requires_grad_()  # nothing clipped at the input
    g = torch.randn(5, 10, 4, 4, dtype=torch.float64)
    model.conv1(x).backward(g)
    clip = model.conv1.weight_quantizer.learned_range().double()[0, 0].item() / 2
    rows = [quantized_weight(model.conv1.weight[f], clip, PAIRS[k][0]) for f, k in enumerate(model.conv1.gate.choice.tolist())]
    expected = torch.nn.grad.conv2d_input(x.shape, torch.stack(rows), g, stride=2, padding=1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-6)


@OWN
@MODES
def test_a_step_reads_no_value_back(own: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert not any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique"))
            return func(*args, **(kwargs or {}))

    # on a CPU, and only there, one_hot looks at its values
    monkeypatch.setattr(F, "one_hot", lambda t, k: (t.unsqueeze(-1) == torch.arange(k)).long())
    model, x = searched(own, mode, dtype=torch.float32).train(), images(dtype=torch.float32)
    with NoReads():
        model(x).sum().backward()


@OWN
@MODES
def test_autocast(own: bool, mode: str) -> None:
    model, x = searched(own, mode, dtype=torch.float32).train(), images(dtype=torch.float32)
    expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # a rounding to 8 bits may flip a quantized value: correlation, not closeness
    assert torch.corrcoef(torch.stack([y.detach().float().flatten(), expected.flatten()]))[0, 1] > 0.95


def test_the_reference_quantizers() -> None:
    w = torch.tensor([-2.0, -0.9, -0.4, 0.1, 0.6, 3.0], requires_grad=True)
    q = quantized_weight(w, 1.0, 2)
    q.sum().backward()
    assert q.tolist() == pytest.approx([-1, -1, 0, 0, 1, 1]) and w.grad.tolist() == [1] * 6
    x = torch.tensor([-1.0, 0.0, 0.4, 1.5, 1.6], requires_grad=True)
    y = quantized_activation(x, 1.5, 2)
    y.sum().backward()
    assert y.tolist() == pytest.approx([0, 0, 0.5, 1.5, 1.5]) and x.grad.tolist() == [0, 0, 1, 1, 0]


@OWN
@MODES
def test_channels_last_is_kept(own: bool, mode: str) -> None:
    model = searched(own, mode, dtype=torch.float32).train()
    kept = []
    for module in (model.conv1, model.relu1, model.down_bn, model.relu2):
        module.register_forward_hook(lambda layer, args, y: kept.append(y))
    model(images(dtype=torch.float32))
    for y in kept:
        dense = y if y.dim() == 4 else y.movedim(0, 1).flatten(1, 2)
        assert dense.is_contiguous(memory_format=torch.channels_last)


@OWN
def test_state_dict_round_trip(own: bool) -> None:
    model, other = searched(own), searched(own)
    state = model.state_dict()
    assert sum(key.endswith("logits") for key in state) == 3
    other.load_state_dict(state, strict=True)
    x = images()
    assert torch.equal(model.eval()(x), other.eval()(x))


@OWN
def test_a_float_state_dict_loads(own: bool) -> None:
    block, model = Block().double(), searched(own)
    model.load_state_dict(block.state_dict(), strict=True)
    for k in range(4):
        torch.testing.assert_close(model.conv1.each_weight()[k], block.conv1.weight)
    deviation, mean = torch.std_mean(block.conv1.weight)
    clips = model.conv1.weight_quantizer.learned_range().double() / 2
    torch.testing.assert_close(clips, (mean.abs() + 3.45 * deviation).detach().expand_as(clips), rtol=1e-5, atol=0)


@OWN
def test_copies_keep_one_gate_per_unit(own: bool) -> None:
    twin = copy.deepcopy(searched(own))
    assert twin.conv1.gate is twin.bn1.gate is twin.relu1.gate
    assert len(list(twin.parameters())) == len({id(p) for p in twin.parameters()})


@OWN
def test_plain_modules_compute_the_chosen_candidates_in_float(own: bool) -> None:
    model = searched(own).eval()
    conv, norm = model.conv1.as_plain(), model.bn1.as_plain()
    assert type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and type(model.relu1.as_plain()) is nn.ReLU
    for f, k in enumerate(model.conv1.gate.choice.tolist()):
        torch.testing.assert_close(conv.weight[f], model.conv1.each_weight()[k][f])
        torch.testing.assert_close(norm.running_mean[f], model.bn1.running_mean[k, f] if own else model.bn1.running_mean[f])
    assert not {"gate", "own", "last"} & set(norm.__dict__) and "weight_quantizer" not in conv._modules
    assert norm(conv(images())).shape == (5, 10, 4, 4)


def test_choices_for_bits() -> None:
    unit = searched(own=False).conv1
    assert unit.choice_for([2] * 5 + [8] * 5, [4] * 5 + [8] * 5).tolist() == [1] * 5 + [3] * 5
    with pytest.raises(PolicyMismatchError, match=r"layer conv1: \(3, 8\) is not a candidate"):
        unit.choice_for(3, 8)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(InputError, match="layer conv1: expected 6 input channels"):
        searched(own=False).conv1(torch.randn(2, 5, 8, 8))


@pytest.mark.parametrize("kind", ["lsq", "symmetric", "dorefa", "uniq"])
def test_other_quantizers(kind: str) -> None:
    for own in (False, True):
        space = replace(SPACE, weight_quantizer=kind, input_quantizer="uniq" if kind == "uniq" else "pact")
        for mode in ("fixed", "relaxed"):
            y = searched(own, mode, space).eval()(images())
            assert math.isfinite(y.sum().item()) and y.std() > 0


def test_own_candidates_start_from_the_float_layer() -> None:
    x = images(dtype=torch.float32)
    block = Block()
    model = prepare(block, replace(SPACE, shared_weights=False), example_inputs=x)
    assert model.conv1.weight.shape == (40, 6, 3, 3) and model.bn2.running_var.shape == (4, 10)
    assert all(torch.equal(weight, block.conv1.weight) for weight in model.conv1.each_weight())
    assert isinstance(model.relu2, FilterActivation) and model.relu2.quantizer.own
