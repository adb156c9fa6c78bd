"""The page in a real browser, which watches a run train and steers it by its buttons."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from elastic.observe.ledger import EVENTS, gaps_and_doubles, read_records
from elastic.run.prepare import prepare
from elastic.tools.page.server import Page
from tests import browser
from tests.forked import B, Ran, Watch, configure, local_run
from tests.test_control import ENDLESS, while_it_runs
from tests.test_page import STORED, page_of
from tests.tiny_jobs import Leisurely

BROWSING_S = 120.0  # a browser on a busy machine takes its time
PICTURES = os.environ.get("ELASTIC_PICTURES")  # a folder for those that the browser takes, to be looked at
#: Where the text of an element cannot be read well: less contrast than WCAG asks for (4.5, large text 3).
PALE = """(() => {
  const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (colour) => { context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data]; };
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] > 250) return c; } return [255, 255, 255, 255]; };
  const pale = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.closest('[disabled], .skip')) continue;
    const style = getComputedStyle(e), ink = rgb(e.namespaceURI.endsWith('svg') ? style.fill : style.color);
    const a = light(ink), b = light(behind(e)), ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) pale.push(`${e.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return pale;
})()"""


@pytest.mark.processes
@pytest.mark.timeout(2 * BROWSING_S)
@pytest.mark.usefixtures("fork_server")
@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_browser_watches_a_run_train_and_its_buttons_steer_it(tmp_path: Path):
    watch = Watch()
    options = {"run__duration": ENDLESS, "scaling__max_workers": 3}
    run = prepare(Leisurely(), configure(tmp_path / "runs", "mine", **options))
    shutil.copytree(STORED, tmp_path / "runs" / "earlier")

    def script() -> None:
        watch.wait_for_step(5)
        with page_of(tmp_path / "runs") as page:
            asyncio.run(steer(page, tmp_path))

    with local_run(run, 3, on_record=watch) as local:
        while_it_runs(local, script, BROWSING_S)

    ran = Ran(run, None)
    assert "stopped by" in ran.result["message"]
    assert [e["detail"]["max_workers"] for e in ran.events("scaled")] == [2]
    assert len([e for e in ran.events("notice") if "drained by" in str(e.get("detail"))]) == 1
    assert gaps_and_doubles(ran.rows, B) == []
    assert "checkpoint_committed" in {e["kind"] for e in read_records(run.folder.storage, EVENTS)}


async def steer(page: Page, folder: Path) -> None:
    """What a person does on the page, and sees."""

    async def picture(name: str) -> None:
        if PICTURES:
            await tab.picture(Path(PICTURES) / f"{name}.png")

    async def push(key: str, yes: bool) -> None:
        await tab.js(f"document.querySelector('[data-key^=\"{key}\"]').click()")
        await tab.until("document.getElementById('ask').open")
        await tab.js(f"document.querySelector('#ask button[value={'yes' if yes else 'no'}]').click()")

    async with browser.browser(folder, page.link) as tab:
        await tab.size(1400, 1000)
        await tab.until("document.querySelector('#charts svg path')")
        await tab.until("document.querySelectorAll('.runs a').length == 2")
        assert await tab.js("document.querySelector('h1').innerText") == "mine", "the one that runs is shown"
        assert page.token not in await tab.js("location.href")
        step = "Number(document.querySelector('.progress b').innerText.replace(/\\D/g, ''))"
        first = await tab.js(step)
        await tab.until(f"{step} > {first}")
        assert await tab.js(PALE) == []
        await picture("light-1400")
        await tab.dark(True)
        assert await tab.js(PALE) == []
        await picture("dark-1400")
        await tab.dark(False)
        await tab.size(390, 844)
        await tab.until("document.documentElement.scrollWidth <= 390")
        await picture("light-390")
        await tab.size(1400, 1000)

        # With the keyboard alone: Escape asks nothing of the run, and a chart is read.
        await tab.js("document.querySelector('[data-key=Stop]').focus()")
        await tab.press("Enter")
        await tab.until("document.getElementById('ask').open")
        assert await tab.js("document.activeElement.value") == "no", "a hasty Enter stops nothing"
        await picture("ask-1400")
        await tab.press("Escape")
        await tab.until("!document.getElementById('ask').open")
        await tab.js("document.querySelector('[data-key=course]').focus()")
        await tab.press("ArrowLeft")
        assert "step" in await tab.js("document.querySelector('.tip:not([hidden])').innerText")

        await push("Checkpoint", yes=False)
        assert await tab.js("document.querySelectorAll('.toast').length") == 0, "nothing was asked"
        await push("Checkpoint", yes=True)
        await tab.until("/checkpoint of step \\d+ committed/.test(document.getElementById('toasts').innerText)")
        assert await tab.js("document.querySelectorAll('.toast').length") == 1, "it was asked once"
        await push("Scale", yes=False)
        await tab.js("document.querySelector('[data-key=Scale]').click()")
        await tab.js("document.querySelector('#ask input').value = 2")
        await tab.js("document.getElementById('ask-yes').click()")
        await tab.until("/a world of 2 at step/.test(document.getElementById('toasts').innerText)")
        await push("drain", yes=True)
        await tab.until("/has handed over after step/.test(document.getElementById('toasts').innerText)")
        await push("Stop", yes=True)
        await tab.until("/stopped after step/.test(document.getElementById('toasts').innerText)")
        await tab.until("document.querySelector('.pill').innerText == 'stopped'")
        await picture("stopped-1400")
        assert await tab.js("document.querySelectorAll('.actions').length") == 0
        assert tab.errors == []
