"""K and V of media that are projected once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from flamingo_kernels._kept_media import kept_kv


class TestKeptKV:
    @pytest.fixture
    def layer(self):
        return nn.ModuleDict({"k": nn.Linear(4, 6, bias=False), "v": nn.Linear(4, 6, bias=False)})

    def project(self, layer, media, calls=None):
        def compute():
            if calls is not None:
                calls.append(1)
            return layer["k"](media), layer["v"](media)

        return kept_kv(layer, media, (layer["k"], layer["v"]), compute)

    @torch.no_grad()
    def test_once_for_all_views_of_the_same_media(self, layer):
        media, calls = torch.randn(6, 4), []
        first = self.project(layer, media.view(2, 3, 4), calls)
        again = self.project(layer, media.view(3, 2, 4).view(2, 3, 4), calls)
        assert again[0] is first[0]
        assert calls == [1]
        self.project(layer, media.view(3, 2, 4), calls)
        assert calls == [1, 1]

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer, media: media.mul_(2),
            lambda layer, media: layer["v"].weight.mul_(2),
            lambda layer, media: layer.load_state_dict({n: t * 2 for n, t in layer.state_dict().items()}),
            lambda layer, media: setattr(layer["k"], "weight", nn.Parameter(torch.randn(6, 4))),
            lambda layer, media: layer.__setitem__("k", nn.Linear(4, 6, bias=False)),
        ],
    )
    @torch.no_grad()
    def test_anew_after_a_change(self, layer, change):
        media = torch.randn(2, 4)
        self.project(layer, media)
        change(layer, media)
        k, v = self.project(layer, media)
        assert torch.equal(k, layer["k"](media))
        assert torch.equal(v, layer["v"](media))

    @torch.no_grad()
    def test_not_what_a_hook_or_an_adapter_may_change(self, layer):
        media = torch.randn(2, 4)
        self.project(layer, media)
        layer["k"].register_forward_hook(lambda *args: args[-1] + 1)
        assert torch.equal(self.project(layer, media)[0], layer["k"](media))

    @torch.no_grad()
    def test_not_what_another_module_has_a_part_in(self, layer):
        class Adapted(nn.Module):
            def __init__(self):
                super().__init__()
                self.base, self.enabled = nn.Linear(4, 6, bias=False), True

            def forward(self, x):
                return self.base(x) * (2 if self.enabled else 1)

        layer["k"], media = Adapted(), torch.randn(2, 4)
        self.project(layer, media)
        layer["k"].enabled = False
        assert torch.equal(self.project(layer, media)[0], layer["k"](media))

    @torch.no_grad()
    def test_not_where_weights_may_be_sharded(self, layer, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        media, calls = torch.randn(2, 4), []
        self.project(layer, media, calls)
        self.project(layer, media, calls)
        assert calls == [1, 1]

    def test_not_with_gradients(self, layer):
        media, calls = torch.randn(2, 4), []
        self.project(layer, media, calls)[0].sum().backward()
        self.project(layer, media, calls)[0].sum().backward()
        assert calls == [1, 1]

    @torch.no_grad()
    def test_each_layer_its_own(self, layer):
        media, other = torch.randn(2, 4), nn.ModuleDict({n: nn.Linear(4, 6, bias=False) for n in "kv"})
        self.project(layer, media)
        assert torch.equal(self.project(other, media)[0], other["k"](media))

    @torch.no_grad()
    def test_lives_no_longer_than_media_or_layer(self, layer):
        media = torch.randn(2, 4)
        k = weakref.ref(self.project(layer, media)[0])
        assert k() is not None
        del media
        gc.collect()
        assert k() is None
