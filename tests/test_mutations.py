"""The faults of `make mutate` still have their places, and its verdicts are right."""

from __future__ import annotations

import ast
import textwrap

import pytest

from tests.helpers import ROOT
from tests.helpers.scratch import Scratch
from tests.mutations.faults import Fault, read
from tests.mutations.plant import plant

FAULTS = read()
MOST_EQUIVALENT = 5


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_its_place_and_its_tests_are_there(fault):
    text = fault.planted((ROOT / fault.path).read_text())
    if fault.path.endswith(".py"):
        ast.parse(text)
    missing = [test for test in fault.tests if not (ROOT / test.partition("::")[0]).exists()]
    assert not missing


def test_the_list_as_a_whole():
    assert len({str(fault) for fault in FAULTS}) == len(FAULTS)
    assert sum(bool(fault.equivalent) for fault in FAULTS) <= MOST_EQUIVALENT


def test_a_place_that_has_moved_is_named():
    with pytest.raises(
        ValueError, match=r"^a\.py: wrong: expected its `before` once .* found it 2 times: point here"
    ):
        fault("b", "c").planted("b and b")


def fault(before, after, **more):
    return Fault("here", "a.py", "wrong", before, after, ("test_a.py",), **more)


@pytest.fixture
def scratch(tmp_path):
    """A project of one function and its test."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "a.py").write_text("def double(x):\n    y = 0 + x\n    return 2 * y\n")
    (root / "test_a.py").write_text(
        textwrap.dedent("""
            from a import double

            def test_two():
                assert double(2) == 4

            def test_four():
                assert double(4) == 8
        """)
    )
    return Scratch(root, tmp_path / "copy")


@pytest.mark.parametrize(
    ("planted", "outcome"),
    [
        (fault("2 * y", "2 + y"), "killed"),
        (fault("2 * y", "2 * z"), "killed"),
        (fault("2 * y", "2 * y)"), "killed"),  # cannot be imported
        (fault("2 * y", "2 ** y"), "killed"),
        (fault("2 * y", "2 ** y", only="two"), "survived"),
        (fault("2 * y", "2 ** y", only="nothing of this name"), "broken"),
        (fault("0 + x", "x + 0"), "survived"),
        (fault("0 + x", "x + 0", equivalent="a sum has no order"), "equivalent"),
        (fault("2 * y", "3 * y", equivalent="it is not"), "broken"),
        (fault("4 * y", "3 * y"), "broken"),
    ],
)
def test_verdicts(scratch, planted, outcome):
    before = (scratch.folder / "a.py").read_text()
    assert plant(scratch, planted).outcome == outcome
    assert (scratch.folder / "a.py").read_text() == before


def test_all_killers_are_named_on_demand(scratch):
    verdict = plant(scratch, fault("2 * y", "3 * y"), stop_at_first=False)
    assert verdict.run.failed == ["test_a.py::test_two", "test_a.py::test_four"]
