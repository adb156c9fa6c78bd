"""A file of options, `--config FILE`: TOML or YAML, in sections or with dotted names, turned into command-line words.

run: {duration: 5ep, exactness: bitwise}
batch.global-size: 32
job: {lr: 0.001}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic.errors import ConfigError
from elastic.usage import FILE


def expand(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Put the options of `--config` files in front of the line, whose own options override them.

    Returns:
        the line without `--config FILE`, and the files that were read.

    Raises:
        ConfigError: a file cannot be read.
    """
    line: list[str] = []
    files: list[str] = []
    words = iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if name != FILE:
            line.append(word)
            continue
        file = value if given else next(words, "")
        if not file or file.startswith("--"):
            raise ConfigError(f"{FILE} has no value; give a file of options, .yaml or .toml")
        files.append(file)
    return [word for file in files for word in words_of(file)] + line, files


def words_of(file: str) -> list[str]:
    """The options in a file, as words of a command line.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        text = Path(file).expanduser().read_text()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{FILE} is {file!r}, which cannot be read ({error}); give a .yaml or .toml file") from error
    found = _parsed(file, text)
    if found is None:
        return []
    if not isinstance(found, Mapping):
        raise ConfigError(f"{FILE} is {file!r}, which holds a {type(found).__name__}; write options by name in it")
    return [word for name, value in _flat(found, "") for word in _typed(file, name, value)]


def _parsed(file: str, text: str) -> Any:
    if file.endswith(".toml"):
        import tomllib

        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{FILE} is {file!r}, which is no TOML: {error}") from error
    if not file.endswith((".yaml", ".yml", ".json")):
        raise ConfigError(f"{FILE} is {file!r}; give a file that ends in .yaml or .toml")
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{FILE} is {file!r}, which is no YAML: {' '.join(str(error).split())}") from error


def _flat(section: Mapping[Any, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        name = f"{before}{key}".replace("_", "-")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _typed(file: str, name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        section, dot, leaf = name.rpartition(".")
        return [f"--{name}" if value else f"--{section}{dot}no-{leaf}"]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, (list, Mapping)) for v in values):
        raise ConfigError(f"{name} in {FILE} {file} is {value!r}; give one value, or a list of such")
    texts = ["None" if v is None else str(v) for v in values]
    if not isinstance(value, list):
        return [f"--{name}={texts[0]}"]  # in one word: a value may begin with a dash
    return [f"--{name}", *texts]
