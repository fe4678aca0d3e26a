"""What a suite trains, in which order: variants of algorithms, tasks, seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from sb3_pgplus.benchmarking import stock
from sb3_pgplus.configs import ConfigError, RunSettings, packaged_config, resolve_settings
from sb3_pgplus.hparams import nearest

MUJOCO_TASKS = (
    "HalfCheetah-v5",
    "Hopper-v5",
    "Walker2d-v5",
    "Ant-v5",
    "Humanoid-v5",
    "Swimmer-v5",
    "Reacher-v5",
    "InvertedPendulum-v5",
    "InvertedDoublePendulum-v5",
)
REFERENCE_TASKS = MUJOCO_TASKS[:4]
CLASSIC_TASKS = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0")
ABLATION_TASKS = ("Hopper-v5", "Walker2d-v5")
PAPER = ("ppo", "ppo_m", "ppo_noclip", "trpo", "trpo_plus")
SHARED, PER_TASK, SAME, SAME_AND_OWN, ZOO, ABLATION = "shared", "per task", "same", "same and own", "zoo", "ablation"


@dataclass(frozen=True)
class Variant:
    """An algorithm with a way to choose its settings."""

    name: str
    """Of the folder, and for ``--algos``."""
    label: str
    """In tables and figures."""
    algo: str
    """``"ppoplus"``, …, or of another library: :data:`sb3_pgplus.benchmarking.stock.STOCK`."""
    settings: str
    """Where they come from."""


PLUS = {"ppoplus": "PPOPlus", "trpoplus": "TRPOPlus", "a2cplus": "A2CPlus"}
OURS = tuple(Variant(name, label, name, SHARED) for name, label in PLUS.items())
PER_TASK_OURS = tuple(Variant(f"{name}-per-task", f"{label}, per task", name, PER_TASK) for name, label in PLUS.items())
OTHERS = (
    Variant("sb3-ppo-same", "SB3 PPO, same settings", "sb3-ppo", SAME),
    Variant("sb3-ppo-zoo", "SB3 PPO, RL Zoo's settings", "sb3-ppo", ZOO),
    Variant("sb3-contrib-trpo-zoo", "sb3-contrib TRPO, RL Zoo's settings", "sb3-contrib-trpo", ZOO),
)
OWN = Variant("sb3-ppo-own", "SB3 PPO, same settings, its own environments", "sb3-ppo", SAME_AND_OWN)
"""As SB3's users train. Its returns are those of ``sb3-ppo-same`` to the bit; what is measured is the time."""
TIMED = (OURS[0], OWN)
TIMED_TASKS = REFERENCE_TASKS
CLASSIC = tuple(replace(variant, settings=PER_TASK) for variant in OURS)
VARIANTS = {variant.name: variant for variant in (*OURS, *PER_TASK_OURS, *OTHERS, OWN)}
"""Those of the groups ``mujoco``, ``time`` and ``classic``."""

Cell = tuple[Variant, str]


@dataclass(frozen=True)
class Stage:
    """Cells that are trained with some seeds, before the next stage begins."""

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Suite:
    """Stages in their order."""

    group: str
    """Folder of the results."""
    n_timesteps: int | None
    """Of a training; ``None``: what zoo_configs says."""
    stages: tuple[Stage, ...]
    is_timed: bool = False
    """Whether each training has the machine alone, all of it."""


@dataclass(frozen=True)
class Run:
    """One training."""

    group: str
    variant: Variant
    settings: RunSettings
    is_timed: bool = False
    """Whether it has as many threads as there are processors, as a user's training has; otherwise it has one."""

    @property
    def env(self) -> str:
        """Environment id."""
        return self.settings.environment.env

    @property
    def seed(self) -> int:
        """Random seed."""
        return self.settings.seed

    def __str__(self) -> str:
        return f"{self.variant.name} {self.env} seed {self.seed}"


# --- suites -----------------------------------------------------------------------------------------------------------


def _mujoco() -> Suite:
    main = tuple((variant, env) for env, variant in product(MUJOCO_TASKS, OURS))
    stages = (Stage(main, (0, 1, 2)), _references(), Stage(main, (3, 4)), Stage(per_task_cells(), (0, 1, 2)))
    return Suite("mujoco", 1_000_000, stages)


