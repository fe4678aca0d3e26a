"""
PPO's update on a device, a GPU for example: as CUDA graphs and eagerly, against SB3's with the same settings.

    python benchmarks/device_update.py --device cuda
    python benchmarks/device_update.py --device cuda --recipe images

``mlp``: SB3's default recipe, 2048 samples of HalfCheetah-v5 (8 environments × 256 steps), 64×64 networks, 10 epochs
of minibatches of 64. ``images``: NatureCNN on 84×84×4 frames, 8 × 128, 4 epochs of minibatches of 256. Each round times
one ``train()`` of each on a rollout that stays the same, in alternating order, until the device has finished. Printed
are medians, the median of the rounds' own ratios with its interquartile range, and how often a whole update, its
logging included, waits for the GPU, as torch's own sync debug mode counts it.
"""

import argparse
import time
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_pgplus import PPOPlus, presets


class Frames(gym.Env[Any, Any]):
    """Noise in the shape of stacked Atari frames."""

    observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = spaces.Discrete(6)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """A first frame."""
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Another one; the reward is the action."""
        return self.observation_space.sample(), float(action), bool(self.np_random.random() < 0.01), False, {}


#: Name → policy, environment, environments, settings.
RECIPES: dict[str, tuple[str, Any, int, dict[str, Any]]] = {
    "mlp": ("MlpPolicy", "HalfCheetah-v5", 8, {"n_steps": 256, "batch_size": 64, "n_epochs": 10}),
    "images": ("CnnPolicy", Frames, 8, {"n_steps": 128, "batch_size": 256, "n_epochs": 4}),
}


def with_rollout(cls: Any, recipe: str, device: str, settings: dict[str, Any]) -> Any:
    """A model that has collected a rollout."""
    policy, env_id, n_envs, common = RECIPES[recipe]
    model = cls(policy, make_vec_env(env_id, n_envs, seed=0), seed=0, device=device, **{**settings, **common})
    _, callback = model._setup_learn(10_000_000)
    if isinstance(model, PPOPlus):
        model._plan_engine()
    model.collect_rollouts(model.env, callback, model.rollout_buffer, common["n_steps"])
    return model


def seconds_of(model: Any) -> float:
    """Seconds of one update, to the end of the device's work."""
    started = time.perf_counter()
    model.train()
    if model.device.type == "cuda":
        th.cuda.synchronize(model.device)
    return time.perf_counter() - started


def waits_of(model: Any) -> int:
    """How often one update waits for the GPU."""
    th.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.train()
    finally:
        th.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if th.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", choices=list(RECIPES), default="mlp")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    th.set_num_threads(1)
    ours = {**presets.SB3_PPO, "sb3_exact": False}
    models = {
        "SB3": with_rollout(PPO, options.recipe, options.device, {}),
        "PPOPlus, eager": with_rollout(PPOPlus, options.recipe, options.device, ours | {"compile": False}),
        "PPOPlus, compiled": with_rollout(PPOPlus, options.recipe, options.device, ours | {"compile": True}),
    }
    for model in models.values():
        for _ in range(3):  # compiling, recording, and most of the comparisons with the eager update
            seconds_of(model)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(options.rounds):
        for name in list(models)[:: 1 if round_ % 2 else -1]:
            seconds[name].append(seconds_of(models[name]))
    for name, values in seconds.items():
        low, middle, high = np.percentile(np.array(seconds["SB3"]) / np.array(values), [25, 50, 75])
        waits = f", waits {waits_of(models[name])} times" if options.device.startswith("cuda") else ""
        print(f"{name:>18}: {np.median(values) * 1e3:7.2f} ms, {middle:5.2f} [{low:.2f}, {high:.2f}] times SB3{waits}")
    print(models["PPOPlus, compiled"].engine_report())


if __name__ == "__main__":
    main()
