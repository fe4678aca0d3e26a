"""What a study leaves in its folder: the best settings, all trials as a table, and one page that shows everything."""

from __future__ import annotations

import csv
import html
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from sb3_pgplus.files import write_atomically
from sb3_pgplus.reporting.html_page import document, table
from sb3_pgplus.run_folder import package_versions
from sb3_pgplus.tuning.plan import TuningPlan
from sb3_pgplus.tuning.ranking import Candidate, best_trials, is_feasible
from sb3_pgplus.tuning.study import TuningResult


def write_results(result: TuningResult, folder: Path, *, with_page: bool = True) -> list[str]:
    """
    Write ``best.yml``, ``trials.csv`` and ``report.html``; each is replaced as a whole.

    :param result: of a study, finished or not
    :param folder: where to
    :param with_page: also the page, which takes seconds
    :return: what could not be written, in words
    """
    problems = []
    best = best_settings(result)
    if best is None:
        problems.append("no best.yml: no trial was completed within the limits")
    else:
        header, settings = best
        text = header + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_atomically(folder / "best.yml", text.encode())
    write_atomically(folder / "trials.csv", trials_as_csv(result.study).encode())
    try:
        if with_page:
            write_atomically(folder / "report.html", page(result).encode())
    except ImportError as error:
        problems.append(f"no report.html: {error}")
    return problems


def best_settings(result: TuningResult) -> tuple[str, dict[str, Any]] | None:
    """
    The settings that ``sb3-pgplus train --config`` takes: the ranking's first within the limits, without a ranking the
    search's best.

    :param result: of a study
    :return: a comment and the settings, or nothing where no trial was completed within the limits
    """
    if result.ranking:
        beyond = {trial.number for trial in result.study.get_trials(deepcopy=False) if not is_feasible(trial)}
        winner = next((candidate for candidate in result.ranking if candidate.number not in beyond), None)
        if winner is None:
            return None
        low, high = winner.interval or (float("nan"), float("nan"))
        seeds = len(winner.test_scores)
        score = f"{winner.test_score:.6g} on {seeds} test seeds (95 % interval {low:.6g} to {high:.6g})"
        number, exact = winner.number, winner.exact
    else:
        trials = best_trials(result.study, result.plan)
        if not trials:
            return None
        number, exact = trials[0].number, trials[0].user_attrs["settings"]
        score = f"{trials[0].values[0]:.6g} on the tuning seeds, not tested on others"
    which = "The constructor's defaults" if number is None else f"Trial {number}"
    header = f"# {which} of the study {result.study.study_name}: {score}.\n"
    return header, _run_settings(result.plan, exact)


def _run_settings(plan: TuningPlan, exact: dict[str, Any]) -> dict[str, Any]:
    settings = plan.settings
    return {
        "algo": settings.algo,
        **settings.environment.settings(),
        "n_envs": exact["n_envs"],
        "backend": settings.backend,
        "n_timesteps": settings.n_timesteps,
        **({"policy": settings.policy} if settings.policy else {}),
        **exact["hyperparameters"],
        "made_with": package_versions() | {"optuna": optuna.__version__},
    }


# --- the table --------------------------------------------------------------------------------------------------------


