"""Runs the job's own code where the command calls it, before any worker exists: an exception there is bad input, and
the user sees one sentence and the lines of the job's own files."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic.errors import ConfigError, ElasticError, Interrupted, one_line

_OURS = str(Path(__file__).parent) + os.sep
_PYTHON, _INSTALLED = (
    tuple(sysconfig.get_path(name) + os.sep for name in names)
    for names in (("stdlib", "platstdlib"), ("purelib", "platlib"))
)


@contextmanager
def job_code(what: str) -> Iterator[None]:
    """Inside, code of the job runs.

    Args:
        what: a name for the error, such as `train_data()`.

    Raises:
        ConfigError: the code raised; the sentence has `what`, the exception and its place, and the frames of the job's
            own files follow.
        Interrupted: by Ctrl-C.
    """
    try:
        yield
    except ElasticError:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"{what} was interrupted, before anything was started") from None
    except Exception as error:
        raise ConfigError(failure_text(what, error)) from error


def failure_text(what: str, error: BaseException) -> str:
    """Describe an exception in the job's code for the user: a sentence, then the frames of the job's own files."""
    found = traceback.TracebackException.from_exception(error)
    place = _place(error, _own(found.stack))
    _cut(found)
    text = "".join(found.format()).rstrip()
    sentence = f"{what} failed, {one_line(error)}" + (f" ({place})" if place else "")
    return f"{sentence}\n{text}" if found.stack or found.__cause__ or found.__context__ else sentence


def _place(error: BaseException, frames: list[traceback.FrameSummary]) -> str:
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{_named(error.filename)}, line {error.lineno}"
    return f"{_named(frames[-1].filename)}, line {frames[-1].lineno}" if frames else ""


def _named(file: str) -> str:
    """The path of a file, relative to the working directory if it is inside."""
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _cut(found: traceback.TracebackException) -> None:
    """Keep only the frames of the job's files, in this traceback and in those of its causes."""
    found.stack[:] = _own(found.stack)
    for inner in (found.__cause__, found.__context__, *(found.exceptions or ())):
        if inner is not None:
            _cut(inner)


def _own(stack: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The frames of the user's own files. If the job is in an installed package, the frames of all packages."""
    theirs = [f for f in stack if not f.filename.startswith((_OURS, "<frozen", "<string>"))]
    installed = [f for f in theirs if f.filename.startswith(_INSTALLED)]
    return [f for f in theirs if not f.filename.startswith((*_PYTHON, *_INSTALLED))] or installed
