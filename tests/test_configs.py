"""Which settings a run uses: the packaged files, the user's file, `--set`, and in which order."""

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces

from sb3_pgplus import configs, environments, presets
from sb3_pgplus.configs import ConfigError, parse_assignment, parse_yaml, resolve_settings
from sb3_pgplus.construction import PLUMBING
from sb3_pgplus.schedules import as_schedule, describe_schedule

#: No packaged file has a block for it.
UNLISTED = "Taxi-v3"
ZOO_CONFIGS = sorted((Path(__file__).resolve().parents[1] / "zoo_configs").glob("*.yml"))
BLOCKS = [
    pytest.param(path, env, id=f"{path.stem}-{env}")
    for path in ZOO_CONFIGS
    for env in yaml.safe_load(path.read_text(encoding="utf-8"))
]


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yml"
    path.write_text(text, encoding="utf-8")
    return path


# --- the packaged files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "env"), BLOCKS)
def test_every_setting_of_the_packaged_files_is_known_and_allowed(path: Path, env: str) -> None:
    settings = resolve_settings(algo=path.stem, env=env if env != "default" else UNLISTED)
    hparams = configs.algorithm_class(path.stem).hparams_class
    plumbing = settings.hyperparameters.keys() - set(hparams.names())
    assert plumbing <= PLUMBING.keys()
    values = hparams.defaults() | settings.hyperparameters
    for progress_remaining in (1.0, 0.5, 0.0):
        hparams.resolve(values, progress_remaining)


@pytest.mark.parametrize(("path", "env"), BLOCKS)
def test_packaged_minibatches_fill_each_rollout_exactly(path: Path, env: str) -> None:
    settings = resolve_settings(algo=path.stem, env=env if env != "default" else UNLISTED)
    values = configs.algorithm_class(path.stem).hparams_class.defaults() | settings.hyperparameters
    if "batch_size" in values:
        assert values["n_steps"] * settings.n_envs % values["batch_size"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("path", "env"), BLOCKS)
def test_the_packaged_settings_train_in_their_environment(path: Path, env: str) -> None:
    name = {"atari": "BreakoutNoFrameskip-v4", "default": "FrozenLake-v1"}.get(env, env)
    if "Lander" in env or "Walker-v3" in env:
        pytest.importorskip("Box2D")
    short = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "n_critic_updates": 1}
    settings = resolve_settings(algo=path.stem, env=name, n_envs=2)
    cls = configs.algorithm_class(path.stem)
    made = environments.make_environments(settings.environment, n_envs=2, seed=0)
    policy = settings.policy or environments.policy_for(made.observation_space)
    arguments = settings.hyperparameters | {key: short[key] for key in short if key in cls.hparams_class.names()}
    model = cls(policy, made, device="cpu", **arguments)
    before = model.policy.parameters_to_vector()
    model.learn(32)
    made.close()
    assert np.isfinite(model.policy.parameters_to_vector()).all()
    assert not np.array_equal(before, model.policy.parameters_to_vector())


@pytest.mark.parametrize("path", ZOO_CONFIGS, ids=lambda path: path.stem)
def test_plain_pyyaml_reads_the_packaged_files_as_we_do(path: Path) -> None:
    # rl_zoo3 reads them with PyYAML, for which 1e-3 is a string.
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text) == parse_yaml(text, path.name)


@pytest.mark.parametrize("path", ZOO_CONFIGS, ids=lambda path: path.stem)
def test_the_default_block_leaves_the_hyperparameters_to_the_constructor(path: Path) -> None:
    settings = resolve_settings(algo=path.stem, env=UNLISTED)
    assert settings.hyperparameters == {}
    assert settings.source == f"zoo_configs/{path.name}, block default"


@pytest.mark.parametrize(("path", "env"), BLOCKS)
def test_rl_zoo3_finds_what_it_demands_in_every_block(path: Path, env: str) -> None:
    block = yaml.safe_load(path.read_text(encoding="utf-8"))[env]
    assert block.keys() >= {"n_timesteps", "policy"}


