"""The page about a run: right verdicts by hand-made numbers, complete for every algorithm and every kind of end."""

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from browser import complaints, foreign_requests, opened
from rich.console import Console
from test_cli import Breaking, run, succeed

from sb3_pgplus import PPOPlus, make_vec_env
from sb3_pgplus.reporting import diagnostics
from sb3_pgplus.reporting.curve_verdicts import judge_curve, judge_evaluations
from sb3_pgplus.reporting.diagnostics import CHECKS, GOOD, NOTE, PROBLEM, WARNING, Check
from sb3_pgplus.reporting.live_table import LiveTable, Trend
from sb3_pgplus.reporting.progress_bar import TrainingProgress
from sb3_pgplus.reporting.report import changed_hyperparameters, phases
from sb3_pgplus.reporting.runs import Evaluations, Run, Series, read_run
from sb3_pgplus.run_folder import RunFolder

SHORT = ("--n-timesteps", "1024", "--no-progress", "--n-envs", "2", "--set", "n_steps=64")
ALGORITHMS = {
    "ppoplus": ("--env", "CartPole-v1", "--set", "n_epochs=2", "--eval-freq", "400", "--eval-video"),
    "a2cplus": ("--env", "CartPole-v1"),
    "trpoplus": ("--env", "Pendulum-v1"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trained")
    for algo, options in ALGORITHMS.items():
        succeed("train", "--algo", algo, *options, *SHORT, "--eval-episodes", "3", "--out", root / algo)
    return {algo: root / algo for algo in ALGORITHMS}


def run_with(settings: dict[str, Any] | None = None, **metrics: list[float]) -> Run:
    """A run with these values of ``train/…``, one update every 100 steps."""
    progress = {
        f"train/{name}": Series(100.0 * np.arange(1, len(values) + 1), np.array(values, float), np.zeros(len(values)))
        for name, values in metrics.items()
    }
    return Run(
        RunFolder(Path("nowhere")), {"algo": "ppoplus", "env": "CartPole-v1"} | (settings or {}), progress=progress
    )


def judged(metric: str, values: list[float], settings: dict[str, Any] | None = None, **others: list[float]) -> Any:
    run = run_with(settings, **{metric: values}, **others)
    [verdict] = [v for check, v in diagnostics.verdicts(run) if check.metric == f"train/{metric}"]
    return verdict


# --- the table of verdicts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "values", "level", "words"),
    [
        # medians: 0.6, 0.4, 0.1, 0.005
        ("clip_fraction", [0.1, 0.6, 0.7], PROBLEM, "Clip fraction 0.6: steps too large; lower the learning rate"),
        ("clip_fraction", [0.4, 0.4, 0.4], WARNING, "Clip fraction 0.4"),
        ("clip_fraction", [0.1, 0.05, 0.2], GOOD, "Clip fraction 0.1: most samples count"),
        ("clip_fraction", [0.005] * 3, NOTE, "larger steps are possible"),
        ("approx_kl", [0.01, 0.08, 0.09], PROBLEM, "KL 0.08: steps too large; lower the learning rate or n_epochs"),
        ("approx_kl", [0.03] * 3, WARNING, "set target_kl=0.02"),
        ("approx_kl", [0.01] * 3, GOOD, "KL 0.01: steps of a healthy size"),
        ("approx_kl", [0.0001] * 3, NOTE, "hardly moves; raise the learning rate"),
        ("approx_kl_max", [0.01, 0.01, 3.0], PROBLEM, "Spikes up to 3"),  # the largest
        ("approx_kl_max", [0.01, 0.01, 0.05], GOOD, "at most 0.05"),
        # the last quarter of eight values is the last two: the median is their mean
        ("explained_variance", [0.9] * 6 + [-0.1, -0.3], PROBLEM, "-0.20: the critic is worse than a constant"),
        ("explained_variance", [-1.0] * 6 + [0.1, 0.3], WARNING, "0.20: the critic knows little"),
        ("explained_variance", [-1.0] * 6 + [0.8, 1.0], GOOD, "0.90: the critic predicts"),
        # of returns that do not vary it is NaN, by design
        ("explained_variance", [np.nan, -1.0, -1.0, 0.8, np.nan], GOOD, "0.80: the critic predicts"),
        ("explained_variance", [np.nan] * 3, NOTE, "The returns do not vary, so there is nothing to explain"),
        # entropy_loss is minus the entropy; 0.02 / 0.5 = 4 %
        ("entropy_loss", [-0.5, -0.1, -0.02], WARNING, "Down to 4.0%: nearly deterministic"),
        ("entropy_loss", [-0.5, -0.3, -0.25], GOOD, "Down to 50% of its start"),
        ("entropy_loss", [-0.5, -0.5, -0.5], WARNING, "Still 100% of its start"),
        ("std", [1.0, 0.5, 0.05], WARNING, "Down to 5.0%"),
        ("std", [1.0, 0.9, 0.8], GOOD, "At 80% of its start"),
        ("std", [1.0, 1.2, 1.5], WARNING, "Grown to 150%"),
        ("std", [1.0, 2.0, 3.0], PROBLEM, "Grown to 300% of its start: noise wins"),
        ("learning_rate", [3e-4, 2e-4, 1e-4], GOOD, "Annealed to 33% of its start"),
        ("learning_rate", [3e-4] * 3, NOTE, "Constant"),
        ("nonfinite_updates", [0, 0, 0], GOOD, "None."),
        ("nonfinite_updates", [0, 1, 4], PROBLEM, "4 updates were skipped"),
        ("is_line_search_success", [1, 1, 1, 1], GOOD, "100% of the steps are accepted"),
        ("is_line_search_success", [1, 1, 1, 0], WARNING, "75% of the steps"),
        ("is_line_search_success", [1, 0, 0, 0], PROBLEM, "Only 25% of the steps"),
        ("line_search_steps", [1, 1, 10, 8], NOTE, "5.0 candidates"),
        ("step_length", [1.0, 0.1, 0.01], WARNING, "shrunk to 1.0%"),
        ("approx_kl", [np.nan] * 3, PROBLEM, "training has broken down"),
        ("approx_kl", [0.01, 0.01], NOTE, "Too short to judge: 2 updates"),
    ],
)
def test_a_verdict_follows_from_its_statistic(metric: str, values: list[float], level: str, words: str) -> None:
    verdict = judged(metric, values)
    assert verdict.level == level and words in verdict.text


@pytest.mark.parametrize(
    ("metric", "setting", "values", "level", "words"),
    [
        ("kl_divergence_loss", {"target_kl": 0.01}, [0.008, 0.009, 0.01], GOOD, "Steps use 90% of the trust region"),
        ("kl_divergence_loss", {"target_kl": 0.01}, [0.001, 0.002, 0.01], NOTE, "Steps use 20%"),
        ("kl_divergence_loss", {"target_kl": "lin_0.01"}, [0.02] * 3, PROBLEM, "2.0 times the trust region"),
        ("kl_divergence_loss", {}, [0.02] * 3, NOTE, "Nothing to compare it with"),
        ("grad_norm", {"max_grad_norm": 0.5}, [0.25] * 3, GOOD, "0.50 times the limit: mostly not clipped"),
        ("grad_norm", {"max_grad_norm": 0.5}, [5.0] * 3, GOOD, "10.0 times the limit: clipped, as is usual"),
        ("grad_norm", {"max_grad_norm": 0.5}, [500.0] * 3, WARNING, "1000 times the limit"),
        ("grad_norm", {"max_grad_norm": None}, [500.0] * 3, NOTE, "Nothing to compare it with"),
    ],
)
def test_limits_are_those_of_the_runs_settings(
    metric: str, setting: dict[str, Any], values: list[float], level: str, words: str
) -> None:
    verdict = judged(metric, values, setting)
    assert verdict.level == level and words in verdict.text


def test_conjugate_gradient_is_judged_by_its_steps_and_the_surrogate_by_its_promise() -> None:
    limit = {"cg_max_steps": 10}
    assert judged("cg_residual", [1e-3] * 3, limit, cg_steps=[10, 10, 10]).level == WARNING
    solved = judged("cg_residual", [1e-3] * 3, limit, cg_steps=[4, 5, 6])
    assert solved.level == GOOD and "50% of the allowed steps" in solved.text
    got, promised = [0.02, 0.01, 0.0], [0.1, 0.1, 0.0]  # the last step failed: there is nothing to compare
    verdict = judged("surrogate_improvement", got, surrogate_improvement_expected=promised)
    assert verdict.level == WARNING and "15% of what the gradient promised" in verdict.text


def test_the_entropy_of_a_density_is_left_to_the_standard_deviation() -> None:
    assert judged("entropy_loss", [1.0, 0.5, -0.5], std=[1.0, 0.9, 0.8]).level == NOTE


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.metric)
def test_every_row_of_the_table_covers_all_numbers_and_names_its_source(check: Check) -> None:
    limits = [band.up_to for band in check.bands]
    assert limits == sorted(set(limits)) and limits[-1] == np.inf
    assert check.source
    for band in check.bands:
        assert band.level in diagnostics.SEVERITY and band.text.format(value=0.5)
    assert any(band.level == GOOD for band in check.bands)  # it can also be well


