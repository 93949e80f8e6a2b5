"""The pruning search: losses of configurations, its steps, budgets and states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qprune
from qprune.budget import Budget
from qprune.errors import BudgetError, InfeasibleBudgetError, InputError, NonFiniteError
from qprune.nn.slim import current_widths, extract, flops, homogeneous, reestimate, set_widths, slim, state_of
from qprune.search.constraint import Constraint
from qprune.search.optimizers import Optimizers
from qprune.search.relative import interpolate, relative_loss
from qprune.search.slimmable import Slimmable
from qprune.search.widths import WIDTHS
from qprune.tasks.resnet import BasicBlock


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        BasicBlock(4, 4, 1), BasicBlock(4, 8, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def images(seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    """Three classes of 8x8 images that differ in which third of the image is bright."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (size,), generator=g)
    x = 0.3 * torch.randn(size, 1, 8, 8, generator=g)
    for i, c in enumerate(y.tolist()):
        x[i, :, 3 * c : 3 * c + 2] += 1.0
    return x, y


def task(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def method(budget: Budget | None = None, shortcut: str = "permanent", weight_lr: float = 0.05, **options: Any) -> Slimmable:
    budget = budget or Budget(macs="50%")
    model = slim(small_net(), images()[0], shortcut=shortcut).train()
    limits = Slimmable.limits(model, budget)
    return Slimmable(model, Constraint(limits), Optimizers(model, weight_lr=weight_lr), "product", None, **options)


def test_interpolation_by_hand() -> None:
    """Knots (10, 4), (20, 2), (40, 1): slopes −0.2 and −0.05; below 10 the first goes on, above 40 it stays at 1."""
    cost = torch.tensor([5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 100.0])
    knots, values = torch.tensor([20.0, 10.0, 40.0]), torch.tensor([2.0, 4.0, 1.0])
    expected = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.5, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(interpolate(cost, knots, values), expected)
    assert interpolate(cost, torch.tensor([7.0]), torch.tensor([3.0])).tolist() == [3.0] * 7
    assert interpolate(torch.tensor([1.0]), torch.tensor([2.0, 2.0, 4.0]), torch.tensor([6.0, 5.0, 3.0])).tolist() == [6.0]
    rising = interpolate(torch.tensor([0.0]), torch.tensor([10.0, 11.0]), torch.tensor([1.0, 2.0]))
    assert rising.tolist() == pytest.approx([0.1])


def test_relative_loss_by_hand() -> None:
    """At cost 15 a homogeneous network has loss 3: 3.6 is x = 0.2, 3 is 0, 2.4 is −0.2 and counts a tenth."""
    knots, values = torch.tensor([10.0, 20.0]), torch.tensor([4.0, 2.0])
    got = relative_loss(torch.tensor([3.6, 3.0, 2.4]), torch.full((3,), 15.0), knots, values)
    torch.testing.assert_close(got, torch.tensor([0.3, 0.1, 0.08], dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_relative_loss_of_the_homogeneous_networks_is_a_tenth() -> None:
    """They are measured on the same batch, so each meets its own line exactly."""
    search = method(distribution="categorical", estimator="score")
    x, y = images(3)
    problem = configurations(search, x, y)
    draws = [F.one_hot(torch.arange(4), 4) for _ in search.space.parts]
    torch.testing.assert_close(problem.losses(draws), torch.full((4,), 0.1, dtype=torch.float64))


def configurations(search: Slimmable, x: Tensor, y: Tensor) -> Any:
    from qprune.search.slimmable import _Configurations

    return _Configurations(search, lambda: task(search.model, x, y), lambda: task(search.model, x, y))


@pytest.mark.parametrize("shape, power", [("square", 2), ("linear", 1)])
def test_penalised_loss_is_that_of_the_network_itself(shape: str, power: int) -> None:
    """Methods I to III: each drawn network built separately, evaluated by itself."""
    search = method(loss=shape, lmbda=0.3, base=5000.0)
    x, y = images(3, 32)
    widths = torch.tensor([[4, 2, 4, 5, 7], [1, 1, 1, 1, 1], [3, 4, 2, 8, 8]])
    problem = configurations(search, x, y)
    got = problem.losses([column.unsqueeze(1) for column in widths.unbind(1)])
    for row, value in zip(widths.tolist(), got.tolist(), strict=True):
        named = dict(zip(search.structure.names, row, strict=True))
        cut = copy.deepcopy(search.model).eval()
        set_widths(cut, named)
        with torch.no_grad():
            ce = float(task(cut, x, y))
        assert value == pytest.approx(ce + 0.3 * (flops(cut) / 5000) ** power, rel=1e-6)


def test_reestimated_statistics_come_from_the_other_batch() -> None:
    """A configuration is measured like the network that is cut out after re-estimation on the weights' batch."""
    search = method(statistics="reestimated", loss="linear", lmbda=0.0)
    (x, y), (other, _) = images(3), images(4)
    from qprune.search.slimmable import _Configurations

    problem = _Configurations(search, lambda: task(search.model, x, y), lambda: search.model(other).sum())
    row = torch.tensor([[4, 2, 3, 5, 7]])
    got = problem.losses([column.unsqueeze(1) for column in row.unbind(1)])
    cut = copy.deepcopy(search.model).eval()
    set_widths(cut, dict(zip(search.structure.names, row[0].tolist(), strict=True)))
    reestimate(cut, [other])
    with torch.no_grad():
        assert float(got) == pytest.approx(float(task(extract(cut), x, y)), rel=1e-5)


@pytest.mark.parametrize("shortcut", ["permanent", "temporary"])
@pytest.mark.parametrize("distribution", sorted(WIDTHS))
def test_searches_and_stays_within_the_budget(distribution: str, shortcut: str) -> None:
    search = method(distribution=distribution, shortcut=shortcut, samples=4)
    first = last = 0.0
    for step in range(12):
        result = search.step(task, task, images(step), images(100 + step))
        first, last = (result.loss, result.loss) if step == 0 else (first, result.loss)
    assert last < 0.8 * first
    assert any(float(part.logits.detach().abs().max()) > 0.01 for part in search.space.parts)
    assert current_widths(search.model) == homogeneous(search.model, 1.0)
    widths = search.widths()
    limit = 0.5 * flops(search.model)
    assert flops(search.model, widths) <= limit == search.limit
    policy = search.policy()
    pruned = policy.pruned()
    for name, width in widths.items():
        filters = state_of(search.model).structure.layers[name].filters
        assert pruned.get(name, []) == list(range(width, filters))
    assert pruned.get("4.shortcut", []) == pruned.get("4.conv2", [])
    assert set(policy.layers) == {*widths, "4.shortcut"}
    small = extract(search.model, widths)
    assert small(images()[0]).shape == (16, 3)


def test_policy_converts_the_full_network() -> None:
    """Where no shortcut joins unequal widths, the masked network computes what the extracted one does."""
    search = method()
    widths = {"0": 3, "3.conv1": 2, "3.conv2": 3, "4.conv1": 5, "4.conv2": 8}
    search.widths = lambda budget=None, spend=True: dict(widths)  # type: ignore[method-assign]
    full = extract(search.model)
    reestimate(search.model, [images(1)[0]])
    set_widths(search.model, widths)
    reestimate(search.model, [images(1)[0]])
    small = extract(search.model).eval()
    masked = qprune.convert(full, search.policy()).eval()
    with torch.no_grad():
        sizes = {name: int(m.weight.flatten(1).any(1).sum()) for name, m in masked.named_modules() if isinstance(m, nn.Conv2d)}
    assert sizes == {name: m.out_channels for name, m in small.named_modules() if isinstance(m, nn.Conv2d)}
    assert float(qprune.cost(search.policy()).macs) == flops(search.model) + 8 * 3


def test_logits_follow_the_gradient() -> None:
    """With a penalty alone that grows with cost, all widths shrink; logits learn from arch_closure only."""
    search = method(loss="linear", lmbda=100.0, samples=32, logit_lr=0.3)
    calls: list[str] = []

    def flat(name: str) -> Any:
        def closure(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            calls.append(name)
            return 0.0 * m(x).sum() if name == "arch" else task(m, x, y)

        return closure

    before = search.extracted()
    for step in range(5):
        search.step(flat("train"), flat("arch"), images(step), images(50 + step))
    after = search.extracted()
    assert all(after[name] <= before[name] for name in before) and sum(after.values()) < sum(before.values())
    assert calls[:37] == ["arch"] * 32 + ["train"] * 5


def test_weights_learn_from_homogeneous_and_drawn_widths() -> None:
    search = method(train_samples=2)
    seen: list[tuple[int, ...]] = []

    def watching(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(tuple(current_widths(m).values()))
        return task(m, x, y)

    before = {name: p.detach().clone() for name, p in search.model.named_parameters()}
    result = search.step(watching, None, images())
    assert seen[:4] == [tuple(homogeneous(search.model, r).values()) for r in (0.25, 0.5, 0.75, 1.0)]
    assert len(seen) == search.passes == 6 and len(set(seen[4:])) == 2
    moved = {name for name, p in search.model.named_parameters() if not torch.equal(p, before[name])}
    assert {"0.weight", "1.weight", "1.norms.0.weight", "1.norms.3.bias", "4.shortcut.weight", "7.weight"} <= moved
    assert all(torch.equal(part.logits, torch.zeros_like(part.logits)) for part in search.space.parts)
    assert result.cost_ratio == pytest.approx(flops(search.model, search.extracted()) / search.limit)


def test_one_stream_alternates() -> None:
    search = method(samples=2)
    moved = []
    for step in range(4):
        logits = [part.logits.detach().clone() for part in search.space.parts]
        search.step(task, None, images(step))
        moved.append(any(not torch.equal(a, b.logits) for a, b in zip(logits, search.space.parts, strict=True)))
    assert moved == [False, True, False, True]


@pytest.mark.parametrize(
    "options", [{}, {"distribution": "categorical", "estimator": "shared-path", "samples": 2, "statistics": "reestimated"}]
)
def test_resumes_bit_for_bit(options: dict[str, Any]) -> None:
    one = method(**options)
    for step in range(2):
        one.step(task, task, images(step), images(9 + step))
    saved, weights = copy.deepcopy(one.state_dict()), copy.deepcopy(one.model.state_dict())
    two = method(**options, seed=77)
    two.load_state_dict(saved)
    two.model.load_state_dict(weights)
    for step in range(2, 4):
        losses = [search.step(task, task, images(step), images(9 + step)).loss for search in (one, two)]
        assert losses[0] == losses[1]
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(one.space.parts, two.space.parts, strict=True))
    for (name, a), b in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_configurations_leave_no_trace() -> None:
    """A step of the logits changes no weight, no statistic and no mode."""
    search = method(samples=3, statistics="reestimated")
    modes = [m.training for m in search.model.modules()]
    trained = {name: value.clone() for name, value in search.model.state_dict().items() if "norms" in name or "running" not in name}
    x, y = images()
    search.arch_update(task, (x, y), task, (x, y))
    now = search.model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in trained.items() if not name.endswith("num_batches_tracked"))
    assert [m.training for m in search.model.modules()] == modes


@pytest.mark.parametrize("stream", ["train", "arch"])
def test_nonfinite_losses_change_no_parameter(stream: str) -> None:
    search = method(samples=2)
    before = {name: p.detach().clone() for name, p in search.model.named_parameters()}
    logits = [part.logits.detach().clone() for part in search.space.parts]

    def bad(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return task(m, x, y) * float("nan")

    with pytest.raises(NonFiniteError):
        search.step(bad if stream == "train" else task, bad if stream == "arch" else None, images(), images())
    assert all(torch.equal(p, before[name]) for name, p in search.model.named_parameters())
    assert all(torch.equal(a, b.logits) for a, b in zip(logits, search.space.parts, strict=True))


def test_budgets() -> None:
    model = slim(small_net(), images()[0])
    full = flops(model)
    assert Slimmable.limits(model, Budget(macs="25%")) == {"macs": 0.25 * full}
    assert Slimmable.limits(model, Budget(macs="12k")) == {"macs": 12000.0}
    with pytest.raises(BudgetError, match="got a budget of bops"):
        Slimmable.limits(model, Budget(bops="w4a4"))
    with pytest.raises(InfeasibleBudgetError, match="narrowest network needs"):
        Slimmable.check(model, Budget(macs=10), "product")
    Slimmable.check(model, Budget(macs="10%"), "product")
    with pytest.raises(InfeasibleBudgetError):
        method(Budget(macs="5%"), distribution="categorical")
    search = method()
    assert flops(search.model, search.widths(Budget(macs="20%"))) <= 0.2 * full


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distribution": "normal"}, "unknown distribution 'normal'"),
        ({"statistics": "running"}, "unknown statistics 'running'"),
        ({"estimator": "gumbel"}, "one width at a time"),
        ({"estimator": "random-path"}, "forces layers to ratios"),
        ({"estimator": "none"}, "unknown estimator"),
        ({"loss": "cube"}, "unknown penalty"),
        ({"train_samples": -1}, "train_samples"),
        ({"samples": 1}, "at least 2 samples"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        method(**options)


def test_other_networks_are_refused() -> None:
    net = small_net()
    with pytest.raises(InputError, match="not a slim network"):
        Slimmable(net, Constraint({"macs": 1e6}), Optimizers(net), "product", None)
    model = slim(net, images()[0])
    with pytest.raises(BudgetError, match="needs a budget of macs"):
        Slimmable(model, Constraint({"bops": 1e6}), Optimizers(model), "product", None)


def test_summary() -> None:
    search = method()
    assert search.summary()["entropy"] == pytest.approx(1.0)
    assert search.summary()["widths"] == search.extracted()
    with torch.no_grad():
        for part in search.space.parts:
            part.logits.fill_(40.0)
    assert search.summary()["entropy"] == pytest.approx(0.0, abs=1e-6)
    assert search.extracted() == homogeneous(search.model, 1.0)
