"""The options of a study: what the command line sets, and what every process that works on the study must agree on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qprune.conventions import CONVENTIONS
from qprune.options import OptionError, check_sources, plain, without_empty_sources
from qprune.space import SearchSpace

KINDS = ("bits", "widths")


@dataclass(frozen=True)
class StudyOptions:
    """A grid of configurations times seeds.

    kind                 "bits": all shares of one layer's filters between candidate bits; "widths": one width ratio per stage
    data, model, data_dir, data_options, weights   see RunOptions
    layer, pairs, step   bits: the layer, its candidates (weight bits, bits of the activation it produces), how many filters move at once
    others               bits: the pair of all other convolutions
    ratios               widths: the share of filters that a stage may keep
    seeds, seed          number of seeds, and the first
    float_epochs, float_lr   training of the float network, once per seed
    epochs, lr, batch_size   training of every configuration, from that float network
    weight_quantizer, input_quantizer   see SearchSpace
    convention           bits: how bit operations are counted (see qprune.cost); widths count multiplications
    threshold            the ratio of deviations, between configurations over between seeds, that the closing sentence is about
    """

    kind: str = "bits"
    data: str = "digits"
    model: str = "resnet8"
    layer: str = "conv1"
    pairs: tuple[tuple[int, int], ...] = ((2, 2), (3, 3), (4, 4))
    step: int = 2
    others: tuple[int, int] = (3, 3)
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    seeds: int = 5
    seed: int = 0
    float_epochs: int = 20
    float_lr: float = 0.1
    epochs: int = 5
    lr: float = 0.03
    batch_size: int = 64
    weight_quantizer: str = "nice"
    input_quantizer: str = "nice"
    convention: str = "zur"
    threshold: float = 1.0
    data_dir: str = ""
    data_options: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""

    def __post_init__(self) -> None:
        check_sources(self)
        for name, known in (("kind", KINDS), ("convention", tuple(CONVENTIONS))):
            if getattr(self, name) not in known:
                raise OptionError(f"{name}: {getattr(self, name)!r} is unknown; expected one of {', '.join(known)}")
        for name in ("step", "seeds", "float_epochs", "epochs", "batch_size", "float_lr", "lr", "threshold"):
            if not getattr(self, name) > 0 and not (name == "float_epochs" and self.float_epochs == 0 and self.weights):
                raise OptionError(f"{name} must be positive, got {getattr(self, name)}")
        if self.kind == "bits":
            if len(self.pairs) < 2:
                raise OptionError(f"pairs: a study compares at least two candidates, got {self.pairs}")
            self.space()
        if self.kind == "widths" and (len(set(self.ratios)) < 2 or not all(0 < r <= 1 for r in self.ratios)):
            raise OptionError(f"ratios: expected at least two different ones in (0, 1], got {self.ratios}")

    def space(self) -> SearchSpace:
        """The quantizers, with all pairs as candidates. Raises SpaceError for bits that cannot be."""
        pairs = tuple(dict.fromkeys((*self.pairs, self.others)))
        return SearchSpace(
            pairs=pairs, granularity="filter", placement="output",
            weight_quantizer=self.weight_quantizer, input_quantizer=self.input_quantizer,
        )  # fmt: skip

    def quick(self) -> StudyOptions:
        """The same study in a minute or two: two seeds, two epochs, a coarse grid. What it finds means little."""
        coarse = tuple(sorted({self.ratios[0], self.ratios[-1]}))
        return dataclasses.replace(self, seeds=min(self.seeds, 2), float_epochs=8, epochs=2, step=2 * self.step, ratios=coarse)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them; only those that matter for this kind."""
        unused = {"bits": ("ratios",), "widths": ("layer", "pairs", "step", "others", "weight_quantizer", "input_quantizer", "convention")}
        values = {name: plain(value) for name, value in dataclasses.asdict(self).items() if name not in unused[self.kind]}
        return without_empty_sources(values)
