"""Where classes of Gymnasium, Stable-Baselines3, sb3-contrib and RL Zoo keep what changes from step to step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sb3_pgplus.vec_env.mujoco_data import restore_simulation, simulation_to_tree
from sb3_pgplus.vec_env.state_trees import Tree, from_tree, to_tree


@dataclass(frozen=True)
class Known:
    """What the state of objects of a class consists of. Attributes that an object lacks are left out."""

    #: Attributes that :func:`~sb3_pgplus.vec_env.state_trees.to_tree` takes.
    fields: tuple[str, ...] = ()
    #: Lists of numbers that may be long, stored as arrays.
    columns: tuple[str, ...] = ()
    #: Attributes that are readings of a clock → the clock. Times go on where they stopped.
    clocks: Mapping[str, Callable[[], float]] = field(default_factory=dict)
    #: Attributes that the constructor makes, at random perhaps, and that must be equal.
    same: tuple[str, ...] = ()
    #: What more there is, and how to put it back.
    extra: tuple[Callable[[Any], Tree], Callable[[Any, Tree], None]] | None = None
    #: Attributes that make the next ``reset()`` begin an episode where the running one cannot go on.
    restart: Mapping[str, Any] = field(default_factory=dict)
    #: Attributes that are functions of the user's.
    functions: tuple[str, ...] = ()

    def to_tree(self, thing: Any) -> Tree:
        """
        :param thing: an object of the class
        :raises NotPlainError: if an attribute is not plain
        :raises NotImplementedError: if it cannot be had
        """
        attributes = vars(thing)  # not getattr: wrappers pass on what they lack
        tree: dict[str, Tree] = {name: to_tree(attributes[name]) for name in self.fields if name in attributes}
        tree |= {name: np.array(attributes[name]) for name in self.columns}
        tree |= {name: clock() - attributes[name] for name, clock in self.clocks.items()}
        tree |= {name: repr(np.asarray(attributes[name]).tolist()) for name in self.same}
        if self.extra:
            tree["extra"] = self.extra[0](thing)
        return tree

    def restore(self, thing: Any, tree: Tree) -> None:
        """
        Undo :meth:`to_tree`.

        :param thing: a fresh object of the class
        :param tree: what that returned
        :raises ValueError: if the object was built differently
        """
        attributes = vars(thing)
        for name in self.same:
            if repr(np.asarray(attributes[name]).tolist()) != tree[name]:
                raise ValueError(f"the state is of a {type(thing).__name__} with another {name}")
        for name in self.fields:
            if name in tree:
                setattr(thing, name, from_tree(tree[name], attributes.get(name)))
        for name in self.columns:
            setattr(thing, name, tree[name].tolist())
        for name, clock in self.clocks.items():
            setattr(thing, name, clock() - tree[name])
        if self.extra:
            self.extra[1](thing, tree["extra"])


# --- what attributes do not tell --------------------------------------------------------------------------------------


def _checker_to_tree(layer: Any) -> Tree:
    return {"checked_reset": layer.checked_reset, "checked_render": layer.checked_render}


def _restore_checker(layer: Any, tree: Tree) -> None:
    # It compares the data of the first calls, which are over: all it does is to warn.
    layer.checked_reset, layer.checked_render = tree["checked_reset"], tree["checked_render"]
    layer.checked_step = layer.checked_data_reuse = tree["checked_reset"]
    layer._previous_data = None


def _buffers_to_tree(env: Any) -> Tree:
    buffers = {"observations": [*env.buf_obs.values()], "dones": env.buf_dones, "rewards": env.buf_rews}
    return to_tree(buffers) | {"actions": to_tree(np.asarray(env.actions)) if hasattr(env, "actions") else None}


def _restore_buffers(env: Any, tree: Tree) -> None:
    for array, values in zip(env.buf_obs.values(), tree["observations"], strict=True):
        if array.shape != values.shape:
            raise ValueError(f"the state has observations of shape {values.shape}, and these have {array.shape}")
        array[...] = values
    env.buf_dones[:], env.buf_rews[:] = tree["dones"], tree["rewards"]
    if tree["actions"] is not None:
        env.actions = from_tree(tree["actions"])


def _sums_to_tree(env: Any) -> Tree:
    sums = {"returns": env._returns.cpu().numpy().copy(), "lengths": env._lengths.cpu().numpy().copy()}
    return sums | {"was_reset": env._was_reset}


def _restore_sums(env: Any, tree: Tree) -> None:
    env._returns.copy_(env._returns.new_tensor(tree["returns"]))
    env._lengths.copy_(env._lengths.new_tensor(tree["lengths"]))
    env._was_reset = tree.get("was_reset", True)  # earlier trees lack it


def _picture_to_tree(layer: Any) -> Tree:
    if hasattr(layer.unwrapped, "mujoco_renderer"):
        raise NotImplementedError(
            "AddRenderObservation around a MuJoCo environment: its camera depends on when the first picture was taken"
        )


def _nothing_to_restore(layer: Any, tree: Tree) -> None:
    """For states that are only asked for to learn that there are none."""


# --- the table --------------------------------------------------------------------------------------------------------

_STATELESS = Known()
_MUJOCO = Known(("goal", "goal_pos", "cylinder_pos"), extra=(simulation_to_tree, restore_simulation))
_FUNCTION = Known(functions=("func",))
_BUFFERS = Known(extra=(_buffers_to_tree, _restore_buffers))
_MONITOR = Known(
    ("needs_reset", "total_steps", "current_reset_info"),
    ("rewards", "episode_returns", "episode_lengths", "episode_times"),
    clocks={"t_start": time.time},
    restart={"needs_reset": True},
)
_EPISODES = ("episode_count", "episode_returns", "episode_lengths")
_QUEUES = ("time_queue", "return_queue", "length_queue")
_ARRIVALS = Known(("s", "lastaction"))
_IDENTITY = Known(("state", "current_step", "num_resets"))
_HISTORY = Known(("obs_history", "action_history"))

#: Module → class → what its state is.
_MODULES: dict[str, dict[str, Known]] = {
    "gymnasium.core": {"Wrapper": _STATELESS, "ObservationWrapper": _STATELESS, "ActionWrapper": _STATELESS}
    | {"RewardWrapper": _STATELESS},
    "gymnasium.wrappers.common": {
        "TimeLimit": Known(("_elapsed_steps",)),
        "OrderEnforcing": Known(("_has_reset",)),
        "PassiveEnvChecker": Known(extra=(_checker_to_tree, _restore_checker)),
        "Autoreset": Known(("autoreset",)),
        "RecordEpisodeStatistics": Known(_EPISODES + _QUEUES, clocks={"episode_start_time": time.perf_counter}),
    },
    "gymnasium.wrappers.stateful_observation": {
        "DelayObservation": Known(("observation_queue",)),
        "TimeAwareObservation": Known(("timesteps",)),
        "FrameStackObservation": Known(("obs_queue", "padding_value")),
        "NormalizeObservation": Known(("obs_rms",)),
        "MaxAndSkipObservation": Known(("_obs_buffer",)),
    },
    "gymnasium.wrappers.stateful_reward": {"NormalizeReward": Known(("return_rms", "discounted_reward"))},
    "gymnasium.wrappers.stateful_action": {
        "StickyAction": Known(("last_action", "is_sticky_actions", "num_repeats", "repeats_taken")),
        "RepeatAction": _STATELESS,
    },
    "gymnasium.wrappers.transform_action": {"TransformAction": _FUNCTION}
    | dict.fromkeys(("ClipAction", "RescaleAction", "DiscretizeAction"), _STATELESS),
    "gymnasium.wrappers.transform_reward": {"TransformReward": _FUNCTION, "ClipReward": _STATELESS},
    "gymnasium.wrappers.transform_observation": {
        "TransformObservation": _FUNCTION,
        "AddRenderObservation": Known(extra=(_picture_to_tree, _nothing_to_restore)),
    }
    | dict.fromkeys(
        ("FilterObservation", "FlattenObservation", "GrayscaleObservation", "ResizeObservation"), _STATELESS
    )
    | dict.fromkeys(("ReshapeObservation", "RescaleObservation", "DtypeObservation"), _STATELESS)
    | {"DiscretizeObservation": _STATELESS},
    "gymnasium.wrappers.atari_preprocessing": {
        "AtariPreprocessing": Known(("obs_buffer", "lives", "game_over")),
    },
    # Pictures and videos are not part of the state: one that is under way begins anew.
    "gymnasium.wrappers.rendering": {"RecordVideo": Known(("step_id", "episode_id")), "RenderCollection": _STATELESS}
    | dict.fromkeys(("HumanRendering", "AddWhiteNoise", "ObstructView"), _STATELESS),
    "gymnasium.vector.vector_env": {"VectorWrapper": _STATELESS},
    "gymnasium.vector.sync_vector_env": {
        "SyncVectorEnv": Known(("_rewards", "_terminations", "_truncations", "_autoreset_envs")),
    },
    "gymnasium.wrappers.vector.common": {
        "RecordEpisodeStatistics": Known(
            (*_EPISODES, "prev_dones", *_QUEUES), clocks={"episode_start_times": time.perf_counter}
        ),
    },
    "gymnasium.wrappers.vector.stateful_observation": {"NormalizeObservation": Known(("obs_rms",))},
    "gymnasium.wrappers.vector.stateful_reward": {
        "NormalizeReward": Known(("return_rms", "accumulated_reward", "_prev_dones")),
    },
    "gymnasium.wrappers.vector.dict_info_to_list": {"DictInfoToList": _STATELESS},
    "gymnasium.envs.classic_control.cartpole": {
        "CartPoleEnv": Known(("state", "steps_beyond_terminated")),
        "CartPoleVectorEnv": Known(("state", "steps", "prev_done", "steps_beyond_terminated", "low", "high")),
    },
    "gymnasium.envs.classic_control.acrobot": {"AcrobotEnv": Known(("state",))},
    "gymnasium.envs.classic_control.mountain_car": {"MountainCarEnv": Known(("state",))},
    "gymnasium.envs.classic_control.continuous_mountain_car": {"Continuous_MountainCarEnv": Known(("state",))},
    "gymnasium.envs.classic_control.pendulum": {"PendulumEnv": Known(("state", "last_u"))},
    "gymnasium.envs.toy_text.frozen_lake": {"FrozenLakeEnv": Known(("s", "lastaction"), same=("desc",))},
    "gymnasium.envs.toy_text.cliffwalking": {"CliffWalkingEnv": _ARRIVALS},
    "gymnasium.envs.toy_text.taxi": {"TaxiEnv": Known(("s", "lastaction", "fickle_step", "taxi_orientation"))},
    "gymnasium.envs.toy_text.blackjack": {
        "BlackjackEnv": Known(("dealer", "player", "dealer_top_card_suit", "dealer_top_card_value_str")),
    },
    "gymnasium.envs.mujoco.mujoco_env": {"MujocoEnv": _MUJOCO},
    "stable_baselines3.common.monitor": {"Monitor": _MONITOR},
    "stable_baselines3.common.atari_wrappers": {
        "StickyActionEnv": Known(("_sticky_action",)),
        "NoopResetEnv": Known(("override_num_noops",)),
        "EpisodicLifeEnv": Known(("lives", "was_real_done"), restart={"was_real_done": True}),
        "MaxAndSkipEnv": Known(("_obs_buffer",)),
    }
    | dict.fromkeys(("FireResetEnv", "ClipRewardEnv", "WarpFrame", "AtariWrapper"), _STATELESS),
    "stable_baselines3.common.envs.identity_env": dict.fromkeys(
        ("IdentityEnv", "IdentityEnvBox", "IdentityEnvMultiDiscrete", "IdentityEnvMultiBinary"), _IDENTITY
    )
    | {"FakeImageEnv": Known(("current_step",))},
    "stable_baselines3.common.envs.multi_input_envs": {
        "SimpleMultiObsEnv": Known(("count", "log", "state", "state_mapping")),
    },
    "stable_baselines3.common.envs.bit_flipping_env": {"BitFlippingEnv": Known(("state", "current_step"))},
    "stable_baselines3.common.vec_env.dummy_vec_env": {"DummyVecEnv": _BUFFERS},
    "sb3_pgplus.vec_env.serial": {"SerialVecEnv": _BUFFERS},
    "sb3_pgplus.vec_env.tensors": {
        "TensorVecEnv": Known(clocks={"_started": time.time}, extra=(_sums_to_tree, _restore_sums)),
    },
    "sb3_pgplus.vec_env.workers": {"WorkersVecEnv": _STATELESS},  # in the parent process
    "stable_baselines3.common.vec_env.base_vec_env": {"VecEnvWrapper": _STATELESS},
    "stable_baselines3.common.vec_env.vec_monitor": {"VecMonitor": Known(_EPISODES, clocks={"t_start": time.time})},
    "stable_baselines3.common.vec_env.vec_normalize": {
        "VecNormalize": Known(("obs_rms", "ret_rms", "returns", "old_obs", "old_reward")),
    },
    "stable_baselines3.common.vec_env.vec_frame_stack": {"VecFrameStack": Known(("stacked_obs",))},
    "stable_baselines3.common.vec_env.vec_transpose": {"VecTransposeImage": _STATELESS},
    "stable_baselines3.common.vec_env.vec_extract_dict_obs": {"VecExtractDictObs": _STATELESS},
    "stable_baselines3.common.vec_env.vec_check_nan": {
        "VecCheckNan": Known(("_user_warned", "_actions", "_observations")),
    },
    "stable_baselines3.common.vec_env.vec_video_recorder": {"VecVideoRecorder": Known(("step_id",))},
    "sb3_contrib.common.wrappers.time_feature": {"TimeFeatureWrapper": Known(("_current_step",))},
    "sb3_contrib.common.wrappers.action_masker": {"ActionMasker": Known(functions=("_action_mask_fn",))},
    "rl_zoo3.gym_patches": {"PatchedTimeLimit": Known(("_elapsed_steps",))},  # RL Zoo puts it in TimeLimit's place
    "rl_zoo3.wrappers": {
        "TruncatedOnSuccessWrapper": Known(("current_successes",)),
        "ActionSmoothingWrapper": Known(("smoothed_action",)),
        "DelayedRewardWrapper": Known(("current_step", "accumulated_reward")),
        "HistoryWrapper": _HISTORY,
        "HistoryWrapperObsDict": _HISTORY,
    }
    | dict.fromkeys(("ActionNoiseWrapper", "FrameSkip", "MaskVelocityWrapper"), _STATELESS)
    | {"YAMLCompatResizeObservation": _STATELESS},
}
for _module, _name in {
    "ant": "Ant",
    "half_cheetah": "HalfCheetah",
    "hopper": "Hopper",
    "humanoid": "Humanoid",
    "humanoidstandup": "HumanoidStandup",
    "inverted_double_pendulum": "InvertedDoublePendulum",
    "inverted_pendulum": "InvertedPendulum",
    "pusher": "Pusher",
    "reacher": "Reacher",
    "swimmer": "Swimmer",
    "walker2d": "Walker2d",
}.items():
    _MODULES |= {f"gymnasium.envs.mujoco.{_module}_{version}": {f"{_name}Env": _MUJOCO} for version in ("v4", "v5")}

KNOWN: dict[str, Known] = {
    f"{module}:{name}": known for module, names in _MODULES.items() for name, known in names.items()
}
"""Class, as ``module:name`` → what its state is. Nothing has to be installed for its name to be here."""

_REPLAY = "With wrapper_class=sb3_pgplus.vec_env.record_episodes the running episode is played once more"
IMPOSSIBLE: Mapping[str, str] = {
    "gymnasium.envs.box2d.lunar_lander": f"Box2D's physics cannot be put back into a state exactly. {_REPLAY}",
    "gymnasium.envs.box2d.": "Box2D's physics cannot be put back into a state exactly",
    "ale_py.": f"the emulator's state lacks its screen and the action that it repeats. {_REPLAY}",
    "gymnasium.vector.async_vector_env": "its environments are in other processes. vectorization_mode='sync' and the "
    "backend 'workers' give theirs",
    "stable_baselines3.common.vec_env.subproc_vec_env": "its environments are in other processes, which do not answer "
    "such a question. The backend 'workers' runs the same environments and gives their state",
    "envpool.": "EnvPool's compiled environments do not give theirs",
}
"""Beginning of a class's name → why its state cannot be had, where no advice to its author helps."""


def kind_of(cls: type[Any]) -> str:
    """:return: ``module:name`` of a class"""
    return f"{cls.__module__}:{cls.__qualname__}"
