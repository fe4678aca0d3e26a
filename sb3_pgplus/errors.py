"""The package's own exceptions (each is a built-in one too, so that existing ``except`` clauses work) and warnings."""

import sys
import warnings


class HyperparameterError(ValueError, AssertionError):
    """
    A hyperparameter, or a combination of them, that cannot work.

    SB3 raises ``AssertionError`` in these places and RL Zoo prunes a trial on either, hence both.
    """


class NonFiniteEnvironmentError(ValueError):
    """An environment returned a NaN or infinite reward or observation."""


class NonFinitePolicyError(ValueError):
    """The policy's outputs are NaN or infinite during a rollout."""


class NonFiniteUpdateError(ValueError):
    """Several updates in a row had a NaN or infinite loss or gradient. RL Zoo prunes a trial on ``ValueError``."""


class BackendError(ValueError):
    """A backend of ``make_vec_env`` that cannot serve what it was asked for; the message says why."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged or missing, or that another training wrote; the message says which and why."""


class WorkerError(RuntimeError):
    """An environment in a worker process raised an error, took too long, or ended its process."""


class ModelFileError(ValueError):
    """A saved model's file that is damaged, no model's, or another algorithm's; the message names the file."""


class UntrustedModelError(ModelFileError):
    """A saved model that cannot be loaded with ``trusted=False``; the message names the attributes that need trust."""


def warn_user(message: str) -> None:
    """
    Warn, naming the line of the user's code that led here instead of one of ours or SB3's.

    :param message: the warning
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


_LIBRARIES = ("sb3_pgplus", "stable_baselines3", "contextlib")


def warn_not_written(path: object, error: OSError) -> None:
    """
    Say that a file beside the training could not be written, on a full disk for example.

    :param path: of the file
    :param error: why
    """
    warn_user(f"{path} could not be written ({error.strerror or error}). Training goes on.")
