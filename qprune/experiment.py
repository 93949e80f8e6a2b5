"""One seed of a search run: float training, search, conversion, fine-tuning, and the uniform baseline, each measured the same way."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qprune.budget import Budget
from qprune.checkpoint import save
from qprune.cost import cost as cost_of
from qprune.errors import CheckpointError
from qprune.measured import Network, described
from qprune.nn.codebook import CodebookRefresh, codebook_layers
from qprune.options import RunOptions
from qprune.policy import Policy
from qprune.precision import AMP, Contiguous, compiled, device_of, switched, synchronised
from qprune.ranks import ALONE, Ranks
from qprune.recipes import Recipe, recipe_for
from qprune.resume.checkpoints import Checkpoints
from qprune.resume.failures import explained
from qprune.resume.phase import METRICS, Phase
from qprune.resume.randomness import differ, seed_all
from qprune.search.alternate import alternate
from qprune.search.driver import METHODS, Search
from qprune.search.method import StepResult
from qprune.search.zur import Zur
from qprune.tasks.damage import damage_of
from qprune.tasks.sources import network_of
from qprune.tasks.task import Batches, Part, Task
from qprune.tasks.train import Trainer
from qprune.tasks.train import evaluate as accuracy_on
from qprune.usage import Meter

CALIBRATION_BATCHES = 4
MEASURED = 256
"""Images of a batch without gradients."""
ARCH_PARTS = 4
"""Of the data that logits learn from, one per outer epoch in turn, as Zur et al. (1904.09872)."""


class Watcher(Protocol):
    """Is told how a run goes; the command line draws progress bars from it."""

    def phase(self, name: str, seed: int, steps: int, done: int = 0) -> None:
        """A phase of so many steps begins, or goes on behind those that are done."""

    def step(self, values: Mapping[str, float]) -> None:
        """One step is done."""

    def epoch(self, values: Mapping[str, Any]) -> None:
        """One epoch is done."""


class Experiment:
    """The phases of one seed, in the folder where its results go, on the options' device.

    recipe       None: that of the options' method
    checkpoints  where phases leave their state, and find it if they were run before; None: nowhere
    ranks        that compute it together: all call `run`, rank 0 writes
    meter        what the phases took
    restored     the phases that were over before, and are not run again
    """

    def __init__(
        self, options: RunOptions, task: Task, seed: int, folder: Path, watcher: Watcher, recipe: Recipe | None = None,
        checkpoints: Checkpoints | None = None, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.checkpoints, self.ranks = checkpoints, ranks
        self.restored: set[str] = set()
        self.device = device_of(options.device)
        self.options, self.task, self.seed, self.folder, self.watcher = options, task.to(self.device), seed, folder, watcher
        self.damage = damage_of(task)
        if checkpoints is not None:
            checkpoints.damage = self.damage
        self.example = self.task.example()
        self.meter = Meter()
        self.generator = torch.Generator().manual_seed(seed)
        self.recipe = recipe_for(options, self.example) if recipe is None else recipe

    def run(self) -> dict[str, Any]:
        """All phases, or those that are left. Writes policy.json and model.safetensors; returns this seed's entry of result.json.

        What is no phase (making a network searchable, converting) is cheap and always done again, from the same numbers. Raises
        NonFiniteError and OutOfMemoryError as qprune.resume.failures tells, Stopped if the checkpoints were asked to stop.
        """
        with switched(self.options):
            return self._run()

    def _run(self) -> dict[str, Any]:
        options = self.options
        net = self.network()
        self.recipe.check(net)
        self.train("float", net, options.float_epochs, options.lr)
        search, policy, searched = self.searched(net)
        self.limits = search.limits

        label, uniform = self.recipe.uniform(net, search, self.batches())
        self.train("uniform", uniform, options.search_epochs + options.finetune_epochs, options.finetune_lr)

        self.ranks.from_main(save, searched, self.folder / "model.safetensors")
        networks = {
            "float": self.measure("float", net),
            "searched": self.measure("searched", searched),
            "uniform": self.measure(label, uniform),
        }
        damaged = self.damaged_images()
        seconds = {phase: usage.seconds for phase, usage in self.meter.phases.items()}
        return {
            "seed": self.seed,
            "networks": {name: asdict(network) for name, network in networks.items()},
            "seconds": {**seconds, "float_epoch": seconds["float"] / options.float_epochs if options.float_epochs else None},
            "policy": json.loads(policy.to_json())["layers"],
            "input_bits": {row.name: float(row.a_bits) for row in cost_of(policy, convention=options.convention).rows},
            "search_history": search.history,
            "damaged_images": damaged,
        }

    def network(self) -> nn.Module:
        """A new network, random by the seed, which everything random is set to; or with the weights of the options."""
        seed_all(self.seed)
        net = network_of(self.options, self.task).to(self.device)
        if not self.options.channels_last:
            net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        differ(self.seed, self.ranks.rank)
        return net

    def damaged_images(self) -> dict[str, Any]:
        """What images could not be read on any rank. The next seed counts its own: it may be another process that runs it."""
        self.damage.join(self.ranks.gathered(self.damage.state_dict()))
        found = self.damage.summary()
        self.damage.forget()
        return found

    def searched(self, net: nn.Module) -> tuple[Search, Policy, nn.Module]:
        """Search from the float network, which does not change, and fine-tune what comes out. Writes policy.json."""
        search = self._search(net)
        path = self.folder / "policy.json"
        known = self.ranks.from_main(lambda: path.read_text() if "search" in self.restored and path.exists() else None)
        if known is not None:
            policy = Policy.from_json(known)
        else:
            policy = search.policy()
            self.ranks.agree("policy", policy.to_json())
            self.ranks.from_main(policy.save, path)
        final = self.recipe.finish(search, policy, self.batches())
        self.train("finetune", final, self.options.finetune_epochs, self.options.finetune_lr)
        return search, policy, final

    def batches(self) -> list[Tensor]:
        """A few training inputs, to set ranges from."""
        return [x for x, _ in itertools.islice(self._loader("train", ALONE), CALIBRATION_BATCHES)]

    def _loader(self, part: str | Part, ranks: Ranks | None = None) -> Batches:
        """Of training data, shuffled and augmented, in the layout of the options. ranks: who share the batches, None: those of the run."""
        loader = self.task.loader(part, self.options.batch_size, self.generator, shard=(ranks or self.ranks).shard)
        return loader if self.options.channels_last else Contiguous(loader)

    def _plain(self, part: str) -> Batches:
        """Every image of a part, to measure."""
        return self.task.loader(part, max(MEASURED, self.ranks.count), shard=self.ranks.shard)

    def accuracy(self, net: nn.Module, part: str) -> float:
        """Share of correct answers, in 0 … 1, on "val" or "test"."""
        return accuracy_on(net, self._plain(part), channels_last=self.options.channels_last, ranks=self.ranks)[1]

    def _search(self, net: nn.Module) -> Search:
        options, method = self.options, METHODS[self.options.method]
        mixed = self.recipe.prepare(net, self.batches())
        weight_part, arch_part = self.task.train_halves(self.seed) if method.two_streams else (self.task.train, None)
        loader = self._loader(weight_part)
        chosen = {"seed": self.seed} if "seed" in method.options() else {}
        # the outer loop begins its stages anew in every epoch, at the same rate
        steps = options.search_epochs * len(loader) if options.loop == "steps" else None
        search = Search(
            mixed, Budget.parse(options.budget), options.method,
            steps=steps, weight_lr=options.search_lr, arch_lr=options.arch_lr, convention=options.convention,
            autocast=AMP[options.amp], cuda_graph=options.cuda_graph, accumulate=options.accumulate, **{**chosen, **options.of_search()},
        )  # fmt: skip
        phase = self._phase("search", mixed, search, needed=True)
        if phase.ended:
            return search
        search.share(self.ranks)

        def on_step(result: StepResult) -> None:
            self.watcher.step({"loss": result.loss, "cost": result.cost_ratio})
            phase.step()

        def on_epoch(values: dict[str, Any]) -> None:
            self.ranks.synchronise(mixed)
            with search.method.chosen():
                values["val_accuracy"] = self.accuracy(mixed, "val")
            self._record(phase, values)

        with self._running(phase):
            self._loop(phase, search, loader, arch_part, on_step, on_epoch)
        return search

    def _loop(
        self,
        phase: Phase,
        search: Search,
        loader: Batches,
        arch_part: Part | None,
        on_step: Callable[[StepResult], None],
        on_epoch: Callable[[dict[str, Any]], None],
    ) -> None:
        epochs = self.options.search_epochs
        if self.options.loop == "steps":
            arch_loader = None if arch_part is None else self._loader(arch_part)
            self._watch(phase, epochs * len(loader))
            search.fit(loader, arch_loader, epochs - len(search.history), on_step=on_step, on_epoch=on_epoch, passes=phase)
            return
        assert arch_part is not None and isinstance(search.method, Zur)
        parts = arch_part.divided([1 / ARCH_PARTS] * ARCH_PARTS, self.seed)
        arch_loaders = [self._loader(part) for part in parts]
        steps = sum(len(arch_loaders[epoch % ARCH_PARTS]) for epoch in range(epochs))
        self._watch(phase, steps + epochs * len(search.method.stages.epochs) * len(loader))
        alternate(search, loader, arch_loaders, epochs, on_step=on_step, on_epoch=on_epoch, passes=phase)

    def train(self, name: str, net: nn.Module, epochs: int, lr: float) -> None:
        """Train a network in place, on all of the training data; shared weights follow theirs."""
        loader = self._loader("train")
        options = self.options
        trainer = Trainer(net, epochs, lr=lr, autocast=AMP[options.amp], channels_last=options.channels_last, accumulate=options.accumulate)
        phase = self._phase(name, net, trainer)
        if phase.ended:
            return
        trainer.share(self.ranks)
        self._watch(phase, epochs * len(loader))
        refresh = CodebookRefresh(net, len(loader)) if any(codebook_layers(net)) else None

        def on_step(step: int, total: int, loss: float) -> None:
            if refresh is not None:
                refresh.progress(step, total, loss)
            self.watcher.step({"loss": loss})
            phase.step()

        def on_epoch(values: dict[str, float], trainer: Trainer) -> None:
            if refresh is not None:
                refresh.on_epoch()
            self._record(phase, values)

        with self._running(phase):
            trainer.fit(loader, val_loader=self._plain("val"), progress=on_step, on_epoch=on_epoch, passes=phase)

    def _phase(self, name: str, net: nn.Module, loop: Trainer | Search, needed: bool = False) -> Phase:
        phase = Phase(name, net, loop, self.generator, self.meter, self.folder, self.checkpoints, needed)
        if phase.ended:
            self.restored.add(name)
        return phase

    def _watch(self, phase: Phase, steps: int) -> None:
        if phase.done:
            self.watcher.phase(phase.name, self.seed, steps, phase.done)
        else:
            self.watcher.phase(phase.name, self.seed, steps)

    @contextmanager
    def _running(self, phase: Phase) -> Iterator[None]:
        """The training loop of a phase is compiled if asked for, measured, and its errors say what to do."""
        fast = self.options.compile and not (phase.name == "search" and self.options.method == "slimmable")
        together = synchronised(phase.model, self.options.sync_bn and not self.ranks.alone)
        with explained(phase, self.options, self.seed), self.meter.phase(phase.name, phase.earlier), together, compiled(phase.model, fast):
            yield
        phase.end(self.meter.phases[phase.name])

    def _record(self, phase: Phase, values: Mapping[str, Any]) -> None:
        line = {"phase": phase.name, "seed": self.seed, **{name: v for name, v in values.items() if name != "phase"}}
        self.ranks.from_main(self._append, line, phase)
        phase.epoch()
        self.watcher.epoch(line)

    def _append(self, line: Mapping[str, Any], phase: Phase) -> None:
        path = self.folder / METRICS
        try:
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}{phase.last_good()}") from None

    def measure(self, label: str, net: nn.Module) -> Network:
        accuracies = self.accuracy(net, "test"), self.accuracy(net, "val")
        return described(label, net, self.example, self.options.convention, *accuracies)