@cache
def per_task_cells() -> tuple[Cell, ...]:
    """The MuJoCo tasks for which zoo_configs has settings of their own."""
    return tuple(
        (variant, env)
        for env, variant in product(MUJOCO_TASKS, PER_TASK_OURS)
        if not _same_settings(resolve_settings(algo=variant.algo, env=env), shared_settings(variant.algo))
    )


def _references() -> Stage:
    compared = [(variant, env) for env, variant in product(REFERENCE_TASKS, OTHERS)]
    return Stage((*compared, (OWN, REFERENCE_TASKS[0])), (0, 1, 2))


def _time() -> Suite:
    """Ours and theirs by turns, so that a slow hour is one for both."""
    return Suite("time", 1_000_000, (Stage(tuple((v, TIMED_TASKS[0]) for v in TIMED), (0, 1, 2)),), is_timed=True)


def _classic() -> Suite:
    return Suite("classic", None, (Stage(tuple((v, e) for e, v in product(CLASSIC_TASKS, CLASSIC)), (0, 1, 2)),))


def _ablation() -> Suite:
    variants = ablation_variants()
    first = {"ppoplus", *PAPER}
    stages = [
        Stage(tuple((v, env) for env, v in product(ABLATION_TASKS, chosen)), (0, 1, 2))
        for chosen in ([v for v in variants if v.name in first], [v for v in variants if v.name not in first])
    ]
    return Suite("ablation", 500_000, tuple(stages))


SUITES = {
    "mujoco": _mujoco,
    "sb3": lambda: Suite("mujoco", 1_000_000, (_references(),)),
    "time": _time,
    "classic": _classic,
    "ablation": _ablation,
}
EXTRA_TASKS = {"time": TIMED_TASKS[1:], "ablation": ("Humanoid-v5",), "classic": ("LunarLander-v3", "BipedalWalker-v3")}
"""Only where ``--envs`` asks for them: long, or in need of another package."""


@cache
def ablation_variants() -> tuple[Variant, ...]:
    """Each file of zoo_configs/ablation: all tricks, the paper's variants, then one trick less, then one more."""
    names = sorted(path.stem for path in packaged_config("ablation/ppo").parent.glob("*.yml"))
    order = ["ppoplus", *PAPER, *(n for k in ("no_", "with_") for n in names if n.startswith(k))]
    labels = PLUS | {"ppo": "PPO", "ppo_m": "PPO-M", "ppo_noclip": "PPO-NoClip", "trpo": "TRPO", "trpo_plus": "TRPO+"}
    return tuple(Variant(n, labels.get(n, n.replace("_", " ")), _ablated_algorithm(n), ABLATION) for n in order)


def _ablated_algorithm(name: str) -> str:
    return "trpoplus" if name.startswith("trpo") else "ppoplus"


# --- settings ---------------------------------------------------------------------------------------------------------


@cache
def shared_settings(algo: str) -> RunSettings:
    """
    The one set of hyperparameters for all MuJoCo tasks: the one that most of the nine have in zoo_configs.

    :param algo: ``"ppoplus"``, …
    :raises ConfigError: if fewer than five have the same
    """
    found = {env: resolve_settings(algo=algo, env=env) for env in MUJOCO_TASKS}
    (most, number), *_ = Counter(_comparable(settings) for settings in found.values()).most_common()
    if number * 2 < len(MUJOCO_TASKS):
        raise ConfigError(f"zoo_configs/{algo}.yml has no settings that most of the MuJoCo tasks share")
    return next(settings for settings in found.values() if _comparable(settings) == most)


def _comparable(settings: RunSettings) -> str:
    return repr((settings.n_envs, sorted(settings.hyperparameters.items())))


def _same_settings(one: RunSettings, other: RunSettings) -> bool:
    return _comparable(one) == _comparable(other)


@cache
def settings_of(variant: Variant, env: str, n_timesteps: int | None) -> RunSettings:
    """
    What a variant trains with on a task, seed 0.

    :param variant: the algorithm
    :param env: environment id
    :param n_timesteps: length of the training; ``None``: what zoo_configs says
    :raises ConfigError: if the settings cannot be found
    """
    if variant.settings == ZOO:
        found = stock.zoo_settings(variant.algo, env)
    elif variant.settings in (SAME, SAME_AND_OWN):
        found = stock.same_settings(settings_of(OURS[0], env, n_timesteps))
        found = replace(found, backend="dummy") if variant.settings == SAME_AND_OWN else found
    elif variant.settings == ABLATION:
        found = _ablation_settings(variant, env)
    else:
        found = resolve_settings(algo=variant.algo, env=env)
    if variant.settings == SHARED:
        found = replace(shared_settings(variant.algo), environment=found.environment)
    return found if n_timesteps is None else replace(found, n_timesteps=n_timesteps)


