"""The options of a comparison: what the command line sets, and what every process that works on it must agree on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qprune.budget import Budget
from qprune.options import OptionError, RunOptions, plain, without_empty_sources
from qprune.search.driver import METHODS

BASELINES = ("uniform", "uniform-above", "prune-then-quantize")
OTHER_QUANTIZERS = ("sbs", "zur")
"""Methods whose quantizers are not those of the baseline `uniform`: they have a baseline of their own, uniform-<method>."""
ORDERS = ("l1", "gamma")
_CARRIER = "edmips"  # whose candidates and quantizers baselines have
_RUN_SETTINGS = ("w_bits", "a_bits", "pairs", "granularity", "quantizer", "search_lr", "arch_lr")
_PRUNES, _PRUNING_SETTINGS = ("prune-then-quantize",), ("share", "order")


def methods() -> tuple[str, ...]:
    """What can be compared: search methods that choose bits or size, and baselines."""
    searches = [name for name in METHODS if name != "slimmable"]
    return (*searches, *BASELINES, *(f"uniform-{name}" for name in OTHER_QUANTIZERS if name in searches))


@dataclass(frozen=True)
class CompareOptions:
    """Methods and baselines at some budgets, with some seeds.

    data, model      a data set and a network; these, data_dir, data_options and weights as in RunOptions
    budgets          of bit operations, size, or both (see Budget)
    methods          search methods and baselines (see `methods`); "uniform" is what the others are compared with
    seeds, seed      number of seeds, and the first; the data split is the same for all
    float_epochs     of the float network, which all cells of a seed start from
    search_epochs, finetune_epochs  of a search method; baselines train as many epochs in total
    settings         per method: its own options, and w_bits, a_bits, pairs, granularity, quantizer, search_lr, arch_lr
    others           as in RunOptions, for all methods

    seeds, methods and budgets may grow when a comparison is gone on with, at the end of their lists.
    """

    data: str = "digits"
    model: str = "resnet8"
    budgets: tuple[str, ...] = ("w3a3",)
    methods: tuple[str, ...] = ("edmips", "uniform")
    seeds: int = 5
    seed: int = 0
    float_epochs: int = 20
    search_epochs: int = 8
    finetune_epochs: int = 16
    batch_size: int = 64
    lr: float = 0.1
    search_lr: float = 0.02
    finetune_lr: float = 0.03
    arch_lr: float = 0.02
    w_bits: tuple[int, ...] = ()
    a_bits: tuple[int, ...] = ()
    edge_bits: int = 8
    convention: str = "product"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data_dir: str = ""
    data_options: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""

    def __post_init__(self) -> None:
        for name, given in (("budgets", self.budgets), ("methods", self.methods)):
            if not given or len(set(given)) < len(given):
                raise OptionError(f"{name}: expected at least one, every one once, got {', '.join(given) or 'none'}")
        with_settings = [method for method, settings in self.settings.items() if settings]
        for method in (*self.methods, *with_settings):
            if method not in methods():
                raise OptionError(f"methods: {method!r} cannot be compared; expected some of {', '.join(methods())}")
        for method in with_settings:
            if method not in self.methods:
                raise OptionError(f"settings: {method!r} is none of the methods, which are {', '.join(self.methods)}")
        for budget in self.budgets:
            if "macs" in Budget.parse(budget).amounts:
                raise OptionError(f"budgets: {budget!r} limits multiplications, which do not depend on bits; use bops or size")
            for method in self.methods:
                self.run_options(method, budget)
        self._check_pruning()

    def _check_pruning(self) -> None:
        given = self.settings.get("prune-then-quantize", {})
        order, share = given.get("order", "l1"), given.get("share", 0.5)
        if order not in ORDERS:
            raise OptionError(f"prune-then-quantize.order: expected one of {', '.join(ORDERS)}, got {order!r}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise OptionError(f"prune-then-quantize.share: expected a share of the multiplications in (0, 1], got {share!r}")

    def run_options(self, method: str, budget: str, **more: Any) -> RunOptions:
        """What a run of the search method has for options, or one with the quantizers of the baseline; `more` goes before settings."""
        searched = method if method in METHODS else method.removeprefix("uniform-")
        carrier = searched if searched in METHODS else _CARRIER
        shared = {f.name for f in dataclasses.fields(RunOptions)} & {f.name for f in dataclasses.fields(self)}
        values: dict[str, Any] = {"device": "cpu"} | {name: getattr(self, name) for name in shared}
        method_options: dict[str, Any] = {}
        for name, value in {**more, **self.settings.get(method, {})}.items():
            if method in _PRUNES and name in _PRUNING_SETTINGS:
                continue
            own = carrier == method and name in METHODS[method].options()
            if own:
                method_options[name] = value
            elif name in _RUN_SETTINGS:
                values[name] = _as_tuple(value)
            else:
                others = METHODS[method].options() if carrier == method else _PRUNING_SETTINGS if method in _PRUNES else ()
                raise OptionError(f"settings: {method} has no option {name!r}; it has {', '.join((*others, *_RUN_SETTINGS))}")
        return RunOptions(**{**values, "method": carrier, "budget": budget, "method_options": method_options})

    def cells(self) -> dict[int, tuple[str, str]]:
        """Number → (budget, method). Numbers stay what they are when budgets or methods are added."""
        pairs = [(i, j) for i in range(len(self.budgets)) for j in range(len(self.methods))]
        return {(i + j) * (i + j + 1) // 2 + j: (self.budgets[i], self.methods[j]) for i, j in pairs}  # Cantor's numbering

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        values = {name: plain(value) for name, value in dataclasses.asdict(self).items()}
        return {**without_empty_sources(values), "settings": {method: dict(self.settings.get(method, {})) for method in self.methods}}


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value
