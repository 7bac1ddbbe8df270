"""An Optuna study for one set of tables, in memory or in a database.

A study of the same name that was made from other tables is left alone: its plans were evaluated
by other numbers, so this run gets a name of its own. Optuna is kept from printing while the study
is open, and its settings are given back after.
"""

import logging
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprec.errors import RecordError

if TYPE_CHECKING:
    import optuna

TABLES = "autoprec_tables"  # the study's user attribute that names the tables

logger = logging.getLogger(__name__)


class _QuickSqlite(sqlite3.Connection):
    """SQLite without a disk flush per write: a killed process loses nothing, a power cut may.

    Optuna commits every parameter apart; with flushes 17 trials of 30 parameters take 12 s, without
    them 0.7 s.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: sqlite3's own arguments
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA synchronous=OFF").close()


@contextmanager
def open_study(storage: str | None, name: str, *, tables: str) -> "Iterator[optuna.Study]":
    """Open or create the study of these tables; `storage` is a database URL, None for memory.

    Raises:
        RecordError: the storage cannot be opened, or fails while the study is open.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    database = None
    try:
        with warnings.catch_warnings():
            # TPE's `group`, which lets trials without parameters be, is marked experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            database = _open_database(storage) if storage is not None else None
            yield _study_of(database, name, tables=tables)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise RecordError(_storage_problem(storage, error)) from error
    finally:
        if database is not None:
            database.remove_session()
            database.engine.dispose()
        optuna.logging.set_verbosity(verbosity)


def check_storage(storage: str) -> None:
    """Check a database URL without opening it: its form, its driver, and a file's folder.

    Raises:
        RecordError: nothing can be opened there.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = create_engine(storage).url
    except (SQLAlchemyError, ImportError) as error:
        raise RecordError(_storage_problem(storage, error)) from error
    is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    if is_file and not Path(str(url.database)).parent.is_dir():
        raise RecordError(_storage_problem(storage, FileNotFoundError("its folder is not there")))


def _open_database(storage: str) -> "optuna.storages.RDBStorage":
    import optuna

    options = {"connect_args": {"factory": _QuickSqlite}} if storage.startswith("sqlite") else {}
    try:
        return optuna.storages.RDBStorage(storage, engine_kwargs=options)
    except (ImportError, RuntimeError, ValueError) as error:  # no driver, or another version's
        raise RecordError(_storage_problem(storage, error)) from error


def _study_of(
    database: "optuna.storages.RDBStorage | None", name: str, *, tables: str
) -> "optuna.Study":
    import optuna

    study = optuna.create_study(storage=database, study_name=name, load_if_exists=True)
    found = study.user_attrs.get(TABLES)
    is_new = found is None and not study.get_trials(deepcopy=False)
    if found != tables and not is_new:
        own_name = f"{name}-{tables[:8]}"
        logger.info("study %r is of other tables; using %r", name, own_name)
        study = optuna.create_study(storage=database, study_name=own_name, load_if_exists=True)
    study.set_user_attr(TABLES, tables)
    return study


def _storage_problem(storage: str | None, error: Exception) -> str:
    reason = str(getattr(error, "orig", None) or error).strip().splitlines() or [repr(error)]
    return (
        f"--storage must be a database URL that Optuna can open, but {storage} is not "
        f"({reason[0]}); write e.g. sqlite:///study.db in a folder that exists, or leave it out"
    )
