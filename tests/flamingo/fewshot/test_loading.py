"""Models and devices by their names."""

import pytest
import torch

from flamingo.fewshot.loading import find_device


@pytest.mark.parametrize(("name", "found"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_each_process_of_torchrun_has_its_gpu(monkeypatch, name, found):
    tried = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "empty", lambda size, device: tried.append(str(device)))
    assert str(find_device(name)) == found
    assert tried == [found]


def test_a_device_that_fails_when_it_is_used(monkeypatch):
    def fail(size, device):
        raise RuntimeError("No GPUs are available.\nAnd a long stack.")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(ValueError, match=r"--device that is there, got 'cuda:7': No GPUs are available\.$"):
        find_device("cuda:7")