def test_the_budgets_of_the_learning_targets() -> None:
    assert resolve_settings(env="CartPole-v1").n_timesteps <= 100_000
    assert resolve_settings(env="Pendulum-v1").n_timesteps <= 150_000


@pytest.mark.parametrize("path", ZOO_CONFIGS, ids=lambda path: path.stem)
def test_every_packaged_file_has_settings_for_the_usual_environments(path: Path) -> None:
    listed = set(yaml.safe_load(path.read_text(encoding="utf-8")))
    mujoco = {name for name, spec in gym.registry.items() if spec.namespace is None and _is_mujoco_v5(spec)}
    assert len(mujoco) == 11
    others = {"CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"}
    others |= {"LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3", "atari", "default"}
    assert listed == mujoco | others


def _is_mujoco_v5(spec: Any) -> bool:
    return spec.version == 5 and "envs.mujoco" in str(spec.entry_point)


# --- the ablation -----------------------------------------------------------------------------------------------------

#: File → what it changes, on top of which other file or of the constructor's defaults.
ABLATION: dict[str, tuple[str | None, dict[str, Any]]] = {
    "ppoplus": (None, {}),
    "no_policy_clip": (None, {"clip_range": None}),
    "no_value_clip": (None, {"clip_range_vf": None}),
    "no_gae": (None, {"advantage_estimator": "monte_carlo"}),
    "no_advantage_normalization": (None, {"normalize_advantage": False}),
    "with_kl_penalty": (None, {"kl_coef": 1.0}),
    "with_entropy_bonus": (None, {"ent_coef": 0.01}),
    "no_reward_normalization": (None, {"normalize_rewards": False}),
    "no_reward_clip": (None, {"clip_rewards": None}),
    "no_observation_normalization": (None, {"normalize_observations": False}),
    "no_observation_clip": (None, {"clip_observations": None}),
    "no_orthogonal_init": (None, {"ortho_init": False}),
    "no_clip_annealing": (None, {"clip_range": 0.2}),
    "no_learning_rate_annealing": (None, {"learning_rate": 3e-4}),
    "no_adam_eps": (None, {"adam_eps": 1e-8}),
    "no_tanh": (None, {"activation_fn": "relu"}),
    "no_gradient_clip": (None, {"max_grad_norm": None}),
    "no_truncation_bootstrap": (None, {"bootstrap_truncated": False}),
    "no_recomputed_advantages": (None, {"recompute_advantages": False}),
    "with_value_target_normalization": (None, {"normalize_value_targets": True}),
    "with_critic_learning_rate": (None, {"critic_learning_rate": "lin_0.001"}),
    "with_critic_epochs": (None, {"n_critic_epochs": 20}),
    "no_initial_log_std": (None, {"log_std_init": None}),
    "ppo": (None, {"log_std_init": None, "recompute_advantages": False}),
    "ppo_noclip": ("ppo", {"clip_range": None}),
    "ppo_m": (
        "ppo",
        {
            "learning_rate": 3e-4,
            "clip_range": 0.2,
            "clip_range_vf": None,
            "normalize_rewards": False,
            "clip_observations": None,
            "ortho_init": False,
        },
    ),
    "trpo_plus": (
        None,
        {
            "n_critic_updates": 10,
            "cg_max_steps": 10,
            "line_search_shrinking_factor": 0.5,
            "fisher_sub_sampling_factor": 10,
            "learning_rate": "lin_0.0003",
        },
    ),
    # What PPO-M leaves out, as far as TRPO has it.
    "trpo": (
        "trpo_plus",
        {
            "learning_rate": 3e-4,
            "clip_range_vf": None,
            "normalize_rewards": False,
            "clip_observations": None,
            "ortho_init": False,
        },
    ),
}
ABLATION_FOLDER = Path(__file__).resolve().parents[1] / "zoo_configs" / "ablation"


