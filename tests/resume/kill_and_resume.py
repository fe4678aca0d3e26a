"""
Kill trainings with SIGKILL at random moments, resume them, and compare the ends with uninterrupted ones, bit by bit.

``python tests/resume/kill_and_resume.py`` takes an hour or more. A finished case is stored at once, and
a later call goes on with the rest. ``--again`` forgets what is stored.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as a script, and in the processes it starts

import resume_cases as cases  # noqa: E402  # needs the path above

from sb3_pgplus import checkpoints  # noqa: E402
from sb3_pgplus.files import write_atomically  # noqa: E402
from sb3_pgplus.run_folder import RunFolder  # noqa: E402

N_ITERATIONS = 40


def run_case(algorithm: str, kind: str, n_kills: int) -> dict[str, Any]:
    """Runs that are killed again and again until they end, each compared, until there were as many kills as wanted."""
    rng = np.random.default_rng([cases.seed_of(algorithm), cases.seed_of(kind)])
    settings = cases.run_settings(algorithm, kind, N_ITERATIONS)
    every = settings.n_timesteps // N_ITERATIONS
    kills = {"random": 0, **dict.fromkeys(cases.PLACES, 0)}
    n_runs = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        started = time.monotonic()
        cases.finish(settings, whole, every)
        seconds = time.monotonic() - started
        while sum(kills.values()) < n_kills:
            run = Path(folder) / str(n_runs)
            while sum(kills.values()) < n_kills and not has_ended(run, settings.n_timesteps):
                place = kill_once(settings, run, every, seconds, rng)
                if place is not None:
                    kills[place] += 1
            cases.finish_unless_finished(settings, run, every)
            cases.assert_same_runs(whole, run)
            n_runs += 1
    return {"kills": kills, "runs": n_runs}


def has_ended(run: Path, n_timesteps: int) -> bool:
    found = checkpoints.in_folder(RunFolder(run).checkpoints)
    return bool(found) and checkpoints.steps_of(found[0]) >= n_timesteps


def kill_once(settings: Any, run: Path, every: int, seconds: float, rng: np.random.Generator) -> str | None:
    """
    Begin the run or go on with it until it is killed.

    :return: where, or None if it ended before
    """
    if rng.random() < 2 / 3:
        return "random" if cases.killed(settings, run, every, seconds * rng.uniform(0.05, 0.5)) else None
    place = str(rng.choice(list(cases.PLACES)))
    process = cases.process_of(settings, run, every, dies_at=(place, int(rng.integers(8))))
    process.join(600)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return place if process.exitcode else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of each case")
    parser.add_argument("--store", type=Path, default=ROOT / ".resume" / "kills.json", help="where finished cases go")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--again", action="store_true", help="forget what is stored")
    arguments = parser.parse_args()
    stored = {} if arguments.again or not arguments.store.exists() else json.loads(arguments.store.read_text())
    names = [(algorithm, kind) for algorithm in cases.ALGORITHMS for kind in cases.KINDS]
    for algorithm, kind in names:
        name = f"{algorithm}, {kind}"
        if arguments.only in name and stored.get(name, {}).get("wanted", 0) < arguments.kills:
            stored[name] = {"wanted": arguments.kills, **run_case(algorithm, kind, arguments.kills)}
            write_atomically(arguments.store, json.dumps(stored, indent=1).encode())
        if name in stored:
            print(f"{name}: identical after {stored[name]['kills']} in {stored[name]['runs']} runs", flush=True)
    total = sum(sum(case["kills"].values()) for case in stored.values())
    print(f"{len(stored)} of {len(names)} cases, {total} kills: all ended as the uninterrupted training")


if __name__ == "__main__":
    main()
