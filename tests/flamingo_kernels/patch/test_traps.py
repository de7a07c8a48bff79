"""Classes that look like known ones and compute something else: none is swapped, whatever the caller says.

Each trap replaces one step of a class that computes what it should. It is found in public code, or is what
one could do to pass a trial.
"""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flamingo_kernels import UnsupportedError, patch
from flamingo_kernels.layers import Fused
from tests.helpers.lookalikes import (
    Gated,
    LooksAtMedia,
    Reads,
    Sums,
    feed_forward,
    inputs,
    make,
    target,
)


def refused(cls, **options):
    """The reason why a class is not what the caller says; a module of it stays as it is."""
    module = make(cls, **options)
    before, classes = copy.deepcopy(module.state_dict()), [type(each) for each in module.modules()]
    luck = torch.get_rng_state(), random.getstate()
    with pytest.raises(UnsupportedError) as raised:
        patch(module, like={cls: target(cls)})
    assert [type(each) for each in module.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), luck[0])
    assert random.getstate() == luck[1]
    start, _, reason = str(raised.value).partition(", but ")
    assert start == f"patch: like says that {cls.__module__}.{cls.__qualname__} is a {target(cls)}"
    return reason


def swapped(cls, **options):
    """A module of a class with a small difference that changes nothing, and the same one as it was."""
    module = make(cls, **options)
    original = copy.deepcopy(module)
    report = patch(module, like={cls: target(cls)})
    assert isinstance(module, Fused)
    assert "a trial of" in report.notes[""]
    return module, original


def assert_same(module, original, **sizes):
    """Results and gradients, in training and in evaluation, and steps after a text."""
    for mode in (True, False):
        results = []
        for each in (module, original):
            each.train(mode)
            tensors = inputs(each, **sizes)
            out = each(*tensors)
            out.square().sum().backward()
            results.append([out, *(each.grad for each in tensors if each.requires_grad)])
            results[-1] += [weight.grad.clone() for weight in each.parameters()]
            if isinstance(each, (LooksAtMedia, Gated)):
                with torch.no_grad():
                    results[-1].append(each(tensors[0][:, :1], *tensors[1:], use_cached_media=True))
            each.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


# Masked cross-attention


class ThirdImageLate(LooksAtMedia):
    def times(self, x, places, follows):
        times = super().times(x, places, follows)
        return times - (times > 2).long()


class SeesTheNext(LooksAtMedia):
    def times(self, x, places, follows):
        return super().times(x, places, follows) + ~places


class CountsFromTheEnd(LooksAtMedia):
    def times(self, x, places, follows):
        return places.flip(1).cumsum(1).flip(1)


class SeesTheLastThree(LooksAtMedia):
    def visible(self, times, media):
        number = torch.arange(1, media.shape[1] + 1).repeat_interleave(media.shape[2])
        return super().visible(times, media) & (times[..., None] - number < 3)


class SeesTheLastTen(LooksAtMedia):
    def visible(self, times, media):
        number = torch.arange(1, media.shape[1] + 1).repeat_interleave(media.shape[2])
        return super().visible(times, media) & (times[..., None] - number < 10)


class StepsSeeTheFirstImage(LooksAtMedia):
    def times(self, x, places, follows):
        return super().times(x, places, follows).clamp(max=1 if follows else None)


class StepsForgetTheText(LooksAtMedia):
    """As in the first release: a step counts its own images, and it has none."""

    def times(self, x, places, follows):
        times = super().times(x, places, follows)
        return times * 0 if follows else times


class LongerLocations(LooksAtMedia):
    def times(self, x, places, follows):
        return super().times(x, places, follows)[:, -x.shape[1] :]


class NoRowIsZero(LooksAtMedia):
    def result(self, x, media, places, follows):
        immediate, scores = self.only_attend_immediate_media, self.scores(self.queries(x), self.keys(media))
        if places is not None:
            seen = self.visible(self.times(x, places, follows), media)[:, None]
            scores = scores.masked_fill(~seen, self.hidden(scores))
        assert immediate in (True, False)
        return self.read(scores.softmax(-1), media)


class HidesByInfinity(LooksAtMedia):
    def hidden(self, scores):
        return -torch.inf


