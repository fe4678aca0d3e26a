"""
Runs one training of rlox's PPO with SB3's settings and measures it.

    python -m benchmarks.speed.runners.rlox_run '{"library": "rlox", …}'
"""

import warnings
from typing import Any

from benchmarks.speed.measuring import Stopwatch, read_spec, write_result

#: SB3's defaults under rlox's names. Its critic's loss has a factor of one half inside, hence vf_coef.
SB3_SETTINGS = {
    "batch_size": 64,
    "n_epochs": 10,
    "learning_rate": 3e-4,
    "clip_eps": 0.2,
    "vf_coef": 1.0,
    "ent_coef": 0.0,
    "clip_vloss": False,
    "anneal_lr": False,
}


def main() -> None:
    """Train once."""
    spec = read_spec()
    stopwatch = Stopwatch(spec)
    import torch as th
    from rlox.algorithms.ppo import PPO  # type: ignore[import-not-found]
    from rlox.callbacks import Callback  # type: ignore[import-not-found]

    class Iterations(Callback):  # type: ignore[misc]
        def on_training_start(self, **_: Any) -> None:
            stopwatch.iteration_begins()

        def on_step(self, **_: Any) -> bool:  # after the update on a rollout
            stopwatch.iteration_begins()
            return True

    assert spec["algo"] == "ppo" and list(spec["net_arch"]) == [64, 64]
    th.set_num_threads(spec["threads"])
    stopwatch.imported()
    settings = {**SB3_SETTINGS, **spec["settings"], "n_steps": spec["n_steps"]}
    settings |= {"normalize_obs": spec["normalize"], "normalize_rewards": spec["normalize"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unknown config key")
        model = PPO(spec["env"], n_envs=spec["n_envs"], seed=spec["seed"], callbacks=[Iterations()], **settings)
    stopwatch.run(lambda: model.train(stopwatch.total_steps))
    write_result(spec, stopwatch.result())


if __name__ == "__main__":
    main()
