"""Codebooks: k-means against all partitions, the reserved 0, small layers, and equidistant values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from qprune.clustering import Values, equidistant, kmeans, lloyd
from qprune.codebooks import ZERO, codebooks, refine
from qprune.errors import InputError

RANDOM = np.random.default_rng(3)
HEAVY = np.sort(RANDOM.standard_t(3, 1000)).astype(np.float32)


def squared_error(values: np.ndarray, centers: np.ndarray) -> float:
    return float(np.square(values.astype(np.float64)[:, None] - centers[None].astype(np.float64)).min(1).sum())


def least_errors(values: np.ndarray, most: int) -> list[float]:
    """The least squared errors of 1, 2, ... clusters: the recurrence with every begin tried for every end."""
    n, exact = len(values), values.astype(np.float64)
    cost = np.zeros((n + 1, n + 1))
    for i in range(n):
        lengths = np.arange(1, n - i + 1)
        sums, squares = np.cumsum(exact[i:]), np.cumsum(exact[i:] ** 2)
        cost[i, i + 1 :] = squares - sums**2 / lengths
    cost[np.tril_indices(n + 1, -1)] = np.inf
    best, found = cost[0], [cost[0, n]]
    for _ in range(most - 1):
        best = (best[:, None] + cost).min(0)
        found.append(best[n])
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_kmeans_is_the_best_of_all_partitions(size: int) -> None:
    for seed in range(20):
        values = np.sort(np.random.default_rng(seed).laplace(size=9)).astype(np.float32)
        cuts = [[0, *inner, 9] for inner in itertools.combinations(range(1, 9), size - 1)]
        least = min(sum(float(np.square(v - v.mean()).sum()) for v in np.split(values.astype(np.float64), cut[1:-1])) for cut in cuts)
        centers = kmeans(Values.ascending(values), [size])[size]
        assert squared_error(values, centers) == pytest.approx(least, rel=1e-6)


def test_kmeans_of_a_thousand_values_is_optimal_at_every_size() -> None:
    least = least_errors(HEAVY, 64)
    found = kmeans(Values.ascending(HEAVY), [2, 7, 16, 64])
    for size, centers in found.items():
        assert len(centers) == size and (np.diff(centers) >= 0).all()
        assert squared_error(HEAVY, centers) == pytest.approx(least[size - 1], rel=1e-6)


@pytest.mark.parametrize("values", [np.arange(300) * 0.5, np.repeat(np.arange(-40, 47), 4), RANDOM.integers(0, 60, 250)])
def test_kmeans_of_values_on_a_grid_is_optimal(values: np.ndarray) -> None:
    """Many partitions are equally good there."""
    values = np.sort(values).astype(np.float32)
    least = least_errors(values, 40)
    for size, centers in kmeans(Values.ascending(values), [2, 3, 8, 31, 40]).items():
        assert squared_error(values, centers) == pytest.approx(least[size - 1], rel=1e-6)


def test_kmeans_of_many_values_is_near_the_optimum() -> None:
    """Above 1024 distinct values groups are clustered: at most a percent is lost."""
    values = np.sort(RANDOM.laplace(size=2500)).astype(np.float32)
    least = least_errors(values, 64)
    for size, centers in kmeans(Values.ascending(values), [2, 8, 64]).items():
        error = squared_error(values, centers)
        assert least[size - 1] * (1 - 1e-6) <= error <= 1.01 * least[size - 1]


def test_kmeans_begins_better_than_equal_distances() -> None:
    """With heavy tails, Lloyd's iterations from linspace(min, max) end far above the optimum."""
    values = Values.ascending(HEAVY)
    original = lloyd(values, np.linspace(HEAVY[0], HEAVY[-1], 64).astype(np.float32), 100, 1e-3)
    assert values.error(kmeans(values, [64])[64]) < 0.5 * values.error(original)


