"""SearchSpace: what it accepts, what it makes of it, and what it says about anything else."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from qprune.errors import QPruneError, SpaceError
from qprune.nn import MixedActivation, MixedConv2d, MixedLinear, QuantConv2d, QuantLinear
from qprune.space import BITS, SearchSpace, check_bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": ()}, r"w_bits: expected at least one of .*, got an empty list"),
        ({"a_bits": []}, r"a_bits: expected at least one of .*, got an empty list"),
        ({"w_bits": (2, 9)}, r"w_bits: expected bits from .*, got 9"),
        ({"w_bits": (2, 16)}, r"w_bits: expected bits from .*, got 16"),
        ({"a_bits": (-1, 4)}, r"a_bits: expected bits from .*, got -1"),
        ({"w_bits": (2.0, 4)}, r"w_bits: expected bits from .*, got 2\.0"),
        ({"w_bits": (2, "4")}, r"w_bits: expected bits from .*, got '4'"),
        ({"w_bits": (2, None)}, r"w_bits: expected bits from .*, got None"),
        ({"w_bits": ((2, 4), 8)}, r"w_bits: expected bits from .*, got \(2, 4\)"),
        ({"w_bits": (True, 4)}, r"w_bits: expected bits from .*, got True"),
        ({"w_bits": True}, r"w_bits: expected bits from .*, got True"),
        ({"w_bits": "248"}, r"w_bits: expected bits like \(2, 4, 8\), got '248'"),
        ({"w_bits": 2.5}, r"w_bits: expected bits like \(2, 4, 8\), got 2\.5"),
        ({"a_bits": None}, r"a_bits: expected bits like \(2, 4, 8\), got None"),
        ({"w_bits": (2, 4, 2)}, r"w_bits: expected every candidate once, got \(2, 4, 2\)"),
        ({"granularity": "channel"}, r"granularity: expected one of layer, filter, got 'channel'"),
        ({"granularity": None}, r"granularity: expected one of layer, filter, got None"),
        ({"scales": "tensor"}, r"scales: expected one of layer, filter, got 'tensor'"),
        ({"weight_quantizer": "lsq+"}, r"weight_quantizer: expected one of lsq, symmetric, dorefa, nice, uniq, got 'lsq\+'"),
        ({"input_quantizer": "lsq"}, r"input_quantizer: expected one of pact, lsq\+, nice, uniq, got 'lsq'"),
        ({"joint": "yes"}, r"joint: expected True or False, got 'yes'"),
        ({"pairs": ()}, r"pairs: expected \(weight bits, activation bits\) like .*, got \(\)"),
        ({"pairs": 4}, r"pairs: expected \(weight bits, activation bits\) like .*, got 4"),
        ({"pairs": (2, 4)}, r"pairs: expected \(weight bits, activation bits\) like .*, got \(2, 4\)"),
        ({"pairs": ((2, 4), (8,))}, r"pairs: expected \(weight bits, activation bits\) like .*, got \(\(2, 4\), \(8,\)\)"),
        ({"pairs": ((2, 4, 8),)}, r"pairs: expected \(weight bits, activation bits\) like .*, got \(\(2, 4, 8\),\)"),
        ({"pairs": ((2.5, 4),)}, r"pairs: expected bits from .*, got 2\.5"),
        ({"pairs": ("24",)}, r"pairs: expected bits from .*, got '2'"),
        ({"pairs": ((2, 4), (4, 17))}, r"pairs: expected bits from .*, got 17"),
        ({"pairs": ((2, 4), (2, 4))}, r"pairs: expected every candidate once, got \(\(2, 4\), \(2, 4\)\)"),
        ({"placement": "middle"}, r"placement: expected one of input, output, got 'middle'"),
        ({"input_quantizer": "nice"}, r"input_quantizer: 'nice' needs placement='output'"),
        ({"weight_quantizer": "uniq"}, r"weight_quantizer: 'uniq' needs placement='output'"),
        ({"shared_weights": False}, r"shared_weights: False needs placement='output'"),
        ({"shared_weights": 1}, r"shared_weights: expected True or False, got 1"),
        ({"placement": "output", "input_quantizer": "lsq+"}, r"input_quantizer: 'lsq\+' learns an offset for inputs; .*"),
        ({"placement": "output", "w_bits": (0, 4)}, r"w_bits: 0 bits \(pruned\) is no candidate with placement='output'; .*"),
        ({"weight_quantizer": "nice", "w_bits": (1, 4)}, r"w_bits: nice weights need at least 2 bits, got 1; leave that candidate out"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=rf"^{message}$") as caught:
        SearchSpace(**options)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, QPruneError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda **o: MixedConv2d(2, 3, 1, **o), id="MixedConv2d"),
        pytest.param(lambda **o: MixedLinear(2, 3, **o), id="MixedLinear"),
    ],
)
def test_layers_refuse_the_same(make: Any) -> None:
    with pytest.raises(SpaceError, match=r"^w_bits: expected bits from .*, got 11$"):
        make(w_bits=(2, 11))
    with pytest.raises(SpaceError, match=r"^space: give a SearchSpace or its fields, got both \(space= and w_bits=\)$"):
        make(space=SearchSpace(), w_bits=(2, 4))
    with pytest.raises(SpaceError, match=r"^space: expected a SearchSpace, got tuple$"):
        make(space=(2, 4))
    with pytest.raises(TypeError, match="w_bit"):
        make(w_bit=(2, 4))


@pytest.mark.parametrize(
    "make", [pytest.param(lambda **o: QuantConv2d(2, 3, 1, **o), id="conv"), pytest.param(lambda **o: QuantLinear(2, 3, **o), id="linear")]
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": (2, 4)}, r"w_bits: expected one int or one per filter \(3\), got 2"),
        ({"w_bits": ()}, r"w_bits: expected one int or one per filter \(3\), got 0"),
        ({"w_bits": (2, 4, 12)}, r"w_bits: expected bits from .*, got 12"),
        ({"w_bits": (2, 4, "8")}, r"w_bits: expected bits from .*, got '8'"),
        ({"w_bits": 2.0}, r"w_bits: expected bits from .*, got 2\.0"),
        ({"a_bits": 9}, r"a_bits: expected bits from .*, got 9"),
        ({"a_bits": (4, 8)}, r"a_bits: expected one int, got \(4, 8\)"),
        ({"weight_quantizer": "lsqq"}, r"weight_quantizer: expected one of lsq, symmetric, dorefa, nice, uniq, got 'lsqq'"),
        ({"input_quantizer": "relu"}, r"input_quantizer: expected one of pact, lsq\+, nice, uniq, got 'relu'"),
        ({"scales": "row"}, r"scales: expected one of layer, filter, got 'row'"),
    ],
)
def test_fixed_layers_refuse(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=rf"^{message}$"):
        make(**options)


def test_activation_refuses() -> None:
    with pytest.raises(SpaceError, match=r"^a_bits: expected bits from .*, got 10$"):
        MixedActivation((2, 10))
    with pytest.raises(SpaceError, match=r"^input_quantizer: expected one of pact, lsq\+, nice, uniq, got 'x'$"):
        MixedActivation((2, 4), input_quantizer="x")


@pytest.mark.parametrize("bits", BITS)
def test_every_width_is_a_candidate(bits: int) -> None:
    space = SearchSpace.fixed(bits, bits)
    assert (space.w_bits, space.a_bits, space.candidates, space.is_fixed) == ((bits,), (bits,), ((bits, bits),), True)


@pytest.mark.parametrize(
    "bits", [[2, 4], (2, 4), range(2, 5, 2), (b for b in (2, 4)), {2: "x", 4: "y"}.keys()], ids=lambda b: type(b).__name__
)
def test_any_iterable_of_ints(bits: Any) -> None:
    assert SearchSpace(w_bits=bits).w_bits == (2, 4)


def test_one_int_is_one_candidate() -> None:
    assert SearchSpace(w_bits=4, a_bits=8).candidates == ((4, 8),)  # type: ignore[arg-type]
    assert check_bits("w_bits", 3) == (3,)


def test_order_is_kept() -> None:
    space = SearchSpace(w_bits=(8, 0, 2), a_bits=(4, 2))
    assert space.candidates == ((8, 4), (8, 2), (0, 4), (0, 2), (2, 4), (2, 2))
    assert not space.is_fixed and not space.joint


def test_pairs() -> None:
    space = SearchSpace(pairs=[(2, 8), (4, 4), (2, 4)])  # type: ignore[arg-type]
    assert space.joint and space.pairs == space.candidates == ((2, 8), (4, 4), (2, 4))
    assert (space.w_bits, space.a_bits) == ((2, 4), (8, 4))
    assert SearchSpace(pairs=((2, 8),)).is_fixed


def test_joint_is_all_pairs() -> None:
    assert SearchSpace((2, 4), (4, 8), joint=True).candidates == ((2, 4), (2, 8), (4, 4), (4, 8))


def test_fixed_takes_options() -> None:
    space = SearchSpace.fixed(4, 8, weight_quantizer="dorefa", granularity="filter")
    assert (space.weight_quantizer, space.granularity) == ("dorefa", "filter")


def test_is_a_value() -> None:
    space = SearchSpace((0, 2, 4), pairs=None, granularity="filter")
    assert space == SearchSpace([0, 2, 4], granularity="filter")  # type: ignore[arg-type]
    assert len({space, SearchSpace((0, 2, 4), granularity="filter"), SearchSpace()}) == 2
    assert copy.deepcopy(space) == space == pickle.loads(pickle.dumps(space))
    assert pickle.loads(pickle.dumps(space)).candidates == space.candidates
    assert dataclasses.replace(space, granularity="layer").candidates == space.candidates
    with pytest.raises(dataclasses.FrozenInstanceError):
        space.w_bits = (2,)  # type: ignore[misc]
