"""The page of results: every table and figure, recomputed from the stored runs, between two markers in Markdown."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sb3_pgplus.benchmarking import figures, store
from sb3_pgplus.benchmarking.results import Results
from sb3_pgplus.benchmarking.stock import SHARED_ARGUMENTS, left_out
from sb3_pgplus.benchmarking.suites import OURS, OWN
from sb3_pgplus.benchmarking.tables import list_item, sections
from sb3_pgplus.configs import ConfigError
from sb3_pgplus.files import write_atomically

BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->"
TITLES = {
    "mujoco": "MuJoCo",
    "time": "MuJoCo, each training alone on the machine",
    "classic": "Classic control and Box2D",
    "ablation": "Implementation matters",
}
EMPTY = f"# Results\n\n{BEGIN}{END}\n"


def write(folder: Path, page: Path, *, with_figures: bool = True) -> str:
    """
    Fill a page in.

    :param folder: of all results
    :param page: Markdown file; made if it is not there
    :param with_figures: draw the figures anew, beside the page in ``images``
    :return: what stands between the markers now
    :raises ConfigError: if the page has no markers, or a package is missing
    """
    text = page.read_text(encoding="utf-8") if page.exists() else EMPTY
    if BEGIN not in text or END not in text:
        raise ConfigError(f"{page} has no place for the tables: it needs the lines {BEGIN.strip()} and {END}")
    content = content_of(folder, page.parent, with_figures=with_figures)
    before, _, rest = text.partition(BEGIN)
    write_atomically(page, (before + BEGIN + content + END + rest.partition(END)[2]).encode())
    return content


def content_of(folder: Path, page_folder: Path, *, with_figures: bool = True) -> str:
    """
    All tables and figures.

    :param folder: of all results
    :param page_folder: where the page is; links to figures are relative to it
    :param with_figures: draw the figures anew
    """
    groups = [Results(name, store.read_all(folder, name)) for name in _order(folder)]
    parts = [_group(results, page_folder, with_figures) for results in groups if results.cells]
    notes = [f"* Failed: {path.as_posix()}: {why}" for path, why in store.failures(folder)]
    notes += [f"* Damaged, and left out: {path.as_posix()}" for path in store.damaged(folder)]
    if not parts:
        parts = ["No run is stored yet.\n"]
    return "\n".join([*parts, *([("\n".join(notes) + "\n")] if notes else [])])


def _order(folder: Path) -> list[str]:
    """The suites in their order, each followed by those of another length."""
    names = list(TITLES)
    known = [name for name in store.groups(folder) if name.partition("-")[0] in names]
    return sorted(known, key=lambda name: (names.index(name.partition("-")[0]), name))


def _group(results: Results, page_folder: Path, with_figures: bool) -> str:
    kind, _, steps = results.group.partition("-")
    title = TITLES[kind] + (f", {int(steps):,} steps" if steps.isdecimal() else "")
    lines = [f"## {title}\n"]
    try:
        drawn = figures.draw(results, page_folder / "images", anew=with_figures)
    except ImportError as error:
        raise ConfigError(str(error)) from error
    for alt, path in drawn:
        lines.append(f"![{alt}]({Path(os.path.relpath(path, page_folder)).as_posix()})\n")
    for heading, text in sections(results):
        lines.append(f"### {heading}\n\n{text}")
    return "\n".join([*lines, _notes(results)])


def _notes(results: Results) -> str:
    """What belongs under the tables: seeds, machines, versions, commits, and what is wrong with the runs."""
    runs = results.runs
    machines = sorted({str(run.data["machine"]) for run in runs})
    commits = sorted({_short(run.data["code"]) for run in runs})
    versions: dict[str, set[str]] = {}
    for run in runs:
        for package, number in run.data["versions"].items():
            versions.setdefault(package, set()).add(number)
    texts = [f"{package} {' and '.join(sorted(numbers))}" for package, numbers in versions.items()]
    side_by_side = sorted({int(run.data["jobs"]) for run in runs})
    lines = [
        f"{len(runs)} runs, {' or '.join(map(str, side_by_side))} at a time, on: {'; '.join(machines)}.",
        f"Code: {', '.join(commits)}.",
        f"Versions: {', '.join(texts)}.",
    ]
    if mixed := results.with_mixed_settings():
        lines.append(f"Runs with different settings in one cell: {', '.join(f'{v} on {e}' for v, e in mixed)}.")
    if others := results.others_on_other_tasks(variant.name for variant in OURS if results.kind == "mujoco"):
        lines.append(f"Not one set of settings for all tasks yet: {', '.join(others)}.")
    compared = ("n_envs", *SHARED_ARGUMENTS)
    if unlike := results.differs_from_ours("ppoplus", "sb3-ppo-same", compared):
        lines.append(f"SB3's PPO was trained with earlier settings of ours on {', '.join(unlike)}.")
    beside = {env for variant, env in results.cells if variant in ("sb3-ppo-same", OWN.name)}
    same = [run.data for run in runs if run.variant == "ppoplus" and run.env in beside]
    sources = {f"{data['source']}, {left_out(data['settings'])}" for data in same}
    lines += [f"SB3 PPO, same settings: {source}." for source in sorted(sources)]
    return "\n".join(part for line in lines for part in list_item(line)) + "\n"


def _short(code: Mapping[str, str]) -> str:
    """The commit's first characters, and whether there were changes; without one the digest of the source."""
    commit, _, changes = code.get("commit", f"digest {code.get('digest', 'unknown')}").partition(" with")
    return (commit[:10] if "commit" in code else commit) + (f" with{changes}" if changes else "")
