"""What all jobs share: `--config FILE`, one line for an error, an exit code that says what it was.

ray job submit -- python jobs/update.py --config shop.yaml
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

from raysys import errors
from raysys.config import Config, load_config
from raysys.errors import RaysysError

_RAISED = re.compile(rf"^{re.escape(errors.__name__)}\.(\w+): (.+)$", re.MULTILINE)
"""How the traceback that Ray makes of a task's exception says one of ours."""


def run_job(description: str, action: Callable[[Config], None]) -> int:
    """Parses `--config`, runs the job and returns its exit code.

    A `RaysysError` is one line on standard error: 1 if it will fail again, 75 (EX_TEMPFAIL) if a
    retry may help. So is one that a Ray task raised, on whichever node. Anything else is our bug
    and keeps its traceback.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="the shop's YAML file")
    arguments = parser.parse_args()
    try:
        action(load_config(arguments.config))
    except Exception as error:
        ours = error if isinstance(error, RaysysError) else _of_task(error)
        if ours is None:
            raise
        print(f"raysys: {ours}", file=sys.stderr, flush=True)
        return ours.exit_code
    return 0


def _of_task(error: Exception) -> RaysysError | None:
    """Returns the error of ours that Ray wrapped: it keeps the text of it only."""
    if type(error).__module__.partition(".")[0] != "ray":
        return None
    raised = _RAISED.findall(str(error))
    if not raised:
        return None
    name, message = raised[-1]
    cls: type[RaysysError] = getattr(errors, name)
    return cls(message)
