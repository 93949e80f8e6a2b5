"""ANNC: every step by hand, budgets that are never exceeded, resuming, and a small network compressed from end to end."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qprune
from qprune import Budget, InfeasibleBudgetError, NonFiniteError, Search
from qprune.errors import BudgetError, InputError
from qprune.nn.codebook import CodebookConv2d, CodebookLinear, CodebookRefresh, codebook_layers
from qprune.options import RunOptions
from qprune.recipes import CodebookRecipe
from qprune.search.annc import Annc, continued
from qprune.search.distill import Distillation
from qprune.search.driver import METHODS
from qprune.stored import stored, stored_sizes
from qprune.tasks import data, models
from qprune.tasks.train import evaluate, fit


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "annc", Annc)


def annc_of(search: Search) -> Annc:
    assert isinstance(search.method, Annc)
    return search.method


def row(*values: float) -> nn.Sequential:
    """A network of one linear layer with one filter and no bias."""
    net = nn.Sequential(nn.Linear(len(values), 1, bias=False))
    set_row(net, *values)
    return net


@torch.no_grad()
def set_row(net: nn.Sequential, *values: float) -> None:
    net[0].weight.copy_(torch.tensor([values]))


def search_on(net: nn.Module, size: float | str, shape: tuple[int, ...], **options: Any) -> Search:
    return Search(net, Budget(size=size), "annc", example_inputs=torch.zeros(2, *shape), **options)


def small() -> nn.Sequential:
    """592 weights in layers of 2 · 9, 8 · 2 · 9, 5 · 8 · 9, and 7 · 10."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 5, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(10, 7),
    )  # fmt: skip


WEIGHTS = 18 + 144 + 360 + 70


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 1, 6, 6, generator=generator), torch.randint(7, (6,), generator=generator)) for _ in range(count)]


def sizes(net: nn.Module) -> dict[str, int]:
    return {name: layer.w_bits * int(layer.mask.sum()) for name, layer in codebook_layers(net)}


def test_projections_by_hand() -> None:
    """One bit and four weights: P_sparse keeps 4, -3, -2 and 1, P_quant joins {4, 1} and {-3, -2}. In the second round W + U has a fifth
    non-zero where U is; of the five, {5.5, 2} and {-3.5, 0.5, -0.5} are the best two clusters."""
    net = row(4.0, -3.0, 0.5, 0.1, -2.0, 1.0)
    method = annc_of(search_on(net, 4.0, (6,), bits=1, most_bits=1))
    method.project()
    assert net[0].weight.tolist() == [[4.0, -3.0, 0.0, 0.0, -2.0, 1.0]]
    assert method.duplicate["0"].tolist() == [[2.5, -2.5, 0.0, 0.0, -2.5, 2.5]]
    assert method.dual["0"].tolist() == [[1.5, -0.5, 0.0, 0.0, 0.5, -1.5]]
    assert (method.kept, method.size, method.projections) == ({"0": 4}, 4, 1)

    set_row(net, 4.0, -3.0, 2.0, 0.0, -0.1, 1.0)
    method.project()
    assert net[0].weight.tolist() == [[4.0, -3.0, 2.0, 0.0, 0.0, 1.0]]
    torch.testing.assert_close(method.duplicate["0"], torch.tensor([[3.75, -7 / 6, 3.75, 0, -7 / 6, -7 / 6]]))
    torch.testing.assert_close(method.dual["0"], torch.tensor([[1.75, -7 / 3, -1.75, 0, 5 / 3, 2 / 3]]))