class HidesBySomeNumber(LooksAtMedia):
    def hidden(self, scores):
        return -30.0


class OnlyBooleans(LooksAtMedia):
    def times(self, x, places, follows):
        return super().times(x, ~~places & 1 if places.dtype == torch.bool else ~places, follows)


class SameImageAlways(LooksAtMedia):
    """Ignores the flag that it has."""

    def visible(self, times, media):
        number = torch.arange(1, media.shape[1] + 1).repeat_interleave(media.shape[2])
        return times[..., None] == number


class HidesBlankMedia(LooksAtMedia):
    """Takes media of zeros for padding."""

    def visible(self, times, media):
        there = media.abs().sum((-1, -2)) > 0
        return super().visible(times, media) & there.repeat_interleave(media.shape[2], 1)[:, None]


class NormedValues(LooksAtMedia):
    def values(self, media):
        return super().values(F.layer_norm(media, media.shape[-1:]))


class NormedKeys(LooksAtMedia):
    def keys(self, media):
        return super().keys(F.layer_norm(media, media.shape[-1:]))


class RawQueries(LooksAtMedia):
    def queries(self, x):
        return split_queries(self, x)


def split_queries(attn, x):
    return attn.to_q(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)


class ResidualWithin(LooksAtMedia):
    def result(self, x, media, places, follows):
        return x + super().result(x, media, places, follows)


class KeysAndValuesExchanged(LooksAtMedia):
    def keys(self, media):
        return super().values(media)

    def values(self, media):
        return super().keys(media)


class ScaleOfItsOwn(LooksAtMedia):
    def scores(self, q, k):
        return q @ k.transpose(-1, -2) / 8


class SoftCap(LooksAtMedia):
    def scores(self, q, k):
        return 1000 * (super().scores(q, k) / 1000).tanh()


class ClampsMedia(LooksAtMedia):
    def values(self, media):
        return super().values(media.clamp(-50, 50))


class Dropout(LooksAtMedia):
    def read(self, p, media):
        return super().read(F.dropout(p, 0.05, self.training), media)


class TrainsDifferently(LooksAtMedia):
    def read(self, p, media):
        return super().read(p * 0.99 if self.training else p, media)


class SometimesSeesTheNext(LooksAtMedia):
    def times(self, x, places, follows):
        return super().times(x, places, follows) + int(torch.rand(()) < 0.001)


class SometimesSeesTheNextByPython(LooksAtMedia):
    def times(self, x, places, follows):
        return super().times(x, places, follows) + int(random.random() < 0.001)


class KeepsTheWeights(LooksAtMedia):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.attn = None

    def read(self, p, media):
        self.attn = p.detach()
        return super().read(p, media)


class KeepsAList(LooksAtMedia):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.calls = []

    def read(self, p, media):
        self.calls.append(len(p))
        return super().read(p, media)


class ShrinksItsWeights(LooksAtMedia):
    def read(self, p, media):
        self.to_out.weight.data.mul_(0.9)
        return super().read(p, media)


class MarksTheFirst(LooksAtMedia):
    def times(self, x, places, follows):
        places.data[:, 0] = True
        return super().times(x, places, follows)


class WaitsForABias(LooksAtMedia):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.bias = None

    def scores(self, q, k):
        scores = super().scores(q, k)
        return scores if self.bias is None else scores + self.bias


class MayGetABias(LooksAtMedia):
    def scores(self, q, k):
        return super().scores(q, k) + getattr(self, "bias", 0)


class HasAWindow(LooksAtMedia):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.window = 1000

    def visible(self, times, media):
        return super().visible(times, media) & (times[..., None] < self.window)


class HasAMode(LooksAtMedia):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mode = "plain"

    def scores(self, q, k):
        return super().scores(q, k) * (2 if self.mode == "double" else 1)


class Settings:
    double = False


class HasSettings(LooksAtMedia):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.settings = Settings()

    def scores(self, q, k):
        return super().scores(q, k) * (2 if self.settings.double else 1)


class HasAFlag(LooksAtMedia):
    def __init__(self, double=False, **sizes):
        super().__init__(**sizes)
        self.double = double

    def scores(self, q, k):
        return super().scores(q, k) * (2 if self.double else 1)


