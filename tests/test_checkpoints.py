"""An interrupted training goes on as if nothing had happened; a damaged checkpoint is never taken for a good one."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resume_cases as cases
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from typer.testing import CliRunner

from sb3_pgplus import A2CPlus, PPOPlus, checkpoints, make_vec_env, resumed_runs
from sb3_pgplus.callbacks import CheckpointCallback
from sb3_pgplus.callbacks import EvalCallback as OurEvalCallback
from sb3_pgplus.cli import app
from sb3_pgplus.compiler import compile_function
from sb3_pgplus.errors import CheckpointError
from sb3_pgplus.interruptions import Interruption, deferred
from sb3_pgplus.reporting.progress_csv import ProgressCSV

SMALL: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "n_epochs": 2, "device": "cpu", "seed": 0}
SMALL["policy_kwargs"] = {"net_arch": [4]}


def scramble() -> None:
    """Random generators of a new process are somewhere else."""
    random.seed(123)
    np.random.seed(123)
    th.manual_seed(123)


# --- resumed equals uninterrupted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*cases.KINDS, "wrappers"])
@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_a_resumed_training_ends_with_every_bit_of_the_uninterrupted_one(
    algorithm: str, kind: str, tmp_path: Path
) -> None:
    n_iterations = 6
    model = cases.model_of(algorithm, kind)
    per_iteration = model.n_steps * model.n_envs
    total = n_iterations * per_iteration
    model.learn(total, CheckpointCallback(tmp_path / "a", per_iteration, keep=99))
    found = checkpoints.in_folder(tmp_path / "a")
    assert [checkpoints.steps_of(path) for path in found] == [i * per_iteration for i in range(n_iterations, -1, -1)]

    scramble()
    resumed = cases.ALGORITHMS[algorithm].resume(found[n_iterations // 2], cases.environments(kind), "cpu")
    assert resumed.num_timesteps == total // 2
    resumed.learn(total, CheckpointCallback(tmp_path / "b", per_iteration))
    for step in (total - per_iteration, total):
        cases.assert_same(checkpoints.path_of(tmp_path / "a", step), checkpoints.path_of(tmp_path / "b", step))


def test_the_id_of_the_environments_is_in_the_checkpoint(tmp_path: Path) -> None:
    model = PPOPlus("MlpPolicy", "CartPole-v1", n_envs=2, **SMALL)
    model.learn(64, CheckpointCallback(tmp_path, 16, keep=9))
    resumed = PPOPlus.resume(checkpoints.path_of(tmp_path, 32), device="cpu")
    resumed.learn(64, CheckpointCallback(tmp_path / "again", 16))
    cases.assert_same(checkpoints.path_of(tmp_path, 64), checkpoints.path_of(tmp_path / "again", 64))


def test_what_happens_between_resume_and_learn_does_not_matter(tmp_path: Path) -> None:
    model = PPOPlus("MlpPolicy", "CartPole-v1", n_envs=2, **SMALL)
    model.learn(64, CheckpointCallback(tmp_path, 16, keep=9))
    resumed = PPOPlus.resume(checkpoints.path_of(tmp_path, 32), device="cpu")
    evaluate_policy(resumed, resumed.get_env(), n_eval_episodes=2, deterministic=False)
    resumed.set_env(make_vec_env("CartPole-v1", 2))
    resumed._env_id = "CartPole-v1"  # which set_env cannot know
    resumed.learn(64, CheckpointCallback(tmp_path / "again", 16))
    cases.assert_same(checkpoints.path_of(tmp_path, 64), checkpoints.path_of(tmp_path / "again", 64))


def test_environments_of_ones_own_have_to_be_given(tmp_path: Path) -> None:
    PPOPlus("MlpPolicy", make_vec_env("CartPole-v1", 2), **SMALL).learn(16, CheckpointCallback(tmp_path, 16))
    with pytest.raises(CheckpointError, match="does not say how its 2 environment.* give `env`"):
        PPOPlus.resume(tmp_path)


def test_a_second_learn_that_goes_on_counting_is_resumed_as_such(tmp_path: Path) -> None:
    """Its total counts from where the first one ended: 16 + 48 steps, and its fps from there, too."""
    model = PPOPlus("MlpPolicy", "CartPole-v1", **{**SMALL, "learning_rate": 1e-3, "clip_range": 0.2})
    model.learn(16)
    model.learn(48, CheckpointCallback(tmp_path, 8, keep=9), reset_num_timesteps=False)
    resumed = PPOPlus.resume(checkpoints.path_of(tmp_path, 40), device="cpu")
    scramble()
    resumed.learn(48, CheckpointCallback(tmp_path / "again", 16), reset_num_timesteps=False)
    assert resumed.num_timesteps == 64 and resumed._num_timesteps_at_start == 16
    cases.assert_same(checkpoints.path_of(tmp_path, 64), checkpoints.path_of(tmp_path / "again", 64))


def test_one_callback_serves_two_learns_that_go_on_counting(tmp_path: Path) -> None:
    model = PPOPlus("MlpPolicy", "CartPole-v1", **{**SMALL, "schedule_timesteps": 64})
    callback = CheckpointCallback(tmp_path, 16, keep=9)
    model.learn(32, callback)
    model.learn(32, callback, reset_num_timesteps=False)
    assert [checkpoints.steps_of(path) for path in checkpoints.in_folder(tmp_path)] == [64, 48, 32, 16, 0]


def test_another_callback_goes_on_in_the_folder_of_the_same_model(tmp_path: Path) -> None:
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    model.learn(16, CheckpointCallback(tmp_path, 8, keep=9))
    model.learn(16, CheckpointCallback(tmp_path, 8, keep=9), reset_num_timesteps=False)
    assert [checkpoints.steps_of(path) for path in checkpoints.in_folder(tmp_path)] == [32, 24, 16, 8, 0]
    with pytest.raises(CheckpointError, match="another training"):  # the newest file would not be the newest state
        model.learn(16, CheckpointCallback(tmp_path, 8))


def test_after_the_resumed_training_the_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(32, CheckpointCallback(tmp_path, 8))
    resumed = PPOPlus.resume(tmp_path, device="cpu")
    with pytest.warns(UserWarning, match="Nothing is left to train: the checkpoint has 32 of 32 steps"):
        resumed.learn(32, CheckpointCallback(tmp_path, 8))
    cases.assert_same(checkpoints.in_folder(tmp_path)[0], checkpoints.in_folder(tmp_path)[0])
    assert resumed.learn(16).num_timesteps == 16
    assert model.learn(16).num_timesteps == 16


def test_the_engine_decides_for_the_whole_training_again(tmp_path: Path) -> None:
    """8000 steps make 1000 iterations of 2 epochs of 1 minibatch: 2000 calls, of which the reasons tell."""

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 20

    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    model.learn(8000, [Stop(), CheckpointCallback(tmp_path, 8)])
    resumed = PPOPlus.resume(tmp_path, device="cpu").learn(8000, Stop())
    assert "2000 calls" in model.engine_report()
    assert resumed.engine_report() == model.engine_report()


def test_another_total_is_allowed_and_warned_about(tmp_path: Path) -> None:
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(32, CheckpointCallback(tmp_path, 8))
    with pytest.warns(UserWarning, match="was to have 32 steps, and this one has 64"):
        assert PPOPlus.resume(tmp_path, device="cpu").learn(64).num_timesteps == 64


def test_other_versions_are_warned_about(tmp_path: Path) -> None:
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(16, CheckpointCallback(tmp_path, 8))
    resumed = PPOPlus.resume(checkpoints.path_of(tmp_path, 8), device="cpu")
    resumed._unfinished["surroundings"]["torch"] = "1.0"  # type: ignore[index]  # just resumed
    with pytest.warns(UserWarning, match=r"not with the same bits .*\(torch: 1.0 then, .* now\)"):
        resumed.learn(16)


class Secretive(cases.DictPoint):
    """Gives no state."""

    get_state = set_state = None  # type: ignore[assignment]


def test_environments_without_a_state_begin_new_episodes_and_say_so(tmp_path: Path) -> None:
    def secretive() -> Any:
        return make_vec_env(Secretive, 2, backend="dummy")

    PPOPlus("MultiInputPolicy", secretive(), **SMALL).learn(64, CheckpointCallback(tmp_path, 16, keep=9))
    envs, starts = [secretive() for _ in range(3)], []
    for env, step in zip(envs, (0, 16, 32), strict=True):
        resumed = PPOPlus.resume(checkpoints.path_of(tmp_path, step), env, "cpu")
        with pytest.warns(UserWarning, match="begin new episodes, .*Secretive") as caught:
            resumed.learn(64, CheckpointCallback(tmp_path / str(step), 64))
        assert len([each for each in caught if "new episodes" in str(each.message)]) == 1
        assert resumed.num_timesteps == 64
        starts.append(env.get_attr("np_random_seed")[0])
    assert len(set(starts)) == 3  # other episodes than those of the beginning


# --- what a checkpoint holds ------------------------------------------------------------------------------------------


class Tables(BaseCallback):
    """Its attributes are dicts of several kinds."""

    def _on_training_start(self) -> None:
        self.by_number = {1: "a", (2, "b"): 3.0}
        self.counts = defaultdict(int)
        self.with_fields = np.zeros(2, dtype=[("x", float)])  # has no plain form

    def _on_step(self) -> bool:
        self.counts[self.num_timesteps % 3] += 1
        self.by_number[self.num_timesteps] = "step"
        return True


def test_dicts_with_any_keys_are_restored_and_arrays_with_fields_left_alone(tmp_path: Path) -> None:
    whole, resumed = Tables(), Tables()
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(32, [whole, CheckpointCallback(tmp_path, 16, keep=9)])
    PPOPlus.resume(checkpoints.path_of(tmp_path, 16), device="cpu").learn(32, [resumed])
    assert resumed.by_number == whole.by_number and len(whole.by_number) == 1 + 32
    assert resumed.counts == whole.counts == {1: 11, 2: 11, 0: 10}
    assert resumed.counts["unheard of"] == 0


class Counter(BaseCallback):
    """Says itself what its state is, and notes what is called when."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.calls = 0, []

    def _on_training_start(self) -> None:
        self.calls.append("start")

    def _on_step(self) -> bool:
        self.count += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "nested": {"array": np.arange(3), "tuple": (1, None)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["nested"]["tuple"] == (1, None) and state["nested"]["array"].tolist() == [0, 1, 2]
        self.calls.append("load")
        self.count = state["count"]


def test_callbacks_get_their_state_back_however_they_are_nested(tmp_path: Path) -> None:
    def callbacks(folder: Path) -> tuple[Any, ...]:
        evaluation = EvalCallback(make_vec_env("CartPole-v1", 1, seed=1), eval_freq=12, verbose=0, n_eval_episodes=2)
        return Counter(), evaluation, StopTrainingOnMaxEpisodes(10_000), CheckpointCallback(folder, 16, keep=9)

    first = callbacks(tmp_path / "a")
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(64, list(first))
    second = callbacks(tmp_path / "b")
    resumed = PPOPlus.resume(checkpoints.path_of(tmp_path / "a", 32), device="cpu")
    resumed.learn(64, CallbackList([CallbackList([second[2], second[3]]), second[1], second[0]]))
    assert second[0].calls == ["load", "start"] and first[0].count == second[0].count == 64
    for name in ("n_calls", "best_mean_reward", "last_mean_reward"):
        assert getattr(first[1], name) == getattr(second[1], name)  # on the same episodes: its environment went on, too
    assert first[2].n_episodes == second[2].n_episodes > 0
    cases.assert_same(checkpoints.path_of(tmp_path / "a", 64), checkpoints.path_of(tmp_path / "b", 64))


def test_evaluations_of_a_resumed_training_go_on_from_those_before(tmp_path: Path) -> None:
    def trained(model: PPOPlus, name: str) -> Path:
        evaluation = OurEvalCallback(
            "CartPole-v1", n_eval_episodes=3, every=20, log_path=tmp_path / name, verbose=0, n_envs=3
        )
        model.learn(64, [evaluation, CheckpointCallback(tmp_path / f"{name}-checkpoints", 16, keep=9)])
        evaluation.close()
        return tmp_path / name / "evaluations.npz"

    whole = np.load(trained(PPOPlus("MlpPolicy", "CartPole-v1", n_envs=2, **SMALL), "whole"))
    half = checkpoints.path_of(tmp_path / "whole-checkpoints", 32)
    resumed = np.load(trained(PPOPlus.resume(half, device="cpu"), "resumed"))
    assert whole["timesteps"].tolist() == [20, 40, 60]  # the first of them was before the checkpoint
    for name in ("timesteps", "results", "ep_lengths", "iqm"):
        np.testing.assert_array_equal(resumed[name], whole[name])


def test_a_constructors_arguments_are_those_of_the_resumed_process(tmp_path: Path) -> None:
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    model.learn(16, [StopTrainingOnMaxEpisodes(500), CheckpointCallback(tmp_path, 8)])
    callback = StopTrainingOnMaxEpisodes(700)
    PPOPlus.resume(checkpoints.path_of(tmp_path, 8), device="cpu").learn(16, callback)
    assert callback.max_episodes == 700


def test_a_checkpoint_is_an_ordinary_model_and_its_other_members_need_no_pickle(tmp_path: Path) -> None:
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(16, CheckpointCallback(tmp_path, 16))
    path = checkpoints.in_folder(tmp_path)[0]
    loaded, observation = PPOPlus.load(path, device="cpu"), np.ones(4, np.float32)
    assert loaded.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        own = {checkpoints.TREE, checkpoints.ARRAYS}
        assert own <= set(archive.namelist())
        assert archive.read(checkpoints.TREE).startswith(b'{"format": 1')
        with archive.open(checkpoints.ARRAYS) as file:
            assert th.load(file, weights_only=True).dtype == th.uint8
    state = checkpoints.find(path).state
    assert not [key for key in state if "pickle" in repr(state[key])]


def test_a_plain_tree_comes_back_with_types_and_bits() -> None:
    tree = {
        "numbers": [0, -1, 2**130, 0.1, float("inf"), True, None, "text"],
        "tuple": (1, ("a", 2.5), []),
        "arrays": [np.arange(6).astype(dtype).reshape(2, 3) for dtype in ("f4", "f8", "u2", "u4", "i8", "?", "c8")],
        "text": np.array(["a", "bcd"]),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(0.1),
        "no dimension": np.array(3.5),
        "$odd": {"$tuple": [1]},
        "nothing": {},
    }
    described, arrays = checkpoints.encode(tree)
    assert dict(cases._leaves(checkpoints.decode(described, arrays))) == dict(cases._leaves(tree))
    back = checkpoints.decode(described, arrays)
    assert type(back["scalar"]) is np.float32 and back["no dimension"].shape == () and back["tuple"] == tree["tuple"]
    back["arrays"][0][0, 0] = 7  # writable
    with pytest.raises(TypeError, match="object is not plain data"):
        checkpoints.encode({"a": [object()]})


# --- which ones are kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(64, CheckpointCallback(tmp_path, 16, keep=keep))
    expected = [64, 48, 32, 16, 0][:keep]
    assert [checkpoints.steps_of(path) for path in checkpoints.in_folder(tmp_path)] == expected
    assert len([*tmp_path.iterdir()]) == keep


def test_a_checkpoint_comes_when_a_multiple_of_every_is_passed(tmp_path: Path) -> None:
    """Iterations end at 8, 16, 24, …; multiples of 20 lie at or before 24, 40, 64 (60 < 64), and 72 is the end."""
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(72, CheckpointCallback(tmp_path, 20, keep=99))
    assert [checkpoints.steps_of(path) for path in checkpoints.in_folder(tmp_path)] == [72, 64, 40, 24, 0]


class Judge(BaseCallback):
    """An evaluation: best at step 19, then never again."""

    best_mean_reward = -np.inf

    def _on_step(self) -> bool:
        if self.num_timesteps == 19:
            self.best_mean_reward = 1.0
        return True


def test_the_best_is_kept_besides(tmp_path: Path) -> None:
    """Iterations are 8 steps long, so the first boundary after step 19 is at 24."""
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    model.learn(80, [Judge(), CheckpointCallback(tmp_path, 16, keep=2)])
    assert [checkpoints.steps_of(path) for path in checkpoints.in_folder(tmp_path)] == [80, 64, 24]
    assert checkpoints.best_of(tmp_path) == checkpoints.path_of(tmp_path, 24)
    PPOPlus.resume(checkpoints.path_of(tmp_path, 24), device="cpu")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-000000008.zip.abc.tmp").write_bytes(b"half")
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(8, CheckpointCallback(tmp_path, 8))
    assert not [*tmp_path.glob(".*")]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_two_trainings_do_not_mix_their_checkpoints(tmp_path: Path) -> None:
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(16, CheckpointCallback(tmp_path, 8))
    before = {path: path.read_bytes() for path in checkpoints.in_folder(tmp_path)}
    with pytest.raises(CheckpointError, match="holds checkpoints of another training"):
        PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(16, CheckpointCallback(tmp_path, 8))
    longer = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(32)
    for _ in range(2):  # being refused once makes the folder nobody's own
        with pytest.raises(CheckpointError, match="holds checkpoints of another training"):
            longer.learn(16, CheckpointCallback(tmp_path, 8), reset_num_timesteps=False)
    assert before == {path: path.read_bytes() for path in checkpoints.in_folder(tmp_path)}


def test_going_back_to_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path: Path) -> None:
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(32, CheckpointCallback(tmp_path, 8, keep=9))
    resumed = PPOPlus.resume(checkpoints.path_of(tmp_path, 16), device="cpu")
    resumed.learn(32, CheckpointCallback(tmp_path, 16, keep=9))
    assert [checkpoints.steps_of(path) for path in checkpoints.in_folder(tmp_path)] == [32, 16, 8, 0]
    aside = sorted(path.name for path in tmp_path.glob("*.passed-over"))
    assert aside == ["step-000000024.zip.passed-over", "step-000000032.zip.passed-over"]


