"""Distributions of widths, their scores, and fitting widths to a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qprune.errors import InfeasibleBudgetError, InputError
from qprune.nn.slimtrace import SlimLayer, SlimShortcut, SlimStructure
from qprune.search.distributions import Distribution
from qprune.search.estimators import make_estimator
from qprune.search.fitting import fit_widths
from qprune.search.widths import WIDTHS, BinomialLayers, BinomialWidths, MultinomialWidths, NetworkWidths, RatioChoice, RatioCounts


def structure(filters: Sequence[int] = (4, 4, 6), shortcut: bool = True) -> SlimStructure:
    """A 3x3 convolution of 2 channels and a block of two, at 5x5; the block's shortcut is the identity, or there is no block."""
    layers, source, inputs = {}, None, 2
    for i, count in enumerate(filters):
        layers[f"c{i}"] = SlimLayer(f"c{i}", count, inputs, 9, 25, source)
        source, inputs = f"c{i}", count
    shortcuts = (SlimShortcut("b", "c0", filters[0], "c2", 1, 25, None),) if shortcut else ()
    return SlimStructure(layers, shortcuts)


def double(space: NetworkWidths, seed: int = 0) -> NetworkWidths:
    """With random logits, in float64."""
    generator = torch.Generator().manual_seed(seed)
    for part in space.parts:
        part.logits = torch.randn(part.logits.shape, generator=generator, dtype=torch.float64).requires_grad_()
    return space


