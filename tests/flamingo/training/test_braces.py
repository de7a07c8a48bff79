"""Braces in names, as bash expands them."""

import shutil
import subprocess

import pytest

from flamingo.training.braces import expand

PATTERNS = {
    "plain": ["plain"],
    "{8..11}": ["8", "9", "10", "11"],
    "{008..011}": ["008", "009", "010", "011"],
    "{08..11}": ["08", "09", "10", "11"],
    "{3..1}": ["3", "2", "1"],
    "{0..6..3}": ["0", "3", "6"],
    "{6..0..3}": ["6", "3", "0"],
    "{-1..1}": ["-1", "0", "1"],
    "{a..c}": ["a", "b", "c"],
    "{a,b}{1..2}": ["a1", "a2", "b1", "b2"],
    "{a,b{1..2}}": ["a", "b1", "b2"],
    "{a,{b,c}}d": ["ad", "bd", "cd"],
    "{,x}y": ["y", "xy"],
    "{x}": ["{x}"],
    "a{1..2": ["a{1..2"],
    "{}": ["{}"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_name_in_its_order(pattern):
    found = expand(pattern)
    assert sorted(found) == sorted(PATTERNS[pattern])
    if pattern.count("{") < 2 or "}{" in pattern:
        assert found == PATTERNS[pattern]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_as_bash_does():
    shown = subprocess.run(
        ["bash", "-c", "; ".join(f"echo {pattern}" for pattern in PATTERNS)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [sorted(line.split()) for line in shown.stdout.splitlines()] == [
        sorted(expand(pattern)) for pattern in PATTERNS
    ]
