"""Which weights and filters are kept: against orders written out, brute force, and the budget on random problems."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qprune.errors import InfeasibleBudgetError, InputError
from qprune.search.sparsity import keep_filters, keep_weights


def by_sorting(weights: dict[str, Tensor], bits: dict[str, int], budget: int) -> dict[str, Tensor]:
    """The longest prefix by z² / bits, ties by layer and place, found by sorting."""
    items = [
        (-float(w.float().square()[i] / bits[name]), layer, i) for layer, (name, w) in enumerate(weights.items()) for i in range(len(w))
    ]
    masks, left, names = {name: torch.zeros(len(w), dtype=torch.bool) for name, w in weights.items()}, budget, list(weights)
    for score, layer, i in sorted(items):
        if score == 0 or bits[names[layer]] > left:
            break
        masks[names[layer]][i] = True
        left -= bits[names[layer]]
    return masks


def test_weights_of_layers_with_more_bits_must_be_larger() -> None:
    weights = {"a": torch.tensor([[3.0, -1.0], [0.5, 2.0]]), "b": torch.tensor([2.9, -1.5, 0.9])}
    kept = keep_weights(weights, {"a": 4, "b": 1}, 9)  # scores a: 2.25 .25 .0625 1; b: 8.41 2.25 .81
    assert torch.equal(kept.masks["a"], torch.tensor([[True, False], [False, False]]))
    assert torch.equal(kept.masks["b"], torch.tensor([True, True, False]))  # 1.0 of "a" comes next and does not fit
    assert kept.nnz == {"a": 1, "b": 2} and kept.bits == 6


def test_equal_scores_are_taken_in_order() -> None:
    weights = {"a": torch.full((4,), -2.0), "b": torch.full((4,), 1.0)}
    kept = keep_weights(weights, {"a": 4, "b": 1}, 11, at_least=0)
    assert kept.masks["a"].tolist() == [True, True, False, False] and kept.nnz["b"] == 0 and kept.bits == 8
    kept = keep_weights(weights, {"a": 4, "b": 1}, 18, at_least=0)
    assert kept.nnz == {"a": 4, "b": 2} and kept.masks["b"].tolist() == [True, True, False, False]


def test_every_layer_keeps_its_largest() -> None:
    weights = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([0.01, -0.02, 0.02]), "c": torch.zeros(3)}
    bits = {"a": 1, "b": 2, "c": 3}
    assert keep_weights(weights, bits, 3, at_least=0).nnz == {"a": 3, "b": 0, "c": 0}
    kept = keep_weights(weights, bits, 4)
    assert kept.masks["b"].tolist() == [False, True, False] and kept.nnz == {"a": 2, "b": 1, "c": 0} and kept.bits == 4
    assert keep_weights(weights, bits, 100, at_least=2).nnz == {"a": 3, "b": 3, "c": 0}
    with pytest.raises(InfeasibleBudgetError, match="a budget of 5 bits is below the 6 that at_least=2 per layer needs") as caught:
        keep_weights(weights, bits, 5, at_least=2)
    assert caught.value.cheapest == 6 and caught.value.limit == 5


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_weights_are_those_of_the_sorted_order(data: st.DataObject) -> None:
    """Few distinct magnitudes, so that many scores are equal."""
    value = st.sampled_from([0.0, 0.5, -0.5, 1.0, 1.5, -2.0, 1e-3, 700.0]) | st.floats(-3, 3, width=32)
    layers = data.draw(st.lists(st.tuples(st.lists(value, max_size=12), st.integers(1, 8)), min_size=1, max_size=4))
    weights = {str(i): torch.tensor(values, dtype=torch.float32) for i, (values, _) in enumerate(layers)}
    bits = {str(i): b for i, (_, b) in enumerate(layers)}
    budget = data.draw(st.integers(0, 120))
    kept = keep_weights(weights, bits, budget, at_least=0)
    expected = by_sorting(weights, bits, budget)
    assert all(torch.equal(kept.masks[name], expected[name]) for name in weights)
    assert kept.nnz == {name: int(mask.sum()) for name, mask in expected.items()}
    assert kept.bits == sum(bits[name] * kept.nnz[name] for name in bits) <= budget


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, 5.0]), max_size=6), st.integers(1, 8)), min_size=1, max_size=4),
    st.integers(0, 100),
    st.integers(1, 3),
)
def test_every_layer_keeps_so_many_within_the_budget(layers: list[tuple[list[float], int]], budget: int, at_least: int) -> None:
    weights, bits = {str(i): torch.tensor(v) for i, (v, _) in enumerate(layers)}, {str(i): b for i, (_, b) in enumerate(layers)}
    least = {name: min(at_least, int((weight != 0).sum())) for name, weight in weights.items()}
    if budget < sum(bits[name] * count for name, count in least.items()):
        with pytest.raises(InfeasibleBudgetError):
            keep_weights(weights, bits, budget, at_least)
        return
    kept = keep_weights(weights, bits, budget, at_least)
    assert sum(bits[name] * int(mask.sum()) for name, mask in kept.masks.items()) == kept.bits <= budget
    for name, mask in kept.masks.items():
        assert kept.nnz[name] >= least[name] and bool((weights[name][mask] != 0).all())
        if 0 < kept.nnz[name] < len(mask):
            assert weights[name][mask].abs().min() >= weights[name][~mask].abs().max()


def test_a_large_layer_is_cut_at_the_exact_score() -> None:
    random = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(64, 32, 3, 3, generator=random), "b": 0.7 * torch.randn(100, 200, generator=random)}
    bits, budget = {"a": 3, "b": 2}, 25_001
    kept = keep_weights(weights, bits, budget)
    assert budget - 3 < kept.bits <= budget
    scores = {name: weight.square() / bits[name] for name, weight in weights.items()}
    lowest = min(float(scores[name][kept.masks[name]].min()) for name in weights)
    assert max(float(scores[name][~kept.masks[name]].max()) for name in weights) <= lowest


FILTERS = {"a": torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.1, 0.1]]), "b": torch.tensor([[1.5, 1.5, 1.5], [0.2, 0.0, 0.0]])}


def energies(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> float:
    return sum(float(weight[masks[name]].double().square().sum()) for name, weight in weights.items())


def test_filters_by_energy_per_bit_and_those_that_still_fit() -> None:
    kept = keep_filters(FILTERS, {"a": 2, "b": 1}, 9, at_least=0)  # a: 4/4, 2/4, .02/4; b: 6.75/3, .04/3
    assert kept.masks["b"].tolist() == [True, False] and kept.masks["a"].tolist() == [True, False, False] and kept.bits == 7
    kept = keep_filters(FILTERS, {"a": 2, "b": 1}, 10, at_least=0)
    assert kept.masks["a"].tolist() == [True, False, False] and kept.masks["b"].tolist() == [True, True]  # a's second does not fit
    assert kept.nnz == {"a": 2, "b": 6} and kept.bits == 10


def test_exact_filters_are_the_best_of_all_subsets() -> None:
    better = 0
    for seed in range(12):
        random = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.randn(4, n, generator=random) * torch.rand(4, 1, generator=random) for name, n in (("a", 3), ("b", 7), ("c", 5))
        }
        bits, budget = {"a": 4, "b": 1, "c": 3}, 60
        best = 0.0
        for chosen in itertools.product(*([list(itertools.product([False, True], repeat=4))] * 3)):
            masks = {name: torch.tensor(mask) for name, mask in zip(weights, chosen, strict=True)}
            if (
                all(any(mask) for mask in chosen)
                and sum(bits[n] * weights[n].shape[1] * sum(mask) for n, mask in zip(weights, chosen, strict=True)) <= budget
            ):
                best = max(best, energies(weights, masks))
        exact, greedy = (keep_filters(weights, bits, budget, exact=exact) for exact in (True, False))
        assert exact.bits <= budget and greedy.bits <= budget
        assert energies(weights, exact.masks) == pytest.approx(best, rel=2e-5)
        assert 0.5 * best <= energies(weights, greedy.masks) <= best * (1 + 1e-9)
        better += energies(weights, exact.masks) > energies(weights, greedy.masks) * 1.0001
    assert better > 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 8)), min_size=1, max_size=4), st.integers(0, 400), st.booleans()
)
def test_filters_never_exceed_the_budget(layers: list[tuple[int, int, int]], budget: int, exact: bool) -> None:
    random = torch.Generator().manual_seed(budget)
    weights = {str(i): torch.randn(filters, size, generator=random) for i, (filters, size, _) in enumerate(layers)}
    bits = {str(i): b for i, (_, _, b) in enumerate(layers)}
    least = sum(size * b for _, size, b in layers)
    if budget < least:
        with pytest.raises(InfeasibleBudgetError):
            keep_filters(weights, bits, budget, exact=exact)
        return
    kept = keep_filters(weights, bits, budget, exact=exact)
    assert kept.bits == sum(bits[n] * int(mask.sum()) * weights[n].shape[1] for n, mask in kept.masks.items()) <= budget
    assert all(bool(mask.any()) for mask in kept.masks.values())


def test_errors_name_the_layer() -> None:
    with pytest.raises(InputError, match="layer fc: got None bits per weight"):
        keep_weights({"fc": torch.ones(2)}, {}, 9)
    with pytest.raises(InputError, match="layer fc: got weights that are NaN"):
        keep_filters({"fc": torch.tensor([[float("inf")]])}, {"fc": 1}, 9)
