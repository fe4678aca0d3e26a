"""Evaluation while training: the same episodes every time, none of them preferred, and no trace in the training."""

import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import scipy.stats
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common import callbacks as sb3_callbacks
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_cli import run, same_parameters, succeed

from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus, make_vec_env
from sb3_pgplus.callbacks import EvalCallback
from sb3_pgplus.evaluation import play_episodes, random_state_kept
from sb3_pgplus.statistics import iqm, iqm_interval

TINY: dict[str, Any] = {"seed": 0, "device": "cpu", "n_steps": 64}
TRAIN = ("--n-timesteps", "512", "--n-envs", "2", "--set", "n_steps=64", "--set", "n_epochs=2", "--no-progress")


class Countdown(gym.Env[Any, Any]):
    """An episode that a reset with seed s begins lasts 2 + s % 7 steps, those that follow 1; each step pays 10."""

    observation_space = spaces.Box(-10.0, 10.0, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 1 if seed is None else 2 + seed % 7
        return np.array([self.left], dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        info = {"is_success": self.left == 0}
        return np.array([self.left], dtype=np.float32), 10.0, self.left == 0, False, info


def countdowns(n: int) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(Countdown()) for _ in range(n)])


def cartpole_model() -> PPOPlus:
    return PPOPlus("MlpPolicy", "CartPole-v1", **TINY)


