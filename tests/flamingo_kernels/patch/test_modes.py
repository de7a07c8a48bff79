"""Patched models in every mode that a model runs in, and in every pair of modes, as their originals.

The tables say which run. `tests/helpers/modes.py` says what a mode is, and what is held.
"""

from __future__ import annotations

from itertools import combinations

import pytest

from benchmarks.tables.models import PROFILED
from flamingo_kernels import patch
from flamingo_kernels.patch import registry
from flamingo_kernels.testing import tiny
from tests.helpers import slow_unless
from tests.helpers.modes import MODELS, MODES, build, hold, prepared, step, with_parts

# quick, slow: it runs, in the usual tests or in the slow ones.
# refuses: the original raises an error.
# itself: the model sets at every call what trains.
# nothing: nothing is left that wants a gradient.
TABLE = """
                     flamingo  open_flamingo  flamingo_pytorch  idefics  idefics2  mllama   evolla
plain                quick     quick          quick             quick    quick     quick    quick
autocast bf16        quick     slow           quick             slow     quick     slow     quick
autocast fp16        slow      quick          slow              quick    slow      quick    slow
weights in bf16      quick     slow           quick             slow     quick     slow     quick
weights in fp16      slow      quick          slow              quick    slow      quick    slow
norms in float32     quick     slow           quick             refuses  quick     refuses  refuses
gates in float32     quick     refuses        refuses           refuses  slow      refuses  refuses
projections in bf16  refuses   refuses        refuses           refuses  refuses   refuses  refuses
held features        slow      quick          refuses           quick    slow      quick    refuses
hook on all          quick     slow           quick             slow     quick     slow     quick
own hooks            slow      quick          slow              quick    slow      quick    slow
checkpoints          quick     quick          quick             quick    quick     quick    quick
reentrant            quick     slow           quick             slow     quick     refuses  refuses
compiled             slow      slow           slow              slow     quick     slow     slow
no_grad              quick     quick          quick             quick    quick     quick    quick
inference_mode       quick     quick          quick             quick    quick     quick    quick
attention trains     quick     quick          itself            quick    quick     quick    quick
resampler trains     quick     quick          itself            quick    quick     nothing  quick
inputs train         quick     quick          itself            quick    quick     quick    nothing
training             quick     quick          quick             quick    quick     quick    quick
"""

# Of each pair the model on which it runs in the usual tests, by its letter; a capital: there it is slow too.
# The other models that run in both modes run in both at once, in the slow tests.
# =: two values of one setting.
# x: every original raises an error.
LETTERS = dict(zip("fopidme", MODELS, strict=True))
PAIRS = """
autocast bf16        . = f x p F d o E i p D E f p d e f P
autocast fp16          . x M x x O I M O I O M I M O I M O
weights in bf16          . = = = = d E f p D E f p d e f P
weights in fp16            . = = = I M O I D M O I M O I M
norms in float32             . = = f P d f P d f p d f d P
gates in float32               . = F F F F F F F F F F F F
projections in bf16              . x x x x x x x x x x x x
held features                      . O i o O I m o i o m I
hook on all                          . E E P E E E D E D P
own hooks                              . m O I m o i o m I
checkpoints                              . = E p d e d d P
reentrant                                  . P P D D D D P
compiled                                     . E M E O I M
no_grad                                        . = e o i M
inference_mode                                   . e o i P
attention trains                                   . = = M
resampler trains                                     . = E
inputs train                                           . O
training                                                 .
"""

# Pairs that run elsewhere than where both modes do: autocast runs what the original alone refuses, and Mllama
# has no cache beside checkpoints.
ELSEWHERE = {
    ("autocast bf16", "norms in float32"): [*MODELS],
    ("autocast bf16", "gates in float32"): ["flamingo", "idefics", "idefics2", "mllama", "evolla"],
    ("autocast bf16", "projections in bf16"): [*MODELS],
    ("autocast fp16", "projections in bf16"): [*MODELS],
    ("held features", "checkpoints"): ["flamingo", "open_flamingo", "idefics", "idefics2"],
}

# What is kept from text to text without gradients, where the modes meet that could spoil it.
TRIPLES = [
    *(
        (name, "autocast bf16", "held features", "no_grad")
        for name in ("flamingo", "open_flamingo", "idefics")
    ),
    ("mllama", "autocast fp16", "held features", "no_grad"),
    ("flamingo", "autocast fp16", "held features", "inference_mode"),
    ("idefics", "held features", "own hooks", "no_grad"),
]


def cells(table: str) -> dict[str, list[str]]:
    """The words of each row after its name, which takes 21 characters."""
    return {line[:21].strip(): line[21:].split() for line in table.strip("\n").splitlines()}


