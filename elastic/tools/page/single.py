"""A run as one HTML file that needs no server: the live page with its data included."""

from __future__ import annotations

import json
import time
from importlib.resources import files
from typing import Any

from elastic.observe.ledger import finite


def static(name: str) -> str:
    """Return the text of one of the page's files."""
    return (files("elastic.tools.page") / "static" / name).read_text()


def single_page(run: dict[str, Any]) -> str:
    """Return the whole page, with what is shown of a run (the result of `looking.Onlooker.look`) in it."""
    # A `<` in the data could end the script element; JSON allows to escape it.
    data = json.dumps(finite({**run, "looked_at": time.time()}), allow_nan=False).replace("<", "\\u003c")
    page = static("index.html")
    page = page.replace('<link rel="icon" href="icon.svg" type="image/svg+xml">\n', "")
    page = page.replace('<link rel="stylesheet" href="page.css">', f"<style>\n{static('page.css')}</style>")
    page = page.replace(
        '<script src="charts.js"></script>',
        f'<script type="application/json" id="data">{data}</script>\n<script>\n{static("charts.js")}</script>',
    )
    return page.replace('<script src="page.js"></script>', f"<script>\n{static('page.js')}</script>")
