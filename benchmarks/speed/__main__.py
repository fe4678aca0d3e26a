"""
Speed of whole trainings: this package, SB3, sb3-contrib, SBX and rlox with the same task and the same hyperparameters.

    python -m benchmarks.speed                                   # everything; a stopped benchmark continues
    python -m benchmarks.speed --quick                           # does it work? minutes, numbers worth nothing
    python -m benchmarks.speed ppo-cartpole-8x32 cold-20k        # some cases
    python -m benchmarks.speed --sweep envs --sweep width
    python -m benchmarks.speed ppo-halfcheetah-1x2048 --cleanrl ppo_continuous_action.py
    python -m benchmarks.speed --table                           # table and chart from the stored runs

Every run is a process of its own. A library that can be run in several ways (threads of torch, DummyVecEnv or
SubprocVecEnv) is tried in all of them first, in short runs; the fastest way takes part in the rounds. In a round every
library trains once, one after the other, with the round's number as seed. See docs/benchmarks.md.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.speed import report
from benchmarks.speed.cases import CASES, CLEANRL, OURS, SWEEPS, Case, Variant, chosen_cases, variants
from benchmarks.speed.libraries import CACHE, ROOT, RUNNERS, InstallationError, last_line, python_of
from benchmarks.speed.measuring import n_cores
from sb3_pgplus.files import write_atomically

STORE = ROOT / "benchmarks" / "results" / "speed"
PAGE, README, CHART = ROOT / "docs" / "benchmarks.md", ROOT / "README.md", ROOT / "docs" / "images" / "speed.svg"
TIMEOUT = 1800
PILOT, ROUND = "pilot", "round"


class RunError(RuntimeError):
    """A library's run failed."""


@dataclass(frozen=True)
class Run:
    """One training."""

    case: Case
    variant: Variant
    #: ``"pilot"`` or ``"round"``.
    phase: str
    index: int

    def path(self, store: pathlib.Path) -> pathlib.Path:
        """Where its result lies."""
        return store / self.case.name / f"{self.variant.name}-{self.phase}{self.index}.json"

    def __str__(self) -> str:
        return f"{self.case.name}: {self.variant.library}, {self.variant.words}, {self.phase} {self.index}"


@dataclass
class Benchmark:
    """Makes the runs that are missing."""

    options: argparse.Namespace
    progress: Progress

    def __post_init__(self) -> None:
        self.store: pathlib.Path = self.options.store
        self.task = self.progress.add_task("", total=sum(map(self.n_runs, self.options.cases)))

    def libraries(self, case: Case) -> tuple[str, ...]:
        """Those of a case, and a script in CleanRL's style where it was given one."""
        fits = (case.algo, case.n_envs, case.n_steps) == ("ppo", 1, 2048)
        return (*case.libraries, CLEANRL) if fits and self.options.cleanrl else case.libraries

    def variants(self, case: Case, library: str) -> list[Variant]:
        """The ways to run a library here."""
        return variants(case, library, self.options.compile, n_cores())

    def n_runs(self, case: Case) -> int:
        """Runs of a case in all."""
        numbers = [len(self.variants(case, library)) for library in self.libraries(case)]
        total: int = self.options.pilots * sum(n for n in numbers if n > 1) + self.options.rounds * len(numbers)
        return total

    def measure(self, case: Case) -> None:
        """All runs of a case: pilots, then rounds with each library's fastest variant."""
        failed: set[Variant] = set()
        ways = {library: self.variants(case, library) for library in self.libraries(case)}
        for library in ways:
            self._failure(case, library).unlink(missing_ok=True)
        for index in range(1, self.options.pilots + 1):
            for found in ways.values():
                for variant in found if len(found) > 1 else []:
                    self._attempt(Run(case, variant, PILOT, index), failed)
        chosen = {library: self._fastest(case, found) for library, found in ways.items()}
        for index in range(1, self.options.rounds + 1):
            for variant in chosen.values():
                self._attempt(Run(case, variant, ROUND, index), failed)

    def _fastest(self, case: Case, ways: list[Variant]) -> Variant:
        pilots = [Run(case, way, PILOT, i + 1).path(self.store) for way in ways for i in range(self.options.pilots)]
        name = report.best_variant([json.loads(path.read_text()) for path in pilots if path.exists()])
        return next((way for way in ways if way.name == name), ways[0])

    def _attempt(self, run: Run, failed: set[Variant]) -> None:
        """Make a run unless it is there; a way that failed is left out of the rest of its case."""
        library = run.variant.library
        if run.variant not in failed and not run.path(self.store).exists():
            self.progress.update(self.task, description=str(run))
            try:
                self._make(run)
            except (RunError, InstallationError) as error:
                all_ways = isinstance(error, InstallationError)
                failed.update(self.variants(run.case, library) if all_ways else [run.variant])
                entry = {"case": run.case.name, "library": library, "failed": str(error)}
                write_atomically(self._failure(run.case, library), json.dumps(entry).encode())
                self.progress.console.print(f"{run} failed: {error}", style="red", markup=False)
        self.progress.advance(self.task)

    def _failure(self, case: Case, library: str) -> pathlib.Path:
        return self.store / case.name / f"{library}.failed"

    def _make(self, run: Run) -> None:
        with tempfile.TemporaryDirectory(prefix="speed-") as folder:
            spec = {
                **run.case.spec(),
                "library": run.variant.library,
                "threads": run.variant.threads,
                "vec_env": run.variant.vec_env,
                "compile": run.variant.compile,
                "seconds": self.options.pilot_seconds if run.phase == PILOT else self.options.seconds,
                "seed": run.index,
                "result": str(pathlib.Path(folder) / "result.json"),
                "python": str(python_of(run.variant.library)),
                "script": str(self.options.cleanrl or ""),
                "spawned_at": time.time(),
            }
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            result = execute(spec, environment(run, pathlib.Path(folder)))
        described = {
            "case": run.case.name,
            "recipe": run.case.recipe,
            "library": run.variant.library,
            "variant": run.variant.name,
            "words": run.variant.words,
            "phase": run.phase,
            "index": run.index,
            "seed": run.index,
            "load_average_before": load,
        }
        write_atomically(run.path(self.store), json.dumps({**described, **result}, indent=1).encode())


