"""Removes secrets from everything that is written or shown: configuration, ledger, status, results, errors, console.

`***` replaces: what stands before the host or after the `?` of a URL (passwords, signatures), bearer tokens, values
whose name says that they are secret, and everywhere the secrets that this process has in its environment or in fsspec's
configuration.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
_NAME = re.compile(
    r"secret|passw|passphrase|credential|authorization|cookie|connection[_-]?string|conn\w*[_-]?string|webhook|"
    r"(api|private|encryption|signing|storage|account|openai|shared|master|ssh)[_-]?key|access[_-]?key$|"
    r"(^|[_-])(token|sas|signature|jwt|dsn|notify)$|[a-z0-9][_-](pwd|pat)$",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
# Many people write the slashes of a key unescaped, and an @ of a password too.
_USER = re.compile(r"(?<=://)(?:[^/\s:@'\"]*:[^\s'\"]*?|[^/\s?#@'\"]*)@(?![^/\s?#'\"]*@)")
_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^\s?'\"]+)\?[^\s'\"]+", re.IGNORECASE)
_PASSWORD = re.compile(r"://[^/\s:@]*:([^\s@]+)@")
_LEAST = 8  # letters of a secret: shorter ones would be found in innocent words


def redact(text: str) -> str:
    """The text without secrets."""
    return _redact(text, _known())


def _redact(text: str, secrets: set[str]) -> str:
    if "://" in text:
        text = _QUERY.sub(rf"\1?{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))
    if "earer" in text or "EARER" in text:
        text = _BEARER.sub(rf"\1{HIDDEN}", text)
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def printable(text: str) -> str:
    """The text with its control characters escaped: text from storage or from a job may hold some that a terminal would
    obey."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clean(value: Any) -> Any:
    """Plain values, including those in dictionaries and lists, without secrets."""
    return _clean(value, _known())


def _clean(value: Any, secrets: set[str]) -> Any:
    if isinstance(value, str):
        return _redact(value, secrets)
    if isinstance(value, Mapping):
        return {
            k: HIDDEN if isinstance(v, str) and v and is_secret(str(k)) else _clean(v, secrets)
            for k, v in value.items()
        }
    return [_clean(v, secrets) for v in value] if isinstance(value, (list, tuple)) else value


@functools.lru_cache(4096)  # names come again and again: of variables, options, columns
def is_secret(name: str) -> bool:
    """Whether a name says that its value is secret."""
    return _NAME.search(name) is not None


def _known() -> set[str]:
    """Secrets of this process. fsspec's configuration is read only if something has imported fsspec."""
    found = {value for name, value in os.environ.items() if is_secret(name)}
    found |= {password for value in os.environ.values() for password in _passwords(value)}
    config = sys.modules.get("fsspec.config")
    found |= set(_secrets_in(getattr(config, "conf", {})))  # another thread may be importing it at this moment
    return {value for value in found if len(value) >= _LEAST}


def _secrets_in(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in list(values.items()):
        if isinstance(value, Mapping):
            yield from _secrets_in(value)
        elif isinstance(value, str):
            yield from [value] if is_secret(name) else _passwords(value)


def _passwords(value: str) -> list[str]:
    return _PASSWORD.findall(value) if "://" in value else []