class KeptRows(KVWriter):
    """Every row that a logger dumps."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append((step, dict(key_values)))

    def close(self) -> None:
        pass


# --- which episodes are played ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 2, 3, 7, 10])
def test_every_seeds_first_episode_counts_once_however_many_environments_there_are(n_envs: int) -> None:
    model = PPOPlus("MlpPolicy", countdowns(1), **TINY)
    played = play_episodes(model, countdowns(n_envs), n_episodes=7, seed=14)
    # Seeds 14 to 20: lengths 2 + 0, …, 2 + 6. Taking what ends first would bring episodes of length 1 and 2.
    assert played.lengths == [2, 3, 4, 5, 6, 7, 8]
    assert played.returns == [10.0 * length for length in played.lengths]
    assert played.successes == [True] * 7


def test_without_a_monitor_rewards_are_added_up_with_a_warning() -> None:
    model = PPOPlus("MlpPolicy", countdowns(1), **TINY)
    with pytest.warns(UserWarning, match="no Monitor"):
        played = play_episodes(model, DummyVecEnv([Countdown, Countdown]), n_episodes=3, seed=0)
    assert (played.lengths, played.returns) == ([2, 3, 4], [20.0, 30.0, 40.0])


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_same_evaluation_twice_gives_the_same_returns(deterministic: bool) -> None:
    model, env = cartpole_model(), make_vec_env("CartPole-v1", 3)
    first, second = (play_episodes(model, env, n_episodes=5, deterministic=deterministic) for _ in range(2))
    other = play_episodes(model, env, n_episodes=5, deterministic=deterministic, seed=77)
    assert first == second != other


def test_a_seeds_episode_does_not_depend_on_its_neighbours() -> None:
    model = cartpole_model()
    four = play_episodes(model, make_vec_env("CartPole-v1", 4), n_episodes=4, seed=5)
    alone = [play_episodes(model, make_vec_env("CartPole-v1", 1), n_episodes=1, seed=5 + i) for i in range(4)]
    assert four.returns == [episode.returns[0] for episode in alone]


def test_evaluation_leaves_the_random_generators_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(th.rand(1))

    model, env = cartpole_model(), make_vec_env("CartPole-v1", 2)
    with random_state_kept():
        expected = draw()
    play_episodes(model, env, n_episodes=2, deterministic=False)
    assert draw() == expected


def test_a_wrapper_outside_the_monitor_may_end_episodes() -> None:
    model = cartpole_model()
    env = DummyVecEnv([lambda: TimeLimit(Monitor(gym.make("CartPole-v1")), 5)] * 2)  # whose monitor never sees an end
    played = play_episodes(model, env, n_episodes=3)
    assert (played.lengths, played.returns) == ([5, 5, 5], [5.0, 5.0, 5.0])


def test_an_atari_life_lost_is_no_episode_and_no_start_of_one() -> None:
    pytest.importorskip("ale_py")
    from stable_baselines3.common.env_util import make_atari_env

    env = make_atari_env("ALE/Breakout-v5", n_envs=2, seed=0)
    model = PPOPlus("CnnPolicy", env, n_steps=8, batch_size=8, seed=0, device="cpu")
    first, second = (play_episodes(model, env, n_episodes=3, deterministic=False) for _ in range(2))
    assert first == second


# --- the statistics ---------------------------------------------------------------------------------------------------


def test_the_interquartile_mean_leaves_the_outer_quarters_out() -> None:
    # Of eight sorted values the middle four: (3 + 4 + 5 + 6) / 4.
    assert iqm([1, 2, 3, 4, 5, 6, 7, 1000]) == 4.5


def test_the_bootstrap_interval_is_the_range_of_resampled_means() -> None:
    # Of two values a resample's mean is the lower one, the middle or the upper one with 1/4, 1/2, 1/4.
    assert iqm_interval([0.0, 1.0]) == (0.0, 1.0)
    assert iqm_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    scores = np.random.default_rng(0).normal(size=4000)
    low, high = iqm_interval(scores)
    assert low < iqm(scores) < high
    # The IQM of a normal sample has standard error 1.0885/√n, so the interval is ± 1.96 of that.
    assert high - low == pytest.approx(2 * 1.96 * 1.0885 / np.sqrt(4000), rel=0.1)


def test_the_interquartile_mean_is_scipys() -> None:
    values = np.random.default_rng(2).normal(size=37)
    assert iqm(values) == scipy.stats.trim_mean(values, 0.25)


# --- the callback -----------------------------------------------------------------------------------------------------


def evaluated(tmp_path: Path, **options: Any) -> tuple[PPOPlus, EvalCallback]:
    model = PPOPlus("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), **TINY)
    options = {"every": 200, "n_eval_episodes": 4, "verbose": 0, "log_path": tmp_path} | options
    callback = EvalCallback("CartPole-v1", best_model_save_path=tmp_path, **options)
    return model.learn(600, callback), callback


@pytest.mark.parametrize("cls", [PPOPlus, A2CPlus, TRPOPlus])
@pytest.mark.parametrize("deterministic", [True, False])
def test_training_with_evaluation_is_training_without(cls: Any, deterministic: bool) -> None:
    def trained(callback: Any) -> Any:
        return cls("MlpPolicy", make_vec_env("Pendulum-v1", 2, seed=3), **TINY).learn(512, callback)

    callback = EvalCallback("Pendulum-v1", n_eval_episodes=2, every=100, verbose=0, deterministic=deterministic)
    with_evaluation, without = trained(callback), trained(None)
    assert len(callback.evaluations_timesteps) == 5
    for a, b in zip(with_evaluation.policy.state_dict().values(), without.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)


def test_evaluations_come_every_so_many_environment_steps(tmp_path: Path) -> None:
    _, callback = evaluated(tmp_path)
    # 2 environments take steps 2, 4, …; the training ends with a whole rollout, at 640.
    assert callback.evaluations_timesteps == [200, 400, 600]
    _, by_calls = evaluated(tmp_path, every=None, eval_freq=150)
    assert by_calls.evaluations_timesteps == [300, 600]  # 150 and 300 calls, SB3's way to count


def test_the_file_is_sb3s_with_more_in_it(tmp_path: Path) -> None:
    _, callback = evaluated(tmp_path)
    with np.load(tmp_path / "evaluations.npz") as file:
        arrays = dict(file)
    assert arrays["timesteps"].tolist() == [200, 400, 600]
    assert arrays["results"].shape == arrays["ep_lengths"].shape == (3, 4)
    assert arrays["results"].tolist() == arrays["ep_lengths"].tolist()  # CartPole pays 1 per step
    assert arrays["seeds"].tolist() == [callback.seed + i for i in range(4)]
    assert arrays["iqm"].tolist() == [iqm(row) for row in arrays["results"]]
    assert arrays["iqm_interval_95"].shape == (3, 2)
    assert (np.diff(arrays["seconds"]) > 0).all()
    assert {path.name for path in tmp_path.iterdir()} == {"evaluations.npz", "best_model.zip"}


def test_the_best_model_is_the_one_of_the_best_evaluation(tmp_path: Path) -> None:
    _, callback = evaluated(tmp_path)
    means = [float(np.mean(returns)) for returns in callback.evaluations_results]
    assert callback.best_mean_reward == max(means) and callback.last_mean_reward == means[-1]
    best = PPOPlus.load(tmp_path / "best_model.zip", device="cpu")
    assert best.num_timesteps == callback.evaluations_timesteps[int(np.argmax(means))]
    again = play_episodes(best, make_vec_env("CartPole-v1", 4), n_episodes=4)
    assert float(np.mean(again.returns)) == max(means)


def test_metrics_are_logged_under_sb3s_names_at_the_step_of_the_evaluation() -> None:
    model = PPOPlus("MlpPolicy", countdowns(1), **TINY)
    kept = KeptRows()
    model.set_logger(Logger(None, [kept]))
    model.learn(128, EvalCallback(countdowns(3), n_eval_episodes=8, every=50, seed=7, verbose=0))
    rows = [(step, row) for step, row in kept.rows if "eval/mean_reward" in row]
    assert [step for step, _ in rows] == [50, 100]
    row = rows[0][1]
    # Seeds 7 to 14: lengths 2, …, 8 and 2 again; without two at each end 3, 4, 5, 6 are left.
    lengths = [2, 3, 4, 5, 6, 7, 8, 2]
    assert row["eval/mean_ep_length"] == np.mean(lengths)
    assert row["eval/mean_reward"] == 10 * np.mean(lengths)
    assert row["eval/std_reward"] == pytest.approx(10 * np.std(lengths))
    assert row["eval/iqm"] == 10 * (3 + 4 + 5 + 6) / 4
    assert row["eval/iqm_low"] < row["eval/iqm"] < row["eval/iqm_high"]
    assert row["eval/success_rate"] == 1.0
    assert row["time/total_timesteps"] == 50


def test_sb3s_companions_work_with_it() -> None:
    stop = sb3_callbacks.StopTrainingOnRewardThreshold(reward_threshold=20.0, verbose=0)
    counted: list[int] = []

    class Count(sb3_callbacks.BaseCallback):
        def _on_step(self) -> bool:
            counted.append(self.num_timesteps)
            return True

    model = PPOPlus("MlpPolicy", countdowns(1), **TINY)
    callback = EvalCallback(countdowns(1), stop, Count(), n_eval_episodes=1, every=50, seed=0, verbose=0)
    model.learn(1000, callback)
    assert isinstance(callback, sb3_callbacks.EvalCallback)
    assert model.num_timesteps == 50  # the first evaluation's 20 reach the threshold
    assert counted == []  # as in SB3: what ends the training goes first


def test_statistics_of_a_vec_normalize_outside_are_kept_in_step(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))
    model = PPOPlus("MlpPolicy", env, normalize_observations=False, normalize_rewards=False, **TINY)
    eval_env = VecNormalize(make_vec_env("CartPole-v1", 2), training=False, norm_reward=False)
    model.learn(256, EvalCallback(eval_env, n_eval_episodes=2, every=100, verbose=0))
    assert eval_env.obs_rms.count > 100
    with pytest.raises(ValueError, match=r"VecNormalize\(…, training=False"):
        model.learn(256, EvalCallback("CartPole-v1", every=100))


def test_its_state_is_plain_and_continues_it(tmp_path: Path) -> None:
    _, callback = evaluated(tmp_path)
    state = callback.state_dict()
    assert all(isinstance(value, int | float | str | list | None) for value in state.values())
    other = EvalCallback("CartPole-v1", every=200, n_eval_episodes=4, log_path=tmp_path, verbose=0)
    other.load_state_dict(state)
    assert other.state_dict() == state
    model = PPOPlus("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), **TINY)
    model.num_timesteps = 640
    model.learn(200, other, reset_num_timesteps=False)
    with np.load(tmp_path / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [200, 400, 600, 800]
        assert (np.diff(file["seconds"]) > 0).all()
        assert file["iqm_interval_95"].tolist() == [list(iqm_interval(row)) for row in file["results"]]
    assert callback.evaluations_timesteps == [200, 400, 600]  # the lists were copied
    with pytest.raises(ValueError, match="best_mean_reward"):
        other.load_state_dict({"n_calls": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be an integer of at least 1, got 0"),
        ({"every": 1.5}, "`every` must be an integer"),
        ({"every": 10, "eval_freq": 10}, "not both: got 10 and 10"),
        ({"eval_freq": 0}, "`eval_freq` must be"),
        ({"n_eval_episodes": 0}, "`n_eval_episodes` must be"),
        ({"seed": -1}, "`seed` must be"),
        ({"n_envs": 0}, "`n_envs` must be"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        EvalCallback("CartPole-v1", **options)


def test_an_unknown_environment_and_a_number_for_given_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown environment"):
        EvalCallback("CartPole-v99")
    with pytest.raises(ValueError, match="`n_envs`=2 is for an id"):
        EvalCallback(countdowns(1), n_envs=2)


def test_an_environment_of_another_kind_is_refused_before_training() -> None:
    model = cartpole_model()
    with pytest.raises(ValueError, match="was not trained for Pendulum-v1: Observation spaces do not match"):
        model.learn(64, EvalCallback("Pendulum-v1"))
    assert model.num_timesteps == 0


# --- videos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["id", "environments"])
def test_a_video_shows_the_first_episode_of_the_evaluation(tmp_path: Path, given: str) -> None:
    eval_env: Any = "CartPole-v1"
    if given == "environments":
        eval_env = make_vec_env("CartPole-v1", 2, env_kwargs={"render_mode": "rgb_array"})
    model = PPOPlus("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), **TINY)
    callback = EvalCallback(eval_env, every=100, n_eval_episodes=2, verbose=0, video_folder=tmp_path / "videos")
    model.learn(128, callback)
    video = tmp_path / "videos" / "step-100.mp4"
    assert callback.last_video_path == str(video)
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(video))
    length = callback.evaluations_length[0][0]
    # From an id, all states of the episode; environments that reset by themselves do not show the first and last.
    assert frames == (length + 1 if given == "id" else length - 1)


def test_what_cannot_be_rendered_is_a_warning_once_and_training_goes_on(tmp_path: Path) -> None:
    model = PPOPlus("MlpPolicy", countdowns(1), **TINY)
    callback = EvalCallback(countdowns(1), every=50, n_eval_episodes=2, verbose=0, video_folder=tmp_path)
    with pytest.warns(UserWarning, match="no videos of the evaluations") as warned:
        model.learn(150, callback)
    assert len([w for w in warned if "no videos" in str(w.message)]) == 1
    assert len(callback.evaluations_timesteps) == 3 and callback.last_video_path is None
    assert not list(tmp_path.iterdir())


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    options = ("--eval-freq", "200", "--eval-episodes", "3", "--eval-video")
    succeed("train", "--env", "CartPole-v1", *TRAIN, *options, "--out", folder)
    return folder


def test_the_command_leaves_evaluations_best_model_and_videos(evaluated_run: Path) -> None:
    with np.load(evaluated_run / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [200, 400]
        assert file["results"].shape == (2, 3)
    assert PPOPlus.load(evaluated_run / "best_model.zip").num_timesteps in (200, 400)
    assert {path.name for path in (evaluated_run / "videos").iterdir()} == {"step-200.mp4", "step-400.mp4"}
    assert "eval/iqm" in (evaluated_run / "progress.csv").read_text(encoding="utf-8")


def test_the_command_trains_the_same_model_without_evaluations(evaluated_run: Path, tmp_path: Path) -> None:
    succeed("train", "--env", "CartPole-v1", *TRAIN, "--eval-episodes", "0", "--out", tmp_path / "run")
    assert same_parameters(evaluated_run / "model.zip", tmp_path / "run" / "model.zip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--eval-video",), "give --eval-freq, too"),
        (("--eval-freq", "100", "--eval-episodes", "0"), "--eval-episodes 0 for none"),
    ],
)
def test_the_command_refuses_half_a_wish(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = run("train", "--env", "CartPole-v1", *TRAIN, *options, "--out", tmp_path / "run")
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()
