"""Gradient estimators on toys small enough to enumerate: what they estimate, and whether the variance that they report is theirs."""

from __future__ import annotations

import itertools
import math
import runpy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qprune.errors import InputError
from qprune.search.distributions import Distribution, FilterCounts
from qprune.search.estimators import (
    ESTIMATORS,
    Estimate,
    Estimator,
    GumbelSoftmax,
    RandomPath,
    ScoreFunction,
    SharedPath,
    StraightThrough,
    TripleAlphas,
    make_estimator,
)

LOGITS = ([1.1, -0.6], [-0.4, 0.7])
TABLE = torch.tensor([[0.3, 2.7, 2.9], [2.2, 0.4, 0.1], [3.6, 3.5, 0.8]], dtype=torch.float64)
"""An arbitrary loss for (filters of layer 0 at candidate 0, filters of layer 1 at candidate 0)."""


@dataclass
class Toy:
    """Two layers of two candidates; the loss is a table over the number of filters at candidate 0. The relaxed loss meets it at choices."""

    table: Tensor
    distributions: Sequence[Distribution]
    asked: list[int] = field(default_factory=list)

    def losses(self, draws: Sequence[Tensor]) -> Tensor:
        self.asked.append(len(draws[0]))
        assert all(d.dtype == torch.int64 and len(d) == len(draws[0]) for d in draws)
        return self.table[draws[0][:, 0], draws[1][:, 0]]

    def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
        """The table, interpolated by polynomials in the sums of p."""
        first, second = (_lagrange(q[:, 0].sum(), n) for q, n in zip(p, self.table.shape, strict=True))
        return first @ self.table @ second


def _lagrange(x: Tensor, points: int) -> Tensor:
    terms = [math.prod(((x - j) / (i - j) for j in range(points) if j != i), start=torch.ones_like(x)) for i in range(points)]
    return torch.stack(terms)


def toy(filters: int = 2, table: Tensor = TABLE, logits: Sequence[Sequence[float]] = LOGITS) -> Toy:
    layers = [FilterCounts(torch.tensor(values, dtype=torch.float64), filters) for values in logits]
    return Toy(table[: filters + 1, : filters + 1], layers)


def expected_loss(problem: Toy, logits: Sequence[Tensor]) -> Tensor:
    """E[L] of independent filters, by enumerating every choice of every filter."""
    total = torch.zeros((), dtype=torch.float64)
    filters = [d.trials for d in problem.distributions if isinstance(d, FilterCounts)]
    log_p = [values.log_softmax(0) for values in logits]
    for choice in itertools.product(*(itertools.product(range(2), repeat=f) for f in filters)):
        likelihood = torch.stack([lp[list(c)].sum() for lp, c in zip(log_p, choice, strict=True)]).sum().exp()
        total = total + likelihood * problem.table[tuple(c.count(0) for c in choice)]
    return total


def exact_gradient(problem: Toy, expectation: Callable[[Toy, Sequence[Tensor]], Tensor] = expected_loss) -> list[Tensor]:
    leaves = [d.logits.clone().requires_grad_() for d in problem.distributions]
    return list(torch.autograd.grad(expectation(problem, leaves), leaves))


class Scripted(FilterCounts):
    """Draws what it is told to."""

    script: Iterator[list[int]]

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        first = torch.tensor([next(self.script) for _ in range(samples)])
        return torch.stack([first, self.filters - first], 1)