def test_what_does_not_fit_is_refused_with_a_reason(tmp_path: Path) -> None:
    model = PPOPlus("MlpPolicy", make_vec_env("CartPole-v1", 2), **SMALL).learn(16, CheckpointCallback(tmp_path, 16))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="is of PPOPlus: resume it with that class"):
        A2CPlus.resume(tmp_path)
    with pytest.raises(CheckpointError, match="is of 2 environments, and `env` has 3"):
        PPOPlus.resume(tmp_path, make_vec_env("CartPole-v1", 3))
    with pytest.raises(CheckpointError, match="does not fit the environments: the state is of"):
        PPOPlus.resume(tmp_path, make_vec_env("CartPole-v1", 2, backend="gymnasium")).learn(32)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        PPOPlus.resume(empty)
    with pytest.raises(FileNotFoundError):
        PPOPlus.resume(tmp_path / "missing.zip")
    model.save(tmp_path / "model.zip")
    with pytest.raises(CheckpointError, match="is no checkpoint .a model that was saved"):
        PPOPlus.resume(tmp_path / "model.zip")
    with pytest.raises(TypeError, match="not for PPO"):
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).learn(8, CheckpointCallback(tmp_path / "x", 8))


@pytest.mark.parametrize("name", ["every", "keep"])
@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf"), "10", True])
def test_numbers_are_checked_at_once(name: str, value: Any) -> None:
    expected = TypeError if isinstance(value, (str, bool)) else ValueError
    with pytest.raises(expected, match=f"`{name}` must be a whole number of at least 1, got"):
        CheckpointCallback("somewhere", **{name: value})
    assert CheckpointCallback("somewhere", 1e6).every == 1_000_000


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(16, CheckpointCallback(folder, 8))
    return folder


