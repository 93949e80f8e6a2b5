"""Relaxations: their coefficients, and that they are biased."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from qprune.search.estimators import GumbelSoftmax, StraightThrough
from tests.toys import LOGITS, Toy, exact_gradient, run, standard_errors, toy


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
