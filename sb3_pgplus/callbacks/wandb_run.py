"""What stands between a training and Weights & Biases: runs that are begun and ended here, uploads, values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.logger import Figure, Image, KVWriter, Video

try:
    import wandb
except ModuleNotFoundError as error:
    if error.name != "wandb":
        raise
    raise ImportError("Weights & Biases is not installed: run pip install 'sb3_pgplus[wandb]'") from error

__all__ = [
    "Uploads",
    "WandbOutputFormat",
    "as_wandb_value",
    "begin",
    "end",
    "histograms",
    "is_own",
    "model_artifact",
    "uploads_of",
    "wandb",
]

#: Seconds. The end of a run does not wait for ever for a server that does not answer: what is on the disk is for
#: `wandb sync`. And of a process that is killed the disk has all but the last second (by default, fifteen).
SETTINGS = {"finish_timeout": 600.0, "x_transaction_log_flush_interval": 1.0}
UPLOAD_TIMEOUT = 60.0


# --- runs -------------------------------------------------------------------------------------------------------------


class Uploads:
    """Calls that ask the server, one after the other in a thread: without a network they would hold up training."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[Any]] = []

    def start(self, call: Callable[[], Any], on_error: Callable[[BaseException], None]) -> None:
        """
        :param call: what is to be done
        :param on_error: told of an error, in that thread
        """

        def report(future: Future[Any]) -> None:
            if (error := future.exception()) is not None:
                on_error(error)

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="wandb-uploads")
        future = self._thread.submit(call)
        future.add_done_callback(report)
        self._pending = [other for other in [*self._pending, future] if not other.done()]

    def wait(self) -> None:
        """Until all is done, or long enough."""
        wait(self._pending, UPLOAD_TIMEOUT)


#: The runs that were begun here, by id. Others are their user's: used, and never finished.
_OWN_RUNS: dict[str, Uploads] = {}


def is_own(run: Any) -> bool:
    """
    Whether it was begun here.

    :param run: of W&B
    """
    return run.id in _OWN_RUNS


def uploads_of(run: Any) -> Uploads:
    """
    The same for all callbacks of a run.

    :param run: of W&B
    """
    return _OWN_RUNS.get(run.id) or Uploads()


def begin(run_id: str | None, arguments: Mapping[str, Any], on_error: Callable[[BaseException, str], None]) -> Any:
    """
    Begin a run; offline, if that is impossible online.

    :param run_id: of the run to continue, None for a new one
    :param arguments: of ``wandb.init``
    :param on_error: told why it is offline, and what that means
    """
    known = {name: value for name, value in SETTINGS.items() if name in wandb.Settings.model_fields}
    arguments = {"settings": known} | dict(arguments)
    if run_id is not None:
        arguments |= {"id": run_id, "resume": "allow"}
    try:
        run = wandb.init(**arguments)
    except Exception as error:
        wandb.teardown()  # the run that failed would keep its id
        run = wandb.init(**arguments | {"mode": "offline"})
        on_error(error, "the run is recorded offline, for `wandb sync` later")
    _OWN_RUNS[run.id] = Uploads()
    return run


def end(run: Any, exit_code: int = 0) -> None:
    """
    End a run that was begun here.

    :param run: of W&B
    :param exit_code: 0: finished, 255: killed, others: failed
    """
    _OWN_RUNS.pop(run.id).wait()
    run.finish(exit_code=exit_code)


# --- values -----------------------------------------------------------------------------------------------------------


class WandbOutputFormat(KVWriter):
    """
    Hands on what SB3's logger dumps.

    :param log: takes one row
    """

    def __init__(self, log: Callable[[dict[str, Any]], None]) -> None:
        self._log = log

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """
        :param key_values: of the logger
        :param key_excluded: formats that a key is not for
        :param step: not used: a dump by hand has 0 here, and a row needs the environment steps
        """
        self._log({key: value for key, value in key_values.items() if "wandb" not in (key_excluded.get(key) or ())})

    def close(self) -> None:
        """Nothing: a run is longer than a logger."""


def as_wandb_value(value: Any) -> Any:
    """
    :param value: as SB3's logger has it
    :return: None if W&B has no form for it
    """
    if isinstance(value, np.ndarray | th.Tensor):
        return value.item() if np.prod(value.shape) == 1 else None
    if isinstance(value, Number | str):
        return value
    if isinstance(value, Video):
        return wandb.Video(value.frames.cpu().numpy(), fps=int(value.fps), format="mp4")
    if isinstance(value, Figure):
        return wandb.Image(value.figure)
    return wandb.Image(value.image) if isinstance(value, Image) else None


def histograms(kind: str, tensors: Iterable[tuple[str, th.Tensor]]) -> dict[str, Any]:
    """
    :param kind: first part of their names
    :param tensors: name → tensor of any shape
    :return: name → W&B's histogram of the finite values; none where there are no finite ones
    """
    found = {}
    for name, tensor in tensors:
        values = tensor.detach().float().cpu().numpy().ravel()
        values = values[np.isfinite(values)]
        if values.size:
            found[f"{kind}/{name}"] = wandb.Histogram(np_histogram=np.histogram(values, bins=64))
    return found


def model_artifact(name: str, metadata: dict[str, Any], files: Mapping[str, Path]) -> Any:
    """
    :param name: of the artifact
    :param metadata: about the model
    :param files: name in the artifact → file
    """
    artifact = wandb.Artifact(name, type="model", metadata=metadata)
    for inside, path in files.items():
        artifact.add_file(str(path), name=inside)
    return artifact
