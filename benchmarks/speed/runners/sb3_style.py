"""
Runs one training of this package, SB3, sb3-contrib or SBX, which share an interface, and measures it.

    python -m benchmarks.speed.runners.sb3_style '{"library": …}'
"""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.speed.cases import CONTRIB, OURS, SBX
from benchmarks.speed.measuring import Stopwatch, read_spec, write_result


def stock_environments(spec: dict[str, Any]) -> Any:
    """SB3's vector environment, in ``VecNormalize`` where the case is normalised."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

    from benchmarks.speed.environments import env_id_or_class

    kind = SubprocVecEnv if spec["vec_env"] == "subproc" else DummyVecEnv
    env: Any = make_vec_env(env_id_or_class(spec["env"]), spec["n_envs"], seed=spec["seed"], vec_env_cls=kind)
    return VecNormalize(env, gamma=0.99) if spec["normalize"] else env


def our_environments(spec: dict[str, Any]) -> Any:
    """A raw vector environment: the model normalises."""
    from benchmarks.speed.environments import env_id_or_class
    from sb3_pgplus.vec_env import make_vec_env

    if spec["vec_env"] != "fast":
        return stock_environments({**spec, "normalize": False})
    return make_vec_env(env_id_or_class(spec["env"]), spec["n_envs"], seed=spec["seed"])


def stock_class(spec: dict[str, Any]) -> Any:
    """The algorithm's class in another library."""
    if spec["library"] == SBX:
        import sbx  # type: ignore[import-not-found]

        return {"ppo": sbx.PPO}[spec["algo"]]
    if spec["library"] == CONTRIB:
        import sb3_contrib

        return {"trpo": sb3_contrib.TRPO}[spec["algo"]]
    import stable_baselines3

    return {"ppo": stable_baselines3.PPO, "a2c": stable_baselines3.A2C}[spec["algo"]]


def our_class(spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Our class, and the settings with which it does the same work as the stock one."""
    import sb3_pgplus
    from sb3_pgplus import presets

    name, preset = {
        "ppo": ("PPOPlus", presets.SB3_PPO),
        "a2c": ("A2CPlus", presets.SB3_A2C),
        "trpo": ("TRPOPlus", presets.SB3_TRPO),
    }[spec["algo"]]
    settings = {
        **preset,
        "sb3_exact": False,
        "normalize_observations": spec["normalize"],
        "normalize_rewards": spec["normalize"],
        "compile": {"auto": "auto", "true": True, "false": False}[spec["compile"]],
    }
    return getattr(sb3_pgplus, name), settings


def policy_kwargs(spec: dict[str, Any]) -> dict[str, Any]:
    """The network, where it is not SB3's default; features extractors bring their own."""
    return {} if spec["policy"] == "CnnPolicy" else {"net_arch": list(spec["net_arch"])}


def mark_iterations(model: Any, stopwatch: Stopwatch) -> None:
    """
    Mark where rollouts begin, which is where each of the libraries clears its buffer. A callback would be called in
    every step, and what that costs, or a class of our own, depends on the library; plain trainings have neither.
    """
    reset = model.rollout_buffer.reset

    def marked() -> None:
        stopwatch.iteration_begins()
        reset()

    model.rollout_buffer.reset = marked


def telling(cls: Any, seen: Callable[[], None]) -> Any:
    """The class, calling ``seen`` where rollouts end."""

    class Telling(cls):  # type: ignore[misc]  # of whichever library
        def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
            goes_on: bool = super().collect_rollouts(*args, **kwargs)
            seen()
            return goes_on

    return Telling


class PhysicsShare:
    """The share of the rollouts' time, after the warm-up, that is spent inside the simulation's own step."""

    def __init__(self, env: Any, stopwatch: Stopwatch) -> None:
        self._env, self._stopwatch = env, stopwatch
        self._inside, self._inside_before = 0.0, 0.0
        self._physics, self._rollouts = 0.0, 0.0
        step = env._batch.step

        def timed(*args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            step(*args, **kwargs)
            self._inside += time.perf_counter() - started

        env._batch = _Delegate(env._batch, timed)

    def rollout_ended(self) -> None:
        """Count a rollout."""
        n_begun = len(self._stopwatch.marks)
        inside, self._inside_before = self._inside - self._inside_before, self._inside
        if n_begun > self._stopwatch.n_warm_up:
            self._physics += inside
            self._rollouts += time.perf_counter() - self._stopwatch.marks[-1]

    def result(self) -> dict[str, float]:
        """For the result."""
        return {"physics_share": self._physics / self._rollouts}


class _Delegate:
    """A batch with another ``step``."""

    def __init__(self, batch: Any, step: Callable[..., None]) -> None:
        self._batch, self.step = batch, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)


def main() -> None:
    """Train once."""
    spec = read_spec()
    stopwatch = Stopwatch(spec)
    import torch as th

    th.set_num_threads(spec["threads"])
    cls, ours = our_class(spec) if spec["library"] == OURS else (stock_class(spec), {})
    stopwatch.imported()
    env = our_environments(spec) if spec["library"] == OURS else stock_environments(spec)
    arguments = {**ours, "n_steps": spec["n_steps"], **spec["settings"], "policy_kwargs": policy_kwargs(spec)}
    share = PhysicsShare(env, stopwatch) if spec["physics"] else None
    cls = telling(cls, share.rollout_ended) if share else cls
    model = cls(spec["policy"], env, seed=spec["seed"], device="cpu", **arguments)
    mark_iterations(model, stopwatch)
    stopwatch.run(lambda: model.learn(stopwatch.total_steps))
    result = stopwatch.result()
    if share is not None:
        result |= share.result()
    if spec["library"] == OURS:
        result["engine"] = model.engine_report()
    write_result(spec, result)
    env.close()


if __name__ == "__main__":
    main()
