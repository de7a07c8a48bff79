"""The documentation: its links, its list of public names, and the site that is built of it in a browser."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import flamingo
import flamingo_kernels
from tests.helpers import ROOT
from tests.helpers.browser import browser

DOCS = ROOT / "docs"
API = sorted((DOCS / "api").glob("*.md"))
FOLDERS = ("docs", "benchmarks", "csrc", "examples", ".github")
MARKDOWN = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
# Their names are for this project's own code.
INTERNAL = {
    "flamingo_kernels.ops.linear",
    "flamingo_kernels.patch.samples",
    "flamingo_kernels.patch.trial",
}


def test_every_page_is_in_the_nav():
    yaml = pytest.importorskip("yaml")
    groups = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = [page for group in groups for pages in group.values() for page in pages]
    of_docs = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(named) == len(set(named))
    assert of_docs - set(named) == set(), "not in the nav of mkdocs.yml"
    assert [page for page in set(named) - of_docs if not (ROOT / page).is_file()] == []


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    astray = []
    for link in re.findall(r"\]\(([^()\s]+)\)|(?:href|src)=\"([^\"]+)\"", text):
        path, _, anchor = "".join(link).partition("#")
        target = page.parent / path if path else page
        if ":" in path:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            astray.append("".join(link))
    assert astray == []


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_public_name_is_on_one_page():
    shown = Counter(id(named(path)) for page in API for path in names_on(page))
    public = {path: id(named(path)) for path in public_names()}
    assert "flamingo_kernels.patch" in public
    elsewhere = {path: shown[each] for path, each in public.items() if shown[each] != 1}
    assert elsewhere == {}, "on none or on several pages of docs/api, where a line `::: NAME` shows it"
    assert shown.total() == len(set(public.values())), "a page shows a name that is not public"


def names_on(page: Path) -> list[str]:
    return re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)


def named(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def public_names() -> list[str]:
    """What the `__all__` of each package names."""
    found = [
        importlib.import_module(each.name)
        for package in (flamingo, flamingo_kernels)
        for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if each.ispkg and each.name not in INTERNAL and "._" not in each.name
    ]
    return [
        f"{package.__name__}.{name}"
        for package in (flamingo, flamingo_kernels, *found)
        for name in getattr(package, "__all__", ())
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no {module}: `make docs` installs it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    told = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("INFO ")]
    assert (done.returncode, told) == (0, [])
    return folder


@pytest.fixture(scope="module")
def served(site):
    """Where a server has it."""
    handler = partial(QuietHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_args):
        pass


@pytest.fixture(scope="module")
def window(site, tmp_path_factory):
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} (on Debian: apt install chromium chromium-driver)")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


BROKEN_PICTURES = "return [...document.images].filter(each => !each.naturalWidth).map(each => each.src)"
# What is cut off, or makes the page wider than the window; what scrolls within itself is neither.
TOO_WIDE = """
    const width = document.documentElement.clientWidth;
    const scrolls = each => /auto|scroll/.test(getComputedStyle(each).overflowX);
    const isWithin = each => each && (scrolls(each) || isWithin(each.parentElement));
    return [...document.querySelectorAll("article *")]
        .filter(each => each.getBoundingClientRect().right > width + 1 && !isWithin(each.parentElement))
        .map(each => each.outerHTML.slice(0, 200))
        .concat(document.documentElement.scrollWidth > width ? ["the page"] : []);
"""
LINKS = "return [...document.querySelectorAll('.md-search-result__link')].map(each => each.href)"
# What a reader should never see: the markup of Markdown and of docstrings.
MARKUP = r"""
    const article = document.querySelector("article").cloneNode(true);
    article.querySelectorAll("pre, code, h1, h2, h3").forEach(each => each.remove());
    const lines = article.textContent.split("\n");
    return lines.filter(line => /^ *(- |\d+\. |```|~~~|\|)|::|====|\]\(|>>>|\*\*/.test(line));
"""


@pytest.mark.slow  # builds the site
def test_every_page_in_a_browser(site, served, window):
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    found = {}
    for page in pages:
        window.open(f"{served}/{page}", width=1280)
        seen = {"broken pictures": window.run(BROKEN_PICTURES), "markup": window.run(MARKUP)}
        window.open(f"{served}/{page}", width=390)
        seen["too wide for a phone"] = settled(partial(window.run, TOO_WIDE), wanted=False)
        seen["complaints"] = window.complaints()
        seen["requests to others"] = [url for url in window.requests() if not url.startswith(served)]
        found[page] = {what: each for what, each in seen.items() if each}
    assert {page: seen for page, seen in found.items() if seen} == {}


def settled(look: Callable[[], list[str]], wanted: bool) -> list[str]:
    """What is seen once the page has found its form: something, or nothing."""
    patience = time.monotonic() + 30
    while bool(seen := look()) != wanted and time.monotonic() < patience:
        time.sleep(0.05)
    return seen


@pytest.mark.slow  # builds the site
@pytest.mark.parametrize("page", API, ids=lambda page: page.stem)
def test_drawings_and_examples_are_shown_as_written(served, window, page):
    written = [block for each in map(named, names_on(page)) for block in blocks(each)]
    assert written or page.stem == "index"

    def missing() -> list[str]:
        window.open(f"{served}/api/{page.stem}.html", width=1280)
        shown = window.run("return [...document.querySelectorAll('pre')].map(each => each.textContent)")
        return [block for block in written if block not in "\n".join(shown)]

    assert settled(missing, wanted=False) == []


def blocks(documented: object) -> list[str]:
    """The drawings and the examples in a docstring."""
    text = (inspect.getdoc(documented) or "") + "\n" if callable(documented) else ""
    drawings = re.findall(r"::\n\n((?: {4}.*\n|\n)+)", text)
    examples = re.findall(r"^ *>>> .*\n(?: *\S.*\n)*", text, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") for block in (*drawings, *examples)]


@pytest.mark.slow  # builds the site
@pytest.mark.parametrize("opened", ["by a server", "as a file"])
def test_search_finds_a_word(site, served, window, opened):
    start = served if opened == "by a server" else site.as_uri()
    window.open(f"{start}/faq.html", width=1280)
    window.type(".md-search__input", "resampler")
    links = settled(partial(window.run, LINKS), wanted=True)
    assert links
    for link in links[:3]:
        window.open(link, width=1280)
        assert "resampler" in window.run("return document.querySelector('article').textContent.toLowerCase()")
    assert window.complaints() == []
