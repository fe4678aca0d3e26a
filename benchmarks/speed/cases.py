"""What is compared: cases, the libraries in each, and the ways each library is run."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OURS, SB3, CONTRIB, SBX, RLOX, CLEANRL = "ours", "SB3", "sb3-contrib", "SBX", "rlox", "CleanRL"

#: SB3's own vector environments hold a process per copy; more than this many per core measure the scheduler.
MAX_PROCESSES_PER_CORE = 4


@dataclass(frozen=True)
class Variant:
    """One way to run a library: what the user chooses, and that does not change what is learned."""

    library: str
    threads: int = 1
    #: ``"dummy"``, ``"subproc"``, or ``"fast"``: ``sb3_pgplus.vec_env.make_vec_env``.
    vec_env: str = "dummy"
    #: Of this package: ``"auto"``, ``"true"`` or ``"false"``; empty for the others.
    compile: str = ""

    @property
    def name(self) -> str:
        """For file names and messages."""
        compiled = f"-compile_{self.compile}" if self.compile else ""
        return f"{self.library}-{self.vec_env}-{self.threads}{compiled}"

    @property
    def words(self) -> str:
        """For the table."""
        kinds = {"dummy": "DummyVecEnv", "subproc": "SubprocVecEnv", "fast": "make_vec_env"}
        parts = [] if self.library in (RLOX, CLEANRL) else [kinds[self.vec_env]]
        parts.append(f"{self.threads} thread" + ("s" if self.threads > 1 else ""))
        return ", ".join([*parts, *([f"compile={self.compile}"] if self.compile else [])])


@dataclass(frozen=True)
class Case:
    """
    One comparison: everybody trains the same algorithm with the same settings in the same environment.

    :param algo: ``"ppo"``, ``"a2c"`` or ``"trpo"``
    :param settings: keyword arguments of SB3's class beyond its defaults
    """

    name: str
    algo: str
    env: str
    n_envs: int
    n_steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    normalize: bool = True
    policy: str = "MlpPolicy"
    net_arch: tuple[int, ...] = (64, 64)
    libraries: tuple[str, ...] = (OURS, SB3)
    #: What this package steps the environments with.
    our_vec_env: str = "fast"
    our_threads: tuple[int, ...] = (1,)
    #: What this package's ``compile`` is in place of what the benchmark was called with.
    our_compile: str | None = None
    #: A whole training of so many steps from an empty compiler cache; None: speed after the warm-up.
    cold_steps: int | None = None
    #: Whole iterations of at least so many steps come before the measured ones: there things are compiled.
    warm_up_steps: int = 4096
    #: Measure the share of the rollout that MuJoCo's own step takes.
    physics: bool = False

    @property
    def reference(self) -> str:
        """The library that the others are compared with."""
        return CONTRIB if CONTRIB in self.libraries else SB3

    @property
    def recipe(self) -> str:
        """The settings in words."""
        words = [f"{self.algo.upper()} {self.env}", f"{self.n_envs} × {self.n_steps}"]
        words += [f"{name}={value}" for name, value in self.settings.items()]
        words += ["x".join(map(str, self.net_arch))] if self.net_arch != (64, 64) else []
        return ", ".join([*words, *(["normalised"] if self.normalize else [])])

    def spec(self) -> dict[str, Any]:
        """What a runner needs to know, for JSON."""
        return asdict(self)


def _cheetah(n_envs: int, n_steps: int, **changes: Any) -> Case:
    values = {"name": f"ppo-halfcheetah-{n_envs}x{n_steps}", "algo": "ppo", "env": "HalfCheetah-v5"}
    return Case(**{**values, "n_envs": n_envs, "n_steps": n_steps, **changes})


CASES = {
    case.name: case
    for case in (
        _cheetah(8, 256, libraries=(OURS, SB3, SBX, RLOX)),
        _cheetah(8, 256, name="ppo-halfcheetah-8x256-own-dummyvecenv", our_vec_env="dummy"),
        _cheetah(1, 2048),
        _cheetah(8, 5, name="a2c-halfcheetah-8x5", algo="a2c"),
        _cheetah(8, 256, name="trpo-halfcheetah-8x256", algo="trpo", libraries=(OURS, CONTRIB), our_threads=(2,)),
        Case(
            "ppo-cartpole-8x32",
            "ppo",
            "CartPole-v1",
            8,
            32,
            settings={"batch_size": 256, "n_epochs": 20},
            normalize=False,
        ),
        Case(
            "ppo-naturecnn-84x84x4-8x128",
            "ppo",
            "SyntheticImages-v0",
            8,
            128,
            settings={"batch_size": 256, "n_epochs": 4},
            normalize=False,
            policy="CnnPolicy",
            our_threads=(1, 2),
            our_compile="auto",
            warm_up_steps=1024,
        ),
        _cheetah(8, 256, name="cold-20k", cold_steps=20_000, our_compile="auto"),
        _cheetah(8, 256, name="rollout-physics-share", libraries=(OURS,), physics=True),
    )
}

SWEEPS = {
    "envs": [
        _cheetah(n_envs, 2048 // n_envs, name=f"sweep-envs-{n_envs}x{2048 // n_envs}") for n_envs in (1, 8, 32, 128)
    ],
    "width": [
        _cheetah(8, 256, name=f"sweep-width-{width}", net_arch=(width, width), our_threads=(1, 2))
        for width in (64, 256)
    ],
}


def known_cases() -> dict[str, Case]:
    """All cases by name, those of the sweeps too."""
    return CASES | {case.name: case for cases in SWEEPS.values() for case in cases}


def chosen_cases(names: Sequence[str], sweeps: Iterable[str]) -> list[Case]:
    """
    The cases asked for.

    :param names: of cases; none and no sweep: all but the sweeps
    :param sweeps: names of sweeps
    :raises ValueError: if there is no such case
    """
    known = known_cases()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown case {', '.join(unknown)}; known: {', '.join(known)}")
    swept = [case for sweep in sweeps for case in SWEEPS[sweep]]
    return [known[name] for name in names or ([] if swept else CASES)] + swept


def variants(case: Case, library: str, compile_setting: str, n_cores: int) -> list[Variant]:
    """
    The ways to run a library; the fastest one stands for it.

    :param case: the comparison
    :param library: its name
    :param compile_setting: of this package
    :param n_cores: of the machine
    """
    threads = (1, 2) if n_cores > 1 else (1,)
    if library == OURS:
        compiled = case.our_compile or compile_setting
        return [Variant(OURS, n, case.our_vec_env, compiled) for n in case.our_threads if n in threads]
    if library in (RLOX, CLEANRL):
        return [Variant(library, n) for n in threads]
    has_processes = 1 < case.n_envs <= MAX_PROCESSES_PER_CORE * n_cores
    kinds = ("dummy", "subproc") if has_processes else ("dummy",)
    return [Variant(library, n, kind) for n, kind in itertools.product(threads, kinds)]