def damaged(content: bytes, how: str) -> list[bytes]:
    rng = np.random.default_rng(0)
    if how == "truncated":
        positions = {0, 1, len(content) // 2, len(content) - 1, *rng.integers(len(content), size=46).tolist()}
        return [content[:position] for position in sorted(positions)]
    # The last ones are in the checksum itself and its label, the first one in the zip's first signature.
    positions = {0, len(content) - 1, len(content) - 70, *rng.integers(len(content), size=47).tolist()}
    return [content[:p] + bytes([content[p] ^ (1 << int(rng.integers(8)))]) + content[p + 1 :] for p in positions]


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_every_damage_is_recognised(how: str, sound: Path, tmp_path: Path) -> None:
    content = checkpoints.path_of(sound, 16).read_bytes()
    variants = damaged(content, how)
    assert len(variants) >= 48
    path = checkpoints.path_of(tmp_path, 16)
    shutil.copy(checkpoints.path_of(sound, 8), tmp_path)
    for variant in variants:
        path.write_bytes(variant)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            checkpoints.verify(path)
        with pytest.raises(CheckpointError, match=r"damaged|is no checkpoint"):
            PPOPlus.resume(path)
        with pytest.warns(UserWarning, match="Going back to the checkpoint before it, .*step-000000008.zip"):
            assert checkpoints.find(tmp_path).path == checkpoints.path_of(tmp_path, 8)
    path.write_bytes(content)
    checkpoints.verify(path)


def test_after_a_damaged_checkpoint_the_one_before_gives_the_same_end(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sound, folder)
    newest = checkpoints.path_of(folder, 16)
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="step-000000016.zip is damaged.*Going back"):
        resumed = PPOPlus.resume(folder, device="cpu")
    assert resumed.num_timesteps == 8
    resumed.learn(16, CheckpointCallback(folder, 8))
    cases.assert_same(checkpoints.path_of(sound, 16), newest)
    assert [path.name for path in folder.glob("*.passed-over")] == ["step-000000016.zip.passed-over"]


