"""The page in a real browser: it fits phones and laptops, both themes are legible, tables sort, nothing is fetched."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from anchorctx.cli.main import main

from .browser import MISSING, Browser, browser
from .fixtures import make_evaluation, make_packed, make_precision, make_reuse, make_run

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
WIDTHS = (1280, 768, 390, 320)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "llama3-8b"
    make_run(root / "run")
    make_run(root / "run_full", pattern="full", seed=1)
    make_packed(root / "packed" / "abc123")
    make_evaluation(root / "eval" / "before", "before", 0.2)
    make_evaluation(root / "eval" / "after", "after, with a name that is long enough to wrap on a phone", 0.9)
    make_precision(root / "precision", "after")
    make_reuse(root / "reuse", "after")
    out = root.parent / "report.html"
    assert main(["report", str(root), f"out={out}", "pretraining_length=8192"]) == 0
    return out


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with browser(tmp_path_factory.mktemp("profile"), port) as opened:
        yield opened


@pytest.mark.parametrize(("width", "dark"), list(itertools.product(WIDTHS, (False, True))))
def test_the_page_fits_and_is_legible(chromium: Browser, page: Path, tmp_path: Path, width: int, dark: bool):
    chromium.open(page, width, dark)
    assert chromium.errors() == []
    # What agents said is folded up at first, and breaks anywhere.
    unfold = """const folded = [...document.querySelectorAll('.conversation, .conversation details')];
        const open = folded.filter(details => details.open).length;
        folded.forEach(details => { details.open = true; });
        const wide = [...document.querySelectorAll('.conversation pre')].filter(p => p.scrollWidth > p.clientWidth);
        return [folded.length > 8, open, wide.length]"""
    assert chromium.run(unfold) == [True, 0, 0]
    assert chromium.run("return document.documentElement.scrollWidth") == width  # no horizontal scroll
    outside = """return [...document.querySelectorAll('svg text')].filter(t => {
        const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(t => t.textContent)"""
    assert chromium.run(outside) == []
    overlapping = """return [...document.querySelectorAll('svg')].flatMap(svg => {
        const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
        return texts.flatMap(([one, a], i) => texts.slice(0, i).filter(([, b]) =>
            Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2
        ).map(([other]) => [svg.getAttribute('aria-label'), one, other]));
    })"""
    assert chromium.run(overlapping) == []
    small = """return Math.min(...[...document.querySelectorAll('svg text')].map(t => {
        const svg = t.closest('svg');
        return parseFloat(getComputedStyle(t).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    }))"""
    assert chromium.run(small) >= (9 if width > 350 else 7)  # CSS pixels
    assert min(chromium.run(CONTRAST).values()) >= 4.5  # WCAG AA for text
    if width in (1280, 390):
        path = tmp_path / "page.png"
        chromium.screenshot(path)
        assert path.stat().st_size > 100_000


CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
};
const light = (color) => {
    const [r, g, b] = [...rgb(color)].slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
const style = (selector, property) => getComputedStyle(document.querySelector(selector))[property];
const found = {};
found.body = ratio(style('body', 'color'), style('body', 'backgroundColor'));
found.lead = ratio(style('.lead', 'color'), style('body', 'backgroundColor'));
found.link = ratio(style('nav a', 'color'), style('body', 'backgroundColor'));
found.cell = ratio(style('td', 'color'), style('.table', 'backgroundColor'));
found.caption = ratio(style('figcaption', 'color'), style('figure', 'backgroundColor'));
found.tick = ratio(style('svg text', 'fill'), style('figure', 'backgroundColor'));
found.note = ratio(style('.note', 'color'), style('.note', 'backgroundColor'));
found.passage = ratio(style('.conversation pre', 'color'), style('.conversation pre', 'backgroundColor'));
found.speaker = ratio(style('.conversation h4', 'color'), style('.conversation', 'backgroundColor'));
const fills = (selector) => [...document.querySelectorAll(selector)].map(mark => getComputedStyle(mark).fill);
const [texts, cells] = [fills('svg .in-cell text'), fills('svg .cell path')];
if (!cells.length || texts.length !== cells.length) throw new Error('cells without texts');
cells.forEach((cell, i) => { found['cell' + i] = ratio(texts[i], cell); });
return found;
"""


def test_a_click_sorts_a_table_and_another_turns_it(chromium: Browser, page: Path):
    chromium.open(page, 1280, dark=False)
    column = """const table = [...document.querySelectorAll('#ruler table')].pop();
        const head = table.tHead.rows[0].cells[arguments[0] ?? 2];
        head.querySelector('button').click();
        return [head.getAttribute('aria-sort'), [...table.tBodies[0].rows].map(r => r.cells[2].textContent)]"""
    first, rising = chromium.run(column)
    second, falling = chromium.run(column)
    values = [float(text.split(" ")[0]) for text in rising]
    assert (first, second) == ("ascending", "descending")
    assert values == sorted(values) and len(set(values)) > 3
    assert [float(text.split(" ")[0]) for text in falling] == values[::-1]


def test_the_pointer_meets_the_values_of_bars_that_are_too_small_to_see(chromium: Browser, page: Path):
    chromium.open(page, 1280, dark=False)
    met = chromium.run("""return [...document.querySelectorAll('#kvcomm svg')].map(svg => {
        const row = svg.querySelector('.unseen');  // of the first arm, dense, whose bars are mostly 0
        if (!row) return null;
        row.scrollIntoView({block: 'center', behavior: 'instant'});
        const {left, right, top, bottom} = row.getBoundingClientRect();
        return document.elementFromPoint((left + right) / 2, (top + bottom) / 2).textContent;
    })""")
    assert met[:6] == [
        "dense: 0",
        "dense: single 90 %, two_hop 90 %",
        "dense: the same order 100 %, another order 100 %",
        "dense: calls 0 %, tokens 0 %, flops 0 %",
        "dense: p50 160, p95 220",
        "dense: 0",
    ]


def test_missing_values_stay_last(chromium: Browser, page: Path):
    chromium.open(page, 1280, dark=False)
    click = """const table = document.querySelector('#comparison table');
        table.tHead.rows[0].cells[2].querySelector('button').click();
        return [...table.tBodies[0].rows].map(r => r.cells[2].dataset.sort ?? null)"""
    for _ in range(2):
        values = chromium.run(click)
        missing = values.count(None)
        assert 0 < missing < len(values) and values[-missing:] == [None] * missing


def test_the_button_changes_the_theme_and_the_system_no_longer_does(chromium: Browser, page: Path):
    chromium.open(page, 1280, dark=True)
    background = "return getComputedStyle(document.body).backgroundColor"
    dark = chromium.run(background)
    chromium.run("document.getElementById('theme').click()")
    light = chromium.run(background)
    assert light != dark
    scheme = [{"name": "prefers-color-scheme", "value": "light"}]
    chromium.devtools("Emulation.setEmulatedMedia", features=scheme)
    assert chromium.run(background) == light
    chromium.run("document.getElementById('theme').click()")
    assert chromium.run(background) == dark


def test_without_scripts_the_page_is_whole(chromium: Browser, page: Path):
    chromium.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(page, 1280, dark=False)
    finally:
        chromium.devtools("Emulation.setScriptExecutionDisabled", value=False)
    assert chromium.run("return getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    assert chromium.run("return document.querySelectorAll('svg').length") > 15