class HasAFlagOfTheClass(LooksAtMedia):
    double = False

    def scores(self, q, k):
        return super().scores(q, k) * (2 if self.double else 1)


class HasTwoFlags(LooksAtMedia):
    one = other = False

    def scores(self, q, k):
        return super().scores(q, k) * (2 if self.one and self.other else 1)


class NoGradientToKeys(LooksAtMedia):
    def keys(self, media):
        return super().keys(media).detach()


class NoGradientToMedia(LooksAtMedia):
    def values(self, media):
        return super().values(media.detach())


class NoGradient(LooksAtMedia):
    @torch.no_grad()
    def result(self, x, media, places, follows):
        return super().result(x, media, places, follows)


class OtherInBfloat16(LooksAtMedia):
    def scores(self, q, k):
        return super().scores(q, k) * (2 if q.dtype == torch.bfloat16 else 1)


class OtherInSingle(LooksAtMedia):
    def scores(self, q, k):
        return super().scores(q, k) * (2 if q.dtype == torch.float32 else 1)


class AlmostTheSame(LooksAtMedia):
    def scores(self, q, k):
        return super().scores(q, k) * 1.01


class OtherInHalf(LooksAtMedia):
    def scores(self, q, k):
        return super().scores(q, k) * (2 if q.dtype == torch.float16 else 1)


class OtherWithoutGradients(LooksAtMedia):
    def scores(self, q, k):
        return super().scores(q, k) * (1 if torch.is_grad_enabled() else 2)


class OnlyInHalf(LooksAtMedia):
    """As with kernels that take no other dtype; there too little can be seen."""

    def scores(self, q, k):
        assert q.dtype in (torch.float16, torch.bfloat16)
        return super().scores(q, k) * 1.01


class WritesOverTheText(LooksAtMedia):
    def queries(self, x):
        return super().queries(x.mul_(2))


class FullPrecision(LooksAtMedia):
    """Leaves autocast."""

    def result(self, x, media, places, follows):
        with torch.autocast("cpu", enabled=False):
            return super().result(x, media, places, follows)


class SqueezesOne(LooksAtMedia):
    def read(self, p, media):
        return super().read(p, media) * (2 if len(p) == 1 else 1)


class OtherForThree(LooksAtMedia):
    def read(self, p, media):
        return super().read(p, media) * (2 if len(p) > 2 else 1)


class OtherForManyMedia(LooksAtMedia):
    def read(self, p, media):
        return super().read(p, media) * (2 if media.shape[1] > 8 else 1)


class OtherForLongText(LooksAtMedia):
    def read(self, p, media):
        return super().read(p, media) * (2 if p.shape[2] > 256 else 1)


class OtherForManyLatents(LooksAtMedia):
    def read(self, p, media):
        return super().read(p, media) * (2 if media.shape[2] > 64 else 1)


class GivesAPair(LooksAtMedia):
    def result(self, x, media, places, follows):
        return super().result(x, media, places, follows), None


class Louder(LooksAtMedia):
    """Its call is more than its forward, which a block would not run."""

    def __call__(self, *args, **options):
        return 2 * super().__call__(*args, **options)


class CannotBeCopied(LooksAtMedia):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.lock = threading.Lock()


class Registered(LooksAtMedia):
    """Its subclasses must have names of their own."""

    names = set()

    def __init_subclass__(cls):
        if cls.__name__ in Registered.names:
            raise KeyError(f"{cls.__name__} is taken")
        Registered.names.add(cls.__name__)


class RegisteredToo(Registered):
    """Such a subclass."""


class OneMore(LooksAtMedia):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.projection = nn.Linear(12, 12)


class OneMoreTensor(LooksAtMedia):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("shift", torch.zeros(1))


class AttendPrevious(LooksAtMedia):
    def forward(self, x, media, media_locations=None, attend_previous=True):
        return self.result(x, media, media_locations, False)


class MediaMask(LooksAtMedia):
    def forward(self, x, media, media_mask=None, media_locations=None):
        return self.result(x, media, media_locations, False)


class AnyOptions(LooksAtMedia):
    def forward(self, x, media, media_locations=None, use_cached_media=False, **options):
        return self.result(x, media, media_locations, use_cached_media) * options.get("factor", 1)


