"""The reference does without `flamingo_kernels`, and asks for it in one place."""

import sys
from pathlib import Path

import pytest
from torch import nn

import flamingo
from flamingo.kernels import use_kernels
from flamingo_kernels.ops.linear import config
from tests.helpers.kernels import has_kernels
from tests.helpers.tiny_run import model


def test_one_file_imports_the_kernels():
    """And one names their command, which begins as those of `flamingo` do."""
    files = Path(flamingo.__file__).parent.rglob("*.py")
    naming = {file.name: file.read_text() for file in files if "flamingo_kernels" in file.read_text()}
    assert {*naming} == {"kernels.py", "starting.py"}
    assert naming["starting.py"].count("flamingo_kernels") == 1
    assert 'is_command("flamingo_kernels")' in naming["starting.py"]


def test_modules_and_linear_layers_are_swapped_and_a_line_says_so():
    flamingo, said = model(), []
    names = list(flamingo.state_dict())
    assert use_kernels(flamingo, True, said.append)
    assert has_kernels(flamingo)
    assert list(flamingo.state_dict()) == names
    linear = sum(isinstance(module, nn.Linear) for module in flamingo.modules())
    assert said == [f"with kernels: 7 modules and {linear} linear layers are swapped"]


def test_they_can_be_switched_off():
    flamingo, said = model(), []
    assert not use_kernels(flamingo, False, said.append)
    assert not has_kernels(flamingo)
    assert said == ["without kernels: they are switched off"]


def test_where_they_are_not_installed_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flamingo_kernels", None)
    flamingo, said = model(), []
    assert not use_kernels(flamingo, True, said.append)
    assert not has_kernels(flamingo)
    assert said == ["without kernels: import of flamingo_kernels halted; None in sys.modules"]


def test_a_model_of_which_they_know_nothing_stays_as_it_is():
    said = []
    assert not use_kernels(nn.Sequential(nn.ReLU()), True, said.append)
    assert said == ["without kernels: they know nothing of what is in a Sequential"]


def test_a_table_of_products_that_is_none_is_no_reason_to_go_on_without(monkeypatch, tmp_path):
    flamingo, said = model(), []
    (tmp_path / "linear.json").write_text("{")
    monkeypatch.setattr(config, "OWN", tmp_path / "linear.json")
    monkeypatch.setattr(config, "LEAST_WEIGHTS", 0)
    config.forget()
    with pytest.raises(ValueError, match=r"^linear: expected JSON in .*linear\.json, got .*; delete it"):
        use_kernels(flamingo, True, said.append)
    assert not has_kernels(flamingo)
    assert said == []
