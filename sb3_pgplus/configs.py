"""
Which settings a run uses: a block of ``zoo_configs`` or of the user's own YAML file, with ``--set name=value`` on top.

The files are in rl_zoo3's format (environment ids as keys, ``default`` for the rest), so its tuned settings can be
used as they are.
"""

from __future__ import annotations

import ast
import importlib
import math
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sb3_pgplus.hparams import nearest
from sb3_pgplus.vec_env.make import BACKENDS

if TYPE_CHECKING:
    from sb3_pgplus.on_policy import PolicyGradientPlus

ALGORITHMS = {"ppoplus": "PPOPlus", "a2cplus": "A2CPlus", "trpoplus": "TRPOPlus"}
"""rl_zoo3 maps a class to its key by ``name.lower()``, hence no underscores."""

RUN_KEYS = ("algo", "env", "seed", "n_envs", "backend", "n_timesteps", "policy")
ENVIRONMENT_KEYS = ("env_kwargs", "env_wrapper", "frame_stack")
IGNORED_KEYS = ("made_with", "options")
UNSUPPORTED_KEYS = ("callback", "monitor_kwargs", "vec_env_wrapper")
DEFAULT_N_TIMESTEPS = 1_000_000


class ConfigError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do instead."""


# --- YAML ------------------------------------------------------------------------------------------------------------


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's floats and Python's None: PyYAML reads ``1e-3`` and ``None`` as strings."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^None$"), ["N"])


def parse_yaml(text: str, origin: str) -> Any:
    """
    Parse YAML, with every parse error turned into one line that names the place.

    :param text: the YAML document
    :param origin: what the text is, for the error message
    :raises ConfigError: if it is not YAML
    """
    try:
        # A subclass of SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin}{place}: not valid YAML ({getattr(error, 'problem', None) or error})") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """
    Read a YAML file whose top level is a mapping.

    :param path: the file
    :raises ConfigError: if there is no such file, it is not YAML or not a mapping
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: expected a mapping of names to values, got {type(content).__name__}")
    return content


# --- rl_zoo3 writes Python inside YAML: policy_kwargs: "dict(net_arch=[64], activation_fn=nn.ReLU)" ------------------


def parse_python_value(text: str) -> Any:
    """
    Read the Python expressions rl_zoo3 puts into YAML strings, without running them.

    Literals, ``dict(…)`` and dotted names are understood.

    :param text: for example ``"dict(log_std_init=-2, activation_fn=nn.ReLU)"``
    :return: plain values; a dotted name stays a string, :func:`resolve_objects` imports it later
    :raises ConfigError: for any other expression
    """
    try:
        return _plain_value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"cannot read {text!r}: only literals, dict(…) and names such as nn.ReLU are understood; write it as YAML"
        ) from error


def _plain_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: _plain_value(keyword.value) for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        keys = [_plain_value(key) for key in node.keys if key is not None]
        return dict(zip(keys, [_plain_value(value) for value in node.values], strict=True))
    if isinstance(node, ast.List | ast.Tuple):
        return [_plain_value(element) for element in node.elts]
    if isinstance(node, ast.Attribute):
        return ast.unparse(node)
    return ast.literal_eval(node)


