"""Training: it learns, it resumes, it says where numbers went wrong, and it re-estimates BatchNorm statistics."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qprune import recalibrate
from qprune.kernels import QPruneError
from qprune.quantizers.base import RangeQuantizer
from qprune.tasks import data, models, train


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small lose more to waiting for a busy machine's other cores than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task() -> data.Task:
    return data.load("digits", seed=0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int = 32) -> data.Task:
    return data.synthetic(in_channels=3, image_size=8, train=count, val=8, test=8)


@pytest.fixture(scope="module")
def trained(task: data.Task) -> nn.Module:
    torch.manual_seed(0)
    net = models.for_task("resnet8", task)
    train.fit(net, task.loader("train", 64, generator(0)), 3)
    return net


def test_fit_learns(task: data.Task, trained: nn.Module) -> None:
    _, before = train.evaluate(models.for_task("resnet8", task), task.loader("val", 256))
    _, after = train.evaluate(trained, task.loader("val", 256))
    assert before < 0.4
    assert after > 0.75


def test_fit_reports() -> None:
    problem = noise()
    net = models.resnet8()
    steps: list[tuple[int, int]] = []
    seen: list[dict[str, float]] = []
    history = train.fit(
        net,
        problem.loader("train", 8, generator(0)),
        3,
        val_loader=problem.loader("val", 8),
        on_epoch=lambda record, trainer: seen.append(record),
        progress=lambda step, total, loss: steps.append((step, total)),
    )
    assert history == seen
    assert (history[-1]["val_loss"], history[-1]["val_accuracy"]) == train.evaluate(net, problem.loader("val", 8))
    assert steps == [(step + 1, 12) for step in range(12)]
    assert [record["epoch"] for record in history] == [0, 1, 2]
    assert [record["step"] for record in history] == [4, 8, 12]
    assert set(history[0]) == {"epoch", "step", "lr", "loss", "accuracy", "seconds", "val_loss", "val_accuracy"}


def test_fit_repeats_and_resumes_exactly() -> None:
    problem = noise()
    start = models.resnet8()
    states: list[dict[str, Any]] = []

    def keep(record: dict[str, float], trainer: train.Trainer) -> None:
        states.append(copy.deepcopy(trainer.state_dict()))

    whole = copy.deepcopy(start)
    history = train.fit(whole, lambda epoch: problem.loader("train", 8, generator(epoch)), 3, on_epoch=keep)
    resumed = models.resnet8()
    again = train.fit(resumed, lambda epoch: problem.loader("train", 8, generator(epoch)), 3, resume=states[0])
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert [record["loss"] for record in again] == [record["loss"] for record in history]


def test_a_run_goes_on_within_a_pass() -> None:
    problem, start, states = noise(), models.resnet8(), []
    whole = train.Trainer(copy.deepcopy(start), 2)

    def keep(step: int, total: int, loss: float) -> None:
        states.append(copy.deepcopy(whole.state_dict()))

    whole.fit(lambda epoch: problem.loader("train", 8, generator(epoch)), progress=keep)
    for state in (states[1], states[3], states[6]):
        again = train.Trainer(models.resnet8(), 2)
        again.load_state_dict(state)
        again.fit(lambda epoch: problem.loader("train", 8, generator(epoch)))
        assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))
        assert [(r["loss"], r["accuracy"], r["step"]) for r in again.history] == [
            (r["loss"], r["accuracy"], r["step"]) for r in whole.history
        ]
        assert again.state_dict()["running"] is None


def test_zero_epochs_train_nothing() -> None:
    net = models.resnet8()
    before = copy.deepcopy(net.state_dict())
    assert train.fit(net, noise().loader("train", 8), 0) == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_rate_rises_then_falls() -> None:
    factors = [train.rate(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == 1.0 == max(factors)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.01
    assert train.rate(0, 100, 0.0) == 1.0


class Scale(RangeQuantizer):
    """A quantizer's parameters, as a factor and a summand."""

    def __init__(self) -> None:
        super().__init__((4, 8), [(15.0, 8.0), (255.0, 128.0)], 2, None)
        self.offset = nn.Parameter(torch.zeros(2))


