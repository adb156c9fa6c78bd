"""Notices of clouds: what an answer means, and clients against servers that speak the protocols, well and badly."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import ConfigError
from elastic.notices import meaning
from elastic.notices.clouds import Aws, Azure, Cloud, Gcp, find_cloud
from elastic.notices.meaning import Answer, Notice, UnclearAnswer, to_act_on
from tests.notice_servers import iso_in, notice_server

SPOT = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"
EVENTS = "/metadata/scheduledevents"


def client(flavor: str, url: str) -> Cloud:
    return {"aws": Aws, "gcp": Gcp, "azure": Azure}[flavor](url)


def azure_event(kind: str = "Preempt", machine: str = "machine_3", when: str = "Mon, 19 Sep 2016 18:29:47 GMT") -> str:
    event = {
        "EventId": "1",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": ["machine_0", machine],
        "EventStatus": "Scheduled" if when else "Started",
        "NotBefore": when,
    }
    return json.dumps({"DocumentIncarnation": 2, "Events": [event]})


# ---- what an answer means ------------------------------------------------------------------------------------------


def test_ec2_names_the_moment_of_an_interruption() -> None:
    answer = Answer(200, '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}')

    assert meaning.spot_action(answer) == Notice("EC2 spot interruption: terminate", 1505722920.0)
    assert meaning.spot_action(Answer(404, "<html>")) is None


def test_a_rebalance_recommendation_has_no_deadline_so_it_counts_from_when_it_was_made() -> None:
    answer = Answer(200, '{"noticeTime": "2017-09-18T08:22:00Z"}')

    assert meaning.rebalance(answer, 600.0) == Notice("EC2 rebalance recommendation", 1505722920.0 + 600.0)
    assert meaning.rebalance(Answer(404, ""), 600.0) is None


@pytest.mark.parametrize(
    ("event", "remaining_s"),
    [
        ("NONE", None),
        ("MIGRATE_ON_HOST_MAINTENANCE", None),
        ("TERMINATE_ON_HOST_MAINTENANCE", 60.0),
    ],
)
def test_google_maintenance_that_ends_a_machine_counts_and_a_migration_does_not(
    event: str, remaining_s: float | None
) -> None:
    notice = meaning.gcp_maintenance(Answer(200, event), now=1000.0)

    assert (notice.deadline - 1000.0 if notice else None) == remaining_s


def test_google_gives_a_preempted_machine_30_seconds() -> None:
    assert meaning.gcp_preempted(Answer(200, "TRUE\n"), now=1000.0) == Notice("GCP preemption", 1030.0)
    assert meaning.gcp_preempted(Answer(200, "FALSE"), now=1000.0) is None


@pytest.mark.parametrize(
    ("body", "deadline"),
    [
        (azure_event(), 1474309787.0),
        (azure_event("Terminate"), 1474309787.0),
        (azure_event(when=""), 1000.0),  # it has started
        (azure_event("Freeze"), None),  # a pause of seconds
        (azure_event(machine="machine_33"), None),
        ('{"DocumentIncarnation": 1, "Events": []}', None),
    ],
)
def test_an_azure_event_counts_if_it_takes_this_machine(body: str, deadline: float | None) -> None:
    notice = meaning.azure_events(Answer(200, body), "machine_3", now=1000.0)

    assert (notice.deadline if notice else None) == deadline


GARBAGE = st.one_of(
    st.text(),
    st.sampled_from(
        [
            "",
            "null",
            "[]",
            "{}",
            "<html>login</html>",
            '{"time": 5}',
            '{"action": "stop", "time": "soon"}',
            '{"Events": [1]}',
            '{"Events": {"a": 1}}',
            '{"noticeTime": null}',
            "TRUE FALSE",
            '{"Events": 7}',
            '{"Events": [{"EventType": "Reboot", "Resources": 7}]}',
            "[" * 9999,
        ]
    ),
)


@given(GARBAGE, st.sampled_from([200, 200, 400, 500, 503]))
def test_garbage_is_never_a_notice(body: str, status: int) -> None:
    for understand in (
        meaning.spot_action,
        lambda a: meaning.rebalance(a, 600.0),
        lambda a: meaning.gcp_preempted(a, 0.0),
        lambda a: meaning.gcp_maintenance(a, 0.0),
        lambda a: meaning.azure_events(a, "machine_3", 0.0),
    ):
        if body.strip() in ("TRUE", "TERMINATE_ON_HOST_MAINTENANCE"):
            continue
        with contextlib.suppress(UnclearAnswer):
            assert understand(Answer(status, body)) is None


@given(st.lists(st.builds(Notice, st.just("n"), st.floats(0, 1e6)), max_size=5))
def test_one_drains_for_the_soonest_notice_and_again_only_for_a_clearly_sooner_one(seen: list[Notice]) -> None:
    first = to_act_on(None, seen)

    assert (first is None) == (not seen)
    if first is not None:
        assert first.deadline == min(n.deadline for n in seen)
        assert to_act_on(first, seen) is None
        assert to_act_on(first, [Notice("n", first.deadline - 4.9)]) is None
        assert to_act_on(first, [Notice("n", first.deadline - 5.1)]) is not None


# ---- clients against servers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavor", ["aws", "gcp", "azure"])
def test_without_a_notice_nothing_is_seen_and_nothing_is_unclear(flavor: str) -> None:
    with notice_server(flavor) as server:
        assert client(flavor, server.url).look(time.time()) == ([], [])


@pytest.mark.parametrize(
    ("flavor", "path", "body", "remaining_s"),
    [
        ("aws", SPOT, lambda: json.dumps({"action": "terminate", "time": iso_in(3600)}), 3600),
        ("aws", REBALANCE, lambda: json.dumps({"noticeTime": iso_in(3000)}), 3600),
        ("gcp", PREEMPTED, lambda: "TRUE", 30),
        ("gcp", MAINTENANCE, lambda: "TERMINATE_ON_HOST_MAINTENANCE", 60),
        ("azure", EVENTS, lambda: azure_event(when=""), 0),
    ],
)
def test_a_notice_is_seen_when_it_comes(flavor: str, path: str, body: Callable[[], str], remaining_s: float) -> None:
    with notice_server(flavor) as server:
        cloud = client(flavor, server.url)
        assert cloud.look(time.time())[0] == []

        server.answers[path] = (200, body())
        (notice,), unclear = cloud.look(time.time())

    assert unclear == []
    assert notice.deadline == pytest.approx(time.time() + remaining_s, abs=60)


def test_ec2_is_asked_with_a_token_and_for_a_new_one_when_that_is_too_old() -> None:
    with notice_server("aws") as server:
        server.token_lives = 3
        cloud = Aws(server.url)
        assert [cloud.look(time.time()) for _ in range(5)] == [([], [])] * 5

        assert [m for m, _ in server.asked].count("PUT") == 4  # for 10 questions
        assert not [left for left in server.tokens.values() if left < 0]


def test_rebalancing_can_be_left_out() -> None:
    with notice_server("aws") as server:
        server.answers[REBALANCE] = (200, json.dumps({"noticeTime": iso_in(0)}))

        assert Aws(server.url, rebalance_s=None).look(time.time()) == ([], [])


@pytest.mark.parametrize("flavor", ["aws", "gcp", "azure"])
@pytest.mark.parametrize("fault", ["garbage", "error", "silent", "drip", "gone", "other"])
def test_a_server_that_misbehaves_is_unclear_within_seconds_and_no_notice(
    flavor: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic.notices.clouds.REQUEST_TIMEOUT_S", 0.3)
    with notice_server(flavor) as server:
        cloud = client(flavor, server.url)
        if fault in ("garbage", "error"):
            status = 200 if fault == "garbage" else 503
            server.answers = dict.fromkeys((SPOT, REBALANCE, PREEMPTED, MAINTENANCE, EVENTS), (status, "<html>" * 9))
        server.silent, server.drip = fault == "silent", fault == "drip"
        if fault == "drip":
            server.answers = dict.fromkeys((SPOT, REBALANCE, PREEMPTED, MAINTENANCE, EVENTS), (200, "x" * 1000))
        if fault == "other":
            server.flavor = "gcp" if flavor != "gcp" else "azure"
        if fault == "gone":
            server.server_close()
        began = time.monotonic()
        notices, unclear = cloud.look(time.time())

    assert notices == []
    assert unclear
    assert time.monotonic() - began < 3


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with notice_server("gcp") as server, notice_server("gcp") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert Gcp(server.url).look(time.time()) == ([], [])
        assert proxy.asked == []


@pytest.mark.parametrize("flavor", ["aws", "gcp", "azure"])
def test_the_cloud_is_found_by_who_answers(flavor: str) -> None:
    with notice_server(flavor) as server:
        assert find_cloud([client(name, server.url) for name in ("aws", "gcp", "azure")]).name == flavor


def test_where_no_cloud_answers_one_sentence_says_so() -> None:
    with notice_server("aws") as server:
        server.flavor = "none"
        server.answers = {}
        with pytest.raises(ConfigError, match="--cloud is 'auto', but no notice end-point of aws, gcp, azure answers"):
            find_cloud([client(name, server.url) for name in ("aws", "gcp", "azure")], timeout_s=0)
