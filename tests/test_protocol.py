"""Every message of the protocol comes back equal. What is none is refused in one sentence, and changes nothing."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.membership import protocol as wire
from elastic.membership.server import MembershipServer
from elastic.membership.stage import Stage
from elastic.membership.state import Limits, State
from elastic.membership.wire import Refused, parse, plain
from elastic.membership.world import Generation, Member
from jobs.bench.control_plane import Notes
from tests.forked import WAIT_S, wait_until

MESSAGES = [*wire.FROM_WORKER.values(), *wire.FROM_MEMBER.values(), *wire.FROM_HOST.values()]
GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["stop", "1-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
JSON = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3) | st.lists(st.booleans(), max_size=2))
NATURAL = st.integers(0, 1 << 40)
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "Natural": NATURAL,
    "Step": NATURAL,
    "Workers": st.integers(0, 1_000_000),
    "Seconds": st.floats(0, 1e9),
    "Generation": st.builds(Generation, NATURAL, NATURAL),
}
ROW = st.builds(lambda step, more: {**more, "generation": "1-1", "step": step}, NATURAL, JSON)


def values(hint: Any, name: str) -> st.SearchStrategy[Any]:
    """Good values of a field of this type."""
    if name in ("step", "shares", "rank", "size", "max_workers"):
        some = SPECIAL["Workers" if name == "max_workers" else "Step"]
        return some | st.none() if type(None) in get_args(hint) else some
    if name == "rows":
        row = ROW if get_args(hint)[0] is not wire.RowKey else st.tuples(st.text(max_size=3), NATURAL, st.booleans())
        return st.lists(row, max_size=3)
    origin, args = get_origin(hint), get_args(hint)
    if type(None) in args:
        return st.none() | values(next(a for a in args if a is not type(None)), name)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(values(args[0], ""), max_size=3)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0], ""), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(a, "") for a in args))
    if origin is dict:
        return JSON
    if hint is Generation:
        return SPECIAL["Generation"]
    if is_dataclass(hint):
        return made(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(list(hint))
    plain_values = {int: st.integers(0, 99), float: st.floats(0, 99), bool: st.booleans(), str: st.text(max_size=9)}
    if name == "id" and hint is str:
        return st.just("0123456789abcdef" * 2)
    return plain_values.get(hint, st.text(max_size=3))


def made(kind: Any) -> st.SearchStrategy[Any]:
    """Good messages of a kind."""
    hints = get_type_hints(kind)
    return st.builds(kind, **{f.name: values(hints[f.name], f.name) for f in fields(kind)})


@given(st.sampled_from(MESSAGES).flatmap(made), SPECIAL["Generation"])
def test_a_message_comes_back_equal(message: Any, generation: Generation) -> None:
    if type(message) in wire.FROM_HOST.values():
        assert wire.from_host(wire.dumps(message)) == message
    elif type(message) in wire.FROM_MEMBER.values():
        assert wire.from_worker(wire.dumps(message, generation)) == (message, generation)
    else:
        assert wire.from_worker(wire.dumps(message)) == (message, None)


@given(st.sampled_from([kind for kind in wire.REQUESTS if kind is not wire.Prune]).flatmap(made))
def test_a_request_comes_back_equal(request: Any) -> None:
    assert wire.read(type(request), json.dumps(plain(request)).encode()) == request


@given(st.sampled_from([*MESSAGES, *wire.REQUESTS]), st.data())
def test_what_is_no_message_is_refused_in_one_sentence_and_what_is_one_comes_back_equal(kind: Any, data: Any) -> None:
    names = [f.name for f in fields(kind)]
    body = data.draw(GARBAGE | st.fixed_dictionaries({}, optional=dict.fromkeys(names, GARBAGE)))
    found, why = None, ""
    try:
        found = parse(kind, body)
    except Refused as refused:
        why = str(refused)
    if found is not None:
        assert parse(kind, json.loads(json.dumps(plain(found)))) == found
    else:
        assert "; give " in why
        assert len(why) < 250
        assert "\n" not in why


@given(st.binary(max_size=50) | st.sampled_from([b"[" * 100_000, b"NaN", b"1" * 10_000]))
def test_what_is_no_json_is_refused(text: bytes) -> None:
    for kind in wire.REQUESTS:
        with pytest.raises(Refused):
            wire.read(kind, text)


def test_kinds_and_paths_are_told_apart() -> None:
    said = [kind.kind for kind in [*wire.FROM_WORKER.values(), *wire.FROM_MEMBER.values()]]
    assert len(set(said)) == len(said)
    assert len({kind.path for kind in wire.REQUESTS}) == len(wire.REQUESTS)
    assert len({stage.value for stage in Stage}) == len(Stage.__members__)


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        (wire.Scale, {"max_workers": 2.5, "by": "x"}, "max_workers is 2.5; give a number of workers"),
        (wire.Scale, {"max_workers": True, "by": "x"}, "max_workers is true; give a number of workers"),
        (wire.Scale, {"max_workers": "3", "by": "x"}, 'max_workers is "3"; give a number of workers'),
        (wire.Scale, {"by": "x"}, "max_workers is missing; give a number of workers"),
        (wire.Wish, {"wish": "leave"}, 'wish is "leave"; give stop or save'),
        (wire.Drain, {"worker": "w", "seconds": float("nan"), "by": ""}, "seconds is NaN; give seconds"),
        (wire.Allow, [], "the request is []; give a JSON object"),
        (wire.Grant, {"id": "../../status", "secret": "x"}, 'id is "../../status"; give 32 hexadecimal digits'),
        (wire.Prune, {"policy": {"mode": "worst"}, "yes": True}, 'policy.mode is "worst"; give min or max'),
        (wire.Beat, {"sent": 1.0, "at": {"generation": 5}}, "at.generation is 5; give a generation such as 1-2"),
        (wire.Gone, {"ids": ["a", 5], "ended": True}, "ids[1] is 5; give a text"),
    ],
)
def test_a_refusal_names_the_field_its_value_and_the_fix(kind: Any, body: Any, said: str) -> None:
    with pytest.raises(Refused) as refused:
        parse(kind, body)
    assert str(refused.value) == said


# ---- a real server --------------------------------------------------------------------------------------------------


class Server:
    """A server with one worker in its world, for whom nobody answers."""

    def __init__(self) -> None:
        self.notes = Notes()
        state = State(epoch=1, limits=Limits(min_workers=1, max_workers=4, settle_s=0.0))
        self.server = MembershipServer(
            self.notes, state, "token", host="127.0.0.1", new_store=lambda: (0, lambda: None)
        )
        self.server.start()

    @property
    def seen(self) -> Any:
        """All that what is refused must not change."""
        state = self.server._state
        return state.world, state.phase, state.waiting, state.gone, state.notices, state.drained, state.limits, state.n

    def ask(self, path: str, body: bytes, **headers: str) -> tuple[int, str]:
        everything = {"Authorization": "Bearer token", **headers}
        request = urllib.request.Request(self.server.url + path, data=body, headers=everything)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    async def connect(self, member: str, *texts: str, version: str = str(wire.VERSION)) -> tuple[list[Any], int | None]:
        """What a connection of this worker's is told until it is closed, and with which code it is."""
        heard: list[Any] = []
        async with (
            aiohttp.ClientSession(headers={"Authorization": "Bearer token"}) as session,
            session.ws_connect(f"{self.server.url}/worker?id={member}&protocol={version}") as socket,
        ):
            for text in texts:
                await socket.send_str(text)
            while True:
                raw = await socket.receive(WAIT_S)
                if raw.type is not aiohttp.WSMsgType.TEXT:
                    return [*heard, raw.extra], socket.close_code
                heard.append(wire.from_host(raw.data))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    try:
        yield made
    finally:
        made.server.stop()


