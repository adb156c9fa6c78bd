"""Finding a job by a name on a command line: a file such as job.py, a module, or either with a class."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.job import Job, check_job_class
from elastic.job_code import job_code

_looking = False


class Found(BaseException):
    """Raised instead of training, when a job's file is run only to find its job."""

    def __init__(self, job_class: type[Job], config: TrainConfig):
        super().__init__(job_class, config)
        self.job_class, self.config = job_class, config


def answer(job_class: type[Job], config: TrainConfig) -> None:
    """Called by all functions that a job's file can start training with. Ends the file if it is run for its job only.

    Raises:
        Found: `load_job` runs the file; with its job.
    """
    if _looking:
        raise Found(job_class, config)


def load_job(text: str, option: str = "--job") -> tuple[type[Job], TrainConfig]:
    """The job's class and default configuration: what the file gives to `elastic.main`, or its one job and `CONFIG`.

    Args:
        text: `FILE.py` or `MODULE`, or `FILE.py:CLASS` or `MODULE:CLASS` if there are several.
        option: the option with that text, for errors.

    Raises:
        ConfigError: there is no such file, module or class, or there are several.
    """
    name, _, wanted = text.partition(":")
    module, found = _run_file(name, option) if name.endswith(".py") else (_import(name, option), None)
    if found is not None:
        check_job_class(found.job_class)
    if found is not None and wanted in ("", found.job_class.__name__):
        return found.job_class, found.config
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Job) and c.__module__ == module.__name__
    ]
    chosen = [c for c in classes if not wanted or c.__name__ == wanted]
    if len(chosen) != 1:
        names = ", ".join(f"{name}:{c.__name__}" for c in classes) or "none"
        raise ConfigError(f"{option} is {text!r}, where there are {len(chosen)} jobs; give one of: {names}")
    return chosen[0], getattr(module, "CONFIG", TrainConfig())


def _import(name: str, option: str) -> types.ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{option} is {name!r}, which cannot be imported ({error}); give a file or a module"
        ) from error
    if found is None:
        raise ConfigError(
            f"{option} is {name!r}, which cannot be imported (there is no such module); give a file or a module"
        )
    with job_code(f"importing {name}, the module of {option},"):
        return importlib.import_module(name)


def _run_file(file: str, option: str) -> tuple[types.ModuleType, Found | None]:
    """Run a file as `python FILE` does, up to where it would train. It becomes this process's `__main__`, so that its
    classes are pickled by value when they are sent to other processes."""
    global _looking
    path = Path(file).expanduser().absolute()
    try:
        code = compile(path.read_bytes(), str(path), "exec")
    except OSError as error:
        raise ConfigError(
            f"{option} is {file!r}, which cannot be read ({error.strerror}); give a job's file"
        ) from error
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{option} is {file!r}, which is no Python: {error}") from error
    module: Any = types.ModuleType("__main__")
    module.__file__ = str(path)
    sys.modules["__main__"] = module
    sys.path.insert(0, str(path.parent))
    _looking = True
    try:
        with job_code(f"running {file}, the file of {option},"):
            exec(code, vars(module))
    except Found as found:
        return module, found
    finally:
        _looking = False
    return module, None
