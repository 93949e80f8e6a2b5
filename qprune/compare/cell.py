"""One cell of a comparison: a method at a budget with a seed, from the seed's float network to measured test accuracy."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qprune.budget import MEASURES, Budget
from qprune.checkpoint import save
from qprune.compare.baselines import Pruning, uniform_bits
from qprune.compare.options import CompareOptions
from qprune.compare.stored import RESULT, read_cell
from qprune.conventions import CONVENTIONS
from qprune.cost import evaluate, policy_choices
from qprune.errors import QPruneError
from qprune.experiment import Experiment
from qprune.files import write_atomically
from qprune.measured import Network
from qprune.options import RunOptions
from qprune.policy import Policy
from qprune.recipes import BitRecipe, recipe_for
from qprune.search.driver import METHODS
from qprune.study.floats import trained_once
from qprune.tasks.sources import network_of, task_of
from qprune.tasks.train import fit

_STREAM = 1_000_003  # batches after the float network's training: the same for all cells of a seed


class Silent:
    """A watcher of Experiment that shows nothing."""

    def phase(self, name: str, seed: int, steps: int, done: int = 0) -> None: ...
    def step(self, values: Mapping[str, float]) -> None: ...
    def epoch(self, values: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Target:
    """What a budget asks for.

    limits  attribute of Cost → limit
    bits    (w, a) of the costliest uniform network within them
    size    of that network's weights, in bits
    """

    limits: Mapping[str, float]
    bits: tuple[int, int]
    size: float


class Comparison:
    """What the cells of one process share: data, options, folder, and the targets of the budgets."""

    def __init__(self, options: CompareOptions, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.task = task_of(options)
        self.example = self.task.example()
        self.cells = options.cells()
        self.targets = {budget: self._target(budget) for budget in options.budgets}

    def _target(self, budget: str) -> Target:
        recipe = self._baseline("uniform", budget)
        outline = recipe.outline(self._network())
        assert outline.geometry is not None
        limits = Budget.parse(budget).limits(outline.geometry, outline.fixed, self.options.convention)
        bits = uniform_bits(outline.geometry, outline.fixed, limits, self.options.convention)
        uniform = Policy.uniform(outline.geometry, *bits, outline.fixed)
        size = float(evaluate(outline.geometry, policy_choices(outline.geometry, uniform), CONVENTIONS["product"]).size_bits)
        return Target(limits, bits, size)

    def check(self) -> None:
        """Raise for the first method that cannot keep a budget, or that cannot be applied to the network."""
        torch.manual_seed(self.options.seed)
        net = self._network()
        for budget, method in self.cells.values():
            try:
                if method in METHODS:
                    recipe_for(self.run_options(method, budget), self.example).check(net)
                elif method == "prune-then-quantize":
                    self._pruning(budget).prune(net)
            except QPruneError as error:
                error.args = (f"{method} at {budget}: {error}", *error.args[1:])
                raise

    def warm_up(self) -> None:
        """Train for a step, so that what a process does only once (imports, loading kernels) is not measured with its first cell."""
        with torch.random.fork_rng():
            net = self._network()
            batch = next(iter(self.task.loader("train", self.options.batch_size)))
            quantized = self._baseline("uniform", self.options.budgets[0]).at_bits(net, 3, 3, [batch[0]])
            for model in (net, quantized):
                fit(model, [batch], 1)

    def run_options(self, method: str, budget: str) -> RunOptions:
        """For a search method, with the limits in numbers: a budget like "w3a3" must not mean more where a method leaves layers float. A
        method whose budget can only be a size gets that of the uniform network, whose activation bits its inputs then have too, if the
        budget names none."""
        target = self.targets[budget]
        if method == "annc":
            size = target.limits.get("size_bits", target.size)
            return replace(self.options.run_options(method, budget, a_bits=target.bits[1]), budget=f"size={size!r}")
        names = {attribute: name for name, attribute in MEASURES.items()}
        limits = ",".join(f"{names[attribute]}={limit!r}" for attribute, limit in target.limits.items())
        return replace(self.options.run_options(method, budget), budget=limits)

    def run(self, index: int, seed: int) -> tuple[float, dict[str, Any]]:
        """Fill a cell, unless its folder holds a result. Returns (validation accuracy, result)."""
        budget, method = self.cells[index]
        folder = self.place(budget, method, seed)
        result = read_cell(folder)
        if result is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            result = self._run(budget, method, seed, folder)
            write_atomically(folder / RESULT, json.dumps(result, indent=1).encode())
        return result["val_accuracy"], result

    def place(self, budget: str, method: str, seed: int) -> Path:
        return self.folder / "cells" / re.sub(r"[^A-Za-z0-9.%=,-]", "_", budget) / method / f"seed-{seed}"

    def _run(self, budget: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
        net, digest = self.float_network(seed)
        torch.manual_seed(seed + _STREAM)
        options = self.run_options(method, budget) if method in METHODS else self.options.run_options(method, budget)
        experiment = Experiment(options, self.task, seed, folder, Silent())
        experiment.generator.manual_seed(seed + _STREAM)
        label, final = self._trained(experiment, net, budget, method)
        network = experiment.measure(label, final)
        save(final, folder / "model.safetensors")
        return {
            "budget": budget,
            "method": method,
            "seed": seed,
            **_facts(network, experiment),
            "float_network": digest,
            "host": platform.node(),
            "pid": os.getpid(),
        }

    def _trained(self, experiment: Experiment, net: nn.Module, budget: str, method: str) -> tuple[str, nn.Module]:
        """(label, network), trained for search_epochs + finetune_epochs."""
        options = experiment.options
        if method in METHODS:
            return method, experiment.searched(net)[2]
        if method == "prune-then-quantize":
            pruning = self._pruning(budget)
            with experiment.meter.phase("prune"):
                smaller, kept = pruning.prune(net, experiment.batches())
            experiment.train("retrain", smaller, options.search_epochs, options.finetune_lr)
            w, a = pruning.bits(smaller, pruning.limits(net))
            final = pruning.recipe.at_bits(smaller, w, a, experiment.batches())
            experiment.train("finetune", final, options.finetune_epochs, options.finetune_lr)
            return f"{kept:.0%} of the filters, w{w}a{a}", final
        recipe = self._baseline(method, budget)
        outline = recipe.outline(net)
        assert outline.geometry is not None
        limits, above = self.targets[budget].limits, method == "uniform-above"
        w, a = uniform_bits(outline.geometry, outline.fixed, limits, options.convention, above)
        final = recipe.at_bits(net, w, a, experiment.batches())
        experiment.train("finetune", final, options.search_epochs + options.finetune_epochs, options.finetune_lr)
        return f"w{w}a{a}", final

    def _pruning(self, budget: str) -> Pruning:
        given = self.options.settings.get("prune-then-quantize", {})
        return Pruning(self._baseline("prune-then-quantize", budget), Budget.parse(budget), given.get("order", "l1"), given.get("share"))

    def _baseline(self, method: str, budget: str) -> BitRecipe:
        recipe = recipe_for(self.options.run_options(method, budget), self.example)
        assert isinstance(recipe, BitRecipe)
        return recipe

    def _network(self) -> nn.Module:
        return network_of(self.options, self.task)

    def float_network(self, seed: int) -> tuple[nn.Module, str]:
        """The trained float network of a seed and a digest of its tensors. What it took, and its accuracy, is in float-<seed>.json."""

        def train() -> nn.Module:
            folder = self.folder / "cells" / "float" / f"seed-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            torch.manual_seed(seed)
            net = self._network()
            experiment = Experiment(self.options.run_options("uniform", self.options.budgets[0]), self.task, seed, folder, Silent())
            experiment.train("float", net, self.options.float_epochs, self.options.lr)
            network = experiment.measure("float", net)
            facts = {"seed": seed, "float_epochs": self.options.float_epochs, **_facts(network, experiment)}
            write_atomically(self.folder / f"float-{seed}.json", json.dumps(facts, indent=1).encode())
            return net

        return trained_once(self.folder / f"float-{seed}.safetensors", self._network, train)


def _facts(network: Network, experiment: Experiment) -> dict[str, Any]:
    named = {("test_accuracy" if name == "accuracy" else name): value for name, value in asdict(network).items()}
    index, books = named.pop("index_bits"), named.pop("codebook_bits")
    return {**named, "size": {"values": network.size_bits, "index": index, "codebooks": books}, "usage": experiment.meter.as_dict()}
