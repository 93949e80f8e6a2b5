"""Damage to files: of bytes, of text, and of the values in JSON."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from typing import Any

DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]
ODD = (
    None, True, False, -1, 0, 1, 3, 33, 10**12, -(10**30), 2**63, 1e308, math.nan, math.inf, 0.5, "", "x", "\0", "../../etc/passwd",
    "\ud800", [], {}, [[]], {"a": 1}, [None] * 9, {"": {}}, DEEP,
)  # fmt: skip
FRAGMENTS = (
    b"\0", b"\xff\xfe", b"[" * 3000, b'{"a":' * 3000,
    b"9" * 5000, b"1e999", b"NaN", b"-", b"{", b"}", b",", b'"', b"\\u", b": ", b"&a *a ",
    b"!!int ''", b"!!binary x", b"<<: ", b"- ", b"\n", b"? ", b"2001-99-99", b"0x" + b"f" * 6000,
)  # fmt: skip


def damaged(content: bytes, seed: int) -> bytes:
    """Bits flipped, parts cut out, repeated or put in."""
    chance, data = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 2, 8, 100)))
        kind = chance.randrange(5)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end]
        elif kind == 3:
            data[at:at] = chance.choice(FRAGMENTS)
        else:
            del data[at:]
    return bytes(data)


def changed(value: Any, seed: int) -> Any:
    """A copy of a JSON value in which some values were replaced, removed, repeated or exchanged."""
    chance, value = random.Random(seed), copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(value))
        if not places:
            break
        holder, key = chance.choice(places)
        kind = chance.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 1:
            holder[chance.choice(("x", "", "__class__", "name", f"{key}s"))] = copy.deepcopy(holder[key])
        elif kind == 2:
            other, place = chance.choice(places)
            holder[key] = copy.deepcopy(other[place])
        elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = chance.choice(
                (holder[key] + 1, holder[key] - 1, -holder[key], str(holder[key]), float(holder[key]), [holder[key]])
            )
        else:
            holder[key] = copy.deepcopy(chance.choice(ODD))
    return value


def changed_text(text: str, seed: int) -> str:
    return json.dumps(changed(json.loads(text), seed))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        yield value, key
        yield from _places(item)
