"""
RL Zoo with our algorithms in it: ``python -m sb3_pgplus.zoo train|enjoy``, with the options of ``rl_zoo3``.

Everything that ``rl_zoo3`` does is its own code. What is added: the algorithms and their search spaces in its tables,
our ``zoo_configs`` where no other file is named, settings that its parser refuses or misreads, and our vector
environments.
"""

from __future__ import annotations

import argparse
import ast
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_pgplus.configs import (
    ALGORITHMS,
    algorithm_class,
    default_n_envs,
    normalization_switches,
    packaged_config,
    resolve_objects,
)
from sb3_pgplus.vec_env.make import BACKENDS, make_vec_env

if TYPE_CHECKING:  # a mix-in of one class: let the type checker see what it is mixed into
    from optuna import Trial
    from rl_zoo3.exp_manager import ExperimentManager as _Base
else:
    _Base = object

COMMANDS = ("train", "enjoy")
ZOO_VEC_ENVS = ("dummy", "subproc")
"""What ``rl_zoo3`` knows as ``--vec-env``; other names are backends of :func:`sb3_pgplus.vec_env.make_vec_env`."""


def register() -> None:
    """
    Put our algorithms into the tables of ``rl_zoo3``, in place; doing it again changes nothing.

    :raises ImportError: if ``rl_zoo3`` is not installed
    """
    try:
        import rl_zoo3
    except ModuleNotFoundError as error:
        if error.name != "rl_zoo3":
            raise
        raise ImportError("RL Zoo is not installed: run pip install 'sb3_pgplus[zoo]'") from error
    from rl_zoo3 import hyperparams_opt

    for name in ALGORITHMS:
        rl_zoo3.ALGOS[name] = algorithm_class(name)
        hyperparams_opt.HYPERPARAMS_SAMPLER[name] = partial(_sample, SEARCH_SPACES[name])
        hyperparams_opt.HYPERPARAMS_CONVERTER[name] = convert


# --- search spaces of -optimize ---------------------------------------------------------------------------------------


def _search_ppoplus(trial: Trial) -> None:
    trial.suggest_int("n_steps_pow", 5, 11)
    trial.suggest_int("batch_size_pow", 5, 8)
    trial.suggest_categorical("n_epochs", [5, 10, 20])
    trial.suggest_categorical("clip_range", ["lin_0.1", "lin_0.2", "lin_0.3"])
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)


def _search_a2cplus(trial: Trial) -> None:
    trial.suggest_int("n_steps_pow", 2, 6)
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)


def _search_trpoplus(trial: Trial) -> None:
    trial.suggest_int("n_steps_pow", 8, 11)
    trial.suggest_float("target_kl", 1e-3, 0.1, log=True)
    trial.suggest_categorical("n_critic_updates", [5, 10, 20, 30])


SEARCH_SPACES: Mapping[str, Callable[[Trial], None]] = {
    "ppoplus": _search_ppoplus,
    "a2cplus": _search_a2cplus,
    "trpoplus": _search_trpoplus,
}


def _sample(search: Callable[[Trial], None], trial: Trial, *_: Any) -> dict[str, Any]:
    trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True)
    trial.suggest_float("one_minus_gamma", 1e-4, 0.1, log=True)
    trial.suggest_float("one_minus_gae_lambda", 1e-3, 0.2, log=True)
    search(trial)
    return convert(trial.params)


