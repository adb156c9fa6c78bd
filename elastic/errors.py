"""The exceptions that users can meet, and their exit codes."""

from __future__ import annotations

import traceback

from elastic.redact import redact


class ElasticError(Exception):
    """Base of all errors raised on purpose. `exit_code` is the exit code of the command. Secrets are removed from
    it."""

    exit_code = 1

    def __init__(self, *parts: object):
        super().__init__(*(redact(p) if isinstance(p, str) else p for p in parts))


class ConfigError(ElasticError):
    """Bad input, found before anything was started. The text is one sentence: name, value, fix."""

    exit_code = 2


class StorageError(ElasticError):
    """Storage answered in a way in which the run cannot go on."""


class StorageHung(TimeoutError):
    """Storage did not answer in time. The request may still be carried out at any later time."""


class CheckpointError(ElasticError):
    """A checkpoint is damaged, or does not fit the request."""


class DamagedCheckpoint(CheckpointError):
    """Bytes of a checkpoint are missing, or differ from those that were written: no process can load it."""


class SnapshotError(ElasticError):
    """A vault does not answer, or cannot store or return a part."""


class FencedError(ElasticError):
    """The run goes on without this process, or under a newer claim: it may write nothing more."""


class WarmUpError(ElasticError):
    """A worker could not get ready: its data, model or device failed before it joined."""


class WorldBroken(ElasticError):
    """A member of the world is gone or stopped answering: collectives cannot complete."""


class Reform(WorldBroken):
    """This worker leaves its world so that another one is formed; nobody failed. The message says why."""


class CopiesDiffer(ElasticError):
    """Workers hold different copies of what must be equal; the message names the first difference."""


class UpdatesDiffer(CopiesDiffer):
    """Workers were about to apply different updates. None was applied, so their states are still equal."""


class NonFiniteError(ElasticError):
    """Loss or gradient norm is NaN or infinite; nothing of the step was applied."""


class RunFailed(ElasticError):
    """The run ended without finishing; the message says where and why."""


class Interrupted(ElasticError):
    """Stopped by a signal, state saved."""

    exit_code = 130


def error_text(error: ElasticError) -> str:
    """The text that a command prints for the error that it ends with. An interruption is not called an error."""
    return str(error) if isinstance(error, Interrupted) else f"error: {error}"


def whole_text(error: BaseException) -> str:
    """The text of an error for the ledger: the message of our own errors, which is complete, otherwise the
    traceback."""
    return str(error) if isinstance(error, ElasticError) else "".join(traceback.format_exception(error)).rstrip()


def one_line(error: BaseException) -> str:
    """An exception's type and one line of its message: the first line, since torch appends hints and tables. If the
    message quotes a traceback of another process, it is the last line, which names what was raised there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[-1 if any('Traceback (' in line for line in lines) else 0]}"
