"""The page "Profile a whole model": what it names there is."""

import re

from flamingo_kernels.commands.profile import run
from flamingo_kernels.commands.profile.models import MODELS
from flamingo_kernels.commands.profile.subject import FULL, WORKS
from tests.helpers import ROOT

PAGE = (ROOT / "docs/profiling.md").read_text()


def test_the_models_that_it_names_there_are():
    listed = PAGE.partition("The built-in models are")[2].partition("`profile --help`")[0]
    named = re.findall(r"`([\w-]+)`", listed)
    assert len(named) > 6
    assert set(named) <= set(MODELS)


def test_its_numbers_are_those_of_the_code():
    said = " ".join(PAGE.split())
    assert f"a text of {FULL.text} tokens with {FULL.media} images" in said
    assert run.PROFILED == 5
    assert "the median of five calls under `torch.profiler`" in said


def test_it_names_every_kind_of_work():
    (line,) = (line for line in PAGE.splitlines() if line.startswith("| `--only"))
    assert re.findall(r"`([a-z][a-z ]+)`", line.rpartition("only these of")[2]) == list(WORKS)