class FollowsByDefault(LooksAtMedia):
    def forward(self, x, media, media_locations=None, use_cached_media=True):
        return self.result(x, media, media_locations, use_cached_media)


class MediaFirst(LooksAtMedia):
    def forward(self, media, x, media_locations=None, use_cached_media=False):
        return self.result(x, media, media_locations, use_cached_media)


class NeedsMore(LooksAtMedia):
    def __init__(self, *, config, **sizes):
        super().__init__(**sizes)


# A block


class PlainGate(Gated):
    def add_media(self, x, *media):
        return x + self.attn_gate * self.attn(x, *media)


class OneGate(Gated):
    def add_feed_forward(self, x):
        return x + self.attn_gate.tanh() * self.ff(x)


class NoResidual(Gated):
    def add_media(self, x, *media):
        return self.attn_gate.tanh() * self.attn(x, *media)


class FrozenGate(Gated):
    def add_feed_forward(self, x):
        return x + self.ff_gate.detach().tanh() * self.ff(x)


class Parallel(Gated):
    def forward(self, x, media, media_locations=None, use_cached_media=False):
        attended = self.add_media(x, media, media_locations, use_cached_media)
        return attended + self.add_feed_forward(x) - x


class NeverFollows(Gated):
    def add_media(self, x, media, places, follows):
        return super().add_media(x, media, places[:, : x.shape[1]] if follows else places, False)


class SkipsTheAttention(Gated):
    """Right while text sees the last image only: without one its attention is zero."""

    def add_media(self, x, media, places, follows):
        skip = places is not None and not places.any()
        return x if skip else super().add_media(x, media, places, follows)


class SkipsTheRest(Gated):
    def forward(self, x, media, media_locations=None, use_cached_media=False):
        if media_locations is not None and not media_locations.any():
            return x
        return super().forward(x, media, media_locations, use_cached_media)


# Attention of latents


class LatentsNotAmongKeys(Reads):
    def seen(self, x, latents):
        return x


class LatentsFirst(Reads):
    """Harmless: no position tells keys apart."""

    def seen(self, x, latents):
        return torch.cat((latents, x), -2)


class SoftmaxInFloat32(Reads):
    """Harmless, though in float64 it is less exact."""

    def weights(self, scores):
        return scores.float().softmax(-1).to(scores.dtype)


class RootOnBoth(Reads):
    """Harmless: the product of the factors is the scale."""

    def scores(self, q, k):
        root = self.scale**0.5
        return (q * root) @ (k * root).transpose(-1, -2)


class ScaleUnused(Reads):
    """Harmless as long as its scale is the usual one."""

    def scores(self, q, k):
        return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


class ScaleUnusedAndOther(ScaleUnused):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.scale = 8.0


class HarmlessFlag(Reads):
    fast = False

    def weights(self, scores):
        return torch.softmax(scores, -1) if self.fast else scores.softmax(-1)


class KnowsItsSizes(Reads):
    def __init__(self, *, dim, dim_head=64, heads=8):
        super().__init__(dim=dim, dim_head=dim_head, heads=heads)
        self.dim_head, self.inner = dim_head, dim_head * heads

    def scores(self, q, k):
        assert q.shape[-1] == self.dim_head
        assert self.inner == self.to_q.out_features
        return super().scores(q, k)


class OneNorm(Reads):
    def forward(self, x, latents):
        return self.result(self.norm_media(x), self.norm_media(latents))


class ResidualAfterTheNorm(Reads):
    def result(self, x, latents):
        return latents + super().result(x, latents)


class SoftCapOfLatents(Reads):
    def scores(self, q, k):
        return 1000 * (super().scores(q, k) / 1000).tanh()


class NormOfItsOwn(Reads):
    """The norm's attribute says another eps than its function has, which shows in small numbers."""

    def forward(self, x, latents):
        norm = F.layer_norm(x, x.shape[-1:], self.norm_media.weight, self.norm_media.bias, eps=1e-3)
        return self.result(norm, self.norm_latents(latents))


class LatentsComeFirst(Reads):
    def forward(self, latents, x):
        return super().forward(x, latents)