def trials_as_csv(study: optuna.Study) -> str:
    """
    :param study: the study
    :return: one row per trial: state, values, seconds, why it ended, parameters, score of each seed
    """
    rows = [_row(trial) for trial in study.get_trials(deepcopy=False)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names or ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(trial: FrozenTrial) -> dict[str, Any]:
    attrs = trial.user_attrs
    error = attrs.get("error", "").strip().splitlines()
    return {
        "trial": trial.number,
        "state": trial.state.name,
        "origin": attrs.get("origin", "search"),
        **{f"value_{i}" if i else "value": value for i, value in enumerate(trial.values or [])},
        "seconds": round(trial.duration.total_seconds(), 3) if trial.duration else None,
        "ended": attrs.get("pruned") or (error[-1] if error else None),
        "retry_of": trial.system_attrs.get("failed_trial"),
        **trial.params,
        **{f"return_seed_{run['seed']}": run["returns"][-1] for run in attrs.get("runs", [])},
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def page(result: TuningResult) -> str:
    """
    One HTML page with everything inside, plotly's program too: it works without a network.

    :param result: of a study, finished or not
    :raises ImportError: if plotly is missing, naming the extra that installs it
    """
    try:
        import plotly.io
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("the report needs plotly: pip install 'sb3_pgplus[tune]'") from error
    study = result.study
    parts = [f"<h1>{html.escape(study.study_name)}</h1>", _summary(result), _ranking_table(result)]
    best = best_settings(result)
    if best is not None:
        text = best[0] + yaml.safe_dump(best[1], sort_keys=False, allow_unicode=True)
        parts.append(f"<h2>best.yml</h2><pre>{html.escape(text)}</pre>")
    for title, draw in _figures(result.plan):
        parts.append(f"<h2>{title}</h2>")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # experimental plots, and the sign of a target, which is minded below
                parts.append(plotly.io.to_html(draw(study), full_html=False, include_plotlyjs=False))
        except Exception as error:  # with few trials, or equal values, some of them cannot be drawn
            parts.append(f"<p>Not drawn: {html.escape(str(error))}</p>")
    return document(study.study_name, parts, head=f"<script>{get_plotlyjs()}</script>")


def _figures(plan: TuningPlan) -> Iterator[tuple[str, Callable[[optuna.Study], Any]]]:
    draw = optuna.visualization
    several = len(plan.goals) > 1
    target: dict[str, Any] = {"target": lambda t: t.values[0], "target_name": "return"} if several else {}
    if several:
        yield "Pareto front", lambda study: draw.plot_pareto_front(study, target_names=list(plan.goals))
    yield "History", lambda study: draw.plot_optimization_history(study, **target)
    # Importances are those for reaching low values of a target that is named.
    lowest: dict[str, Any] = {"target": lambda t: -t.values[0], "target_name": "return"} if several else {}
    yield "Importances", lambda study: draw.plot_param_importances(study, **lowest)
    yield "Slices", lambda study: draw.plot_slice(study, **target)
    yield "Parallel coordinates", lambda study: draw.plot_parallel_coordinate(study, **target)
    yield "Timeline", draw.plot_timeline


def _summary(result: TuningResult) -> str:
    plan, settings = result.plan, result.plan.settings
    states = [trial.state for trial in result.study.get_trials(deepcopy=False)]
    numbers = ", ".join(f"{states.count(state)} {state.name.lower()}" for state in TrialState if state in states)
    return (
        f"<p>{html.escape(settings.algo)} on {html.escape(settings.environment.env)}, {settings.n_timesteps:,} steps, "
        f"{len(plan.seeds)} seeds per trial, objective {plan.objective}. Trials: {numbers or 'none'}.</p>"
    )


def _ranking_table(result: TuningResult) -> str:
    if not result.ranking:
        return ""
    rows = table(RANKING_COLUMNS, map(ranking_row, result.ranking))
    seeds = f"{result.plan.test_seeds[0]} to {result.plan.test_seeds[-1]}"
    return f"<h2>On test seeds {seeds}, which the search never saw</h2>{rows}"


RANKING_COLUMNS = ("trial", "from", "IQM on test seeds", "95 % interval", "score in the search")


def ranking_row(candidate: Candidate) -> tuple[str, ...]:
    """
    :param candidate: of the ranking
    :return: a cell for each of ``RANKING_COLUMNS``
    """
    interval = f"{candidate.interval[0]:,.2f} to {candidate.interval[1]:,.2f}" if candidate.interval else "–"
    score = "–" if candidate.search_score is None else f"{candidate.search_score:,.2f}"
    return (
        "–" if candidate.number is None else str(candidate.number),
        candidate.origin,
        f"{candidate.test_score:,.2f}",
        interval,
        score,
    )
