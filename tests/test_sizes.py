"""Sizes: the published arithmetic, and codes that are written and read back."""

from __future__ import annotations

import math

import pytest
import torch

from qprune.errors import InputError
from qprune.sizes import CodedLayer, gap_bits, layer_size, mask_bits, mask_entropy, sizes

MILLION = 1_000_000


@pytest.mark.parametrize(("share", "bits", "rate"), [(0.0054, 3, 1975.3), (0.12, 6, 44.444), (0.10, 5, 64.0), (0.08, 4, 100.0)])
def test_published_rates(share: float, bits: int, rate: float) -> None:
    """LeNet-5 and the three chained AlexNets: 32 / (share kept · bits)."""
    size = layer_size(CodedLayer(MILLION, round(share * MILLION), bits, 0))
    assert size.rate == pytest.approx(rate, rel=1e-4)


def test_the_mask_costs_more_than_the_values() -> None:
    """Of LeNet-5's 1975 times, 495 remain with an ideal mask; a code that can be written is little longer."""
    size = layer_size(CodedLayer(MILLION, 5400, 3, 8))
    assert size.values == 16200 and size.books == 256 and size.dense == 32 * MILLION
    assert size.entropy_rate == pytest.approx(495, abs=0.5)
    assert 0 < size.mask - size.entropy < 20
    assert size.total == size.values + size.mask + 256 and size.stored_rate == 32 * MILLION / size.total < size.entropy_rate


def adaptive_bits(mask: list[bool]) -> float:
    """The code length of an adaptive arithmetic coder, entry by entry."""
    counts, bits = [1, 1], 0.0
    for entry in mask:
        bits -= math.log2(counts[entry] / sum(counts))
        counts[entry] += 1
    return bits


@pytest.mark.parametrize(("weights", "nnz"), [(1000, 3), (500, 100), (64, 1), (2000, 1999)])
def test_mask_is_what_an_adaptive_coder_writes(weights: int, nnz: int) -> None:
    mask = torch.zeros(weights, dtype=torch.bool)
    mask[torch.randperm(weights, generator=torch.Generator().manual_seed(0))[:nnz]] = True
    written = adaptive_bits(mask.tolist())
    assert mask_bits(weights, nnz) == min(weights, math.ceil(written) + 2)
    assert mask_entropy(weights, nnz) <= written


def test_masks_at_the_ends() -> None:
    assert [mask_bits(100, nnz) for nnz in (0, 50, 100)] == [0, 100, 0]
    assert [mask_entropy(100, nnz) for nnz in (0, 50, 100)] == [0, 100, 0]
    nothing = layer_size(CodedLayer(100, 0, 3, 0, torch.zeros(100, dtype=torch.bool)))
    assert nothing.total == 0 and nothing.gaps == 0 and nothing.rate == nothing.stored_rate == math.inf


def read_gaps(fields: list[int], width: int) -> list[int]:
    places, place = [], -1
    for number in fields:
        if number == 2**width - 1:
            place += number
        else:
            place += number + 1
            places.append(place)
    return places


def test_gaps_are_a_code_that_can_be_read() -> None:
    random = torch.Generator().manual_seed(0)
    for share in (0.5, 0.05, 0.001):
        mask = torch.rand(20_000, generator=random) < share
        places = mask.nonzero().flatten().tolist()
        for width in (2, 4, 8):
            fields, before = [], -1
            for place in places:
                run = place - before - 1
                fields += [2**width - 1] * (run // (2**width - 1)) + [run % (2**width - 1)]
                before = place
            assert read_gaps(fields, width) == places
            assert gap_bits(mask, [width]) == (width, width * len(fields))
        width, bits = gap_bits(mask)
        assert bits == min(gap_bits(mask, [w])[1] for w in range(2, 17)) == gap_bits(mask, [width])[1]
        assert bits > mask_entropy(20_000, len(places))


def test_index_is_the_shorter_code_of_every_layer() -> None:
    regular = torch.zeros(4000, dtype=torch.bool)
    regular[3::4] = True  # runs of 3 zeros: 3 bits each with an escape at width 2, 3 bits at width 3
    scattered = torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.02
    runs = torch.zeros(4000, dtype=torch.bool)
    runs[1000:3000] = True  # no zeros between
    layers = {
        "scattered": CodedLayer(4000, int(scattered.sum()), 4, 16, scattered),
        "regular": CodedLayer(4000, 1000, 2, 4, regular),
        "runs": CodedLayer(4000, 2000, 2, 4, runs),
    }
    found = sizes(layers)
    assert found.layers["regular"].gaps == 3 * 1000 < found.layers["regular"].mask
    assert all(size.index == min(size.mask, size.gaps or 0) for size in found.layers.values())
    assert found.layers["scattered"].index == found.layers["scattered"].mask < (found.layers["scattered"].gaps or 0)
    total = found.total
    assert total.index == sum(size.index for size in found.layers.values()) and total.books == 32 * 24
    assert total.values == 4 * int(scattered.sum()) + 2000 + 4000 and total.rate == 32 * 12000 / total.values
    assert total.stored_rate == 32 * 12000 / (total.values + total.index + total.books)
    assert sizes({**layers, "unknown": CodedLayer(10, 5, 2, 4)}).total.gaps is None


def test_whole_filters_have_one_entry_each() -> None:
    mask = torch.tensor([True, False, True, True])
    size = layer_size(CodedLayer(36, 27, 4, 16, mask, filters=4))
    assert size.values == 108 and size.dense == 32 * 36 and size.entropy == pytest.approx(4 * (0.75 * math.log2(4 / 3) + 0.5))
    assert size.index == size.mask == 4 < (size.gaps or 0)
    with pytest.raises(InputError, match="got 26 of 36 weights in 4 filters, expected whole filters"):
        CodedLayer(36, 26, 4, 16, filters=4)
    with pytest.raises(InputError, match="a mask of 36 entries with 27 kept, expected 4 with 3"):
        CodedLayer(36, 27, 4, 16, mask.repeat_interleave(9), filters=4)


def test_errors() -> None:
    with pytest.raises(InputError, match="got 11 of 10 weights"):
        CodedLayer(10, 11, 2, 4)
    with pytest.raises(InputError, match="a mask of 4 entries with 4 kept, expected 4 with 3"):
        CodedLayer(4, 3, 2, 4, torch.ones(4, dtype=torch.bool))
