"""The verbs of `elastic` that show runs to people: watch, report, compare, page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from elastic.tools.places import USUAL, find_run


def add_showing(verbs: Any) -> None:
    """Add the verbs; each sets `run`, which takes the arguments and returns the exit code."""

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, of: str = "RUN") -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        what = f"folder or URL of a {'run or sweep' if name == 'report' else 'run'}, or its name in {USUAL}"
        parser.add_argument("url", metavar=of, type=find_run, help=what)
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=run)
        return parser

    add("watch", _watch, "show a run on the terminal, live: loss, workers, account, events; Ctrl-C leaves it alone")
    parser = add("compare", _compare, "say whether two runs had the same samples and bits, and where they part")
    parser.add_argument("other", metavar="RUN", type=find_run, help="the other run")
    text = "show runs and steer them in a browser: a page on this machine's loopback address, opened by its link"
    parser = verbs.add_parser("page", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument(
        "url", metavar="URL", nargs="?", default=USUAL, help=f"folder or URL of runs, or of a run (default {USUAL})"
    )
    parser.add_argument("--port", type=int, default=0, help="of the loopback address (default: a free one)")
    parser.set_defaults(run=_page)
    parser = add("report", _report, "show how a run went, or the ranking of a sweep's trials; also as pictures")
    parser.add_argument("--html", metavar="FILE", help="write all of it as one page that needs nothing else")
    parser.add_argument("--plots", metavar="FOLDER", help="write pictures (PNG) into this folder; needs matplotlib")


def _watch(arguments: argparse.Namespace) -> int:
    from elastic.tools.terminal import watch_run

    return watch_run(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from elastic.tools.comparing import compare_runs

    return compare_runs(arguments)


def _page(arguments: argparse.Namespace) -> int:
    import asyncio
    from contextlib import suppress

    from elastic.errors import ConfigError
    from elastic.tools.page.server import Page, serve

    if not 0 <= arguments.port < 1 << 16:
        raise ConfigError(f"--port is {arguments.port}; give 0 to 65535")
    page = Page(find_run(arguments.url))
    page.runs.list()  # says what is wrong with the place before anything listens

    def ready(link: str) -> None:
        print(f"{page.runs.place}: {link}\nWhoever has the link may steer the runs. Ctrl-C ends the page.", flush=True)

    with suppress(KeyboardInterrupt):
        asyncio.run(serve(page, arguments.port, ready))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from elastic.errors import ConfigError
    from elastic.storage import Storage
    from elastic.tools.report import report_run
    from elastic.tools.sweeps import read_sweep, report

    if read_sweep(Storage(arguments.url, option="RUN", read_only=True)) is None:
        return report_run(arguments)
    if arguments.html:
        raise ConfigError(
            f"--html is {arguments.html!r}, but {arguments.url} is a sweep; give --plots, or one of its runs"
        )
    return report(arguments)