def test_a_band_ends_with_its_own_limit() -> None:
    check = next(check for check in CHECKS if check.metric == "train/clip_fraction")
    assert check.judge(0.3).level == GOOD and check.judge(np.nextafter(0.3, 1)).level == WARNING


BEGIN, END = "<!-- verdicts: begin -->\n", "<!-- verdicts: end -->"
DOCS = Path(__file__).resolve().parents[1] / "docs" / "reports.md"


def table_of_verdicts() -> str:
    lines = ["| Metric | Judged by | Up to | Verdict | Source |", "|---|---|---|---|---|"]
    for check in CHECKS:
        first = [f"`{check.metric}`", check.statistic.words]
        for band in check.bands:
            limit = "more" if band.up_to == np.inf else f"{band.up_to:g}"
            text = re.sub(r"\{value[^}]*\}", "x", band.text)
            lines.append(
                "| "
                + " | ".join([*first, limit, f"{band.level}: {text}", "" if first[0] == "" else check.source])
                + " |"
            )
            first = ["", ""]
    return "\n".join(lines) + "\n"


def test_the_documentation_has_the_table_of_verdicts() -> None:
    shown = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown == table_of_verdicts(), "write it anew: python tests/test_report.py"


# --- the verdict on the curve -----------------------------------------------------------------------------------------

