"""The requests of the page's buttons: they are checked, then carried out by the commands of the same names."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from elastic.errors import ConfigError
from elastic.tools import live

MAX_BYTES = 4096
MOST_S = 600.0  # how long a request may take, as with the commands
_FIELDS: dict[str, dict[str, type]] = {
    "stop": {},
    "checkpoint": {},
    "scale": {"max_workers": int},
    "drain": {"worker": str},
}
VERBS = tuple(_FIELDS)


def read(verb: str, body: bytes) -> dict[str, Any]:
    """Parse the fields of a request.

    Raises:
        ConfigError: the body is no request of this verb.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise ConfigError("the request is no JSON") from None
    fields = {"run": str, **_FIELDS[verb]}
    if not isinstance(found, dict) or found.keys() != fields.keys():
        raise ConfigError(f"the request has other fields than {', '.join(fields)}")
    for name, kind in fields.items():
        if type(found[name]) is not kind:
            raise ConfigError(f"{name} is a {type(found[name]).__name__}; give a {kind.__name__}")
    if verb == "scale" and found["max_workers"] < 1:
        raise ConfigError(f"max_workers is {found['max_workers']}; give 1 or more")
    return found


def carry_out(verb: str, run: live.LiveRun, fields: dict[str, Any], report: Callable[[str], None]) -> str:
    """Send a request to a run and wait for the result, which is returned as a sentence.

    Args:
        report: called with a sentence for each progress.

    Raises:
        ElasticError: the run refused the request, ended, or takes too long.
    """
    if verb == "stop":
        found = live.stop(run, report, MOST_S)
        return f"{found['status']} after step {found['step']} of {found['total_steps']}"
    if verb == "checkpoint":
        return f"checkpoint of step {live.checkpoint(run, report, MOST_S)['step']} committed"
    if verb == "scale":
        found = live.scale(run, fields["max_workers"], report, MOST_S)
        if "world_size" not in found:
            return f"{found['status']} after step {found['step']}, before its world could change"
        return f"a world of {found['world_size']} at step {found['step']}"
    found = live.drain(run, fields["worker"], 0.0, report, MOST_S)
    return f"worker {found['worker']} has handed over after step {found['step']}"