def resolve_objects(settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    Import what YAML can only name: in entries called ``…_class`` and ``…_fn``, ``nn.ReLU`` becomes the class.

    :param settings: keyword arguments as read from YAML
    :return: a copy with classes in place of their names, also inside nested mappings
    """
    resolved: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            resolved[name] = resolve_objects(value)
        elif isinstance(value, str) and "." in value and name.endswith(("_class", "_fn")):
            resolved[name] = import_object(value)
        else:
            resolved[name] = value
    return resolved


def import_object(dotted_name: str) -> Any:
    """
    Import ``package.module.Name``; ``nn`` and ``th`` are understood as in SB3's own code.

    :param dotted_name: where the object is
    :raises ConfigError: if it is not there
    """
    head, _, rest = dotted_name.partition(".")
    full_name = {"nn": "torch.nn", "th": "torch"}.get(head, head) + "." + rest
    module_name, _, attribute = full_name.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import {dotted_name!r}: {error}") from error


# --- which algorithms, which block ------------------------------------------------------------------------------------


def algorithm_names() -> list[str]:
    """Return the command line's names of the algorithms this version of the package has."""
    package = importlib.import_module("sb3_pgplus")
    return [name for name, class_name in ALGORITHMS.items() if hasattr(package, class_name)]


def algorithm_class(name: str) -> type[PolicyGradientPlus[Any]]:
    """
    Find the class behind ``--algo``.

    :param name: ``"ppoplus"``; upper and lower case are the same
    :raises ConfigError: if there is no such algorithm
    """
    known = algorithm_names()
    if name.lower() not in known:
        raise ConfigError(f"unknown algorithm {name!r}{nearest(name.lower(), known)}; known: {', '.join(known)}")
    found: type[PolicyGradientPlus[Any]] = getattr(importlib.import_module("sb3_pgplus"), ALGORITHMS[name.lower()])
    return found


def default_n_envs(algo: str) -> int:
    """
    How many environments the algorithm's constructor makes by itself.

    :param algo: name of the algorithm
    """
    return int(algorithm_class(algo).hparams_class.defaults()["n_envs"])


def packaged_config(algo: str) -> Path:
    """
    Locate ``zoo_configs/<algo>.yml``: inside the installed package, or beside it in a source checkout.

    :param algo: name of the algorithm
    """
    package = Path(__file__).resolve().parent
    folders = (package / "zoo_configs", package.parent / "zoo_configs")
    return next((path for folder in folders if (path := folder / f"{algo}.yml").is_file()), folders[0] / f"{algo}.yml")


def select_block(content: Mapping[str, Any], env: str, origin: str) -> tuple[dict[str, Any], str]:
    """
    Pick the settings for one environment.

    :param content: a whole file: one flat mapping, or rl_zoo3's blocks by environment id
    :param env: environment id
    :param origin: the file's name for messages
    :return: the settings and, in words, where they come from
    :raises ConfigError: if the file has blocks, but none for this environment
    """
    if not content:
        return {}, f"{origin} (empty: the constructor's defaults)"
    is_atari = env.startswith("ALE/") or "NoFrameskip" in env
    for name in (env, *(["atari"] if is_atari else []), "default"):
        if name in content:
            if not isinstance(content[name], dict | None):
                raise ConfigError(f"{origin}: the block {name} must hold names and values, got {content[name]!r}")
            block = dict(content[name] or {})
            if name == "default" and block.get("policy") == "MlpPolicy":
                # rl_zoo3 wants a policy in every block, but this one cannot know the observations: choose by them.
                del block["policy"]
            return block, f"{origin}, block {name}"
    # A flat file may hold nothing but mappings too, for example only `policy_kwargs`.
    has_values = not all(isinstance(value, dict) for value in content.values())
    if has_values or any(name.endswith("_kwargs") for name in content):
        return dict(content), origin
    raise ConfigError(f"{origin} has no block for {env} and no default; it has: {', '.join(content)}")


# --- --set ------------------------------------------------------------------------------------------------------------


def parse_assignment(text: str) -> tuple[list[str], Any]:
    """
    Read one ``--set name=value``; the value is YAML, a dotted name reaches into a mapping.

    :param text: for example ``"policy_kwargs.net_arch=[64, 64]"``
    :return: the path of names and the value
    :raises ConfigError: if it has no ``=`` or no name
    """
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: expected name=value, as in --set n_epochs=5")
    return path, parse_yaml(value, f"--set {text}")


def assign(settings: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """
    Set one value in nested mappings, keeping what else they hold.

    :param settings: changed in place
    :param path: names from outside to inside
    :param value: the new value
    """
    *outer, last = path
    for depth, name in enumerate(outer, start=1):
        inner = settings.get(name)
        inner = parse_python_value(inner) if isinstance(inner, str) else inner
        if inner is not None and not isinstance(inner, dict):
            dotted = ".".join(path[:depth])
            raise ConfigError(f"--set {'.'.join(path)}: {dotted} is {inner!r}, which has no names inside")
        settings[name] = dict(inner or {})
        settings = settings[name]
    settings[last] = value


# --- everything together ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvironmentSpec:
    """An environment as the configuration describes it; the same for training, evaluation and video."""

    env: str
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    env_wrapper: Any = None
    frame_stack: int | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> EnvironmentSpec:
        """
        Take the environment's part out of a configuration.

        :param settings: a resolved configuration with at least ``env``
        :raises ConfigError: if a part has the wrong type
        """
        env_kwargs = settings.get("env_kwargs") or {}
        if isinstance(env_kwargs, str):
            env_kwargs = parse_python_value(env_kwargs)
        if not isinstance(env_kwargs, dict):
            raise ConfigError(f"env_kwargs must be a mapping, got {env_kwargs!r}")
        frame_stack = settings.get("frame_stack")
        return cls(
            env=settings["env"],
            env_kwargs=env_kwargs,
            env_wrapper=settings.get("env_wrapper"),
            frame_stack=None if frame_stack is None else whole_number("frame_stack", frame_stack),
        )

    def settings(self) -> dict[str, Any]:
        """Return the entries of ``config.yml`` that describe the environment; what is not used is left out."""
        optional = {"env_kwargs": self.env_kwargs, "env_wrapper": self.env_wrapper, "frame_stack": self.frame_stack}
        return {"env": self.env} | {name: value for name, value in optional.items() if value}


@dataclass(frozen=True)
class RunSettings:
    """Everything a training run needs to know, after all sources have been merged."""

    algo: str
    environment: EnvironmentSpec
    seed: int
    n_envs: int
    backend: str
    n_timesteps: int
    policy: str | None
    hyperparameters: dict[str, Any]
    """Keyword arguments of the constructor, as written in YAML."""
    source: str
    """In words: which block of which file the settings were taken from."""


def resolve_settings(
    *,
    algo: str | None = None,
    env: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    n_envs: int | None = None,
    backend: str | None = None,
    n_timesteps: float | None = None,
    seed: int | None = None,
) -> RunSettings:
    """
    Merge all sources: ``overrides`` > the other arguments > the configuration > the constructor's defaults.

    :param algo: name of the algorithm, by default the configuration's, else ``ppoplus``
    :param env: environment id, by default the configuration's
    :param config: YAML file used in place of ``zoo_configs/<algo>.yml``; a run folder's ``config.yml`` repeats that run
    :param overrides: ``name=value`` strings
    :param n_envs: number of environments side by side
    :param backend: what runs them, see :func:`sb3_pgplus.vec_env.make_vec_env`
    :param n_timesteps: total number of environment steps; ``1e6`` is fine
    :param seed: random seed
    :raises ConfigError: if a source cannot be read or says something impossible
    """
    content = None if config is None else read_mapping(Path(config))
    algo = str(algo or (content or {}).get("algo") or "ppoplus").lower()
    algorithm_class(algo)
    env = env or (content or {}).get("env")
    if not isinstance(env, str):
        raise ConfigError("which environment? Give --env, for example --env CartPole-v1")
    block, source = _base_block(algo, env, content, config)
    given: dict[str, Any] = {"algo": algo, "env": env, "seed": seed, "n_envs": n_envs, "backend": backend}
    given["n_timesteps"] = n_timesteps
    block |= {name: value for name, value in given.items() if value is not None}
    if overrides:
        source = f"{source} and --set"
    for text in overrides:
        path, value = parse_assignment(text)
        if path[0] in ("algo", "env"):
            raise ConfigError(f"--set {text}: use --{path[0]} for that, it decides which settings are read")
        assign(block, path, value)
    return _settings_from(block, source)


def _base_block(
    algo: str, env: str, content: dict[str, Any] | None, config: str | Path | None
) -> tuple[dict[str, Any], str]:
    if content is not None:
        return select_block(content, env, str(config))
    packaged = packaged_config(algo)
    if not packaged.is_file():
        return {}, "the constructor's defaults"
    return select_block(read_mapping(packaged), env, f"zoo_configs/{packaged.name}")


def _settings_from(block: dict[str, Any], source: str) -> RunSettings:
    refused = [name for name in UNSUPPORTED_KEYS if block.get(name)]
    if refused:
        raise ConfigError(f"{source}: {', '.join(refused)} of rl_zoo3 is not supported by this command; remove it")
    known = {*RUN_KEYS, *ENVIRONMENT_KEYS, *IGNORED_KEYS, *UNSUPPORTED_KEYS, "normalize"}
    hyperparameters = {name: value for name, value in block.items() if name not in known}
    if isinstance(hyperparameters.get("policy_kwargs"), str):
        hyperparameters["policy_kwargs"] = parse_python_value(hyperparameters["policy_kwargs"])
    policy = block.get("policy")
    if policy is not None and not isinstance(policy, str):
        raise ConfigError(f"policy must be a name such as MlpPolicy, got {policy!r}")
    return RunSettings(
        algo=block["algo"],
        environment=EnvironmentSpec.from_settings(block),
        seed=whole_number("seed", block.get("seed", 0), minimum=0),
        n_envs=whole_number("n_envs", block.get("n_envs", default_n_envs(block["algo"]))),
        backend=known_backend(block.get("backend", "auto")),
        n_timesteps=whole_number("n_timesteps", block.get("n_timesteps", DEFAULT_N_TIMESTEPS)),
        policy=policy,
        hyperparameters=normalization_switches(block.get("normalize")) | hyperparameters,
        source=source,
    )


def known_backend(name: Any) -> str:
    """
    :param name: of what runs the environments
    :raises ConfigError: if there is no such backend
    """
    known = ["auto", *BACKENDS]
    if name not in known:
        raise ConfigError(f"unknown backend {name!r}{nearest(str(name), known)}; known: {', '.join(known)}")
    return str(name)


def normalization_switches(normalize: Any) -> dict[str, Any]:
    """
    Translate rl_zoo3's ``normalize`` (a ``VecNormalize`` around the environment) to our normalisation inside the model.

    :param normalize: nothing, a boolean, or ``{norm_obs: …, norm_reward: …}``, also as rl_zoo3's string
    :return: keyword arguments for the constructor
    :raises ConfigError: if it asks for what the model's own normalisation has no switch for
    """
    if normalize is None:
        return {}
    if isinstance(normalize, str):
        normalize = parse_python_value(normalize)
    if isinstance(normalize, bool):
        return {"normalize_observations": normalize, "normalize_rewards": normalize}
    if not isinstance(normalize, dict) or set(normalize) - {"norm_obs", "norm_reward"}:
        raise ConfigError(
            f"normalize: {normalize!r} is not supported: write true, false or {{norm_obs: …, norm_reward: …}}, "
            "and use the algorithm's own normalisation settings for the rest"
        )
    return {
        "normalize_observations": bool(normalize.get("norm_obs", True)),
        "normalize_rewards": bool(normalize.get("norm_reward", True)),
    }


def whole_number(name: str, value: Any, minimum: int = 1) -> int:
    """
    Accept ``1e6`` and ``1_000_000`` where a whole number is meant.

    :param name: for the message
    :param value: what was given
    :param minimum: smallest allowed number
    :raises ConfigError: for anything but a whole number from ``minimum`` up
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value) or value < minimum:
        raise ConfigError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    return int(value)


def this_command() -> str:
    """What to type for this same program again."""
    started_as = Path(sys.argv[0])
    if started_as.stem != "sb3-pgplus":
        return "python -m sb3_pgplus.cli"
    return "sb3-pgplus" if shutil.which("sb3-pgplus") else shlex.quote(str(started_as))
