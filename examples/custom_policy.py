"""
Networks of your own: a features extractor and an actor-critic policy, with normalisation still inside the model.

What you learn here: custom classes are written as for SB3, and PPOPlus adds the observation statistics to them. Your
code sees normalised observations, `predict` takes raw ones, and the zip file holds networks and statistics.

    python examples/custom_policy.py
"""

import argparse
from pathlib import Path

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_pgplus import PPOPlus
from sb3_pgplus.policies import observation_normalizer


class WithSquares(BaseFeaturesExtractor):
    """Observations x and their squares: ``[B, D]`` in, ``[B, 2 D]`` out."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=2 * int(np.prod(observation_space.shape)))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        flat = observations.flatten(start_dim=1)
        return th.cat([flat, flat**2], dim=1)


class LayerNormTrunks(nn.Module):
    """Separate trunks of actor and critic. SB3 asks for these two dimensions and these three methods."""

    def __init__(self, features_dim: int, width: int) -> None:
        super().__init__()
        self.latent_dim_pi = width
        self.latent_dim_vf = width
        self.actor = self._trunk(features_dim, width)
        self.critic = self._trunk(features_dim, width)

    @staticmethod
    def _trunk(inputs: int, width: int) -> nn.Sequential:
        hidden = [nn.Linear(inputs, width), nn.LayerNorm(width), nn.SiLU()]
        return nn.Sequential(*hidden, nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU())

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        latent: th.Tensor = self.actor(features)
        return latent

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        latent: th.Tensor = self.critic(features)
        return latent


class LayerNormPolicy(ActorCriticPolicy):
    """SB3's policy with other trunks; the heads for actions and value stay SB3's."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = LayerNormTrunks(self.features_dim, width=64)  # type: ignore[assignment]  # another class


def main() -> None:
    parser = argparse.ArgumentParser(description="Train PPOPlus with a policy class of your own on Pendulum.")
    parser.add_argument("--timesteps", type=float, default=100_000, help="environment steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/custom_policy"), help="folder for the model")
    args = parser.parse_args()

    env = make_vec_env("Pendulum-v1", n_envs=4, seed=args.seed)
    model = PPOPlus(
        LayerNormPolicy,
        env,
        n_steps=256,
        gamma=0.9,
        learning_rate="lin_1e-3",
        log_std_init=-0.5,
        policy_kwargs={"features_extractor_class": WithSquares},
        seed=args.seed,
    )
    model.learn(args.timesteps)
    print(model.policy)

    model.save(args.out / "model.zip")
    loaded = PPOPlus.load(args.out / "model.zip")
    normalizer = observation_normalizer(loaded.policy)
    assert normalizer is not None
    print(f"statistics in the zip: {normalizer.state_dict()}")

    raw = np.array([0.6, 0.8, -4.0])  # cosine, sine and angular velocity, as the environment gives them
    before, _ = model.predict(raw, deterministic=True)
    after, _ = loaded.predict(raw, deterministic=True)
    print(f"the loaded model chooses torque {after}, the one that was saved {before}")


if __name__ == "__main__":
    main()
