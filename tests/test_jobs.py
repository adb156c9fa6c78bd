"""The example jobs: model, corpus, data and losses, without a run."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch

from elastic.errors import CheckpointError, ConfigError
from elastic.job_data import check_dataset
from elastic.worker.naming import persistent_entries
from elastic.worker.state import TrainState
from jobs import codegpt, digits
from jobs.codegpt import CodeGPT
from jobs.corpus import SEPARATOR, Blocks, Corpus, read, standard_library
from jobs.digits import Digits, Images
from jobs.gpt import GPT, Block, generate, rotate, rotations
from jobs.gpt_sizes import SIZES, Shape
from tests.forked import fork

ROOT = Path(__file__).parent.parent
TINY = Shape(layers=2, width=16, heads=2)


@pytest.fixture(autouse=True)
def one_thread():
    """A fixed number of threads: figures do not depend on the machine, and a busy one is not slowed by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def tiny(context: int = 32, dropout: float = 0.0, layers: int = 2) -> GPT:
    """A model whose logits differ clearly from byte to byte, which those of a fresh one do not."""
    model = GPT(replace(TINY, layers=layers), context=context, dropout=dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A small standard library with everything in it that is to be left out."""
    for name in [
        *(f"package/module_{i}.py" for i in range(60)),
        "top.py",
        "package/notes.txt",
        "test/test_top.py",
        "package/tests/test_it.py",
        "package/__pycache__/module_0.py",
        "site-packages/other.py",
        "dist-packages/other.py",
        "_sysconfigdata__linux_.py",
    ]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n" + "x = 1\n" * len(name))
    return tmp_path


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_what_its_name_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # torch sets this variable by itself when weights are first initialised on the meta device, and leaves it set.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch.device("meta"):
        model = GPT(SIZES[name], context=128)

    count = sum(p.numel() for p in model.parameters())

    assert count == pytest.approx(float(name.removesuffix("M")) * 1e6, rel=0.10)


def test_sizes_go_from_half_a_million_to_124_million():
    names = list(SIZES)

    assert (names[0], names[-1]) == ("0.5M", "124M")
    assert names == sorted(names, key=lambda name: float(name.removesuffix("M")))


@pytest.mark.parametrize("changed", [1, 7, 15])
def test_a_later_byte_does_not_change_earlier_logits(changed: int):
    model = tiny().eval()
    tokens = torch.randint(0, 256, (2, 16))
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 256

    with torch.no_grad():
        before, after = model(tokens), model(other)

    assert before.shape == (2, 16, 256)
    torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=0, atol=1e-6)
    assert ((before - after).abs().amax(dim=(0, 2)) > 1e-3)[changed:].all()


def test_the_order_of_earlier_bytes_counts():
    model = tiny(layers=1).eval()  # one layer of attention without positions would see a set of bytes

    with torch.no_grad():
        first, second = model(torch.tensor([[5, 9, 7]])), model(torch.tensor([[9, 5, 7]]))

    assert (first[0, -1] - second[0, -1]).abs().max() > 1e-3


def test_attention_scores_depend_on_the_distance_alone():
    q, k = torch.randn(8), torch.randn(8)
    rotation = rotations(12, 8, torch.device("cpu"))

    turned_q, turned_k = rotate(q.expand(12, 8), rotation), rotate(k.expand(12, 8), rotation)
    scores = turned_q @ turned_k.T

    torch.testing.assert_close(scores[3:, :-3].diagonal(), scores[3, 0].expand(9))
    assert not torch.allclose(scores[3, 0], scores[5, 0])
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(12))


def test_the_tied_embedding_appears_once_and_is_all_that_maps_to_bytes():
    model = GPT(TINY, context=8)

    entries = persistent_entries(model)

    assert [n for n, t in entries.items() if 256 in t.shape] == ["embedding.weight"]
    assert len({t.data_ptr() for t in entries.values()}) == len(entries)
    assert set(entries) == {n for n, _ in model.named_parameters()}, "positions must not be saved"
    assert not list(model.buffers())


def test_a_fresh_model_knows_nothing_and_has_the_scale_it_should():
    model = GPT(SIZES["0.5M"], context=64)
    tokens = torch.randint(0, 256, (4, 65))

    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    assert loss.item() / math.log(2) == pytest.approx(8.0, abs=0.2)
    first = model.blocks[0]
    assert isinstance(first, Block)
    assert first.mlp_in.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert first.mlp_out.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)


def test_dropout_acts_on_embeddings_and_on_branches_in_training_only():
    tokens, x, rotation = torch.randint(0, 256, (1, 8)), torch.randn(1, 8, 16), rotations(8, 8, torch.device("cpu"))
    embeddings, branches = tiny(dropout=0.5, layers=0), tiny(dropout=0.5).blocks[0]

    for part, inputs in ((embeddings, (tokens,)), (branches, (x, rotation))):
        with torch.no_grad():
            trained = [part.train()(*inputs) for _ in range(2)]
            evaluated = [part.eval()(*inputs) for _ in range(2)]

        assert not torch.equal(*trained)
        assert torch.equal(*evaluated)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"width 10 .* 2 heads"):
        GPT(Shape(layers=1, width=10, heads=2), context=8)


def test_greedy_generation_takes_the_likeliest_byte_each_time():
    model = tiny(context=8)

    made = generate(model, b"import", 6)

    text = b"import" + made
    assert len(made) == 6
    model.eval()
    for end in range(6, 12):
        with torch.no_grad():
            logits = model(torch.tensor([list(text[:end][-8:])]))[0, -1]
        assert text[end] == int(logits.argmax())


def test_generation_is_decided_by_its_seed_and_leaves_the_model_and_the_global_generator_alone():
    model = tiny(dropout=0.5).train()
    state = torch.get_rng_state()

    made = [generate(model, b"def ", 24, temperature=1.0, seed=seed) for seed in (1, 1, 2)]

    assert made[0] == made[1]
    assert made[0] != made[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_generation_needs_something_to_go_on():
    with pytest.raises(ValueError, match="at least one byte"):
        generate(tiny(), b"", 1)


# ---- the corpus ----------------------------------------------------------------------------------------------------


def test_the_corpus_is_the_sources_and_nothing_else(sources: Path):
    corpus = read(sources)

    kept = set(corpus.train_files) | set(corpus.held_out_files)
    assert kept == {"top.py", *(f"package/module_{i}.py" for i in range(60))}
    assert not set(corpus.train_files) & set(corpus.held_out_files)
    assert list(corpus.train_files) == sorted(corpus.train_files)
    for names, text in ((corpus.train_files, corpus.train), (corpus.held_out_files, corpus.held_out)):
        assert text.dtype == np.uint8
        assert text.tobytes().split(SEPARATOR)[:-1] == [(sources / n).read_bytes() for n in names]


def test_reading_twice_gives_the_same_hash_and_any_change_another(sources: Path):
    first = read(sources)

    again = read(sources)
    (sources / "top.py").rename(sources / "summit.py")
    renamed = read(sources)
    same_length = (sources / "summit.py").read_text().replace("x = 1", "x = 2")
    (sources / "summit.py").write_text(same_length)
    rewritten = read(sources)

    assert first.sha256 == again.sha256
    assert len({first.sha256, renamed.sha256, rewritten.sha256}) == 3


def test_the_same_files_are_held_out_in_every_process(sources: Path):
    # Written down, for a rule that changed would evaluate a resumed run on what it was trained on.
    assert read(sources).held_out_files == ("package/module_39.py",)


def test_a_file_stays_on_its_side_when_others_come_or_go(sources: Path):
    before = read(sources)
    assert before.held_out_files

    (sources / "package" / "module_0.py").unlink()
    (sources / "another.py").write_text("x = 1\n")
    after = read(sources)

    gone_or_new = {"package/module_0.py", "another.py"}
    assert set(before.held_out_files) - gone_or_new == set(after.held_out_files) - gone_or_new
    assert set(before.train_files) - gone_or_new == set(after.train_files) - gone_or_new


def test_the_standard_library_gives_enough_to_learn_from(corpus: Corpus):
    assert len(corpus.train) > 5e6
    assert 0.02 < len(corpus.held_out_files) / (len(corpus.train_files) + len(corpus.held_out_files)) < 0.09
    assert len(corpus.held_out) / len(corpus.train) > 0.01
    assert "argparse.py" in {*corpus.train_files, *corpus.held_out_files}


@pytest.mark.parametrize("length", [17, 160, 163, 176])
def test_blocks_predict_every_byte_but_the_first_once(length: int):
    text = np.arange(length, dtype=np.uint8)

    blocks = Blocks(text, 16)
    predicted = np.concatenate([blocks[i][1:] for i in range(len(blocks))])

    whole = (length - 1) // 16
    assert len(blocks) == whole
    assert predicted.tolist() == list(range(1, whole * 16 + 1))


def test_a_text_shorter_than_a_block_has_none():
    assert len(Blocks(np.zeros(16, np.uint8), 16)) == 0
    assert len(Blocks(np.zeros(0, np.uint8), 16, limit=4)) == 0


def test_a_limit_takes_blocks_from_all_over_the_text():
    text = np.arange(16 * 100 + 1) // 16
    blocks = Blocks(text.astype(np.uint8), 16, limit=10)

    assert [int(blocks[i][0]) for i in range(len(blocks))] == list(range(0, 100, 10))
    assert len(Blocks(text.astype(np.uint8), 16, limit=1000)) == 100


def test_blocks_together_are_the_blocks_one_by_one():
    blocks = Blocks(np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8), 16)

    together = blocks.__getitems__([5, 0, 5, 61])

    assert together.dtype == np.uint8
    assert np.array_equal(together, [blocks[i] for i in (5, 0, 5, 61)])


# ---- codegpt -------------------------------------------------------------------------------------------------------


def test_a_batch_is_contexts_and_the_bytes_after_them():
    job = CodeGPT(block=4)
    blocks = Blocks(np.arange(13, dtype=np.uint8), 4)

    for samples in (blocks.__getitems__([2, 0]), [blocks[2], blocks[0]]):
        contexts, targets = job.collate_fn(samples)

        assert contexts.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
        assert targets.tolist() == [[9, 10, 11, 12], [1, 2, 3, 4]]
        assert contexts.dtype == targets.dtype == torch.int64


def test_loss_is_a_sum_with_its_weight_and_bits_per_byte_the_same_sum_in_bits():
    job, model = CodeGPT(block=16), tiny()
    contexts, targets = torch.randint(0, 256, (2, 6, 16)).unbind(0)

    nats, weight, metrics = job.loss(model, (contexts, targets))
    parts = [job.loss(model, (contexts[i : i + 2], targets[i : i + 2])) for i in (0, 2, 4)]

    assert weight == 6 * 16 == sum(p[1] for p in parts)
    torch.testing.assert_close(nats, sum(p[0] for p in parts))
    torch.testing.assert_close(metrics["bits_per_byte"] * math.log(2), nats.detach())
    probabilities = model(contexts).softmax(-1).gather(-1, targets.unsqueeze(-1))
    torch.testing.assert_close(nats, -probabilities.log().sum(), rtol=1e-4, atol=0)
    assert nats.requires_grad
    assert not metrics["bits_per_byte"].requires_grad


def test_weight_decay_is_for_matrices_only_and_every_parameter_is_trained_once():
    job = CodeGPT(weight_decay=0.3)
    model = GPT(TINY, context=8)

    decayed, spared = job.optimizer(model).param_groups

    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in spared["params"]} == {1}
    trained = [id(p) for p in decayed["params"] + spared["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())


def test_options_reach_the_data_and_the_model():
    job = CodeGPT(block=48, eval_blocks=7, dropout=0.25)

    model, train, held_out = job.model(), check_dataset("train", job.train_data()), job.eval_data()

    assert job.tokens_per_sample == 48
    assert (model.context, model.dropout.p) == (48, 0.25)
    assert len(held_out) == 7
    assert len(train) > 1000
    assert train[0].shape == held_out[0].shape == (49,)
    assert not np.array_equal(train[0], held_out[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "3M"}, r"--job.size is '3M'; choose one of 0.5M, .*124M"),
        ({"block": 0}, "--job.block is 0"),
        ({"eval_blocks": -1}, "--job.eval-blocks is -1"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        CodeGPT(**options)


def test_another_corpus_is_refused_on_resuming(corpus: Corpus):
    job = CodeGPT()
    model = GPT(TINY, context=8)
    state = TrainState(job, model, job.optimizer(model))
    tensors, values = state.tensors(), state.values()
    assert values["extra"] == {"corpus_sha256": corpus.sha256}

    state.load(tensors, values)
    values["extra"]["corpus_sha256"] = "0" * 64

    with pytest.raises(CheckpointError, match=f"0{{64}}.*{corpus.sha256}.*start another run"):
        state.load(tensors, values)


def test_codegpt_learns_from_the_corpus():
    job = CodeGPT(block=32, lr=1e-2)
    model = GPT(TINY, context=32)
    optimizer, blocks = job.optimizer(model), job.train_data()
    batch = job.collate_fn(blocks.__getitems__(range(0, len(blocks), len(blocks) // 16)))

    bits = []
    for _ in range(40):
        nats, weight, metrics = job.loss(model, batch)
        (nats / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        bits.append(float(metrics["bits_per_byte"]) / weight)

    assert bits[0] == pytest.approx(8.0, abs=0.3)
    assert bits[-1] < 5.0


def test_a_sample_is_text_and_the_same_each_time():
    job, model = CodeGPT(block=16), tiny(context=16)

    text = job.sample(model, 1)

    assert text.startswith("def ")
    assert len(text) > 100
    assert text == job.sample(model, 1)


def test_the_help_page_needs_no_torch():
    code = (
        "import sys, jobs.codegpt as c; from elastic.options import help_text;"
        "print(help_text(c.CodeGPT, c.CONFIG, everything=False)); assert 'torch' not in sys.modules"
    )

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)

    assert shown.returncode == 0, shown.stderr
    assert "--job.size" in shown.stdout
    assert "124M" in shown.stdout


# ---- digits --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> tuple[Images, Images]:
    return Digits().train_data(), Digits().eval_data()


def test_the_two_parts_of_the_digits_share_no_image_and_hold_every_digit(parts: tuple[Images, Images]):
    train, held_out = parts

    assert (len(train), len(held_out)) == (1437, 360)
    shared = {i.numpy().tobytes() for i in train.images} & {i.numpy().tobytes() for i in held_out.images}
    assert not shared
    for part in parts:
        assert torch.bincount(part.labels, minlength=10).min() > 0.07 * len(part)


def test_images_together_are_the_images_one_by_one(parts: tuple[Images, Images]):
    train, _ = parts

    images, labels = train.__getitems__([3, 1, 3])

    assert images.shape == (3, 1, 8, 8)
    assert 0.0 <= train.images.min() < train.images.max() <= 1.0
    for row, index in enumerate((3, 1, 3)):
        image, label = train[index]
        assert torch.equal(images[row], image)
        assert labels[row] == label


def test_digits_loss_and_accuracy_are_sums_over_images(parts: tuple[Images, Images]):
    job, (_, held_out) = Digits(), parts
    model = job.model().eval()

    whole = job.loss(model, held_out.__getitems__(range(100)))
    halves = [job.loss(model, held_out.__getitems__(range(start, start + 50))) for start in (0, 50)]

    torch.testing.assert_close(whole[0], halves[0][0] + halves[1][0])
    assert whole[1] == halves[0][1] + halves[1][1] == 100
    assert whole[2]["accuracy"] == halves[0][2]["accuracy"] + halves[1][2]["accuracy"]


def test_digits_learns_in_a_few_steps(parts: tuple[Images, Images]):
    train, held_out = parts
    job = Digits()
    model = job.model()
    optimizer = job.optimizer(model)

    for step in range(40):
        batch = job.collate_fn(train.__getitems__(range(step * 32, step * 32 + 32)))
        loss, weight, metrics = job.loss(model, batch)
        assert (weight, set(metrics)) == (32, {"accuracy"})
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    with torch.no_grad():
        _, weight, metrics = job.evaluate(model, job.collate_fn(held_out.__getitems__(range(360))))
    assert weight == 360
    assert metrics["accuracy"] / weight > 0.85


# ---- both ----------------------------------------------------------------------------------------------------------


def try_out(sent: bytes, answer: Path) -> None:
    """What another process does with a job that was sent to it."""
    job = pickle.loads(sent)
    batch = job.collate_fn(job.train_data().__getitems__([0, 1]))
    loss, weight, _ = job.loss(job.model(), batch)
    answer.write_text(json.dumps([vars(job), len(job.train_data()), loss.item() / weight]))


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("job", [CodeGPT(block=32, size="2M"), Digits(width=8)], ids=["codegpt", "digits"])
def test_a_job_travels_to_another_process_without_its_data(job, tmp_path):
    samples = len(job.train_data())
    module = sys.modules[type(job).__module__]
    cloudpickle.register_pickle_by_value(module)  # what happens to a job whose module is run as __main__
    try:
        sent = cloudpickle.dumps(job)
    finally:
        cloudpickle.unregister_pickle_by_value(module)

    process = fork(try_out, sent, tmp_path / "tried")
    process.join(60)

    assert process.exitcode == 0
    options, its_samples, loss = json.loads((tmp_path / "tried").read_text())
    assert (options, its_samples) == (vars(job), samples)
    assert 1.0 < loss < 10.0
    assert len(sent) < 100_000


@pytest.mark.parametrize("config", [codegpt.CONFIG, digits.CONFIG], ids=["codegpt", "digits"])
def test_a_default_run_evaluates_and_gives_every_worker_of_four_as_much(config):
    assert config.eval.every is not None
    assert config.batch.microbatches is not None
    assert config.batch.microbatches % 4 == 0
