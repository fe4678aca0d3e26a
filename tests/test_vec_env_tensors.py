"""Environments on the training device: the same training as through NumPy, without a look at the device per step."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus
from sb3_pgplus.errors import NonFiniteEnvironmentError
from sb3_pgplus.guards import without_distribution_checks
from sb3_pgplus.vec_env.tensors import TensorInfos, TensorStep, TensorVecEnv, episodes_of

N = 3
SIZES: dict[Any, dict[str, Any]] = {
    PPOPlus: {"n_steps": 16, "batch_size": 24, "n_epochs": 2},
    A2CPlus: {"n_steps": 16},
    TRPOPlus: {"n_steps": 16, "batch_size": 24, "n_critic_updates": 2},
}


class Walk(TensorVecEnv):
    """
    A position that actions move. It ends beyond ±2 and is cut after 5 steps; both may happen at once.

    :param as_dict: observe a dict
    :param action_space: of one environment
    :param spoil: step at which the reward of environment 1 becomes NaN
    """

    def __init__(self, as_dict: bool = False, action_space: Any = None, spoil: int = -1) -> None:
        self.as_dict, self.spoil, self.age = as_dict, spoil, 0
        self.box = spaces.Box(-10, 10, (2,))
        observed = spaces.Dict({"position": self.box}) if as_dict else self.box
        super().__init__(N, observed, action_space or spaces.Box(-1, 1, (1,)))
        self.random = th.Generator().manual_seed(0)

    def reset_tensors(self, seed: int | None) -> Any:
        if seed is not None:
            self.random.manual_seed(seed)
        self.position, self.t = self._start(), th.zeros(N)
        return self._observe()

    def _start(self) -> th.Tensor:
        return th.rand(N, generator=self.random) - 0.5

    def _observe(self) -> Any:
        observed = th.stack([self.position, self.t], dim=1)
        return {"position": observed} if self.as_dict else observed

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        self.age += 1
        self.position = self.position + actions.reshape(N).float()
        self.t = self.t + 1
        rewards = -self.position.abs()
        if self.age == self.spoil:
            rewards[1] = math.nan
        final, terminated, truncated = self._observe(), self.position.abs() > 2, self.t >= 5
        dones = terminated | truncated
        self.position, self.t = th.where(dones, self._start(), self.position), th.where(dones, 0.0, self.t)
        return TensorStep(self._observe(), rewards, terminated, truncated, final)


class ThroughNumpy(Walk):
    """The same environment, but what steps it sees NumPy arrays and dicts alone."""

    def step_async(self, actions: Any) -> None:
        super().step_async(np.asarray(actions))


def parameters_of(model: Any) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@pytest.mark.parametrize("action_space", [None, spaces.Discrete(2)], ids=["Box", "Discrete"])
@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("cls", SIZES)
def test_training_on_tensors_equals_training_through_numpy(cls: Any, as_dict: bool, action_space: Any) -> None:
    models = []
    for env_class, hides in ((Walk, False), (Walk, True)):
        env: Any = env_class(as_dict, action_space)
        model = cls("MultiInputPolicy" if as_dict else "MlpPolicy", env, seed=1, device="cpu", **SIZES[cls])
        if hides:
            model._trains_on_tensors_of = lambda _: False
        models.append(model.learn(4 * 16 * N))
    tensors, host = models
    assert th.equal(parameters_of(tensors), parameters_of(host))
    assert [(e["r"], e["l"]) for e in tensors.ep_info_buffer] == [(e["r"], e["l"]) for e in host.ep_info_buffer]
    assert len(tensors.ep_info_buffer) > 0
    for name in ("rewards", "values", "advantages", "next_values", "dones", "episode_starts"):
        np.testing.assert_array_equal(getattr(tensors.rollout_buffer, name), getattr(host.rollout_buffer, name))


def test_a_rollout_does_not_look_at_the_device_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("cpu", "tolist", "item", "__bool__", "__float__", "nonzero"):
        original = getattr(th.Tensor, name)

        def recorded(self: Any, *args: Any, _name: str = name, _original: Any = original) -> Any:
            seen.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(th.Tensor, name, recorded)
    looks = []
    for n_steps in (16, 64):
        model = A2CPlus("MlpPolicy", Walk(), seed=1, device="cpu", n_steps=n_steps, bootstrap_truncated=False)
        _, callback = model._setup_learn(10_000)
        seen.clear()
        with without_distribution_checks():
            model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
        looks.append(list(seen))
    assert looks[0] == looks[1]  # as many for 16 steps as for 64


def test_a_truncated_step_bootstraps_from_its_final_observation_and_a_terminated_one_from_nothing() -> None:
    off = {"normalize_observations": False, "recompute_advantages": False}
    model = PPOPlus("MlpPolicy", Walk(), seed=1, device="cpu", **SIZES[PPOPlus], **off)
    kept: list[TensorInfos] = []
    model.learn(16 * N, callback=lambda found, _: kept.append(found["infos"]) or True)
    next_values = model.rollout_buffer.next_values
    fresh = PPOPlus("MlpPolicy", Walk(), seed=1, device="cpu", **SIZES[PPOPlus], **off)
    n_cut = n_ended = 0
    for t, infos in enumerate(kept):
        for n in range(N):
            if infos.truncated[n]:
                with th.no_grad():
                    value = fresh.policy.predict_values(infos.final_observations[n : n + 1])
                assert next_values[t, n] == pytest.approx(float(value), abs=1e-6)
                n_cut += 1
            elif infos.dones[n]:
                assert next_values[t, n] == 0
                n_ended += 1
    assert n_cut > 0
    assert n_ended > 0


def test_a_nonfinite_reward_is_reported_with_environment_and_step() -> None:
    model = PPOPlus("MlpPolicy", Walk(spoil=21), seed=1, device="cpu", **SIZES[PPOPlus])
    with pytest.raises(NonFiniteEnvironmentError, match="environment 1 returned the reward nan at its step 21"):
        model.learn(10 * 16 * N)


def test_numpy_actions_give_what_sb3_expects() -> None:
    env = Walk()
    observations = env.reset()
    assert isinstance(observations, np.ndarray)
    lengths: list[int] = []
    for _ in range(12):
        observations, rewards, dones, infos = env.step(np.full((N, 1), 0.1, dtype=np.float32))
        assert (rewards.dtype, dones.dtype) == (np.float32, np.bool_)
        assert [set(info) for info in infos] == [
            {"TimeLimit.truncated", "terminal_observation", "episode"} if done else {"TimeLimit.truncated"}
            for done in dones
        ]
        for info, done, observation in zip(infos, dones, observations, strict=True):
            if done:
                assert info["terminal_observation"][1] == 5  # its age; the next episode's is 0
                assert observation[1] == 0
                lengths.append(info["episode"]["l"])
    assert lengths == [5] * 2 * N  # 12 steps hold two episodes of 5 for each


def test_a_list_of_actions_gives_what_sb3_expects_too() -> None:
    env, other = Walk(), Walk()
    assert np.array_equal(env.reset(), other.reset())
    actions = [[0.1], [0.2], [0.3]]
    observations, rewards, dones, infos = env.step(actions)
    expected = other.step(np.array(actions))
    assert (type(observations), type(rewards), type(dones), type(infos)) == (np.ndarray, np.ndarray, np.ndarray, list)
    assert np.array_equal(observations, expected[0]) and np.array_equal(rewards, expected[1])


def test_reset_options_are_refused_once() -> None:
    env = Walk()
    env.set_options({"wind": 1})
    with pytest.raises(ValueError, match="Walk takes no reset options.*wind"):
        env.reset()
    env.reset()


@pytest.mark.parametrize("build", [Walk, lambda: countdown(N)], ids=["tensors", "jax"])
def test_a_step_before_the_first_reset_is_refused(build: Any) -> None:
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        build().step(np.zeros(N, dtype=int))


@pytest.mark.parametrize("bad, error", [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_what_is_no_number_of_copies_is_refused(bad: Any, error: type[Exception]) -> None:
    class Still(Walk):
        def __init__(self) -> None:
            TensorVecEnv.__init__(self, bad, spaces.Box(-1, 1, (2,)), spaces.Discrete(2))

    with pytest.raises(error, match=f"`num_envs` must be an integer of at least 1, got {bad}"):
        Still()


def test_an_end_at_the_time_limit_is_a_termination() -> None:
    env = Walk()
    env.reset()
    env.position, env.t = th.tensor([5.0, 0.0, 5.0]), th.tensor([4.0, 4.0, 0.0])
    infos = env.step(th.zeros(N, 1))[3]
    assert infos.dones.tolist() == [True, True, True]
    assert infos.truncated.tolist() == [False, True, False]


def test_returns_and_lengths_are_those_of_the_rewards() -> None:
    env = Walk()
    env.reset()
    steps = [env.step(th.full((N, 1), 0.3)) for _ in range(11)]
    sums, expected = [0.0] * N, []
    for _, rewards, dones, _ in steps:
        for n in range(N):
            sums[n] += float(rewards[n])
            if dones[n]:
                expected.append((n, pytest.approx(sums[n], abs=1e-5)))
                sums[n] = 0.0
    indices, episodes = episodes_of([infos for *_, infos in steps])
    assert [(n, episode["r"]) for n, episode in zip(indices, episodes, strict=True)] == expected
    assert {episode["l"] for episode in episodes} == {5}


def test_sb3s_algorithms_wrappers_and_evaluation_take_it() -> None:
    env = Walk()
    PPO("MlpPolicy", VecNormalize(env), n_steps=16, batch_size=24, n_epochs=1, device="cpu").learn(48)
    model = PPOPlus("MlpPolicy", VecNormalize(Walk()), device="cpu", **SIZES[PPOPlus]).learn(48)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=4)
    assert math.isfinite(mean)
    assert env.env_is_wrapped(Monitor) == [True] * N
    assert env.get_attr("num_envs") == [N] * N
    for call in (lambda: env.set_attr("x", 1), lambda: env.env_method("f")):
        with pytest.raises(AttributeError, match="runs its copies as one"):
            call()


class Reusing(Walk):
    """Writes every step into the tensors of the step before, as simulators do."""

    reuses_memory = True

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        step = super().step_tensors(actions)
        if not hasattr(self, "memory"):
            self.memory = TensorStep(*(part.clone() for part in step))
        for old, new in zip(self.memory, step, strict=True):
            old.copy_(new)
        return self.memory


def test_a_simulator_that_reuses_its_memory_trains_the_same() -> None:
    models = [PPOPlus("MlpPolicy", e, seed=1, device="cpu", **SIZES[PPOPlus]).learn(192) for e in (Walk(), Reusing())]
    assert th.equal(parameters_of(models[0]), parameters_of(models[1]))


# --- JAX --------------------------------------------------------------------------------------------------------------


def pendulum(num_envs: int = 4, **kwargs: Any) -> Any:
    pytest.importorskip("jax")
    pytest.importorskip("flax")  # which Gymnasium's phys2d is written with
    from gymnasium.envs.phys2d.pendulum import PendulumFunctional

    from sb3_pgplus.vec_env.jax_adapter import JaxVecEnv

    return JaxVecEnv(PendulumFunctional(), num_envs, 200, **kwargs)


def countdown(num_envs: int = 4, max_episode_steps: int | None = 7) -> Any:
    """A state that counts up by the action and ends at 5: everything about it is known."""
    jnp = pytest.importorskip("jax.numpy")
    from gymnasium.experimental.functional import FuncEnv

    from sb3_pgplus.vec_env.jax_adapter import JaxVecEnv

    class Countdown(FuncEnv):  # type: ignore[misc,type-arg]  # its type parameters need JAX's types
        observation_space = spaces.Box(-np.inf, np.inf, (1,))
        action_space = spaces.Discrete(2)

        def initial(self, rng: Any, params: Any = None) -> Any:
            return jnp.zeros(1)

        def transition(self, state: Any, action: Any, rng: Any, params: Any = None) -> Any:
            return state + action

        def observation(self, state: Any, rng: Any, params: Any = None) -> Any:
            return state

        def reward(self, state: Any, action: Any, next_state: Any, rng: Any, params: Any = None) -> Any:
            return next_state[0]

        def terminal(self, state: Any, rng: Any, params: Any = None) -> Any:
            return state[0] >= 5

    return JaxVecEnv(Countdown(), num_envs, max_episode_steps)


def test_jax_copies_end_and_begin_anew_each_for_itself() -> None:
    env = countdown(2)
    env.reset()
    ends = []
    for t in range(1, 15):
        observations, _, dones, infos = env.step(th.tensor([1, 0]))
        for n in dones.nonzero().flatten().tolist():
            ends.append((t, n, bool(infos.truncated[n]), float(infos.final_observations[n]), float(observations[n])))
    # Environment 0 counts to 5 in 5 steps; 1 stands still and is cut after 7.
    assert ends == [(5, 0, False, 5.0, 0.0), (7, 1, True, 0.0, 0.0), (10, 0, False, 5.0, 0.0), (14, 1, True, 0.0, 0.0)]


def test_jax_steps_are_those_of_the_environments_own_functions() -> None:
    env = pendulum(3, seed=5)
    env.reset()
    state = env._state
    actions = th.tensor([[0.5], [-3.0], [2.0]])
    observations, rewards, _, _ = env.step(actions)
    import jax.numpy as jnp

    for n in range(3):
        after = env.func_env.transition(state[n], jnp.asarray(actions[n].numpy()), None)
        expected = env.func_env.reward(state[n], jnp.asarray(actions[n].numpy()), after, None)
        assert float(rewards[n]) == pytest.approx(float(expected), abs=1e-5)
        np.testing.assert_allclose(observations[n].numpy(), env.func_env.observation(after, None), atol=1e-6)


def test_jax_random_numbers_follow_the_seed() -> None:
    env, other = pendulum(), pendulum()
    first = []
    for each in (env, other):
        each.seed(3)
        first.append(each.reset())
    np.testing.assert_array_equal(*first)
    assert not np.array_equal(env.reset(), first[0])


@pytest.mark.parametrize("cls", SIZES)
def test_algorithms_train_on_jax_environments(cls: Any) -> None:
    model = cls("MlpPolicy", countdown(), seed=0, device="cpu", **SIZES[cls]).learn(20 * 64)
    assert model.ep_info_buffer[-1]["l"] <= 7
    assert model._trains_on_tensors_of(model.env)


@pytest.mark.parametrize("name", ["num_envs", "max_episode_steps"])
@pytest.mark.parametrize("bad, error", [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_jax_refuses_what_is_no_number_of_copies_or_steps(name: str, bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`{name}` must be an integer of at least 1, got {bad}"):
        countdown(**{name: bad})


def test_jax_environments_without_a_seed_differ() -> None:
    assert not np.array_equal(countdown().get_state()["key"], countdown().get_state()["key"])


@pytest.mark.parametrize("dtype", [th.uint8, th.int64, th.float32])
def test_ends_may_be_of_any_type(dtype: th.dtype) -> None:
    class Bytes(Walk):
        def step_tensors(self, actions: th.Tensor) -> TensorStep:
            step = super().step_tensors(actions)
            return step._replace(terminated=step.terminated.to(dtype), truncated=step.truncated.to(dtype))

    expected, found = Walk(), Bytes()
    for env in (expected, found):
        env.reset()
    for _ in range(11):
        one, other = (env.step(th.full((N, 1), 0.3)) for env in (expected, found))
        assert th.equal(one[2], other[2]) and other[2].dtype == th.bool
        assert th.equal(one[3].returns, other[3].returns) and th.equal(one[3].lengths, other[3].lengths)
