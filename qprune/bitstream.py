"""Integers of few bits, one behind the other without gaps. The first one has the lowest bits of the first byte."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qprune.errors import CheckpointError

WORD = 32
_CHUNK = 1 << 20  # values at once: bounds the memory for their single bits

Array = NDArray[Any]


class BitWriter:
    """Collects integers of 1 … 32 bits."""

    def __init__(self) -> None:
        self.bits = 0
        self._bytes: list[bytes] = []
        self._open = np.zeros(0, np.uint8)  # the bits of a byte that is not complete

    def write(self, values: Array, width: int) -> None:
        """values: integers in 0 … 2^width − 1, of any shape."""
        flat = np.ascontiguousarray(values).reshape(-1).astype("<u4", copy=False)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            single = np.unpackbits(chunk.view(np.uint8).reshape(-1, 4), axis=1, count=width, bitorder="little").reshape(-1)
            self.bits += single.size
            single = np.concatenate([self._open, single])
            whole = single.size - single.size % 8
            self._bytes.append(np.packbits(single[:whole], bitorder="little").tobytes())
            self._open = single[whole:]

    def write_floats(self, values: Array) -> None:
        """values: float32, 32 bits each."""
        self.write(np.ascontiguousarray(values, "<f4").view("<u4"), WORD)

    def getvalue(self) -> bytes:
        """All that was written; the bits that fill the last byte are 0."""
        return b"".join([*self._bytes, np.packbits(self._open, bitorder="little").tobytes()])


class BitReader:
    """Gives back what a BitWriter wrote. Raises CheckpointError where a stream ends too early."""

    def __init__(self, data: Array) -> None:
        """data: uint8 [bytes]."""
        self.data, self.position = data, 0

    def read(self, count: int, width: int) -> Array:
        """uint32 [count]."""
        if self.position + count * width > 8 * self.data.size:
            raise CheckpointError(f"a bit stream of {self.data.size} bytes ends before {count} numbers of {width} bits")
        out = np.empty(count, "<u4")
        for start in range(0, count, _CHUNK):
            n = min(_CHUNK, count - start)
            first, skip = divmod(self.position, 8)
            last = -(-(self.position + n * width) // 8)
            single = np.unpackbits(self.data[first:last], bitorder="little")[skip : skip + n * width].reshape(n, width)
            packed = np.zeros((n, 4), np.uint8)
            packed[:, : -(-width // 8)] = np.packbits(single, axis=1, bitorder="little")
            out[start : start + n] = packed.view("<u4")[:, 0]
            self.position += n * width
        return out

    def read_floats(self, count: int) -> Array:
        """float32 [count]."""
        return self.read(count, WORD).view("<f4").astype(np.float32, copy=False)

    def finish(self) -> None:
        """Raise CheckpointError unless everything was read, up to bits of 0 that fill the last byte."""
        left = 8 * self.data.size - self.position
        if left >= 8 or (left and self.data[-1] >> (8 - left)):
            raise CheckpointError(f"a bit stream of {self.data.size} bytes has {left} bits more than expected")
