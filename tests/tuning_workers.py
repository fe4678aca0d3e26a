"""
Starts several `sb3-pgplus tune` at once: ``python tuning_workers.py NUMBER OPTIONS…``; prints process → exit code.

They are forked after the imports and share the server that trainings are forked from: four times as fast as four
interpreters. Everything else is as if each had been started by itself.
"""

import json
import os
import sys
import traceback
from multiprocessing import forkserver

import torch._dynamo  # noqa: F401

from sb3_pgplus.cli import main
from sb3_pgplus.processes import process_context
from sb3_pgplus.tuning import command, trainings  # noqa: F401


def work(options: list[str]) -> None:
    sys.argv = ["sb3-pgplus", "tune", *options]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    process_context([trainings.__name__])
    # The server is not the workers' own child, which they would check.
    forkserver._forkserver.ensure_running = forkserver.ensure_running = lambda: None
    children = []
    for _ in range(int(sys.argv[1])):
        child = os.fork()
        if not child:
            work(sys.argv[2:])
        children.append(child)
    codes = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    print(json.dumps(codes))
