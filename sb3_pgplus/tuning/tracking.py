"""One run in Weights & Biases for each trial, grouped by study."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import FrozenTrial

from sb3_pgplus.statistics import iqm
from sb3_pgplus.tuning.objective import stored_runs


def require_wandb() -> None:
    """
    :raises ImportError: if wandb is missing, naming the extra that installs it
    """
    import sb3_pgplus.callbacks.wandb_run  # noqa: F401


def track(study: optuna.Study, trial: FrozenTrial, project: str) -> None:
    """
    Send one trial: its settings, the evaluations over steps, its score and how it ended.

    :param study: the group
    :param trial: finished or failed
    :param project: of W&B
    """
    from sb3_pgplus.callbacks.description import plain
    from sb3_pgplus.callbacks.wandb_run import wandb

    runs, settings = stored_runs(trial), trial.user_attrs.get("settings", {})
    config: dict[str, Any] = {"n_envs": settings.get("n_envs"), **settings.get("hyperparameters", {}), **trial.params}
    with wandb.init(project=project, group=study.study_name, name=f"trial-{trial.number}", config=plain(config)) as run:
        for index in range(max((len(r.returns) for r in runs), default=0)):
            by_seed = {f"return/seed_{r.seed}": r.returns[index] for r in runs if index < len(r.returns)}
            run.log({"evaluation": index + 1, **by_seed, "return/iqm": iqm(list(by_seed.values()))})
        run.summary.update({"state": trial.state.name, "value": trial.values[0] if trial.values else None})
