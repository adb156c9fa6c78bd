"""Initial weights from safetensors: what is taken, what is missing, what is no such file."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import elastic
from elastic.checkpoint.initial import initial_source, load_initial, open_initial
from elastic.checkpoint.tensors import Shard, tensor_bytes
from elastic.errors import CheckpointError, ConfigError
from elastic.storage import Storage
from tests import forked
from tests.tiny_jobs import Everything, Plain

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}


def write(path, tensors, **header):
    """A safetensors file, by its specification."""
    data, entries = b"", {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        piece = bytes(tensor_bytes(tensor))
        places = [len(data), len(data) + len(piece)]
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        data += piece
    text = json.dumps({**entries, **header}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def load(url, tensors, **options):
    options = {"partial": False, **options}
    return load_initial(open_initial(str(url)), [Shard.whole(n, t) for n, t in tensors.items()], **options)


def test_weights_come_from_one_file_or_from_all_of_a_folder_in_their_own_dtype_or_another(tmp_path):
    w, b = torch.randn(5, 3), torch.randn(3).bfloat16()
    one = write(tmp_path / "all.safetensors", {"w": w, "b": b})
    write(tmp_path / "many" / "1.safetensors", {"w": w})
    write(tmp_path / "many" / "2.safetensors", {"b": b})
    (tmp_path / "many" / "config.json").write_text("{}")

    for url in (one, f"file://{one}", tmp_path / "many"):
        mine = {"w": torch.zeros(5, 3), "b": torch.zeros(3)}
        found = load(url, mine)
        assert torch.equal(mine["w"], w)
        assert torch.equal(mine["b"], b.float())
        assert (found.missing, found.unexpected) == ([], [])
        files = [one] if str(url).endswith("s") else sorted((tmp_path / "many").glob("*.safetensors"))
        assert found.sha256 == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves one file, in ranges, as servers of models do."""

    data = b""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        piece = self.data[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(piece) - 1}/{len(self.data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(piece)

    def log_message(self, *_):
        """Nobody reads it."""


@pytest.fixture
def web(tmp_path):
    """The URL of a file of weights on a web server, and the weights."""
    weights = {"w": torch.randn(300, 7), "b": torch.randn(3).half()}
    handler = type("Handler", (Ranges,), {"data": write(tmp_path / "w.safetensors", weights).read_bytes()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/models/w.safetensors", weights
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_weights_come_from_a_web_server(web):
    url, weights = web
    mine = {"w": torch.zeros(300, 7), "b": torch.zeros(3)}

    found = load(url, mine)

    assert torch.equal(mine["w"], weights["w"])
    assert torch.equal(mine["b"], weights["b"].float())
    assert list(found.sha256) == ["w.safetensors"]


@pytest.mark.processes
@pytest.mark.parametrize("form", ["file", "folder"])
def test_weights_come_from_a_bucket(form, bucket, tmp_path):
    storage, weights = Storage(f"{bucket}/models"), {"w": torch.randn(300, 7), "b": torch.randn(3)}
    for name in weights:
        file = write(tmp_path / f"{name}.safetensors", {name: weights[name]} if form == "folder" else weights)
        storage.upload(file.name, str(file))
    mine = {name: torch.zeros_like(t) for name, t in weights.items()}

    load(f"{storage.url}/w.safetensors" if form == "file" else storage.url, mine)

    assert all(torch.equal(mine[name], t) for name, t in weights.items())


def test_what_is_missing_is_refused_by_name_or_left_alone_and_what_is_unexpected_is_told(tmp_path):
    file = write(tmp_path / "w.safetensors", {"w": torch.ones(2), "head": torch.ones(9)})
    mine = {"w": torch.zeros(2), "new": torch.zeros(2)}

    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's tensors, such as \['new'\].*init-partial"):
        load(file, mine)
    found = load(file, mine, partial=True)

    assert (found.missing, found.unexpected) == (["new"], ["head"])
    assert (mine["w"].tolist(), mine["new"].tolist()) == ([1, 1], [0, 0])
    with pytest.raises(CheckpointError, match="give other weights"):
        load(file, {"other": torch.zeros(2)}, partial=True)
    with pytest.raises(CheckpointError, match=r"the saved w is float32 \(2,\), this one is float32 \(3,\)"):
        load(file, {"w": torch.zeros(3)})


def test_a_tied_tensor_is_found_under_any_of_its_names(tmp_path):
    file = write(tmp_path / "w.safetensors", {"output.weight": torch.ones(2)})
    mine = {"input.weight": torch.zeros(2)}

    found = load(file, mine, aliases={"input.weight": ["input.weight", "output.weight"]})

    assert mine["input.weight"].tolist() == [1, 1]
    assert (found.missing, found.unexpected) == ([], [])


class Adapted(elastic.Job):
    def __init__(self, url):
        self.url = str(url)

    def initial_weights(self):
        return self.url


def test_weights_of_a_model_with_adapters_have_the_names_of_the_base_and_adapters_are_made_here(tmp_path):
    """As peft names them; a head that is trained whole begins as what the base has."""
    file = write(tmp_path / "w.safetensors", {"q.weight": torch.ones(2), "head.weight": torch.full((2,), 2.0)})
    names = {
        "base_model.model.q.base_layer.weight": 1,
        "base_model.model.q.lora_A.default.weight": 0,
        "base_model.model.head.original_module.weight": 2,
        "base_model.model.head.modules_to_save.default.weight": 2,
    }
    mine, job = {name: torch.zeros(2) for name in names}, Adapted(file)
    source = initial_source(job, None)

    found = load_initial(
        source, [Shard.whole(n, t) for n, t in mine.items()], partial=False, named=Adapted(file).weight_name
    )

    assert {name: int(t[0]) for name, t in mine.items()} == names
    assert (found.missing, found.unexpected) == ([], [])
    with pytest.raises(CheckpointError, match=r"initial_weights\(\) is .*lacks 1 .*\['new'\].*weight_name\(\) return"):
        load_initial(source, [Shard.whole(n, torch.zeros(2)) for n in ("q.weight", "new")], partial=False)
    assert initial_source(Plain(), None) is None
    assert initial_source(Plain(), str(file)).option == "--checkpoint.init-from", "the option goes before the job"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "header cannot have"),
        (b"\xff" * 8, "header cannot have"),
        ((9).to_bytes(8, "little") + b"{", "cannot"),
        ((2).to_bytes(8, "little") + b"[]", "header does not say"),
        ((1).to_bytes(8, "little") + b"{", "header does not say"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_in_one_sentence(tmp_path, data, said):
    (tmp_path / "w.safetensors").write_bytes(data)

    with pytest.raises(ConfigError, match=said) as caught:
        open_initial(str(tmp_path / "w.safetensors"))

    assert str(caught.value).startswith("--checkpoint.init-from is ")
    assert "\n" not in str(caught.value)


@given(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "I64", "F99", 3, None]),
            "shape": st.lists(st.integers(-2, 2**62) | st.booleans(), max_size=3) | st.none(),
            "data_offsets": st.lists(st.integers(-9, 2**62) | st.none(), max_size=3) | st.integers(),
        }
    )
)
def test_a_header_that_lies_is_refused(tmp_path_factory, entry):
    file = tmp_path_factory.getbasetemp() / "lies.safetensors"
    write(file, {}, w=entry)
    try:
        source = open_initial(str(file))
    except ConfigError:
        return
    assert source.entries["w"][1].nbytes == 0, "there is no data in the file"


