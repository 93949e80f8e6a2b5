"""Gradient estimators: the score function on a toy that can be enumerated, and what all estimators have in common."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Sequence
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
    Estimator,
    GumbelSoftmax,
    RandomPath,
    ScoreFunction,
    SharedPath,
    StraightThrough,
    TripleAlphas,
    make_estimator,
)
from tests.toys import (
    TABLE,
    Scripted,
    Toy,
    assert_equal,
    distribution_of_estimates,
    exact_gradient,
    run,
    standard_errors,
    toy,
)


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
    plain, loo = (run(ScoreFunction(samples, b), Noisy()) for b in (None, "loo"))
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
        assert standard_errors(run(make_estimator(name, samples=50_000), Given()), [0.2 * 3 * q * (1 - q)]) < 4


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/estimators.md quotes: the variance ratio of 870 and the samples for signal-to-noise 1."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "estimator_variance.py"))
    example["score_table"]()
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[1:3] + row[4:5] for row in rows[1:]] == [["none (Zur et al.)", "2.600", "46,927"], ["leave-one-out", "0.087", "52"]]
    assert [int(row[5].replace(",", "")) for row in rows[1:]] == [pytest.approx(46_927, rel=0.02), pytest.approx(52, rel=0.06)]
    example["search_table"](steps=3, runs=2)
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| score")]) == 6
