"""Several configurations of one batch together: what one by one gives, without changing the model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import InputError
from qprune.gates import set_gates
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.stacked import losses, stacked_logits
from qprune.prepare import calibrate, prepare
from qprune.space import SearchSpace
from qprune.tasks import models

SPACE = SearchSpace(
    pairs=((2, 2), (2, 4), (3, 3), (8, 8)), granularity="filter", placement="output", weight_quantizer="nice", input_quantizer="nice"
)
S = 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are not worth waking other threads for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(channels: int = 3) -> Tensor:
    return torch.randn(4, channels, 16, 16, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def searched(
    net: nn.Module, rules: dict[str, SearchSpace | None] | None = None, own: bool = False, channels: int = 3
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in float64, where rounding flips no quantized value, and S configurations."""
    x = images(channels).float()
    model = calibrate(prepare(net, replace(SPACE, shared_weights=not own), rules, x), [x]).double().to(memory_format=torch.channels_last)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return model, choices(model)


def choices(model: nn.Module, size: int = S) -> dict[str, Tensor]:
    units = {name: unit for name, unit in model.named_modules() if isinstance(unit, FilterConv2d)}
    return {name: torch.randint(len(unit.candidates), (size, unit.out_channels)) for name, unit in units.items()}


def one(model: nn.Module, chosen: dict[str, Tensor], s: int) -> nn.Module:
    """The model with its gates fixed at configuration s."""
    model = copy.deepcopy(model)
    for name, rows in chosen.items():
        gate = model.get_submodule(name).gate
        set_gates(gate, "fixed")
        gate.choice.copy_(rows[s])
    return model


NETWORKS = {
    "resnet8": (models.resnet8, {}, 3),
    "float-stem": (models.resnet8, {"conv1": None}, 3),
    "fixed-stem": (models.resnet8, {"conv1": SearchSpace.fixed(8, 8), "fc": SearchSpace.fixed(8, 8)}, 3),
    "other-layers": (models.resnet8, {"layer1.0.conv1": SearchSpace((2, 4), (4, 8)), "layer3.0.conv2": None}, 3),
    "mobilenet": (models.mobilenet, {}, 3),
    "lenet5": (lambda: models.lenet5(image_size=16), {}, 1),
}


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", NETWORKS)
def test_together_is_one_by_one(name: str, own: bool, caplog: pytest.LogCaptureFixture) -> None:
    build, rules, channels = NETWORKS[name]
    model, chosen = searched(build(), rules, own, channels)
    x = images(channels)
    with caplog.at_level(logging.INFO, "qprune"):
        running = stacked_logits(model, chosen, x, "running")
        batch = stacked_logits(model, chosen, x)
    assert caplog.messages == [] and running.shape == (S, 4, 10)
    for s in range(S):
        alone = one(model, chosen, s)
        torch.testing.assert_close(running[s], alone.eval()(x).detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(batch[s], alone.train()(x).detach(), rtol=1e-9, atol=1e-12)


def test_passes_of_any_size_give_the_same() -> None:
    model, chosen = searched(models.resnet8())
    x = images()
    for together in (1, 2):
        torch.testing.assert_close(
            stacked_logits(model, chosen, x, together=together), stacked_logits(model, chosen, x), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_changes(training: bool) -> None:
    model, chosen = searched(models.resnet8(), own=True)
    model.train(training)
    model.bn1.train(not training)
    set_gates(model, "sampled")
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    out = stacked_logits(model, chosen, images())
    assert not out.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.conv1.gate.mode == "sampled"


def test_an_error_in_the_network_leaves_it_as_it_was() -> None:
    model, chosen = searched(models.resnet8())
    with pytest.raises(InputError, match="conv1"):
        stacked_logits(model, chosen, torch.randn(4, 5, 16, 16).double())
    assert model.training and all("forward" not in module.__dict__ for module in model.modules())


def test_units_that_are_not_named_keep_their_choice() -> None:
    model, chosen = searched(models.resnet8())
    held = chosen.pop("conv1")
    model.conv1.gate.choice.copy_(held[1])
    together = stacked_logits(model, chosen, x := images(), "running")
    chosen["conv1"] = held[1].expand(S, -1)
    torch.testing.assert_close(together, stacked_logits(model, chosen, x, "running"), rtol=0, atol=0)


def test_losses_of_a_closure() -> None:
    model, chosen = searched(models.resnet8())
    x, y = images(), torch.randint(10, (4,))
    seen: list[bool] = []

    def closure(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        network.eval()
        seen.append(torch.is_grad_enabled())
        return F.cross_entropy(network(x), y) + 0.5 * network(x.flip(3)).square().mean()

    found = losses(model, chosen, closure, (x, y), "running")
    expected = [closure(one(model, chosen, s), x, y).item() for s in range(S)]
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected, rel=1e-9)
    assert not any(seen[:S]) and model.training


def test_a_closure_that_uses_parts_of_the_model_gets_the_model_itself() -> None:
    model, chosen = searched(nn.Sequential(models.resnet8(), nn.Identity()))
    x, y = images(), torch.randint(10, (4,))

    def closure(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network.get_submodule("0")(x), y)

    found = losses(model, chosen, closure, (x, y), "running")
    expected = [closure(one(model, chosen, s).eval(), x, y).item() for s in range(S)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9) and len(set(expected)) == S


class MixesChannels(nn.Module):
    """Something in its own code treats all channels as one network's."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv1, self.relu, self.conv2, self.how = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.conv1(x))
        if self.how == "softmax":
            y = y * y.mean((2, 3), keepdim=True).softmax(1)
        elif self.how == "reshape":
            y = y.view(y.size(0), 8, -1).view(y.shape)
        else:
            y = y.view(y.size(0), 2, -1, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
        return self.conv2(y).mean((2, 3))


@pytest.mark.parametrize("how", ["softmax", "reshape", "shuffle"])
def test_networks_that_mix_channels_take_one_pass_each(how: str, caplog: pytest.LogCaptureFixture) -> None:
    model, chosen = searched(MixesChannels(how))
    x = images()
    with caplog.at_level(logging.INFO, "qprune"):
        together = [stacked_logits(model, chosen, x, "running") for _ in range(2)][-1]
    assert [message for message in caplog.messages if "one pass for each" in message] == caplog.messages and len(caplog.messages) == 1
    for s in range(S):
        torch.testing.assert_close(together[s], one(model, chosen, s).eval()(x).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"fc": c["conv1"]}, "'fc' is no unit"),
        (lambda c: c | {"conv1": c["conv1"][:2]}, "with one S"),
        (lambda c: c | {"conv1": c["conv1"][0]}, "with one S"),
        (lambda c: c | {"conv1": c["conv1"][:, :5]}, "layer conv1 has 16 filters, got choices for 5"),
        (lambda c: {}, "with one S"),
    ],
)
def test_choices_that_do_not_fit(change, message: str) -> None:  # type: ignore[no-untyped-def]
    model, chosen = searched(models.resnet8())
    with pytest.raises(InputError, match=message):
        stacked_logits(model, change(chosen), images())


def test_unknown_statistics() -> None:
    model, chosen = searched(models.resnet8())
    with pytest.raises(InputError, match="statistics: expected one of batch, running, got 'mean'"):
        stacked_logits(model, chosen, images(), "mean")


def test_no_configuration_per_pass() -> None:
    model, chosen = searched(models.resnet8())
    with pytest.raises(InputError, match="together: expected at least 1 configuration per pass, got 0"):
        stacked_logits(model, chosen, images(), together=0)
