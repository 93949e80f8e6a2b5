"""The queue of a study on SQLite: nothing is lost when workers die, and nothing is done twice."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from qprune.errors import StudyError
from qprune.study.queue import Point
from qprune.study.storage import check_sqlite, shown
from tests.study_cases import POINTS, claimed_together, drain, killed_and_taken_up, opened, succeed


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def test_a_killed_worker_s_trial_is_taken_up(storage: str, tmp_path: Path) -> None:
    killed_and_taken_up(storage, tmp_path / "log")


def test_a_trial_whose_worker_died_before_its_first_heartbeat_is_given_up(storage: str) -> None:
    queue = opened(storage)
    queue.fill()
    claimed = queue.study.get_trials()[0]
    queue.database.set_trial_state_values(claimed._trial_id, queue.optuna.trial.TrialState.RUNNING)
    queue.repair()
    assert (queue.progress().running, queue.progress().waiting) == (1, len(POINTS) - 1)
    deadline = time.monotonic() + 30
    while queue.progress().running and time.monotonic() < deadline:
        time.sleep(0.2)
        queue.repair()
    assert (queue.progress().running, queue.progress().waiting) == (0, len(POINTS))
    queue.close()


def test_a_trial_is_claimed_once(storage: str) -> None:
    claimed_together(storage)


def test_sqlite_transactions_lock_before_they_read(storage: str) -> None:
    first, second = opened(storage), opened(storage)
    with first.database.engine.begin() as reading, second.database.engine.connect() as connection:
        reading.exec_driver_sql("SELECT count(*) FROM trials").scalar()
        connection.rollback()
        raw = connection.connection.driver_connection
        assert isinstance(raw, sqlite3.Connection)
        raw.execute("PRAGMA busy_timeout = 50")
        with pytest.raises(OperationalError, match="locked"):
            connection.begin()
    first.close()
    second.close()


def test_a_point_that_was_queued_twice_is_done_once(storage: str) -> None:
    queue = opened(storage)
    queue.fill()
    for policy, seed in POINTS[:3]:
        queue.study.enqueue_trial({"policy": policy, "seed": seed})
    ran: list[Point] = []

    def note(point: Point) -> tuple[float, Mapping[str, Any]]:
        ran.append(point)
        return succeed(point)

    while queue.work(note):
        pass
    assert sorted(ran) == POINTS
    assert queue.progress().done == len(POINTS) and queue.progress().left == 0
    queue.close()


def test_a_worker_that_was_given_up_records_nothing(storage: str) -> None:
    queue, other = opened(storage, points=[(0, 0)]), opened(storage, points=[(0, 0)])
    queue.fill()

    def overtaken(point: Point) -> tuple[float, Mapping[str, Any]]:
        trial = other.study.get_trials()[0]
        other.database.set_trial_state_values(trial._trial_id, other.optuna.trial.TrialState.FAIL)
        other.fill()
        assert other.work(lambda point: (0.9, {"by": "other"}))
        return 0.1, {"by": "the one given up"}

    assert queue.work(overtaken)
    assert [trial.result for trial in queue.finished()] == [{"by": "other"}]
    assert not queue.work(succeed)
    queue.close()
    other.close()


def test_an_error_is_kept_and_tried_again_on_request(storage: str) -> None:
    queue = opened(storage)
    queue.fill()

    def diverge(point: Point) -> tuple[float, Mapping[str, Any]]:
        if point == (2, 4):
            raise ArithmeticError("loss is nan\nat step 3")
        return succeed(point)

    while queue.work(diverge):
        pass
    progress = queue.progress()
    assert (progress.done, progress.failed, progress.left) == (len(POINTS) - 1, 1, 0)
    assert queue.errors() == {(2, 4): "ArithmeticError: loss is nan at step 3"}
    queue.repair()
    assert queue.progress().waiting == 0
    queue.fill(retry_failed=True)
    assert queue.progress().waiting == 1
    drain(queue)
    assert queue.progress().done == len(POINTS) and queue.errors() == {}
    queue.close()


def test_an_interrupted_trial_waits_again(storage: str) -> None:
    queue = opened(storage)
    queue.fill()

    def interrupted(point: Point) -> tuple[float, Mapping[str, Any]]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.work(interrupted)
    progress = queue.progress()
    assert (progress.waiting, progress.running, progress.failed) == (len(POINTS), 0, 0)
    queue.close()


def test_progress_counts(storage: str) -> None:
    queue = opened(storage)
    assert queue.progress().left == len(POINTS) and not queue.work(succeed)
    queue.fill()
    queue.fill()
    assert queue.progress().waiting == len(POINTS)
    counts = []

    def look(point: Point) -> tuple[float, Mapping[str, Any]]:
        counts.append((queue.progress().done, queue.progress().running, queue.progress().waiting))
        return succeed(point)

    assert queue.work(look) and queue.work(look)
    assert counts == [(0, 1, 9), (1, 1, 8)]
    assert len(queue.progress().seconds) == 2
    queue.close()


def test_another_options_are_refused(storage: str) -> None:
    opened(storage, epochs=2, lr=0.1).close()
    with pytest.raises(StudyError, match=r"was begun with lr=0.1, not 0.2; give the same options"):
        opened(storage, epochs=2, lr=0.2)
    opened(storage, "another name", epochs=2, lr=0.2).close()


def test_seeds_may_be_added(storage: str) -> None:
    queue = opened(storage, points=POINTS, seeds=2)
    queue.fill()
    drain(queue)
    queue.close()
    points = [(policy, seed) for policy in range(5) for seed in (3, 4, 5)]
    queue = opened(storage, points=points, seeds=3)
    assert queue.progress().left == 5
    queue.fill()
    drain(queue)
    assert [trial.point for trial in queue.finished()] == points
    queue.close()
    with pytest.raises(StudyError, match=r"was begun with seeds=3, not 2"):
        opened(storage, seeds=2)


def test_a_foreign_study_is_refused(storage: str) -> None:
    queue = opened(storage)
    foreign = queue.optuna.create_study(storage=queue.database, study_name="theirs")
    foreign.enqueue_trial({"x": 1.0})
    with pytest.raises(StudyError, match="'theirs' was not made by qprune"):
        opened(storage, "theirs")
    queue.close()


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    check_sqlite(path)
    path.write_bytes(b"no database at all, but long enough to be read as one" * 20)
    with pytest.raises(StudyError, match="is not the database of a study, or is damaged"):
        check_sqlite(path)
    with pytest.raises(StudyError, match=r"cannot be used: .*not a database"):
        opened(f"sqlite:///{path}")
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()
    with pytest.raises(StudyError, match=r"the database of something else \(it has tables songs\)"):
        check_sqlite(path)


def test_an_unreachable_server() -> None:
    with pytest.raises(StudyError, match=r"postgresql://me@127.0.0.1:1/none cannot be used: .*refused") as caught:
        opened("postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)


def test_a_password_is_not_shown() -> None:
    assert shown("postgresql://me:p@ss:w@host:5432/db") == "postgresql://me@host:5432/db"
    assert shown("sqlite:////tmp/study.db") == "sqlite:////tmp/study.db"


def test_optuna_is_missed_by_name(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(StudyError, match=r"a study needs optuna .*pip install 'qprune\[study\]'"):
        opened(storage)
