"""``progress.csv``: SB3's log in rows, which a resumed training continues and no interruption can tear."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import CSVOutputFormat, filter_excluded_keys

from sb3_pgplus.errors import warn_not_written
from sb3_pgplus.files import write_atomically

STEPS = "time/total_timesteps"


class ProgressCSV(CSVOutputFormat):
    """
    SB3's CSV format, with two differences: a new column comes by writing the file anew beside its place, where SB3
    overwrites it, and the rows of an interrupted training can be continued.

    :param path: the file
    :param continue_at: steps of the checkpoint that training goes on from: later rows are cut off, because they will
        come again; None: begin anew
    """

    def __init__(self, path: Path, continue_at: int | None = None) -> None:
        self._path = path
        rows = [] if continue_at is None else rows_until(path, STEPS, continue_at)
        self._write_rows(rows)
        self.file = path.open("a", encoding="utf-8", newline="")
        self.keys = list(rows[0]) if rows else []
        self.separator, self.quotechar = ",", '"'

    def _write_rows(self, rows: list[list[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomically(self._path, text.getvalue().encode())

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """
        :param key_values: name → value
        :param key_excluded: name → formats that leave it out
        :param step: of the log
        """
        try:
            new = filter_excluded_keys(key_values, key_excluded, "csv").keys() - set(self.keys)
            if new:
                self._add_columns(sorted(new))
            super().write(key_values, key_excluded, step)
        except OSError as error:
            warn_not_written(self._path, error)

    def close(self) -> None:
        """Close the file."""
        try:
            super().close()
        except OSError as error:
            warn_not_written(self._path, error)

    def _add_columns(self, names: list[str]) -> None:
        self.file.flush()
        with self._path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        keys = [*self.keys, *names]
        self._write_rows([keys, *([*row, *[""] * len(names)] for row in rows)])  # if that fails, all is as before
        self.file.close()
        self.file, self.keys = self._path.open("a", encoding="utf-8", newline=""), keys


def rows_until(path: Path, column: str, last: float) -> list[list[str]]:
    """
    The header and the rows of a CSV file up to a number of steps.

    :param path: the file; it need not be there
    :param column: with the steps
    :param last: the largest number of steps that stays
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if not rows or column not in rows[0]:
        return []
    index, n_columns = rows[0].index(column), len(rows[0])
    return [rows[0], *(row for row in rows[1:] if len(row) == n_columns and _number(row[index]) <= last)]


def _number(text: str) -> float:
    """A number, or infinity for a row that was cut off in the middle of a number or has none."""
    try:
        return float(text)
    except ValueError:
        return float("inf")