def test_bits_go_where_they_save_most() -> None:
    """12 bits for two layers of four weights: at two bits both are exact, but there is enough for one only."""
    net = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.1, 1.2, 1.3]]))
        net[1].weight.copy_(torch.tensor([[-3.0], [1.0], [4.0], [9.0]]))
    method = annc_of(search_on(net, 12.0, (4,), bits=1, most_bits=2))
    method.project()
    assert method.bits == {"0": 1, "1": 2}
    assert torch.equal(method.duplicate["1"], net[1].weight)
    torch.testing.assert_close(method.duplicate["0"], torch.tensor([[1.05, 1.05, 1.25, 1.25]]))


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_some_of_every_layer_stays(granularity: str) -> None:
    search = search_on(small(), 560.0, (1, 6, 6), granularity=granularity, at_least=2, bits=2)
    with torch.no_grad():
        annc_of(search).weights["3"].mul_(1e-2)
    annc_of(search).project()
    mask = annc_of(search).weights["3"] != 0
    assert int(mask.sum() if granularity == "weight" else mask.flatten(1).any(1).sum()) == 2
    with pytest.raises(InfeasibleBudgetError, match="smallest size there can be is 896 bits"):
        search_on(small(), 895.0, (1, 6, 6), granularity="filter", at_least=4, bits=2)


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_steps_by_hand(nesterov: bool) -> None:
    """The gradient of Σ c·w is c: g = c + decay·w, momentum, w − ηg, then the proximal step towards V − U."""
    net, c = row(1.0, -2.0, 3.0), torch.tensor([[0.3, -0.1, 0.2]])
    lr, momentum, decay, coupling = 0.1, 0.9, 0.5, 2.0
    search = search_on(
        net, 96.0, (3,), weight_lr=lr, momentum=momentum, weight_decay=decay, coupling=coupling, project_first=False, nesterov=nesterov
    )
    method = annc_of(search)
    method.duplicate["0"] += 0.5
    method.dual["0"] += torch.tensor([[1.0, 0.0, -1.0]])
    w, target, velocity = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[0.5, -1.5, 4.5]]), torch.zeros(1, 3)
    for _ in range(2):
        g = c + decay * w
        velocity = momentum * velocity + g
        w = w - lr * (g + momentum * velocity if nesterov else velocity)
        w = (w + lr * coupling * target) / (1 + lr * coupling)
        result = search.step(lambda m: (m[0].weight * c).sum())
    torch.testing.assert_close(net[0].weight.detach(), w)
    assert result.multiplier == coupling


def test_when_it_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(Annc, "project", lambda self: done.append(self.steps))
    search_on(small(), "20%", (1, 6, 6)).fit(batches(), epochs=2)
    assert done == [1, 4, 8], "after the first batch and every epoch"
    done.clear()
    search_on(small(), "20%", (1, 6, 6), interval=3, project_first=False).fit(batches(), epochs=2)
    assert done == [3, 6]


def test_projections_leave_the_momentum() -> None:
    search = search_on(small(), "20%", (1, 6, 6))
    search.fit(batches(), epochs=1)
    optimizer = search.method.optimizers.weights
    before = copy.deepcopy(optimizer.state_dict()["state"])
    annc_of(search).project()
    after = optimizer.state_dict()["state"]
    assert any(bool(state["momentum_buffer"].any()) for state in before.values())
    assert all(torch.equal(before[i]["momentum_buffer"], after[i]["momentum_buffer"]) for i in before)


