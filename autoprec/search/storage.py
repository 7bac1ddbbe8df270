"""An Optuna study for one set of tables, in memory or in a database.

A study of the same name that was made from other tables is left alone: its plans were evaluated
by other numbers, so this run gets a name of its own. Optuna is kept from printing while the study
is open, and its settings are given back after.
"""

import logging
import os
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprec.errors import NoRoomError, RecordError
from autoprec.search.workers import BEAT_S, STALE_S, Claims, Team

if TYPE_CHECKING:
    import optuna

OPEN_TRIES, OPEN_WAIT_S = 10, 0.5  # tables are a dozen, and each can be made by one only
CONNECT_S = 10  # until a server must have answered
FULL = ("disk is full", "No space left", "disk full")  # as SQLite and PostgreSQL say it
LOCKED_S = 60  # that another process may keep a SQLite file
OBJECTIVES = ("step time, ms", "gradient error", "bytes")
TABLES = "autoprec_tables"  # the study's user attribute that names the tables

logger = logging.getLogger(__name__)


class _QuickSqlite(sqlite3.Connection):
    """SQLite without a disk flush per write: a killed process loses nothing, a power cut may.

    Optuna commits every parameter apart; with flushes 17 trials of 30 parameters take 12 s, without
    them 0.7 s.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: sqlite3's own arguments
        super().__init__(*args, **kwargs)
        try:
            self.execute("PRAGMA synchronous=OFF").close()
        except sqlite3.Error:  # no database: nobody else has this connection to close it
            self.close()
            raise


@contextmanager
def open_study(
    storage: str | None, name: str, *, tables: str, team: Team | None = None
) -> "Iterator[tuple[optuna.Study, Claims]]":
    """Open or create the study of these tables; `storage` is a database URL, None for memory.

    With a `team` it is open in several processes at once; else what a killed run left is failed.

    Raises:
        RecordError: the storage cannot be opened, or fails while the study is open; a worker's
            study is of other tables, versions or reference.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    database = None
    try:
        with warnings.catch_warnings():
            # heartbeats and names of metrics are marked so
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # ask and tell do not tell heartbeats by themselves, and claims do
            warnings.filterwarnings("ignore", "Heartbeat of storage")
            database = None if storage is None else _open_database(storage, team)
            is_worker = team is not None and team.is_worker
            study = _study_of(database, name, tables=tables, is_worker=is_worker)
            claims = Claims(study, database, team)
            claims.free_stale()
            yield study, claims
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        if any(said in str(error.__cause__ or error) for said in FULL):
            raise NoRoomError(
                f"a study must find room to grow, but {storage} has none "
                f"({_first_line(error)}); make room, then start again (tune: with --resume)"
            ) from error
        raise RecordError(_storage_problem(storage, error)) from error
    finally:
        if database is not None:
            database.remove_session()
            database.engine.dispose()
        optuna.logging.set_verbosity(verbosity)


def storage_in(folder: Path) -> str:
    """Return the database URL of a run folder's own study."""
    from sqlalchemy import URL

    path = str(folder / "study.db")
    with suppress(UnicodeEncodeError):  # a folder that is no UTF-8 goes as it is
        path = URL.create("sqlite", database=path).render_as_string().removeprefix("sqlite:///")
    return "sqlite:///" + path.replace("{", "{{").replace("}", "}}")  # Optuna takes a template


def check_storage(storage: str) -> None:
    """Check a database URL: its form, its driver, that a server answers, a file can be written.

    Raises:
        RecordError: nothing can be opened there.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = create_engine(storage.format(SCHEMA_VERSION="")).url
        if url.get_backend_name() == "postgresql":
            engine = create_engine(storage, connect_args={"connect_timeout": CONNECT_S})
            with engine.connect():
                pass
            engine.dispose()
        if url.get_backend_name() == "sqlite":
            _check_file(url.database or ":memory:")
    except (SQLAlchemyError, sqlite3.Error, ImportError, LookupError, ValueError) as error:
        raise RecordError(_storage_problem(storage, error)) from error


def _check_file(name: str) -> None:
    path = Path(name)
    if name == ":memory:":
        raise ValueError("it names no file")
    if not path.parent.is_dir():
        raise ValueError("its folder is not there")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError("it may not be written")
    if path.exists():
        with closing(sqlite3.connect(path, timeout=LOCKED_S)) as database:
            database.execute("BEGIN IMMEDIATE")  # it is one, and nobody keeps it for long
            database.rollback()


def _open_database(storage: str, team: Team | None) -> "optuna.storages.RDBStorage":
    import optuna
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError
    from sqlalchemy.pool import NullPool

    # without a pool each connection is closed after use, whatever of the making fails
    sqlite = {"factory": _QuickSqlite, "timeout": LOCKED_S}
    of_file = {"connect_args": sqlite, "poolclass": NullPool}
    make = partial(
        optuna.storages.RDBStorage,
        storage,
        engine_kwargs=of_file if storage.startswith("sqlite") else {},
        heartbeat_interval=BEAT_S if team else None,
        grace_period=STALE_S if team else None,
    )
    try:
        for _ in range(OPEN_TRIES - 1):
            try:
                return make()
            except (IntegrityError, ProgrammingError, OperationalError) as error:
                # another process is making the tables; each backend has its own error for it
                if isinstance(error, OperationalError) and "already exists" not in str(error):
                    raise
            time.sleep(OPEN_WAIT_S)
        return make()
    except (ImportError, RuntimeError, ValueError) as error:  # no driver, or another version's
        raise RecordError(_storage_problem(storage, error)) from error


def _study_of(
    database: "optuna.storages.RDBStorage | None", name: str, *, tables: str, is_worker: bool
) -> "optuna.Study":
    """Return the study of these tables: of this name, or of one of its own beside another's."""
    own_name = f"{name}-{tables[:8]}"
    study = _created(database, name)
    found = study.user_attrs.get(TABLES)
    if found != tables and (found is not None or study.get_trials(deepcopy=False)):
        known = () if database is None else (s.study_name for s in database.get_all_studies())
        if is_worker and own_name not in known:
            raise RecordError(
                f"a worker joins the study of its own tables, but {name!r} was made from others "
                "(profile, sensitivity, constraint or seed); give it the same run folder and "
                "options as the search, or another --study"
            )
        logger.info("study %r is of other tables; using %r", name, own_name)
        study = _created(database, own_name)
    study.set_user_attr(TABLES, tables)
    return study


def _created(database: "optuna.storages.RDBStorage | None", name: str) -> "optuna.Study":
    import optuna

    study = optuna.create_study(
        storage=database, study_name=name, load_if_exists=True, directions=["minimize"] * 3
    )
    study.set_metric_names(list(OBJECTIVES))  # for those who look at it, e.g. in optuna-dashboard
    return study


def _storage_problem(storage: str | None, error: Exception) -> str:
    return (
        f"--storage must be a database URL that Optuna can open, but {storage} is not "
        f"({_first_line(error)}); write e.g. sqlite:///study.db in a folder that exists, or leave "
        "it out"
    )


def _first_line(error: Exception) -> str:
    # Optuna wraps what a database says; of a driver that lacks it says itself what to install
    cause = None if isinstance(error, ImportError) else error.__cause__
    said = str(getattr(error, "orig", None) or cause or error).strip().splitlines()
    return said[0] if said else repr(error)
