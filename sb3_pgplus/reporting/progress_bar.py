"""What a run shows and records while it trains: a progress bar with a live table, and one CSV row per episode."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.utils import safe_mean

from sb3_pgplus.errors import warn_not_written
from sb3_pgplus.files import write_atomically
from sb3_pgplus.reporting.learning_curve import EPISODE_COLUMNS, Episodes, read_episodes
from sb3_pgplus.reporting.live_table import LiveTable
from sb3_pgplus.reporting.progress_csv import rows_until

REFRESH_SECONDS = 0.2
PLAIN_LINES = 10
"""Without a terminal (a log file, continuous integration) this many lines are printed instead of a moving bar."""


class EpisodeRecorder(BaseCallback):
    """
    Keep every finished episode, and write it to a CSV file as it ends.

    Unlike ``model.ep_info_buffer`` it forgets nothing, and it knows at which environment step an episode ended.

    :param path: the CSV file
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.episodes = Episodes()
        self._path = path
        self._file: IO[str] | None = None
        self._start = 0.0
        self._seconds_before: float | None = None

    def _on_training_start(self) -> None:
        rows = [[*EPISODE_COLUMNS]]
        if self._seconds_before is not None:  # those after the checkpoint will come again
            rows = rows_until(self._path, EPISODE_COLUMNS[0], self.num_timesteps) or rows
        write_atomically(self._path, "".join(",".join(row) + "\n" for row in rows).encode())
        self.episodes = read_episodes(self._path)
        self._start = time.perf_counter() - (self._seconds_before or 0.0)
        # Line buffered: what has been recorded survives whatever ends the process.
        self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def state_dict(self) -> Mapping[str, Any]:
        """What a checkpoint holds: the episodes are in the file."""
        return {"seconds": time.perf_counter() - self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continue the file of an interrupted training instead of beginning it anew.

        :param state: of :meth:`state_dict`
        """
        self._seconds_before = state["seconds"]

    def _on_step(self) -> bool:
        if not self.locals["dones"].any():
            return True
        for info in self.locals["infos"]:
            if (episode := info.get("episode")) is not None:
                self._record(float(episode["r"]), int(episode["l"]))
        return True

    def _record(self, episode_return: float, length: int) -> None:
        self.episodes.steps.append(self.num_timesteps)
        self.episodes.returns.append(episode_return)
        self.episodes.lengths.append(length)
        seconds = time.perf_counter() - self._start
        self.episodes.seconds.append(seconds)
        if self._file is not None:
            try:
                self._file.write(f"{self.num_timesteps},{episode_return!r},{length},{seconds:.3f}\n")
            except OSError as error:
                warn_not_written(self._file.name, error)

    def close(self) -> None:
        """Close the file; SB3 has no hook for a training that was interrupted, so the caller does it."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                warn_not_written(self._file.name, error)
            self._file = None


class _StepsColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed):,}/{int(task.total or 0):,} steps", style="progress.download")


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} steps/s" if speed else "– steps/s", style="progress.data.speed")


class TrainingProgress(BaseCallback):
    """
    A progress bar, and below it the numbers that tell how the training goes, with their course.

    SB3's own bar shows steps and time alone.

    :param console: where to draw; where it is no terminal, a few plain lines are printed instead
    :param total_timesteps: length of this training
    :param evaluator: whose evaluations are shown, too
    """

    def __init__(self, console: Console, total_timesteps: int, evaluator: EvalCallback | None = None) -> None:
        super().__init__()
        self._console = console
        self._total = total_timesteps
        self._evaluator = evaluator
        self._n_evaluations = 0
        self._first_step = 0
        self._steps_before = 0
        self._next_refresh = 0.0
        self._next_line = 0.0
        self._start = time.perf_counter()
        self._numbers = LiveTable()
        self._below = Table.grid()
        self._progress = Progress(
            BarColumn(bar_width=None),
            _StepsColumn(),
            _SpeedColumn(),
            TextColumn("[progress.remaining]ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            speed_estimate_period=60.0,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_timesteps)
        # The thread that refreshes the screen only draws what the training's thread has put together.
        self._live = Live(
            console=console, get_renderable=lambda: Group(self._progress, self._below), refresh_per_second=5
        )

    def _on_training_start(self) -> None:
        self._start = time.perf_counter()
        self._first_step = self.num_timesteps - self._steps_before
        self._next_line = self._total / PLAIN_LINES
        if self._console.is_terminal:
            self._live.start()

    def _on_rollout_start(self) -> None:
        # What the update before has logged; later it may have been written and forgotten.
        self._numbers.add({**self.logger.name_to_value, "return": self._recent("r"), "length": self._recent("l")})

    def state_dict(self) -> Mapping[str, Any]:
        """What a checkpoint holds: how far the bar is."""
        return {"steps": self.num_timesteps - self._first_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where the bar of an interrupted training was.

        :param state: of :meth:`state_dict`
        """
        self._steps_before = state["steps"]

    def _on_step(self) -> bool:
        now = time.perf_counter()
        # A bar is redrawn now and then, since that costs more than an environment step; lines come by steps alone.
        if not self._console.is_terminal or now >= self._next_refresh:
            self._next_refresh = now + REFRESH_SECONDS
            self._show(now)
        return True

    def _on_training_end(self) -> None:
        self._on_rollout_start()
        self._show(time.perf_counter())

    def _show(self, now: float) -> None:
        done = min(self.num_timesteps - self._first_step, self._total)  # the last rollout may go beyond the total
        if self._console.is_terminal:
            self._add_evaluation()
            self._progress.update(self._task, completed=done)
            self._below = self._numbers.table(self._console.width, not self._console.options.ascii_only)
        elif done >= self._next_line:
            chunk = max(self._total // PLAIN_LINES, 1)
            self._next_line = (done // chunk + 1) * chunk
            speed = (done - self._steps_before) / max(now - self._start, 1e-9)
            recent = self._recent("r")
            shown = "–" if recent is None else f"{recent:,.1f}"
            steps = f"{done:>12,}/{self._total:,} steps"
            line = f"{steps}  {speed:,.0f} steps/s  return {shown}{self._numbers.line()}"
            self._console.print(line, soft_wrap=True)

    def _add_evaluation(self) -> None:
        if self._evaluator is not None and len(self._evaluator.evaluations_timesteps) > self._n_evaluations:
            self._n_evaluations = len(self._evaluator.evaluations_timesteps)
            self._numbers.add({"evaluation": float(self._evaluator.last_mean_reward)})

    def _recent(self, what: str) -> float | None:
        """Mean of the last 100 episodes."""
        recent = [info[what] for info in self.model.ep_info_buffer or ()]
        return float(safe_mean(recent)) if recent else None

    def close(self) -> None:
        """Take the bar off the screen's live area; the caller does it also after an interruption or an error."""
        if self._console.is_terminal:
            self._live.stop()