def test_without_an_intact_checkpoint_the_error_names_them_all(sound: Path, tmp_path: Path) -> None:
    for step in (8, 16):
        checkpoints.path_of(tmp_path, step).write_bytes(checkpoints.path_of(sound, step).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact: .*016.zip is damaged.*; .*008.zip"):
        PPOPlus.resume(tmp_path)


def test_a_checkpoint_of_a_later_version_is_not_guessed_at(sound: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    content = checkpoints.pack(checkpoints.path_of(sound, 16).read_bytes(), {})
    monkeypatch.undo()
    (tmp_path / "step-000000016.zip").write_bytes(content)
    with pytest.raises(CheckpointError, match="has format 2, and this version of sb3_pgplus reads 1"):
        PPOPlus.resume(tmp_path / "step-000000016.zip")


# --- a full disk ------------------------------------------------------------------------------------------------------


class Between(BaseCallback):
    """Does something when a step is reached."""

    def __init__(self, **actions: Any) -> None:
        super().__init__()
        self.actions = actions

    def _on_step(self) -> bool:
        self.actions.get(f"at_{self.num_timesteps}", int)()
        return True


def limit_files(n_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_training_goes_on_when_a_checkpoint_cannot_be_written(tmp_path: Path) -> None:
    """No file may be longer than 1000 bytes from step 20 to 36: that of step 32 fails, those of 16 and 48 do not."""
    limits = Between(at_20=lambda: limit_files(1000), at_36=lambda: limit_files(resource.RLIM_INFINITY))
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    with pytest.warns(UserWarning, match="step-000000032.zip could not be written .File too large.*goes on") as caught:
        model.learn(64, [limits, CheckpointCallback(tmp_path, 16, keep=9)])
    assert len([each for each in caught if "could not be written" in str(each.message)]) == 1
    assert model.num_timesteps == 64
    assert [checkpoints.steps_of(path) for path in checkpoints.in_folder(tmp_path)] == [64, 48, 16, 0]
    assert len([*tmp_path.iterdir()]) == 4
    for path in checkpoints.in_folder(tmp_path):
        checkpoints.verify(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_full_disk_the_older_checkpoints_stay(small_disk: Path) -> None:
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    with pytest.warns(UserWarning, match=f"{small_disk}/step-.* could not be written .No space left on device"):
        model.learn(128, CheckpointCallback(small_disk, 8, keep=99))
    assert model.num_timesteps == 128
    found = checkpoints.in_folder(small_disk)
    assert found and checkpoints.steps_of(found[0]) < 128
    for path in found:
        checkpoints.verify(path)
    assert PPOPlus.resume(small_disk, device="cpu").learn(128).num_timesteps == 128


def test_a_full_disk_ends_no_run_and_the_checkpoint_before_finishes_it_when_there_is_room(small_disk: Path) -> None:
    """A row of progress.csv has some 300 bytes and a checkpoint 30,000: of 500 rows and eleven, 90 KiB hold a part."""
    run, filler = small_disk / "run", small_disk / "filler"
    filler.write_bytes(b"x" * (256 - 90) * 1024)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = command(*TRAIN[:2], *TINY, "--eval-freq", "500", "--checkpoint-freq", "200", "--out", run)
    texts = {str(each.message) for each in caught if "could not be written" in str(each.message)}
    assert result.exit_code == 1 and "model.zip could not be written: No space left" in result.output.replace("\n", " ")
    assert any("progress.csv" in text for text in texts) and any("checkpoints/step-" in text for text in texts)
    assert all("No space left on device" in text and "Training goes on" in text for text in texts)
    assert not (run / "model.zip").exists() and not (run / "error.txt").exists() and not list(run.glob(".*.tmp"))
    before = checkpoints.find(run / "checkpoints").state["model"]["num_timesteps"]
    assert 0 <= before < 2200
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    finished = command(*TRAIN[:2], "--resume", run)
    assert finished.exit_code == 0 and (run / "model.zip").exists(), finished.output


def test_a_column_that_finds_no_room_leaves_the_rows_as_they_were(small_disk: Path) -> None:
    path, filler = small_disk / "progress.csv", small_disk / "filler"
    log = ProgressCSV(path)
    log.write({"time/total_timesteps": 10, "a": "x" * 5000}, {})
    filler.write_bytes(b"x" * (256 - 12) * 1024)
    for step in (20, 30):
        with pytest.warns(UserWarning, match=r"progress.csv could not be written .No space left"):
            log.write({"time/total_timesteps": step, "a": "y" * 5000, "b": 1}, {})
    filler.unlink()
    log.write({"time/total_timesteps": 40, "b": 2}, {})
    log.close()
    assert [(row["time/total_timesteps"], row["b"]) for row in cases.rows(path)] == [("10", ""), ("40", "2")]


# --- signals ----------------------------------------------------------------------------------------------------------

ENDLESS = """
import sys
from sb3_pgplus import PPOPlus
from sb3_pgplus.callbacks import CheckpointCallback
settings = {"n_steps": 8, "batch_size": 8, "n_epochs": 2, "device": "cpu", "seed": 0, "compile": False}
model = PPOPlus("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}, **settings)
try:
    model.learn(1e9, CheckpointCallback(sys.argv[1], 128))
finally:
    print("cleaned up")
"""


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


class StopAfter(BaseCallback):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        return self.num_timesteps <= self.steps


@pytest.mark.parametrize(
    ("number", "code", "last"), [(signal.SIGTERM, 143, ""), (signal.SIGINT, -signal.SIGINT, "KeyboardInterrupt")]
)
def test_after_a_signal_a_script_writes_a_checkpoint_and_ends(
    number: int, code: int, last: str, tmp_path: Path
) -> None:
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    prologue = "import signal as s; s.signal(s.SIGINT, s.default_int_handler)"
    command = [sys.executable, "-c", f"{prologue}\n{ENDLESS}", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: process.poll() is not None or any(map(checkpoints.steps_of, checkpoints.in_folder(tmp_path))))
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, output
    notice = f"{signal.Signals(number).name}: finishing this iteration, then stopping. Once more: stopping at once."
    assert notice in output and "cleaned up" in output and output.strip().endswith(last or "cleaned up")
    steps = checkpoints.steps_of(checkpoints.in_folder(tmp_path)[0])
    assert steps > 0 and steps % 8 == 0  # an iteration was finished
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL, compile=False)
    model.learn(1e9, [StopAfter(steps), CheckpointCallback(tmp_path / "same", steps, keep=9)])
    cases.assert_same(checkpoints.path_of(tmp_path, steps), checkpoints.path_of(tmp_path / "same", steps))


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_signals_find_their_handlers_again_and_all_callbacks_end_before_the_program(
    tmp_path: Path,
) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    usual = [signal.default_int_handler, signal.SIG_DFL]
    try:
        model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
        taken: list[Any] = []
        model.learn(8, [CheckpointCallback(tmp_path / "a"), Between(at_3=lambda: taken.extend(handlers()))])
        assert not set(taken) & set(usual) and handlers() == usual
        with pytest.raises(ZeroDivisionError):
            model.learn(8, [CheckpointCallback(tmp_path / "b"), Between(at_3=lambda: 1 / 0)])
        assert handlers() == usual
        for number, error in ((signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)):
            folder, last = tmp_path / str(number), Ended()
            sends = Between(at_3=lambda number=number: os.kill(os.getpid(), number))
            with pytest.raises(error, match="143" if number == signal.SIGTERM else ""):
                model.learn(64, [CheckpointCallback(folder), sends, last])
            assert last.ended and handlers() == usual
            assert [checkpoints.steps_of(path) for path in checkpoints.in_folder(folder)] == [8]
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


class Ended(BaseCallback):
    """Tells whether its training ended well."""

    ended = False

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.ended = True


def test_a_signal_that_the_program_handles_is_left_to_it(tmp_path: Path) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
        sends = Between(at_3=lambda: os.kill(os.getpid(), signal.SIGTERM))
        model.learn(64, [CheckpointCallback(tmp_path / "a"), sends])
        assert received == [signal.SIGTERM] and model.num_timesteps == 64
    finally:
        signal.signal(signal.SIGTERM, before)
    usual = handlers()
    taken: list[Any] = []
    callbacks = [CheckpointCallback(tmp_path / "b", on_signals=False), Between(at_3=lambda: taken.extend(handlers()))]
    model.learn(8, callbacks)
    assert taken == usual


def test_the_second_signal_acts_at_once_and_ignored_ones_stay_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interruption([signal.SIGINT, signal.SIGTERM]) as interruption:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.signal == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    with Interruption([signal.SIGTERM]), pytest.raises(SystemExit, match="143"):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, None)])
def test_a_deferred_signal_takes_effect_at_the_end_once(number: signal.Signals, error: Any) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda n, frame: received.append(n))
    done = []
    try:
        with pytest.raises(error) if error else nullcontext(), deferred():
            os.kill(os.getpid(), number)
            done.append("all of it")
            assert received == []
        assert done == ["all of it"] and received == ([] if error else [number])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_while_the_compiler_traces_waits_for_the_trace() -> None:
    course = []

    def function(x: th.Tensor) -> list[th.Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        course.append("traced to the end")
        return [x + 1]

    with pytest.raises(KeyboardInterrupt):
        compile_function(function, [th.zeros(2)])
    assert course == ["traced to the end"]
    assert not th.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert compile_function(lambda x: [x + 1], [th.zeros(2)])([th.ones(2)])[0].tolist() == [2, 2]


def test_in_another_thread_training_works_without_signals(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def learn() -> None:
        try:
            callback = CheckpointCallback(tmp_path, 8)
            PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(8, callback)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=learn)
    thread.start()
    thread.join()
    assert not errors and checkpoints.in_folder(tmp_path)


# --- the command line -------------------------------------------------------------------------------------------------

TRAIN = ("train", "--no-progress", "--eval-episodes", "0", "--device", "cpu")
TINY = ("--algo", "a2cplus", "--env", "CartPole-v1", "--n-envs", "1", "--n-timesteps", "2200", "--set", "n_steps=2")


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = command(*TRAIN, *TINY, "--checkpoint-freq", "1000", "--out", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_is_resumed_to_the_same_files(
    number: int, code: int, whole_run: Path, tmp_path: Path
) -> None:
    """1100 iterations, of which every second has a row in progress.csv; the interruption may come between two rows."""
    folder = tmp_path / "run"
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    program = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from sb3_pgplus.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *TRAIN, *TINY, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        progress = folder / "progress.csv"
        wait_for(lambda: process.poll() is not None or (progress.exists() and progress.read_text().count("\n") > 20))
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, output
    assert "Traceback" not in output and "--resume" in output
    found = checkpoints.in_folder(folder / "checkpoints")
    assert len(found) == 1 and (folder / "model.zip").exists()  # only the last one, since nobody asked for more
    result = command(*TRAIN, "--resume", folder, "--checkpoint-freq", "1000")
    assert result.exit_code == 0, result.output
    cases.assert_same_runs(whole_run, folder)
    again = command(*TRAIN, "--resume", folder)
    assert again.exit_code == 2 and "has finished: it has all of its 2,200 steps" in again.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("backend", "number", "code"),
    [("subproc", signal.SIGINT, 130), ("workers", signal.SIGINT, 130), ("workers", signal.SIGTERM, 143)],
)
def test_a_signal_to_all_processes_saves_the_model(backend: str, number: int, code: int, tmp_path: Path) -> None:
    """
    A terminal sends Ctrl-C to all processes, and a cluster SIGTERM: SB3's workers end, and the checkpoint before stays;
    ours leave it to the training, which finishes its iteration.
    """
    folder = tmp_path / "run"
    options = ("--env", "CartPole-v1", "--n-envs", "2", "--backend", backend, "--n-timesteps", "1e6")
    settings = ("--set", "n_steps=256", "--set", "batch_size=64", "--set", "n_epochs=1", "--checkpoint-freq", "512")
    program = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from sb3_pgplus.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *TRAIN, *options, *settings, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: process.poll() is not None or len(checkpoints.in_folder(folder / "checkpoints")) > 1)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, output
    assert "Interrupted after" in output and (folder / "model.zip").exists() and not (folder / "error.txt").exists()
    found = checkpoints.find(folder / "checkpoints")
    if backend == "workers":
        assert checkpoints.steps_of(found.path) == PPOPlus.load(folder / "model.zip").num_timesteps


