"""From stored runs to the table and the chart. No number comes from anywhere else."""

import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.cases import CASES, CONTRIB, OURS, SB3, SBX, known_cases

StoredRun = Mapping[str, Any]
BEGIN, END = "<!-- speed: begin -->\n", "<!-- speed: end -->"
LABELS = {OURS: "sb3_pgplus"}
COLORS = {OURS: "#1f6fb2", SBX: "#e0a030", SB3: "#8a8f98", CONTRIB: "#8a8f98"}
OTHER_COLOR = "#b8bcc4"


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """
        Summarise.

        :param values: at least one
        """
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def text(self, digits: int) -> str:
        """
        For a table.

        :param digits: after the point
        """
        if self.low == self.high:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}–{self.high:,.{digits}f})"


@dataclass(frozen=True)
class Row:
    """A library in a case."""

    case: str
    library: str
    words: str = ""
    n_rounds: int = 0
    speed: Spread | None = None
    ratio: Spread | None = None
    start_seconds: float = 0.0
    #: Compiling with an empty cache, and with what an earlier run left there.
    compile_seconds: tuple[float, ...] = ()
    memory_mb: float | None = None
    failed: str = ""


# --- choices ----------------------------------------------------------------------------------------------------------


def best_variant(runs: Iterable[StoredRun]) -> str | None:
    """
    The variant with the largest median speed.

    :param runs: of one library
    :return: its name; None without runs
    """
    speeds: dict[str, list[float]] = {}
    for run in runs:
        speeds.setdefault(run["variant"], []).append(run["steps_per_second"])
    return max(speeds, key=lambda name: statistics.median(speeds[name]), default=None)


def rounds_of(runs: Sequence[StoredRun], case: str, library: str) -> dict[int, StoredRun]:
    """
    Round → run of a library in a case, of the one variant that has most rounds (the fastest one where that is a tie).

    :param runs: all
    :param case: its name
    :param library: its name
    """
    found = [r for r in runs if (r["case"], r["library"], r["phase"]) == (case, library, "round")]
    by_variant: dict[str, list[StoredRun]] = {}
    for run in found:
        by_variant.setdefault(run["variant"], []).append(run)
    most = max(map(len, by_variant.values()), default=0)
    best = best_variant([run for of_one in by_variant.values() if len(of_one) == most for run in of_one])
    return {run["index"]: run for run in by_variant.get(best or "", [])}


def ratios(runs: Mapping[int, StoredRun], reference: Mapping[int, StoredRun]) -> list[float]:
    """
    Speed relative to the reference's in the same round, where both have it.

    :param runs: round → run
    :param reference: the same of the library compared with
    """
    common = sorted(runs.keys() & reference.keys())
    return [runs[i]["steps_per_second"] / reference[i]["steps_per_second"] for i in common]


# --- rows -------------------------------------------------------------------------------------------------------------


def rows(runs: Sequence[StoredRun], failures: Mapping[tuple[str, str], str]) -> list[Row]:
    """
    One row per library of each case that has results, in the cases' order.

    :param runs: all that is stored
    :param failures: (case, library) → why it has none
    """
    result = []
    for name, case in known_cases().items():
        stored = {run["library"] for run in runs if run["case"] == name and run["phase"] == "round"}
        failed = {library for failed_case, library in failures if failed_case == name}
        others = sorted((stored | failed) - set(case.libraries))
        reference = rounds_of(runs, name, case.reference)
        for library in (*case.libraries, *others):
            found = rounds_of(runs, name, library)
            if found:
                result.append(_row(name, library, found, reference))
            elif library in failed:
                result.append(Row(name, library, failed=failures[name, library]))
    return result


def _row(case: str, library: str, found: Mapping[int, StoredRun], reference: Mapping[int, StoredRun]) -> Row:
    compared = ratios(found, reference)
    first = found[min(found)]
    return Row(
        case=case,
        library=library,
        words=first["words"],
        n_rounds=len(found),
        speed=Spread.of(run["steps_per_second"] for run in found.values()),
        ratio=Spread.of(compared) if compared else None,
        start_seconds=statistics.median(run["import_seconds"] + run["build_seconds"] for run in found.values()),
        compile_seconds=_compile_seconds(library, found),
        memory_mb=_memory(found.values()),
    )


def _compile_seconds(library: str, found: Mapping[int, StoredRun]) -> tuple[float, ...]:
    if library not in (OURS, SBX):
        return ()
    cold = [run["compile_seconds"] for index, run in found.items() if index == 1]
    warm = [run["compile_seconds"] for index, run in found.items() if index > 1]
    return (*cold, *([statistics.median(warm)] if warm else []))


def _memory(found: Iterable[StoredRun]) -> float | None:
    sizes = [run["peak_memory_mb"] + (run["workers_memory_mb"] or 0.0) for run in found if run["peak_memory_mb"]]
    return statistics.median(sizes) if sizes else None


# --- Markdown ---------------------------------------------------------------------------------------------------------


