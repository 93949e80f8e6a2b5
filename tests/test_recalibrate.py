"""Statistics of normalisations, against averages over the batches that the layers really saw."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lookalikes import build
from ranks import be_one_of_two, two_ranks
from torch import Tensor, nn

from qprune import SearchSpace, convert, prepare, recalibrate
from qprune.errors import InputError
from qprune.nn.slim import slim
from qprune.policy import LayerBits, Policy
from qprune.tasks import models


def batches(count: int = 3, seed: int = 0, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 8, 8, generator=g) + i, torch.zeros(size, dtype=torch.int64)) for i in range(count)]


def chain(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()


def first_outputs(net: nn.Sequential, data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [net[0](x) for x, _ in data]


def test_the_statistics_are_the_plain_average_over_the_batches() -> None:
    net, data = chain(nn.BatchNorm2d(4, momentum=0.3)), batches()
    net[1].running_mean.fill_(100.0)
    weights = copy.deepcopy([p.detach() for p in net.parameters()])
    assert recalibrate(net, data) is net
    seen = first_outputs(net, data)
    torch.testing.assert_close(net[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0))
    assert (net[1].momentum, int(net[1].num_batches_tracked)) == (0.3, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())


def test_the_second_norm_sees_what_the_first_makes_in_training_without_dropout() -> None:
    net, data = chain(nn.BatchNorm2d(4)), batches(1)
    recalibrate(net, data)
    norm = copy.deepcopy(net[1]).train()
    with torch.no_grad():
        seen = net[3](norm(net[0](data[0][0])))
    torch.testing.assert_close(net[4].running_mean, seen.mean((0, 2, 3)))


def test_the_number_of_batches() -> None:
    net, data = chain(nn.BatchNorm2d(4)), batches(5)
    taken: list[int] = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(data):
            taken.append(i)
            yield batch

    recalibrate(net, loader(), batches=2)
    assert taken == [0, 1]
    torch.testing.assert_close(net[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in first_outputs(net, data[:2])]).mean(0))


def test_a_momentum_moves_the_present_statistics() -> None:
    net, data = chain(nn.BatchNorm2d(4)), batches(1)
    net[1].running_mean.fill_(1.0)
    recalibrate(net, data, momentum=0.25)
    torch.testing.assert_close(net[1].running_mean, 0.75 + 0.25 * first_outputs(net, data)[0].mean((0, 2, 3)))


def test_modes_and_momenta_are_put_back() -> None:
    net = chain(nn.BatchNorm2d(4, momentum=None)).train()
    net[4].eval()
    recalibrate(net, batches())
    assert [m.training for m in net] == [True, True, True, True, False]
    assert (net[1].momentum, net[4].momentum) == (None, 0.1)
    assert not net[1]._forward_pre_hooks


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4, track_running_stats=True), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, affine=False)])
def test_other_norms_with_statistics(norm: nn.Module) -> None:
    net, data = chain(norm), batches()
    recalibrate(net, data)
    torch.testing.assert_close(net[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in first_outputs(net, data)]).mean(0))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4), nn.Identity()])
def test_norms_without_statistics_stay(norm: nn.Module) -> None:
    net = chain(norm)
    before = copy.deepcopy(net[1].state_dict())
    recalibrate(net, batches())
    assert before.keys() == net[1].state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in net[1].state_dict().items())
    assert int(net[4].num_batches_tracked) == 3


def test_a_shared_norm_averages_over_all_calls() -> None:
    norm = nn.BatchNorm2d(3)
    net = nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm).eval()
    data = batches(2)
    recalibrate(net, data)
    x = torch.stack([x.mean((0, 2, 3)) for x, _ in data])
    inner = copy.deepcopy(norm).train()
    with torch.no_grad():
        y = torch.stack([net[1](inner(x)).mean((0, 2, 3)) for x, _ in data])
    torch.testing.assert_close(norm.running_mean, torch.cat([x, y]).mean(0), rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_not_called_keeps_its_statistics() -> None:
    net = build("googlenet")
    net.register_module("unused", nn.BatchNorm2d(3))
    net.unused.running_mean.fill_(7.0)
    recalibrate(net, [torch.randn(2, 3, 32, 32)])
    assert (net.unused.running_mean == 7).all()


def test_a_norm_with_an_activation_of_its_own() -> None:
    net = build("antialiased")
    net.conv_stem.bn.drop = nn.Dropout(0.5)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        seen = net.conv_stem.conv(x)
    recalibrate(net, [x, x])
    torch.testing.assert_close(net.conv_stem.bn.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(net.blocks[0]["conv"].bn.running_mean, _after_stem(net, x).mean((0, 2, 3)))


@torch.no_grad()
def _after_stem(net: nn.Module, x: Tensor) -> Tensor:
    """What the second norm sees if the first is in training mode and its dropout is not."""
    norm = nn.BatchNorm2d(6)
    norm.load_state_dict(net.conv_stem.bn.state_dict())
    return net.blocks[0]["conv"].conv(norm.train()(net.conv_stem.conv(x)).relu())


def test_without_norms_the_model_comes_back() -> None:
    net = nn.Conv2d(3, 4, 3)
    assert recalibrate(net, []) is net


@pytest.mark.parametrize("broken", [[], [(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)), (torch.randn(2, 5, 8, 8), None)]])
def test_after_an_error_nothing_has_changed(broken: list[object]) -> None:
    net = chain(nn.BatchNorm2d(4)).train()
    net[1].running_mean.fill_(3.0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((InputError, RuntimeError, TypeError)):
        recalibrate(net, broken)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(m.training for m in net.modules()) and net[1].momentum == 0.1


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_a_momentum_outside_of_its_range_is_refused(momentum: float) -> None:
    with pytest.raises(InputError, match="momentum"):
        recalibrate(chain(nn.BatchNorm2d(4)), batches(), momentum=momentum)


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(InputError, match="no batch"):
        recalibrate(chain(nn.BatchNorm2d(4)), [])


def test_mixed_and_converted_networks() -> None:
    x = torch.randn(4, 1, 16, 16)
    model = prepare(models.resnet8(in_channels=1), SearchSpace((2, 4), (8,)), example_inputs=x)
    model.train()(x)
    final = convert(model, Policy({name: LayerBits(4, 8) for name in ("conv1", "layer1.0.conv1")}))
    quantizers = {name: value.clone() for name, value in final.state_dict().items() if "quantizer" in name}
    for net in (model, final):
        recalibrate(net.eval(), [x])
        with torch.no_grad():
            torch.testing.assert_close(net.bn1.running_mean, net.conv1(x).mean((0, 2, 3)))
    assert quantizers and all(torch.equal(value, final.state_dict()[name]) for name, value in quantizers.items())


def test_a_slimmable_network_keeps_the_statistics_of_widths_that_are_off() -> None:
    net = slim(models.thin_resnet(in_channels=1), torch.randn(2, 1, 16, 16), (0.5, 1.0))
    before = {name: value.clone() for name, value in net.state_dict().items() if "running" in name}
    recalibrate(net, [torch.randn(4, 1, 16, 16)])
    changed = {name for name, value in before.items() if not torch.equal(value, net.state_dict()[name])}
    assert changed == {name for name in before if ".norms.1." in name}


def test_it_repairs_statistics_of_other_weights() -> None:
    net = models.resnet8(in_channels=1)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.fill_(30.0)
    x = torch.randn(64, 1, 8, 8)
    broken = net.eval()(x).detach()
    recalibrate(net, [x[:32], x[32:]])
    assert broken.std(0).mean() < 1e-3 < net(x).std(0).mean()


def work(rank: int) -> dict[str, list[float]]:
    """Statistics of a rank, which had rank + 1 batches of its own."""
    net = chain(nn.BatchNorm2d(4))
    recalibrate(nn.parallel.DistributedDataParallel(net), batches(rank + 1, seed=rank))
    found = {name: net[1].state_dict()[name].tolist() for name in ("running_mean", "running_var")}
    try:
        recalibrate(net, batches(rank))
    except InputError as error:
        found["refused"] = [len(str(error))]
    return found


def test_ranks_agree_on_the_mean_over_all_batches(tmp_path: Path) -> None:
    first, second = two_ranks(__file__, tmp_path / "store", timeout=120)
    assert first == second and "refused" in first
    seen = first_outputs(chain(nn.BatchNorm2d(4)), batches(1, seed=0) + batches(2, seed=1))
    torch.testing.assert_close(torch.tensor(first["running_mean"]), torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    torch.testing.assert_close(torch.tensor(first["running_var"]), torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0))


if __name__ == "__main__":
    be_one_of_two(work)