def ablation_settings(name: str) -> configs.RunSettings:
    algo = "trpoplus" if name.startswith("trpo") else "ppoplus"
    return resolve_settings(algo=algo, env="CartPole-v1", config=ABLATION_FOLDER / f"{name}.yml")


def with_defaults(name: str | None, algo: str) -> dict[str, Any]:
    written = {} if name is None else ablation_settings(name).hyperparameters
    return configs.algorithm_class(algo).hparams_class.defaults() | written


def test_the_ablation_has_no_file_but_those_tested_here() -> None:
    assert {path.stem for path in ABLATION_FOLDER.iterdir()} == ABLATION.keys()


@pytest.mark.parametrize("name", ABLATION)
def test_a_file_of_the_ablation_changes_exactly_what_its_name_says(name: str) -> None:
    base, difference = ABLATION[name]
    settings = ablation_settings(name)
    ours, theirs = with_defaults(name, settings.algo), with_defaults(base, settings.algo)
    if base is None and settings.algo == "ppoplus":
        difference = {"gae_lambda": 0.95, **difference}  # in all of these files, as in the paper
    assert {key: value for key, value in ours.items() if value != theirs[key]} == difference
    if base is None:
        assert settings.hyperparameters == difference  # nothing is repeated
    assert (settings.n_envs, settings.n_timesteps) == (1, 1_000_000)


@pytest.mark.parametrize("name", ABLATION)
def test_the_settings_of_the_ablation_make_a_model_that_trains(name: str) -> None:
    settings = ablation_settings(name)
    small = {"n_steps": 64, "batch_size": 32, "compile": False}
    model = configs.algorithm_class(settings.algo)(
        "MlpPolicy", "Pendulum-v1", device="cpu", **{**settings.hyperparameters, **small}
    )
    before = model.policy.parameters_to_vector()
    model.learn(64)
    assert {key: getattr(model, key) for key in small} == small
    assert not np.array_equal(before, model.policy.parameters_to_vector())


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("ppo", presets.LECTURE),
        ("ppo_m", presets.PPO_MINIMAL),
        ("ppo_noclip", presets.PPO_NO_CLIP),
        ("trpo_plus", presets.TRPO_PLUS),
    ],
)
def test_the_ablation_has_the_values_of_the_presets(name: str, preset: dict[str, Any]) -> None:
    algo = ablation_settings(name).algo
    ours, theirs = with_defaults(name, algo), with_defaults(None, algo) | preset
    # What the defaults leave to SB3's policy, the presets write out.
    by_the_policy = {"ortho_init": True, "activation_fn": "tanh", "adam_eps": 1e-5}
    for key in ours:
        pair = [by_the_policy.get(key) if values[key] is None else values[key] for values in (ours, theirs)]
        assert _written_alike(key, pair[0]) == _written_alike(key, pair[1]), key


def _written_alike(name: str, value: Any) -> Any:
    """``lin_0.0003`` and ``lin_3e-4`` are one schedule."""
    return describe_schedule(as_schedule(name, value)) if str(value).startswith("lin_") else value


def test_each_trick_has_a_file_of_the_ablation() -> None:
    headers = " ".join(path.read_text(encoding="utf-8").splitlines()[0] for path in ABLATION_FOLDER.iterdir())
    assert {int(number) for number in re.findall(r"trick (\d+)", headers)} == set(range(1, 19))


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001),  # a string for PyYAML
        ("1e6", 1_000_000.0),
        ("-2.5E+1", -25.0),
        ("1.e3", 1000.0),
        (".5e1", 5.0),
        ("5", 5),
        ("null", None),
        ("None", None),  # a string for PyYAML
        ("", None),
        ("lin_1e-3", "lin_1e-3"),
        ("[64, 64]", [64, 64]),
        ("{pi: [64]}", {"pi": [64]}),
        ("true", True),
        ("e5", "e5"),
    ],
)
def test_values_are_read_as_a_python_user_means_them(text: str, expected: Any) -> None:
    path, value = parse_assignment(f"name={text}")
    assert path == ["name"]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("text", ["n_epochs", "=5", "a..b=1", ".=1", ""])
