"""Where a study is stored, who may work on it, and what becomes of the trials of workers that died."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.storages import BaseStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from sb3_pgplus.configs import ConfigError
from sb3_pgplus.tuning.objective import SIGN_OF_LIFE_SECONDS, is_alive

MOST_RETRIES = 3
"""A trial whose worker died is tried again so many times; perhaps it was the trial that killed it."""
GRACE = 4
"""A worker is dead after so many missed heartbeats."""
CREATION_ATTEMPTS = 10


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna's heartbeat and its Wilcoxon pruner have been experimental for years, and say so at every use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_storage(where: str, heartbeat: int = 30) -> BaseStorage:
    """
    :param where: a database URL such as ``"sqlite:///study.db"`` or ``"postgresql+psycopg://…"``, ``"grpc://host:port"``,
        or a ``.log`` file for a journal
    :param heartbeat: seconds between two signs of life of a worker, where the storage is a database
    :raises ConfigError: if it is something else, or cannot be reached
    """
    try:
        if where.startswith("grpc://"):
            host, _, port = where.removeprefix("grpc://").partition(":")
            with quiet_optuna():
                proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port or 13000))
                proxy.get_all_studies()  # the first call connects
                return proxy
        if "://" in where:
            return _open_database(where, heartbeat)
        if where.endswith(".log"):
            return optuna.storages.JournalStorage(JournalFileBackend(where))
    except ImportError as error:
        raise ConfigError(f"the storage {_without_password(where)} needs a package that is missing: {error}") from error
    except Exception as error:  # each database driver has exceptions of its own
        raise ConfigError(f"cannot open the storage {_without_password(where)}: {error}") from error
    raise ConfigError(f"storage must be a database URL, grpc://host:port or a .log file, got {where!r}")


def _open_database(url: str, heartbeat: int) -> BaseStorage:
    # SQLite has one writer at a time, the others wait; a database server may close a connection that idles.
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(CREATION_ATTEMPTS):
        try:
            with quiet_optuna():
                return optuna.storages.RDBStorage(
                    url,
                    engine_kwargs=engine,
                    heartbeat_interval=heartbeat,
                    grace_period=GRACE * heartbeat,
                    heartbeat_stale_trial_callback=_retry(MOST_RETRIES),
                )
        except Exception as error:
            # Workers started at once create the same tables at once, and all but one fail.
            if attempt == CREATION_ATTEMPTS - 1 or not _is_creation_race(error):
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _is_creation_race(error: Exception) -> bool:
    return any(text in str(error).lower() for text in ("already exists", "unique", "duplicate", "locked"))


def _without_password(url: str) -> str:
    before, at, after = url.rpartition("@")
    scheme, colon, _ = before.partition("://")
    return f"{scheme}{colon}…@{after}" if at else url


def has_heartbeat(storage: BaseStorage) -> bool:
    """
    :param storage: as opened here
    """
    return isinstance(storage, optuna.storages.RDBStorage)


def _retry(most: int | None) -> Any:
    with quiet_optuna():
        return RetryHeartbeatStaleTrialCallback(max_retry=most)


def requeue(study: optuna.Study, trial: FrozenTrial, most: int | None = None) -> None:
    """
    Put a failed trial's parameters back into the queue.

    :param study: the study
    :param trial: its failed trial
    :param most: give up after so many retries
    """
    _retry(most)(study, trial)


def recover_dead_trials(study: optuna.Study, storage: BaseStorage) -> list[int]:
    """
    Fail the trials whose workers died, and put their parameters back into the queue.

    A trial is dead if its process on this machine is gone. A database knows of those on other machines by missing
    heartbeats; journals and the gRPC proxy have none, and there one is dead that has given no sign of life for long.

    :param study: the study
    :param storage: where it is stored
    :return: numbers of the dead trials that were found here
    """
    heartbeat = has_heartbeat(storage)
    if heartbeat:
        with quiet_optuna():
            optuna.storages.fail_stale_trials(study)
    dead = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _is_dead(trial, heartbeat):
            continue
        try:
            study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, RuntimeError):  # another worker was faster
            continue
        requeue(study, study.get_trials(deepcopy=True)[trial.number], MOST_RETRIES)
        dead.append(trial.number)
    return dead


def _is_dead(trial: FrozenTrial, heartbeat: bool) -> bool:
    worker = trial.user_attrs.get("worker")
    alive = is_alive(worker) if worker else None
    if alive is not None:
        return not alive
    if worker and heartbeat:  # on another machine, whose clock may differ: the database's decides
        return False
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    last_seen: float = max(trial.user_attrs.get("seen", 0.0), started)
    return time.time() - last_seen > 10 * SIGN_OF_LIFE_SECONDS