BUDGETS: dict[str, tuple[float | str, float]] = {
    "share": ("4%", 0.04 * 32 * WEIGHTS), "bits": (777.0, 777.0), "bytes": ("90B", 720.0), "uniform": ("w1a1", WEIGHTS),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {}, "exact": {"exact": True}, "linear": {"linear": True}, "filters": {"granularity": "filter", "bits": 1},
    "exact-filters": {"granularity": "filter", "bits": 1, "exact": True}, "two-bits": {"least_bits": 2},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_result_is_within_the_budget(budget: str, options: str) -> None:
    amount, limit = BUDGETS[budget]
    search = search_on(small(), amount, (1, 6, 6), coupling=5.0, weight_lr=0.1, **OPTIONS[options])
    assert search.limits == {"size_bits": pytest.approx(limit)}
    for _ in range(3):
        search.fit(batches(), epochs=1)
        assert search.history[-1]["cost_ratio"] <= (1 if len(search.history) > 1 else 100)
        search.step(lambda m: F.cross_entropy(m(batches(1)[0][0]), batches(1)[0][1]))
        total = sum(sizes(annc_of(search).network()).values())
        assert total <= limit, "also between projections"
    assert total > 0.7 * limit
    if "granularity" in OPTIONS[options]:
        assert sum(float(r.w_bits) == 0 for r in qprune.cost(search.policy()).rows) == 0


def test_codebooks_can_be_charged() -> None:
    search = search_on(small(), 3000.0, (1, 6, 6), charge_codebooks=True, coupling=5.0)
    search.fit(batches(), epochs=3)
    net = annc_of(search).network()
    books = sum(32 * 2**layer.w_bits for _, layer in codebook_layers(net))
    assert 0.9 * 3000 < sum(sizes(net).values()) + books <= 3000
    with pytest.raises(InfeasibleBudgetError, match="smallest size there can be is 1036 bits, the budget is 1000"):
        search_on(small(), 1000.0, (1, 6, 6), charge_codebooks=True)


def test_pruned_filters_are_a_policy() -> None:
    """What the policy costs is what the network has, less what the following layers no longer read."""
    search = search_on(small(), "2.6%", (1, 6, 6), granularity="filter", bits=1)
    search.fit(batches(), epochs=2)
    net, policy = annc_of(search).network(), search.policy()
    assert policy.pruned() and "9" not in policy.pruned(), "outputs of the network stay"
    for name, layer in codebook_layers(net):
        gone = set(policy.pruned().get(name, []))
        assert {f for f in range(len(layer.mask)) if not layer.mask[f].any()} == gone
        assert all(bool(layer.mask[f].all()) for f in range(len(layer.mask)) if f not in gone)
        assert stored(layer).filters == len(layer.mask)
    assert float(qprune.cost(policy).size_bits) <= sum(sizes(net).values()) <= search.limits["size_bits"]
    final = qprune.convert(net, policy, remove=False)
    for name in policy.pruned():
        assert not final.get_submodule(name).weight[policy.pruned()[name]].any()  # type: ignore[index, union-attr]


def test_layers_that_stay_float() -> None:
    search = search_on(small(), 32.0 * (18 + 70) + 600, (1, 6, 6), keep_edges=True)
    search.fit(batches(), epochs=1)
    net = annc_of(search).network()
    assert {name: type(m) for name, m in net.named_modules() if hasattr(m, "weight") and name != "1"} == {
        "0": nn.Conv2d, "3": CodebookConv2d, "5": CodebookConv2d, "9": nn.Linear,
    }  # fmt: skip
    assert 500 < sum(sizes(net).values()) <= 600
    assert set(search.policy().layers) == {"3", "5"}
    assert set(annc_of(search_on(small(), 32.0 * 88 + 600, (1, 6, 6), keep=["0", "9"])).layers) == {"3", "5"}
    with pytest.raises(InputError, match="keep names 'fc', which matches no layer; the layers are 0, 3, 5, 9"):
        search_on(small(), "20%", (1, 6, 6), keep=["fc"])
    with pytest.raises(InfeasibleBudgetError, match=f"smallest size there can be is {32 * 88 + 6} bits"):
        search_on(small(), 2800.0, (1, 6, 6), keep_edges=True)


def test_chosen_is_the_network() -> None:
    search = search_on(small(), "5%", (1, 6, 6))
    search.fit(batches(), epochs=2)
    search.step(lambda m: F.cross_entropy(m(batches(1)[0][0]), batches(1)[0][1]))
    before = {name: value.clone() for name, value in search.model.state_dict().items()}
    net, x = annc_of(search).network().eval(), batches(1)[0][0]
    search.model.eval()
    with search.method.chosen():
        torch.testing.assert_close(search.model(x), net(x))
        values = {name: set(layer.weight.flatten().tolist()) for name, layer in annc_of(search).layers.items()}
    assert all(len(values[name]) <= 2**layer.w_bits + 1 for name, layer in codebook_layers(net))
    assert all(torch.equal(value, before[name]) for name, value in search.model.state_dict().items())


def test_bits_are_frozen() -> None:
    search = search_on(small(), "10%", (1, 6, 6), freeze_after=1, weight_lr=0.3)
    search.fit(batches(), epochs=1)
    bits = dict(annc_of(search).bits)
    assert annc_of(search).projections == 2 and len(set(bits.values())) > 1
    with torch.no_grad():
        annc_of(search).weights["0"].mul_(1e-3)
    annc_of(search).project()
    assert annc_of(search).bits == bits
    annc_of(search).freeze_after = None
    annc_of(search).project()
    assert annc_of(search).bits["0"] == 1 < bits["0"], "where weights vanish, so do errors"


def run(epochs: list[int], **options: Any) -> tuple[Search, list[dict[str, Any]]]:
    """Epochs in several processes, as it were: each builds everything anew and loads what the one before saved."""
    model_state = search_state = None
    for count in epochs:
        torch.manual_seed(5)
        net = small()
        if model_state is not None:
            net.load_state_dict(model_state)
        search = search_on(net, "6%", (1, 6, 6), steps=16, warmup=0.2, **options)
        if search_state is not None:
            search.load_state_dict(search_state)
        search.fit(batches(), epochs=count)
        model_state, search_state = copy.deepcopy((net.state_dict(), search.state_dict()))
    return search, search.history


@pytest.mark.parametrize("options", [{}, {"interval": 3}, {"temperature": 2.0, "freeze_after": 3, "clip_grad": 1.0}])
def test_resumes_bit_for_bit(options: dict[str, Any]) -> None:
    straight, history = run([4], **options)
    resumed, again = run([1, 2, 1], **options)
    assert history == again
    one, other = annc_of(straight), annc_of(resumed)
    assert (one.bits, one.kept, one.projections, one.steps) == (other.bits, other.kept, other.projections, other.steps)
    for name in one.weights:
        for first, second in ((one.weights, other.weights), (one.duplicate, other.duplicate), (one.dual, other.dual)):
            assert torch.equal(first[name], second[name])


def test_the_rate_rises() -> None:
    search = search_on(small(), "20%", (1, 6, 6), steps=20, warmup=0.2, weight_lr=0.5)
    rates = []
    for _ in range(6):
        search.step(lambda m: F.cross_entropy(m(batches(1)[0][0]), batches(1)[0][1]))
        rates.append(search.method.optimizers.weights.param_groups[0]["lr"])
    cosine = [0.25 * (1 + math.cos(math.pi * step / 20)) for step in range(6)]
    assert rates == pytest.approx([value * min(1.0, (step + 1) / 5) for step, value in enumerate(cosine)])


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    search = search_on(small(), "20%", (1, 6, 6))
    search.fit(batches(), epochs=1)
    before = copy.deepcopy((search.model.state_dict(), search.state_dict()["method"]["dual"]))
    x, y = batches(1)[0]

    def closure(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x), y) * math.nan

    with pytest.raises(NonFiniteError, match="loss is nan at step 4"):
        search.step(closure)
    weights = {name for name, _ in search.model.named_parameters()}
    assert all(torch.equal(before[0][name], value) for name, value in search.model.state_dict().items() if name in weights)
    assert all(torch.equal(before[1][name], value) for name, value in annc_of(search).dual.items())