def test_an_assignment_without_a_name_or_a_sign_says_what_is_expected(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected name=value, as in --set n_epochs=5"):
        parse_assignment(text)


def test_python_objects_in_yaml_are_not_built() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("!!python/object/apply:os.getcwd []", "settings.yml")


# --- rl_zoo3's Python inside YAML -------------------------------------------------------------------------------------


def test_zoo_policy_kwargs_become_plain_values_and_then_classes() -> None:
    text = "dict(log_std_init=-2, ortho_init=False, activation_fn=nn.ReLU, net_arch=dict(pi=[256, 256], vf=[256]))"
    plain = configs.parse_python_value(text)
    assert plain == {
        "log_std_init": -2,
        "ortho_init": False,
        "activation_fn": "nn.ReLU",
        "net_arch": {"pi": [256, 256], "vf": [256]},
    }
    assert configs.resolve_objects({"policy_kwargs": plain})["policy_kwargs"]["activation_fn"] is torch.nn.ReLU


def test_a_short_activation_name_stays_what_it_is() -> None:
    assert configs.resolve_objects({"activation_fn": "tanh"}) == {"activation_fn": "tanh"}


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "dict([1])", "dict(", "open('x')", "[1 for _ in 'a']"])
def test_code_in_a_configuration_is_refused_not_run(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        configs.parse_python_value(text)


def test_a_name_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot import 'nn\.Relu'"):
        configs.resolve_objects({"activation_fn": "nn.Relu"})


@pytest.mark.parametrize(
    ("normalize", "observations", "rewards"),
    [
        (True, True, True),
        (False, False, False),
        ({"norm_obs": True, "norm_reward": False}, True, False),
        ("{'norm_obs': False, 'norm_reward': True}", False, True),
        ("dict(norm_reward=False)", True, False),
    ],
)
def test_the_zoos_normalize_becomes_the_models_own(normalize: Any, observations: bool, rewards: bool) -> None:
    switches = configs.normalization_switches(normalize)
    assert switches == {"normalize_observations": observations, "normalize_rewards": rewards}


def test_normalize_with_what_we_have_no_switch_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="normalize:"):
        configs.normalization_switches({"norm_obs": True, "gamma": 0.9})


# --- which block ------------------------------------------------------------------------------------------------------

ZOO_FILE = """
default: &default
  n_envs: 2
  n_timesteps: 1e4
  policy: MlpPolicy
atari:
  n_epochs: 3
CartPole-v1:
  <<: *default
  n_envs: 4
  learning_rate: 1e-3
"""


@pytest.mark.parametrize(
    ("env", "block", "n_envs"),
    [("CartPole-v1", "CartPole-v1", 4), ("Pendulum-v1", "default", 2), ("ALE/Pong-v5", "atari", 1)],
)
def test_a_zoo_file_is_searched_for_the_environment_then_its_kind_then_default(
    tmp_path: Path, env: str, block: str, n_envs: int
) -> None:
    settings = resolve_settings(env=env, config=write(tmp_path, ZOO_FILE))
    assert settings.n_envs == n_envs
    assert settings.source.endswith(f"block {block}")


def test_the_default_blocks_policy_gives_way_to_the_observations_an_own_blocks_does_not(tmp_path: Path) -> None:
    path = write(tmp_path, ZOO_FILE)
    assert resolve_settings(env="Pendulum-v1", config=path).policy is None
    assert resolve_settings(env="CartPole-v1", config=path).policy == "MlpPolicy"
    assert resolve_settings(env="Pendulum-v1", config=path, overrides=["policy=MlpPolicy"]).policy == "MlpPolicy"


