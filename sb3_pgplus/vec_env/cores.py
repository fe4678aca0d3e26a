"""How many processor cores there are to use."""

import os


def available_cores() -> int:
    """Count the cores that this process may use: in a container or a batch job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
