"""
A stand-in for a GPU, made from the CPU's memory: what works on it mixes no devices and reads nothing without a copy.

It changes torch for the whole process, so the trainings on it are a script of their own::

    python tests/device/stand_in.py FOLDER
"""

import importlib
import io
import json
import os
import subprocess
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch.utils import cpp_extension

sys.path.insert(0, str(Path(__file__).parents[1]))
from device_tasks import DictTask
from tape import record_on_tape

NAME = "stand_in"
LIBRARY = "stand_in_device"


def install(folder: Path) -> None:
    """Build the device, a minute, and make it known to torch."""
    library = folder / f"{LIBRARY}{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-shared", "-fPIC"]
    command += [f"-DTORCH_EXTENSION_NAME={LIBRARY}", str(Path(__file__).with_suffix(".cpp")), "-o", str(library)]
    command += [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    command += [f"-L{path}" for path in cpp_extension.library_paths()]
    subprocess.run([*command, "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"], check=True)
    th.utils.rename_privateuse1_backend(NAME)
    sys.path.insert(0, str(folder))
    importlib.import_module(LIBRARY)
    module: Any = types.ModuleType(NAME)
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    module.device = lambda device=None: nullcontext()
    module.get_rng_state, module.set_rng_state = (lambda d=None: th.get_rng_state()), (lambda s, d=None: None)
    th._register_device_module(NAME, module)
    th.utils.generate_methods_for_privateuse1_backend()
    # With CUDA, `module.to` keeps the parameters' identity, and optimisers made before it go on.
    th.__future__.set_swap_module_params_on_conversion(True)
    _teach_files()


def _teach_files() -> None:
    """torch saves and loads storages of its own devices only."""

    def bytes_of(storage: Any) -> th.Tensor:
        empty = th.empty(0, dtype=th.uint8, device=storage.device)
        return empty.set_(storage, 0, (storage.nbytes(),), (1,))

    def here(storage: Any) -> str | None:
        return f"{NAME}:0" if storage.device.type == NAME else None

    def there(storage: Any, location: Any) -> Any:
        return bytes_of(storage).to(NAME).untyped_storage() if str(location).startswith(NAME) else None

    to_cpu = th.UntypedStorage.cpu
    th.UntypedStorage.cpu = lambda self: bytes_of(self).cpu().untyped_storage() if here(self) else to_cpu(self)  # type: ignore[method-assign]
    th.serialization.register_package(5, here, there)


def on_device(device: str) -> Any:
    """Environments whose tensors are on the device: positions that actions move, ended beyond ±2, cut after 5 steps."""
    from sb3_pgplus.vec_env.tensors import TensorStep, TensorVecEnv

    class Walk(TensorVecEnv):
        def __init__(self) -> None:
            super().__init__(4, spaces.Box(-10, 10, (2,)), spaces.Box(-1, 1, (1,)), device)
            self.random = np.random.default_rng(0)

        def reset_tensors(self, seed: int | None) -> Any:
            self.position, self.t = self._start(), th.zeros(4, device=device)
            return self._observe()

        def _start(self) -> th.Tensor:
            return th.as_tensor(self.random.uniform(-0.5, 0.5, 4), dtype=th.float32).to(device)

        def _observe(self) -> th.Tensor:
            return th.stack([self.position, self.t], dim=1)

        def step_tensors(self, actions: th.Tensor) -> TensorStep:
            assert actions.device.type == th.device(device).type, actions.device
            self.position, self.t = self.position + actions.reshape(4).float(), self.t + 1
            final, terminated, truncated = self._observe(), self.position.abs() > 2, self.t >= 5
            rewards, dones = -self.position.abs(), terminated | truncated
            self.position = th.where(dones, self._start(), self.position)
            self.t = th.where(dones, th.zeros_like(self.t), self.t)
            return TensorStep(self._observe(), rewards, terminated, truncated, final)

    return Walk()


def trained(device: str, algorithm: Any, env: Any, **settings: Any) -> Any:
    """Three rollouts, a file, and another one by the model that was loaded from it."""
    from sb3_pgplus import make_vec_env

    policy = "MultiInputPolicy" if env is DictTask else "MlpPolicy"
    envs = on_device(device) if env == "tensors" else make_vec_env(env, 4, seed=0)
    model = algorithm(policy, envs, seed=0, device=device, **settings)
    model.learn(3 * model.n_steps * 4)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = algorithm.load(file, env=model.get_env(), device=device)
    loaded.learn(model.n_steps * 4, reset_num_timesteps=False)
    return loaded


def same_as_on_the_cpu(algorithm: Any, env: Any, **settings: Any) -> None:
    """A training on the stand-in ends with the parameters of one on the CPU, eager as that is."""
    here = trained(NAME, algorithm, env, **settings)
    there = trained("cpu", algorithm, env, **settings | {"compile": False})
    assert all(p.device.type == NAME for p in here.policy.parameters())
    for (name, value), expected in zip(here.policy.named_parameters(), there.policy.parameters(), strict=True):
        assert th.allclose(value.detach().cpu(), expected.detach(), atol=1e-5), name
    moved = type(here).load(saved(here), device="cpu")
    observation = here.observation_space.sample()
    actions = [model.predict(observation, deterministic=True)[0] for model in (here, moved)]
    assert np.allclose(*actions, atol=1e-5), actions
    if settings["compile"]:
        assert "compiled" in here.engine_report(), here.engine_report()


def saved(model: Any) -> io.BytesIO:
    """The model as a file."""
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


def cases() -> dict[str, Callable[[], None]]:
    """Name → a training that raises if something is wrong."""
    from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus

    ppo: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 3}
    settings: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "PPOPlus": (PPOPlus, "Pendulum-v1", ppo),
        "PPOPlus, discrete": (PPOPlus, "CartPole-v1", ppo),
        "PPOPlus, Dict": (PPOPlus, DictTask, ppo),
        "PPOPlus, ragged": (PPOPlus, "Pendulum-v1", ppo | {"batch_size": 48, "recompute_advantages": False}),
        "PPOPlus, KL": (PPOPlus, "Pendulum-v1", ppo | {"target_kl": 0.003, "desired_kl": 0.01}),
        "PPOPlus, penalty": (PPOPlus, "Pendulum-v1", ppo | {"kl_coef": 0.5, "adaptive_kl_target": 0.01}),
        "PPOPlus, targets": (PPOPlus, "Pendulum-v1", ppo | {"normalize_value_targets": True}),
        "PPOPlus, tensors": (PPOPlus, "tensors", ppo),
        "A2CPlus, tensors": (A2CPlus, "tensors", {"n_steps": 8}),
        "A2CPlus": (A2CPlus, "Pendulum-v1", {"n_steps": 8}),
        "A2CPlus, Adam": (A2CPlus, DictTask, {"n_steps": 8, "use_rms_prop": False}),
        "TRPOPlus": (TRPOPlus, "Pendulum-v1", {"n_steps": 32, "batch_size": 32, "n_critic_updates": 3}),
        "TRPOPlus, Dict": (TRPOPlus, DictTask, {"n_steps": 32, "batch_size": 32, "n_critic_updates": 3}),
    }
    found: dict[str, Callable[[], None]] = {}
    for name, (algorithm, env, own) in settings.items():
        for compiled in (False, True):
            found[f"{name}, {'recorded' if compiled else 'eager'}"] = _case(algorithm, env, own | {"compile": compiled})
    return found


def _case(algorithm: Any, env: Any, settings: dict[str, Any]) -> Callable[[], None]:
    return lambda: same_as_on_the_cpu(algorithm, env, **settings)


def main() -> None:
    """Run all cases and write what each raised to `results.json`."""
    folder = Path(sys.argv[1])
    install(folder)
    from sb3_pgplus import device_graphs

    device_graphs.RECORDERS[NAME] = record_on_tape
    th.set_num_threads(1)
    found: dict[str, str] = {}
    for name, case in cases().items():
        try:
            case()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
    (folder / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