def test_a_zoo_file_without_a_fitting_block_says_what_it_has(tmp_path: Path) -> None:
    path = write(tmp_path, "Pendulum-v1: {n_envs: 2}\nAnt-v5: {n_envs: 3}")
    with pytest.raises(ConfigError, match=r"no block for CartPole-v1 and no default; it has: Pendulum-v1, Ant-v5"):
        resolve_settings(env="CartPole-v1", config=path)


@pytest.mark.parametrize("text", ["n_epochs: 3", "policy_kwargs: {net_arch: [32]}", "{env: Pendulum-v1, n_epochs: 3}"])
def test_a_flat_file_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    settings = resolve_settings(env="CartPole-v1", config=path)
    expected = yaml.safe_load(text)
    expected.pop("env", None)
    assert settings.hyperparameters == expected  # and nothing of zoo_configs' CartPole-v1
    assert settings.source == str(path)
    assert settings.environment.env == "CartPole-v1"


def test_an_empty_file_means_the_constructors_defaults(tmp_path: Path) -> None:
    settings = resolve_settings(env="CartPole-v1", config=write(tmp_path, "{}"))
    assert settings.hyperparameters == {}
    assert (settings.n_envs, settings.n_timesteps, settings.seed) == (1, 1_000_000, 0)


# --- precedence -------------------------------------------------------------------------------------------------------


def test_set_wins_over_options_which_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "{n_envs: 2, n_timesteps: 1000, seed: 5, n_epochs: 3, gamma: 0.9}")
    from_file = resolve_settings(env="CartPole-v1", config=path)
    assert (from_file.n_envs, from_file.n_timesteps, from_file.seed) == (2, 1000, 5)
    with_options = resolve_settings(env="CartPole-v1", config=path, n_envs=3, n_timesteps=2e3, seed=6)
    assert (with_options.n_envs, with_options.n_timesteps, with_options.seed) == (3, 2000, 6)
    with_set = resolve_settings(
        env="CartPole-v1", config=path, n_envs=3, overrides=["n_envs=4", "n_epochs=7", "n_epochs=8"]
    )
    assert with_set.n_envs == 4
    assert with_set.hyperparameters == {"n_epochs": 8, "gamma": 0.9}  # of two the later


def test_a_dotted_name_changes_one_value_and_keeps_its_neighbours(tmp_path: Path) -> None:
    path = write(tmp_path, 'policy_kwargs: "dict(ortho_init=False, net_arch=dict(pi=[8], vf=[8]))"\nn_epochs: 1')
    settings = resolve_settings(env="CartPole-v1", config=path, overrides=["policy_kwargs.net_arch.vf=[16]"])
    assert settings.hyperparameters["policy_kwargs"] == {"ortho_init": False, "net_arch": {"pi": [8], "vf": [16]}}


def test_a_dotted_name_into_a_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set gamma\.x: gamma is 0\.98, which has no names inside"):
        resolve_settings(env="CartPole-v1", overrides=["gamma.x=1"])


@pytest.mark.parametrize("name", ["env", "algo"])
def test_what_decides_the_block_cannot_be_set_afterwards(name: str) -> None:
    with pytest.raises(ConfigError, match=f"use --{name} for that"):
        resolve_settings(env="CartPole-v1", overrides=[f"{name}=x"])


@pytest.mark.parametrize("value", [0, -1, 0.5, float("inf"), float("nan"), True, "many", None, [1]])
def test_a_number_of_things_must_be_a_whole_positive_number(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"n_envs must be a whole number of at least 1"):
        configs.whole_number("n_envs", value)


def test_what_the_command_does_not_do_is_refused_instead_of_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, "{callback: some.Callback, n_epochs: 1}")
    with pytest.raises(ConfigError, match="callback of rl_zoo3 is not supported"):
        resolve_settings(env="CartPole-v1", config=path)


# --- environments -----------------------------------------------------------------------------------------------------


class Scaled(gym.RewardWrapper[Any, Any]):
    def __init__(self, env: gym.Env[Any, Any], factor: float = 2.0) -> None:
        super().__init__(env)
        self.factor = factor

    def reward(self, reward: Any) -> float:
        return self.factor * float(reward)