def test_distillation_by_hand() -> None:
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    p, q = math.e / (1 + math.e), 1 / (1 + math.e)
    expected = 4 * (q * math.log(q / p) + p * math.log(p / q)) / 2
    assert float(Distillation(nn.Identity(), 2.0).term(student, teacher)) == pytest.approx(expected)
    net, guide = nn.Linear(2, 2), nn.Linear(2, 2)
    x, y = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    wrapped = Distillation(guide, 3.0, 0.25).wrap(lambda m, x, y: F.cross_entropy(m(x), y))
    term = 9 * F.kl_div((net(x) / 3).log_softmax(1), (guide(x) / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(wrapped(net, x, y), 0.75 * F.cross_entropy(net(x), y) + 0.25 * term)
    wrapped(net, x, y).backward()
    assert net.weight.grad is not None and guide.weight.grad is None
    assert not net._forward_hooks
    with pytest.raises(InputError, match="the closure did not call the model"):
        Distillation(guide, 3.0).wrap(lambda m: torch.zeros(()))(net)
    for temperature, share in ((0.0, 0.5), (math.inf, 0.5), (2.0, 0.0), (2.0, 1.5)):
        with pytest.raises(InputError, match=r"distillation: the (temperature|share) must be"):
            Distillation(guide, temperature, share)


def test_the_teacher_is_the_network_at_the_start() -> None:
    net = small()
    start = copy.deepcopy(net.state_dict())
    search = search_on(net, "20%", (1, 6, 6), temperature=2.0, weight_lr=0.5)
    search.fit(batches(), epochs=1)
    distillation = annc_of(search).distillation
    assert distillation is not None
    assert all(torch.equal(start[name], value) for name, value in distillation.teacher.state_dict().items())
    assert not torch.equal(net[0].weight, start["0.weight"])


def test_inputs_of_the_result() -> None:
    search = search_on(small(), "20%", (1, 6, 6), a_bits=3)
    search.fit(batches(), epochs=1)
    net = annc_of(search).network()
    assert [layer.a_bits for _, layer in codebook_layers(net)] == [8, 3, 3, 3]
    assert [bits.a_bits for bits in search.policy().layers.values()] == [8, 3, 3, 3]
    qprune.calibrate(net, batches())
    assert all(layer.input_quantizer is not None and layer.input_quantizer.calibrated for _, layer in codebook_layers(net))


def test_a_chain_starts_from_what_the_result_is() -> None:
    search = search_on(small(), "20%", (1, 6, 6))
    search.fit(batches(), epochs=2)
    first = annc_of(search).network()
    net, bits = continued(first)
    assert bits == {name: layer.w_bits for name, layer in codebook_layers(first)}
    assert [type(m) for m in net] == [type(m) for m in small()]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"layer 0 is a CodebookConv2d; pass the float network itself, or `continued\(network\)`"):
        search_on(first, "2%", (1, 6, 6))
    second = Search(net, Budget(size="2%"), "annc", bits=bits)
    method = annc_of(second)
    assert not any(value.any() for value in method.dual.values())
    assert all(torch.equal(value, method.weights[name]) for name, value in method.duplicate.items())
    second.fit(batches(), epochs=1)
    assert sum(sizes(method.network()).values()) <= 0.02 * 32 * WEIGHTS


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_recipe(granularity: str) -> None:
    options = RunOptions(method="annc", budget="size=5%", method_options={"granularity": granularity, "bits": 2, "a_bits": 4})
    x, net = torch.cat([x for x, _ in batches()]), small()
    recipe = CodebookRecipe(options, x[:2])
    recipe.check(net)
    model = recipe.prepare(net, [x])
    search = Search(model, Budget.parse(options.budget), "annc", **options.of_search())
    search.fit(batches(), epochs=2)
    assert not torch.equal(model.get_parameter("0.weight"), net[0].weight), "the float network stays as it was"
    final = recipe.finish(search, search.policy(), [x])
    label, uniform = recipe.uniform(net, search, [x])
    limit = search.limits["size_bits"]
    assert sum(sizes(final).values()) <= limit <= sum(sizes(uniform).values()) < limit * (1.05 if granularity == "weight" else 2)
    kept = {name: float(layer.mask.float().mean()) for name, layer in codebook_layers(uniform)}
    total = sum(int(layer.mask.sum()) for _, layer in codebook_layers(uniform)) / WEIGHTS
    assert label == f"uniform 2 bits, {100 * total:.3g} % kept"
    for name, layer in codebook_layers(uniform):
        weight = net.get_parameter(f"{name}.weight").detach()
        rows = weight.flatten(1).norm(dim=1) if granularity == "filter" else weight.abs().flatten()
        mask = layer.mask.flatten(1)[:, 0] if granularity == "filter" else layer.mask.flatten()
        share = 0.8 if granularity == "weight" else (0.8 * WEIGHTS - 70) / (WEIGHTS - 70)
        count = len(rows) if granularity == "filter" and name == "9" else math.ceil(share * len(rows))
        assert rows[mask].min() == rows.sort(descending=True).values[count - 1]
        assert kept[name] == pytest.approx(count / len(rows)) and layer.w_bits == 2
    for model in (final, uniform):
        assert [layer.a_bits for _, layer in codebook_layers(model)] == [8, 4, 4, 4]
        assert all(layer.input_quantizer is not None and layer.input_quantizer.calibrated for _, layer in codebook_layers(model))
        assert float(qprune.cost(model).macs) > 0
    with pytest.raises(InfeasibleBudgetError):
        CodebookRecipe(RunOptions(method="annc", budget="size=3"), x[:2]).check(net)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "granularity": ({"granularity": "layer"}, "granularity must be one of weight, filter, got 'layer'"),
    "coupling": ({"coupling": 0.0}, "coupling must be a positive number"),
    "widths": ({"least_bits": 4, "most_bits": 3}, "expected 1 <= least_bits <= most_bits <= 8, got 4 and 3"),
    "inputs": ({"a_bits": 0}, "a_bits=0 would leave nothing of the inputs"),
    "at_least": ({"at_least": -1}, "at_least must not be negative, got -1"),
    "interval": ({"interval": 0}, "interval must be at least 1 batch"),
    "warmup": ({"warmup": 0.1}, "needs Search\\(steps=…\\)"),
    "bits": ({"bits": 9}, "layer 0 starts at 9 bits; expected 1 to 8"),
    "some bits": ({"bits": {"0": 3}}, "layer 3 starts at 0 bits"),
    "teacher": ({"teacher": nn.Identity()}, "a teacher needs a temperature"),
    "keep": ({"keep": "0"}, "keep must be a list of layer names, got '0'"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_options(case: str) -> None:
    options, message = CASES[case]
    with pytest.raises(InputError, match=message):
        search_on(small(), "20%", (1, 6, 6), **options)


def test_refused_models_and_budgets() -> None:
    x = torch.zeros(2, 1, 6, 6)
    for budget in (Budget(bops="50%"), Budget(size="5%", macs="50%")):
        with pytest.raises(BudgetError, match="prunes and shares weights for size, got a budget of"):
            Search(small(), budget, "annc", example_inputs=x)
    with pytest.raises(InfeasibleBudgetError, match="smallest size there can be is 4 bits, the budget is 3") as caught:
        search_on(small(), 3.0, (1, 6, 6))
    assert (caught.value.cheapest, caught.value.limit) == (4.0, 3.0)
    method = annc_of(search_on(small(), "5%", (1, 6, 6)))
    with pytest.raises(InputError, match="leave out cuda_graph=True"):
        Annc(method.model, method.constraint, method.optimizers, "product", object())
    with pytest.raises(InputError, match="layer 0 is a MixedConv2d"):
        Search(qprune.prepare(small(), qprune.SearchSpace(), example_inputs=x), Budget(size="5%"), "annc")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="layers 0 and 1 share a weight"):
        search_on(tied, "50%", (4,))
    with pytest.raises(InputError, match=r"no nn.Conv2d or nn.Linear layer"):
        search_on(nn.Sequential(nn.Conv1d(2, 2, 1)), "50%", (2, 4))


@functools.cache
def digits_net() -> tuple[nn.Module, Any]:
    task = data.load("digits", seed=0)
    net = models.for_task("lenet5", task)
    fit(net, task.loader("train", 64, torch.Generator().manual_seed(0)), 8, lr=0.02)
    return net, task


def test_lenet_on_digits() -> None:
    """20 times smaller in 8 epochs, and fine-tuned with its mask and bits."""
    net, task = copy.deepcopy(digits_net()[0]), digits_net()[1]
    loader = task.loader("train", 64, torch.Generator().manual_seed(1))
    search = Search(net, Budget(size="5%"), "annc", example_inputs=task.train.x[:2], steps=8 * len(loader), weight_lr=0.05, coupling=1.0)
    history = search.fit(loader, epochs=8)
    final = annc_of(search).network()
    masks = {name: layer.mask.clone() for name, layer in codebook_layers(final)}
    fit(final, loader, 2, lr=0.005, progress=(refresh := CodebookRefresh(final, len(loader))).progress, on_epoch=refresh.on_epoch)
    accuracy = [evaluate(m, task.loader("test", 256))[1] for m in (digits_net()[0], final)]
    assert accuracy[0] > 0.95 and accuracy[1] > accuracy[0] - 0.03
    for name, layer in codebook_layers(final):
        assert torch.equal(layer.mask, masks[name]) and not layer.weight.detach()[~layer.mask].any()
        assert len(layer.shared_weight().unique()) <= 2**layer.w_bits + 1
    total = sum(m.weight.numel() for m in final.modules() if isinstance(m, CodebookConv2d | CodebookLinear))
    assert 32 * total / sum(sizes(final).values()) == pytest.approx(stored_sizes(final).total.rate) and stored_sizes(final).total.rate >= 20
    assert history[-1]["distance"] < history[2]["distance"]