def test_binomial_score_by_hand() -> None:
    """C = 5, σ(α) = 1/4: the mean is 1 + 4/4 = 2."""
    one = BinomialWidths(torch.tensor([-math.log(3.0)], dtype=torch.float64), 5)
    torch.testing.assert_close(one.mean, torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(one.score(torch.tensor([[1], [2], [5]])), torch.tensor([[-1.0], [0.0], [3.0]], dtype=torch.float64))
    shared = BinomialWidths(one.logits, 5, layers=3)
    torch.testing.assert_close(shared.score(torch.tensor([[1, 4, 5]])), torch.tensor([[-1.0 + 2.0 + 3.0]], dtype=torch.float64))
    assert shared.extract().tolist() == [2, 2, 2]


@pytest.mark.parametrize("filters, alpha", [(1, 0.3), (2, -1.0), (7, 0.4), (64, -0.2)])
def test_binomial_probabilities(filters: int, alpha: float) -> None:
    distribution = BinomialWidths(torch.tensor([alpha], dtype=torch.float64), filters)
    p, q = 1 / (1 + math.exp(-alpha)), 1 / (1 + math.exp(alpha))
    by_hand = [math.comb(filters - 1, k) * p**k * q ** (filters - 1 - k) for k in range(filters)]
    torch.testing.assert_close(distribution.log_probabilities().exp(), torch.tensor(by_hand, dtype=torch.float64))


def test_binomial_draws_follow_the_probabilities() -> None:
    distribution = BinomialWidths(torch.tensor([0.6]), 5, layers=2)
    drawn = distribution.sample(20000, torch.Generator().manual_seed(1))
    assert drawn.shape == (20000, 2) and drawn.dtype == torch.int64
    p = distribution.log_probabilities().exp()
    for column in drawn.unbind(1):
        share = torch.bincount(column - 1, minlength=5) / len(drawn)
        assert bool(((share - p).abs() < 4 * (p * (1 - p) / len(drawn)).sqrt()).all())
    again = distribution.sample(20000, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)


def all_states(space: NetworkWidths) -> Tensor:
    if isinstance(space, MultinomialWidths):
        k, layers = len(space.ratios), len(space.structure.names)
        return torch.tensor([n for n in itertools.product(range(layers + 1), repeat=k) if sum(n) == layers])
    return torch.tensor(list(itertools.product(*(range(len(c)) for c in space.candidates))))  # type: ignore[attr-defined]


def draws_of(space: NetworkWidths, states: Tensor) -> list[Tensor]:
    if isinstance(space, MultinomialWidths):
        return [states]
    if isinstance(space, BinomialLayers):
        return [states[:, group] + 1 for group in space.groups]
    return [torch.nn.functional.one_hot(column, len(space.ratios)) for column in states.unbind(1)]


@pytest.mark.parametrize("kind", sorted(WIDTHS))
def test_scores_give_the_gradient_of_the_expected_loss(kind: str) -> None:
    """Every configuration enumerated: Σ P L score = ∇ Σ P L, with the likelihood written out for autograd."""
    space = double(WIDTHS[kind](structure(), (0.25, 0.5, 1.0)))
    states = all_states(space)
    losses = torch.randn(len(states), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logits = [part.logits for part in space.parts]
    log_p = differentiable(space, states, logits)
    torch.testing.assert_close(log_p.detach().exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(space.log_likelihood(states), log_p.detach())
    expected = torch.autograd.grad((log_p.exp() * losses).sum(), logits)
    weight = (log_p.detach().exp() * losses).unsqueeze(1)
    draws = draws_of(space, states)
    assert torch.equal(space.state(draws), states)
    for part, drawn, gradient in zip(space.parts, draws, expected, strict=True):
        torch.testing.assert_close((weight * part.score(drawn)).sum(0), gradient)


def differentiable(space: NetworkWidths, states: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """log P of all states from their definition."""
    rows = []
    for state in states.tolist():
        if isinstance(space, MultinomialWidths):
            log_p = logits[0].log_softmax(0)
            ways = math.factorial(sum(state)) / math.prod(math.factorial(n) for n in state)
            rows.append(sum(n * log_p[k] for k, n in enumerate(state)) + math.log(ways))
        elif isinstance(space, BinomialLayers):
            total = torch.zeros((), dtype=torch.float64)
            for group, alpha in zip(space.groups, logits, strict=True):
                for i in group:
                    c, k = space.structure.filters[i] - 1, state[i]
                    p = alpha[0].sigmoid()
                    total = total + math.log(math.comb(c, k)) + k * p.log() + (c - k) * (1 - p).log()
            rows.append(total)
        else:
            rows.append(sum(alpha.log_softmax(0)[k] for alpha, k in zip(logits, state, strict=True)))
    return torch.stack([torch.as_tensor(row) for row in rows])


class Table:
    """A problem with a loss of its own for every configuration."""

    def __init__(self, space: NetworkWidths) -> None:
        self.space, self.states = space, all_states(space)
        self.table = 2 + torch.randn(len(self.states), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.distributions: Sequence[Distribution] = space.parts
        place = torch.tensor([(max(self.states.flatten().tolist()) + 1) ** i for i in range(self.states.size(1))])
        self.place, self.keys = place, (self.states * place).sum(1)

    def losses(self, draws: Sequence[Tensor]) -> Tensor:
        keys, order = self.keys.sort()
        return self.table[order[torch.searchsorted(keys, (self.space.state(draws) * self.place).sum(1))]]

    def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
        raise AssertionError

    def gradients(self) -> list[Tensor]:
        p = self.space.log_likelihood(self.states).exp()
        weight = (p * self.table).unsqueeze(1)
        return [
            (weight * part.score(drawn)).sum(0) for part, drawn in zip(self.space.parts, draws_of(self.space, self.states), strict=True)
        ]


@pytest.mark.parametrize("estimator", ["score", "score-loo"])
@pytest.mark.parametrize("kind", sorted(WIDTHS))
def test_score_estimates_are_unbiased(kind: str, estimator: str) -> None:
    check_unbiased(kind, estimator, 4000)


@pytest.mark.parametrize("estimator", ["random-path", "shared-path"])
def test_forced_ratios_are_unbiased_for_one_choice_per_layer(estimator: str) -> None:
    """The original's gradient of categorical widths: p_i (mean loss with layer l at i − T)."""
    check_unbiased("categorical", estimator, 1000)


def check_unbiased(kind: str, estimator: str, samples: int, repeats: int = 25) -> None:
    """Deviations from the exact gradient over their estimated standard deviation: mean 0 within 4 standard errors, spread about 1."""
    problem = Table(double(WIDTHS[kind](structure(), (0.25, 0.5, 1.0))))
    exact, generator = torch.cat(problem.gradients()), torch.Generator().manual_seed(2)
    found = [make_estimator(estimator, samples=samples)(problem, generator) for _ in range(repeats)]
    deviations = torch.stack([(torch.cat(f.gradients) - exact) / torch.cat(f.variances).sqrt() for f in found])
    assert float(deviations.mean(0).abs().max()) < 4 / math.sqrt(repeats)
    assert 0.6 < float(deviations.square().mean().sqrt()) < 1.4


def test_multinomial_assigns_ratios_in_layer_order() -> None:
    space = MultinomialWidths(structure((4, 8, 16), shortcut=False), (1.0, 0.25, 0.5))
    assert space.ratios == (0.25, 0.5, 1.0)
    assert space.widths([torch.tensor([[1, 1, 1], [0, 2, 1], [3, 0, 0]])]).tolist() == [[1, 4, 16], [2, 4, 16], [1, 2, 4]]


def test_block_binomial_shares_among_layers_of_one_width() -> None:
    space = WIDTHS["block-binomial"](structure((4, 6, 4), shortcut=False), (1.0,))
    assert [part.logits.numel() for part in space.parts] == [1, 1]
    assert space.widths([torch.tensor([[1, 4]]), torch.tensor([[5]])]).tolist() == [[1, 5, 4]]


def test_extraction() -> None:
    choice = RatioChoice(torch.tensor([0.0, 1.0, 1.0]))
    assert choice.extract().tolist() == [0, 1, 0]
    counts = RatioCounts(torch.tensor([0.1, 0.35, 0.55]).log(), 10)  # 1, 3.5 and 5.5
    assert counts.extract().tolist() == [2, 3, 5]
    binomial = WIDTHS["binomial"](structure((4, 4, 6)), (1.0,))
    with torch.no_grad():
        for part, alpha in zip(binomial.parts, (-50.0, 50.0, math.log(0.7 / 0.3)), strict=True):
            part.logits.fill_(alpha)
    assert binomial.widths_of(binomial.extract().unsqueeze(0)).tolist() == [[1, 4, 4]]  # 1 + 5 · 0.7 = 4.5, half to even
    categorical = WIDTHS["categorical"](structure((4, 4, 6)), (0.5, 1.0))
    assert categorical.widths_of(categorical.extract().unsqueeze(0)).tolist() == [[2, 2, 3]]


@pytest.mark.parametrize("kind", sorted(WIDTHS))
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 1.3), spend=st.booleans())
def test_fitted_widths_keep_the_budget(kind: str, seed: int, share: float, spend: bool) -> None:
    space = double(WIDTHS[kind](structure(), (0.25, 0.5, 0.75, 1.0)), seed)
    where = space.structure
    full = int(where.flops(torch.tensor(where.filters)))
    states = all_states(space)
    costs, likelihood = where.flops(space.widths_of(states)), space.log_likelihood(states)
    limit = max(share * full, float(costs.min()))
    widths = fit_widths(space, limit, spend)
    cost = int(where.flops(where.vector(widths)))
    assert cost <= limit
    same = (space.widths_of(states) == where.vector(widths)).all(1)
    assert bool(same.any())
    found = states[int(likelihood.masked_fill(~same, -torch.inf).argmax())]
    moves = space.neighbours(found)
    allowed = where.flops(space.widths_of(moves)) <= limit
    if spend:
        wider = (space.widths_of(moves) >= where.vector(widths)).all(1) & (where.flops(space.widths_of(moves)) > cost)
        assert not bool((allowed & wider).any())
    else:
        best = likelihood[(states == found).all(1)][0]
        assert not bool((space.log_likelihood(moves)[allowed] > best + 1e-9).any())


@pytest.mark.parametrize("kind", sorted(WIDTHS))
def test_fit_is_near_the_likeliest_configuration(kind: str) -> None:
    """Against all configurations, over random logits and budgets: mean loss of log-likelihood below 0.1."""
    gaps = []
    for seed in range(20):
        space = double(WIDTHS[kind](structure(), (0.25, 0.5, 0.75, 1.0)), seed)
        states = all_states(space)
        costs, likelihood = space.structure.flops(space.widths_of(states)), space.log_likelihood(states)
        limit = float(costs.double().quantile(0.1 + 0.04 * seed))
        widths = space.structure.vector(fit_widths(space, limit, spend=False))
        got = likelihood[(space.widths_of(states) == widths).all(1)].max()
        gaps.append(float(likelihood[costs <= limit].max() - got))
    assert min(gaps) >= -1e-9
    assert sum(gaps) / len(gaps) < 0.1


def test_a_single_step_that_needs_a_shortcut_is_no_obstacle() -> None:
    """One filter less of a layer under an identity shortcut costs more than it saves: all layers of the stream go together."""
    space = WIDTHS["binomial"](structure((64, 2, 64)), (1.0,))
    with torch.no_grad():
        for part in space.parts:
            part.logits.fill_(30.0)
    where = space.structure
    full, step = where.flops(torch.tensor([[64, 2, 64], [64, 2, 63]])).tolist()
    assert step > full
    widths = fit_widths(space, 0.5 * full)
    assert int(where.flops(where.vector(widths))) <= 0.5 * full
    assert 32 <= widths["c0"] == widths["c2"] <= 48


@pytest.mark.parametrize("kind", sorted(WIDTHS))
def test_impossible_budgets(kind: str) -> None:
    space = WIDTHS[kind](structure(), (0.5, 1.0))
    with pytest.raises(InfeasibleBudgetError, match="narrowest network needs") as caught:
        fit_widths(space, 100)
    least = int(space.structure.flops(space.widths_of(all_states(space))).min())
    assert caught.value.cheapest == least and caught.value.limit == 100
    widths = fit_widths(space, least)
    assert int(space.structure.flops(space.structure.vector(widths))) == least


@pytest.mark.parametrize(
    "make",
    [
        lambda: BinomialWidths(torch.zeros(2), 4),
        lambda: BinomialWidths(torch.zeros(1), 0),
        lambda: BinomialWidths(torch.zeros(1).long(), 4),
    ],
)
def test_bad_distributions(make: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        make()
