"""The work queue of a study, in a database that any number of processes share: what is done, what is left, and who works on what.

Every (configuration, seed) is a trial of an Optuna study, put there waiting. A worker claims one, sends heartbeats while it runs, and
writes its result. A trial whose heartbeats stop is given up by the others and put back. No point is finished twice:

- Claiming reads a trial's state and changes it in one transaction that locks what it reads (see qprune.study.storage).
- Two trials of one point can come to exist, when two processes fill or repair the queue at once. After its claim a worker looks for the
  point's other trials, and steps back if one is complete, or live with a lower number.
- A worker that was given up (stopped by a debugger, say) and comes back cannot record anything: its trial has ended.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qprune.errors import StudyError
from qprune.plainyaml import read_mapping
from qprune.study.storage import database_errors, open_database, require_optuna, shown, start_clocks

if TYPE_CHECKING:
    import optuna

HEARTBEAT, GRACE = 5, 30  # seconds
_OPTIONS = "qprune options"
Point = tuple[int, int]
"""(index of the configuration in the grid, seed)"""


@dataclass(frozen=True)
class Finished:
    """One completed trial: its result as `run_trial` gave it, and how long it took in seconds."""

    point: Point
    result: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Points by their state. failed: ended with an error and not complete elsewhere; seconds: durations of all completed trials."""

    done: int
    running: int
    waiting: int
    failed: int
    total: int
    seconds: tuple[float, ...]

    @property
    def left(self) -> int:
        return self.total - self.done - self.failed


