"""
A run folder on the Hugging Face hub: ``sb3-pgplus push``. Needs the extra ``hub``.

What is uploaded is a run folder again, with a model card: ``sb3-pgplus enjoy`` plays it after the download.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sb3_pgplus.configs import ConfigError, EnvironmentSpec, read_mapping
from sb3_pgplus.construction import PLUMBING
from sb3_pgplus.files import write_atomically
from sb3_pgplus.model_file import pickled_attributes
from sb3_pgplus.playing import LoadedRun, evaluate, load_run
from sb3_pgplus.run_folder import RunFolder

try:
    from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is exported when imported
except ImportError as error:
    raise ImportError("the hub needs huggingface_hub: pip install 'sb3_pgplus[hub]'") from error

CARD = "README.md"
#: Under this name the hub shows a video beside the card.
REPLAY = "replay.mp4"


@dataclass(frozen=True)
class Package:
    """A folder that is ready to be uploaded."""

    folder: Path
    pickled: list[str]
    """What of the model is pickled, so that loading it asks for trust."""


def push(run: Path, repo: str, *, private: bool = False, message: str = "Upload a model") -> tuple[str, Package]:
    """
    Upload a run; files of the same names in the repository are replaced, others stay.

    :param run: run folder
    :param repo: ``"user/name"``; made if it is not there
    :param private: whether a new repository shall be
    :param message: of the commit
    :return: the repository's address, and what was uploaded (its folder is gone again)
    :raises ConfigError: on a name that no repository can have, or where there is no run
    :raises OSError: if the hub cannot be reached, or refuses (``hf auth login`` first)
    """
    with tempfile.TemporaryDirectory() as temporary:
        package = prepare(run, repo, Path(temporary) / "upload")
        api = HfApi(library_name="sb3_pgplus")
        try:
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=package.folder, commit_message=message)
        except (OSError, ValueError):
            raise
        except Exception as error:  # of the transport, which has no base in common with Python's
            raise ConnectionError(f"the hub cannot be reached: {error}") from error
    return str(address), package


def prepare(run: Path, repo: str, folder: Path) -> Package:
    """
    Write the folder that :func:`push` uploads: model, configuration, evaluation, learning curve, video, card.

    :param run: run folder; one without an evaluation is evaluated over 10 episodes
    :param repo: ``"user/name"``
    :param folder: is made; files of the same names are replaced
    :raises ConfigError: on a name that no repository can have, or where there is no run
    """
    _check_repo(repo)
    loaded = load_run(run, device="cpu")
    source = RunFolder(loaded.path.parent)
    if not source.config.is_file():
        raise ConfigError(f"there is no {source.config}: give a run folder")
    if loaded.path != source.model:
        raise ConfigError(
            f"{run}: give the run folder; its evaluation and learning curve belong to {source.model.name}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file, name in (
        (loaded.path, source.model.name),
        (source.config, source.config.name),
        (source.learning_curve, source.learning_curve.name),
        (source.path / "video.mp4", REPLAY),
    ):
        if file.is_file():
            shutil.copyfile(file, folder / name)
    evaluation = _evaluation(source, loaded)
    write_atomically(folder / source.evaluation.name, yaml.safe_dump(evaluation, sort_keys=False).encode())
    pickled = pickled_attributes(loaded.path)
    has_curve = source.learning_curve.is_file()
    card = model_card(repo, loaded, read_mapping(source.config), evaluation, pickled, has_curve=has_curve)
    write_atomically(folder / CARD, str(card).encode())
    return Package(folder, pickled)


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--repo {repo}: {error}") from error
    if "/" not in repo:
        raise ConfigError(f"--repo {repo}: expected user/name")


def _evaluation(source: RunFolder, loaded: LoadedRun) -> dict[str, Any]:
    if source.evaluation.is_file():
        return read_mapping(source.evaluation)
    return evaluate(loaded.model, loaded.environment, backend=loaded.backend).summary()


# --- the card ---------------------------------------------------------------------------------------------------------


def model_card(
    repo: str,
    run: LoadedRun,
    config: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    pickled: list[str],
    *,
    has_curve: bool,
) -> ModelCard:
    """
    The model card: the hub's metadata, how to use the model, and how it was trained.

    :param repo: ``"user/name"``
    :param run: the model and its environment
    :param config: of the run
    :param evaluation: of the run
    :param pickled: what of the model is pickled
    :param has_curve: whether there is a picture of the learning curve
    """
    algorithm = type(run.model).__name__
    env = run.environment.env.rpartition(":")[2]
    reward = f"{evaluation['mean_return']:.2f} +/- {evaluation['std_return']:.2f}"
    curve = "\n![Episode returns against environment steps](learning_curve.png)\n" if has_curve else ""
    actions = "deterministic actions" if evaluation["deterministic"] else "sampled actions"
    text = f"""# {algorithm} playing {env}

