"""Calls the job's own code: in the run's precision, on the device, with errors that name the place."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from elastic.compat.torch import is_out_of_host_memory, version_of
from elastic.data.fetching import ItemError
from elastic.errors import ConfigError, RunFailed, WorldBroken, one_line
from elastic.job import Job
from elastic.membership.failure import Failure, named
from elastic.parallel.records import names_of
from elastic.parallel.tensor import refused_in_cells
from elastic.parallel.wrapping import call_gathered, local, refused_where_sharded
from elastic.phases import loss_name
from elastic.worker.alone import wants_process_group
from elastic.worker.batches import to_device
from elastic.worker.group import Group
from elastic.worker.returned import LossValue, check_returned


class UserCodeError(RunFailed):
    """An exception in the job's own code; the message has worker, step, microbatch and traceback."""

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure

    def __reduce__(self) -> tuple[type[UserCodeError], tuple[Failure]]:
        return type(self), (self.failure,)


class UserCode:
    """The job, as the step loop calls it. `where` describes, for people, what is being done."""

    def __init__(self, job: Job, device: torch.device, worker_id: str, *, autocast: str):
        """`autocast`: off, bf16 or fp16."""
        self._job, self._device, self._worker_id = job, device, worker_id
        self._autocast = autocast != "off"
        self._dtype = torch.float16 if autocast == "fp16" else torch.bfloat16
        self.where = "warming up"
        self.phase = ""  # whose loss is meant by `loss`
        self.rank = ""  # in the present world
        self.group: Group | None = None  # of the present world
        self.samples: Sequence[int] | np.ndarray = ()  # ids of the samples that are being processed
        self._step = self._microbatch = -1
        self.on_loss: Callable[[], None] = lambda: None  # called when the job's loss has returned
        self.on_call: Callable[[], None] = lambda: None  # called when the job's loss or evaluate has returned
        self._named: bool | None = None  # whether the job's evaluate() takes the name of the set
        self.watches_gradients = False  # whether to check that the job's loss does not change them
        self.watching: Callable[[], AbstractContextManager[None]] = nullcontext  # entered right around the job's loss

    def at(self, step: int, microbatch: int) -> None:
        """Set the position of the step loop: step (from 0) and microbatch."""
        self._step, self._microbatch, self.samples = step, microbatch, ()
        turn = f" ({self.phase})" if self.phase else ""
        self.where = f"step {step + 1}{turn}, microbatch {microbatch}"

    def doing(self, what: str, step: int) -> None:
        """Set the position to something that is done for a whole step (from 0), or between two steps."""
        self._step, self._microbatch, self.samples = step, -1, ()
        self.where = what

    def loss(self, model: nn.Module, batch: Any) -> LossValue:
        """`Job.loss`, or the loss of the phase, checked."""
        before = _gradients(model) if self.watches_gradients else ()
        result = self.try_loss(model, batch, self.watching)
        for name, parameter, gradient in before:
            if gradient != _gradient(parameter):
                raise self.mistake(
                    ConfigError(
                        f"{self.loss_called} changes the gradient of parameter {name}: it calls backward(), "
                        "zero_grad() or the like itself, but a step has several calls of loss(), and backward() is "
                        "called for what they return; add all that is to be learned to the loss, and leave "
                        "zero_grad() out"
                    )
                )
        self.on_loss()
        return result

    def try_loss(
        self, model: nn.Module, batch: Any, watching: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> LossValue:
        """`Job.loss`, and its result checked. `watching` is entered right around it."""

        def loss(model: nn.Module, batch: Any) -> Any:
            with watching():
                return getattr(self._job, loss_name(self.phase))(model, batch)

        return self._on_batch(loss, self.loss_called, model, batch, training=True)

    @property
    def loss_called(self) -> str:
        """The method of the job that `loss` calls, for messages."""
        return f"{loss_name(self.phase)}()"

    def layers(self, work: Callable[[], Any]) -> Any:
        """Run some layers of the model outside of `Job.loss`, in the precision in which they run inside."""

        def inside() -> Any:
            with torch.autocast(self._device.type, self._dtype, enabled=self._autocast), self.watching():
                return work()

        return self.guard(inside)

    @contextmanager
    def without_autocast(self) -> Iterator[None]:
        """Inside, the job's functions compute in the number formats of their tensors."""
        kept, self._autocast = self._autocast, False
        try:
            yield
        finally:
            self._autocast = kept

    def evaluate(self, model: nn.Module, batch: Any, of: str = "") -> LossValue:
        """`Job.evaluate`, checked; `of` is the name of the held-out set, which it is given if it takes three."""
        function: Callable[..., Any] = self._job.evaluate
        if self._named is None:
            self._named = takes(function, model, batch, of)
        named = partial(_called_with, function, of) if self._named else function
        return self._on_batch(named, "evaluate()", model, batch, training=False)

    def evaluated(self, of: str, loss: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """`Job.evaluated`, checked: further figures of a held-out set, from the sums over all of it.

        Raises:
            UserCodeError: it raised, or returned something else than numbers.
        """
        if type(self._job).evaluated is Job.evaluated:
            return {}
        sums = {"loss": loss, "weight": weight, **{name: metrics[name] for name in names_of(metrics)}}
        found = self.guard(lambda: self._job.evaluated(sums, of), alone=True)
        if not isinstance(found, Mapping) or not all(
            isinstance(k, str) and k and isinstance(v, (int, float)) for k, v in found.items()
        ):
            raise self.mistake(
                ConfigError(
                    f"evaluated() returned {str(found)[:100]!r}, but it is to return numbers by name, which it "
                    "computes from the sums"
                )
            )
        return {name: float(value) for name, value in found.items()}

    def _on_batch(
        self, function: Callable[..., Any], name: str, model: nn.Module, batch: Any, *, training: bool
    ) -> LossValue:
        def work() -> Any:
            moved = to_device(batch, self._device)
            with torch.autocast(self._device.type, self._dtype, enabled=self._autocast):
                return call_gathered(model, lambda: function(model, moved))

        found = self.guard(work)
        self.on_call()
        try:
            return check_returned(name, found, self._device, model.parameters(), training=training)
        except ConfigError as error:
            raise self.mistake(error) from None

    def mistake(self, error: ConfigError) -> UserCodeError:
        """The error that ends the run if the job returned something wrong: one sentence, then the place."""
        message = f"{error} (worker {self._worker_id}{self.rank}, {self.where})"
        return UserCodeError(Failure(type(error).__name__, self._step, self._microbatch, message))

    def guard(self, work: Callable[[], Any], *, alone: bool = False) -> Any:
        """Run some of the job's code.

        Args:
            alone: it does not communicate, so no peer can make it raise.

        Raises:
            UserCodeError: it raised an exception, or called `sys.exit()`.
            WorldBroken: a peer was lost meanwhile, and the code communicates: DDP and sharded models do in passes.
            ConfigError: from our checks or from the job; a replay would raise it too, and its sentence is complete.
        """
        try:
            return work()
        except (UserCodeError, ConfigError, WorldBroken):
            raise
        except (Exception, SystemExit) as error:
            if not alone and self.group is not None and self.group.failed_by(error):
                raise WorldBroken(f"{self.where} failed: {one_line(error)}") from error
            cell_size = self.group.tensor if self.group is not None else 1
            sentence = refused_where_sharded(error) or refused_in_cells(error, cell_size) or wants_process_group(error)
            if sentence is not None:
                raise self.mistake(ConfigError(sentence)) from error
            raise self.error(error) from error

    def error(self, error: BaseException) -> UserCodeError:
        """The error with which to leave the world, and in the end the run. Only the traceback is not in its first
        line."""
        kind, line, samples = type(error).__name__, one_line(error), [int(i) for i in self.samples]
        text = "".join(traceback.format_exception(error)).rstrip()
        if isinstance(error, ItemError):
            kind, line, text, samples = error.kind, error.line, error.text, list(error.samples)
        hint = ""
        if is_out_of_memory(error):
            hint = (
                "\nOut of memory: give a larger --batch.microbatches, so that a pass has fewer samples (in fast a "
                "smaller --batch.pass-size does it too, and changes no sample), or workers with more memory."
            )
        where = self.where + (f", {named(samples)}" if samples else "")
        message = f"worker {self._worker_id}{self.rank} failed at {where}: {line}\n{text}{hint}"
        return UserCodeError(Failure(kind, self._step, self._microbatch, message, samples=tuple(samples)))


def takes(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a function of the job can be called with these arguments; some are optional in its signature."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    return True


def _called_with(function: Callable[..., Any], of: str, model: nn.Module, batch: Any) -> Any:
    return function(model, batch, of)


def _gradients(model: nn.Module) -> list[tuple[str, nn.Parameter, tuple[int, int]]]:
    return [(name, p, _gradient(p)) for name, p in model.named_parameters()]


def _gradient(parameter: nn.Parameter) -> tuple[int, int]:
    """The identity of a parameter's gradient, and its version counter."""
    gradient = parameter.grad
    return (0, 0) if gradient is None else (id(gradient), version_of(local(gradient)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host, for which torch raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_out_of_host_memory(error)