N = 400
STEPS = np.arange(N) * 10
NOISE = np.random.default_rng(0).normal(size=N)


@pytest.mark.parametrize(
    ("returns", "level", "words"),
    [
        (np.minimum(np.arange(N), 200) + NOISE, GOOD, "and level at the end"),
        (np.arange(N) + NOISE, NOTE, "still rising: more steps would help"),
        (200 - np.abs(np.arange(N) - 200) + 0.3 * np.arange(N) + NOISE, WARNING, "Fell back from"),
        (10 * NOISE, PROBLEM, "Not clearly better at the end"),
        (-np.arange(N) + NOISE, PROBLEM, "Not clearly better"),
        (np.full(N, 7.0), NOTE, "The return is 7.0 all the time"),
        (np.arange(12), NOTE, "Too short to judge: 12 episodes"),
        ([], NOTE, "Too short to judge: 0 episodes"),
        ([1.0, np.nan], PROBLEM, "The return of 1 episode is NaN or infinite"),
        (np.r_[np.nan, np.inf, -np.inf, np.minimum(np.arange(N - 3), 200)], PROBLEM, "The return of 3 episodes is NaN"),
    ],
)
def test_a_curve_is_judged_beyond_its_noise(returns: Any, level: str, words: str) -> None:
    verdict = judge_curve(returns, STEPS)
    assert verdict.level == level and words in verdict.text