class WithQuantizers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.conv.weight_quantizer = Scale()
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.conv.weight_quantizer
        scale = quantizer.log_range.exp().mean() + quantizer.offset.sum()
        return self.bn(self.conv(x) * scale).mean((2, 3))


def test_parameter_groups() -> None:
    net = WithQuantizers()
    decayed, plain, quantizer = train.parameter_groups(net)
    assert [id(p) for p in decayed] == [id(net.conv.weight)]
    assert {id(p) for p in plain} == {id(net.conv.bias), id(net.bn.weight), id(net.bn.bias)}
    assert {id(p) for p in quantizer} == {id(p) for p in net.conv.weight_quantizer.parameters()}
    trainer = train.Trainer(net, 1, weight_decay=0.5)
    assert [group["weight_decay"] for optimizer, _ in trainer.optimizers for group in optimizer.param_groups] == [0.5, 0.0, 0]


def test_quantizer_parameters_learn_at_their_own_rate() -> None:
    problem = data.synthetic(in_channels=3, image_size=8, num_classes=4, train=8, val=8, test=8)
    net = WithQuantizers()
    trainer = train.Trainer(net, 1, lr=0.0, quantizer_lr=0.01, warmup=0.0)
    weight = net.conv.weight.clone()
    trainer.run_epoch(problem.loader("train", 8))
    assert torch.equal(net.conv.weight, weight)
    # The first step of Adam is its rate, whatever the gradient; BatchNorm leaves the scale a tiny one.
    assert 0 < net.conv.weight_quantizer.offset.abs().max() <= 0.0101


def test_nonfinite_loss_names_step_and_layer() -> None:
    net = models.resnet8()
    trainer = train.Trainer(net, 3)
    problem = noise(16)
    trainer.run_epoch(problem.loader("train", 8))
    with torch.no_grad():
        net.layer2[0].conv1.weight[0, 0, 0, 0] = torch.inf
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(train.NonFiniteError, match=r"loss is nan at step 2: .* layer 'layer2\.0\.conv1'") as caught:
        trainer.run_epoch(problem.loader("train", 8))
    assert isinstance(caught.value, QPruneError)
    assert (caught.value.step, caught.value.layer) == (2, "layer2.0.conv1")
    assert torch.equal(net.conv1.weight, before["conv1.weight"])


def test_nonfinite_loss_with_finite_layers_blames_the_loss() -> None:
    trainer = train.Trainer(models.resnet8(), 1, loss=lambda logits, y: logits.sum() / 0)
    with pytest.raises(train.NonFiniteError, match="at step 0: every layer's output is finite"):
        trainer.run_epoch(noise().loader("train", 8))


def test_first_nonfinite_layer() -> None:
    net = models.resnet8()
    x = torch.randn(2, 3, 8, 8)
    buffers = copy.deepcopy(dict(net.named_buffers()))
    assert train.first_nonfinite_layer(net, lambda: net(x)) is None
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert train.first_nonfinite_layer(net, lambda: net(x * torch.inf)) == "conv1"
    with torch.no_grad():
        net.layer1[0].bn2.bias.fill_(3e38)
        net.bn1.bias.fill_(3e38)
    assert train.first_nonfinite_layer(net, lambda: net(x)) == "layer1.0.conv1"
    assert not any(layer._forward_hooks for layer in net.modules())


def test_evaluate_puts_modes_back() -> None:
    net = models.resnet8()
    net.train()
    net.bn1.eval()
    loss, accuracy = train.evaluate(net, noise().loader("val", 3))
    assert loss > 0
    assert 0 <= accuracy <= 1
    assert net.training
    assert not net.bn1.training
    assert net.layer1[0].bn1.training
    with pytest.raises(QPruneError, match="no batch"):
        train.evaluate(net, [])


def test_recalibrated_statistics_repair_accuracy(task: data.Task, trained: nn.Module) -> None:
    net = copy.deepcopy(trained)
    good = train.evaluate(net, task.loader("val", 256))[1]
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.add_(3.0)
    broken = train.evaluate(net, task.loader("val", 256))[1]
    recalibrate(net, task.loader("train", 64, generator(1)))
    repaired = train.evaluate(net, task.loader("val", 256))[1]
    assert broken < 0.5
    assert repaired > good - 0.05