def convert(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    From a trial's parameters to keyword arguments of the constructor.

    No ``policy_kwargs`` among them: ``rl_zoo3`` would put them in the place of the file's.

    :param sampled_params: what a study stores
    """
    settings = dict(sampled_params)
    for name in ("gamma", "gae_lambda"):
        settings[name] = 1 - settings.pop(f"one_minus_{name}")
    for name in ("n_steps", "batch_size"):
        if f"{name}_pow" in settings:
            settings[name] = 2 ** settings.pop(f"{name}_pow")
    if "batch_size" in settings:
        # A rollout has n_steps · n_envs samples, and n_envs, 1 or more, is not known here.
        settings["batch_size"] = min(settings["batch_size"], settings["n_steps"])
    settings["learning_rate"] = f"lin_{settings['learning_rate']!r}"
    return settings


# --- what rl_zoo3 does differently for our algorithms -----------------------------------------------------------------


class PlusSettings(_Base):
    """Mixed into rl_zoo3's ``ExperimentManager``: our files, our schedules, our vector environments."""

    backend: str | None = "auto"
    """Of :func:`sb3_pgplus.vec_env.make_vec_env`; None: the class that ``rl_zoo3`` takes."""

    def __init__(self, args: Any, algo: str, *positional: Any, **named: Any) -> None:
        named["config"] = named.get("config") or str(packaged_config(algo))
        super().__init__(args, algo, *positional, **named)

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the file. For ``rl_zoo3``, ``--trial-id 0`` is no trial, and ``normalize`` is a ``VecNormalize``."""
        if self.storage and self.study_name and self.trial_id == 0:
            trial = self.load_trial(self.storage, self.study_name, 0)
            self.custom_hyperparams = trial | (self.custom_hyperparams or {})
        used, saved = super().read_hyperparameters()
        return _normalized_inside(used), _normalized_inside(saved)

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        """Leave schedules to the constructor: ``rl_zoo3`` refuses ``null`` and takes every string for ``lin_…``."""
        return hyperparams

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        numbers = {*algorithm_class(self.algo).hparams_class.names(), "n_timesteps", "frame_stack"}
        readable = {key: _as_meant(value) if key in numbers else value for key, value in hyperparams.items()}
        # rl_zoo3 makes one environment where the file does not say, our constructors as many as suit the algorithm.
        settings, *others = super()._preprocess_hyperparams({"n_envs": default_n_envs(self.algo), **readable})
        return resolve_objects(settings), *others

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        Let our ``make_vec_env`` make the copies; what ``rl_zoo3`` puts around them stays.

        :param n_envs: number of copies
        :param eval_env: whether they are for evaluation
        :param no_log: whether to write no ``Monitor`` files
        """
        if self.backend is not None and self.default_vec_env_cls is None:
            make: Any = partial(
                self._make_copies,
                monitor_dir=None if eval_env or no_log else self.save_path,
                env_kwargs=self.eval_env_kwargs if eval_env else self.env_kwargs,
            )
            self.vec_env_class = make
        return super().create_envs(n_envs, eval_env, no_log)

    def _make_copies(self, env_fns: Sequence[Any], monitor_dir: str | None, env_kwargs: dict[str, Any]) -> VecEnv:
        """Stand in for a class: of the functions that build single environments, only the number is needed."""
        assert self.backend is not None
        name = self.env_name.gym_id
        return make_vec_env(
            # Other processes do not know what --gym-packages has registered in this one.
            gym.spec(name).make if self.backend == "workers" else name,
            len(env_fns),
            self.seed,
            monitor_dir=monitor_dir,
            wrapper_class=self.env_wrapper,
            env_kwargs=env_kwargs,
            monitor_kwargs=self.monitor_kwargs,
            backend=self.backend,
        )


def _normalized_inside(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``normalize`` as the model's own switches, as in our command: then the zip file has the statistics."""
    others = {name: value for name, value in settings.items() if name != "normalize"}
    return normalization_switches(settings.get("normalize")) | others


def _as_meant(value: Any) -> Any:
    """PyYAML reads ``1e-3`` and ``None`` as strings."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, ValueError):
        return value


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run ``rl_zoo3``'s train or enjoy."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m sb3_pgplus.zoo {{{','.join(COMMANDS)}}} [options of rl_zoo3]")
    try:
        register()
    except ImportError as error:
        sys.exit(f"Error: {error}")
    command, arguments = sys.argv[1], sys.argv[2:]
    sys.argv[0] = f"python -m sb3_pgplus.zoo {command}"
    if command == "train":
        train(arguments)
    else:
        enjoy(arguments)


def train(arguments: Sequence[str]) -> None:
    """
    Run ``rl_zoo3.train`` on one of our algorithms.

    :param arguments: its options; ``--vec-env`` takes the backends of ``make_vec_env`` as well, by default ``auto``
    """
    parser = _parser("train")
    parser.add_argument("--vec-env", default="auto", choices=sorted({"auto", *ZOO_VEC_ENVS, *BACKENDS}))
    own, others = parser.parse_known_args(arguments)
    is_stock = own.vec_env in ZOO_VEC_ENVS
    backend = None if is_stock else own.vec_env

    from rl_zoo3 import train as stock
    from rl_zoo3.exp_manager import ExperimentManager

    # Only where rl_zoo3.train looks it up: whoever else uses the class gets it as it is.
    manager = type("ExperimentManager", (PlusSettings, ExperimentManager), {"backend": backend})
    vars(stock)["ExperimentManager"] = manager
    sys.argv[1:] = ["--algo", own.algo, *(["--vec-env", own.vec_env] if is_stock else []), *others]
    # One evaluation environment beside a batch of training environments: different classes, the same results.
    warnings.filterwarnings("ignore", message="Training and eval env are not of the same type")
    stock.train()


def enjoy(arguments: Sequence[str]) -> None:
    """
    Run ``rl_zoo3.enjoy`` on one of our algorithms.

    :param arguments: its options; the folder is by default the one that ``train`` writes to
    """
    parser = _parser("enjoy")
    parser.add_argument("-f", "--folder", default="logs")
    own, others = parser.parse_known_args(arguments)

    from rl_zoo3 import enjoy as stock

    sys.argv[1:] = ["--algo", own.algo, "--folder", own.folder, *others]
    stock.enjoy()


def _parser(command: str) -> argparse.ArgumentParser:
    """Options that we read ourselves; all others, and ``--help``, are for ``rl_zoo3``."""
    parser = argparse.ArgumentParser(f"python -m sb3_pgplus.zoo {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default="ppoplus", choices=list(ALGORITHMS))
    return parser


if __name__ == "__main__":
    main()