def table(all_rows: Sequence[Row]) -> str:
    """
    A Markdown table.

    :param all_rows: from :func:`rows`
    """
    header = "| Case | Library | Run as | Steps/s | × reference | Start, s | Compiling, s | Memory, MB |"
    lines = [header, "|---|---|---|--:|--:|--:|--:|--:|"]
    for row in all_rows:
        name = LABELS.get(row.library, row.library)
        if row.speed is None:
            lines.append(f"| {row.case} | {name} | failed: {row.failed.replace('|', '/')} | – | – | – | – | – |")
            continue
        cells = [
            row.case,
            name,
            row.words,
            row.speed.text(0),
            row.ratio.text(2) if row.ratio else "–",
            f"{row.start_seconds:.1f}",
            " / ".join(f"{seconds:.1f}" for seconds in row.compile_seconds) or "–",
            f"{row.memory_mb:,.0f}" if row.memory_mb else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def notes(runs: Sequence[StoredRun]) -> str:
    """
    What belongs under the table: cold runs in seconds, the physics' share, machine, seeds and versions.

    :param runs: all that is stored
    """
    lines = []
    for case in CASES.values():
        for library in case.libraries:
            found = rounds_of(runs, case.name, library).values()
            if found and case.cold_steps:
                seconds = Spread.of(run["seconds"] for run in found).text(1)
                steps = next(iter(found))["steps"]
                lines.append(f"* {case.name}: {LABELS.get(library, library)} takes {seconds} s for {steps:,} steps.")
            if found and case.physics:
                share = Spread.of(100 * run["physics_share"] for run in found).text(0)
                lines.append(f"* {case.name}: {share} % of a rollout's time is MuJoCo's own step.")
    measured = [run for run in runs if run["phase"] == "round"]
    for machine in sorted({run["machine"] for run in measured}):
        seeds = sorted({run["seed"] for run in measured if run["machine"] == machine})
        lines.append(f"* Measured on: {machine}; seeds {seeds[0]} to {seeds[-1]}, one per round.")
    versions: dict[str, set[str]] = {}
    for run in measured:
        for package, version in run["versions"].items():
            versions.setdefault(package, set()).add(version)
    listed = [f"{package} {', '.join(sorted(found))}" for package, found in versions.items()]
    # A list of versions is longer than a line may be.
    half = (len(listed) + 1) // 2
    lines.append(f"* Versions: {', '.join(listed[:half])},\n  {', '.join(listed[half:])}.")
    return "\n".join(lines) + "\n"


def replaced_block(text: str, content: str) -> str:
    """
    A page with another content between its markers.

    :param text: the page
    :param content: what shall stand there
    :raises ValueError: if there are no markers
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no block between {BEGIN.strip()} and {END}")
    return before + begin + content + end + after


# --- stored runs ------------------------------------------------------------------------------------------------------


def stored_runs(store: pathlib.Path) -> list[StoredRun]:
    """
    All finished runs.

    :param store: the folder
    """
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(store.glob("*/*-*.json"))]


def stored_failures(store: pathlib.Path) -> dict[tuple[str, str], str]:
    """
    (case, library) → why it has no result.

    :param store: the folder
    """
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(store.glob("*/*.failed")))
    return {(entry["case"], entry["library"]): entry["failed"] for entry in found}


def draw(all_rows: Sequence[Row], path: pathlib.Path) -> None:
    """
    A bar chart of the speed relative to the reference, as SVG.

    :param all_rows: from :func:`rows`
    :param path: the file
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [row for row in all_rows if row.case in CASES and row.ratio and row.speed and not CASES[row.case].physics]
    cases = list(dict.fromkeys(row.case for row in shown))
    positions = [i + 0.8 * cases.index(row.case) for i, row in enumerate(shown)]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speed", "font.size": 9}):
        figure = Figure(figsize=(8.0, 0.6 + 0.27 * (positions[-1] + 1)), layout="constrained")
        axes = figure.subplots()
        for y, row in zip(positions, shown, strict=True):
            assert row.ratio is not None and row.speed is not None
            axes.barh(y, row.ratio.median, height=0.8, color=COLORS.get(row.library, OTHER_COLOR))
            if row.ratio.low < row.ratio.high:
                axes.hlines(y, row.ratio.low, row.ratio.high, color="#333333", linewidth=1)
            label = f" {LABELS.get(row.library, row.library)}, {row.speed.median:,.0f} steps/s"
            axes.text(row.ratio.high, y, label, va="center", fontsize=8)
        middles = [[y for y, row in zip(positions, shown, strict=True) if row.case == case] for case in cases]
        axes.set_yticks([sum(ys) / len(ys) for ys in middles], cases)
        axes.margins(y=0.02)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.4 * max(row.ratio.high for row in shown if row.ratio))
        axes.axvline(1.0, color="#8a8f98", linewidth=0.8, linestyle=":")
        axes.set_xlabel("× SB3's speed (TRPO: sb3-contrib's), median and range")
        axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