def test_a_resumed_run_remembers_how_it_was_started(tmp_path: Path) -> None:
    """64 iterations of 16 steps; evaluations every 128 steps: eight of them, whether or not it was interrupted."""
    settings = ("--env", "CartPole-v1", "--n-envs", "2", "--set", "n_steps=8", "--set", "batch_size=16")
    run, options = tmp_path / "run", ("--eval-freq", "128", "--eval-episodes", "3", "--checkpoint-freq", "16")
    plain = ("train", "--no-progress", "--device", "cpu")
    result = command(*plain, *settings, *options, "--n-timesteps", "1024", "--num-threads", "1", "--out", run)
    assert result.exit_code == 0, result.output
    whole = np.load(run / "evaluations.npz")
    assert whole["results"].shape == (8, 3)
    (run / "model.zip").unlink()
    for path in checkpoints.in_folder(run / "checkpoints"):
        if checkpoints.steps_of(path) == 1024:  # as if it had been killed before its last iteration
            path.unlink()
    result = command(*plain, "--resume", run)
    assert result.exit_code == 0, result.output
    resumed = np.load(run / "evaluations.npz")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole if name != "seconds")
    assert "3 episodes" in result.output and (run / "model.zip").exists()
    command_line = resumed_runs.options_of(run)
    assert command_line == {"num_threads": 1, "eval_episodes": 3, "eval_freq": 128, "eval_video": False}


