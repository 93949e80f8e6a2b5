"""The search loop and its methods, on a network small enough to train in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qprune
from qprune.errors import BudgetError, InputError, NonFiniteError, QPruneError
from qprune.gates import Gate, gates
from qprune.search.constraint import Constraint

RELAXATIONS = ("darts", "edmips")
"""The methods whose gates are softmaxes of their own; the others have tests of their own."""


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def batches(count: int, seed: int = 0, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Three classes of 8x8 images that differ in which third of the image is bright."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        y = torch.randint(0, 3, (size,), generator=g)
        x = 0.3 * torch.randn(size, 1, 8, 8, generator=g)
        for i, c in enumerate(y.tolist()):
            x[i, :, 3 * c : 3 * c + 2] += 1.0
        found.append((x, y))
    return found


def prepared(**space: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"w_bits": (2, 4, 8), "a_bits": (2, 4, 8), **space}
    x, _ = batches(1)[0]
    return qprune.prepare(small_net(), qprune.SearchSpace(**options), {"0": qprune.SearchSpace.fixed(8, 8)}, x)  # type: ignore[arg-type]


SPACES = [
    pytest.param({}, id="factorised-layer"),
    pytest.param({"granularity": "filter"}, id="factorised-filter"),
    pytest.param({"joint": True}, id="joint-layer"),
    pytest.param({"granularity": "filter", "w_bits": (0, 2, 8)}, id="pruning"),
]


@pytest.mark.parametrize("method", RELAXATIONS)
@pytest.mark.parametrize("space", SPACES)
def test_learns_within_budget(method: str, space: dict[str, object]) -> None:
    model = prepared(**space)
    search = qprune.Search(model, qprune.Budget(bops="w2a3"), method, arch_lr=0.05, dual_rate=0.1)
    start = qprune.cost(model).bops.item() / search.limits["bops"]
    history = search.fit(batches(12), batches(12, seed=1), epochs=8)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["cost_ratio"] < 1.05 < 1.15 < start
    policy = search.policy()
    assert float(qprune.cost(policy).bops) <= search.limits["bops"]
    final = qprune.convert(model, policy)
    assert float(qprune.cost(final).bops) == pytest.approx(float(qprune.cost(policy).bops))


@pytest.mark.parametrize("method", RELAXATIONS)
def test_every_parameter_gets_a_gradient(method: str) -> None:
    model = prepared(granularity="filter")
    search = qprune.Search(model, qprune.Budget(bops="w3a3"), method)
    x, y = batches(1)[0]
    for _ in range(2):
        search.step(lambda m: F.cross_entropy(m(x), y))
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_edmips_updates_weights_and_gates_together() -> None:
    model = prepared()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = batches(1)[0]
    qprune.Search(model, qprune.Budget(bops="w3a3")).step(lambda m: F.cross_entropy(m(x), y))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"3.weight", "3.weight_gate.logits", "3.input_gate.logits", "3.weight_quantizer.log_range"} <= moved


def test_darts_uses_each_stream_for_its_own_parameters() -> None:
    model = prepared()
    search = qprune.Search(model, qprune.Budget(bops="w3a3"), "darts")
    seen: list[tuple[str, bool]] = []
    x, y = batches(1)[0]

    def stream(name: str) -> object:
        def closure(m: nn.Module) -> Tensor:
            seen.append((name, True))
            return F.cross_entropy(m(x), y)

        return closure

    search.step(stream("train"), stream("val"))  # type: ignore[arg-type]
    assert [name for name, _ in seen] == ["val", "train"]


def test_darts_with_one_stream_alternates() -> None:
    model = prepared()
    search = qprune.Search(model, qprune.Budget(bops="w3a3"), "darts")
    x, y = batches(1)[0]
    arch = [gate.logits for _, gate in gates(model)]
    moved = []
    for _ in range(4):
        before = [p.detach().clone() for p in arch]
        search.step(lambda m: F.cross_entropy(m(x), y))
        moved.append(any(not torch.equal(a, b) for a, b in zip(arch, before)))
    assert moved == [False, True, False, True]


def test_darts_second_order_matches_the_definition() -> None:
    """On a quadratic toy the unrolled gradient is known: L_train = (w−α)²/2, L_val = w²/2, so d/dα L_val(w−ξ(w−α)) = ξ·(w−ξ(w−α))."""
    from qprune.search.darts import Darts
    from qprune.search.optimizers import Optimizers

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
            self.gate = Gate(1)
            self.gate.logits = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    toy = Toy()
    rate = 0.1
    method = Darts(toy, Constraint({}), Optimizers(toy, weight_lr=rate, momentum=0.0), "product", second_order=True)
    loss, gradient = method._unrolled((lambda m: (m.w - m.gate.logits).square().sum() / 2, ()), (lambda m: m.w.square().sum() / 2, ()))
    unrolled = 2.0 - rate * (2.0 - 0.5)
    assert gradient[0].item() == pytest.approx(rate * unrolled, rel=1e-6)
    assert loss.item() == pytest.approx(unrolled**2 / 2)
    assert toy.w.item() == 2.0


def test_non_finite_loss_names_step_and_layer() -> None:
    model = prepared()
    search = qprune.Search(model, qprune.Budget(bops="w3a3"))
    x, y = batches(1)[0]
    search.step(lambda m: F.cross_entropy(m(x), y))
    with torch.no_grad():
        model.get_submodule("3").weight[0, 0, 0, 0] = math.nan  # type: ignore[index, union-attr]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 1: first non-finite output in layer '3'") as caught:
        search.step(lambda m: F.cross_entropy(m(x), y))
    assert (caught.value.step, caught.value.layer) == (1, "3")
    weights = dict(model.named_parameters())
    assert all(torch.equal(value.nan_to_num(), state[name].nan_to_num()) for name, value in weights.items())


def test_state_continues_bit_for_bit() -> None:
    data = batches(6)

    def run(split: bool) -> dict[str, Tensor]:
        model = prepared()
        search = qprune.Search(model, qprune.Budget(bops="w3a3"), steps=12)
        search.fit(data, epochs=1)
        if split:
            weights, state = {k: v.clone() for k, v in model.state_dict().items()}, search.state_dict()
            model = prepared()
            model.load_state_dict(weights)
            search = qprune.Search(model, qprune.Budget(bops="w3a3"), steps=12)
            search.load_state_dict(state)
        search.fit(data, epochs=1)
        assert len(search.history) == 2
        return dict(model.state_dict())

    whole, parts = run(False), run(True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_lagrangian_grows_above_and_fades_below_the_limit() -> None:
    class Given:
        def __init__(self, bops: float) -> None:
            self.bops = torch.tensor(bops, dtype=torch.float64, requires_grad=True)

    constraint = Constraint({"bops": 100.0}, rate=0.5, rho=1.0, start=0.2)
    above = Given(200.0)
    slack = constraint.slack(above)  # type: ignore[arg-type]
    assert float(constraint.penalty(slack).detach()) == pytest.approx(0.2 * math.log(2) + 0.5 * math.log(2) ** 2)
    constraint.penalty(slack).backward()
    assert above.bops.grad is not None and above.bops.grad > 0
    constraint.update(slack)
    assert constraint.multipliers["bops"] == pytest.approx(0.2 + 0.5 * math.log(2))
    for _ in range(5):
        constraint.update(constraint.slack(Given(50.0)))  # type: ignore[arg-type]
    assert constraint.multipliers["bops"] == 0.0


def test_bad_calls() -> None:
    model = prepared()
    with pytest.raises(QPruneError, match=r"unknown method 'nope'; expected one of edmips, darts"):
        qprune.Search(model, qprune.Budget(bops="w3a3"), "nope")
    with pytest.raises(InputError, match="budget must be a Budget, got str"):
        qprune.Search(model, "w3a3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="geometry is unknown: pass example_inputs"):
        qprune.Search(qprune.nn.MixedConv2d(3, 4, 3), qprune.Budget(bops="w3a3"))
    with pytest.raises(InputError, match="pass arch_loader"):
        qprune.Search(model, qprune.Budget(bops="w3a3"), "darts").fit(batches(1))
    with pytest.raises(InputError, match="no batch"):
        qprune.Search(model, qprune.Budget(bops="w3a3")).fit([])
    with pytest.raises(BudgetError, match="at least one of bops, size, macs"):
        qprune.Budget()
    with pytest.raises(qprune.InfeasibleBudgetError, match="cheapest policy needs"):
        qprune.Search(model, qprune.Budget(bops=1000.0)).policy()


def test_a_model_of_mixed_layers_made_by_hand() -> None:
    model = nn.Sequential(
        qprune.nn.MixedConv2d(1, 4, 3, w_bits=(2, 8), a_bits=(2, 8)), nn.ReLU(), nn.Flatten(), qprune.nn.MixedLinear(144, 3)
    )
    x, y = batches(1)[0]
    search = qprune.Search(model, qprune.Budget(bops="w4a4"), example_inputs=x)
    macs = float(qprune.cost(search.policy()).macs)
    assert search.limits["bops"] == 16 * macs
    search.step(lambda m: F.cross_entropy(m(x), y))
    assert float(qprune.cost(search.policy()).bops) <= search.limits["bops"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