A {algorithm} agent, trained with `sb3_pgplus`: policy-gradient algorithms with all implementation tricks, in the
interface of [Stable-Baselines3](https://github.com/DLR-RM/stable-baselines3).

Mean return **{reward}** over {evaluation["n_episodes"]} episodes ({actions}, seed {evaluation["seed"]}).
{curve}
## Usage

```bash
pip install "sb3_pgplus[hub]"
```

{_usage(repo, run, algorithm, pickled)}
Evaluate it, or watch it:

```bash
hf download {repo} --local-dir model
sb3-pgplus evaluate model
sb3-pgplus enjoy model
```

## Training

{_training(config)}
{_table_of_changes(run, config)}
"""
    return ModelCard(f"---\n{_metadata(algorithm, env, reward).to_yaml()}\n---\n\n{text}")


def _metadata(algorithm: str, env: str, reward: str) -> ModelCardData:
    result = EvalResult(
        task_type="reinforcement-learning",
        task_name="reinforcement-learning",
        dataset_type=env,
        dataset_name=env,
        metric_type="mean_reward",  # the hub's name for the mean return
        metric_name="mean_reward",
        metric_value=reward,
        verified=False,
    )
    return ModelCardData(
        library_name="stable-baselines3",
        tags=[env, "deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3", "sb3_pgplus"],
        pipeline_tag="reinforcement-learning",
        model_name=algorithm,
        eval_results=[result],
    )


def _usage(repo: str, run: LoadedRun, algorithm: str, pickled: list[str]) -> str:
    trust, note = "False", ""
    if pickled:
        trust = "True"
        note = (
            f"Loading this model runs code in its file, because it holds pickles: {', '.join(pickled)}. Do so only if "
            f"you trust who uploaded it. With `trusted=False` it is refused, unless you give these yourself.\n\n"
        )
    spec = run.environment
    if spec == EnvironmentSpec(spec.env, spec.env_kwargs):  # neither wrapped nor stacked
        imports = f"from sb3_pgplus import {algorithm}, make_vec_env"
        make = f"make_vec_env({spec.env!r}{f', env_kwargs={spec.env_kwargs!r}' if spec.env_kwargs else ''})"
    else:
        imports = (
            f"from sb3_pgplus import {algorithm}\n"
            "from sb3_pgplus.configs import EnvironmentSpec\n"
            "from sb3_pgplus.environments import make_environments"
        )
        make = f"make_environments({spec!r})"
    return f"""{note}```python
from huggingface_hub import hf_hub_download
{imports}

model = {algorithm}.load(hf_hub_download({repo!r}, "model.zip"), trusted={trust})
env = {make}
obs = env.reset()
for _ in range(1000):
    action, _ = model.predict(obs, deterministic=True)
    obs, reward, done, info = env.step(action)
```
"""


def _training(config: Mapping[str, Any]) -> str:
    names = ("n_timesteps", "n_envs", "seed", "policy", "backend")
    versions = {name: value for name, value in (config.get("made_with") or {}).items() if name != "backend"}
    rows = [f"* {name}: `{config[name]}`" for name in names if config.get(name) is not None]
    rows += [f"* versions: {', '.join(f'{name} {value}' for name, value in versions.items())}"] * bool(versions)
    return "\n".join(rows)


def _table_of_changes(run: LoadedRun, config: Mapping[str, Any]) -> str:
    hparams_class: Any = getattr(type(run.model), "hparams_class", None)
    defaults = PLUMBING | (hparams_class.defaults() if hparams_class else {})
    shown_above = ("n_envs", "seed")
    changed = {
        name: config[name]
        for name in defaults
        if name in config and name not in shown_above and config[name] != defaults[name]
    }
    if not changed:
        return "\nAll hyperparameters are the defaults; [config.yml](config.yml) has them all."
    rows = [f"| `{name}` | `{value}` | `{defaults[name]}` |" for name, value in changed.items()]
    head = ["\nHyperparameters that differ from the defaults; [config.yml](config.yml) has all of them:\n"]
    return "\n".join([*head, "| Name | Value | Default |", "|---|---|---|", *rows])