def test_the_model_of_an_earlier_interruption_is_replaced_though_all_steps_are_done(
    whole_run: Path, tmp_path: Path
) -> None:
    """Killed after the last checkpoint and before the model was saved."""
    copy = tmp_path / "run"
    shutil.copytree(whole_run, copy)
    shutil.copy(checkpoints.path_of(copy / "checkpoints", 2000), copy / "model.zip")
    result = command(*TRAIN, "--resume", copy)
    assert result.exit_code == 0, result.output
    assert A2CPlus.load(copy / "model.zip").num_timesteps == 2200


def test_resume_refuses_what_it_cannot_do(whole_run: Path, tmp_path: Path) -> None:
    for option in (("--env", "CartPole-v1"), ("--seed", 1), ("--out", tmp_path), ("--set", "n_steps=3")):
        result = command(*TRAIN, "--resume", whole_run, *option)
        assert result.exit_code == 2 and f"leave out {option[0]}" in result.output.replace("\n", " ")
    result = command(*TRAIN, "--resume", tmp_path)
    assert result.exit_code == 2 and "is no run folder" in result.output.replace("\n", " ")
    copy = tmp_path / "copy"
    shutil.copytree(whole_run, copy)
    for path in checkpoints.in_folder(copy / "checkpoints"):
        path.write_bytes(b"nonsense")
    result = command(*TRAIN, "--resume", copy)
    assert result.exit_code == 2 and "no checkpoint in" in result.output
    shutil.rmtree(copy / "checkpoints")
    result = command(*TRAIN, "--resume", copy)
    assert result.exit_code == 2 and "has no checkpoint to go on from" in result.output.replace("\n", " ")


