"""
Runs a script in CleanRL's style and measures it from outside: by the lines "SPS: …" that it prints, one per iteration.

    python -m benchmarks.speed.runners.script_run '{"library": "CleanRL", "script": …, "python": …}'
"""

import subprocess

from benchmarks.speed.measuring import Stopwatch, peak_memory_mb, read_spec, write_result

LAST_LINES = 5


def main() -> None:
    """Train once, until enough is measured."""
    spec = read_spec()
    stopwatch = Stopwatch(spec)
    options = {"env-id": spec["env"], "seed": spec["seed"], "num-envs": spec["n_envs"], "num-steps": spec["n_steps"]}
    options |= {"total-timesteps": stopwatch.total_steps}
    command = [spec["python"], "-u", spec["script"], *(f"--{name}={value}" for name, value in options.items())]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stopwatch.imported()
    last: list[str] = []

    def read_to_the_end() -> None:
        assert script.stdout is not None
        for line in script.stdout:
            last[:] = [*last[1 - LAST_LINES :], line.strip()]
            if "SPS:" in line:
                stopwatch.iteration_begins()
        raise SystemExit(f"the script ended early: {' '.join(last)}")

    try:
        stopwatch.run(read_to_the_end)
        memory = peak_memory_mb(script.pid)
    finally:
        script.kill()
    # Of the script's own packages nothing is known here.
    write_result(spec, stopwatch.result() | {"peak_memory_mb": memory, "workers_memory_mb": 0.0, "versions": {}})


if __name__ == "__main__":
    main()
