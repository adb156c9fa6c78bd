"""Snapshots, decisions only: whose vault takes a copy, which snapshot is complete, what lies where, how often."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.parallel.probe import state_share
from elastic.snapshot.cadence import FIRST, MOST, SHARE, Meter, auto_every
from elastic.snapshot.holdings import Holding, SnapshotId, complete, lost_parts, to_free
from elastic.snapshot.partners import Vault, domains, memory, needs_copies, partners, short_of_memory
from elastic.worker.snapshot_layout import ALIGNMENT, Head, pieces, starts

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
def test_memory_is_that_of_two_generations_of_both_copies_and_the_one_that_is_sent(hosts, size):
    vaults = vaults_on(hosts)
    partner = partners(vaults)

    need = memory([(v.node, size) for v in vaults], partner)

    copies = 2 if partner else 1
    assert sum(need.values()) == len(vaults) * size * (2 * copies + 1)
    assert need.keys() == {v.node for v in vaults}


def test_what_does_not_fit_is_told_in_one_sentence():
    vaults, mib = vaults_on([0, 0, 1]), 1 << 20
    need = {"n0": 3 * mib, "n1": 2 * mib, "n2": mib}

    assert short_of_memory(need, vaults, {"h0": 5 * mib, "h1": mib}) is None
    assert short_of_memory(need, vaults, {"h0": 5 * mib - 1, "h1": mib}) == (
        "snapshots take 5.0 MiB of host h0, which has 5.0 MiB left for them"
    )


# ---- which are complete ----------------------------------------------------------------------------------------------

ids = st.builds(SnapshotId, st.integers(1, 2), st.integers(1, 3), st.integers(0, 20))
holdings = st.lists(
    st.tuples(ids, st.integers(1, 3), st.integers(0, 2), st.sampled_from("abc")).map(
        lambda t: Holding(t[0], t[2] % t[1], t[1], t[3])
    ),
    max_size=30,
)


@given(holdings)
def test_a_snapshot_is_complete_when_every_part_is_whole_somewhere(held):
    found = complete(held)

    assert [c.id for c in found] == sorted((c.id for c in found), reverse=True)
    for snapshot in found:
        for shard, urls in enumerate(snapshot.urls):
            assert urls
            for url in urls:
                assert Holding(snapshot.id, shard, len(snapshot.urls), url) in held
    incomplete = {(h.id, h.shards) for h in held} - {(c.id, len(c.urls)) for c in found}
    for id, shards in incomplete:
        assert {h.shard for h in held if (h.id, h.shards) == (id, shards)} < set(range(shards))


def test_a_newer_world_is_newer_even_at_an_earlier_step():
    assert SnapshotId(1, 2, 4) > SnapshotId(1, 1, 9)
    assert SnapshotId.parse(str(SnapshotId(3, 14, 15))) == SnapshotId(3, 14, 15)


def test_people_are_told_which_part_is_lost():
    held = [Holding(SnapshotId(1, 1, 8), 0, 3, "a"), Holding(SnapshotId(1, 1, 4), 1, 3, "a")]

    assert lost_parts(held) == "the snapshot of step 8 lost shard 1, 2 of 3 in every vault"
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
        whole = complete([Holding(id, m, 3, "a") for id, m in there])
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
    heads, whole = [], []
    for i, (dtype, shape, cut) in enumerate(tensors):
        heads.append(Head(f"t{i}", dtype, tuple(shape), cut and len(shape) > 0))
        count = (shape[0] if heads[-1].cut else 1) * heads[-1].row_bytes
        whole.append(torch.randint(0, 256, (count,), dtype=torch.uint8))
    old = []
    for shard in range(shards):
        places = starts(heads, shard, shards)
        assert all(place % ALIGNMENT == 0 for place in places)
        part = torch.zeros(places[-1], dtype=torch.uint8)
        for head, value, start in zip(heads, whole, places, strict=False):
            rows = head.rows(shard, shards)
            mine = value[rows.start * head.row_bytes : rows.stop * head.row_bytes]
            part[start : start + len(mine)] = mine
        old.append(part)
    for shard in range(new_shards):
        got = [torch.full((len(h.rows(shard, new_shards) if h.cut else range(1)) * h.row_bytes,), 255) for h in heads]
        covered = [0] * len(heads)
        for part, wanted in zip(old, pieces(heads, shards, shard, new_shards), strict=True):
            for p in wanted:
                got[p.tensor][p.target : p.target + p.length] = part[p.start : p.start + p.length]
                covered[p.tensor] += p.length
        for head, value, mine, count in zip(heads, whole, got, covered):
            rows = head.rows(shard, new_shards) if head.cut else range(1)
            assert count == len(mine), "every byte comes once"
            assert torch.equal(mine.to(torch.uint8), value[rows.start * head.row_bytes : rows.stop * head.row_bytes])


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
