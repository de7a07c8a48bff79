"""The hash of what a class computes: words leave it as it is, everything else changes it."""

from __future__ import annotations

import compileall
import functools
import sys
from types import ModuleType

import pytest
from torch import nn

from flamingo_kernels.patch.source import Unreadable, code_hash
from tests.helpers.variants import edited, load

# Of everything that a forward may reach, one.
SOURCE = '''
import math
from functools import partial, wraps

import torch
from torch import nn
from torch.nn import functional as F

EPS = 1e-6
SHIFTS = (1, 2)
half = partial(torch.mul, other=0.5)


def exists(x):
    """Whether it is there."""
    return x is not None


def twice(function):
    @wraps(function)
    def again(*args, **kwargs):
        return function(*args, **kwargs) * 2

    return again


class Base(nn.Module):
    def inherited(self, x):
        return x + EPS


class Layer(Base):
    power = 3

    @property
    def shift(self):
        return SHIFTS[0]

    @staticmethod
    def negative(x):
        return -x

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        # of what is there
        total: float = 0.25
        later: float
        later = sum(math.sqrt(i) for i in range(4) if i in {1, 2, "three"})
        return self.negative(x) * total + later

    def not_called(self, x):
        return x

    @twice
    def forward(self, x: torch.Tensor, scale: float = 1.5, *, name=f"{EPS!r:>{8}} a" "b"):
        """What it does."""
        if not exists(x):
            raise ValueError(f"no x: {x}")
        return half(self.branch(x)) ** self.power + self.shift * F.relu(self.inherited(x)) * scale
'''
HASH = "3c41f09886212b13"


@pytest.fixture
def layer(tmp_path, monkeypatch):
    """Makes the class out of the source with some edits."""

    def make(*edits):
        path = tmp_path / f"of_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(edited(SOURCE, *edits))
        return load(path, "layer_of_this_test", monkeypatch).Layer

    return make


def test_is_the_same_in_every_python(layer):
    assert code_hash(layer()) == HASH


def test_is_not_changed_by_being_run(layer):
    """Python puts what it learns about types into the code that runs."""
    import torch

    cls = layer()
    for _ in range(100):
        cls()(torch.ones(2))
    assert code_hash(cls) == HASH


@pytest.mark.parametrize(
    "edit",
    [
        ('"""What it does."""', '"""Something else."""'),
        ('        """What it does."""\n', ""),
        ("        # of what is there\n", ""),
        ("x: torch.Tensor) -> torch.Tensor:", "x):"),
        ("        later: float\n", ""),
        ("total: float = 0.25", "total = 0.25"),
        ("x: torch.Tensor, scale: float = 1.5", "x, scale=1.5"),
        ("-x\n", "(-x)\n\n"),
        ("def not_called(self, x):\n        return x", "def not_called(self):\n        return 2"),
        ('{1, 2, "three"}', "{ 1, 2, 'three' }"),
        ("class Layer(Base):\n", "class Layer(Base):\n    unused = 1\n\n"),
        ('a" "b"', 'ab"'),
    ],
    ids=lambda edit: " ".join(edit[0].split())[:30],
)
def test_words_do_not_count(layer, edit):
    assert code_hash(layer(edit)) == HASH


@pytest.mark.parametrize(
    "edit",
    [
        ("* scale", "+ scale"),
        ("= 1.5", "= 1.25"),
        ("is not None", "is None"),
        ("EPS = 1e-6", "EPS = 1e-5"),
        ("SHIFTS = (1, 2)", "SHIFTS = (2, 2)"),
        ("SHIFTS = (1, 2)", "SHIFTS = (1.0, 2)"),
        ("other=0.5", "other=0.25"),
        ("torch.mul", "torch.add"),
        ("kwargs) * 2", "kwargs) * 3"),
        ("    @twice\n", ""),
        ("return x + EPS", "return x - EPS"),
        ("power = 3", "power = 2"),
        ("SHIFTS[0]", "SHIFTS[1]"),
        ("return -x", "return x"),
        ("range(4)", "range(5)"),
        ("0.25", "0.5"),
        ("@staticmethod\n    def negative(x)", "def negative(self, x)"),
        ("{1, 2,", "{1, 3,"),
        ("F.relu", "F.gelu"),
        ("from torch.nn import functional as F", "import torch as F"),
        ("import math\n", "import cmath as math\n"),
        ("class Layer(Base):\n", "class Layer(Base):\n    def __call__(self, x):\n        return x\n\n"),
        (
            "class Layer(Base):\n",
            "class Layer(Base):\n    def __getattr__(self, name):\n        return 1\n\n",
        ),
    ],
    ids=lambda edit: " ".join(f"{edit[0]} to {edit[1]}".split())[:50],
)
def test_everything_else_counts(layer, edit):
    assert code_hash(layer(edit)) != HASH


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("torch.clamp(x, min=0)", "torch.clamp(x, max=0)"),
        ("torch.clamp(x, min=0)", "torch.clamp(x, min=1)"),
        ("torch.clamp(x, 0)", "torch.clamp(x, 1)"),
        ("x if x.ndim > 2 else -x", "x if x.ndim > 2 else x"),
        ("x if x.ndim > 2 else -x", "x if x.ndim >= 2 else -x"),
        ("x if x.ndim and x.shape else -x", "x if x.ndim or x.shape else -x"),
        ("x[1:]", "x[2:]"),
        ("x[:1]", "x[:2]"),
        ("x[::1]", "x[::2]"),
        ("x.mean()", "x.sum()"),
        ("sum(i for i in x if i > 0)", "sum(i for i in x)"),
        ("(lambda y=1: x * y)()", "(lambda y=2: x * y)()"),
        ("(lambda *, y=1: x * y)()", "(lambda *, y=2: x * y)()"),
        ("{1: x}[1]", "{2: x}[1]"),
        ("x * -1", "x * +1"),
        ("x * 1", "x * 1.0"),
        ("x * True", "x * 1"),
        ("x.double()", "x.float()"),
    ],
)
def test_every_part_of_an_expression_counts(layer, one, other):
    first, second = (code_hash(layer(("return -x", f"return {body}"))) for body in (one, other))
    assert first != second


