"""
The table of upstream cases that may fail, ``excused.toml``.

One entry per group of cases::

    [[excused]]
    mode = "defaults"
    suite = "sb3"
    case = "test_run.py::test_ppo[*-PPOPlus]"
    switches = ["clip_range_vf"]
    reason = "what differs, and why that is right"

In ``case``, ``*`` stands for anything. ``switches`` is for mode "defaults": the keyword that explains the failure,
which must go away when it alone is set to its value in the preset; mode "switched" runs exactly that. (Two keywords,
where the case checks two things at once.) ``"class name"`` is a switch too: ours is not called as SB3's is. No switch
is for a case that no setting of ours can pass. ``as_a2c = "TRPOPlus"`` makes it an entry for the runs in which that
class stands in for A2C.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("excused.toml")
CLASS_NAME = "class name"


@dataclass(frozen=True)
class Excuse:
    """Why the cases that match may fail."""

    mode: str
    suite: str
    case: str
    reason: str
    switches: tuple[str, ...] = ()
    as_a2c: str | None = None

    def matches(self, case: str) -> bool:
        """Whether it speaks of this test id."""
        return re.fullmatch(".*".join(map(re.escape, self.case.split("*"))), case) is not None


def load_excuses(mode: str, suite: str, as_a2c: str | None = None, table: Path = TABLE) -> list[Excuse]:
    """The excuses that hold in one run. "switched" runs those of "defaults", to see that their switch explains them."""
    wanted = {"switched": "defaults"}.get(mode, mode)
    entries = tomllib.loads(table.read_text()).get("excused", [])
    excuses = [Excuse(**{**entry, "switches": tuple(entry.get("switches", ()))}) for entry in entries]
    return [e for e in excuses if (e.mode, e.suite, e.as_a2c) == (wanted, suite, as_a2c)]