def join(name: str) -> str:
    return wire.dumps(wire.Join(Member(name, name), -1, None, "", "", 0.0, {}))


NO_MESSAGES = [
    "",
    "[]",
    "[" * 100_000,
    '{"kind": "row"}',
    '{"kind": ["rows"]}',
    '{"kind": "rows"}',
    '{"kind": "rows", "generation": "1-1", "rows": [{"step": "x"}]}',
    '{"kind": "done", "generation": "1", "rank": 0, "status": "stopped", "message": "", "result": {}}',
    '{"kind": "beat", "sent": NaN}',
    '{"kind": "beat", "sent": 1.0, "at": {"generation": "1-1", "position": [1, 2, 3]}}',
    join("somebody else"),
]


def test_garbage_in_any_request_gets_400_and_one_sentence_and_changes_nothing(server: Server) -> None:
    before = server.seen
    for kind in wire.REQUESTS:
        names = [f.name for f in fields(kind)]
        bodies = [b"", b"[]", b"\xff", b"null", json.dumps(dict.fromkeys(names)).encode()]
        bodies += [json.dumps({**dict.fromkeys(names, "x"), name: [{"a": 5}]}).encode() for name in names]
        for body in bodies:
            code, said = server.ask(kind.path, body)
            assert (code, "\n" in said) == (400, False), (kind.path, body, said)
            assert "; give " in said
    code, said = server.ask(wire.Allow.path, b'{"step": 5}', **{wire.VERSION_HEADER: "7"})
    assert code == 400
    assert said.startswith("the caller speaks version '7' of the protocol, the host of the run version 1; use the ")
    assert server.seen == before


def test_who_says_what_is_no_message_is_closed_and_ends_nobody_else(server: Server) -> None:
    async def story() -> None:
        worker = asyncio.create_task(server.connect("good", join("good")))
        await asyncio.to_thread(wait_until, lambda: server.server._state.world is not None, "its world")
        before = server.seen
        for text in NO_MESSAGES:
            heard, code = await server.connect("good", text)  # in the name of one that is in the world
            assert code == wire.REFUSED_CODE, text
            assert "; give " in heard[-1], text
        heard, code = await server.connect("good", version="7")
        assert (code, heard[0][:27]) == (wire.REFUSED_CODE, "worker good speaks version ")
        assert server.seen == before
        assert not worker.done()
        worker.cancel()

    asyncio.run(story())
    assert server.notes.kinds.count("message_refused") == 1, "once for each worker"
