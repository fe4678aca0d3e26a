"""Where each library is installed: this environment, or one of its own that is made here when it is needed."""

import pathlib
import shutil
import subprocess
import sys

from benchmarks.speed.cases import CLEANRL, CONTRIB, OURS, RLOX, SB3, SBX

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = ROOT / ".benchmarks" / "speed"

RUNNERS = {
    **dict.fromkeys((OURS, SB3, CONTRIB, SBX), "sb3_style"),
    RLOX: "rlox_run",
    CLEANRL: "script_run",
}
#: What pip installs, in the versions of constraints.txt where that names them.
REQUIREMENTS = {
    SBX: ("sbx-rl", "gymnasium[mujoco]"),
    RLOX: ("rlox", "gymnasium[mujoco]"),
    CLEANRL: ("torch", "gymnasium[mujoco]", "tyro", "tensorboard", "tqdm"),
}


class InstallationError(RuntimeError):
    """pip could not install a library."""


def python_of(library: str) -> pathlib.Path:
    """
    The interpreter that has a library; the first time, its environment is made.

    :param library: its name
    :raises InstallationError: if pip fails
    """
    if library not in REQUIREMENTS:
        return pathlib.Path(sys.executable)
    folder = CACHE / "environments" / library
    stamp, python = folder / ".installed", folder / "bin" / "python"
    wanted = "\n".join(REQUIREMENTS[library])
    if not (stamp.is_file() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        _call([sys.executable, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _call([*pip, "-c", str(ROOT / "constraints.txt"), *REQUIREMENTS[library]])
        stamp.write_text(wanted)
    return python


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallationError(last_line(done.stderr or done.stdout) or f"exit status {done.returncode}")


def last_line(text: str) -> str:
    """
    The last line that says something, without the place of this checkout.

    :param text: standard error
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].replace(str(ROOT), ".")[:300] if lines else ""
