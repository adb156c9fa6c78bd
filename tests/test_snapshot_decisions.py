"""Snapshots, decisions only: whose vault takes a copy, which snapshot is complete, what lies where, how often."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.fields import ITEM_BYTES
from elastic.parallel.layout import ROWS, SHARD
from elastic.parallel.probe import state_share
from elastic.placement import Part, TensorSpec
from elastic.snapshot.cadence import FIRST, MOST, SHARE, Meter, auto_every
from elastic.snapshot.holdings import Holding, SnapshotId, complete, lost_parts, to_free
from elastic.snapshot.partners import Vault, domains, memory, needs_copies, partners, short_of_memory
from elastic.worker.snapshot_layout import ALIGNMENT, pieces, starts

hosts = st.lists(st.integers(0, 4), min_size=1, max_size=12)


def vaults_on(hosts: list[int]) -> list[Vault]:
    return [Vault(f"n{i}", f"h{host}", f"http://h{host}:{i}") for i, host in enumerate(hosts)]


# ---- partners --------------------------------------------------------------------------------------------------------


@given(hosts, st.randoms(use_true_random=False))
def test_every_copy_goes_to_another_failure_domain_whoever_computes_it(hosts, random):
    vaults = vaults_on(hosts)
    domain = domains(vaults)

    found = partners(vaults)

    shuffled = random.sample(vaults, len(vaults))
    assert partners(shuffled) == found
    several_hosts = len(set(hosts)) > 1
    for vault in vaults:
        if len(vaults) == 1:
            assert found == {}
            continue
        other = found[vault.node]
        assert other.node != vault.node
        assert domain[other.node] != domain[vault.node]
        if several_hosts:
            assert other.host != vault.host, "a vault on its owner's host is no second copy"


@given(st.integers(2, 12))
def test_nodes_on_hosts_of_their_own_are_partners_of_each_other(count):
    found = partners(vaults_on(list(range(count))))

    mutual = [n for n in found if found[found[n].node].node == n]
    assert len(mutual) == count - count % 2
    assert max(Counter(v.node for v in found.values()).values()) <= 2
    fatal = {frozenset((node, other.node)) for node, other in found.items()}
    assert len(fatal) == (count + 1) // 2, "as few pairs of nodes as can be hold all copies of a part"


@given(hosts)
def test_a_lost_host_takes_no_part_along(hosts):
    vaults = vaults_on(hosts)
    found = partners(vaults)
    for lost in set(domains(vaults).values()):
        left = {v.node for v in vaults if domains(vaults)[v.node] != lost}
        if left:
            assert all({v.node, found[v.node].node} & left for v in vaults)


def test_a_copy_is_needed_where_one_domain_holds_all_of_a_part():
    assert needs_copies([["a"], ["b"]])
    assert needs_copies([["a", "b"], ["c", "c"]])
    assert not needs_copies([["a", "b"], ["c", "a"]])


@given(hosts, st.integers(1, 100))
def test_memory_is_that_of_two_generations_of_both_copies(hosts, size):
    vaults = vaults_on(hosts)
    partner = partners(vaults)

    need = memory([(v.node, size) for v in vaults], partner)

    copies = 2 if partner else 1
    assert sum(need.values()) == len(vaults) * size * 2 * copies
    assert need.keys() == {v.node for v in vaults}
    apart = memory([(v.node, size) for v in vaults], partner, {"n0"})
    assert {n: apart[n] - need[n] for n in need} == {n: size if n == "n0" else 0 for n in need}, (
        "its vault maps nothing"
    )


def test_what_does_not_fit_is_told_in_one_sentence():
    vaults, mib = vaults_on([0, 0, 1]), 1 << 20
    need = {"n0": 3 * mib, "n1": 2 * mib, "n2": mib}

    assert short_of_memory(need, vaults, {"h0": 5 * mib, "h1": mib}) is None
    assert short_of_memory(need, vaults, {"h0": 5 * mib - 1, "h1": mib}) == (
        "snapshots take 5.0 MiB of host h0, which has 5.0 MiB left for them"
    )


# ---- which are complete ----------------------------------------------------------------------------------------------


def part(shard: int, shards: int) -> Part:
    return Part.of([(SHARD, shard, shards)])


ids = st.builds(SnapshotId, st.integers(1, 2), st.integers(1, 3), st.integers(0, 20))
holdings = st.lists(
    st.tuples(ids, st.integers(1, 3), st.integers(0, 2), st.sampled_from("abc")).map(
        lambda t: Holding(t[0], part(t[2] % t[1], t[1]), t[3])
    ),
    max_size=30,
)


@given(holdings)
def test_a_snapshot_is_complete_when_every_part_is_whole_somewhere(held):
    found = complete(held)

    assert [c.id for c in found] == sorted((c.id for c in found), reverse=True)
    for snapshot in found:
        assert [*snapshot.urls] == [*next(iter(snapshot.urls)).siblings]
        for one, urls in snapshot.urls.items():
            assert urls
            assert all(Holding(snapshot.id, one, url) in held for url in urls)
    incomplete = {(h.id, h.part.siblings) for h in held} - {(c.id, tuple(c.urls)) for c in found}
    for id, parts in incomplete:
        assert {h.part for h in held if (h.id, h.part.siblings) == (id, parts)} < set(parts)


def test_a_newer_world_is_newer_even_at_an_earlier_step():
    assert SnapshotId(1, 2, 4) > SnapshotId(1, 1, 9)
    assert SnapshotId.parse(str(SnapshotId(3, 14, 15))) == SnapshotId(3, 14, 15)


def test_people_are_told_which_part_is_lost():
    held = [Holding(SnapshotId(1, 1, 8), part(0, 3), "a"), Holding(SnapshotId(1, 1, 4), part(1, 3), "a")]

    assert lost_parts(held) == "the snapshot of step 8 lost shard 1 of 3, shard 2 of 3 in every vault"
    assert lost_parts([]) == ""


@given(st.lists(st.lists(st.sampled_from(["put", "said", "fence", "kill"]), min_size=1, max_size=3), max_size=30))
def test_there_is_always_a_complete_snapshot_once_there_was_one(turns):
    """Three members in lockstep; each puts its part, says so at a fence, and is killed, at any moment."""
    keep, step, attempt, there = None, 0, None, set[tuple[SnapshotId, int]]()
    put: set[int] = set()
    had = False
    for turn in turns:
        for member, event in enumerate(turn):
            if event == "put" and attempt is not None and member not in put:
                gone = to_free({id for id, _ in there}, attempt, keep)
                there = {(id, m) for id, m in there if id not in gone} | {(attempt, member)}
                put.add(member)
            elif event == "fence":
                step += 1
                if attempt is not None and put == {0, 1, 2}:
                    keep, attempt = attempt, None
                    had = True
                if attempt is None or event == "kill":
                    attempt, put = SnapshotId(1, 1, step), set()
            elif event == "kill":  # a new world: what was under way is void
                attempt, put = None, set()
        whole = complete([Holding(id, part(m, 3), "a") for id, m in there])
        assert not had or whole, "none is complete any more"
        assert keep is None or keep in [c.id for c in whole]


# ---- bytes -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["float32", "int64", "bfloat16", "uint8"]),
            st.lists(st.integers(0, 7), max_size=3),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_old_parts_make_the_new_ones(tensors, shards, new_shards):
    specs, whole = [], []
    for i, (dtype, shape, cut) in enumerate(tensors):
        specs.append(TensorSpec(f"t{i}", dtype, tuple(shape), ROWS if cut and shape else ()))
        whole.append(torch.randint(0, 256, (*shape, ITEM_BYTES[dtype]), dtype=torch.uint8))

    def bytes_of(i: int, mine: Part) -> torch.Tensor:
        box, value = specs[i].box(mine), whole[i]
        for d, (offset, size) in enumerate(zip(box.offsets, box.sizes)):
            value = value.narrow(d, offset, size)
        return value.reshape(-1)

    old = {}
    for one in part(0, shards).siblings:
        places = starts(specs, one)
        assert all(place % ALIGNMENT == 0 for place in places)
        old[one] = torch.zeros(places[-1], dtype=torch.uint8)
        for i, start in enumerate(places[:-1]):
            if places[i] < places[i + 1]:
                old[one][start : start + len(bytes_of(i, one))] = bytes_of(i, one)
    for new in part(0, new_shards).siblings:
        got = [torch.zeros_like(bytes_of(i, new)) for i in range(len(specs))]
        covered = [0] * len(specs)
        for one, data in old.items():
            for i, start, target, length in pieces(specs, one, new):
                got[i][target : target + length] = data[start : start + length]
                covered[i] += length
        for i, (mine, count) in enumerate(zip(got, covered)):
            assert count == len(mine), "every byte comes once"
            assert torch.equal(mine, bytes_of(i, new))


@pytest.mark.parametrize(
    ("make", "shares"),
    [
        (lambda groups: torch.optim.AdamW(groups), [2.0, 2.0]),
        (lambda groups: torch.optim.Adam(groups, amsgrad=True), [3.0, 3.0]),
        (lambda groups: torch.optim.SGD([{**groups[0], "momentum": 0.9}, groups[1]], lr=0.1), [1.0, 0.0]),
    ],
)
def test_what_an_optimizer_will_keep_is_known_before_its_first_step(make, shares):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(3, 3))]}, {"params": [torch.nn.Parameter(torch.zeros(9))]}]

    assert state_share(make(groups)) == shares


# ---- how often -------------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 10), st.floats(1e-4, 10))
def test_auto_is_the_smallest_number_of_steps_that_costs_less_than_two_percent(cost_s, step_s):
    every = auto_every(cost_s, step_s)

    assert every == MOST or cost_s <= SHARE * every * step_s * (1 + 1e-9)
    assert every == 1 or cost_s > SHARE * (every - 1) * step_s * (1 - 1e-9)


def test_the_cost_is_what_steps_take_longer_while_one_is_under_way():
    meter = Meter()
    assert meter.every() == FIRST
    for _ in range(5):
        for _ in range(4):
            meter.step(1.0, under_way=False)
        meter.began()
        meter.step(1.1, under_way=True)
        meter.step(1.03, under_way=True)
    meter.step(1.0, under_way=False)

    assert meter.every() == 7  # 0.13 s of 7 x 1 s is 1.9 %
    for _ in range(40):  # always one under way
        meter.began()
        meter.step(1.5, under_way=True)
    assert meter.every() == pytest.approx(25, abs=1)
