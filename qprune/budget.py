"""What a network may cost: bit operations, size, multiplications."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from qprune.conventions import CONVENTIONS
from qprune.cost import Cost, evaluate, policy_choices
from qprune.errors import BudgetError, SpaceError
from qprune.geometry import Geometry
from qprune.policy import LayerBits, Policy
from qprune.space import PRUNED, check_bits

Amount = float | int | str
MEASURES = {"bops": "bops", "size": "size_bits", "macs": "macs"}
"""Name in a Budget → attribute of a Cost."""

_UNIFORM = re.compile(r"w(\d+)a(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"([0-9.]+(?:[eE][+-]?\d+)?)\s*([kKmMgGtT]?)(B?)")
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Budget:
    """Upper limits; at least one.

    bops  bit operations per sample     size  bits of all weights     macs  multiplications per sample

    Each is an absolute number (1.5e9, "1.5G"; for size also bytes, "300kB"), a share of the float network ("2%"), or a uniform network
    ("w4a4": what the network costs with 4-bit weights and activations, layers that are fixed keeping their bits). Raises BudgetError for
    anything else.
    """

    bops: Amount | None = None
    size: Amount | None = None
    macs: Amount | None = None

    def __post_init__(self) -> None:
        if not self.amounts:
            raise BudgetError("Budget: give at least one of bops, size, macs, for example Budget(bops='w4a4')")
        for name, amount in self.amounts.items():
            _parse(name, amount)

    @property
    def amounts(self) -> dict[str, Amount]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "w3a3" (meaning bops), or "bops=w4a4,size=20%"."""
        parts = [part.partition("=") for part in text.replace(" ", "").split(",") if part]
        values = {name if equals else "bops": value if equals else name for name, equals, value in parts}
        unknown = set(values) - set(MEASURES)
        if unknown:
            raise BudgetError(f"budget: unknown measure {sorted(unknown)[0]!r}; expected one of {', '.join(MEASURES)}")
        if len(values) < len(parts):
            raise BudgetError(f"budget: {text!r} limits one measure twice")
        return cls(**values)

    def limits(
        self, geometry: Geometry, fixed: Mapping[str, LayerBits | None] | None = None, convention: str = "product"
    ) -> dict[str, float]:
        """The limits as numbers: attribute of Cost → limit."""

        def reference(w: int, a: int, keep: Mapping[str, LayerBits | None]) -> Cost:
            return evaluate(geometry, policy_choices(geometry, Policy.uniform(geometry, w, a, keep)), CONVENTIONS[convention])

        limits = {}
        for name, amount in self.amounts.items():
            kind, value = _parse(name, amount)
            attribute = MEASURES[name]
            if kind == "uniform":
                assert isinstance(value, tuple)
                limits[attribute] = float(getattr(reference(*value, keep=fixed or {}), attribute))
            elif kind == "share":
                assert isinstance(value, float)
                limits[attribute] = value * float(getattr(reference(32, 32, keep={}), attribute))
            else:
                assert isinstance(value, float)
                limits[attribute] = value
        return limits


def _parse(name: str, amount: Amount) -> tuple[str, float | tuple[int, int]]:
    """("absolute", number), ("share", fraction) or ("uniform", (w, a))."""
    problem = BudgetError(
        f"Budget: {name}={amount!r} is not a budget; expected a number like 1.5e9, a share like '2%', or a network like 'w4a4'"
    )
    if isinstance(amount, bool) or not isinstance(amount, int | float | str):
        raise problem
    if isinstance(amount, str):
        text = amount.strip()
        uniform = _UNIFORM.fullmatch(text)
        if uniform:
            w, a = int(uniform[1]), int(uniform[2])
            try:
                check_bits("w", w), check_bits("a", a)
            except SpaceError as error:
                raise BudgetError(f"Budget: {name}={amount!r}: {error}") from None
            if PRUNED in (w, a):
                raise BudgetError(f"Budget: {name}={amount!r} is a network without weights or activations; give a w and an a above 0")
            return "uniform", (w, a)
        number = _NUMBER.fullmatch(text.removesuffix("%").strip())
        try:
            value = float(number[1]) if number else -1.0
        except ValueError:
            raise problem from None
        if number is None or value <= 0 or (number[3] and name != "size") or (text.endswith("%") and (number[2] or number[3])):
            raise problem
        if text.endswith("%"):
            return "share", value / 100
        return "absolute", value * _SCALE[number[2].lower()] * (8 if number[3] else 1)
    if not 0 < amount < float("inf"):
        raise problem
    return "absolute", float(amount)