class Queue:
    """The trials of one study. `points` is the whole grid; `options` must be those that the study was begun with.

    storage           "sqlite:///path" or "postgresql://…"
    heartbeat, grace  seconds between signs of life, and without one until a trial is given up
    growing           options that may grow (see check_options)

    Raises StudyError for a database that cannot be used: missing server, damaged or foreign file, other options.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        points: list[Point],
        options: Mapping[str, Any],
        heartbeat: int = HEARTBEAT,
        grace: int = GRACE,
        growing: Sequence[str] = ("seeds",),
    ) -> None:
        self.optuna, self.storage, self.points, self.known = require_optuna(), storage, points, set(points)
        with database_errors(self.optuna, storage):
            self.database = open_database(storage, heartbeat, grace, self._put_back)
            space = {"policy": sorted({p for p, _ in points}), "seed": sorted({s for _, s in points})}
            sampler = self.optuna.samplers.GridSampler(space, seed=0)
            self.study: optuna.Study = self.optuna.create_study(
                storage=self.database, sampler=sampler, study_name=name, direction="maximize", load_if_exists=True
            )
            stored = self.study.user_attrs.get(_OPTIONS)
            if stored is None:
                if self.study.get_trials(deepcopy=False):
                    raise StudyError(f"{shown(storage)}: the study {name!r} was not made by qprune; choose another name")
                stored = {}
            else:
                check_options(stored, options, f"the study {name!r} in {shown(storage)}", growing)
            if stored != dict(options):
                self.study.set_user_attr(_OPTIONS, dict(options))

    def fill(self, retry_failed: bool = False) -> None:
        """Put every point into the queue that is not there, complete or being worked on; those that failed too, if asked."""
        states = self.optuna.trial.TrialState
        with database_errors(self.optuna, self.storage):
            trials = self._trials()
            there = {point for point, trial in trials if trial.state in (states.WAITING, states.RUNNING, states.COMPLETE)}
            if not retry_failed:
                there |= {point for point, trial in trials if "error" in trial.user_attrs}
            for point in self.points:
                if point not in there:
                    self.study.enqueue_trial({"policy": point[0], "seed": point[1]})

    def work(self, run: Callable[[Point], tuple[float, Mapping[str, Any]]]) -> bool:
        """Claim one waiting trial and run it; False if none is waiting. `run` returns (value to record, JSON result). An error that it
        raises is stored with the trial, which then counts as failed; KeyboardInterrupt ends the trial, puts it back and goes on up."""
        with database_errors(self.optuna, self.storage):
            if not self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.WAITING,)):
                return False
            try:
                self.study.optimize(lambda trial: self._objective(trial, run), n_trials=1, catch=(Exception,))
            except (self.optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
                if isinstance(error, ValueError) and "Cannot tell" not in str(error):
                    raise
                _log().warning("qprune: a trial was given up by others while it ran; its result is not recorded")
            except KeyboardInterrupt:
                self.fill()
                raise
        return True

    def repair(self) -> None:
        """Give up trials without signs of life and put their points back."""
        with database_errors(self.optuna, self.storage), warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            running = self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,))
            start_clocks(self.database, [trial._trial_id for trial in running])
            self.optuna.storages.fail_stale_trials(self.study)
            self.fill()

    def progress(self) -> Progress:
        states = self.optuna.trial.TrialState
        with database_errors(self.optuna, self.storage):
            trials = self._trials()
        by_state = {state: {point for point, trial in trials if trial.state == state} for state in states}
        done = by_state[states.COMPLETE]
        live = by_state[states.RUNNING] | by_state[states.WAITING]
        failed = {point for point, trial in trials if "error" in trial.user_attrs} - done - live
        seconds = tuple(finished.seconds for finished in self.finished(trials))
        return Progress(
            len(done), len(by_state[states.RUNNING] - done), len(by_state[states.WAITING] - done - by_state[states.RUNNING]), len(failed),
            len(self.points), seconds,
        )  # fmt: skip

    def finished(self, trials: list[tuple[Point, Any]] | None = None) -> list[Finished]:
        """Completed trials, in the order of the grid."""
        with database_errors(self.optuna, self.storage):
            trials = self._trials() if trials is None else trials
            complete = [(point, trial) for point, trial in trials if trial.state == self.optuna.trial.TrialState.COMPLETE]
            return [
                Finished(point, dict(trial.user_attrs["result"]), trial.duration.total_seconds())
                for point, trial in sorted(complete, key=_first)
            ]

    def errors(self) -> dict[Point, str]:
        """The points that failed, and why."""
        with database_errors(self.optuna, self.storage):
            trials = self._trials()
        done = {point for point, trial in trials if trial.state == self.optuna.trial.TrialState.COMPLETE}
        return {point: str(trial.user_attrs["error"]) for point, trial in trials if "error" in trial.user_attrs and point not in done}

    def close(self) -> None:
        self.database.remove_session()
        self.database.engine.dispose()

    def _objective(self, trial: optuna.Trial, run: Callable[[Point], tuple[float, Mapping[str, Any]]]) -> float:
        policies, seeds = [p for p, _ in self.points], [s for _, s in self.points]
        point = (trial.suggest_int("policy", min(policies), max(policies)), trial.suggest_int("seed", min(seeds), max(seeds)))
        if point not in self.known or self._taken(point, trial.number):
            raise self.optuna.TrialPruned("another trial does this point")
        try:
            value, result = run(point)
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000])
            raise
        trial.set_user_attr("result", dict(result))
        return value

    def _taken(self, point: Point, number: int) -> bool:
        states = self.optuna.trial.TrialState
        others = [trial for other, trial in self._trials() if other == point and trial.number != number]
        live = (states.RUNNING, states.WAITING)
        return any(trial.state == states.COMPLETE or (trial.state in live and trial.number < number) for trial in others)

    def _trials(self) -> list[tuple[Point, Any]]:
        """Every trial with its point, which is known before it runs."""
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            parameters = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            if {"policy", "seed"} <= parameters.keys():
                point = int(parameters["policy"]), int(parameters["seed"])
                if point in self.known:
                    found.append((point, trial))
        return found

    def _put_back(self, study: optuna.Study, trial: Any) -> None:
        point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if {"policy", "seed"} <= point.keys():
            study.enqueue_trial({"policy": point["policy"], "seed": point["seed"]})


def check_options(stored: Any, options: Mapping[str, Any], where: str, growing: Sequence[str] = ("seeds",)) -> None:
    """Raise StudyError, naming the first difference, unless the stored options are these, or these with less of what is `growing`: a lower
    number, fewer items at the end of a list, fewer entries."""
    if not isinstance(stored, Mapping):
        raise StudyError(f"{where} holds no options; it was not made by qprune, or is damaged")
    for name in {**stored, **options}:
        old, new = stored.get(name), options.get(name)
        if old != new and not (name in growing and _grown(old, new)):
            raise StudyError(
                f"{where} was begun with {name}={old}, not {new}; give the same options to go on (more {', '.join(growing)} are "
                "possible), or another folder and name for a new study"
            )


def check_stored(path: Path, options: Mapping[str, Any], growing: Sequence[str] = ("seeds",)) -> Mapping[str, Any]:
    """`check_options` of the file that a folder's work began with, and what it holds. Raises StudyError for a damaged one, too."""
    try:
        stored = read_mapping(path)
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is damaged ({' '.join(str(error).split())}); restore it, or choose another folder") from None
    check_options(stored, options, str(path.parent), growing)
    return stored


def _grown(old: Any, new: Any) -> bool:
    if isinstance(old, int) and isinstance(new, int):
        return new > old
    if isinstance(old, list) and isinstance(new, list):
        return new[: len(old)] == old
    return isinstance(old, Mapping) and isinstance(new, Mapping) and all(name in new and new[name] == value for name, value in old.items())


def _first(item: tuple[Point, Any]) -> Point:
    return item[0]


def _log() -> logging.Logger:
    return logging.getLogger("qprune")
