"""The part of the base class that saves and loads."""

import inspect
import io
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import GymEnv

from sb3_pgplus.construction import PLUMBING, reject_unknown
from sb3_pgplus.files import write_atomically
from sb3_pgplus.hparams import PolicyGradientHparams

if TYPE_CHECKING:  # a mix-in of one class: let the type checker see what it is mixed into
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm as _Base
else:
    _Base = object

#: What `load` accepts besides constructor arguments: SB3's own attributes that scripts replace there.
_LOADABLE = (
    "lr_schedule",
    "n_envs",
    "num_timesteps",
    "policy_class",
    "observation_space",
    "action_space",
    "start_time",
)

#: Hyperparameters that shape the networks, the optimiser or what is saved with them.
_FIXED_AT_CONSTRUCTION = (
    "normalize_observations",
    "normalize_rewards",
    "normalize_value_targets",
    "activation_fn",
    "ortho_init",
    "log_std_init",
    "adam_eps",
    "use_rms_prop",
    "rms_prop_eps",
)


class Persistence(_Base):
    """SB3's zip files, written whole or not at all, with the normalisation statistics inside."""

    hparams_class: type[PolicyGradientHparams]
    normalize_value_targets: bool
    _normalizes_rewards: bool | None

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "reward_normalizer",
            "value_normalizer",
            "_rollout_end",
            "_engine",
            "_observations_merged",
            "_lr_schedule_source",
            "_warned_short_learns",
            "_resolved",
            "_device_infos",
            "_value_function",
            "_env_id",
            "_iteration",
            "_unfinished",
            "_resumed_from",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = ["policy", "policy.optimizer"]
        if self._normalizes_rewards:
            names.append("reward_normalizer")
        if self.normalize_value_targets:
            names.append("value_normalizer")
        return names, []

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, its optimiser and its normalisation statistics in one zip file.

        The file is written beside its place and renamed, so an interrupted save leaves the old one.

        :param path: where to, ``.zip`` is added if the name has no suffix; or a file opened for writing
        :param exclude: names of attributes to leave out
        :param include: names of attributes to keep that would be left out
        """
        if not isinstance(path, (str, pathlib.Path)) or pathlib.Path(path).is_dir():
            super().save(path, exclude, include)  # nothing to rename, or SB3's rule for folders
            return
        archive = io.BytesIO()
        super().save(archive, exclude, include)
        target = pathlib.Path(path)
        write_atomically(target if target.suffix else target.with_name(f"{target.name}.zip"), archive.getvalue())

    @classmethod
    def load(
        cls, path: str | pathlib.Path | io.BufferedIOBase, env: GymEnv | None = None, *args: Any, **kwargs: Any
    ) -> Self:
        """
        Load a model. Arguments are those of SB3's ``load``; hyperparameters may be changed by keyword.

        :param path: file name, with or without ``.zip``, or an open file
        :param env: environment to continue on; None suffices to predict
        :raises TypeError: on an unknown keyword
        :raises ValueError: on a value that is not allowed, or that cannot change after construction
        """
        known = [*cls.hparams_class.names(), *PLUMBING, *_LOADABLE, *inspect.signature(cls).parameters]
        own = inspect.signature(BaseAlgorithm.load).parameters
        reject_unknown(f"{cls.__name__}.load", [name for name in kwargs if name not in own], known)
        if env is not None and "n_envs" in kwargs:  # the environments decide, as in the constructor
            cls.hparams_class.spec("n_envs").check("n_envs", kwargs.pop("n_envs"), 1.0)
        # These are compared with what was saved instead of replacing it.
        fixed = {*_FIXED_AT_CONSTRUCTION, "critic_learning_rate"} & {*cls.hparams_class.names()}
        held = {name: kwargs.pop(name) for name in fixed if name in kwargs}
        for name, value in held.items():
            cls.hparams_class.spec(name).check(name, value, 1.0)
        try:
            model = super().load(path, env, *args, **kwargs)
        except RuntimeError as error:
            if "observation_normalizer" not in str(error):
                raise
            raise ValueError(_WITHOUT_NORMALIZER.format(path=path, cls=cls.__name__)) from error
        for name, value in held.items():
            model._keep_or_refuse(name, value)
        return model

    def _keep_or_refuse(self, name: str, value: Any) -> None:
        saved = getattr(self, name)
        if name == "critic_learning_rate" and (value is None) == (saved is None):
            setattr(self, name, value)  # its value may change, whether it splits the optimiser may not
        elif value != saved:
            raise ValueError(
                f"`{name}` is part of the saved model and cannot be changed by load() (from {saved!r} to {value!r})"
            )


_WITHOUT_NORMALIZER = (
    "{path} holds a policy without observation normalisation, as SB3's PPO saves it. Build the model with "
    "{cls}(policy, env, **presets.SB3_PPO) and call its set_parameters(path)."
)
