"""Counts of filters per candidate: drawing, scoring, extracting, assigning to filters, and freezing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qprune.errors import CheckpointError, InputError
from qprune.gates import FilterGate
from qprune.search.distributions import Distribution, FilterCounts, Freezer, assign, counts_of, draw

logit_lists = st.lists(st.floats(-8, 8), min_size=1, max_size=6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(logits: list[float], filters: int) -> FilterCounts:
    return FilterCounts(torch.tensor(logits), filters)


def compositions(total: int, parts: int) -> list[list[int]]:
    """Every way to write total as a sum of `parts` numbers ≥ 0."""
    return [list(c) for c in itertools.product(range(total + 1), repeat=parts) if sum(c) == total]


def log_probability(logits: Tensor, n: Tensor) -> Tensor:
    """log P(n) of the multinomial, by the textbook."""
    n = n.to(logits)
    return torch.lgamma(n.sum(-1) + 1) - torch.lgamma(n + 1).sum(-1) + (n * logits.log_softmax(-1)).sum(-1)


@given(logits=logit_lists, filters=st.integers(1, 70), samples=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_counts_sum_to_the_number_of_filters(logits: list[float], filters: int, samples: int, seed: int) -> None:
    distribution = counts(logits, filters)
    drawn = distribution.sample(samples, generator(seed))
    assert drawn.shape == (samples, len(logits)) and drawn.dtype == torch.int64
    for n in (drawn, distribution.pure(), distribution.extract(), distribution.extract_largest()):
        assert (n.sum(-1) == filters).all() and (n >= 0).all()


def test_counts_follow_the_multinomial() -> None:
    """Every count vector of 3 filters over 3 candidates occurs as often as it should, to 4.5 standard errors."""
    distribution = counts([0.3, -0.8, 0.5], 3)
    samples = 40000
    drawn = distribution.sample(samples, generator(1))
    for n in compositions(3, 3):
        p = math.exp(log_probability(distribution.logits.double(), torch.tensor(n)).item())
        share = (drawn == torch.tensor(n)).all(-1).double().mean().item()
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / samples)


def test_score_is_the_gradient_of_the_log_probability() -> None:
    logits = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64, requires_grad=True)
    drawn = torch.tensor(compositions(4, 3))
    score = FilterCounts(logits, 4).score(drawn)
    assert score.dtype == torch.float64 and score.shape == drawn.shape
    for n, row in zip(drawn, score, strict=True):
        (expected,) = torch.autograd.grad(log_probability(logits, n), logits)
        torch.testing.assert_close(row, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(score.sum(-1), torch.zeros(len(drawn), dtype=torch.float64), atol=1e-12, rtol=0)


def test_pure_draws() -> None:
    assert counts([0.0, 1.0, 2.0], 5).pure().tolist() == [[5, 0, 0], [0, 5, 0], [0, 0, 5]]


@pytest.mark.parametrize(
    ("p", "filters", "paper", "largest"),
    [
        ([0.5, 0.25, 0.25], 8, [4, 2, 2], [4, 2, 2]),
        ([0.44, 0.44, 0.12], 10, [4, 4, 2], [5, 4, 1]),
        ([0.19, 0.19, 0.19, 0.43], 5, [0, 0, 0, 5], [1, 1, 1, 2]),
        ([0.9, 0.1], 1, [0, 1], [1, 0]),
        ([0.1, 0.9], 1, [0, 1], [0, 1]),
        ([2 / 7, 2 / 7, 2 / 7, 1 / 7], 16, [4, 4, 4, 4], [5, 5, 4, 2]),
        ([1.0], 6, [6], [6]),
    ],
)
def test_extraction(p: list[float], filters: int, paper: list[int], largest: list[int]) -> None:
    distribution = counts([math.log(q) for q in p], filters)
    assert distribution.extract().tolist() == paper
    assert distribution.extract_largest().tolist() == largest


@given(filters=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda n: sum(n) > 0))
def test_extraction_of_exact_shares(filters: list[int]) -> None:
    """p F is an integer for every candidate: rounding in float32 logits must not move a filter."""
    total = sum(filters)
    logits = torch.tensor([math.log(n / total) if n else -200.0 for n in filters])
    assert FilterCounts(logits, total).extract().tolist() == filters
    assert FilterCounts(logits, total).extract_largest().tolist() == filters


@given(logits=logit_lists, filters=st.integers(1, 70))
def test_extractions_are_near_the_mean(logits: list[float], filters: int) -> None:
    distribution = counts(logits, filters)
    mean = filters * distribution.probabilities
    assert ((distribution.extract_largest() - mean).abs() < 1 + 1e-5).all()
    assert ((distribution.extract() - mean)[:-1].abs() < 1 + 1e-5).all()
    assert distribution.extract()[-1] - mean[-1] < len(logits) + 1e-5


def test_same_generator_same_draw_and_no_global_state() -> None:
    distribution = counts([0.1, 0.4, -0.3], 20)
    state = torch.get_rng_state()
    first, second = distribution.sample(6, generator(3)), distribution.sample(6, generator(3))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, distribution.sample(6, generator(4)))


def test_draw_never_takes_an_impossible_candidate() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    assert set(draw(p, (2000,), generator()).tolist()) == {1, 3}


@pytest.mark.parametrize(
    ("logits", "filters", "message"),
    [
        (torch.zeros(2, 3), 4, "floating-point vector"),
        (torch.zeros(3, dtype=torch.int64), 4, "floating-point vector"),
        (torch.zeros(0), 4, "floating-point vector"),
        (torch.zeros(3), 0, "at least one filter, got 0"),
    ],
    ids=["matrix", "integer", "empty", "no filter"],
)
def test_refuses(logits: Tensor, filters: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FilterCounts(logits, filters)


def test_is_a_distribution() -> None:
    assert isinstance(counts([0.0], 1), Distribution)
    with pytest.raises(TypeError, match="abstract"):
        Distribution()  # type: ignore[abstract]


def test_assignment_in_index_order() -> None:
    assert assign(torch.tensor([[2, 0, 3], [0, 5, 0], [1, 1, 3]])).tolist() == [[0, 0, 2, 2, 2], [1, 1, 1, 1, 1], [0, 1, 2, 2, 2]]
    assert assign(torch.tensor([1, 2])).tolist() == [0, 1, 1]


def test_assignment_by_sensitivity() -> None:
    """Filter 3 is the least sensitive and gets the cheapest candidate; filter 0, the most sensitive one, the most expensive."""
    order = torch.tensor([3, 1, 2, 0])
    assert assign(torch.tensor([[1, 2, 1], [0, 0, 4]]), order).tolist() == [[2, 1, 1, 0], [2, 2, 2, 2]]


def test_assignment_with_candidates_in_another_order() -> None:
    """Candidate 2 is the cheapest and 0 the most expensive."""
    ranking = torch.tensor([2, 1, 0])
    assert assign(torch.tensor([1, 2, 1]), torch.tensor([3, 1, 2, 0]), ranking).tolist() == [0, 1, 1, 2]
    assert assign(torch.tensor([1, 2, 1]), None, ranking).tolist() == [2, 1, 1, 0]


@given(data=st.data(), candidates=st.integers(1, 5), filters=st.integers(1, 30), samples=st.integers(1, 4))
def test_assignment_keeps_the_counts(data: st.DataObject, candidates: int, filters: int, samples: int) -> None:
    choice = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(0, candidates - 1), min_size=filters, max_size=filters), min_size=samples, max_size=samples)
        )
    )
    order = torch.tensor(data.draw(st.permutations(range(filters))))
    ranking = torch.tensor(data.draw(st.permutations(range(candidates))))
    n = counts_of(choice, candidates)
    assert torch.equal(n.sum(-1), torch.full((samples,), filters))
    for assigned in (assign(n), assign(n, order), assign(n, None, ranking), assign(n, order, ranking)):
        assert torch.equal(counts_of(assigned, candidates), n)
    place = torch.empty_like(ranking)
    place[ranking] = torch.arange(candidates)
    assert (place[assign(n, order, ranking)[:, order]].diff() >= 0).all()


def test_assignment_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match="order must be a vector"):
        assign(torch.tensor([[1, 2]]), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="ranking must hold the 2 candidates"):
        assign(torch.tensor([[1, 2]]), None, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([(8, 8)], [1.0]),
        ([(4, 4), (8, 8)], [2 / 3, 1 / 3]),
        ([(8, 8), (2, 3), (3, 2)], [1 / 5, 2 / 5, 2 / 5]),
        ([(2, 4), (3, 3), (4, 6), (8, 8)], [2 / 7, 2 / 7, 2 / 7, 1 / 7]),
        ([(2, 32), (3, 32), (8, 32)], [2 / 5, 2 / 5, 1 / 5]),
        ([(8, 4), (4, 8)], [1 / 2, 1 / 2]),
    ],
    ids=["K=1", "K=2", "K=3", "K=4", "no activation", "not 8 and 8"],
)
def test_search_starts_with_half_the_weight_on_8_bits(candidates: list[tuple[int, int]], expected: list[float]) -> None:
    distribution = FilterCounts(FilterGate(candidates, 5).logits, 5)
    torch.testing.assert_close(distribution.probabilities, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


def rising(*p: float) -> Tensor:
    return torch.tensor(p).log()


def test_freezing_needs_consecutive_steps() -> None:
    freezer = Freezer(limit=0.8, steps=3)
    clear, mixed = rising(0.05, 0.85, 0.1), rising(0.5, 0.5)
    for _ in range(2):
        freezer.update([clear, mixed])
    assert freezer.frozen == [False, False]
    clear.copy_(rising(0.1, 0.75, 0.15))
    freezer.update([clear, mixed])
    clear.copy_(rising(0.05, 0.85, 0.1))
    for _ in range(2):
        freezer.update([clear, mixed])
    assert freezer.frozen == [False, False]
    freezer.update([clear, mixed])
    assert freezer.frozen == [True, False]
    assert clear.tolist() == [0.0, 1000.0, 0.0] and clear.softmax(0).tolist() == [0.0, 1.0, 0.0]
    torch.testing.assert_close(mixed, rising(0.5, 0.5))


def test_frozen_stays_frozen() -> None:
    freezer = Freezer(limit=0.8, steps=1)
    logits = torch.nn.Parameter(rising(0.9, 0.1))
    freezer.update([logits])
    with torch.no_grad():
        logits.add_(torch.tensor([-3.0, 5.0]))
    freezer.update([logits])
    assert logits.tolist() == [1000.0, 0.0]
    assert not FilterCounts(logits, 9).score(FilterCounts(logits, 9).sample(4, generator())).any()


def test_freezer_resumes() -> None:
    first, logits = Freezer(0.8, 4), rising(0.9, 0.1)
    for _ in range(3):
        first.update([logits])
    second = Freezer(0.8, 4)
    second.load_state_dict(first.state_dict())
    first.update([logits.clone()])
    second.update([logits])
    assert second.frozen == first.frozen == [True]
    with pytest.raises(CheckpointError, match=r"limit=0.8, steps=4, this search has limit=0.9, steps=4"):
        Freezer(0.9, 4).load_state_dict(first.state_dict())


@pytest.mark.parametrize(("limit", "steps", "message"), [(0.4, 10, "got 0.4"), (1.0, 10, "got 1.0"), (0.8, 0, "at least 1, got 0")])
def test_freezer_refuses(limit: float, steps: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Freezer(limit, steps)


def test_freezer_refuses_another_number_of_distributions() -> None:
    freezer = Freezer()
    freezer.update([torch.zeros(2)])
    with pytest.raises(InputError, match="1 distributions, got logits of 2"):
        freezer.update([torch.zeros(2), torch.zeros(3)])