class HidesBlankFeatures(Reads):
    """Takes features of zeros for padding."""

    def forward(self, x, latents):
        return super().forward(
            torch.where(x.abs().sum(-1, keepdim=True) > 0, x, torch.arange(x.shape[-1])), latents
        )


class RolesExchanged(Reads):
    def forward(self, x, latents):
        return super().forward(latents, x)


class WithAMask(Reads):
    def forward(self, x, latents, vision_attn_masks=None):
        return super().forward(x, latents)


class OtherNames(Reads):
    def forward(self, features, queries):
        return super().forward(features, queries)


class OneOfAll(type):
    """Gives every caller the same projections."""

    def __call__(cls, *args, **sizes):
        made = super().__call__(*args, **sizes)
        for name, part in cls.__dict__.get("shared", made._modules).items():
            setattr(made, name, part)
        cls.shared = dict(made._modules)
        return made


class Shared(Reads, metaclass=OneOfAll):
    """Whose new instances have the projections of the first."""


# A resampler


class NoLastNorm(Sums):
    def last(self, latents):
        return latents


class NetworkWithoutResidual(Sums):
    def step(self, number, attn, ff, x, latents):
        return ff(latents + attn(x, latents))


class ResidualAfterNorm(Sums):
    def step(self, number, attn, ff, x, latents):
        normed = attn.norm_latents(latents)
        return super().step(number, attn, ff, x, latents) - latents + normed


class FirstLayerAgain(Sums):
    """Differs in the third layer alone."""

    def step(self, number, attn, ff, x, latents):
        return super().step(number, self.layers[0][0] if number == 2 else attn, ff, x, latents)


class ArgumentsExchanged(Sums):
    def step(self, number, attn, ff, x, latents):
        latents = latents + attn(latents, x)[..., : latents.shape[-2], :] if x.shape == latents.shape else x
        return latents + ff(latents)


class PositionsLast(Sums):
    def positioned(self, x):
        positions = 0 if self.media_time_embs is None else self.media_time_embs[-x.shape[1] :]
        return super().positioned(x) * 0 + x.flatten(2, 3) + positions


class ProjectsFirst(Sums):
    def __init__(self, dim_inner=None, **sizes):
        super().__init__(**sizes)
        self.projection = nn.Linear(sizes["dim"], sizes["dim"])

    def positioned(self, x):
        return super().positioned(self.projection(x))


class SkipsTheIdentity(Sums):
    def step(self, number, attn, ff, x, latents):
        latents = latents + attn(x, latents)
        return latents if isinstance(ff, nn.Identity) else latents + ff(latents)


class OtherActivation(Sums):
    """Harmless: its networks are called as they are."""

    def network(self, dim, mult):
        network = feed_forward(dim, mult)
        network[2] = nn.SiLU()
        return network


def differs(call):
    return f'in the call "{call}" of a trial in evaluation and float64, the result differs'


