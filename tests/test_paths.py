"""Estimators that force whole layers: what they estimate, and whether the variance that they report is theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from qprune.search.distributions import FilterCounts
from qprune.search.estimators import RandomPath, SharedPath, TripleAlphas
from tests.toys import (
    LOGITS,
    TABLE,
    Toy,
    assert_equal,
    distribution_of_estimates,
    exact_gradient,
    expected_loss,
    run,
    standard_errors,
    toy,
)


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

    found = run(TripleAlphas(2, center="layer"), Given())
    first_alone, first_together = seen[:2]
    assert first_alone[0] == first_together[0] == [[3, 0, 0], [0, 3, 0], [0, 0, 3]]
    assert first_together[1][:2] == [[3, 0], [0, 3]] and sum(first_together[1][2]) == 3
    middle = seen[3]
    assert middle[0] == middle[2] == [[3, 0, 0], [0, 3, 0]] and middle[1] == [[3, 0], [0, 3]]
    v = torch.tensor([(1 + 1 / 2) / 2, (1 + 1 / 2) / 2, 1.0], dtype=torch.float64)
    assert_equal(found.gradients[:1], [(v - v.mean()) / 3])
    assert_equal(found.gradients[1:2], [torch.zeros(2, dtype=torch.float64)])
