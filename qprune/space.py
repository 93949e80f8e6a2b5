"""What may be chosen: the candidate bits of a layer, and how finely they are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qprune.errors import SpaceError

PRUNED, FLOAT = 0, 32
IMAGE_BITS = 8  # of the input of a unit that no other unit produces
BITS = (PRUNED, *range(1, 9), FLOAT)
GRANULARITIES = ("layer", "filter")
PLACEMENTS = ("input", "output")
WEIGHT_QUANTIZERS = ("lsq", "symmetric", "dorefa", "nice", "uniq")
INPUT_QUANTIZERS = ("pact", "lsq+", "nice", "uniq")
QUANTIZER_FIELDS = ("weight_quantizer", "input_quantizer", "scales", "placement", "shared_weights")
_NEEDS_PRODUCER = {"nice", "uniq"}  # activation quantizers that need what an activation is made of
_LEAST_BITS = {"nice": 2, "uniq": 1}  # least bits of weights


def check_bits(name: str, bits: Any) -> tuple[int, ...]:
    """`bits` as a tuple of distinct members of {0, 1 … 8, 32}; raises SpaceError otherwise. One int stands for one candidate."""
    values = (bits,) if isinstance(bits, int) else tuple(bits) if isinstance(bits, Iterable) and not isinstance(bits, str) else None
    if values is None:
        raise SpaceError(f"{name}: expected bits like (2, 4, 8), got {bits!r}")
    if not values:
        raise SpaceError(f"{name}: expected at least one of {BITS}, got an empty list")
    for b in values:
        if isinstance(b, bool) or not isinstance(b, int) or b not in BITS:
            raise SpaceError(f"{name}: expected bits from 0 (pruned), 1 … 8, 32 (float), got {b!r}")
    if len(set(values)) != len(values):
        raise SpaceError(f"{name}: expected every candidate once, got {values}")
    return values


def _check_pairs(pairs: Any) -> tuple[tuple[int, int], ...]:
    try:
        values = tuple((w, a) for w, a in pairs)
    except (TypeError, ValueError):
        values = ()
    if not values:
        raise SpaceError(f"pairs: expected (weight bits, activation bits) like ((2, 4), (8, 8)), got {pairs!r}")
    for side in zip(*values, strict=True):
        for bits in side:
            check_bits("pairs", (bits,))
    if len(set(values)) != len(values):
        raise SpaceError(f"pairs: expected every candidate once, got {values}")
    return values


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SpaceError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True)
class SearchSpace:
    """The candidates of a layer.

    w_bits, a_bits    candidate bits of weights and of the layer's input, from {0, 1 … 8, 32}; 0 = pruned, 32 = float
    granularity       "layer": one choice of weight bits for the whole layer; "filter": one per output filter
    pairs             joint candidates (w, a), instead of every weight choice with every activation choice; sets w_bits and a_bits
    joint             True: joint candidates made of all pairs of w_bits x a_bits
    weight_quantizer  "lsq" (two's complement, 1902.08153), "symmetric" (zero-centred, 2^b − 1 levels), "dorefa" (2^b levels, none at
                      zero, 1606.06160), "nice" (as symmetric, one clip per layer that is not learned, 1810.00162), "uniq" (k-quantiles,
                      1804.10969)
    input_quantizer   "pact" (learned clip, 1805.06085), "lsq+" (learned clip and offset, 2004.09576), "nice" (clip that is not learned),
                      "uniq"
    scales            weight scales: one per "filter" or one per "layer"
    placement         "input": a layer quantizes its own input; "output": its activation is quantized where it is produced, behind the
                      normalisation and a residual addition, with bits per output filter (Zur et al., 1904.09872). Candidates are then pairs
    shared_weights    with placement "output": False gives every candidate a weight, normalisation and clip of its own

    Raises SpaceError for anything else.
    """

    w_bits: tuple[int, ...] = (2, 4, 8)
    a_bits: tuple[int, ...] = (2, 4, 8)
    granularity: str = "layer"
    pairs: tuple[tuple[int, int], ...] | None = None
    joint: bool = False
    weight_quantizer: str = "lsq"
    input_quantizer: str = "pact"
    scales: str = "filter"
    placement: str = "input"
    shared_weights: bool = True
    candidates: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.pairs is not None:
            pairs = _check_pairs(self.pairs)
            w_bits, a_bits = (tuple(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
            self._set(pairs=pairs, joint=True, w_bits=w_bits, a_bits=a_bits)
        self._set(w_bits=check_bits("w_bits", self.w_bits), a_bits=check_bits("a_bits", self.a_bits))
        if not isinstance(self.joint, bool):
            raise SpaceError(f"joint: expected True or False, got {self.joint!r}")
        if not isinstance(self.shared_weights, bool):
            raise SpaceError(f"shared_weights: expected True or False, got {self.shared_weights!r}")
        _one_of("placement", self.placement, PLACEMENTS)
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("scales", self.scales, GRANULARITIES)
        _one_of("weight_quantizer", self.weight_quantizer, WEIGHT_QUANTIZERS)
        _one_of("input_quantizer", self.input_quantizer, INPUT_QUANTIZERS)
        self._check_placement()
        self._set(candidates=self.pairs or tuple((w, a) for w in self.w_bits for a in self.a_bits))

    def _check_placement(self) -> None:
        least = _LEAST_BITS.get(self.weight_quantizer, PRUNED)
        low = [b for b in self.w_bits if b < least]
        if low:
            raise SpaceError(f"w_bits: {self.weight_quantizer} weights need at least {least} bits, got {low[0]}; leave that candidate out")
        if self.placement == "input":
            if self.input_quantizer in _NEEDS_PRODUCER or self.weight_quantizer == "uniq":
                name = "input_quantizer" if self.input_quantizer in _NEEDS_PRODUCER else "weight_quantizer"
                raise SpaceError(f"{name}: {getattr(self, name)!r} needs placement='output'")
            if not self.shared_weights:
                raise SpaceError("shared_weights: False needs placement='output'")
            return
        if self.input_quantizer == "lsq+":
            raise SpaceError("input_quantizer: 'lsq+' learns an offset for inputs; with placement='output' use nice, pact or uniq")
        if not self.shared_weights and self.scales == "layer" and self.weight_quantizer not in ("nice", "uniq"):
            raise SpaceError(f"scales: with shared_weights=False, {self.weight_quantizer} weights need scales='filter', got 'layer'")
        for name, bits in (("w_bits", self.w_bits), ("a_bits", self.a_bits)):
            if PRUNED in bits:
                raise SpaceError(
                    f"{name}: 0 bits (pruned) is no candidate with placement='output'; use placement='input' or method slimmable"
                )
        self._set(joint=True)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def fixed(cls, w_bits: int, a_bits: int, **options: Any) -> SearchSpace:
        """A space of one candidate: nothing is searched, the layer is quantized to these bits."""
        return cls((w_bits,), (a_bits,), **options)

    @property
    def is_fixed(self) -> bool:
        return len(self.candidates) == 1

    @property
    def own_input_quantizer(self) -> str:
        """Of a layer that quantizes its own input: with placement "output" the image, which is no activation."""
        return self.input_quantizer if self.placement == "input" else "pact"

    @property
    def quantizers(self) -> dict[str, Any]:
        """The fields that say how bits are quantized, whichever are chosen."""
        return {name: getattr(self, name) for name in QUANTIZER_FIELDS}


def split_fields(options: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of a plain layer, and those named `names`, which are fields of a SearchSpace."""
    fields = {name: options[name] for name in names if name in options}
    return {name: value for name, value in options.items() if name not in fields}, fields
