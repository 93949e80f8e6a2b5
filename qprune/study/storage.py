"""The database of a study: a SQLite file or a PostgreSQL server, opened so that a transaction locks what it reads.

PostgreSQL locks the rows that Optuna reads for an update. SQLite would let two processes read before either writes, and both claim one
trial, so there every transaction begins by taking the write lock (BEGIN IMMEDIATE).
"""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qprune.errors import QPruneError, StudyError

_WAIT_FOR_LOCK = 60.0  # seconds
_DRIVERS = {"postgresql://": "postgresql+psycopg2://"}  # the one of qprune[postgres]; SQLAlchemy's default differs between its versions
_ATTEMPTS = 3


def require_optuna() -> Any:
    """The optuna module. Raises StudyError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise StudyError(f"a study needs optuna ({error}): pip install 'qprune[study]'") from None
    return optuna


def open_database(storage: str, heartbeat: int, grace: int, given_up: Callable[[Any, Any], None]) -> Any:
    """Optuna's RDBStorage at this URL, its tables made if need be.

    given_up  is called with (study, trial) for every trial that was given up for want of heartbeats
    """
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    from sqlalchemy.exc import DBAPIError

    for plain, chosen in _DRIVERS.items():
        storage = storage.replace(plain, chosen, 1) if storage.startswith(plain) else storage
    local = storage.startswith("sqlite")
    engine: dict[str, Any] = {"connect_args": {"timeout": _WAIT_FOR_LOCK}} if local else {"pool_pre_ping": True}
    options = {"heartbeat_interval": heartbeat, "grace_period": grace, "heartbeat_stale_trial_callback": given_up}
    for attempt in range(_ATTEMPTS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                database = optuna.storages.RDBStorage(storage, engine_kwargs=engine, **options)
            break
        except DBAPIError:  # another process creates the tables at this moment
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.5)
    if local:
        _serialise(database.engine)
    return database


def start_clocks(database: Any, trials: Iterable[int]) -> None:
    """Let these running trials be given up in time, if no sign of life ever comes: a worker that dies between its claim and its first
    heartbeat would otherwise hold its trial for ever, since Optuna gives up only what has had one."""
    from sqlalchemy import text

    with database.engine.begin() as connection:
        beating = {trial for (trial,) in connection.execute(text("SELECT trial_id FROM trial_heartbeats"))}
    for trial in trials:
        if trial not in beating:
            database.record_heartbeat(trial)


def shown(storage: str) -> str:
    """The URL without its password."""
    scheme, separator, rest = storage.partition("://")
    login, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{login.split(':')[0]}{at}{host}"


def check_sqlite(path: Path) -> None:
    """Raise StudyError if the file is there, and is no SQLite database, or one that holds something else."""
    if not path.exists():
        return
    try:
        with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError as error:
        raise StudyError(f"{path} is not the database of a study, or is damaged ({error}); move it away to begin anew") from None
    if tables and not {"studies", "trials"} <= tables:
        raise StudyError(f"{path} is the database of something else (it has tables {', '.join(sorted(tables)[:5])}); choose another folder")


def _serialise(engine: Any) -> None:
    """Let every SQLite transaction take the write lock when it begins."""
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # sqlite3 must not begin transactions by itself

    @event.listens_for(engine, "begin")
    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()


@contextmanager
def database_errors(optuna: Any, storage: str) -> Iterator[None]:
    """Turn what the database or its driver raises into StudyError."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except QPruneError:
        raise
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise StudyError(f"the study's database {shown(storage)} cannot be used: {cause}") from None
    except ImportError as error:
        raise StudyError(f"{shown(storage)} needs a database driver ({error}): pip install 'qprune[postgres]'") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError) as error:
        # what Optuna, SQLAlchemy and json meet in rows that no Optuna wrote raises all of these
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise StudyError(f"the study's database {shown(storage)} is damaged, or was changed by another program ({why})") from error
    except RuntimeError as error:
        if "optuna" not in str(error).lower():
            raise
        raise StudyError(f"the study's database {shown(storage)} cannot be used: {' '.join(str(error).split())}") from None
