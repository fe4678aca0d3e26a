"""`sb3-pgplus train --resume RUN`: an interrupted run goes on in its own folder, with its own settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from sb3_pgplus import checkpoints
from sb3_pgplus.configs import ConfigError, RunSettings, algorithm_class, read_mapping, resolve_settings
from sb3_pgplus.environments import one_line
from sb3_pgplus.errors import CheckpointError
from sb3_pgplus.on_policy import PolicyGradientPlus
from sb3_pgplus.run_folder import RunFolder


def refuse_settings(given: Mapping[str, Any]) -> None:
    """
    Refuse settings beside ``--resume``: a run that goes on has its own.

    :param given: name → what the command line says
    :raises ConfigError: naming the first that is set
    """
    for name, value in given.items():
        if value is not None and value != []:
            option = "set" if name == "overrides" else name.replace("_", "-")
            raise ConfigError(f"--resume goes on with the settings of the run: leave out --{option}")


def settings_of(run: Path) -> RunSettings:
    """
    The settings of an interrupted run.

    :param run: its folder
    :raises ConfigError: if there is no run, or no checkpoint of it
    """
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ConfigError(f"{run} is no run folder: it has no {folder.config.name}")
    if not checkpoints.in_folder(folder.checkpoints):
        raise ConfigError(
            f"{run} has no checkpoint to go on from. Checkpoints are written with --checkpoint-freq, and when Ctrl-C "
            f"or SIGTERM ends a training. To begin it anew: --config {folder.config}"
        )
    return resolve_settings(config=folder.config)


def options_of(run: Path) -> dict[str, Any]:
    """
    What besides its settings an interrupted run was started with, such as its evaluations: arguments of ``train``.

    :param run: its folder
    """
    options = read_mapping(RunFolder(run).config).get("options") or {}  # older runs have none
    return {name: value for name, value in options.items() if value is not None}


def resume_model(
    settings: RunSettings, run: Path, env: VecEnv, *, device: str, verbose: int
) -> tuple[PolicyGradientPlus[Any], RunFolder]:
    """
    Load the newest intact checkpoint of a run, and tidy up what the interruption left.

    :param settings: of the run
    :param run: its folder
    :param env: its environments, just made
    :param device: as SB3's
    :param verbose: as SB3's
    :raises ConfigError: if no checkpoint is intact or the run has finished
    """
    folder = RunFolder(run)
    try:
        model = algorithm_class(settings.algo).resume(folder.checkpoints, env, device)
    except (CheckpointError, ValueError) as error:
        raise ConfigError(one_line(error)) from error
    if model.num_timesteps >= settings.n_timesteps and _is_of(folder.model, model):
        raise ConfigError(f"{run} has finished: it has all of its {settings.n_timesteps:,} steps")
    model.verbose = verbose
    for leftover in (folder.error, *run.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)
    return model, folder


def _is_of(path: Path, model: PolicyGradientPlus[Any]) -> bool:
    """Whether the run's model is the one of its last checkpoint, and not that of an interruption before it."""
    try:
        return bool(type(model).load(path, device="cpu").num_timesteps == model.num_timesteps)
    except (OSError, ValueError):  # there is none, or it is damaged
        return False