@pytest.mark.parametrize("name", ["_call_impl", "_wrapped_call_impl", "__getattribute__"])
def test_what_torch_calls_before_the_forward_counts(layer, name):
    own = f"class Layer(Base):\n    def {name}(self, *args):\n        return 1\n\n"
    assert code_hash(layer(("class Layer(Base):\n", own))) != HASH


class TestWhatIsReplacedLater:
    def test_a_function_of_the_module(self, layer, monkeypatch):
        cls = layer()
        module = sys.modules[cls.__module__]
        monkeypatch.setattr(module, "exists", lambda x: True)
        assert code_hash(cls) != HASH

    def test_a_wrapper_with_the_names_of_what_it_wraps(self, layer, monkeypatch):
        cls = layer()
        original = cls.branch
        monkeypatch.setattr(cls, "branch", functools.wraps(original)(lambda self, x: 2 * original(self, x)))
        assert code_hash(cls) != HASH

    def test_the_forward(self, layer, monkeypatch):
        cls = layer()
        forward = cls.forward
        monkeypatch.setattr(cls, "forward", functools.wraps(forward)(lambda self, x: forward(self, x)))
        assert code_hash(cls) != HASH

    def test_a_default_argument(self, layer):
        cls = layer()
        forward = cls.forward.__wrapped__
        forward.__defaults__ = (0.5,)
        assert code_hash(cls) != HASH

    def test_a_constant(self, layer, monkeypatch):
        cls = layer()
        monkeypatch.setattr(sys.modules[cls.__module__], "EPS", 1.0)
        assert code_hash(cls) != HASH

    def test_a_method_of_a_subclass(self, layer):
        cls = layer()
        same = type("Same", (cls,), {"more": lambda self: 1})
        other = type("Other", (cls,), {"negative": lambda self, x: x})
        assert code_hash(same, cls.__module__) == HASH
        assert code_hash(other, cls.__module__) != HASH


class TestSourceThatIsNotWhatRuns:
    def run(self, filename, *edits) -> type[nn.Module]:
        module = ModuleType("layer_of_this_test")
        exec(compile(edited(SOURCE, *edits), filename, "exec", dont_inherit=True), vars(module))
        return module.Layer

    def test_no_file(self):
        with pytest.raises(Unreadable, match="the source of again cannot be read from <string>"):
            code_hash(self.run("<string>"))

    def test_other_code_under_the_name_of_a_file(self, tmp_path):
        path = tmp_path / "original.py"
        path.write_text(SOURCE)
        assert code_hash(self.run(str(path))) == HASH
        with pytest.raises(Unreadable, match=r"the source of forward in .*original\.py is not what runs"):
            code_hash(self.run(str(path), ("* scale", "+ scale")))

    @pytest.mark.parametrize(
        "edit",
        [
            ("* scale", "+ scale"),
            ("F.relu", "F.gelu"),
            ("raise ValueError", "raise TypeError"),
            ("** self.power", "** self.shift"),
            ("no x:", "not x:"),
            ("scale: float = 1.5, *,", "*, scale: float = 1.5,"),
        ],
        ids=lambda edit: edit[1],
    )
    def test_a_file_that_was_edited_since(self, edit, tmp_path):
        path = tmp_path / "original.py"
        path.write_text(edited(SOURCE, edit))
        cls = self.run(str(path), edit)
        code_hash(cls)
        path.write_text(SOURCE)
        with pytest.raises(Unreadable, match="is not what runs"):
            code_hash(cls)
        path.write_text("def (")
        with pytest.raises(Unreadable, match="is not Python"):
            code_hash(cls)

    def test_compiled_files_alone(self, tmp_path, monkeypatch):
        path = tmp_path / "alone.py"
        path.write_text(SOURCE)
        compileall.compile_file(str(path), legacy=True, quiet=1)
        path.unlink()
        with pytest.raises(Unreadable, match="cannot be read"):
            code_hash(load(path.with_suffix(".pyc"), "layer_of_this_test", monkeypatch).Layer)

    def test_an_archive(self, tmp_path, monkeypatch):
        import importlib
        import zipfile

        with zipfile.ZipFile(tmp_path / "layers.zip", "w") as archive:
            archive.writestr("layer_of_this_test.py", SOURCE)
        monkeypatch.syspath_prepend(str(tmp_path / "layers.zip"))
        monkeypatch.delitem(sys.modules, "layer_of_this_test", raising=False)
        assert code_hash(importlib.import_module("layer_of_this_test").Layer) == HASH
