"""
Fetch the test-suites of stable-baselines3 and sb3-contrib, as an outside judge of our classes.

Their ``tests/`` are in the source distributions only. They are downloaded at test time, checked against the sums below
and kept in a cache (``$SB3_PGPLUS_CACHE``, by default a folder in the user's cache directory); nothing of theirs is
part of this repository. ``python tests/conformance/upstream_fetch.py`` fills the cache ahead of time.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

#: Suite → name of its distribution.
DISTRIBUTIONS = {"sb3": "stable-baselines3", "contrib": "sb3-contrib"}

#: Source archive → sha256. A new supported version adds its line here.
SHA256 = {
    "stable_baselines3-2.9.2.tar.gz": "8af267e9513343f481b3f0680b7740ad79a746873db24f18a9fb2edcbd9a2df7",
    "sb3_contrib-2.9.2.tar.gz": "20b514afc04de447e284e9e2dec9d368cf6828ecf67f4060262aeba0818a3c3a",
}


class FetchError(RuntimeError):
    """The upstream tests are not in the cache and could not be put there."""


def cache_dir() -> Path:
    """The folder that keeps downloads between runs."""
    if chosen := os.environ.get("SB3_PGPLUS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sb3_pgplus"


def fetch_tests(suite: str) -> Path:
    """
    The folder with the tests of the installed version, downloaded on the first call.

    :param suite: "sb3" or "contrib"
    :raises FetchError: when offline, on an unknown version, or when the archive is not the pinned one
    """
    distribution = DISTRIBUTIONS[suite]
    release = f"{distribution.replace('-', '_')}-{version(distribution)}"
    archive = f"{release}.tar.gz"
    if archive not in SHA256:
        raise FetchError(f"no sha256 is pinned for {archive}: add it to {Path(__file__).name}, or install {_pinned()}")
    # The sum is part of the name: a folder made from another archive is never reused.
    tests = cache_dir() / f"{release}-tests-{SHA256[archive][:8]}"
    if not tests.is_dir():
        _extract_tests(_fetch_archive(archive), release, tests)
    return tests


def _pinned() -> str:
    return " or ".join(name.removesuffix(".tar.gz") for name in SHA256)


def _fetch_archive(archive: str) -> Path:
    """The checked archive; one that somebody put into the cache by hand serves as well."""
    target = cache_dir() / archive
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _download(archive, Path(scratch)).replace(target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if digest != SHA256[archive]:
        raise FetchError(f"{target} has sha256 {digest}, not the pinned {SHA256[archive]}: delete it and try again")
    return target


def _download(archive: str, scratch: Path) -> Path:
    name, release = archive.removesuffix(".tar.gz").split("-")
    # With a hash in a requirements file, pip checks the archive before it runs anything in it.
    requirement = scratch / "requirements.txt"
    requirement.write_text(f"{name}=={release} --hash=sha256:{SHA256[archive]}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
    done = subprocess.run(
        [*command, "--dest", str(scratch), "--requirement", str(requirement)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise FetchError(
            f"pip could not download {archive} (offline?). Its tests judge this package; connect once, or put the "
            f"archive into {cache_dir()} by hand.\n{done.stderr.strip()[-2000:]}"
        )
    return scratch / archive


def _extract_tests(archive: Path, release: str, target: Path) -> None:
    """Unpack ``tests/`` alone: beside the package's sources, Python would import those, not the installed ones."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.startswith(f"{release}/tests/")]
        tar.extractall(scratch, members, filter="data")
        try:
            (Path(scratch) / release / "tests").rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise


if __name__ == "__main__":
    for each in DISTRIBUTIONS:
        print(fetch_tests(each))