@pytest.mark.parametrize(
    ("entry", "factor"),
    [
        ("WRAPPER", 2.0),
        ({"WRAPPER": {"factor": 3.0}}, 3.0),
        ({"WRAPPER": "dict(factor=4.0)"}, 4.0),
        (["WRAPPER", {"WRAPPER": {"factor": 5.0}}], 10.0),
        (None, 1.0),
    ],
)
def test_wrappers_are_written_as_in_the_zoo(entry: Any, factor: float) -> None:
    # The name under which pytest imported this file differs between import modes.
    entry = yaml.safe_load(yaml.safe_dump(entry).replace("WRAPPER", f"{__name__}.Scaled"))
    spec = configs.EnvironmentSpec("CartPole-v1", env_wrapper=entry)
    env = environments.make_environments(spec, n_envs=2, seed=0)
    env.reset()
    _, rewards, _, _ = env.step(np.zeros(2, dtype=int))
    assert rewards.tolist() == [factor, factor]


def test_a_malformed_wrapper_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"env_wrapper: expected module\.Class"):
        environments.configured_wrappers([{"a": {}, "b": {}}])


def test_environment_arguments_and_stacked_frames() -> None:
    spec = configs.EnvironmentSpec.from_settings({"env": "Pendulum-v1", "env_kwargs": "dict(g=9.81)", "frame_stack": 3})
    env = environments.make_environments(spec)
    assert env.observation_space.shape == (9,)
    assert env.get_attr("unwrapped")[0].g == 9.81


def test_a_wrong_environment_argument_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"cannot make CartPole-v1: .*no_such_argument"):
        environments.make_environments(configs.EnvironmentSpec("CartPole-v1", {"no_such_argument": 1}))


@pytest.mark.parametrize(
    ("space", "policy"),
    [
        (spaces.Box(-1, 1, (3,)), "MlpPolicy"),
        (spaces.Discrete(4), "MlpPolicy"),
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), "CnnPolicy"),
        (spaces.Box(0, 1, (36, 36)), "MlpPolicy"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "MultiInputPolicy"),
    ],
)
def test_the_policy_fits_the_observations(space: spaces.Space[Any], policy: str) -> None:
    assert environments.policy_for(space) == policy


@pytest.mark.parametrize(
    ("package", "env", "requirement"),
    [
        ("Box2D", "LunarLander-v3", "sb3_pgplus[box2d]"),
        ("mujoco", "HalfCheetah-v5", "sb3_pgplus[mujoco]"),
        ("ale_py", "ALE/Pong-v5", "sb3_pgplus[atari]"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, package: str, env: str, requirement: str
) -> None:
    _pretend_missing(monkeypatch, package)
    with pytest.raises(ConfigError, match=re.escape(f'pip install "{requirement}"')):
        environments.make_environments(configs.EnvironmentSpec(env))


def test_a_broken_renderer_setting_is_pointed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")  # what MUJOCO_GL=osmesa without it says

    monkeypatch.setattr(environments, "make_vec_env", fail)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(ConfigError, match=r"glGetError' \(MUJOCO_GL=osmesa is set: unset it, or install"):
        environments.make_environments(configs.EnvironmentSpec("HalfCheetah-v5"))
    with pytest.raises(ConfigError, match=r"glGetError'$"):
        environments.make_environments(configs.EnvironmentSpec("CartPole-v1"))


def _pretend_missing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    import sys

    for module in [name for name in sys.modules if name.startswith(("gymnasium.envs.box2d", "gymnasium.envs.mujoco"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)


def test_atari_games_are_known_in_worker_processes_as_well() -> None:
    pytest.importorskip("ale_py")
    env = environments.make_environments(configs.EnvironmentSpec("ALE/Pong-v5"), n_envs=2, backend="workers")
    assert env.reset().shape == (2, 210, 160, 3)
    env.close()
