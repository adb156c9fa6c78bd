"""Fine-tuning models of Hugging Face: rows, names of weights, runs through faults, and folders that it opens again."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import elastic
from elastic import cli, hf
from elastic.errors import ConfigError
from elastic.hf import text
from elastic.hf.job import factors
from elastic.hf.source import name_there
from tests import forked
from tests.hf_jobs import Chats, Docstrings, Parity, Untied, minilm, save_bert, save_llama, tokenizer

BATCH = torch.tensor([[10, 20, 30, 40], [7, 8, 9, 11]])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "llama")
    save_bert(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def workers():
    """Workers that have imported what they train."""
    with forked.forking_with(
        "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert", "peft"
    ):
        yield


def export(run: forked.Ran, out: Path, *arguments: str) -> Path:
    assert cli.main(["checkpoints", "export", run.storage.url, str(out), *arguments]) == 0
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=BATCH).logits


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        ({"text": "ab"}, "ab<eos>"),
        ({"prompt": "what?", "completion": "this"}, "this<eos>"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}, "yo<eos>"),
        ({"input_ids": [10, 20], "labels": [-100, 20]}, "/"),
    ],
)
def test_what_is_to_be_written_is_trained_and_what_it_answers_is_not(row, trained):
    made = tokenizer()

    sample = text.language_sample(made, row, 64)

    labels = [i for i in sample["labels"].tolist() if i != text.IGNORED]
    assert made.decode(labels).replace(" ", "") == trained
    assert len(sample["labels"]) == len(sample["input_ids"])
    assert len(text.language_sample(made, row, 2)["input_ids"]) == 2


def test_of_a_conversation_all_that_the_assistant_says_is_trained_also_where_the_template_marks_it():
    said = [("user", "hi"), ("assistant", "yo"), ("user", "more"), ("assistant", "no")]
    row, plain, marked = {"messages": [{"role": r, "content": c} for r, c in said]}, tokenizer(), tokenizer()
    marked.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}<bot>{% else %}"
        "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )

    one, other = (text.language_sample(t, row, 64) for t in (plain, marked))

    assert one["input_ids"].tolist() == other["input_ids"].tolist()
    assert one["labels"].tolist() == other["labels"].tolist()
    assert (one["labels"] != text.IGNORED).sum() == len("yo") + len("no") + 2


def test_packing_loses_nothing_but_the_last_tokens_and_padding_is_trained_by_nobody():
    rows = [{"text": "a" * n} for n in (5, 1, 8)]
    samples = text.Encoded(rows, lambda row: text.language_sample(tokenizer(), row, None))

    packed = text.Packed(samples, 4)
    batch = text.padded([samples[0], samples[1]], pad_id=0)

    assert len(packed) == (6 + 2 + 9) // 4
    joined = [i for n in range(3) for i in samples[n]["input_ids"].tolist()]
    assert [i for n in range(len(packed)) for i in packed[n]["input_ids"].tolist()] == joined[:16]
    assert batch["input_ids"].shape == (2, 6)
    assert batch["labels"][1].tolist()[2:] == [text.IGNORED] * 4
    assert batch["attention_mask"].sum(1).tolist() == [6, 2]
    with pytest.raises(ConfigError, match=r"--job\.length is 99, but all rows together have 17 tokens"):
        text.Packed(samples, 99)


def test_data_of_a_job_can_be_sent_to_loader_processes_and_packed_samples_have_a_number_of_tokens(models):
    job = Chats(pretrained=str(models / "llama"), packing=True, length=8)

    sent = pickle.loads(pickle.dumps(job.train_data()))

    assert job.tokens_per_sample == 8
    assert {len(sent[i]["input_ids"]) for i in range(len(sent))} == {8}
    assert sent[3]["input_ids"].tolist() == job.train_data()[3]["input_ids"].tolist()
    assert len(Chats(pretrained=str(models / "llama")).train_data()) == 60


@pytest.mark.parametrize(
    ("rows", "said"),
    [([{"story": "x"}], "columns story; give rows with text, prompt"), ([{"messages": []}], "no chat template")],
)
def test_rows_without_what_is_needed_are_refused_by_the_names_they_have(rows, said):
    bare = tokenizer()
    bare.chat_template = None

    with pytest.raises(ConfigError, match=said):
        text.language_sample(bare, rows[0], 9)


# ---- names, schedules, arguments -----------------------------------------------------------------------------------


def test_a_weight_is_found_with_and_without_the_name_of_its_encoder_and_under_the_names_of_old():
    assert name_there("bert.pooler.bias", frozenset({"pooler.bias"}), "bert") == "pooler.bias"
    assert name_there("pooler.bias", frozenset({"bert.pooler.bias"}), "bert") == "bert.pooler.bias"
    assert name_there("bert.LayerNorm.bias", frozenset({"bert.LayerNorm.beta"}), "bert") == "bert.LayerNorm.beta"
    assert name_there("classifier.bias", frozenset({"pooler.bias"}), "bert") is None


def test_arguments_of_the_trainer_become_a_job_and_a_configuration(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which transformers sets, and leaves set
    arguments = TrainingArguments(
        str(tmp_path),
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        warmup_steps=0.1,
        weight_decay=0.1,
        eval_strategy="epoch",
        save_steps=5,
        save_total_limit=2,
        activation_checkpointing=True,
        seed=7,
        logging_steps=3,
        fsdp=True,
    )

    job, config = hf.from_arguments(Chats, arguments, pretrained="x", lora_rank=4)

    assert (job.lr, job.weight_decay, job.lr_schedule, job.lora_rank) == (1e-3, 0.1, "linear", 4)
    assert (config.batch.global_size, config.batch.pass_size, config.run.duration) == (32, 4, "3ep")
    assert (config.eval.every, config.checkpoint.every, config.checkpoint.keep_last) == ("1ep", "5st", 2)
    assert (config.parallel.strategy, config.parallel.activation_checkpointing, config.run.seed) == ("fsdp", True, 7)
    assert [round(job.schedule(step, 20), 3) for step in (0, 1, 2, 11, 19)] == [0, 0.5, 1, 0.5, 0.056]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1, which Elastic does not do; leave it out"),
        ({"optim": "adafactor"}, "optim='adafactor'; give 'adamw_torch'"),
        ({"save_steps": 0.5}, "save_steps=0.5; give no, epoch, or steps"),
    ],
)
def test_arguments_that_cannot_be_kept_are_refused_by_name(tmp_path, given, said):
    from transformers import TrainingArguments

    with pytest.raises(ConfigError, match=said):
        hf.from_arguments(Chats, TrainingArguments(str(tmp_path), **given))


def test_a_schedule_that_is_no_function_of_the_step_is_refused():
    assert factors("constant", 0.0, 10)(3) == 1.0
    with pytest.raises(ConfigError, match=r"--job\.lr-schedule is '.*', which is no function of the step"):
        factors("reduce_lr_on_plateau", 0.0, 10)


def test_a_model_that_is_nowhere_is_refused_in_one_sentence():
    with pytest.raises(
        ConfigError, match=r"--job\.pretrained is 'no/such', which is no folder here and cannot be had"
    ) as said:
        Chats(pretrained="no/such").initial_weights()

    assert "\n" not in str(said.value)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.usefixtures("workers")
def test_adapters_train_to_the_same_bits_cut_killed_and_resized_and_peft_opens_them(models, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = str(models / "llama")
    job = Chats(pretrained=source, lora_rank=2, lr=1e-2)
    once = forked.configure(tmp_path, "once", run__duration="6st")
    cut = forked.configure(tmp_path, "cut", run__duration="6st", parallel__strategy="fsdp")

    plain = forked.train(job, once, workers=1)
    paused = forked.train(
        job, replace(cut, run=replace(cut.run, stop_after="4st")), 3, faults=[forked.fault("step.reduce", 3, 1)]
    )
    resumed = forked.train(job, cut, workers=2)
    out = export(resumed, tmp_path / "adapter", "--adapter", "--hf", source)
    saved = [name for name in resumed.state() if name.startswith("model/")]

    assert saved
    assert all("lora_" in name for name in saved), "the base is in no checkpoint"
    assert (plain.failure, paused.failure, resumed.failure) == (None, None, None)
    assert paused.events("member_lost"), "also who took its place, at the same step"
    assert resumed.sha == plain.sha
    assert plain.column("loss")[-1] < plain.column("loss")[0]
    assert plain.events("initialised")[0]["detail"]["missing"] == []
    assert {f.name for f in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), out)
    mine = elastic.load_model(job, resumed.storage.url)
    assert torch.equal(logits(opened), logits(mine))
    assert not torch.equal(logits(mine), logits(AutoModelForCausalLM.from_pretrained(source)))
    assert cli.main(["checkpoints", "export", resumed.storage.url, str(tmp_path / "no"), "--hf", source]) == 2
    assert "give --adapter too" in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.usefixtures("workers")
def test_an_encoder_gets_a_head_and_the_folder_that_is_exported_opens_with_the_same_logits(models, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = str(models / "bert")
    job = Parity(pretrained=source, lr=1e-3, lr_schedule="linear")
    options = {"run__duration": "4st", "optim__schedule": "constant", "optim__warmup": None}

    whole = forked.train(job, forked.configure(tmp_path, "whole", **options), workers=2)
    cut = forked.train(job, forked.configure(tmp_path, "cut", parallel__strategy="fsdp", **options), workers=3)
    out = export(cut, tmp_path / "model", "--hf", source, "--max-shard-size", "10KB")

    assert (whole.failure, cut.failure) == (None, None)
    assert cut.sha == whole.sha
    assert (out / "model.safetensors.index.json").is_file()
    opened = AutoModelForSequenceClassification.from_pretrained(out)
    assert torch.equal(logits(opened), logits(elastic.load_model(job, whole.storage.url)))
    assert AutoTokenizer.from_pretrained(out)("12").input_ids == tokenizer()("12").input_ids


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("rank", [0, 2])
def test_layers_that_a_models_plan_names_run_in_pipelines_to_the_bits_of_one_process(models, tmp_path, rank):
    job = Untied(pretrained=str(models / "llama"), scratch=True, packing=True, length=12, lora_rank=rank)
    options = {"run__duration": "6st"}
    kill = forked.fault("step.stage", 3, 1, only=tmp_path / "killed")

    plain = forked.train(job, forked.configure(tmp_path, "plain", **options), workers=1)
    config = forked.configure(tmp_path, "pipelines", parallel__pipeline=2, **options)
    found = forked.train(job, config, workers=4, faults=[kill])

    assert (plain.failure, found.failure) == (None, None)
    assert found.column("world_size")[-1] == 3, "then one pipeline of three stages"
    assert found.sha == plain.sha
    assert found.column("loss") == plain.column("loss")


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.usefixtures("workers")
def test_a_model_without_a_plan_that_fits_is_refused_by_name(models, tmp_path):
    chats = Chats(pretrained=str(models / "llama"), packing=True, length=12)
    tied = forked.train(chats, forked.configure(tmp_path, "tied", parallel__pipeline=2), workers=2)
    none = forked.train(
        Parity(pretrained=str(models / "bert")), forked.configure(tmp_path, "none", parallel__pipeline=2), workers=2
    )

    assert "share the parameter model.embed_tokens.weight, and pp_plan of the model names them as two" in tied.failure
    assert "the job has no stages(), and the model no pp_plan; return the modules" in none.failure


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.minutes), 4])
def test_a_real_encoder_trains_to_the_same_bits_cut_killed_and_resized_and_opens_again(tmp_path, rank):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    job = Docstrings(pretrained=minilm(), labels=3, length=24, lora_rank=rank, lr=3e-3 if rank else 2e-4)
    batch = {"batch__global_size": 12, "batch__microbatches": 4, "optim__schedule": "constant", "optim__warmup": None}
    whole = forked.configure(tmp_path, "whole", run__duration="6st", **batch)
    cut = forked.configure(tmp_path, "cut", run__duration="6st", parallel__strategy="fsdp", **batch)
    kill = forked.fault("step.reduce", 2, 1)

    killed = forked.train(job, whole, workers=2, wait_s=200, faults=[kill])
    paused = forked.train(job, replace(cut, run=replace(cut.run, stop_after="3st")), workers=3, wait_s=200)
    resumed = forked.train(job, cut, workers=2, wait_s=200)
    out = export(resumed, tmp_path / "out", "--hf", minilm(), *(["--adapter"] if rank else []))

    assert (killed.failure, paused.failure, resumed.failure) == (None, None, None)
    assert killed.events("member_lost")
    assert resumed.sha == killed.sha
    assert killed.events("initialised")[0]["detail"]["missing"] == []
    mine = elastic.load_model(job, resumed.storage.url)
    base = minilm() if rank else out
    opened = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    opened = PeftModel.from_pretrained(opened, out) if rank else opened
    assert torch.equal(logits(opened), logits(mine))