(_, COLUMNS), *ROWS = cells(TABLE).items()
WORDS = {(name, mode): word for mode, words in ROWS for name, word in zip(COLUMNS, words, strict=True)}
FIRST = [mode for mode in MODES if mode != "plain"]
PAIR_CELLS = {
    (a, b): letter
    for n, (a, letters) in enumerate(cells(PAIRS).items())
    for b, letter in zip(FIRST[n + 1 :], letters[1:], strict=True)
}


def singles(*words: str) -> list[tuple[str, str]]:
    return [cell for cell, word in WORDS.items() if word in words]


def runs(name: str, pair: tuple[str, str]) -> bool:
    alone = all(WORDS[name, mode] in ("quick", "slow") for mode in pair)
    return (
        PAIR_CELLS[pair].isalpha() and PAIR_CELLS[pair] != "x" and name in ELSEWHERE.get(pair, [name] * alone)
    )


RUNNING = [(name, *pair) for pair in PAIR_CELLS for name in MODELS if runs(name, pair)]
QUICK = [(LETTERS[letter], *pair) for pair, letter in PAIR_CELLS.items() if letter in LETTERS]
REFUSED = [pair for pair, letter in PAIR_CELLS.items() if letter == "x"]

kernels = pytest.mark.usefixtures("compiled")  # the backend in C++, which computes all that is fused here
quiet = pytest.mark.filterwarnings("ignore")  # of libraries, about caches and checkpoints


@kernels
@quiet
@pytest.mark.parametrize(("name", "mode"), slow_unless(singles("quick"), singles("quick", "slow")))
def test_mode(name, mode):
    hold(name, (mode,))


@kernels
@quiet
@pytest.mark.parametrize(("name", "first", "second"), slow_unless(QUICK, RUNNING))
def test_pair(name, first, second):
    hold(name, (first, second))


@kernels
@quiet
@pytest.mark.slow
@pytest.mark.parametrize("case", TRIPLES, ids=", ".join)
def test_three(case):
    name, *modes = case
    hold(name, tuple(modes))


def call_original(name, *modes):
    chosen = [MODES[mode] for mode in modes]
    built = prepared(name, chosen)
    return built.model, step(with_parts(built.model, name, chosen), name, built.inputs, chosen)


class TestReasons:
    @quiet
    @pytest.mark.parametrize(("name", "mode"), singles("refuses"))
    def test_refuses(self, name, mode):
        with pytest.raises((RuntimeError, TypeError, NameError)):
            call_original(name, mode)

    @pytest.mark.parametrize(("name", "mode"), singles("itself"))
    def test_itself(self, name, mode):
        asked, model = prepared(name, [MODES[mode]]).model, call_original(name, mode)[0]
        pairs = zip(asked.parameters(), model.parameters(), strict=True)
        assert any(before.requires_grad != after.requires_grad for before, after in pairs)

    @pytest.mark.parametrize(("name", "mode"), singles("nothing"))
    def test_nothing(self, name, mode):
        (out,) = call_original(name, mode)[1].outputs
        assert not out.requires_grad

    @quiet
    @pytest.mark.parametrize("pair", REFUSED, ids=" and ".join)
    def test_every_original_refuses(self, pair):
        for name in MODELS:
            with pytest.raises((RuntimeError, TypeError, NameError)):
                call_original(name, *pair)


class TestTables:
    def test_every_model_has_a_column(self):
        assert [*MODELS] == COLUMNS
        assert {name.removesuffix("-tiny") for name in tiny.names()} == {*MODELS} - {"flamingo"}

    def test_every_class_of_a_package_that_patch_swaps_is_in_a_model(self):
        replaced = [old for name in MODELS for old, _ in patch(build(name).model).replaced.values()]
        tested = [family for family in registry.families() if family.name in PROFILED]
        known = {(family.module, name) for family in tested for name in family.fused}
        assert known <= {(cls.__module__, cls.__name__) for cls in replaced}

    def test_every_mode_has_a_row_of_known_words(self):
        assert [mode for mode, _ in ROWS] == [*MODES]
        assert {*WORDS.values()} <= {"quick", "slow", "refuses", "itself", "nothing"}

    def test_every_pair_has_a_cell_that_says_what_its_settings_say(self):
        assert [*PAIR_CELLS] == [*combinations(FIRST, 2)]
        assert {*PAIR_CELLS.values()} <= {*LETTERS, *map(str.upper, LETTERS), "=", "x"}
        for (a, b), letter in PAIR_CELLS.items():
            one_setting = MODES[a].setting != "" and MODES[a].setting == MODES[b].setting
            assert (letter == "=") == one_setting, (a, b)

    def test_the_model_of_each_pair_runs_in_it(self):
        for pair, letter in PAIR_CELLS.items():
            if letter not in "=x":
                assert runs(LETTERS[letter.lower()], pair), pair

    def test_every_mode_is_quick_somewhere(self):
        """Those that the original alone refuses in a pair."""
        quick = {mode for _, mode in singles("quick")} | {mode for _, *pair in QUICK for mode in pair}
        assert quick == {*MODES}
