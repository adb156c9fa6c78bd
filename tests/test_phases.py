"""Updates that take turns: each phase is a step, with one loss, one optimizer and each batch once."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import elastic
from elastic.data.fetching import Order
from elastic.data.order import sample_ids
from elastic.errors import ConfigError
from elastic.job import Plan, check_job
from elastic.observe.callbacks import figures
from elastic.observe.console import row_text
from elastic.observe.history import History
from elastic.observe.ledger import gaps_and_doubles
from elastic.parallel.optimizers import together
from elastic.parallel.turns import check_optimizers, learning
from elastic.phases import Cycle
from elastic.run.plan import resolve
from elastic.run.prepare import dry_run, prepare
from elastic.seeds import derive, seed_all
from elastic.worker.placing import Placing
from jobs.actor_critic import ActorCritic, moved
from jobs.dcgan import DCGAN
from tests.forked import B, configure, fault, train
from tests.phase_jobs import Streamed, Turns

CYCLES = [("d", "g"), ("critic",) * 5 + ("actor",), ("a", "b", "c"), ("a", "b", "b", "a"), ("a",)]


@pytest.mark.parametrize("names", CYCLES)
def test_each_phase_takes_each_batch_once_in_order(names):
    cycle = Cycle(names)
    steps = 3 * cycle.steps_each
    taken = {name: [cycle.batch(s) for s in range(steps) if cycle.phase(s) == name] for name in names}

    for batches in taken.values():
        assert batches == sorted(set(batches))
    often = Counter(names)
    for name in names:
        if often[name] == max(often.values()):
            assert taken[name] == list(range(3 * cycle.batches_each))
    assert [cycle.phase(s) for s in range(cycle.steps_each)] == list(names)
    for batches in range(1, 3 * cycle.batches_each + 1):
        last = cycle.steps(batches) - 1
        assert cycle.batch(last) == batches - 1
        assert last + 1 == steps or cycle.batch(last + 1) == batches


def test_without_phases_each_step_takes_the_next_batch():
    assert [(Cycle().phase(s), Cycle().batch(s), Cycle().steps(s)) for s in range(4)] == [("", s, s) for s in range(4)]


def test_durations_in_epochs_go_through_the_data_in_each_phase(tmp_path):
    config = configure(tmp_path, None, run__duration="2ep", eval__every="1ep", checkpoint__every="5st")
    sizes = {"dataset_size": 90, "tokens_per_sample": 4}

    two = resolve(config, **sizes, phases=("d", "g"))
    three = resolve(config, **sizes, phases=("critic", "critic", "actor"))

    assert (two.total_steps, two.eval_every, two.checkpoint_every) == (12, 6, 5)
    assert (three.total_steps, three.for_job.batches, three.for_job.steps_per_epoch) == (9, 6, 4.5)
    assert [two.samples(step) for step in range(5)] == [0, 30, 30, 60, 60]
    assert [three.samples(step) for step in range(7)] == [0, 30, 60, 60, 90, 120, 120]
    order = Order(seed=0, dataset_size=90, global_size=30, microbatches=10, cycle=two.cycle)
    assert order.span(5, 3, 2).ids.tolist() == order.span(4, 3, 2).ids.tolist()
    assert order.span(5, 3, 2).first_position == 60 + 9


def test_a_curriculum_goes_by_steps_and_every_sampler_by_batches():
    plan = Plan(40, 30, 100, 3, 0, ("d", "g"))
    easiest = elastic.Curriculum(np.arange(100), until=20)

    first, last = (easiest(np.arange(at * 30, at * 30 + 30), plan) for at in (0, 10))

    assert first.max() < 10
    assert sorted(easiest(np.arange(300, 400), plan).tolist()) == list(range(100))
    assert last.tolist() == sample_ids(0, 100, np.arange(300, 330)).tolist()


# ---- what is refused before training ---------------------------------------------------------------------------------


class Nameless(Turns):
    phases = "critic"  # type: ignore[assignment]


class Unknown(Turns):
    phases = ("critic", "actor", "judge")


class Forgotten(Turns):
    phases = ("actor",)


class Plainly(Turns):
    def loss(self, model, batch):
        return self.loss_actor(model, batch)


class Unevaluated(Turns):
    evaluate = elastic.Job.evaluate


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (
            Nameless(),
            "Nameless.phases is 'critic'; give a tuple of names in the order in which they take turns, such as",
        ),
        (Unknown(), "Unknown.phases names 'judge', but Unknown has no method loss_judge(model, batch); define it, or"),
        (
            Forgotten(),
            "has a method loss_critic(model, batch), but Forgotten.phases names only actor; add 'critic', or",
        ),
        (
            Plainly(),
            "Plainly has phases, so its losses are loss_critic and loss_actor, and nothing calls loss(); leave",
        ),
        (Unevaluated(), "Unevaluated has phases and eval_data(), but no evaluate(model, batch), which is loss() where"),
    ],
)
def test_phases_that_cannot_be_are_refused(job, words, tmp_path):
    with pytest.raises(ConfigError) as refused:
        prepare(job, configure(tmp_path, None))
    assert words in str(refused.value)


def test_layers_that_are_cut_over_workers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--parallel.tensor is 2, but the updates of Turns take turns, which goes"):
        prepare(Turns(), configure(tmp_path, None, parallel__tensor=2, scaling__workers_per_node=2))


def test_helpers_may_have_names_that_begin_like_losses():
    class Helped(Turns):
        def loss_weights(self, step):
            return step

    check_job(Helped())


def adam(*modules):
    return torch.optim.Adam([p for m in modules for p in m.parameters()])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: adam(m), "optimizer() returned a Adam, but the job has the phases a, b; return a dict with an"),
        (lambda m: {"a": adam(m)}, "optimizer() returned none for the phase 'b'; return {'a': ..., 'b': ...}"),
        (
            lambda m: {"a": adam(m[0]), "b": adam(m[1]), "c": adam(m[2])},
            "returned one for 'c', but the phases are a, b",
        ),
        (
            lambda m: {"a": adam(m[0]), "b": adam(m[1])},
            "parameter 2.weight is in no optimizer that optimizer() returned",
        ),
        (
            lambda m: {"a": adam(m[0], m[1]), "b": adam(m[1], m[2])},
            "parameter 1.weight is in the optimizers of a and b",
        ),
    ],
)
def test_optimizers_that_do_not_train_each_parameter_in_one_phase_are_refused(make, words):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])

    with pytest.raises(ConfigError) as refused:
        check_optimizers(("a", "b"), make(model), model)
    assert words in str(refused.value)

    model[2].requires_grad_(False)
    check_optimizers(("a", "b", "a"), {"a": adam(model[0]), "b": adam(model[1])}, model)


def test_only_the_parameters_of_a_phase_learn_in_it_also_after_an_error():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].bias.requires_grad_(False)
    optimizer = together({"a": adam(model[0]), "b": adam(model[1])})

    def fails():
        with learning(optimizer, "b"):
            model[1](model[0](torch.ones(1, 2))).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()

    assert [p.grad is not None for p in model.parameters()] == [False, False, True, False]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]


# ---- what is shown of them -------------------------------------------------------------------------------------------


def test_figures_of_phases_are_curves_of_their_own(tmp_path):
    rows = [
        {
            "step": s,
            "phase": p,
            "time": s + 0.5,
            "loss": s / 2,
            "lr": 0.1,
            "world_size": 1,
            "sample_hash": "",
            name: 3.0,
        }
        for s, (p, name) in enumerate([("d", "sure"), ("g", "fooled")] * 3, start=1)
    ]
    history = History()
    history.add_rows(rows)

    assert figures(rows[1]) == {"train/g/loss": 1.0, "train/g/lr": 0.1, "train/world_size": 1, "train/g/fooled": 3.0}
    assert row_text(rows[1], 6, None, None) == "step 2/6  g loss 1.0000  fooled 3.0000  lr 0.1  workers 1"
    curves = {name: [v for v in values if v == v] for name, values in history._curves.items()}
    assert curves == {
        "loss": [0.5, 1.0, 1.5, 2.0, 2.5, 3.0],
        "d/loss": [0.5, 1.5, 2.5],
        "g/loss": [1.0, 2.0, 3.0],
        "sure": [3.0] * 3,
        "fooled": [3.0] * 3,
    }
    assert "12 steps of the phases critic, critic, actor in turn" in dry_run(
        prepare(Turns(), configure(tmp_path, None))
    )


# ---- runs ------------------------------------------------------------------------------------------------------------

CYCLE = Cycle(Turns.phases)
#: Kills and pauses in the middle of a cycle: before, in and after the passes, at the fence and at a save.
KILLS = [("step.forward", 2, 2), ("step.reduce", 3, 1), ("step.after_fence", 4, 1), ("checkpoint.staged", 5, 0)]


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_turns_have_one_hash_at_every_number_of_workers_through_kills_and_resumes_within_a_cycle(tmp_path):
    saves = {"eval__every": "4st", "checkpoint__every": "5st"}
    alone = train(Turns(), configure(tmp_path, "alone", **saves), 1)
    faults = [fault(*kill, only=tmp_path / f"killed-{number}") for number, kill in enumerate(KILLS)]
    train(Turns(), configure(tmp_path, "whole", **saves, run__stop_after="8st"), 5, faults=faults)
    whole = train(Turns(), configure(tmp_path, "whole", **saves), 2)
    cut = {"parallel__strategy": "fsdp", **saves}
    train(Turns(), configure(tmp_path, "cut", **cut, run__stop_after="4st"), 2)
    lost = train(Turns(), configure(tmp_path, "cut", **cut), 3, faults=[fault("step.before_fence", step=9, rank=1)])

    assert (alone.failure, whole.failure, lost.failure) == (None, None, None)
    assert all((tmp_path / f"killed-{number}").exists() for number in range(len(KILLS)))
    assert lost.events("member_lost")
    assert whole.sha == alone.sha
    assert lost.sha == alone.sha
    assert whole.state().items() == alone.state().items()
    assert [row["phase"] for row in whole.history] == ["critic", "critic", "actor"] * 4
    assert [row["samples"] for row in whole.history] == [B * (CYCLE.batch(step) + 1) for step in range(12)]
    assert all(("sure" in row, "accuracy" in row)[row["phase"] == "actor"] for row in whole.history)
    assert gaps_and_doubles(whole.rows, B, CYCLE) == gaps_and_doubles(lost.rows, B, CYCLE) == []
    assert whole.evaluations == alone.evaluations == lost.evaluations
    assert sorted(alone.evaluations) == [4, 8, 12]
    assert len({row["lr"] for row in whole.history if row["phase"] == "actor"}) == 4
    assert whole.result["exactness_held"]
    with pytest.raises(ConfigError, match="the phases of Fewer are critic, actor, but run whole was started with crit"):
        prepare(Fewer(), configure(tmp_path, "whole", **saves))


class Fewer(Turns):
    phases = ("critic", "actor")


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_fast_and_streamed_turns_do_the_same(tmp_path):
    """In fast what is normalised goes by the samples of a pass; a stream gives a batch to each phase of a cycle."""
    fast = {"run__exactness": "fast"}
    alone = train(Turns(), configure(tmp_path, "alone", **fast), 1)
    two = train(Turns(), configure(tmp_path, "two", **fast), 2, faults=[fault("step.reduce", step=5, rank=1)])
    cut = train(Turns(), configure(tmp_path, "cut", **fast, parallel__strategy="fsdp"), 2)
    stream = train(Streamed(), configure(tmp_path, "stream", run__duration="6st"), 1)
    moved = train(Streamed(), configure(tmp_path, "moved", run__duration="6st"), 2, faults=[fault("step.reduce", 5, 1)])

    assert [one.failure for one in (alone, two, cut, stream, moved)] == [None] * 5
    assert two.column("loss") == pytest.approx(alone.column("loss"), rel=0.2)
    assert cut.column("loss") == pytest.approx(alone.column("loss"), rel=0.2)
    assert not two.events("unused_parameters")
    assert two.column("sample_hash") == alone.column("sample_hash")
    assert moved.sha == stream.sha
    hashes = stream.column("sample_hash")
    assert hashes[1] == hashes[2] != hashes[0]


class Opened:
    def __init__(self):
        self.times = 0

    def __call__(self, lane, lanes):
        self.times += 1
        return (([lane, i],) for i in range(1000))


def test_a_stream_is_read_once_for_all_phases_and_gives_each_its_own_copy():
    opened = Opened()
    lanes = elastic.Lanes(opened)
    lanes.bind(Plan(20, 6, 1 << 62, 3, 0, ("d", "g")))

    first = [lanes[i] for i in (0, 1, 2, 0, 1, 2, 6, 7, 8, 6, 7, 8)]
    first[0][0].append("changed")
    again = lanes[6]

    assert [sample[0][1] for sample in first] == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert first[3] == ([0, 0],)
    again[0].append("changed")
    assert lanes[6] == ([0, 3],)
    assert opened.times == 1


# ---- the ports, beside plain loops -----------------------------------------------------------------------------------


def plain(job, config, steps):
    """What an ordinary script begins with: the model, and batches in the order and under the seeds of a run."""
    placing = Placing(job, config, torch.device("cpu"))
    placing.warm_up()
    data, size = job.train_data(), config.batch.global_size

    def batches():
        for begin in range(0, steps // 2 * size, size):
            samples = []
            for position in range(begin, begin + size):
                index = int(sample_ids(0, len(data), np.array([position]))[0])
                seed_all(derive("item", 0, position // len(data), index))
                samples.append(data[index])
            yield torch.utils.data.default_collate(samples)

    return placing.whole().model, batches()


def plain_dcgan(model, batches, job):
    ones, zeros = torch.ones(B), torch.zeros(B)
    loss, losses = nn.BCEWithLogitsLoss(), []
    d, g = model.discriminator, model.generator
    d_steps = torch.optim.Adam(d.parameters(), lr=job.lr, betas=(0.5, 0.999))
    g_steps = torch.optim.Adam(g.parameters(), lr=job.lr, betas=(0.5, 0.999))
    for images, noise in batches:
        d_steps.zero_grad()
        of_real = loss(d(images), ones)
        of_made = loss(d(g(noise).detach()), zeros)
        (of_real + of_made).backward()
        d_steps.step()

        g_steps.zero_grad()
        fooling = loss(d(g(noise)), ones)
        fooling.backward()
        g_steps.step()
        losses += [(of_real + of_made).item(), fooling.item()]
    return losses


def plain_actor_critic(model, batches, job):
    actor, critic, losses = model.actor, model.critic, []
    actor_steps = torch.optim.Adam(actor.parameters(), lr=job.lr)
    critic_steps = torch.optim.Adam(critic.parameters(), lr=2 * job.lr)
    for state, chances in batches:
        games = []  # one after another, as a script would play them
        for begin, draws in zip(state, chances, strict=True):
            game, now = [], begin[None]
            for draw in draws:
                right = (draw < torch.softmax(actor(now), -1)[:, 1]).long()
                game.append((now, right))
                now = moved(now, right)
                if abs(now[0, 0]) >= 2.4 or abs(now[0, 2]) >= 0.21:
                    break
            games.append(game)
        states = torch.cat([now for game in games for now, _ in game])
        actions = torch.cat([right for game in games for _, right in game])
        lengths = [len(game) for game in games]
        returns = torch.tensor([sum(job.discount**k for k in range(n - i)) for n in lengths for i in range(n)])

        critic_steps.zero_grad()
        wrong = functional.mse_loss(critic(states)[:, 0], returns)
        wrong.backward()
        critic_steps.step()

        actor_steps.zero_grad()
        better = (returns - critic(states)[:, 0]).detach()
        better_moves = functional.cross_entropy(actor(states), actions, reduction="none") * better
        better_moves.mean().backward()
        actor_steps.step()
        losses += [wrong.item(), better_moves.mean().item()]
    return losses


PORTS = [
    SimpleNamespace(job=DCGAN(lr=3e-3), loop=plain_dcgan),
    SimpleNamespace(job=ActorCritic(moves=20), loop=plain_actor_critic),
]


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("port", PORTS, ids=["dcgan", "actor-critic"])
def test_a_port_gives_what_a_plain_loop_gives_and_one_hash_at_two_sizes(port, tmp_path):
    plainly = {"optim__schedule": "constant", "optim__warmup": None, "optim__clip_norm": None, "run__duration": "8st"}
    config = configure(tmp_path, "fast", **plainly, run__exactness="fast", batch__microbatches=1)
    model, batches = plain(port.job, config, 8)

    losses = port.loop(model, batches, port.job)
    ran = train(port.job, config, 1)
    one = train(port.job, configure(tmp_path, "one", **plainly), 1)
    two = train(port.job, configure(tmp_path, "two", **plainly), 2)

    assert ran.failure is None
    assert ran.column("loss") == pytest.approx(losses, rel=1e-4)
    trained = ran.state()
    for name, parameter in model.named_parameters():
        dtype, shape, data = trained[f"model/{name}"]
        values = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
        torch.testing.assert_close(values, parameter.detach(), rtol=1e-3, atol=1e-4)
    assert two.sha == one.sha
