"""What is secret is replaced wherever it stands, and nothing else is."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from fsspec.config import conf

from elastic.config import CheckpointOptions, RunOptions, TrainConfig, result_options
from elastic.errors import ConfigError, StorageError
from elastic.redact import clean, is_secret, redact

CANARY = "kanarie/Vogel+17=="


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://ann:kanarie@host/a/b", "https://***@host/a/b"),
        ("see 's3://KEY:kana%2Frie@bucket/runs', please", "see 's3://***@bucket/runs', please"),
        ("http://kanarie@h:80/x?y=kanarie#z and more", "http://***@h:80/x?*** and more"),
        ("https://h/w.safetensors?X-Amz-Signature=kanarie&a=b: 403", "https://h/w.safetensors?*** 403"),
        ("https://h/a, https://b:kanarie@c/d", "https://h/a, https://***@c/d"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("https://ann:kana@rie@host/a@b", "https://***@host/a@b"),
        ("{'Authorization': 'Bearer kanarie.Vogel-17'}", "{'Authorization': 'Bearer ***'}"),
        ("ann@host-7 (process 41) at http://10.0.0.7:8123", "ann@host-7 (process 41) at http://10.0.0.7:8123"),
        ("is it there? yes", "is it there? yes"),
        ("", ""),
    ],
)
def test_passwords_and_signatures_of_urls_are_replaced(text, said):
    assert redact(text) == said
    assert redact(said) == said


def test_secrets_of_the_environment_and_of_fsspec_are_replaced_wherever_they_stand(monkeypatch):
    text = f"SignatureDoesNotMatch for {CANARY}!"
    assert redact(text) == text
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    assert redact(text) == "SignatureDoesNotMatch for ***!"
    assert str(ConfigError(text)) == "SignatureDoesNotMatch for ***!"
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for options in ({"secret": CANARY}, {"client_kwargs": {"endpoint_url": f"http://ann:{CANARY.replace('/', '')}@h"}}):
        monkeypatch.setitem(conf, "s3", options)
        assert "kanarie" not in redact(text.replace("/", "") if "client_kwargs" in options else text)


def test_another_thread_may_be_in_the_midst_of_importing_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.config", ModuleType("fsspec.config"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    assert redact(f"no {CANARY}") == "no ***"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", True),
        ("aws_session_token", True),
        ("password", True),
        ("api-key", True),
        ("AZURE_STORAGE_CONNECTION_STRING", True),
        ("account_key", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", True),
        *(
            (name, True)
            for name in (
                "PRIVATE_KEY",
                "ENCRYPTION_KEY",
                "SSH_PASSPHRASE",
                "AUTHORIZATION",
                "GITHUB_PAT",
                "SENTRY_DSN",
                "SESSION_JWT",
                "SLACK_WEBHOOK_URL",
                "AZURE_STORAGE_KEY",
                "OPENAI_KEY",
                "COOKIE",
                "MYSQL_PWD",
            )
        ),
        *((name, False) for name in ("PWD", "OLDPWD", "sort_key", "pat", "path", "format", "spat", "designs")),
        ("AWS_ACCESS_KEY_ID", False),
        ("tokens", False),
        ("tokens_per_sample", False),
        ("max_tokens", False),
        ("tokenizer", False),
        ("key", False),
        ("passes", False),
        ("pass_size", False),
        ("sample_hash", False),
    ],
)
def test_names_tell_what_is_secret(name, secret):
    assert is_secret(name) == secret


def test_values_with_secret_names_are_replaced_at_any_depth_and_others_stay():
    values = {"a": [{"password": CANARY, "tokens": 5, "token": ""}, 1.5, None], "b": (True, f"x://y:{CANARY}@z")}
    assert clean(values)["a"] == [{"password": "***", "tokens": 5, "token": ""}, 1.5, None]
    assert "Vogel" not in json.dumps(clean(values))
    assert clean(clean(values)) == clean(values)


def test_another_signature_of_the_same_object_is_no_other_result_option():
    def options(signature):
        start = CheckpointOptions(init_from=f"https://ann:{signature}@h/w.safetensors?sig={signature}")
        return result_options(TrainConfig(run=RunOptions(), checkpoint=start), {"api_key": signature})

    assert options("one") == options("two")
    assert options("one")["checkpoint.init-from"] == "https://***@h/w.safetensors?***"


def test_errors_keep_their_class_and_text_across_processes():
    import pickle

    error = pickle.loads(pickle.dumps(StorageError(f"x://a:{CANARY.replace('/', '')}@b")))
    assert (type(error), str(error)) == (StorageError, "x://***@b")
