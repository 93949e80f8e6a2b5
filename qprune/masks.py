"""Which weights are kept, in few bits: one bit each, distances between kept ones, or an adaptive arithmetic code. The file's side of the
numbers that `qprune.sizes` counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qprune.bitstream import Array, BitReader, BitWriter
from qprune.errors import CheckpointError
from qprune.sizes import GAP_WIDTHS, gap_bits, mask_bits

_SPAN = 1 << 64  # of the coder's interval; a symbol narrows it by a whole number
_LEAST = 1 << 56  # below, the highest byte of `low` is settled


@dataclass(frozen=True)
class Index:
    """How a mask was written.

    entries
    kept    its entries that are True; with none or all of them True nothing is written
    coding  "plain", "gaps" or "arithmetic"
    bits    of the code
    width   of the field of a distance; 0 for other codings
    """

    entries: int
    kept: int
    coding: str
    bits: int
    width: int = 0

    def to_json(self) -> list[Any]:
        return [self.entries, self.kept, self.coding, self.bits, self.width]

    @classmethod
    def from_json(cls, data: Any) -> Index:
        entries, kept, coding, bits, width = data
        numbers = all(isinstance(value, int) and value >= 0 for value in (entries, kept, bits, width))
        if not numbers or coding not in ("plain", "gaps", "arithmetic") or (coding == "gaps") != (width in GAP_WIDTHS):
            raise ValueError(f"no index: {data!r}")
        return cls(entries, kept, coding, bits, width)


def write_mask(mask: Array, out: BitWriter, entropy: bool = True) -> Index:
    """Write mask [n], bool: one bit per entry, or (entropy) the shortest of the three codings. Nothing if no or all entries are True."""
    n, kept = mask.size, int(mask.sum())
    if kept in (0, n):
        return Index(n, kept, "plain", 0)
    if entropy:
        width, gaps = gap_bits(torch.from_numpy(mask))
        if gaps < mask_bits(n, kept):
            fields = _fields(mask, width)
            out.write(fields, width)
            return Index(n, kept, "gaps", gaps, width)
        if (bits := mask_bits(n, kept)) < n:
            out.write(np.unpackbits(np.frombuffer(encode(mask, bits), np.uint8), count=bits), 1)
            return Index(n, kept, "arithmetic", bits)
    out.write(mask, 1)
    return Index(n, kept, "plain", n)


def read_mask(index: Index, source: BitReader) -> Array:
    """The mask [entries], bool, that `write_mask` wrote. Raises CheckpointError if the code is none of a mask with so many entries kept."""
    n = index.entries
    if index.kept in (0, n) and not index.bits:
        return np.full(n, index.kept > 0)
    if index.coding == "gaps":
        mask = _from_fields(n, source.read(index.bits // index.width, index.width), index.width)
    elif index.coding == "arithmetic":
        mask = decode(np.packbits(source.read(index.bits, 1).astype(np.uint8)).tobytes(), n)
    else:
        mask = source.read(n, 1).astype(bool)
    if int(mask.sum()) != index.kept:
        raise CheckpointError(f"a mask of {n} entries has {int(mask.sum())} kept, expected {index.kept}")
    return mask


def _fields(mask: Array, width: int) -> Array:
    runs = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    top = 2**width - 1
    fields = np.full(int((runs // top + 1).sum()), top, np.uint32)
    fields[np.cumsum(runs // top + 1) - 1] = runs % top
    return fields


def _from_fields(n: int, fields: Array, width: int) -> Array:
    top = 2**width - 1
    ends = fields < top
    places = np.cumsum(fields.astype(np.int64) + ends) - 1
    if fields.size and places[-1] >= n:
        raise CheckpointError(f"a mask of {n} entries has a distance that leads to entry {places[-1]}")
    mask = np.zeros(n, bool)
    mask[places[ends]] = True
    return mask


def encode(mask: Array, bits: int) -> bytes:
    """mask [n], bool, by arithmetic coding with the model (ones + 1) / (entries + 2), in whole numbers; at most `bits` bits of the result
    are used, the others are 0. Raises CheckpointError if they do not suffice."""
    out = bytearray()
    low, span, ones, entries = 0, _SPAN, 1, 2
    for kept in mask.tolist():
        share = span * ones // entries
        if kept:
            span = share
            ones += 1
        else:
            low += share
            span -= share
        entries += 1
        while span < _LEAST:
            low = _settle(out, low)
            span <<= 8
    # the number of the fewest bits in [low, low + span)
    free = span.bit_length() - 1
    while (end := ((low + span - 1) >> free) << free) < low:
        free -= 1
    used = 8 * len(out) + 64 - free
    for _ in range(8):
        end = _settle(out, end)
    if used > bits:
        raise CheckpointError(f"a mask of {mask.size} entries needs {used} bits, expected at most {bits}")
    return bytes(out[: -(-bits // 8)]).ljust(-(-bits // 8), b"\0")


def _settle(out: bytearray, low: int) -> int:
    """Append the highest byte of low's 64 bits, after the carry in bit 64 has been added to the bytes before; returns the rest."""
    if low >= _SPAN:
        place = len(out) - 1
        while out[place] == 0xFF:
            out[place] = 0
            place -= 1
        out[place] += 1
    out.append(low >> 56 & 0xFF)
    return (low << 8) & (_SPAN - 1)


def decode(code: bytes, n: int) -> Array:
    """The mask [n] of `encode`; bits behind the end of the code count as 0."""
    following = iter(code[8:])
    value = int.from_bytes(code[:8].ljust(8, b"\0"), "big")
    span, ones, entries = _SPAN, 1, 2
    mask = bytearray(n)
    for i in range(n):
        share = span * ones // entries
        if value < share:
            span = share
            mask[i] = 1
            ones += 1
        else:
            value -= share
            span -= share
        entries += 1
        while span < _LEAST:
            value = value << 8 | next(following, 0)
            span <<= 8
    return np.frombuffer(mask, np.uint8).astype(bool)
