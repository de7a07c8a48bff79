"""The tables and the picture of README.md and docs/ are those of the code and of what was measured."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from benchmarks.tables import __main__ as command
from benchmarks.tables import models, operators, pages, picture, records
from benchmarks.tables.contents import PICTURE, PROCESSORS, TABLES
from benchmarks.tables.records import INTEL
from flamingo.config import PRESETS
from flamingo_kernels.commands.measure.text import factor
from flamingo_kernels.commands.profile.run import INT8
from flamingo_kernels.patch.registry import families

MARKERS = "<!-- one: begin -->\n\nold\n\n<!-- one: end -->"


def test_none_is_out_of_date():
    assert [str(path) for path in command.outdated()] == [], "make tables"


def test_each_has_one_place():
    places = [name for page in pages.pages() for name in pages.names_on(page, page.read_text())]
    assert sorted(places) == sorted(TABLES)


def test_only_what_stands_in_its_place_is_replaced(tmp_path):
    text = f"before\n{MARKERS}\nbetween\n{MARKERS.replace('one', 'two')}\nafter"
    once = pages.replaced(tmp_path, text, {"one": "new"})
    assert once == text.replace("old", "new", 1)
    assert pages.replaced(tmp_path, once, {"one": "new"}) == once


@pytest.mark.parametrize(
    "text",
    [
        "<!-- one: begin -->",
        "<!-- one: end --><!-- one: begin -->",
        MARKERS * 2,
        MARKERS.replace("one: end", "two: end"),
    ],
)
def test_places_that_are_not_whole_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"page.md: expected each table's begin and then its end, once, got"):
        pages.names_on(tmp_path / "page.md", text)


def test_a_table_without_a_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"page.md: expected a place for two, got none"):
        pages.replaced(tmp_path / "page.md", MARKERS, {"two": "new"})


def test_the_command_names_what_is_out_of_date_and_writes_it(tmp_path, monkeypatch, capsys):
    page, drawing = tmp_path / "page.md", tmp_path / "gains.svg"
    page.write_text(MARKERS)
    monkeypatch.setattr(command, "pages", lambda: [page])
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "PICTURE", drawing)
    monkeypatch.setattr(command, "TABLES", {"one": lambda: "new"})
    monkeypatch.setattr(command, "drawn", lambda: "<svg/>")
    assert command.main(["--check"]) == 1
    assert capsys.readouterr().out == "page.md\ngains.svg\n"
    assert page.read_text() == MARKERS
    assert command.main([]) == 0
    assert page.read_text() == MARKERS.replace("old", "new")
    assert drawing.read_text() == "<svg/>"
    capsys.readouterr()
    assert command.main(["--check"]) == 0
    assert capsys.readouterr().out == ""


def test_files_of_something_else_are_named(tmp_path):
    (tmp_path / "real").mkdir()
    for content in ("{", "[]", "{}", "null", "[" * 10**5):
        (tmp_path / "real" / "x.json").write_text(content)
        with pytest.raises(ValueError, match=r"x\.json: expected "):
            models.real(tmp_path)


def test_every_model_that_was_profiled_has_a_row():
    assert list(models.PROFILED) == [f.name for f in families() if f.name in models.PROFILED]
    folders = [device / folder for device in PROCESSORS.values() for folder in ("apart", "int8")]
    for path in (path for folder in folders for path in folder.iterdir()):
        found = json.loads(path.read_text())
        assert path.stem == f"{found['model']}.{found['dtype']}.{found['sizes']['batch']}"


def test_what_is_shown_was_right_and_can_be_run_again():
    folders = [(device, folder) for device in PROCESSORS.values() for folder in ("apart", "int8", "real")]
    runs = [run for each in folders for run in records.whole_models(*each)]
    assert runs
    for found in runs:
        assert "dirty" not in found["conditions"]["commit"], "nobody can run that again"
        assert not any(found.get("failed", {}).values())
        for differences in found["differences"].values():
            assert differences.pop(INT8, 0) < 0.2
            assert max(differences.values()) < (1e-4 if found["dtype"] == "float32" else 5e-2)
    for folder in PROCESSORS.values():
        for row in operators.operators(folder).rows:
            assert "dirty" not in (row.commit or "")
            assert row.err is None or row.err <= row.budget


def test_every_preset_was_run_or_counted():
    found = {each["model"]: each for each in records.whole_models(INTEL, "models")}
    assert {*found} == {"flamingo-small", *PRESETS}
    for each in found.values():
        if "lacking" in each:
            assert "in float64" in each["lacking"]
            continue
        assert list(each["works"]) == list(each["proofs"])
        assert each.get("by_block") or len(each["works"]) == 3
        proofs = [proof for by_side in each["proofs"].values() for proof in by_side.values()]
        assert len(proofs) == 2 * len(each["works"])
        assert all(proof["err"] <= proof["budget"] for proof in proofs)
        assert "dirty" not in each["conditions"]["commit"], "nobody can run that again"


def times(*each):
    return dict(zip(("median", "p20", "p80"), each, strict=True))


@pytest.fixture
def device(tmp_path):
    """Records in which Mllama's are made up, and every other is Mllama's."""
    work = {
        "prefill": (times(3, 2.5, 3.5), times(2, 1.9, 2.1), times(1, 0.9, 1.1)),
        "decode": (times(2, 1, 3), times(4, 2, 5), times(1, 0.5, 0.9)),
    }
    for folder, name in {
        *(("apart", f"{name}.float32.1") for name in models.PROFILED.values()),
        *((headline.folder, headline.record) for headline in models.HEADLINES),
    }:
        found = records.whole_model(INTEL, folder, name)
        wanted = {"generation": work["prefill"], "training step": work["decode"], **work}
        found["times"] = {
            each: dict(zip(("before", "patch", "linears"), wanted[each], strict=True))
            for each in found["times"]
        }
        found["beside"] = {}
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(found))
    return tmp_path


def test_gains_are_ratios_of_times(device):
    rows = {line.split(" | ")[0]: line for line in models.swapped(device).splitlines()}
    assert "| 1.50x, 3.00x | ~0.50x, 2.00x | ~0.50x, 2.00x | `row_leak`" in rows["| transformers Mllama"]
    assert "| - | - | - |" in rows["| Otter"]
    assert "| 2 ms; ~0.50x, 2.00x, - |" in models.headlines({"X": device})
    measured = {side: {"median": speed} for side, speed in (("before", 1234.4), ("linears", 1851.7))}
    assert models.speeds_of({"tokens_per_s": measured}) == "1,234 to 1,852 (1.50x)"


def test_a_table_of_models_has_a_line_a_work_and_marks_what_overlaps(tmp_path):
    def near(median):
        return times(median, 0.9 * median, 1.1 * median)

    made = {
        "model": "mine",
        "dtype": "float32",
        "sizes": {"text": 8, "media": 1, "batch": 8},
        "conditions": {"device": "X", "threads": 2, "torch": "2", "commit": "abc", "time": "2026-01-02T03"},
        "times": {"decode": {"before": near(4.0), "patch": near(3.9), "linears": near(2.0)}},
    }
    more = made | {"times": {"decode": made["times"]["decode"] | {"int8": near(1.0)}}, "dtype": "bfloat16"}
    for folder, runs in (("one", [made]), ("both", [more, made])):
        (tmp_path / folder).mkdir()
        for run in runs:
            (tmp_path / folder / f"{run['dtype']}.json").write_text(json.dumps(run))
    table, both = models.apart(tmp_path, "one"), models.apart(tmp_path, "both")
    assert "| as it is | patch | patch with linears |\n" in table
    assert "| mine | float32 | decode | 8 | 4 ms | ~1.03x | 2.00x |" in table
    assert "| mine | float32 | decode | 8 | 4 ms | ~1.03x | 2.00x | - |" in both
    assert "| mine | bfloat16 | decode | 8 | 4 ms | ~1.03x | 2.00x | 4.00x |" in both
    assert "X, 2 threads, torch 2, commit abc, 2026-01-02." in table


def test_a_gain_is_that_of_the_same_minutes():
    run = records.whole_model(INTEL, "real", "openflamingo-3b.bfloat16")
    beside, times_of = run["beside"]["decode"]["int8"], run["times"]["decode"]
    assert beside["median"] != times_of["before"]["median"]
    assert factor(beside["median"] / times_of["int8"]["median"]) in models.real(INTEL)


def test_the_picture_has_a_bar_for_every_gain_of_the_readme(device):
    root = ElementTree.fromstring(PICTURE.read_text())
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    table = TABLES["gains"]()
    assert {*re.findall(r"~?[\d.]+x", table)} <= texts
    for headline in models.HEADLINES:
        assert headline.model in texts
    assert any("random weights" in text and "threads" in text for text in texts)
    parts, _ = picture._panel(picture._models("X", device), 0)
    drawn = ElementTree.fromstring(f'<svg xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>')
    bars = {
        (rect.get("fill"), float(rect.get("x")), float(rect.get("width")))
        for rect in drawn.iter("{http://www.w3.org/2000/svg}rect")
        if rect.get("height") == str(picture.BAR)
    }
    room = picture.WIDTH - picture.LEFT - picture.RIGHT
    colour = picture._COLOURS["linears"]
    assert (colour, picture.LEFT, room) in bars  # 3x is the longest
    assert (colour, picture.LEFT, room / 2) in bars  # 2x is half as far from 1x
    light = picture._COLOURS["patch"]
    assert (light, picture.LEFT - room / 4, room / 4) in bars  # 0.5x goes to the left