def environment(run: Run, folder: pathlib.Path) -> dict[str, str]:
    """
    The process's environment: threads, no GPU, and the compiler's cache. The cache is empty in a cold run and in the
    first round, and what the run before left there in all others.
    """
    threads = str(run.variant.threads)
    cache = folder / "inductor" if run.case.cold_steps else CACHE / "inductor" / run.case.name
    if run.phase == ROUND and run.index == 1 and run.variant.library == OURS:
        shutil.rmtree(cache, ignore_errors=True)
    set_here = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "PYTHONWARNINGS": "ignore",
    }
    if run.variant.threads == 1:
        set_here["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    return os.environ | set_here


def execute(spec: dict[str, object], env: dict[str, str]) -> dict[str, object]:
    """
    One run in a process of its own.

    :raises RunError: if it fails or takes too long
    """
    python = sys.executable if spec["library"] == CLEANRL else str(spec["python"])
    command = [python, "-m", f"benchmarks.speed.runners.{RUNNERS[str(spec['library'])]}", json.dumps(spec)]
    # A session of its own: what it started ends with it, also on Ctrl-C.
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise RunError(f"not finished after {TIMEOUT} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    path = pathlib.Path(str(spec["result"]))
    if process.returncode or not path.exists():
        raise RunError(last_line(errors) or f"exit status {process.returncode}")
    result: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return result


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar over runs."""
    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        yield progress


# --- results ----------------------------------------------------------------------------------------------------------


def write_report(options: argparse.Namespace, console: Console) -> None:
    """Print the table; with the results of the repository, write documentation and chart too."""
    runs, failures = report.stored_runs(options.store), report.stored_failures(options.store)
    rows = report.rows(runs, failures)
    if rows:
        print(report.table(rows), report.notes(runs) if runs else "", sep="\n")
    if options.store != STORE:
        return
    has_chart = any(row.ratio and row.case in CASES for row in rows)
    if has_chart:
        report.draw(rows, CHART)
    else:
        CHART.unlink(missing_ok=True)
    how = "Nothing is stored yet. `make benchmark` measures, and writes table and chart here.\n"
    picture = "![Training speed relative to SB3](images/speed.svg)\n\n" if has_chart else ""
    content = f"{picture}{report.table(rows)}\n{report.notes(runs)}" if runs else how
    write_block(PAGE, content)
    sentence = "Speed of whole trainings beside SB3 and others, on your machine: `make benchmark`"
    shown = "![Training speed relative to SB3](docs/images/speed.svg)\n\n" if has_chart else ""
    write_block(README, f"{shown}{sentence}\n([what is measured, and the numbers](docs/benchmarks.md)).\n")


def write_block(page: pathlib.Path, content: str) -> None:
    """Replace what is generated in a page."""
    text = report.replaced_block(page.read_text(encoding="utf-8"), content)
    write_atomically(page, text.encode())


# --- command line -----------------------------------------------------------------------------------------------------


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all of these by default: {', '.join(CASES)}")
    parser.add_argument("--sweep", action="append", default=[], choices=sorted(SWEEPS), help="a sweep; repeat it")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, 5 by default")
    parser.add_argument("--seconds", type=float, default=15.0, help="measured in a round's run, after its warm-up")
    parser.add_argument("--pilots", type=int, default=2, help="short runs of every variant")
    parser.add_argument("--pilot-seconds", type=float, default=6.0, help="measured in a short run")
    parser.add_argument("--compile", default="true", choices=("auto", "true", "false"), help="of this package")
    parser.add_argument("--cleanrl", type=pathlib.Path, help="a script such as CleanRL's ppo_continuous_action.py")
    parser.add_argument("--store", type=pathlib.Path, default=STORE, help="folder of the results")
    parser.add_argument(
        "--quick", action="store_true", help="one short round, one way per library, into a folder of its own"
    )
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.pilots = 1, 1.0, 0
        options.store = CACHE / "quick" if options.store == STORE else options.store
    if options.cleanrl:
        options.cleanrl = options.cleanrl.resolve()
    options.store = options.store.resolve()
    try:
        options.cases = chosen_cases(options.cases, options.sweep)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    """Measure what is missing, then report."""
    options, console = parsed_options(), Console()
    if not options.table:
        try:
            with progress_bar(console) as progress:
                benchmark = Benchmark(options, progress)
                for case in options.cases:
                    benchmark.measure(case)
        except KeyboardInterrupt:
            console.print("Stopped. The finished runs are kept; the same command continues.")
            raise SystemExit(130) from None
    write_report(options, console)


if __name__ == "__main__":
    main()
