"""Reads what W&B writes on this machine: the log of an offline run, which `wandb sync` would send."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
WHOLE, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """The log is LevelDB's: blocks of chunks, each with checksum, length and kind; a record may have several chunks."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] in (b"", b":W&B")
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        position += HEADER
        if (length == 0 and kind == 0) or position + length > len(data):
            return
        parts = ([] if kind in (WHOLE, FIRST) else parts) + [data[position : position + length]]
        position += length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record


class OfflineRun:
    """One file of a run. W&B's process writes the end of it some time after `finish` has returned."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + 20.0
        while True:
            self.records = list(records(path))
            if self.of("exit") or time.monotonic() > deadline:
                return
            time.sleep(0.02)

    def of(self, kind: str) -> list[Any]:
        return [getattr(record, kind) for record in self.records if record.WhichOneof("record_type") == kind]

    @property
    def run(self) -> Any:
        return self.of("run")[0]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the history."""
        return [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
            for history in self.of("history")
        ]

    @property
    def config(self) -> dict[str, Any]:
        """As it is at the end."""
        updates = [update for config in (self.run.config, *self.of("config")) for update in config.update]
        return {update.key: json.loads(update.value_json) for update in updates if update.key != "_wandb"}

    @property
    def summary(self) -> dict[str, Any]:
        """As it is at the end."""
        updates = [update for summary in self.of("summary") for update in summary.update]
        return {"/".join(update.nested_key) or update.key: json.loads(update.value_json) for update in updates}

    @property
    def models(self) -> list[tuple[set[str], Path]]:
        """Aliases and file of every model artifact."""
        found = []
        for artifact in self.of("artifact"):
            assert artifact.type == "model" and artifact.name == f"model-{self.run.run_id}"
            files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
            found.append((set(artifact.aliases), files["model.zip"]))
        return found

    @property
    def exit_code(self) -> int:
        [found] = self.of("exit")
        return int(found.exit_code)


def offline_runs(folder: Path, run_id: str = "*") -> list[OfflineRun]:
    """The files below a folder."""
    return [OfflineRun(path) for path in folder.rglob(f"offline-run-*/run-{run_id}.wandb")]