def test_quantization_error_of_a_gaussian() -> None:
    """Lloyd-Max quantizers of a normal distribution (Max 1960, table 1): mean squared error 0.3634, 0.1175, 0.03454, 0.009497."""
    weight = torch.randn(400_000, generator=torch.Generator().manual_seed(5))
    books = codebooks({"a": weight}, range(1, 5), zero=False)["a"]
    for bits, expected in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        assert books[bits].error / 400_000 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_error_is_that_of_the_quantized_weights(zero: bool, linear: bool) -> None:
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    weight[::2] = 0
    weight[1, 0, 0, 0] = 0.5 * ZERO
    for bits, book in codebooks({"a": weight}, zero=zero, linear=linear)["a"].items():
        quantized = book.quantize(weight)
        assert float((quantized - weight).double().square().sum()) == pytest.approx(book.error, rel=1e-5, abs=1e-10)
        assert quantized.is_contiguous(memory_format=torch.channels_last) and len(quantized[quantized != 0].unique()) <= 2**bits
        assert not zero or bool((quantized == 0).eq(weight.abs() < ZERO).all())
        codes = book.encode(weight)
        assert torch.equal(book.decode(codes), quantized) and codes.dtype == torch.int16
        assert int(codes.min()) == 0 and bool((codes == 2**bits).eq(weight.abs() < ZERO).all() if zero else codes.max() < 2**bits)
        assert book.entries == (2 if linear else 2**bits)


def test_errors_fall_with_bits() -> None:
    books = codebooks({"a": torch.randn(5000, generator=torch.Generator().manual_seed(2))})["a"]
    errors = [books[bits].error for bits in range(1, 9)]
    assert all(b < 0.5 * a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("linear", [False, True])
def test_layers_with_fewer_weights_than_values(linear: bool) -> None:
    weights = {"none": torch.zeros(4, 2), "empty": torch.zeros(0), "one": torch.tensor([0.0, 0.25]), "two": torch.tensor([-1.0, 0.0, 0.5])}
    for name, books in codebooks(weights, linear=linear).items():
        for bits, book in books.items():
            assert len(book.values) == 2**bits and bool(book.values.isfinite().all()) and bool((book.values.diff() >= 0).all())
            assert book.error == pytest.approx(0, abs=1e-12)
            assert torch.equal(book.quantize(weights[name]), weights[name])
    book = codebooks({"a": torch.tensor([0.1, 0.2, 0.2, 0.7])}, [2])["a"][2]
    assert torch.equal(book.values, torch.tensor([0.1, 0.2, 0.7, 0.7]))


def test_a_quantized_weight_gets_its_own_codebook_back() -> None:
    weight = torch.randn(3000, generator=torch.Generator().manual_seed(8))
    book = codebooks({"a": weight}, [4])["a"][4]
    again = codebooks({"a": book.quantize(weight)}, [4])["a"][4]
    assert torch.equal(again.values, book.values) and again.error == pytest.approx(0, abs=1e-9)


def test_equidistant_values_are_fitted() -> None:
    """Weights on a grid of 8 levels with an outlier: the range is not stretched to the outlier at 3 bits as linspace would."""
    grid = np.repeat(np.arange(8, dtype=np.float32) * 0.25 - 1, 500)
    centers = equidistant(Values.ascending(grid), 8)
    assert np.allclose(centers, np.arange(8) * 0.25 - 1, atol=1e-6)
    values = Values.ascending(HEAVY)
    centers = equidistant(values, 8)
    assert np.allclose(np.diff(centers), np.diff(centers)[0], rtol=1e-4)
    assert values.error(centers) < 0.5 * values.error(np.linspace(HEAVY[0], HEAVY[-1], 8))


def test_refinement_follows_the_weights() -> None:
    random = torch.Generator().manual_seed(4)
    weight = torch.randn(2000, generator=random)
    book = codebooks({"a": weight}, [3])["a"][3]
    moved = 1.1 * weight + 0.02 * torch.randn(2000, generator=random)
    stale = float((book.quantize(moved) - moved).square().sum())
    five, many = refine(moved, book, 5), refine(moved, book, 100)
    assert many.error <= five.error < stale
    assert many.error == pytest.approx(codebooks({"a": moved}, [3])["a"][3].error, rel=0.02)
    assert refine(moved, codebooks({"a": weight}, [3], linear=True)["a"][3]).linear


def test_errors_name_the_layer() -> None:
    with pytest.raises(InputError, match="layer conv1: got weights that are NaN"):
        codebooks({"conv1": torch.tensor([0.0, float("nan")])})
    with pytest.raises(InputError, match=r"got widths \[0, 3\], expected bits in 1..8"):
        codebooks({"conv1": torch.ones(2)}, [3, 0])