def _ablation_settings(variant: Variant, env: str) -> RunSettings:
    """The paper's rollouts of 2048 samples, from as many environments as the suite's PPOPlus has: much faster."""
    n_envs = shared_settings("ppoplus").n_envs
    file = packaged_config(f"ablation/{variant.name}")
    return resolve_settings(
        algo=variant.algo, env=env, config=file, n_envs=n_envs, overrides=[f"n_steps={2048 // n_envs}"]
    )


# --- what is asked for ------------------------------------------------------------------------------------------------


def find_suite(name: str) -> Suite:
    """
    :param name: of a suite
    :raises ConfigError: if there is none
    """
    if name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}{nearest(name, SUITES)}; known: {', '.join(SUITES)}")
    return SUITES[name]()


def plan(
    name: str,
    *,
    algos: Sequence[str] | None = None,
    envs: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    n_timesteps: int | None = None,
) -> list[Run]:
    """
    All trainings of a suite, in their order: stage by stage, in a stage seed by seed.

    :param name: of the suite
    :param algos: names of variants; all by default
    :param envs: environment ids; all by default
    :param seeds: by default those of the suite; further ones come after all stages, for every cell
    :param n_timesteps: of each training, in place of the suite's; then the results go to a folder of their own
    :raises ConfigError: if something is not part of the suite
    """
    suite = _with_extra_tasks(name, find_suite(name), envs or ())
    cells = list(dict.fromkeys(cell for stage in suite.stages for cell in stage.cells))
    _check("algorithm", algos, [variant.name for variant, _ in cells], name)
    _check("environment", envs, [env for _, env in cells], name)
    planned = [(seed, cell) for stage in suite.stages for seed in stage.seeds for cell in stage.cells]
    if seeds is not None:
        done = set(planned)
        planned = [(seed, cell) for seed, cell in planned if seed in seeds]
        planned += [(seed, cell) for seed in seeds for cell in cells if (seed, cell) not in done]
    group = suite.group if n_timesteps in (None, suite.n_timesteps) else f"{suite.group}-{n_timesteps}"
    steps = n_timesteps or suite.n_timesteps
    return [
        Run(group, variant, replace(settings_of(variant, env, steps), seed=seed), suite.is_timed)
        for seed, (variant, env) in planned
        if (algos is None or variant.name in algos) and (envs is None or env in envs)
    ]


def _with_extra_tasks(name: str, suite: Suite, envs: Sequence[str]) -> Suite:
    extra = [env for env in envs if env in EXTRA_TASKS.get(name, ())]

    def widened(stage: Stage) -> Stage:
        variants = dict.fromkeys(variant for variant, _ in stage.cells)
        return replace(stage, cells=(*stage.cells, *((variant, env) for env in extra for variant in variants)))

    return replace(suite, stages=tuple(map(widened, suite.stages))) if extra else suite


def _check(what: str, names: Sequence[str] | None, known: Sequence[str], suite: str) -> None:
    known = list(dict.fromkeys([*known, *(EXTRA_TASKS.get(suite, ()) if what == "environment" else ())]))
    for name in names or ():
        if name not in known:
            raise ConfigError(f"suite {suite} has no {what} {name!r}{nearest(name, known)}; it has: {', '.join(known)}")


def parse_seeds(text: str) -> list[int]:
    """
    Read ``"10"`` (0 to 9), ``"0-4"`` or ``"0,3,7-9"``.

    :param text: what the user wrote
    :raises ConfigError: if it is something else
    """
    try:
        if text.isdecimal():
            seeds = list(range(int(text)))
        else:
            ends = [part.partition("-") for part in text.split(",") if part.strip()]
            seeds = [s for low, dash, high in ends for s in range(int(low), int(high if dash else low) + 1)]
    except ValueError:
        seeds = []
    if not seeds:
        raise ConfigError(f"--seeds {text}: write a number of seeds (10), a range (0-4) or a list (0,3,7-9)")
    return list(dict.fromkeys(seeds))
