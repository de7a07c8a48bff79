"""K and V of media: made anew for every text, kept for the tokens after it, and never of other numbers."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from flamingo_kernels import patch
from flamingo_kernels._kept import grows, kept_kv, newest, once, once_for_equal
from tests.helpers.families import FAMILIES, cross_attention, media_width

LOCATIONS = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]])


class Layer(nn.Module):
    """Two projections of media; `calls` counts how often they were made."""

    def __init__(self):
        super().__init__()
        self.k, self.v = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.calls = 0

    def project(self, media):
        self.calls += 1
        return self.k(media), self.v(media)

    def forward(self, media, step=True):
        return kept_kv(self, media, (self.k, self.v), lambda: self.project(media), step=step)


def refill(tensor):
    """New numbers as through NumPy: torch counts no change."""
    tensor.detach().numpy()[:] = torch.randn(tensor.shape).numpy()


def average(layer):
    """As a moving average of weights is written."""
    for parameter in layer.parameters():
        parameter.data.copy_(0.9 * parameter.data + 0.1 * torch.randn_like(parameter))


# What a user does to weights between two texts or two tokens.
CHANGES = {
    "in place": lambda layer: layer.v.weight.mul_(2),
    "moving average": average,
    "refilled": lambda layer: refill(layer.k.weight),
    "negated": lambda layer: layer.k.weight.data.neg_(),
    "assigned to .data": lambda layer: setattr(layer.v.weight, "data", torch.randn(6, 4)),
    "another parameter": lambda layer: setattr(layer.k, "weight", nn.Parameter(torch.randn(6, 4))),
    "another module": lambda layer: setattr(layer, "k", nn.Linear(4, 6, bias=False)),
    "loaded": lambda layer: layer.load_state_dict({n: 2 * t for n, t in layer.state_dict().items()}),
    "loaded and assigned": lambda layer: layer.load_state_dict(
        {n: 2 * t for n, t in layer.state_dict().items()}, assign=True
    ),
    "from a vector": lambda layer: vector_to_parameters(
        2 * parameters_to_vector(layer.parameters()), layer.parameters()
    ),
    "rounded": lambda layer: layer.bfloat16().float(),
    "a hook": lambda layer: layer.k.register_forward_hook(lambda module, args, out: out + 1),
    "a forward": lambda layer: setattr(layer.k, "forward", lambda x: x.repeat(1, 2)[:, :6]),
    "a parametrization": lambda layer: nn.utils.parametrizations.weight_norm(layer.k),
}


# Another view of 48 numbers than the first three rows of four.
OTHER_VIEWS = {
    "written to": lambda memory: memory.mul_(2)[:12].view(3, 4),
    "copied": lambda memory: memory.clone()[:12].view(3, 4),
    "of another dtype": lambda memory: memory.view(torch.int32)[:12].view(3, 4),
    "further on": lambda memory: memory[12:24].view(3, 4),
    "of fewer rows": lambda memory: memory[:8].view(2, 4),
    "of rows apart": lambda memory: memory.as_strided((3, 4), (8, 1)),
}


class TestKeptKV:
    @torch.no_grad()
    def test_a_text_projects_anew_and_its_tokens_do_not(self):
        layer, media = Layer(), torch.randn(2, 4)
        first = layer(media, step=False)
        assert all(layer(media)[0] is first[0] for _ in range(3))
        assert layer.calls == 1
        again = layer(media, step=False)
        assert again[0] is not first[0]
        assert layer(media)[0] is again[0]
        assert layer.calls == 2

    @torch.no_grad()
    def test_once_for_all_views_of_the_same_media(self):
        layer, media = Layer(), torch.randn(6, 4)
        first = layer(media.view(2, 3, 4))
        assert layer(media.view(3, 2, 4).view(2, 3, 4))[0] is first[0]
        assert layer(media.view(3, 2, 4))[0].shape == (3, 2, 6)

    @pytest.mark.parametrize("step", [True, False])
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    @torch.no_grad()
    def test_anew_after_a_change_of_weights(self, change, step):
        layer, media = Layer(), torch.randn(2, 4)
        layer(media, step=False)
        layer(media)
        change(layer)
        for ours, theirs in zip(layer(media, step), layer.project(media), strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize(
        "change", [lambda media: media.mul_(2), refill, lambda media: media.data.zero_()]
    )
    @torch.no_grad()
    def test_anew_after_a_change_of_media(self, change):
        layer, media = Layer(), torch.randn(2, 4)
        layer(media, step=False)
        change(media)
        assert torch.equal(layer(media)[0], layer.k(media))

    @pytest.mark.parametrize("at", [(..., -1), (-1, ...), (0, 1), (-1, -1)], ids=str)
    @torch.no_grad()
    def test_any_number_of_a_small_tensor(self, at):
        layer, media = Layer(), torch.randn(8000, 4)
        layer(media, step=False)
        media.data[at] += 1
        assert torch.equal(layer(media)[0], layer.k(media))

    @pytest.mark.parametrize("at", [(..., 1), (-1, ...)], ids=["a column", "the end"])
    @torch.no_grad()
    def test_parts_of_a_large_tensor(self, at):
        layer, media = Layer(), torch.randn(2, 16384, 4)
        layer(media, step=False)
        media.data[at] += 1
        assert torch.equal(layer(media)[0], layer.k(media))

    @torch.no_grad()
    def test_other_memory_at_an_old_address(self):
        """As a GPU, where no numbers are compared: by what a sample of them does not show."""
        holder, weight, source = nn.Identity(), torch.zeros(100000), torch.zeros(1)

        def total():
            return newest(holder, source, (weight,), lambda: weight.sum(), reuse=True)

        assert total() is total()
        numbers = weight.numpy()
        numbers[1] = 1
        weight.data = torch.from_numpy(numbers)
        assert total() == 1

    @pytest.mark.parametrize("other", OTHER_VIEWS.values(), ids=OTHER_VIEWS)
    @torch.no_grad()
    def test_what_differs_without_a_look_at_the_numbers(self, other, monkeypatch):
        monkeypatch.setattr("flamingo_kernels._kept._sample", lambda tensor: torch.zeros(1))
        holder, memory = nn.Identity(), torch.arange(48.0)

        def kept(tensor):
            return newest(holder, memory, (tensor,), object, reuse=True)

        first = kept(memory[:12].view(3, 4))
        assert kept(memory[:12].view(3, 4)) is first
        assert kept(other(memory)) is not first

    @torch.no_grad()
    def test_other_places_of_one_memory(self):
        layer, memory = Layer(), torch.zeros(200000)
        memory[80001] = 1  # where no sample looks
        square = memory[80000:80016].view(4, 4)
        for media in (memory[:80000].view(-1, 4), memory[80000:160000].view(-1, 4), square, square.T):
            assert torch.equal(layer(media)[0], layer.k(media))

    @torch.no_grad()
    def test_other_places_of_one_tensor(self):
        layer, every = Layer(), torch.randn(3, 2, 4)
        for media in (*every, *every.transpose(0, 1), every[:1].expand(3, 2, 4), every[:0]):
            assert torch.equal(layer(media)[0], layer.k(media))

    @pytest.mark.parametrize("first", [True, False])
    @torch.no_grad()
    def test_autocast_is_entered_or_left(self, first):
        layer, media = Layer(), torch.randn(2, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            layer(media, step=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=not first):
            k, _ = layer(media)
        assert k.dtype == (torch.float32 if first else torch.bfloat16)
        with torch.autocast("cpu", torch.float16):
            assert layer(media)[0].dtype == torch.float16

    @torch.no_grad()
    def test_parameters_that_live_for_one_call(self):
        layer, media = Layer(), torch.randn(2, 4)
        for _ in range(5):
            weights = {name: torch.randn(6, 4) for name in ("k.weight", "v.weight")}
            assert torch.equal(functional_call(layer, weights, media)[0], media @ weights["k.weight"].T)

    @torch.no_grad()
    def test_an_ensemble_by_vmap(self):
        layer, media, weights = Layer(), torch.randn(2, 4), torch.randn(3, 6, 4)
        for _ in range(2):
            k = vmap(lambda w: functional_call(layer, {"k.weight": w}, media)[0])(weights)
            torch.testing.assert_close(k, media @ weights.mT)
            k = vmap(lambda m: layer(m)[0])(torch.stack([media, 2 * media]))
            torch.testing.assert_close(k[1], 2 * layer.k(media))

    @torch.no_grad()
    def test_not_what_another_module_has_a_part_in(self):
        class Adapted(nn.Module):
            def __init__(self):
                super().__init__()
                self.base, self.enabled = nn.Linear(4, 6, bias=False), True

            def forward(self, x):
                return self.base(x) * (2 if self.enabled else 1)

        layer, media = Layer(), torch.randn(2, 4)
        layer.k = Adapted()
        layer(media)
        layer.k.enabled = False
        assert torch.equal(layer(media)[0], layer.k(media))

    @torch.no_grad()
    def test_not_what_an_own_class_computes_from_more_than_parameters(self):
        class Scaled(nn.Linear):
            factor = 1.0

            def forward(self, x):
                return super().forward(x) * self.factor

        layer, media = Layer(), torch.randn(2, 4)
        layer.k = Scaled(4, 6)
        layer(media)
        layer.k.factor = 2.0
        assert torch.equal(layer(media)[0], layer.k(media))

    @torch.no_grad()
    def test_what_another_class_computes_if_the_caller_knows_it(self):
        class Own(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        layer, media = Layer(), torch.randn(2, 4)
        layer.k = Own(4, 6)
        for known, calls in ((False, 2), (True, 3)):
            for _ in range(2):
                kept_kv(
                    layer,
                    media,
                    (layer.k, layer.v),
                    lambda: layer.project(media),
                    step=True,
                    also=lambda module, known=known: known and module is layer.k,
                )
            assert layer.calls == calls

    @torch.no_grad()
    def test_not_where_weights_may_be_sharded(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        layer, media = Layer(), torch.randn(2, 4)
        layer(media), layer(media)
        assert layer.calls == 2

    @pytest.mark.parametrize("what", ["weights", "media"])
    def test_tensors_of_inference_mode_count_no_changes(self, what):
        layer, media = Layer(), torch.randn(2, 4)
        with torch.inference_mode():
            if what == "weights":
                layer = Layer()
            else:
                media = torch.randn(2, 4)
        with torch.no_grad():
            assert torch.equal(layer(media)[0], layer(media)[0])
        assert layer.calls == 2

    def test_not_with_gradients(self):
        layer, media = Layer(), torch.randn(2, 4)
        layer(media)[0].sum().backward()
        layer(media)[0].sum().backward()
        assert layer.calls == 2

    @torch.no_grad()
    def test_each_layer_its_own(self):
        layer, other, media = Layer(), Layer(), torch.randn(2, 4)
        layer(media)
        assert torch.equal(other(media)[0], other.k(media))

    @torch.no_grad()
    def test_each_thread_its_own(self):
        """Of one model and of one tensor that a thread fills anew for each of its texts."""
        layer, media, found = Layer(), torch.randn(2, 4), []
        layer(media, step=False)
        thread = threading.Thread(target=torch.no_grad()(lambda: found.append(layer(media)[0])))
        thread.start()
        thread.join()
        assert found[0] is not layer(media)[0]
        assert layer.calls == 2

    @torch.no_grad()
    def test_each_stream_its_own(self, monkeypatch):
        """A kernel on one stream does not wait for what another computes."""
        layer, media, stream, reads = Layer(), torch.randn(2, 4), [1], []
        monkeypatch.setattr("flamingo_kernels._kept.current_stream", lambda tensor: stream[0])

        def read(tensor):
            reads.append(stream[0])
            return object()

        for name in ("a", "b"):
            layer(media), once(read, (media,), layer=name)
        assert (layer.calls, reads) == (1, [1])
        stream[0] = 2
        layer(media), once(read, (media,), layer="c")
        assert (layer.calls, reads) == (2, [1, 2])

    @torch.no_grad()
    def test_only_the_newest_and_no_longer_than_media_or_layer(self):
        layer, held = Layer(), [torch.randn(2, 4) for _ in range(3)]
        kept = [weakref.ref(layer(media, step=False)[0]) for media in held]
        assert [k() is None for k in kept] == [True, True, False]
        held.pop()
        assert kept[-1]() is None
        k, layer = weakref.ref(layer(held[0])[0]), None
        gc.collect()
        assert k() is None

    @torch.no_grad()
    def test_the_last_goes_before_the_next_is_made(self):
        """Two would need twice the memory."""
        holder, source, alive = nn.Identity(), torch.zeros(1), []
        first = weakref.ref(newest(holder, source, (), lambda: torch.ones(1), reuse=False))
        newest(holder, source, (), lambda: alive.append(first() is not None), reuse=False)
        assert alive == [False]

    @torch.no_grad()
    def test_weights_may_still_be_swapped_and_die(self):
        layer, media = Layer(), torch.randn(2, 4)
        layer(media)
        torch.utils.swap_tensors(layer.k.weight, nn.Parameter(torch.randn(6, 4)))  # takes no weak references
        assert torch.equal(layer(media)[0], layer.k(media))
        memory = weakref.ref(layer.v.weight)
        layer.v.weight = nn.Parameter(torch.randn(6, 4))
        assert memory() is None

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    @torch.no_grad()
    def test_a_copy_has_weights_and_nothing_else(self, duplicate):
        layer, media = Layer(), torch.randn(2, 4)
        layer(media)
        again = duplicate(layer)
        again.k.weight.zero_()
        assert not again(media)[0].any()
        assert layer(media)[0].any()


def read(*arguments):
    return object()


class TestOnce:
    def test_a_layer_that_asks_twice_begins_another_pass(self):
        mask = torch.zeros(2)
        first, same, second, again, last = (once(read, (mask,), layer=name) for name in "abbac")
        assert first is same
        assert second is again is last is not first

    def test_for_equal_tensors_of_one_dtype_and_the_same_options(self):
        mask = torch.zeros(3)
        first = once_for_equal(read, (mask,), 1)
        assert once_for_equal(read, (mask.clone(),), 1) is first
        assert once_for_equal(read, (mask,), 2) is not first
        numbers = once_for_equal(read, (mask,), 1)
        assert once_for_equal(read, (mask.bool(),), 1) is not numbers  # equal to torch
        before = once_for_equal(read, (mask,), 1)
        mask[0] = 1
        assert once_for_equal(read, (mask,), 1) is not before

    def test_anew_after_a_change_in_place(self):
        mask = torch.zeros(2)
        first = once(read, (mask,), layer="a")
        assert once(read, (mask,), layer="b") is first
        mask[0] = 1
        assert once(read, (mask,), layer="c") is not first

    def test_what_inference_mode_has_made_serves_nothing_else(self):
        mask = torch.zeros(2)
        with torch.inference_mode():
            first, equal = once(read, (mask,), layer="a"), once_for_equal(read, (mask,))
        assert once(read, (mask,), layer="b") is not first
        assert once_for_equal(read, (mask,)) is not equal

    def test_tensors_of_inference_mode_count_no_changes(self):
        with torch.inference_mode():
            mask = torch.zeros(2)
            first = once(read, (mask,), layer="a")
            mask[0] = 1
            assert once(read, (mask,), layer="b") is not first

    def test_what_a_tensor_was_made_of_may_die(self):
        weight = torch.zeros(3, requires_grad=True)
        once_for_equal(read, (2 * weight,))
        memory = weakref.ref(weight)
        del weight
        assert memory() is None


class TestBlocks:
    """What a block does with K and V that it keeps, against the module that keeps none."""

    @pytest.fixture(params=FAMILIES)
    def family(self, request):
        return request.param

    def pair(self, family):
        original = cross_attention(family)
        fused = copy.deepcopy(original)
        patch(fused)
        return original, fused, torch.randn(2, 2, 5, media_width(family))

    @pytest.mark.parametrize("length", [1, 5])
    @torch.no_grad()
    def test_every_text_sees_new_weights(self, family, length):
        """A text of one token, too, as long as it does not say that it follows another."""
        original, fused, media = self.pair(family)
        x = torch.randn(2, length, original.attn.to_q.in_features)
        for _ in range(3):
            torch.testing.assert_close(
                fused(x, media, LOCATIONS[:, :length]),
                original(x, media, LOCATIONS[:, :length]),
                rtol=1e-4,
                atol=1e-4,  # weights grow with every text
            )
            for weight, other in zip(fused.parameters(), original.parameters(), strict=True):
                weight.data[..., -1] += 1  # a few numbers, not counted
                other.data[..., -1] += 1

    @torch.no_grad()
    def test_texts_about_media_in_turns(self, family):
        if family == "flamingo_pytorch":
            pytest.skip("its blocks know no cached media")
        original, fused, _ = self.pair(family)
        width, visual = original.attn.to_q.in_features, original.attn.to_kv.in_features
        every = [torch.randn(2, 2, 5, visual) for _ in range(2)]
        for media in every:
            x = torch.randn(2, 5, width)
            torch.testing.assert_close(fused(x, media, LOCATIONS), original(x, media, LOCATIONS))
        for media in (*every, *every):
            x = torch.randn(2, 1, width)
            torch.testing.assert_close(fused(x, media, LOCATIONS, True), original(x, media, LOCATIONS, True))


def test_a_text_that_grows():
    """Each holder has its own, in each thread."""
    holders = nn.Linear(1, 1), nn.Linear(1, 1)
    assert [grows(holders[0], length) for length in (3, 4, 4, 6, 5, 6)] == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    assert not grows(holders[1], 7)
    found = []
    thread = threading.Thread(target=lambda: found.append(grows(holders[0], 9)))
    thread.start()
    thread.join()
    assert found == [False]
