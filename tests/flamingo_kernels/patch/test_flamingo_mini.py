"""flamingo-mini: text that comes with keys and values, and what it gives back."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels import MediaCache
from flamingo_kernels.layers.decode import Step
from tests.helpers.copies import assert_a_trial_finds, known, pair
from tests.helpers.lookalikes import VISUAL, GatedAndGives, LooksAndGives, ReadsApart

LAYERS = (LooksAndGives, GatedAndGives)
PLACES = {
    "images": torch.tensor([[0, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0]]).bool(),
    "more images than media": torch.tensor([[1, 1, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 0, 0]]).bool(),
    "no image": torch.zeros(2, 7, dtype=torch.bool),
}


@pytest.fixture(scope="module", autouse=True)
def of_known_code():
    with known(*LAYERS, ReadsApart):
        yield


def inputs(batch=2, text=7):
    random = torch.Generator().manual_seed(5)
    shapes = (batch, text, 16), (batch, 3, 4, VISUAL)
    return [torch.randn(*shape, generator=random, requires_grad=True) for shape in shapes]


def call(layer, y, media, places, *rest, **flags):
    """The two have different orders of arguments."""
    given = (media, places) if isinstance(layer, GatedAndGives) else (places, media)
    return layer(y, *given, *rest, **flags)


def assert_alike(results, tolerance=1e-4):
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * a.abs().max().item())


@pytest.mark.parametrize("cls", LAYERS)
class TestResults:
    @pytest.mark.parametrize("name", PLACES)
    def test_with_gradients(self, cls, name):
        results = []
        for layer in pair(cls):
            y, media = inputs()
            out, (k, v) = call(layer, y, media, PLACES[name], output_kv=True)
            (out.square().sum() + k.square().sum() + v.sin().sum()).backward()
            results.append([out, k, v, y.grad, media.grad, *(each.grad for each in layer.parameters())])
        assert_alike(results)

    @pytest.mark.parametrize("name", PLACES)
    def test_a_generation(self, cls, name):
        """Keys and values go from step to step, and a new image may come that has none."""
        results = []
        for layer in pair(cls):
            y, media = inputs()
            with torch.no_grad():
                out, kv = call(layer, y, media, PLACES[name], output_kv=True)
                results.append([out])
                places = PLACES[name]
                for new in (0, 0, 1, 0):
                    places = torch.cat([places, torch.full((2, 1), bool(new))], 1)
                    out, kv = call(layer, y[:, :1], media, places, previous_kv=kv, output_kv=True)
                    results[-1] += [out, *kv]
                out, none = call(layer, y[:, :3], media, places, previous_kv=kv)
                results[-1] += [out, none]
        assert_alike(results)

    def test_under_autocast(self, cls):
        results = []
        for layer in pair(cls):
            y, media = inputs()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                out, kv = call(layer, y, media, PLACES["images"], output_kv=True)
                results.append([out, *kv, call(layer, y[:, :1], media, PLACES["images"], kv)[0]])
        assert_alike(results, 3e-2)

    def test_numbers_add_up(self, cls):
        results = []
        for layer in pair(cls):
            y, media = inputs()
            results.append([call(layer, y, media, PLACES["images"].long() * 2)[0]])
        assert_alike(results)

    def test_hooks_see_the_calls(self, cls):
        original, swapped = pair(cls)
        seen = []
        getattr(swapped, "attn", swapped).to_q.register_forward_hook(lambda *_: seen.append(1))
        y, media = inputs()
        assert_alike([[call(each, y, media, PLACES["images"])[0]] for each in (original, swapped)])
        assert seen == [1]

    def test_media_cache(self, cls):
        _, swapped = pair(cls)
        y, media = inputs()
        with torch.no_grad():
            cached = call(swapped, y, MediaCache(swapped, media), PLACES["images"], output_kv=True)
            made = call(swapped, y, media, PLACES["images"], output_kv=True)
        assert_alike([[out, *kv] for out, kv in (cached, made)])

    @pytest.mark.parametrize("how", ["latents", "places", "places of keys", "keys"])
    def test_what_does_not_fit_fails_as_before(self, cls, how):
        for layer in pair(cls):
            y, media = inputs()
            _, kv = call(layer, y, media, PLACES["images"], output_kv=True)
            places, given = PLACES["images"], None
            if how == "latents":
                media = media[:, :, :3]
            elif how == "places":
                places = torch.cat([places, places], 1)
            else:
                given = tuple(each[:, :, :-1] for each in kv) if how == "keys" else kv
                places = places if how == "keys" else places[:, :4]
            with pytest.raises(RuntimeError):
                call(layer, y, media, places, given)


def test_a_token_is_one_operator(monkeypatch):
    _, swapped = pair(GatedAndGives)
    steps = []
    run = Step.run
    monkeypatch.setattr(Step, "run", lambda step, *given: steps.append(run(step, *given)) or steps[-1])
    y, media = inputs()
    with torch.no_grad():
        _, kv = call(swapped, y, media, PLACES["images"], output_kv=True)
        call(swapped, y[:, :1], media, PLACES["images"], previous_kv=kv)
    assert len(steps) == 1
    assert steps[0] is not None


class TestResampler:
    def test_same(self):
        results = []
        for layer in pair(ReadsApart):
            random = torch.Generator().manual_seed(6)
            x, latents = (torch.randn(3, n, 16, generator=random, requires_grad=True) for n in (9, 4))
            out = layer(x, latents)
            out.square().sum().backward()
            results.append([out, x.grad, latents.grad, *(each.grad for each in layer.parameters())])
        assert_alike(results)

    def test_its_asserts(self):
        for layer in pair(ReadsApart):
            with pytest.raises(AssertionError, match="three dimensions"):
                layer(torch.randn(3, 2, 9, 16), torch.randn(3, 4, 16))


@pytest.mark.parametrize(
    ("cls", "parts"), [(LooksAndGives, ()), (GatedAndGives, (LooksAndGives,)), (ReadsApart, ())]
)
def test_a_trial_finds_the_same(cls, parts):
    assert_a_trial_finds(cls, *parts)