@pytest.mark.parametrize("url", ["nowhere.safetensors", "nowhere", "warp://x/w.safetensors"])
def test_weights_that_are_not_there_are_refused_before_anything_starts(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    config = forked.configure(tmp_path, "run", checkpoint__init_from=url)

    with pytest.raises(ConfigError, match=r"--checkpoint\.init-from is '.*"):
        forked.prepare(Plain(), config)


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_run_starts_from_given_weights_once_and_says_which(tmp_path):
    torch.manual_seed(7)
    weights = {
        name: torch.randn_like(t) for name, t in Everything().model().state_dict().items() if t.is_floating_point()
    }
    del weights["tied_again.weight"], weights["mean_input"]
    file = write(tmp_path / "given" / "w.safetensors", weights)
    options = {"checkpoint__init_from": str(file), "checkpoint__init_partial": True}
    config = forked.configure(tmp_path, "run", run__stop_after="2st", checkpoint__every="1st", **options)

    paused = forked.train(Everything(), config, workers=2)
    (told,) = paused.events("initialised")
    one = forked.train(Everything(), replace(config, run=replace(config.run, name="one", stop_after="2st")), workers=1)
    file.unlink()
    resumed = forked.train(Everything(), forked.configure(tmp_path, "run", **options), workers=1)

    assert told["detail"]["missing"] == ["mean_input", "norm.num_batches_tracked"]
    assert told["detail"]["unexpected"] == []
    assert list(told["detail"]["sha256"]) == ["w.safetensors"]
    assert paused.sha == one.sha
    frozen = paused.state()["model/frozen.weight"][2]
    assert frozen == bytes(tensor_bytes(weights["frozen.weight"]))
    assert resumed.failure is None
    assert len(resumed.events("initialised")) == 1, "at step 0 only"