USUAL = differs("text before, at and after images")
LATENTS = differs("more features than latents")
FRAMES = differs("media of one frame")


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ThirdImageLate, USUAL),
        (SeesTheNext, USUAL),
        (CountsFromTheEnd, USUAL),
        (SeesTheLastThree, "with only_attend_immediate_media turned, the result differs"),
        (SeesTheLastTen, 'in the call "many images"'),
        (StepsSeeTheFirstImage, differs("a step after images")),
        (StepsForgetTheText, differs("a step after images")),
        (LongerLocations, 'the call "fewer tokens than locations" is one that the fused class refuses'),
        (NoRowIsZero, USUAL),
        (HidesByInfinity, differs("more images than media")),
        (HidesBySomeNumber, 'in the call "large media"'),
        (OnlyBooleans, differs("locations as numbers")),
        (SameImageAlways, "with only_attend_immediate_media turned, the result differs"),
        (HidesBlankMedia, differs("a blank medium")),
        (NormedValues, USUAL),
        (NormedKeys, USUAL),
        (RawQueries, USUAL),
        (ResidualWithin, USUAL),
        (KeysAndValuesExchanged, USUAL),
        (ScaleOfItsOwn, USUAL),
        (SoftCap, "the result differs"),
        (ClampsMedia, differs("large media")),
        (Dropout, "it draws random numbers"),
        (TrainsDifferently, "in training and float64, the result differs"),
        (SometimesSeesTheNext, "it draws random numbers"),
        (SometimesSeesTheNextByPython, "it draws random numbers"),
        (KeepsTheWeights, "its forward writes attn on the module"),
        (KeepsAList, "its forward writes calls on the module"),
        (ShrinksItsWeights, "the result differs"),
        (MarksTheFirst, "it writes into its inputs"),
        (WaitsForABias, "its forward reads bias, which the fused class does not"),
        (MayGetABias, "its forward reads bias, which the fused class does not"),
        (HasAWindow, "its forward reads window, which the fused class does not"),
        (HasAMode, "its forward reads mode, which the fused class does not"),
        (HasSettings, "its forward reads settings, which the fused class does not"),
        (HasAFlag, "with double turned, the result differs"),
        (HasAFlagOfTheClass, "with double turned, the result differs"),
        (HasTwoFlags, "with one and other turned, the result differs"),
        (NoGradientToKeys, "the gradient of input 1 differs"),
        (NoGradientToMedia, "the gradient of input 1 differs"),
        (NoGradient, "without gradient, and by the fused class"),
        (OtherInBfloat16, "in evaluation and bfloat16, the result differs"),
        (OtherInSingle, "in evaluation and float32, the result differs"),
        (AlmostTheSame, USUAL),
        (OtherInHalf, "in evaluation and float16, the result differs"),
        (OtherWithoutGradients, "with large weights, the result differs"),
        (FullPrecision, "in evaluation and float32 under autocast, the result is torch.float32"),
        (SqueezesOne, differs("one sequence")),
        (OtherForThree, differs("many images")),
        (OtherForManyMedia, differs("many images")),
        (OtherForLongText, differs("long text")),
        (OtherForManyLatents, differs("long text")),
        (GivesAPair, "NoneType, and by the fused class"),
        (CannotBeCopied, "no small one can be made for a trial (TypeError: "),
        (RegisteredToo, "a trial of it fails (KeyError: "),
        (OneMore, "projection is not one of its parts"),
        (OneMoreTensor, "shift is not one of its parts"),
        (AttendPrevious, "its forward takes attend_previous, which is not known"),
        (MediaMask, "its forward takes media_mask, which is not known"),
        (AnyOptions, "its forward takes any names, which is not known"),
        (FollowsByDefault, "its forward takes use_cached_media=True by default"),
        (MediaFirst, "its forward takes media in another place"),
        (PlainGate, USUAL),
        (OneGate, USUAL),
        (NoResidual, USUAL),
        (FrozenGate, "the gradient of weight ff_gate differs"),
        (Parallel, USUAL),
        (NeverFollows, differs("a step after images")),
        (SkipsTheRest, differs("no image")),
        (SkipsTheAttention, "with only_attend_immediate_media turned, the result differs"),
        (OnlyInHalf, "it computes none of the calls of a trial in evaluation and float64"),
        (WritesOverTheText, "it writes into its inputs"),
        (LatentsNotAmongKeys, LATENTS),
        (ScaleUnusedAndOther, LATENTS),
        (OneNorm, LATENTS),
        (ResidualAfterTheNorm, LATENTS),
        (SoftCapOfLatents, "with large weights, the result differs"),
        (NormOfItsOwn, LATENTS),
        (HidesBlankFeatures, differs("a blank medium")),
        (LatentsComeFirst, "its forward takes latents in another place"),
        (RolesExchanged, "the result is torch.float64 (2, 2, 5, 12)"),
        (WithAMask, "its forward takes vision_attn_masks, which is not known"),
        (OtherNames, "its forward takes features, which is not known"),
        (Shared, "a new one shares weights with the others"),
        (NoLastNorm, FRAMES),
        (NetworkWithoutResidual, FRAMES),
        (ResidualAfterNorm, FRAMES),
        (FirstLayerAgain, FRAMES),
        (ProjectsFirst, "projection is not one of its parts"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_refused(cls, reason):
    assert reason in refused(cls)


def test_gates_at_zero_hide_nothing():
    """A fresh block adds nothing yet, and computes the same as any other."""
    block = PlainGate(dim=16, dim_visual=12, dim_head=8, heads=2)
    assert not block.attn_gate.any()
    with pytest.raises(UnsupportedError, match="the result differs"):
        patch(block, like={PlainGate: target(PlainGate)})


def test_sizes_of_the_user_hide_nothing():
    """As many features as latents, of one width: whoever exchanges them gets a result of the right shape."""
    attn = make(RolesExchanged)
    x, latents = torch.randn(2, 1, 2, 3, 16)
    assert attn(x, latents).shape == latents.shape
    assert "the result is torch.float64 (2, 2, 5, 12)" in refused(RolesExchanged)


def test_a_scale_that_somebody_has_changed():
    module = make(ScaleUnused)
    module.scale *= 2
    with pytest.raises(UnsupportedError, match="the result differs"):
        patch(module, like={ScaleUnused: target(ScaleUnused)})
    module = make(Reads)
    module.scale *= 2
    original = copy.deepcopy(module)
    patch(module, like={Reads: target(Reads)})
    assert_same(module, original)


class TestWithoutNetworks:
    """A resampler whose layers have none adds its latents twice, or leaves them."""

    def small(self, cls):
        return lambda: cls(dim=12, dim_head=8, heads=3, depth=2, num_latents=4, ff_mult=0)

    @pytest.mark.parametrize("cls", [Sums, SkipsTheIdentity])
    def test_by_the_usual_arguments(self, cls):
        reason = refused(cls, ff_mult=0)
        assert reason == "a new one has other parts: layers.0.1 is of class Sequential, not Identity."

    def test_twice(self):
        module = make(Sums, ff_mult=0)
        original = copy.deepcopy(module)
        patch(module, like={Sums: (target(Sums), self.small(Sums))})
        assert_same(module, original)

    def test_once(self):
        module = make(SkipsTheIdentity, ff_mult=0)
        with pytest.raises(UnsupportedError, match="the result differs"):
            patch(module, like={SkipsTheIdentity: (target(SkipsTheIdentity), self.small(SkipsTheIdentity))})


def test_positions():
    assert FRAMES in refused(PositionsLast, max_num_media=5)
    assert_same(*swapped(PositionsLast))


def test_a_forward_on_the_instance():
    module = make(Reads)
    module.forward = lambda x, latents: latents
    with pytest.raises(UnsupportedError, match="Reads has a forward set on the instance"):
        patch(module, like={Reads: target(Reads)})


@pytest.mark.parametrize("cls", [Dropout, HasAFlag, KeepsTheWeights, MayGetABias, StepsForgetTheText])
def test_another_release(cls):
    """At the place of a known class a trap is left alone, and the caller is told."""
    place = {"__module__": "open_flamingo.src.helpers", "__qualname__": "MaskedCrossAttention"}
    module = make(type("MaskedCrossAttention", (cls,), place))
    before = type(module)
    with pytest.warns(UserWarning, match="left modules of MaskedCrossAttention as they are") as caught:
        report = patch(module)
    assert len(caught) == 1
    assert type(module) is before
    assert list(report.skipped) == [""]


class TestHarmless:
    """What differs in words and computes the same is swapped if the caller says so."""

    @pytest.mark.parametrize(
        "cls", [LooksAtMedia, Louder, Gated, Reads, LatentsFirst, SoftmaxInFloat32, RootOnBoth, ScaleUnused]
    )
    def test_computes_the_same(self, cls):
        assert_same(*swapped(cls))

    @pytest.mark.parametrize("cls", [HarmlessFlag, KnowsItsSizes])
    def test_reads_more_attributes(self, cls):
        module, original = swapped(cls)
        assert_same(module, original)
        if cls is HarmlessFlag:
            module.fast = original.fast = True
            assert_same(module, original)

    @pytest.mark.parametrize("cls", [Sums, OtherActivation])
    @pytest.mark.parametrize(
        "options", [{}, {"max_num_media": 5, "max_num_frames": 4}], ids=["bare", "placed"]
    )
    def test_resampler(self, cls, options):
        assert_same(*swapped(cls, **options))

    def test_of_one_sequence_and_many_images(self):
        module, original = swapped(LooksAtMedia)
        assert_same(module, original, batch=1, text=30, media=12)
        assert_same(module, original, batch=3, text=30, media=1)
