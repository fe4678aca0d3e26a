"""How many of torch's threads each part of a training gets; never more than there were, and all of them afterwards."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus, presets, trpo
from sb3_pgplus.core.natural_gradient import conjugate_gradient
from sb3_pgplus.policies import ObservationNormalizer
from sb3_pgplus.threads import ThreadLimit, threads_for


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = th.get_num_threads()
    th.set_num_threads(4)
    yield
    th.set_num_threads(before)


def mlp(width: int, n_inputs: int = 10) -> ActorCriticPolicy:
    box, choice = spaces.Box(-1, 1, (n_inputs,), np.float32), spaces.Discrete(2)
    return ActorCriticPolicy(box, choice, lambda _: 1e-3, net_arch=[width])


def inside(limit: ThreadLimit) -> int:
    with limit:
        return th.get_num_threads()


def test_threads_grow_with_the_work_up_to_those_there_are() -> None:
    # Two networks of 10 × 1000, and 1000 × 2 and 1000 × 1 behind them: 23 000 multiply-adds per sample, of which four
    # million are worth a thread: 174 samples each.
    policy = mlp(1000)
    found = [inside(threads_for(policy, n)) for n in (1, 347, 348, 521, 522, 10_000)]
    assert found == [1, 1, 2, 2, 3, 4]
    assert th.get_num_threads() == 4


def test_convolutions_have_all_threads() -> None:
    images = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    policy = ActorCriticCnnPolicy(images, spaces.Discrete(2), lambda _: 1e-3)
    assert inside(threads_for(policy, 1)) == 4


class Lazy(BaseFeaturesExtractor):
    """Of the user's own: how often it applies its layers is unknown, and here also how large they are."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 8)
        self.layer = nn.LazyLinear(8)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layer(observations)


def test_layers_of_unknown_work_have_all_threads() -> None:
    box, choice = spaces.Box(-1, 1, (4,), np.float32), spaces.Discrete(2)
    policy = ActorCriticPolicy(box, choice, lambda _: 1e-3, ortho_init=False, features_extractor_class=Lazy)
    assert inside(threads_for(policy, 1)) == 4
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 2))
    assert inside(threads_for(attention, 1)) == 4
    options = {"features_extractor_class": Lazy, "optimizer_class": th.optim.Adam}
    PPOPlus("MlpPolicy", "CartPole-v1", n_steps=32, ortho_init=False, policy_kwargs=options).learn(32)


def test_passes_over_a_small_rollout_inside_an_update_have_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # 320 samples of 8768 multiply-adds: 0.7 threads, though this pass is none of a minibatch.
    found, recompute = [], PPOPlus._recompute_advantages

    def noted(*args: Any) -> None:
        found.append(th.get_num_threads())
        recompute(*args)

    monkeypatch.setattr(PPOPlus, "_recompute_advantages", noted)
    PPOPlus("MlpPolicy", Counting(), n_steps=320, batch_size=64, n_epochs=3, seed=0).learn(320)
    assert found == [1, 1]


def test_sub_sampled_products_have_the_threads_of_their_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1800 of 3600 samples for the step: 8768 multiply-adds each make 3.9 threads. Every fourth of them: 0.99.
    found = []

    def watched(matvec: Any, b: th.Tensor, **options: Any) -> Any:
        found.append(th.get_num_threads())
        return conjugate_gradient(matvec, b, **options)

    monkeypatch.setattr(trpo, "conjugate_gradient", watched)
    settings = {"n_steps": 3600, "sub_sampling_factor": 2, "normalize_observations": False, "batch_size": 100}
    for factor, expected in ((1, 3), (4, 1)):
        TRPOPlus("MlpPolicy", Counting(), **settings, fisher_sub_sampling_factor=factor, compile=False).learn(3600)
        assert found.pop() == expected and not found


def test_a_limit_never_gives_more_threads_than_outside_and_gives_them_back_after_an_error() -> None:
    with ThreadLimit(2):
        assert inside(ThreadLimit(3)) == 2
        with pytest.raises(RuntimeError, match="inside"), ThreadLimit(1):
            raise RuntimeError("inside")
        assert th.get_num_threads() == 2
    assert th.get_num_threads() == 4


class Watched(ActorCriticPolicy):
    """Notes how many samples went through its actor, with how many threads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: set[tuple[int, int]] = set()

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        self.seen.add((len(latent_pi), th.get_num_threads()))
        return super()._get_action_dist_from_latent(latent_pi)


class WatchedTRPO(TRPOPlus):
    """Notes the minibatches of the critic, too."""

    def _critic_loss(self, values: th.Tensor, batch: Any, hp: Any) -> Any:
        self.policy.seen.add((len(values), th.get_num_threads()))
        return super()._critic_loss(values, batch, hp)


class Counting(gym.Env[Any, Any]):
    """Notes the threads that an environment of torch's would have."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)
    threads: set[int]

    def __init__(self) -> None:
        Counting.threads = set()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        Counting.threads.add(th.get_num_threads())
        return self.observation_space.sample(), 0.0, bool(self.np_random.random() < 0.1), False, {}


@pytest.mark.parametrize(
    ("algorithm", "options", "expected"),
    [
        (PPOPlus, {"batch_size": 100}, {(1, 1), (100, 1)}),
        (PPOPlus, {"batch_size": 1000, "n_steps": 1000, "recompute_advantages": False}, {(1, 1), (1000, 2)}),
        (A2CPlus, {}, {(1, 1), (1800, 3)}),
        (WatchedTRPO, {"batch_size": 100}, {(1, 1), (1800, 3), (100, 1)}),
    ],
)
def test_each_part_of_a_training_has_the_threads_that_it_can_use(
    algorithm: Any, options: dict[str, Any], expected: set[tuple[int, int]]
) -> None:
    # Two networks of 3 × 64 and 64 × 64 with 64 × 2 and 64 × 1 behind them: 8768 multiply-adds per sample, 456 samples
    # for each thread.
    settings = {"n_steps": 1800, "normalize_observations": False, "seed": 0, **options}
    model = algorithm(Watched, Counting(), **settings).learn(settings["n_steps"])
    assert model.policy.seen == expected
    assert Counting.threads == {4}
    assert th.get_num_threads() == 4


def test_nothing_wakes_threads_just_before_a_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    # They would spin for milliseconds on the cores that the environments need.
    found, merge, log = [], ObservationNormalizer.merge, PPOPlus._log_update

    def noted(original: Any) -> Any:
        def call(*args: Any) -> None:
            found.append(th.get_num_threads())
            original(*args)

        return call

    monkeypatch.setattr(ObservationNormalizer, "merge", noted(merge))
    monkeypatch.setattr(PPOPlus, "_log_update", noted(log))
    PPOPlus("MlpPolicy", Counting(), n_steps=64, batch_size=64, seed=0).learn(128)
    assert found == [1, 1, 1, 1]  # the first rollout is merged before its update, the second before the next rollout


def test_sb3_exact_keeps_the_threads_that_sb3_has() -> None:
    model = PPOPlus(Watched, Counting(), **{**presets.SB3_PPO, "n_steps": 128, "n_epochs": 1, "seed": 0}).learn(128)
    assert {threads for _, threads in model.policy.seen} == {4}
