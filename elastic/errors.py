"""The exceptions a user can meet, and the exit code of each."""

from __future__ import annotations

import traceback

from elastic.redact import redact


class ElasticError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what a command ends with. Secrets are left out of it."""

    exit_code = 1

    def __init__(self, *parts: object):
        super().__init__(*(redact(p) if isinstance(p, str) else p for p in parts))


class ConfigError(ElasticError):
    """Bad input, found before anything was started. One sentence: name, value, fix."""

    exit_code = 2


class StorageError(ElasticError):
    """Storage answered in a way that a run cannot go on with."""


class StorageHung(TimeoutError):
    """Storage did not answer in time. What was asked of it may still be done, at any later time."""


class CheckpointError(ElasticError):
    """A checkpoint is damaged or does not fit what is asked of it."""


class DamagedCheckpoint(CheckpointError):
    """Bytes of a checkpoint are missing, or are not those that were written: nobody can load it."""


class SnapshotError(ElasticError):
    """A vault does not answer, or cannot keep or give what is asked of it."""


class FencedError(ElasticError):
    """The run goes on without this process, or under a newer claim: it may write nothing more."""


class WarmUpError(ElasticError):
    """A worker could not get ready: its data, model or device failed before it joined."""


class WorldBroken(ElasticError):
    """A member of the world is gone or stopped answering: collectives cannot complete."""


class Reform(WorldBroken):
    """This worker leaves its world for one that is made otherwise; nobody failed. The message says why."""


class CopiesDiffer(ElasticError):
    """Workers hold different copies of what is to be equal; the message names the first difference."""


class UpdatesDiffer(CopiesDiffer):
    """Workers were about to apply different updates; none was applied, so their states are still equal."""


class NonFiniteError(ElasticError):
    """Loss or gradient norm is NaN or infinite; nothing of the step was applied."""


class RunFailed(ElasticError):
    """The run ended without finishing; the message says where and why."""


class Interrupted(ElasticError):
    """Stopped by a signal, state saved."""

    exit_code = 130


def error_text(error: ElasticError) -> str:
    """What a command prints of the error that it ends with; to be interrupted is none."""
    return str(error) if isinstance(error, Interrupted) else f"error: {error}"


def whole_text(error: BaseException) -> str:
    """What the ledger has of an error: its text where it is one of ours, which says all, else its traceback."""
    return str(error) if isinstance(error, ElasticError) else "".join(traceback.format_exception(error)).rstrip()


def one_line(error: BaseException) -> str:
    """An exception's type and what it says: the first line, since torch goes on with hints and tables; but where it
    quotes the traceback of another process, the last line, which is what was raised there."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not said:
        return type(error).__name__
    return f"{type(error).__name__}: {said[-1 if any('Traceback (' in line for line in said) else 0]}"
