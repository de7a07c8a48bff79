"""What a notebook shows of an object, and the text that a terminal shows in its place."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from flamingo import MaskedCrossAttention
from flamingo_kernels import MediaMask, _drawing, _html, fold, patch, quantize
from flamingo_kernels.commands.bench.baselines import OURS
from flamingo_kernels.commands.bench.rows import Run
from flamingo_kernels.commands.measure.timing import Spread
from flamingo_kernels.commands.profile import models, run
from flamingo_kernels.commands.profile.apart import Apart
from flamingo_kernels.commands.profile.count import Counted
from flamingo_kernels.commands.profile.subject import Sizes
from tests.helpers import ROOT

WHEN = {"time": "2026-11-30T01:02:03Z"}
STORED = ROOT / "benchmarks" / "results" / "intel-xeon-2-cores" / "bench.json"


class Reader(HTMLParser):
    """The text of a page, once all that was opened is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.styles, self.texts, self.found = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.styles += [value for name, value in attrs if name == "style"]
        assert {name for name, _ in attrs} <= {"style"}
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


def measured():
    times = {run.BEFORE: Spread(10.0, 9.0, 12.0), run.PATCHED: Spread(8.0, 7.0, 9.0)}
    work = run.Measured(100, "", times, dict.fromkeys(times, 2**20), {}, {side: {} for side in times})
    conditions = {"device": "a <processor>", "threads": 2, "torch": "2.13.0", "device_type": "cpu"} | WHEN
    return run.Profile(
        "a model", "float32", {}, 10, "patch: 1", conditions, False, False, {}, {}, {models.PREFILL: work}
    )


def apart():
    times = {models.PREFILL: {run.BEFORE: Spread(10.0, 9.0, 11.0), run.PATCHED: Spread(5.0, 4.0, 6.0)}}
    peak = {models.PREFILL: dict.fromkeys(times[models.PREFILL], 2**20)}
    conditions = {"device": "a processor", "threads": 2, "torch": "2.13.0", "device_type": "cpu"} | WHEN
    return Apart("a model", "float32", Sizes(8, 2), 10, conditions, times, {}, {models.PREFILL: 8}, peak)


def counted():
    part = {"language model": 10}
    saved = {run.BEFORE: 2**21, run.PATCHED: 2**20}
    return Counted("a model", "float32", {}, "needs more", part, 4, part, {models.PREFILL: 10**9}, saved)


def mask(batch=1, length=6, media=2, policy="zero"):
    locations = torch.zeros(batch, length, dtype=torch.bool)
    locations[:, 1 : 2 * media : 2] = True
    return MediaMask.last_preceding(locations, media, policy=policy)


def patched():
    return patch(nn.Sequential(*(MaskedCrossAttention(dim=8, dim_visual=8) for _ in range(3))))


SHOWN = {
    "mask": (mask, ["MediaMask of 1 x 6 tokens and 2 media on cpu", "medium 1  ···███"]),
    "patch": (patched, ["patch: 3 modules replaced", "flamingo.modules.MaskedCrossAttention", "3"]),
    "bench": (lambda: Run.load(STORED), ["masked_cross_attention  B1 T256 M5", OURS, "eager", "1.00x"]),
    "profile": (measured, ["prefill, patch", "8 ms", "~1.25x", "a <processor>", "1 MiB"]),
    "apart": (apart, ["prefill, patch", "5 ms", "2.00x"]),
    "counted": (counted, ["needs more", "language model", "prefill"]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_shows_it(name):
    make, expected = SHOWN[name]
    page = make()._repr_html_()
    read = Reader(page)
    for each in expected:
        assert each in read.text
    assert "style" not in read.found, "notebooks take it away"
    assert not any("color:" in style.replace("color:inherit", "") for style in read.styles)
    assert len(page) < 50_000


@pytest.mark.parametrize("name", SHOWN)
def test_a_terminal_shows_the_same_as_text(name):
    found = SHOWN[name][0]()
    assert repr(found) == str(found)
    assert "tensor(" not in repr(found)
    assert "<" not in repr(found).replace("<processor>", "")


def test_bars_are_as_long_as_their_times():
    widths = [style for style in Reader(measured()._repr_html_()).styles if "width:" in style]
    assert ["width:160px" in widths[0], "width:128px" in widths[1]] == [True, True]


def test_other_reports_show_themselves_too():
    model = nn.Sequential(MaskedCrossAttention(dim=8, dim_visual=8)).eval()
    patch(model)
    for report in (fold(model), quantize(nn.Sequential(nn.Linear(64, 64)))):
        assert repr(report) == str(report)
        assert str(report).splitlines()[0] in Reader(report._repr_html_()).text


def test_what_was_skipped_and_why_is_escaped():
    report = patched()
    object.__setattr__(report, "skipped", {"<b>": "a < b & c"})
    page = report._repr_html_()
    assert "a &lt; b &amp; c" in page
    assert "a < b & c" in Reader(page).text
    assert "  <b>  1  a < b & c" in str(report)


def test_a_mask_is_drawn_as_its_documentation_draws_it():
    drawn = repr(mask(policy="open_flamingo")).splitlines()[1:]
    assert drawn == ["  text 0  medium 0  .##...", "          medium 1  ...###"]
    more = MediaMask.from_text_time(torch.tensor([[0, 1, 3, 3]]), 2, policy="open_flamingo")
    assert repr(more).splitlines()[-1] == "          averages  ..##"


def test_a_large_mask_is_small_and_says_what_it_leaves_out():
    large = mask(batch=64, length=4096, media=500)
    lines = repr(large).splitlines()
    assert lines[-1] == "  not drawn: texts 2 to 63, tokens 96 to 4095, media 16 to 499"
    assert len(lines) == 2 + _drawing.MOST_TEXTS * _drawing.MOST_MEDIA
    assert len(large._repr_html_()) < 10_000


def test_a_mask_without_values_says_its_sizes():
    on_meta = mask().to("meta")
    assert repr(on_meta) == 'MediaMask of 1 x 6 tokens and 2 media on meta, policy "zero"'
    assert "2 media on meta" in Reader(on_meta._repr_html_()).text
    assert "medium 0" in repr(mask(length=0, media=1))


def test_a_long_table_says_what_it_leaves_out():
    read = Reader(_html.page(_html.table(("a", "b"), [(str(at), "<i>") for at in range(90)])))
    assert "30 more rows are left out." in read.text
    assert read.found.count("tr") == 1 + _html.MOST_ROWS
    assert "i" not in read.found