def test_progress_csv_cuts_what_will_come_again_and_what_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    log = ProgressCSV(path)
    log.write({"time/total_timesteps": 10, "a": 1.5}, {})
    log.write({"time/total_timesteps": 20, "b": 'say "x", y'}, {})
    log.write({"time/total_timesteps": 30, "a": 2.5}, {})
    log.close()
    path.write_text(path.read_text() + "4.5,4")  # killed in the middle of a row
    log = ProgressCSV(path, continue_at=20)
    log.write({"time/total_timesteps": 30, "c": 7}, {})
    log.close()
    assert cases.rows(path) == [
        {"a": "1.5", "time/total_timesteps": "10", "b": "", "c": ""},
        {"a": "", "time/total_timesteps": "20", "b": 'say "x", y', "c": ""},
        {"a": "", "time/total_timesteps": "30", "b": "", "c": "7"},
    ]


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "kind"), [("ppoplus", "eight environments"), ("trpoplus", "mujoco")])
def test_killed_at_random_moments_and_resumed_it_ends_the_same(algorithm: str, kind: str, tmp_path: Path) -> None:
    """The long form of this is tests/resume/kill_and_resume.py."""
    rng = np.random.default_rng([cases.seed_of(algorithm), 1])
    settings = cases.run_settings(algorithm, kind, n_iterations=8)
    every = settings.n_timesteps // 8
    started = time.monotonic()
    cases.finish(settings, tmp_path / "whole", every)
    seconds = time.monotonic() - started
    n_killed, run = 0, tmp_path
    while not n_killed:  # the machine's speed varies: all may be done before the moment comes
        run, seconds = run / "run", seconds / 2 if run != tmp_path else seconds
        for moment in rng.uniform(0.2, 0.9, 2):
            if not cases.is_finished(settings, run):
                n_killed += cases.killed(settings, run, every, seconds * moment)
    cases.finish_unless_finished(settings, run, every)
    cases.assert_same_runs(tmp_path / "whole", run)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("never_killed") / "run"
    settings = cases.run_settings("ppoplus", "one environment", n_iterations=6)
    cases.finish(settings, folder, settings.n_timesteps // 6)
    return folder


@pytest.mark.parametrize("place", cases.PLACES)
def test_killed_while_a_checkpoint_is_written_it_goes_on_from_a_whole_one(
    place: str, never_killed: Path, tmp_path: Path
) -> None:
    settings = cases.run_settings("ppoplus", "one environment", n_iterations=6)
    every = settings.n_timesteps // 6
    process = cases.process_of(settings, tmp_path / "run", every, dies_at=(place, 3))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    found = checkpoints.in_folder(tmp_path / "run" / "checkpoints")
    # The fourth one is that of step 3 · every: the first is made before the first step.
    assert checkpoints.steps_of(found[0]) == (3 if place == "in place" else 2) * every
    for path in found:
        checkpoints.verify(path)
    cases.finish(settings, tmp_path / "run", every)
    cases.assert_same_runs(never_killed, tmp_path / "run")