def distribution_of_estimates(estimator: Estimator, filters: int, draws: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Over all that can be drawn, draws[l] times from layer l: the estimates' mean, their variance, and the mean of the reported variance.

    Every list holds one vector per layer. Exact: nothing is random.
    """
    layers = [Scripted(torch.tensor(values, dtype=torch.float64), filters) for values in LOGITS]
    problem = Toy(TABLE[: filters + 1, : filters + 1], layers)
    weights, gradients, variances = [], [], []
    choice = [layer.probabilities[0].item() for layer in layers]
    pmf = [[math.comb(filters, n) * q**n * (1 - q) ** (filters - n) for n in range(filters + 1)] for q in choice]
    for script in itertools.product(*(itertools.product(range(filters + 1), repeat=d) for d in draws)):
        for layer, values in zip(layers, script, strict=True):
            layer.script = iter(values)
        found = estimator(problem)
        assert all(next(layer.script, None) is None for layer in layers)
        weights.append(math.prod(pmf[i][n] for i, values in enumerate(script) for n in values))
        gradients.append(torch.stack(found.gradients))
        variances.append(torch.stack(found.variances))
    w = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    torch.testing.assert_close(w.sum().item(), 1.0)
    g, v = torch.stack(gradients), torch.stack(variances)
    mean = (w * g).sum(0)
    return list(mean), list((w * (g - mean).square()).sum(0)), list((w * v).sum(0))


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, atol=1e-12, rtol=1e-10)


def standard_errors(found: Estimate, expected: Sequence[Tensor]) -> float:
    """The largest deviation of a component, in units of its reported standard error."""
    off = [((g - e).abs() / v.sqrt()).max() for g, e, v in zip(found.gradients, expected, found.variances, strict=True)]
    return max(off).item()


def run(estimator: Estimator, problem: Toy, seed: int = 0) -> Estimate:
    return estimator(problem, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("baseline", "samples"), [(None, 1), (None, 2), ("loo", 2), ("loo", 3)])
def test_score_function_is_unbiased_for_any_number_of_samples(baseline: str | None, samples: int) -> None:
    mean, variance, reported = distribution_of_estimates(ScoreFunction(samples, baseline), 2, (samples, samples))
    assert_equal(mean, exact_gradient(toy()))
    if samples > 1:
        assert_equal(reported, variance)


@pytest.mark.parametrize("name", [name for name, cls in ESTIMATORS.items() if cls.unbiased])
def test_unbiased_estimators_meet_the_exact_gradient(name: str) -> None:
    found = run(make_estimator(name, samples=200_000), toy(), seed=1)
    assert standard_errors(found, exact_gradient(toy())) < 4


@given(
    counts=st.lists(st.integers(0, 6), min_size=2, max_size=7),
    losses=st.lists(st.floats(-5, 5), min_size=7, max_size=7),
    logits=st.lists(st.floats(-3, 3), min_size=2, max_size=2),
)
def test_score_gradient_is_the_mean_of_loss_times_deviation(counts: list[int], losses: list[float], logits: list[float]) -> None:
    layer = Scripted(torch.tensor(logits, dtype=torch.float64), 6)
    layer.script = iter(counts)
    n = torch.tensor([[c, 6 - c] for c in counts], dtype=torch.float64)
    loss = torch.tensor(losses[: len(counts)], dtype=torch.float64)

    class Given:
        distributions = (layer,)

        def losses(self, draws: Sequence[Tensor]) -> Tensor:
            return loss

        def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
            raise NotImplementedError

    found = ScoreFunction(len(counts))(Given())
    p = torch.tensor(logits, dtype=torch.float64).softmax(0)
    (gradient,) = found.gradients
    torch.testing.assert_close(gradient, (loss[:, None] * n).mean(0) - loss.mean() * 6 * p, atol=1e-10, rtol=0)
    assert abs(gradient.sum().item()) < 1e-10


def test_score_gradient_by_hand() -> None:
    """F = 4, p = (1/4, 3/4), counts (2, 2), (0, 4) with losses 3 and 1: deviations ±1 from F p = (1, 3)."""
    layer = Scripted(torch.tensor([0.0, math.log(3)], dtype=torch.float64), 4)

    class Given:
        distributions = (layer,)

        def losses(self, draws: Sequence[Tensor]) -> Tensor:
            assert draws[0].tolist() == [[2, 2], [0, 4]]
            return torch.tensor([3.0, 1.0])

        def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
            raise NotImplementedError

    for baseline, gradient in ((None, (3 * 1 + 1 * -1) / 2), ("loo", ((3 - 1) * 1 + (1 - 3) * -1) / 2)):
        layer.script = iter([2, 0])
        found = ScoreFunction(2, baseline)(Given())
        assert_equal(found.gradients, [torch.tensor([gradient, -gradient], dtype=torch.float64)])


@pytest.mark.parametrize("center", ["network", "layer"])
@pytest.mark.parametrize(("kind", "draws"), [(RandomPath, 4), (SharedPath, 2)])
def test_paths_are_unbiased_where_a_layer_is_one_choice(kind: type[RandomPath], draws: int, center: str) -> None:
    mean, variance, reported = distribution_of_estimates(kind(2, center), 1, (draws, draws))
    assert_equal(mean, exact_gradient(toy(1)))
    assert_equal(reported, variance)


def tied_loss(layer: int) -> Callable[[Toy, Sequence[Tensor]], Tensor]:
    """E[L] where the filters of one layer share their choice, and those of the other do not."""

    def expectation(problem: Toy, logits: Sequence[Tensor]) -> Tensor:
        last = problem.table.size(layer) - 1
        table = problem.table.index_select(layer, torch.tensor([0, last]))
        distributions = list(problem.distributions)
        distributions[layer] = FilterCounts(logits[layer].detach(), 1)
        return expected_loss(Toy(table, distributions), logits)

    return expectation


@pytest.mark.parametrize(("kind", "draws"), [(RandomPath, 2), (SharedPath, 1)])
def test_with_more_filters_paths_estimate_the_gradient_of_a_shared_choice(kind: type[RandomPath], draws: int) -> None:
    mean, _, _ = distribution_of_estimates(kind(1, "layer"), 2, (draws, draws))
    assert_equal(mean, [exact_gradient(toy(), tied_loss(layer))[layer] for layer in (0, 1)])
    assert max((m - e).abs().max().item() for m, e in zip(mean, exact_gradient(toy()), strict=True)) > 0.1


@pytest.mark.parametrize("center", ["network", "layer"])
def test_paths_are_unbiased_where_the_loss_is_a_sum_over_filters(center: str) -> None:
    additive = 1.1 + 0.7 * torch.arange(3, dtype=torch.float64)[:, None] - 0.4 * torch.arange(3, dtype=torch.float64)[None, :]
    for kind in (RandomPath, SharedPath):
        found = run(kind(40_000, center), toy(2, additive))
        torch.testing.assert_close(found.gradients, exact_gradient(toy(2, additive)), atol=0.01, rtol=0)
        if kind is RandomPath:
            assert standard_errors(found, exact_gradient(toy(2, additive))) < 4


def test_shared_paths_cancel_what_other_layers_do() -> None:
    """Loss without interaction of the layers: with the layer's own center the candidates' differences are free of noise."""
    table = torch.tensor([[0.0, 5.0, 10.0], [1.0, 6.0, 11.0], [3.0, 8.0, 13.0]], dtype=torch.float64)
    spread = {}
    for kind in (RandomPath, SharedPath):
        for center in ("network", "layer"):
            spread[kind.name, center] = run(kind(1000, center), toy(2, table)).variances[0][0].item()
    assert spread["shared-path", "layer"] < 1e-25
    assert spread["shared-path", "network"] < spread["random-path", "network"]
    assert spread["random-path", "layer"] > 1e-4


def test_triple_by_enumeration() -> None:
    """Two layers: the only neighbour of each is the other, so V'' is a single number. Its mean is not the gradient, even with F = 1."""
    mean, variance, reported = distribution_of_estimates(TripleAlphas(4), 1, (4, 4))
    p = [torch.tensor(values, dtype=torch.float64).softmax(0) for values in LOGITS]
    table = TABLE[:2, :2].flip(0, 1)  # by candidate, not by the number of filters at candidate 0
    alone = [table @ p[1], table.T @ p[0]]
    v = [(a + q * table.diagonal()) / 2 for a, q in zip(alone, p[::-1], strict=True)]
    total = sum((q * u).sum() for q, u in zip(p, v, strict=True)) / 2
    assert_equal(mean, [q * (u - total) for q, u in zip(p, v, strict=True)])
    assert_equal(reported, variance)
    assert max((m - e).abs().max().item() for m, e in zip(mean, exact_gradient(toy(1)), strict=True)) > 0.1


@pytest.mark.parametrize("center", ["network", "layer"])
@pytest.mark.parametrize(("kind", "parts"), [(RandomPath, (5,)), (TripleAlphas, (2, 3))])
def test_variance_of_paths_is_that_of_independent_groups(kind: type[RandomPath], parts: tuple[int, ...], center: str) -> None:
    """The estimate is linear in the losses, which are drawn in groups: one per layer, candidate and kind of path. So its variance is the
    sum over groups of (sum of squared weights) times (sample variance)."""
    candidates = (2, 3, 2)
    layers = [FilterCounts(torch.randn(k, dtype=torch.float64), 2) for k in candidates]
    groups = [size for k in candidates for size in parts for _ in range(k)]
    losses = torch.randn(sum(groups), dtype=torch.float64)

    class Given:
        distributions = layers

        def __init__(self, values: Tensor) -> None:
            self.left = values

        def losses(self, draws: Sequence[Tensor]) -> Tensor:
            now, self.left = self.left[: len(draws[0])], self.left[len(draws[0]) :]
            return now

        def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
            raise NotImplementedError

    estimator = kind(sum(parts), center)
    weights = torch.autograd.functional.jacobian(lambda values: torch.cat(estimator(Given(values)).gradients), losses)
    spread = [w.square().sum(1) * part.var() for w, part in zip(weights.split(groups, 1), losses.split(groups), strict=True)]
    found = estimator(Given(losses))
    torch.testing.assert_close(weights @ losses, torch.cat(found.gradients))
    torch.testing.assert_close(torch.cat(found.variances), torch.stack(spread).sum(0))


def test_triple_where_layers_have_other_numbers_of_candidates() -> None:
    """The middle layer lacks candidate 2: the layers beside it are then evaluated without it, and without its factor."""
    layers = [FilterCounts(torch.zeros(k, dtype=torch.float64), 3) for k in (3, 2, 3)]
    seen = []

    class Given:
        distributions = layers

        def losses(self, draws: Sequence[Tensor]) -> Tensor:
            seen.append([d.tolist() for d in draws])
            return torch.ones(len(draws[0]), dtype=torch.float64)

        def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
            raise NotImplementedError

    found = run(TripleAlphas(2, center="layer"), Given())  # type: ignore[arg-type]
    first_alone, first_together = seen[:2]
    assert first_alone[0] == first_together[0] == [[3, 0, 0], [0, 3, 0], [0, 0, 3]]
    assert first_together[1][:2] == [[3, 0], [0, 3]] and sum(first_together[1][2]) == 3
    middle = seen[3]
    assert middle[0] == middle[2] == [[3, 0, 0], [0, 3, 0]] and middle[1] == [[3, 0], [0, 3]]
    v = torch.tensor([(1 + 1 / 2) / 2, (1 + 1 / 2) / 2, 1.0], dtype=torch.float64)
    assert_equal(found.gradients[:1], [(v - v.mean()) / 3])
    assert_equal(found.gradients[1:2], [torch.zeros(2, dtype=torch.float64)])


def straight_through_mean(problem: Toy) -> list[Tensor]:
    """Its exact expectation: the gradient at every pair of choices, by the likelihood of the pair."""
    total = [torch.zeros(2, dtype=torch.float64) for _ in problem.distributions]
    for choice in itertools.product(range(2), repeat=4):
        leaves = [d.logits.clone().requires_grad_() for d in problem.distributions]
        soft = [leaf.softmax(0).expand(2, -1) for leaf in leaves]
        hard = [torch.eye(2, dtype=torch.float64)[list(c)] for c in (choice[:2], choice[2:])]
        weight = math.prod((s.detach() * h).sum(1).prod().item() for s, h in zip(soft, hard, strict=True))
        loss = problem.relaxed([h + s - s.detach() for h, s in zip(hard, soft, strict=True)], True)
        for part, gradient in zip(total, torch.autograd.grad(loss, leaves), strict=True):
            part += weight * gradient
    return total


def test_straight_through_is_biased() -> None:
    expected = straight_through_mean(toy())
    found = run(StraightThrough(1500), toy(), seed=2)
    assert standard_errors(found, expected) < 4
    assert standard_errors(found, exact_gradient(toy())) > 6
    assert max((m - e).abs().max().item() for m, e in zip(expected, exact_gradient(toy()), strict=True)) > 0.1


def test_straight_through_is_unbiased_where_the_loss_is_linear_in_every_choice() -> None:
    """One filter per layer: the interpolated table is linear in the row of either."""
    assert standard_errors(run(StraightThrough(1500), toy(1), seed=3), exact_gradient(toy(1))) < 4


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_is_biased(hard: bool) -> None:
    assert standard_errors(run(GumbelSoftmax(1500, 1.0, hard), toy()), exact_gradient(toy())) > 6


def test_gumbel_softmax_is_unbiased_for_the_loss_at_its_coefficients() -> None:
    """The derivative of the mean relaxed loss, by central differences with common noise."""
    problem = toy(1)
    step, samples = 0.05, 1000
    found = run(GumbelSoftmax(samples), problem, seed=4)

    def relaxed_mean(shift: float) -> Tensor:
        moved = toy(1, logits=([LOGITS[0][0] + shift, LOGITS[0][1]], LOGITS[1]))
        return run(GumbelSoftmax(samples), moved, seed=4).losses.mean()

    slope = (relaxed_mean(step) - relaxed_mean(-step)) / (2 * step)
    torch.testing.assert_close(found.gradients[0][0], slope, atol=1e-3, rtol=0)


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_coefficients(hard: bool) -> None:
    """Rows are distributions; the arg-max is a draw from the softmax; a low temperature makes rows nearly one-hot."""
    logits = torch.tensor([0.1, 0.2, 0.7]).log()
    p = GumbelSoftmax(temperature=0.01, hard=hard).coefficients(logits, 20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(p.sum(1), torch.ones(20_000))
    share = torch.nn.functional.one_hot(p.argmax(1), 3).float().mean(0)
    torch.testing.assert_close(share, logits.exp(), atol=0.012, rtol=0)
    if hard:
        assert set(p.flatten().tolist()) == {0.0, 1.0}
    else:
        assert (p.max(1).values > 0.99).float().mean() > 0.9
        hot = GumbelSoftmax(temperature=1000.0).coefficients(logits, 100, torch.Generator().manual_seed(0))
        torch.testing.assert_close(hot, torch.full((100, 3), 1 / 3), atol=0.01, rtol=0)


def test_straight_through_coefficients_are_draws() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log()
    p = StraightThrough().coefficients(logits, 20_000, torch.Generator().manual_seed(0))
    assert set(p.flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(p.mean(0), logits.exp(), atol=0.012, rtol=0)


@pytest.mark.parametrize(
    ("estimator", "evaluations", "calls"),
    [
        (ScoreFunction(5), 5, [5]),
        (ScoreFunction(5, "loo"), 5, [5]),
        (RandomPath(3), 12, [6, 6]),
        (SharedPath(3), 12, [6, 6]),
        (TripleAlphas(5), 20, [4, 6, 4, 6]),
        (GumbelSoftmax(3), 3, []),
        (StraightThrough(3), 3, []),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_evaluations_are_counted(estimator: Estimator, evaluations: int, calls: list[int]) -> None:
    problem = toy()
    found = run(estimator, problem)
    assert found.evaluations == found.losses.numel() == evaluations
    assert problem.asked == calls
    assert found.losses.dtype == torch.float64


@pytest.mark.parametrize("name", ESTIMATORS)
def test_common_behaviour(name: str) -> None:
    """Same generator, same estimate; shapes and dtypes of the logits, which are not changed; several layers of other K; variances ≥ 0."""
    layers = [FilterCounts(torch.nn.Parameter(torch.randn(k)), f) for k, f in ((3, 4), (1, 5), (2, 7))]

    class Network:
        distributions = layers
        asked = 0

        def losses(self, draws: Sequence[Tensor]) -> Tensor:
            return sum((d[:, 0] / d.sum(1)).double() for d in draws) ** 2  # type: ignore[return-value]

        def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
            assert [tuple(q.shape) for q in p] == [(4, 3), (5, 1), (7, 2)]
            assert all(set(q.flatten().tolist()) <= {0.0, 1.0} for q in p) if hard else True
            return sum(q[:, 0].mean() for q in p) ** 2  # type: ignore[return-value]

    estimator = make_estimator(name, samples=6)
    assert estimator.name == name
    before = [d.logits.detach().clone() for d in layers]
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = (estimator(Network(), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for d, old, g, again, v in zip(layers, before, first.gradients, second.gradients, first.variances, strict=True):
        assert g.shape == v.shape == d.logits.shape and g.dtype == v.dtype == d.logits.dtype
        assert torch.equal(g, again) and torch.equal(d.logits, old) and d.logits.grad is None
        assert not g.requires_grad and (v >= 0).all() and g.isfinite().all()
    if name in ("score", "score-loo", "gumbel", "straight-through"):
        assert not first.gradients[1].any(), "a single candidate leaves nothing to learn"
    assert any(g.abs().max() > 1e-3 for g in first.gradients)


def test_variance_with_and_without_baseline() -> None:
    """One layer of F filters at K equal probabilities, mean loss 1.5: L̄² F p (1 − p) without a baseline, Var(L) F p (1 − p) with it."""
    layer = FilterCounts(torch.zeros(4, dtype=torch.float64), 16)
    noise = torch.Generator().manual_seed(7)

    class Noisy:
        distributions = (layer,)

        def losses(self, draws: Sequence[Tensor]) -> Tensor:
            return 1.5 + 0.05 * torch.randn(len(draws[0]), generator=noise, dtype=torch.float64)

        def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
            raise NotImplementedError

    samples, deviation = 200_000, 16 * 0.25 * 0.75
    plain, loo = (run(ScoreFunction(samples, b), Noisy()) for b in (None, "loo"))  # type: ignore[arg-type]
    torch.testing.assert_close(plain.variances[0] * samples, torch.full((4,), (1.5**2 + 0.05**2) * deviation).double(), rtol=0.02, atol=0)
    torch.testing.assert_close(loo.variances[0] * samples, torch.full((4,), 0.05**2 * deviation).double(), rtol=0.02, atol=0)
    assert (plain.variances[0] / loo.variances[0]).min() > 850


def test_variance_of_one_sample_is_unknown() -> None:
    for estimator in (ScoreFunction(1), RandomPath(1), SharedPath(1), TripleAlphas(3), GumbelSoftmax(1), StraightThrough(1)):
        found = run(estimator, toy())
        assert all(v.isnan().all() for v in found.variances) and all(g.isfinite().all() for g in found.gradients)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_estimator("reinforce"), "unknown estimator 'reinforce'; expected one of score, score-loo, random-path"),
        (lambda: ScoreFunction(0), "'score' needs at least 1 samples, got 0"),
        (lambda: ScoreFunction(1, "loo"), "'score-loo' needs at least 2 samples, got 1"),
        (lambda: make_estimator("score-loo", samples=1), "'score-loo' needs at least 2 samples, got 1"),
        (lambda: ScoreFunction(4, "mean"), "expected None or 'loo', got 'mean'"),
        (lambda: TripleAlphas(1), "'triple' needs at least 2 samples, got 1"),
        (lambda: RandomPath(4, "own"), "expected one of network, layer, got 'own'"),
        (lambda: GumbelSoftmax(temperature=0.0), "temperature: expected a positive number, got 0.0"),
        (lambda: GumbelSoftmax(samples=0), "'gumbel' needs at least 1 samples, got 0"),
    ],
)
def test_refuses(make: Callable[[], Estimator], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("name", [name for name, cls in ESTIMATORS.items() if not cls.unbiased])
def test_refuses_distributions_without_candidates(name: str) -> None:
    class Width(Distribution):
        logits = torch.zeros(1)

        def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
            return torch.ones(samples, dtype=torch.int64)

        def score(self, drawn: Tensor) -> Tensor:
            return drawn.double().view(-1, 1)

        def extract(self) -> Tensor:
            return torch.ones((), dtype=torch.int64)

    with pytest.raises(InputError, match=f"'{name}' needs distributions over candidates, got Width: use 'score' or 'score-loo'"):
        run(make_estimator(name, samples=4), Toy(TABLE, [Width()]))


def test_score_function_takes_any_distribution() -> None:
    """A width 1 + Binomial(3, σ(α)) with a scalar logit per layer."""
    alpha = torch.tensor([0.3], dtype=torch.float64)

    class Width(Distribution):
        logits = alpha

        def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
            return 1 + (torch.rand(samples, 3, generator=generator, dtype=torch.float64) < alpha.sigmoid()).sum(1)

        def score(self, drawn: Tensor) -> Tensor:
            return (drawn.double() - 1 - 3 * alpha.sigmoid()).view(-1, 1)

        def extract(self) -> Tensor:
            return (1 + 3 * alpha.sigmoid()).round().long()

    class Given:
        distributions = (Width(),)

        def losses(self, draws: Sequence[Tensor]) -> Tensor:
            return draws[0].double() * 0.2

        def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
            raise NotImplementedError

    q = alpha.sigmoid()
    for name in ("score", "score-loo"):
        assert standard_errors(run(make_estimator(name, samples=50_000), Given()), [0.2 * 3 * q * (1 - q)]) < 4  # type: ignore[arg-type]


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/estimators.md quotes: the variance ratio of 870 and the samples for signal-to-noise 1."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "estimator_variance.py"))
    example["score_table"]()
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[1:3] + row[4:5] for row in rows[1:]] == [["none (Zur et al.)", "2.600", "46,927"], ["leave-one-out", "0.087", "52"]]
    assert [int(row[5].replace(",", "")) for row in rows[1:]] == [pytest.approx(46_927, rel=0.02), pytest.approx(52, rel=0.06)]
    example["search_table"](steps=3, runs=2)
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| score")]) == 6
