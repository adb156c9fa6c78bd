"""The documents hang together: links and anchors lead somewhere, every option and command that is named exists."""

from __future__ import annotations

import argparse
import functools
import operator
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import elastic
from docs import options as page_of_options
from elastic.cli import parser
from elastic.options import list_options
from elastic.sweep.command import parser as sweep_parser

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
MOST_LINES = 200  # of the README
#: Options of a job's command line beside those of its configuration, and one of Ray's that a page names alone.
ELSEWHERE = {"--config", "--help", "--help-all", "--runtime-env-json"}
OTHERS = ("ray", "python", "pip")  # programs with options of their own
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]")


def text(page: str) -> str:
    return (ROOT / page).read_text()


def prose(page: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)


def spans(page: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def lines_of_commands(page: str) -> list[str]:
    """The lines of all bash blocks."""
    found = re.findall(r"^```bash\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)
    return [line.split(" #")[0].strip() for block in found for line in block.splitlines()]


# ---- links ---------------------------------------------------------------------------------------------------------


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        assert anchor not in found, f"two headings of {page} have the anchor {anchor}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def module_file(name: str) -> Path | None:
    path = ROOT / name.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@pytest.mark.parametrize("page", PAGES)
def test_every_module_and_file_of_ours_that_is_named_exists(page: str) -> None:
    for span in spans(page):
        for name in re.findall(r"(?<![\w./-])(?:elastic|jobs|tests)(?:\.[A-Za-z_]\w*)+(?![\w/-])", span):
            parts = name.split(".")
            modules = [i for i in range(2, len(parts) + 1) if module_file(".".join(parts[:i]))]
            if modules:
                file = module_file(".".join(parts[: modules[-1]]))
                words = re.findall(r"\w+", file.read_text()) if file else []
                assert set(parts[modules[-1] :]) <= set(words), name
            elif not (ROOT / name).is_file():
                assert operator.attrgetter(name.removeprefix("elastic."))(elastic), name
        for path in re.findall(r"(?<![\w./-])(?:elastic|jobs|tests|docs)(?:/[\w.]+)+", span):
            assert (ROOT / path).exists(), path


def test_every_page_is_found_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose("README.md"))}

    assert set(PAGES) - {"README.md"} <= linked


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= MOST_LINES


# ---- options and commands ------------------------------------------------------------------------------------------


def actions(of: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All of a parser and of its verbs."""
    for action in of._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)


@functools.cache
def options() -> set[str]:
    """Every option of jobs, sweeps and verbs of `elastic`."""
    found = set(ELSEWHERE)
    for option in list_options(elastic.Job, elastic.TrainConfig()):
        section, dot, name = option.name.rpartition(".")
        found |= {option.name, f"{section}{dot}no-{name}"}
    for reader in (parser(), sweep_parser()):
        found |= {name for action in actions(reader) for name in action.option_strings}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_is_named_exists(page: str) -> None:
    ours = [line for line in spans(page) if line.split()[0] not in OTHERS]
    ours += [line for line in lines_of_commands(page) if line.startswith("elastic ")]
    named = {name for line in ours for name in OPTION.findall(line)}

    assert not {name for name in named - options() if not name.startswith("--job.")}


def verbs() -> dict[str, argparse.ArgumentParser]:
    [action] = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


@pytest.mark.parametrize("page", PAGES)
def test_every_elastic_command_that_is_shown_is_one(page: str) -> None:
    known = verbs()
    for line in [*spans(page), *lines_of_commands(page)]:
        words = line.split()
        if words[:1] == ["elastic"] and len(words) > 1 and page != "docs/options.md":
            assert words[1] in known, line
            if words[1] == "checkpoints" and len(words) > 2:
                [inner] = [a for a in known["checkpoints"]._actions if isinstance(a, argparse._SubParsersAction)]
                assert words[2] in inner.choices, line


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_is_named_exists(page: str) -> None:
    for span in [*spans(page), *lines_of_commands(page)]:
        words = span.split()
        if words[:1] == ["make"] and len(words) > 1:
            assert re.search(rf"^{words[1]}:", text("Makefile"), re.MULTILINE), span


def test_the_page_of_options_is_what_the_code_says() -> None:
    assert page_of_options.page() == text("docs/options.md"), "run: python -m docs.options > docs/options.md"


# ---- decisions -----------------------------------------------------------------------------------------------------


def test_decisions_are_dated_and_listed() -> None:
    titles = re.findall(r"^###? (.+)$", text("docs/decisions.md"), re.MULTILINE)
    listed = re.findall(r"^ *\* \[(.+)\]\(#[^)]*\)$", text("docs/decisions.md"), re.MULTILINE)
    status = r"\*\d{4}-\d\d-\d\d(, changed \d{4}-\d\d-\d\d)?; (in force|replaced by \[.+\]\(#.+\))\.\* "

    assert not re.findall(r"^\*\*.*", text("docs/decisions.md"), re.MULTILINE), "give each a heading of its package"
    assert listed == titles, "the contents on top list all headings"
    for title, begin in re.findall(r"^### (.+)\n\n(.+)$", text("docs/decisions.md"), re.MULTILINE):
        assert re.match(status, begin), title


# ---- architecture --------------------------------------------------------------------------------------------------


def test_the_map_of_packages_is_that_which_the_linter_checks() -> None:
    page = text("docs/architecture.md")
    contract = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]
    layers = [{part.strip().removeprefix("elastic.") for part in layer.split("|")} for layer in contract["layers"]]
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)

    assert [{name.strip("`/") for name in row.split(", ")} for _, row in rows] == layers
    told = {name.strip("`/") for line in re.findall(r"^\| (`[^|]+) \|", page, re.M) for name in line.split(", ")}
    assert set().union(*layers) <= told


def test_the_messages_and_threads_in_the_diagrams_exist() -> None:
    page = text("docs/architecture.md")
    source = "\n".join(path.read_text() for path in (ROOT / "elastic").rglob("*.py"))
    threads = set(re.findall(r"[a-z]+-[a-z]+(?:-[a-z]+)?", " ".join(re.findall(r"threads: (.*(?:\n.*),?)", page))))
    between = page[page.index("## The messages between") : page.index("## Processes and threads")]
    kinds = {k.strip() for k in re.findall(r"(?:---- |<--- |->\|<--- )([a-z][a-z ]*?)(?: \(| [-<]|$)", between, re.M)}

    assert {"join", "world", "beat", "rows", "recorded", "pack", "commit", "broken", "ack", "done", "over"} <= kinds
    for name in (kinds | threads) - {"world formed", "short-lived"}:
        assert f'"{name}"' in source, name
