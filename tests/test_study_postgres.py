"""The queue of a study on a PostgreSQL server of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.databases import missing, postgres_server
from tests.study_cases import POINTS, claimed_together, drain, killed_and_taken_up, opened

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    if missing():
        pytest.skip(missing())
    with postgres_server() as url:
        yield url


def test_a_killed_worker_s_trial_is_taken_up(postgres: str, tmp_path: Path) -> None:
    killed_and_taken_up(postgres, tmp_path / "log")


def test_a_trial_is_claimed_once(postgres: str) -> None:
    claimed_together(postgres)


def test_two_studies_in_one_database(postgres: str) -> None:
    first, second = opened(postgres, "first"), opened(postgres, "second", epochs=7)
    first.fill()
    second.fill()
    drain(first)
    assert (first.progress().done, second.progress().done) == (len(POINTS), 0)
    first.close()
    second.close()
