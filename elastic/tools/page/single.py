"""A look at a run as one file that needs no server: the live page with its data in it."""

from __future__ import annotations

import json
import time
from importlib.resources import files
from typing import Any

from elastic.observe.ledger import finite


def static(name: str) -> str:
    """One of the page's own files."""
    return (files("elastic.tools.page") / "static" / name).read_text()


def single_page(run: dict[str, Any]) -> str:
    """The whole page, with a look at a run (`looking.Onlooker`) in it."""
    # A `<` could end the element that the data is in; in JSON it may be spelled out.
    data = json.dumps(finite({**run, "looked_at": time.time()}), allow_nan=False).replace("<", "\\u003c")
    page = static("index.html")
    page = page.replace('<link rel="icon" href="icon.svg" type="image/svg+xml">\n', "")
    page = page.replace('<link rel="stylesheet" href="page.css">', f"<style>\n{static('page.css')}</style>")
    page = page.replace(
        '<script src="charts.js"></script>',
        f'<script type="application/json" id="data">{data}</script>\n<script>\n{static("charts.js")}</script>',
    )
    return page.replace('<script src="page.js"></script>', f"<script>\n{static('page.js')}</script>")
