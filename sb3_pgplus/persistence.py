"""The part of the base class that saves and loads."""

import inspect
import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch as th
from stable_baselines3.common.save_util import load_from_zip_file, open_path, recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, TensorDict

from sb3_pgplus.construction import PLUMBING, reject_unknown
from sb3_pgplus.errors import HyperparameterError, ModelFileError, UntrustedModelError
from sb3_pgplus.files import write_atomically
from sb3_pgplus.hparams import PolicyGradientHparams
from sb3_pgplus.model_file import ModelFile, PathOrFile, as_bytes, encode_attributes, read
from sb3_pgplus.optimizers import check_fits
from sb3_pgplus.sb3_files import algorithm_of, saved_by_sb3, translated
from sb3_pgplus.serialization import pickled_parts

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
#: The same, and what `load` may change because it builds anew.
_BUILT_IN = (*_FIXED_AT_CONSTRUCTION, "clip_observations", "n_steps")


class Persistence(_Base):
    """SB3's zip files, written whole or not at all, with the normalisation statistics inside."""

    hparams_class: type[PolicyGradientHparams]
    #: The stock algorithm whose files can be loaded, and its defaults in our names.
    sb3_name: ClassVar[str]
    sb3_preset: ClassVar[Mapping[str, Any]]
    normalize_value_targets: bool
    _normalizes_rewards: bool | None
    #: Hyperparameters that are part of policy or buffer, as they were when those were made.
    _built_with: Mapping[str, Any]

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "reward_normalizer",
            "value_normalizer",
            "_rollout_end",
            "_engine",
            "_observations_merged",
            "_advantages_replaced",
            "_is_logged",
            "_unlogged",
            "_lr_schedule_source",
            "_warned_short_learns",
            "_resolved",
            "_built_with",
            "_device_infos",
            "_value_function",
            "_env_id",
            "_iteration",
            "_unfinished",
            "_resumed_from",
            "_checkpoint_folder",
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
        path: PathOrFile,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, its optimiser and its normalisation statistics in one zip file.

        The file is written beside its place and renamed, so an interrupted save leaves the old one. It holds a pickle
        only where you have put in a class or function of your own; with ``verbose=1`` saving says where.

        :param path: where to, ``.zip`` is added if the name has no suffix; or a file opened for writing
        :param exclude: names of attributes to leave out
        :param include: names of attributes to keep that would be left out
        :raises TypeError: naming an attribute that cannot be saved
        :raises HyperparameterError: (a ValueError) naming a setting that was assigned to a model built with another
        """
        self._refuse_changes_of_what_is_built()
        state_dict_names, variable_names = self._get_torch_save_params()
        left_out = {name.split(".")[0] for name in (*state_dict_names, *variable_names)}
        left_out |= {*(exclude or ()), *self._excluded_save_params()} - {*(include or ())}
        entries = encode_attributes({name: value for name, value in self.__dict__.items() if name not in left_out})
        variables = {name: recursive_getattr(self, name) for name in variable_names}
        content = as_bytes(entries, self.get_parameters(), variables)
        pickled = [part for name, entry in entries.items() for part in pickled_parts(entry, name)]
        if pickled and self.verbose >= 1:
            print(f"Loading {path} will ask for trust, because it holds pickles: {', '.join(pickled)}")
        if isinstance(path, (str, pathlib.Path)):
            target = pathlib.Path(path)
            is_whole = target.suffix and not target.is_dir()
            write_atomically(target if is_whole else target.with_name(f"{target.name}.zip"), content)
        else:
            open_path(path, "w", suffix="zip").write(content)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Put parameters in place, as SB3 does; a file of SB3's will do, too, and no pickle in it is loaded.

        :param load_path_or_dict: a model's file, or name → ``state_dict``
        :param exact_match: ask for all parameters, and no others
        :param device: where to load them
        :raises ModelFileError: if the file is damaged
        :raises ValueError: if the parameters are not this model's
        """
        params: Any = load_path_or_dict
        if not isinstance(params, dict):
            _, params, _ = load_from_zip_file(read(params).for_sb3(), load_data=False, device=device)
        for name in {*params} & {*self._get_torch_save_params()[0]}:
            optimizer = recursive_getattr(self, name)
            if isinstance(optimizer, th.optim.Optimizer):
                check_fits(params[name], optimizer)
        super().set_parameters(params, exact_match, device)

    @classmethod
    def load(
        cls,
        path: PathOrFile,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        trusted: bool = True,
        **kwargs: Any,
    ) -> Self:
        """
        Load a model; hyperparameters may be changed by keyword. Files of the stock algorithm are continued as it would.

        :param path: file name, with or without ``.zip``, or an open file
        :param env: environment to continue on; None suffices to predict
        :param device: where the networks shall be
        :param custom_objects: attribute → value to take instead of the file's, whatever that is
        :param print_system_info: print what the file was saved on, and what it is loaded on
        :param force_reset: reset the environments before training goes on
        :param trusted: False: load no pickle and import nothing that the file names; a file that needs it is refused
        :param kwargs: hyperparameters and other constructor arguments that shall be different
        :raises TypeError: on an unknown keyword
        :raises ValueError: on a value that is not allowed, or that cannot change after construction
        :raises ModelFileError: (a ValueError) on a file that is damaged or another algorithm's
        :raises UntrustedModelError: (a ModelFileError) on one that cannot be loaded with ``trusted=False``
        """
        held = cls._checked_changes(env, kwargs)
        file = read(path)
        attributes = file.attributes(trusted=trusted, custom_objects=custom_objects)
        if not trusted:
            cls._refuse_names({name: v for name, v in attributes.items() if name not in (custom_objects or {})}, file)
        if not file.is_ours and saved_by_sb3(file.data):
            attributes = translated(attributes, cls.sb3_name, cls.sb3_preset, file.name)
        elif not {*cls.hparams_class.names()} <= file.data.keys():  # another algorithm's, or older than one of them
            saved_by = algorithm_of(file.data)
            if saved_by != algorithm_of(cls.hparams_class.names()):
                message = f"{file.name} is a model of {saved_by}Plus: load it with that, not with {cls.__name__}"
                raise ModelFileError(message)
        archive = file.for_sb3(attributes)
        try:
            model = super().load(archive, env, device, attributes, print_system_info, force_reset, **kwargs)
        except (ValueError, TypeError):  # which say what is wrong, and where
            raise
        except Exception as error:
            if trusted and not isinstance(error, KeyError):
                raise
            raise ModelFileError(f"{file.name} is not complete, or does not fit together: {error}") from error
        model._set_variables(file)
        for name, value in held.items():
            model._keep_or_refuse(name, value)
        return model

    @classmethod
    def _checked_changes(cls, env: GymEnv | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Check what ``load`` shall change; what is compared with the file instead of replacing it comes back."""
        known = [*cls.hparams_class.names(), *PLUMBING, *_LOADABLE, *inspect.signature(cls).parameters]
        reject_unknown(f"{cls.__name__}.load", kwargs, known)
        if env is not None and "n_envs" in kwargs:  # the environments decide, as in the constructor
            cls.hparams_class.spec("n_envs").check("n_envs", kwargs.pop("n_envs"), 1.0)
        fixed = {*_FIXED_AT_CONSTRUCTION, "critic_learning_rate"} & {*cls.hparams_class.names()}
        held = {name: kwargs.pop(name) for name in fixed if name in kwargs}
        for name, value in held.items():
            cls.hparams_class.spec(name).check(name, value, 1.0)
        if "use_sde" in kwargs:
            held["use_sde"] = kwargs.pop("use_sde")
        return held

    @classmethod
    def _refuse_names(cls, attributes: Mapping[str, Any], file: ModelFile) -> None:
        """Values without a pickle that would have a module imported or one of our methods replaced."""
        for name, value in attributes.items():
            names_a_module = name == "env" or (name == "rollout_buffer_class" and isinstance(value, str))
            if names_a_module or callable(getattr(cls, name, None)):
                raise UntrustedModelError(
                    f"{file.name} sets `{name}` to {value!r:.80}, which only a file that you trust may do: load it "
                    f"with trusted=True, or give the attribute yourself: custom_objects={{{name!r}: …}}"
                )

    def _set_variables(self, file: ModelFile) -> None:
        """What SB3 would do for any name in the file."""
        if undeclared := file.variables.keys() - self._get_torch_save_params()[1]:
            raise ModelFileError(f"{file.name} sets {undeclared}, which are no tensors that this class saves")
        for name, value in file.variables.items():
            if value is not None:
                recursive_getattr(self, name).data = value.data.to(self.device)

    def _note_what_is_built(self) -> None:
        names = [name for name in _BUILT_IN if name in self.hparams_class.names()]
        self._built_with = {name: getattr(self, name) for name in names}

    def _refuse_changes_of_what_is_built(self) -> None:
        """
        :raises HyperparameterError: on a new value that would do nothing here, and something in a loaded model
        """
        for name, before in self._built_with.items():
            now = getattr(self, name)
            if name == "n_steps" and now == self.rollout_buffer.buffer_size:
                continue  # together with a buffer of that size, as scripts for SB3 do it
            if now is not before and now != before:
                instead = "" if name in _FIXED_AT_CONSTRUCTION else f", or load the saved one with {name}={now!r}"
                raise HyperparameterError(
                    f"`{name}` was {before!r} when the model was built, and cannot become {now!r}: "
                    f"make a new model{instead}"
                )

    def _keep_or_refuse(self, name: str, value: Any) -> None:
        saved = getattr(self, name)
        if name == "critic_learning_rate" and (value is None) == (saved is None):
            setattr(self, name, value)  # its value may change, whether it splits the optimiser may not
        elif value != saved:
            raise ValueError(
                f"`{name}` is part of the saved model and cannot be changed by load() (from {saved!r} to {value!r})"
            )
