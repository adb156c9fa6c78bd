"""Pipeline parallelism: the workers of a pipeline are stages, which run the layers of a microbatch one after another.

A pipeline's run of microbatches are those of one schedule of `torch.distributed.pipelining`: 1F1B (Narayanan et al.,
"PipeDream", 2019), or GPipe (Huang et al., 2019) where there are fewer of them than stages. Activations travel as they
are, and the gradients of each microbatch are a leaf of the canonical tree. So the numbers of stages and of pipelines
reach no bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor

from elastic.compat.torch_sharded import without_gathering
from elastic.errors import ConfigError
from elastic.parallel.canonical import CanonicalSum, Link, Tensors, add
from elastic.parallel.compared import UNLIKE, UNLIKE_WHOLE, Likeness, Taken, difference, first_difference, row_of
from elastic.parallel.leaf import Leaf
from elastic.parallel.levels import one_level
from elastic.parallel.mesh import Mesh
from elastic.parallel.moves import fingerprint, reduce_moves
from elastic.parallel.planned import Call
from elastic.parallel.recording import tensors_in
from elastic.parallel.records import Records, StepRecord
from elastic.parallel.replicated import LossFunction, Pass
from elastic.parallel.scheduled import Body, Stage, shapes_of, to_send
from elastic.parallel.sharded import BitwiseSharded
from elastic.parallel.stage_parameters import StageParameters
from elastic.parallel.stages import Layers, as_tuple, cut, handed, seed_behind, stages_of_buffers
from elastic.parallel.standin import Standin, calls_of, copied
from elastic.parallel.tree import TreeSum
from elastic.parallel.wrapping import MIXED, fsdp_modules
from elastic.seeds import seed_all, unseeded

Activations = tuple[torch.Tensor, ...]


class Pipelined(BitwiseSharded):
    """The same sums, in the same order, as `BitwiseReplica`, for both modes.

    In the first step of a world, and every `check_every` steps from there on, it is held against the whole model.

    Args:
        layers: of the model.
        costs: of each of them; the same on all workers.
        run_layers: runs layers outside of the job's loss, in its precision; errors are those of the job.
        at_pass: called with its number before each forward and backward pass of a microbatch.
        exact: what the stages make must have the bits of what the whole model makes.
        check_every: None for only once.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        layers: Layers,
        costs: Sequence[int],
        run_layers: Callable[[Callable[[], Any]], Any],
        at_pass: Callable[[int], None],
        check_every: int | None,
        runs: list[range],
        mesh: Mesh,
        device: torch.device,
        bucket_mb: int,
        exact: bool,
        check: Callable[[], None],
    ):
        super().__init__(model, loss, runs=runs, rows=runs, mesh=mesh, device=device, bucket_mb=bucket_mb, check=check)
        self._run_layers, self._at_pass, self._check_every = run_layers, at_pass, check_every
        modules, self._layers = layers.modules, layers
        # FSDP2 sums the gradient of what several modules take module by module, where layers are made of such modules
        cut_inside = any(m is not layer for layer in modules for m in fsdp_modules(layer))
        self._like = Likeness(exact, exact and not cut_inside)
        bounds = cut(costs, mesh.layout.stages)
        self._mine = mine = bounds[mesh.stage]
        self._before = modules[: mine.start]
        self._last_name = next(name for name, m in model.named_modules() if m is modules[mine.stop - 1])
        stages = [modules[run.start : run.stop] for run in bounds]
        self._of_stage = StageParameters(model, stages, mesh, device, self._bucket_bytes)
        trained = {name: p for name, p in self._of_stage.whole.items() if p.requires_grad}
        self._leaf, self._trained = Leaf(trained, [], device), list(trained)
        places = {name: i for i, name in enumerate(name for name, p in model.named_parameters() if p.requires_grad)}
        self._places = [places[name] for name in trained]  # of this stage's among all trained parameters
        self._stage_of_buffer = stages_of_buffers(model, stages)
        self._own_buffers = [name for name, stage in self._stage_of_buffer.items() if stage == mesh.stage]
        self._columns = [Link(one_level(len(runs), mesh.pipeline), mesh.stage_group)]
        self._schedule: Any = None
        self._sends: list[tuple[int, ...]] = []  # shapes of what this stage sends to the next one
        self._failed: BaseException | None = None

    @property
    def _is_first(self) -> bool:
        return self._mesh.stage == 0

    @property
    def _is_last(self) -> bool:
        return self._mesh.stage == self._mesh.layout.stages - 1

    def run(self, passes: Iterable[Pass]) -> tuple[StepRecord, float]:
        """Run this stage's part of the microbatches of its pipeline; see `FastReplica.run`."""
        self.model.zero_grad(set_to_none=True)
        self._buffers.begin()
        self._writes.begin()
        #: Each microbatch with the seed of its pass, which the iterator sets.
        self._passes = [(one, torch.initial_seed()) for one in passes]
        self._losses: list[tuple[float, float, dict[str, float]]] = []
        self._after: list[dict[str, torch.Tensor]] = [{} for _ in self._passes]
        # with one microbatch, what `_model_output` has left in modules is found by comparing the second step
        due = self._schedule is None or (self._steps == 1 and min(map(len, self._runs)) == 1)
        due |= self._check_every is not None and self._steps % self._check_every == 0
        self._taken = Taken(copied(self._passes[-1][0].batch)) if due else None
        self._sums: TreeSum[Tensors] = TreeSum(add)
        self._used_here = 0  # a bit for each trained parameter
        expected = self._model_output() if self._schedule is None else None
        self._of_stage.gather()
        try:
            with without_gathering(self.model):
                if expected is not None:
                    self._schedule = self._meet(expected)
                self._run_schedule()
            self._of_stage.check_unwritten()
        finally:
            self._of_stage.put_back()
            self._block_order.take_hash()
        self._writes.check()
        if self._taken is not None:
            self._compare_with_whole(self._taken)
            self._taken = None
        began = time.perf_counter()
        self._of_stage.begin_sums(self._sums, self._runs)
        self._sums = TreeSum(add)  # so that whole gradients go when they have been sent
        record = self._record()
        first = 64 * self._buffers.words
        self._of_stage.give([bool(record.changed_buffers >> (first + i) & 1) for i in range(len(self._parameters))])
        self.wait_s = time.perf_counter() - began
        return record, record.weight * self.scale

    # ---- passes ----------------------------------------------------------------------------------------------------

    def _run_schedule(self) -> None:
        count, layout = len(self._passes), self._mesh.layout
        if layout.stages == 1:
            for index in range(count):
                self._begin_pass(index)
                self._loss_of(index, None).backward()
                self._took(index)
            return
        numbers = torch.arange(count)  # the batches themselves are here: each stage has those of its pipeline
        try:
            target = {"target": numbers, "losses": []} if self._is_last else {}
            self._schedule.step(*([numbers] if self._is_first else []), return_outputs=False, **target)
        except Exception:
            if self._failed is not None:  # torch tells of it in its own words
                raise self._failed from None
            raise

    def _begin_pass(self, index: int) -> None:
        one, seed = self._passes[index]
        self._at_pass(one.first)
        seed_all(seed)
        self._present = index

    def _forward_of_stage(self, *inputs: Any) -> Any:
        """This stage's layers in the present pass; the last stage runs them when the job's loss calls the model."""
        if self._is_last:
            return inputs[0] if len(inputs) == 1 else inputs
        index = self._present
        call = self._call_of(self._passes[index][0].batch)
        found = to_send(as_tuple(self._call_layers(index, call, inputs)), self._last_name, self._sends)
        return found[0] if len(found) == 1 else found

    def _call_of(self, batch: Any) -> Call:
        """How the job's loss calls the model, for a stage that needs it."""
        if self._is_first or self._layers.named:
            return calls_of(self._loss, self.model, batch, named=self._layers.named)
        return (), {}

    def _call_layers(self, index: int, call: Call, inputs: tuple[Any, ...], *, inside: bool = False) -> Any:
        """Run this stage's layers, and return what the last of them returned.

        Args:
            inputs: what the stage before sent.
            inside: this is called in the job's loss, which has the run's precision already.
        """

        def work() -> Any:
            draw = 0 if self._layers.named else sum(layer.training for layer in self._before)
            if draw:  # otherwise the layers before are called too, for their hooks
                seed_all(self._passes[index][1])
                seed_all(seed_behind(draw))
            if torch.is_autocast_enabled(kind := self._device.type):
                self._like = replace(self._like, eps=torch.finfo(torch.get_autocast_dtype(kind)).eps)
            return self._layers.run(self._mine, call, None if self._is_first else handed(inputs))

        with self._buffers.begun(self._own_buffers) as given:
            result = work() if inside else self._run_layers(work)
            self._after[index] = self._buffers.moved(given)
        return result

    def _loss_of(self, index: int, activations: Activations | None) -> torch.Tensor:
        """The loss of a microbatch. The record's row is kept.

        Args:
            activations: what the stage before sent; None if this is the only one.
        """
        seed_all(self._passes[index][1])

        def forward(*inputs: Any, **named: Any) -> Any:
            return self._call_layers(index, (inputs, named), activations or (), inside=True)

        standin = Standin(self.model, forward, named=self._layers.named)
        loss, weight, metrics = self._loss(standin, self._passes[index][0].batch)
        if isinstance(loss, DTensor):  # a number and a parameter that is cut give one, which is not the sum of anything
            raise ConfigError(MIXED)
        self._losses.append(row_of(loss, weight, metrics))
        return loss * self.scale if self.scale != 1 else loss

    def _took(self, index: int) -> None:
        """A backward pass is over: its gradients are the next leaf."""
        leaf, used = self._leaf.gradients(), self._leaf.used
        self._used_here |= sum(1 << place for place, one in zip(self._places, used, strict=True) if one)
        if self._taken is not None and index == len(self._passes) - 1:
            found = zip(self._trained, leaf, used, strict=True)
            self._taken.gradients = {name: gradient.clone() for name, gradient, one in found if one}
        self._sums.push((self._passes[index][0].first, 1), leaf)

    # ---- the first pass of a world -----------------------------------------------------------------------------------

    def _model_output(self) -> Activations:
        """What the model itself makes of the first microbatch. All workers of a row call this."""
        one, seed = self._passes[0]
        seed_all(seed)
        inputs, named = calls_of(self._loss, self.model, copied(one.batch), named=self._layers.named)
        with torch.no_grad(), self._buffers.begun([*self._stage_of_buffer]):
            found = self._run_layers(lambda: self.model(*inputs, **named))
        self.reshard()
        return tuple(tensors_in(found))

    def _meet(self, expected: Activations) -> Any:
        """Send the first microbatch through the stages, and return the schedule, which needs the shapes between them.

        Raises:
            ConfigError: the last stage's output is not what the model makes of it.
        """
        layout, group = self._mesh.layout, self._mesh.pipeline_group
        one, seed = self._passes[0]
        seed_all(seed)
        call = self._call_of(copied(one.batch))
        inputs: tuple[Any, ...] = ()
        outputs: Activations = ()
        for stage in range(layout.stages):
            if stage == self._mesh.stage:
                found = self._call_layers(0, call, inputs)
                outputs = tuple(tensors_in(found)) if self._is_last else to_send(as_tuple(found), self._last_name, None)
            if stage == layout.stages - 1:
                break
            shapes = [[(t.shape, t.dtype, t.requires_grad) for t in outputs] if stage == self._mesh.stage else None]
            dist.broadcast_object_list(shapes, group=group, group_src=stage, device=self._device)
            assert shapes[0] is not None
            sent = [
                outputs[i].detach()
                if stage == self._mesh.stage
                else torch.empty(shape, dtype=dtype, device=self._device)
                for i, (shape, dtype, _) in enumerate(shapes[0])
            ]
            for tensor in sent:
                dist.broadcast(tensor, group=group, group_src=stage)
            if stage + 1 == self._mesh.stage:
                inputs = tuple(t.requires_grad_(needs) for t, (*_, needs) in zip(sent, shapes[0], strict=True))
        self._sends = shapes_of(outputs)
        if self._is_last:
            self._compare(outputs, expected)
        if layout.stages == 1:
            return True
        self._stage_of_torch = stage_of_torch = Stage(
            Body(self._guarded),
            self._mesh.stage,
            layout.stages,
            self._device,
            input_args=(torch.zeros(1, dtype=torch.int64),) if self._is_first else inputs,
            output_args=inputs if self._is_last else outputs,
            group=group,
        )
        stage_of_torch.before, stage_of_torch.behind = self._begin_pass, self._took
        kind = Schedule1F1B if len(self._passes) >= layout.stages else ScheduleGPipe
        return kind(stage_of_torch, len(self._passes), loss_fn=self._guarded_loss, scale_grads=False)

    def _compare(self, found: Activations, expected: Activations) -> None:
        if len(found) != len(expected) or not all(
            isinstance(b, torch.Tensor) and self._like.tensors(a, b) for a, b in zip(found, expected, strict=False)
        ):
            raise ConfigError(UNLIKE.format(self._layers.said))

    def _compare_with_whole(self, found: Taken) -> None:
        """Hold what the stages made of the last microbatch against what the whole model makes of it. It is not the one
        that `_model_output` takes: what that has left in modules is wrong for this one. All workers of a row call this.

        Raises:
            ConfigError: they differ, with what.
        """
        (one, seed), mesh = self._passes[-1], self._mesh
        found.row, found.buffers = self._losses[-1] if self._is_last else None, self._after[-1]
        self._at_pass(one.first)
        with unseeded():
            seed_all(seed)
            mine = difference(
                found,
                self.model,
                self._loss,
                scale=self.scale,
                trained=set(self._trained),
                own_buffers=set(self._own_buffers),
                buffers=self._buffers,
                like=self._like,
            )
        self.reshard()
        self._block_order.take_hash()
        told: list[Any] = [None] * mesh.layout.stages
        if mesh.layout.stages > 1:
            lacks = self._stage_of_torch.lacks_gradients
            dist.all_gather_object(told, (mine, lacks, found.all_zero), group=mesh.pipeline_group)
            mine = first_difference(told)
        if mine is not None:
            raise ConfigError(UNLIKE_WHOLE.format(mine[1]))

    def _guarded(self, *inputs: Any) -> Any:
        try:
            return self._forward_of_stage(*inputs)
        except BaseException as error:
            self._failed = error
            raise

    def _guarded_loss(self, output: Any, number: torch.Tensor) -> torch.Tensor:
        try:
            return self._loss_of(int(number), output if isinstance(output, tuple) else (output,))
        except BaseException as error:
            self._failed = error
            raise

    # ---- what the stages tell each other ---------------------------------------------------------------------------

    def _record(self) -> StepRecord:
        """The step's record, after the stages of each pipeline have told each other what they have of it. Its mask has
        bits of the parameters that got a gradient behind those of the buffers that changed."""
        mesh, buffers = self._mesh, self._buffers
        first = 64 * buffers.words
        mask = buffers.mask({name for after in self._after for name in after}) | self._used_here << first
        mine = [self._losses if self._is_last else None, mask]
        told: list[Any] = [mine]
        if mesh.layout.stages > 1:
            told = [None] * mesh.layout.stages
            dist.all_gather_object(told, mine, group=mesh.pipeline_group)
        words = (first + len(self._parameters) + 63) // 64
        records = Records(self._runs, mesh.pipeline, self._device, words, self.metrics, self._check)
        for _, bits in told:
            mask |= bits
        for (loss, weight, metrics), (one, _) in zip(told[-1][0], self._passes, strict=True):
            records.add(torch.tensor(loss, dtype=torch.float64), weight, metrics, one.digests, mask)
        records.attach(fingerprint(buffers, self._after))
        record = records.gather(mesh.stage_group).result()
        self._steps += 1
        self._end_buffers(record)
        return record

    def _end_buffers(self, record: StepRecord) -> None:
        """Give buffers that passes changed their values after the step: each stage those of its layers, to all."""
        mesh, buffers = self._mesh, self._buffers
        buffers.end(touched := buffers.masked(record.changed_buffers))
        mine = [name for name in touched if self._stage_of_buffer[name] == mesh.stage]
        if mine:
            moves = CanonicalSum(self._columns, self._runs, self._bucket_bytes)
            indices, prints = [one.first for one, _ in self._passes], [last for *_, last in record.attached]
            count = sum(map(len, self._runs))
            reduce_moves(buffers, mine, self._after, indices, moves, count, prints, mesh.stage_group)
        for name in touched if mesh.layout.stages > 1 else ():
            value = buffers.named[name].detach().clone()
            dist.broadcast(value, group=mesh.pipeline_group, group_src=self._stage_of_buffer[name])
            buffers.set(name, value)