def test_evaluations_say_which_model_to_keep() -> None:
    def evaluations(*means: float) -> Evaluations:
        returns = np.array([[m - 1, m, m, m + 1] for m in means])
        return Evaluations(np.arange(len(means)) * 100.0, returns, returns, np.empty(0))

    worse = judge_evaluations(evaluations(5, 50, 20))
    assert worse.level == WARNING and "is worse than the one at step 100 (50.0)" in worse.text
    assert judge_evaluations(evaluations(5, 20, 20)).level == GOOD
    assert judge_evaluations(evaluations(5, 20.5, 20)).level == GOOD  # their intervals overlap


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What an HTML page loads, says and leaves open."""

    VOID = ("meta", "br", "link", "img", "use", "path", "rect", "line")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [
            str(v) for name, v in attrs if name in ("src", "href", "xlink:href", "poster", "data", "action")
        ]
        self.ids += [str(v) for name, v in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def report(folder: Path) -> Page:
    output = succeed("report", folder)
    assert f"Report: {folder / 'report.html'}" in output
    page = Page(folder / "report.html")
    assert not page.open, f"never closed: {page.open}"
    assert len(page.ids) == len(set(page.ids))
    # Nothing from outside: only parts of the page itself (#…) and what it carries (data:…).
    assert all(url.startswith(("#", "data:")) for url in page.loaded), page.loaded
    assert not re.findall(r"@import|url\((?!#)|<link|<script[^>]*src", page.source)
    return page


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_report_of_every_algorithm_is_complete_and_loads_nothing(trained: dict[str, Path], algo: str) -> None:
    page, read = report(trained[algo]), read_run(trained[algo])
    heading = {
        "ppoplus": "PPOPlus on CartPole-v1",
        "a2cplus": "A2CPlus on CartPole-v1",
        "trpoplus": "TRPOPlus on Pendulum-v1",
    }
    assert heading[algo] in page.text and "1,024 of 1,024 steps · seed 0 · 2 environments · finished" in page.text
    for part in ("Learning curve", "Evaluation", "Diagnostics", "Time", "Hyperparameters that are not the defaults"):
        assert part in page.text
    for check, verdict in diagnostics.verdicts(read):
        assert check.title in page.text and verdict.text in page.text and check.source in page.text
    expected = {
        "ppoplus": {"Approximate KL of an update", "Clip fraction", "Entropy of the policy", "Learning rate"},
        "a2cplus": {
            "Explained variance of the critic",
            "Gradient norm, against max_grad_norm",
            "Entropy of the policy",
        },
        "trpoplus": {"KL of the step, against target_kl", "Length of the step", "Residual of conjugate gradient"}
        | {"Line search", "Standard deviation of the actions"},
    }
    assert {check.title for check, _ in diagnostics.verdicts(read)} >= expected[algo]


def test_the_report_shows_evaluations_and_the_newest_video(trained: dict[str, Path]) -> None:
    page, folder = report(trained["ppoplus"]), trained["ppoplus"]
    with np.load(folder / "evaluations.npz") as file:
        means = file["results"].mean(axis=1)
    assert f"last while training, step 800 3 {means[-1]:,.2f} ±" in page.text
    assert "trained model, deterministic 3" in page.text
    [video] = [url for url in page.loaded if url.startswith("data:video/mp4;base64,")]
    assert len(video) > (folder / "videos" / "step-800.mp4").stat().st_size
    assert "step-800.mp4" in page.text


@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 500)])
def test_the_report_in_a_browser_is_quiet_readable_and_stays_at_home(
    trained: dict[str, Path], dark: bool, width: int
) -> None:
    folder = trained["ppoplus"]
    report(folder)
    with opened(folder / "report.html", dark=dark, width=width) as driver:
        assert complaints(driver) == [] and foreign_requests(driver) == []
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        colours = driver.execute_script(
            "return [getComputedStyle(document.body).color,"
            " ...[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)]"
        )
        assert len(colours) > 20 and len(set(colours)) == 1  # the plots' text has the page's colour
        brightness = np.mean([int(part) for part in re.findall(r"\d+", colours[0])])
        assert brightness > 200 if dark else brightness < 60
        played = driver.execute_async_script(
            "const done = arguments[0], video = document.querySelector('video');"
            "video.ontimeupdate = () => { if (video.currentTime > 0.1) done([video.currentTime, video.videoWidth]) };"
            "video.onerror = () => done(video.error.message); video.play().catch(error => done(String(error)));"
        )
        assert played[0] > 0.1 and played[1] == 600  # CartPole's frames


def test_the_report_of_a_long_run_stays_small(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained["a2cplus"], tmp_path / "run"))
    rows = [f"{10 * i},{i % 97}.5,10,{i}.0" for i in range(1, 100_001)]
    (folder / "episodes.csv").write_text("step,return,length,seconds\n" + "\n".join(rows) + "\n", encoding="utf-8")
    assert len(report(folder).source) < 1_000_000


def test_the_report_of_a_run_without_evaluation_says_how_to_get_one(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained["a2cplus"], tmp_path / "run"))
    (folder / "evaluation.yml").unlink()
    page = report(folder)
    assert "There was none: sb3-pgplus train --eval-freq" in page.text and "<video" not in page.source


def test_the_report_of_returns_that_do_not_vary_raises_no_alarm(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained["a2cplus"], tmp_path / "run"))
    rows = "".join(f"{step},nan\n" for step in (100, 200, 300))
    (folder / "progress.csv").write_text(f"time/total_timesteps,train/explained_variance\n{rows}", encoding="utf-8")
    text = report(folder).text
    assert "there is nothing to explain" in text and "broken down" not in text


def test_the_report_of_a_run_without_a_model_or_metrics_works(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(trained["ppoplus"] / "config.yml", folder)
    page = report(folder)
    assert "0 of 1,024 steps" in page.text and "still training, or ended without saving a model" in page.text
    assert "No update has been logged." in page.text


def test_the_report_of_an_interrupted_run_says_so(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained["ppoplus"], tmp_path / "run"))
    config = (folder / "config.yml").read_text(encoding="utf-8").replace("n_timesteps: 1024", "n_timesteps: 100000")
    (folder / "config.yml").write_text(config, encoding="utf-8")
    assert "1,024 of 100,000 steps · seed 0 · 2 environments · interrupted" in report(folder).text


@pytest.fixture
def breaking() -> Iterator[str]:
    gym.register("Breaking-v1", entry_point=lambda: Breaking())
    yield "Breaking-v1"
    del gym.registry["Breaking-v1"]


def test_the_report_of_a_failed_run_shows_its_error_as_text(breaking: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("train", "--env", breaking, *SHORT, "--out", folder).exit_code == 1
    page = report(folder)
    assert "failed, see the error below" in page.text
    assert "ValueError: the simulator broke" in page.text and "Traceback" in page.text
    assert "File &quot;" in page.source  # escaped


def test_hyperparameters_are_a_diff_against_the_defaults(trained: dict[str, Path]) -> None:
    changed = changed_hyperparameters(read_run(trained["ppoplus"]))
    assert changed["n_steps"] == (64, 2048) and changed["n_epochs"] == (2, 10) and changed["n_envs"] == (2, 1)
    assert "vf_coef" not in changed and "seed" not in changed
    page = report(trained["ppoplus"])
    assert "n_steps 64 2048" in page.text


def test_phases_add_up_from_the_metrics() -> None:
    # Ten iterations of 2 × 100 steps at 1000 steps/s, 0.2 s each; updates of 0.5 s; 0.3 s of evaluations in rollouts.
    run = run_with({"n_steps": 100, "n_envs": 2})
    steps, clock = np.array([1000.0, 2000.0]), np.array([5.0, 10.0])
    columns = {"time/iterations": [5, 10], "time/rollout_fps": [1000, 1000], "time/update_seconds": [0.5, 0.5]}
    columns["eval/seconds"] = [0.1, 0.2]
    run.progress.update({name: Series(steps, np.array(v, float), clock) for name, v in columns.items()})  # type: ignore[attr-defined]
    found = phases(run)
    assert found["environments and policy"] == pytest.approx(10 * 0.2 - 0.3)
    assert found["updates"] == pytest.approx(10 * 0.5)
    assert found["evaluations"] == pytest.approx(0.3)
    assert found["logging and the rest"] == pytest.approx(10 - 7)


def test_without_the_length_of_a_rollout_there_are_no_phases() -> None:
    for settings in ({}, {"n_steps": 100}, {"n_envs": 2}):
        run = run_with(settings)
        columns = {"time/iterations": [5.0], "time/rollout_fps": [1000.0]}
        run.progress.update({name: Series(np.ones(1), np.array(v), np.ones(1)) for name, v in columns.items()})  # type: ignore[attr-defined]
        assert phases(run) == {}


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    result = run("report", tmp_path)
    assert result.exit_code == 2 and "is no run folder: there is no config.yml" in " ".join(result.output.split())
    (tmp_path / "config.yml").write_text("n_steps: 3\n", encoding="utf-8")
    result = run("report", tmp_path)
    assert result.exit_code == 2 and "does not name its algo and env" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.yml", "deterministic: true\n", "evaluation.yml has no list of numbers 'returns'"),
        ("evaluation.yml", "returns: [1.0]\nlengths: []\n", "evaluation.yml has no list of numbers 'lengths'"),
        ("evaluation.yml", "3\n", "evaluation.yml"),
        ("episodes.csv", "step,return,length,seconds\n10,1.0,10,0.1\n20,1\n", "line 3 of episodes.csv is too short"),
    ],
)
def test_a_damaged_file_is_named(
    trained: dict[str, Path], name: str, content: str, message: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained["a2cplus"], tmp_path / "run"))
    (folder / name).write_text(content, encoding="utf-8")
    result = run("report", folder)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


# --- while it trains --------------------------------------------------------------------------------------------------


def test_a_trend_keeps_equal_parts_of_the_whole_course() -> None:
    trend = Trend()
    for value in range(1000):
        trend.add(value)
    assert trend.newest == 999
    assert len(trend.sparkline()) == 12 and trend.sparkline()[0] == "▁" and trend.sparkline()[-1] == "█"
    assert sorted(trend.sparkline()) == list(trend.sparkline())  # a rising number rises
    assert len(trend._means) < 24  # constant memory


def test_a_single_nan_is_an_alarm_but_where_returns_do_not_vary() -> None:
    explained, kl = (diagnostics.judge_number(f"train/{name}", np.nan) for name in ("explained_variance", "approx_kl"))
    assert explained is not None and explained.level == NOTE
    assert kl is not None and kl.level == PROBLEM


def test_a_trend_of_one_or_equal_numbers_has_no_course() -> None:
    trend = Trend()
    assert trend.sparkline() == ""
    for _ in range(5):
        trend.add(2.0)
    assert trend.sparkline() == "" and trend.newest == 2.0


def test_the_live_table_colours_numbers_by_their_verdict() -> None:
    numbers = LiveTable()
    numbers.add({"train/clip_fraction": 0.7, "train/explained_variance": 0.9, "train/entropy_loss": -0.5, "other": 1.0})
    cells = {name: numbers._cell(name, trend, True) for name, trend in numbers.shown().items()}
    styles = {name: str(cell[1].style) for name, cell in cells.items()}
    assert styles == {
        "train/clip_fraction": "bold red",
        "train/explained_variance": "green",
        "train/entropy_loss": "default",
    }
    assert cells["train/entropy_loss"][1].plain == "0.5"
    assert numbers.line() == "  clip fraction 0.7  entropy 0.5  expl. variance 0.9"


@pytest.mark.parametrize(("width", "is_terminal"), [(120, True), (40, True), (120, False)])
def test_training_shows_a_live_table_in_a_terminal_and_lines_elsewhere(width: int, is_terminal: bool) -> None:
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(file=nowhere, force_terminal=is_terminal, width=width, record=True)
        model = PPOPlus("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), n_steps=64, n_epochs=2, seed=0)
        progress = TrainingProgress(console, 640)
        try:
            model.learn(640, progress)
        finally:
            progress.close()
        shown = console.export_text()
    assert ("━" in shown) == is_terminal
    for name in ("return", "KL", "clip fraction", "expl. variance", "entropy"):
        assert name in shown
    if not is_terminal:
        lines = [line for line in shown.splitlines() if "/640 steps" in line]
        assert lines[-1].split()[0] == "640/640" and "steps/s  return" in lines[-1]


if __name__ == "__main__":
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(before + BEGIN + table_of_verdicts() + END + rest.partition(END)[2], encoding="utf-8")
