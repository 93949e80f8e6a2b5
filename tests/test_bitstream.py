"""Numbers of few bits in one stream, and masks in few bits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qprune.bitstream import BitReader, BitWriter
from qprune.errors import CheckpointError
from qprune.masks import Index, decode, encode, read_mask, write_mask
from qprune.sizes import mask_bits


def reader(out: BitWriter) -> BitReader:
    return BitReader(np.frombuffer(out.getvalue(), np.uint8))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 32), st.integers(0, 40)), max_size=12), st.integers(0, 2**32))
def test_numbers_come_back(blocks: list[tuple[int, int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    written = [(random.integers(0, 2**width, count), width) for width, count in blocks]
    out = BitWriter()
    for values, width in written:
        out.write(values, width)
    assert out.bits == sum(width * count for width, count in blocks)
    assert len(out.getvalue()) == -(-out.bits // 8)
    source = reader(out)
    for values, width in written:
        assert np.array_equal(source.read(values.size, width), values)
    source.finish()


def test_the_layout() -> None:
    """The first number has the lowest bits; a float is its little-endian bytes."""
    out = BitWriter()
    for value, width in ((0b1, 1), (0b10, 2), (0b10011, 5)):
        out.write(np.array([value]), width)
    out.write_floats(np.array([-1.5], np.float32))
    assert out.getvalue() == bytes([0b10011_10_1]) + np.float32(-1.5).tobytes()


def test_floats_come_back_behind_odd_widths() -> None:
    values = np.array([0.0, -0.0, np.nan, np.inf, 1e-45, 3.1], np.float32)
    out = BitWriter()
    out.write(np.array([5]), 3)
    out.write_floats(values)
    source = reader(out)
    assert source.read(1, 3) == [5]
    assert source.read_floats(6).tobytes() == values.tobytes()


def test_more_numbers_than_one_chunk() -> None:
    values = np.random.default_rng(0).integers(0, 8, (1 << 20) + 77)
    out = BitWriter()
    out.write(np.array([1]), 1)
    out.write(values, 3)
    source = reader(out)
    assert source.read(1, 1) == [1] and np.array_equal(source.read(values.size, 3), values)


def test_a_stream_that_is_too_short_or_too_long() -> None:
    out = BitWriter()
    out.write(np.array([1, 2, 3]), 7)
    with pytest.raises(CheckpointError, match="ends before 4 numbers of 7 bits"):
        reader(out).read(4, 7)
    source = reader(out)
    source.read(2, 7)
    with pytest.raises(CheckpointError, match="10 bits more than expected"):
        source.finish()
    source = BitReader(np.array([0b1000_0011], np.uint8))
    source.read(7, 1)
    with pytest.raises(CheckpointError, match="1 bits more"):
        source.finish()


def exact_bits(n: int, kept: int) -> int:
    return math.ceil(math.log2((n + 1) * math.comb(n, kept))) + 2


def test_every_short_mask_by_arithmetic_coding() -> None:
    for n in range(1, 11):
        for entries in itertools.product((False, True), repeat=n):
            mask = np.array(entries)
            assert np.array_equal(decode(encode(mask, exact_bits(n, int(mask.sum()))), n), mask)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.05, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 9, 1000, 60_000])
def test_masks_come_back_in_the_bits_that_are_counted(n: int, share: float, entropy: bool) -> None:
    mask = np.random.default_rng(n).random(n) < share
    out = BitWriter()
    out.write(np.array([1]), 3)
    index = write_mask(mask, out, entropy)
    assert out.bits == 3 + index.bits
    assert index.bits <= (mask_bits(n, int(mask.sum())) if entropy else n)
    assert Index.from_json(index.to_json()) == index
    source = reader(out)
    source.read(1, 3)
    assert np.array_equal(read_mask(index, source), mask)
    source.finish()


@pytest.mark.parametrize("mask", [[1] * 5000 + [0] * 5000, [0] * 9999 + [1], [0, 1] * 3000, [1] + [0] * 70_000 + [1, 1]], ids=len)
def test_masks_that_are_not_random(mask: list[int]) -> None:
    """Long runs make carries and long stretches of one byte."""
    array = np.array(mask, bool)
    assert np.array_equal(decode(encode(array, array.size + 20), array.size), array)  # more bits than one per entry
    out = BitWriter()
    index = write_mask(array, out)
    assert np.array_equal(read_mask(index, reader(out)), array)


def test_even_distances_are_written_as_such() -> None:
    mask = np.zeros(100_000, bool)
    mask[::4] = True
    out = BitWriter()
    index = write_mask(mask, out)
    assert index.coding == "gaps" and index.bits < mask_bits(100_000, 25_000)
    assert np.array_equal(read_mask(index, reader(out)), mask)


def test_a_code_of_too_few_bits_is_refused() -> None:
    mask = np.random.default_rng(0).random(500) < 0.5
    with pytest.raises(CheckpointError, match="expected at most 100"):
        encode(mask, 100)


@pytest.mark.parametrize(
    "data",
    [
        [4, 2, "gaps", 9, 0],
        [4, 2, "gaps", 9, 40],
        [4, 2, "plain", 4, 3],
        [4, 2, "best", 4, 0],
        [4, -1, "plain", 4, 0],
        [4, 2],
        None,
        [4, 2.5, "plain", 4, 0],
    ],
)
def test_no_index(data: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        Index.from_json(data)


def test_codes_of_other_masks() -> None:
    out = BitWriter()
    write_mask(np.array([True, False, True]), out, entropy=False)
    with pytest.raises(CheckpointError, match="3 entries has 2 kept, expected 1"):
        read_mask(Index(3, 1, "plain", 3), reader(out))
    far = BitWriter()
    far.write(np.array([2, 2]), 2)
    with pytest.raises(CheckpointError, match="leads to entry 5"):
        read_mask(Index(4, 2, "gaps", 4, 2), reader(far))
