"""The options of a run: what the command line sets, and what the run folder records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qprune.budget import Budget
from qprune.conventions import CONVENTIONS
from qprune.errors import QPruneError
from qprune.precision import AMP, is_device
from qprune.search.driver import METHODS
from qprune.space import SearchSpace
from qprune.tasks import data, models
from qprune.tasks.sources import Sources


class OptionError(QPruneError, ValueError):
    """An option of a run with a value that cannot be."""


@dataclass(frozen=True)
class RunOptions:
    """A search run from float training to the report.

    data, model         a data set and a network of qprune.tasks, or module:function (see qprune.tasks.own); for networks also
                        torchvision:name and timm:name
    data_dir            the folder with the data's files, where there are any
    data_options        further arguments of the data's function, by name
    weights             a file with the network's weights, which float training then begins with
    budget              "w3a3", "2%", "bops=w4a4,size=20%" (see Budget)
    method              a search method
    w_bits, a_bits      candidates of every layer but the first and the last; () for the method's own (`Method.default_bits`)
    pairs               joint candidates (w, a) instead
    granularity         choice of weight bits per "layer" or per "filter"; "" for the method's own
    edge_bits           weight and input bits of the first and the last layer, which are not searched
    float_epochs        training of the float network; 0, with weights: none
    search_epochs       search, from the float network
    finetune_epochs     training of the searched network; the uniform one gets search_epochs + finetune_epochs
    batch_size, lr, finetune_lr, search_lr, arch_lr
    seed, seeds         first seed and number of repetitions; the data split is the same for all
    convention          how bit operations are counted (see qprune.cost)
    quantizer           "nice" or "uniq" for weights and activations of "zur"; "" for the method's own
    loop                "steps": methods with data for the weights and for the logits take one step on each in turn; "epochs": method zur
                        alternates between epochs of logits and of weights, which are quantized in stages
    method_options      further arguments of the method, by name
    deterministic       only algorithms that give the same bits again on one device (see qprune.resume.randomness)
    device              auto (a CUDA GPU if there is one), cpu, cuda or cuda:N
    amp                 "bf16" or "fp16": training computes in this format what torch.autocast lets it; parameters, quantizers and what is
                        measured are float32
    channels_last       layout of images and weights
    compile             training goes through torch.compile (the search of method slimmable, whose shapes change in every step, does not)
    tf32                tensor cores for float32 on CUDA GPUs: True, False, or None for torch's own choice (convolutions only)
    cuda_graph          the search replays its steps as CUDA graphs
    sync_bn             batch normalisations see the batches of all processes (torchrun), on CUDA GPUs; else each its own
    accumulate          parts of a batch that training makes its forward and backward passes with, one after the other, for one update
    """

    data: str = "digits"
    model: str = "resnet8"
    budget: str = "w3a3"
    method: str = "edmips"
    w_bits: tuple[int, ...] = ()
    a_bits: tuple[int, ...] = ()
    granularity: str = ""
    edge_bits: int = 8
    float_epochs: int = 20
    search_epochs: int = 8
    finetune_epochs: int = 16
    batch_size: int = 64
    lr: float = 0.1
    search_lr: float = 0.02
    finetune_lr: float = 0.03
    arch_lr: float = 0.02
    seed: int = 0
    seeds: int = 1
    convention: str = "product"
    pairs: tuple[tuple[int, int], ...] = ()
    quantizer: str = ""
    loop: str = "steps"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    data_dir: str = ""
    data_options: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    deterministic: bool = False
    device: str = "auto"
    amp: str = ""
    channels_last: bool = True
    compile: bool = False
    tf32: bool | None = None
    cuda_graph: bool = False
    sync_bn: bool = False
    accumulate: int = 1

    def __post_init__(self) -> None:
        check_sources(self)
        self._one_of("method", tuple(METHODS))
        self._one_of("convention", tuple(CONVENTIONS))
        for name in ("w_bits", "a_bits"):
            object.__setattr__(self, name, getattr(self, name) or METHODS[self.method].default_bits)
        if self.loop not in ("steps", "epochs"):
            raise OptionError(f"loop: expected steps or epochs, got {self.loop!r}")
        if self.loop == "epochs" and self.method != "zur":
            raise OptionError(f"loop: 'epochs' goes with method zur, got {self.method}")
        known = (*METHODS[self.method].options(), *METHODS[self.method].network_options)
        for name in self.method_options:
            if name not in known:
                raise OptionError(f"method {self.method} has no option {name!r}; it has {', '.join(known) or 'none'}")
        Budget.parse(self.budget)
        self.space()
        SearchSpace.fixed(self.edge_bits, self.edge_bits)
        for name in ("float_epochs", "search_epochs", "batch_size", "seeds", "lr", "search_lr", "finetune_lr", "arch_lr"):
            if not 0 < getattr(self, name) < math.inf and not (name == "float_epochs" and self.float_epochs == 0 and self.weights):
                expected = "finite" if getattr(self, name) == math.inf else "positive"
                raise OptionError(f"{name} must be {expected}, got {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**63 - self.seeds:
            raise OptionError(f"seed: expected a number of 64 bits, got {self.seed}")
        if not is_device(self.device):
            raise OptionError(f"device: expected auto, cpu, cuda or cuda:N, got {self.device!r}")
        self._check_speed()
        if self.finetune_epochs < 0:
            raise OptionError(f"finetune_epochs must not be negative, got {self.finetune_epochs}")

    def _check_speed(self) -> None:
        if self.amp not in AMP:
            raise OptionError(f"amp: expected bf16 or fp16, got {self.amp!r}")
        if self.cuda_graph and self.method not in ("edmips", "darts", "sbs"):
            raise OptionError(f"cuda_graph: the steps of method {self.method} cannot be recorded; leave it out")
        second_order = self.method_options.get("second_order")
        if self.cuda_graph and (second_order or self.compile):
            raise OptionError(f"cuda_graph: does not go with {'second_order' if second_order else 'compile'}; leave out one of them")
        if not 1 <= self.accumulate <= self.batch_size:
            raise OptionError(f"accumulate: expected 1 to {self.batch_size} parts of a batch (batch_size), got {self.accumulate}")
        if self.cuda_graph and self.accumulate > 1:
            raise OptionError("cuda_graph: records a step as a whole and does not go with accumulate; leave out one of them")
        if self.amp == "fp16" and (second_order or self.cuda_graph):
            raise OptionError(f"amp: fp16 does not go with {'second_order' if second_order else 'cuda_graph'}; take bf16")

    def space(self) -> SearchSpace:
        """The candidates of the layers that are searched."""
        if self.method != "zur":
            if self.quantizer:
                raise OptionError(f"quantizer: {self.quantizer!r} goes with method zur; {self.method} has quantizers of its own")
            return SearchSpace(self.w_bits, self.a_bits, granularity=self.granularity or "layer", pairs=self.pairs or None)
        alike = tuple((b, b) for b in self.w_bits if b in self.a_bits)
        if not (self.pairs or alike):
            raise OptionError(
                f"method zur chooses pairs of bits: give pairs, or a number that is in w_bits {self.w_bits} and a_bits {self.a_bits}"
            )
        kind = self.quantizer or "nice"
        finely = self.granularity or "filter"
        return SearchSpace(
            pairs=self.pairs or alike,
            granularity=finely,
            placement="output",
            weight_quantizer=kind,
            input_quantizer=kind,
            **self.of_network(),
        )

    def of_network(self) -> dict[str, Any]:
        """Those of method_options that are about the network's searchable form."""
        return {name: value for name, value in self.method_options.items() if name in METHODS[self.method].network_options}

    def of_search(self) -> dict[str, Any]:
        """The others."""
        return {name: value for name, value in self.method_options.items() if name not in self.of_network()}

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise OptionError(f"{name}: {getattr(self, name)!r} is unknown; expected one of {', '.join(known)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        return {name: plain(value) for name, value in dataclasses.asdict(self).items()}


def check_sources(options: Sources) -> None:
    """Raises OptionError for data and networks that have neither a known name nor the form of one; imports and opens nothing."""
    for name, text in (("data", options.data), ("data_dir", options.data_dir), ("model", options.model), ("weights", options.weights)):
        if not isinstance(text, str):
            raise OptionError(f"{name}: expected a name, got {text!r}")
    if not isinstance(options.data_options, Mapping) or not all(isinstance(key, str) for key in options.data_options):
        raise OptionError(f"data_options: expected names and values, got {options.data_options!r}")
    for name, value, known in (("data", options.data, data), ("model", options.model, models)):
        if not known.is_known(value):
            raise OptionError(f"{name}: {value!r} is unknown; expected one of {', '.join(known.forms())}")


def without_empty_sources(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without data_dir, data_options and weights where they say nothing: folders from before they existed can then be gone on with."""
    return {name: value for name, value in values.items() if value or name not in ("data_dir", "data_options", "weights")}


def plain(value: Any) -> Any:
    """Tuples as lists, as YAML and JSON hold them."""
    return [plain(item) for item in value] if isinstance(value, tuple) else value
