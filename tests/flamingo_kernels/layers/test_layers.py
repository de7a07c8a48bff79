"""The fused layers are the reference's layers in all but speed: construction, masks, copies, compilation."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import flamingo_kernels as fk
from flamingo import modules
from flamingo_kernels import _kept, layers
from flamingo_kernels.layers import fused as fused_layers
from tests.helpers.parity import assert_parity
from tests.helpers.same import assert_same
from tests.helpers.weights import randomise

B, T, M, R, D, V = 2, 6, 2, 5, 20, 12
SIZES = {"dim": D, "dim_visual": V, "dim_head": 8, "heads": 3}
LOCATIONS = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()


def block(**options):
    return randomise(layers.GatedCrossAttentionBlock(**{**SIZES, **options}))


def reference(fused):
    """A reference module with the weights of a fused one."""
    names = {cls.__name__: cls for cls in (modules.MaskedCrossAttention, modules.GatedCrossAttentionBlock)}
    twin = copy.deepcopy(fused)
    for module in twin.modules():
        if isinstance(module, layers.Fused):
            module.__class__ = names[type(module).__name__]
    return twin


def inputs(length=T, dtype=torch.float32):
    x = torch.randn(B, length, D, dtype=dtype, requires_grad=True)
    return x, torch.randn(B, M, R, V, dtype=dtype, requires_grad=True)


def gradients(module, *tensors, call=None):
    """The output and all gradients for a fixed upstream gradient."""
    out = (module if call is None else call)(*tensors)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin()
    wanted = [t for t in tensors if t.requires_grad] + list(module.parameters())
    return [out.detach(), *torch.autograd.grad(out, wanted, dout)]


class TestConstruction:
    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            ("MaskedCrossAttention", {**SIZES, "norm_media": True}),
            ("GatedCrossAttentionBlock", {**SIZES, "activation": "squared_relu", "ff_mult": 2}),
            ("PerceiverAttention", {"dim": D, "dim_head": 8, "heads": 3}),
            ("PerceiverResampler", {"dim": D, "depth": 2, "max_num_frames": 4, "dim_input": 9}),
        ],
    )
    def test_same_arguments_and_same_weights_from_the_same_seed(self, name, sizes):
        torch.manual_seed(3)
        ours = getattr(fk, name)(**sizes)
        torch.manual_seed(3)
        theirs = getattr(modules, name)(**sizes)
        assert isinstance(ours, getattr(modules, name))
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert_same(list(ours.state_dict().values()), list(theirs.state_dict().values()))

    def test_every_attention_inside_is_fused(self):
        assert type(block().attn) is layers.MaskedCrossAttention
        resampler = layers.PerceiverResampler(dim=D, depth=3)
        assert [type(attn) for attn, _ in resampler.layers] == [layers.PerceiverAttention] * 3

    def test_the_repr_names_the_backend(self):
        fused = block()
        assert "backend=auto" in repr(fused.attn)
        with fk.use_backend("reference"):
            assert repr(fused).count("backend=reference") == 2

    def test_attributes_set_by_training_scripts(self):
        fused = block()
        fused._use_gradient_checkpointing = True
        fused.clip_grad_norm_ = lambda max_norm: max_norm
        assert copy.deepcopy(fused)._use_gradient_checkpointing
        assert fused.clip_grad_norm_(1.5) == 1.5
        assert "_use_gradient_checkpointing" not in fused.state_dict()

    def test_the_package_imports_with_torch_alone(self):
        code = (
            "import sys; sys.modules['einops'] = None\n"
            "import flamingo_kernels as fk; fk.patch; 'PerceiverResampler' in dir(fk)\n"
            "assert 'flamingo' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        with pytest.raises(AttributeError, match="no attribute 'Resampler'"):
            _ = fk.Resampler


class TestParity:
    """What patching cannot show; tests/flamingo_kernels/patch/test_parity.py has the rest."""

    @pytest.mark.parametrize("policy", ["zero", "open_flamingo"])
    def test_block(self, policy, backend):
        fused = block(policy=policy, norm_media=True)
        with fk.use_backend(backend):
            assert_parity(
                reference(fused),
                fused,
                (B, T, D),
                (B, M, R, V),
                call=lambda module, x, media: module(x, media, LOCATIONS),
            )

    @pytest.mark.parametrize("policy", ["zero", "open_flamingo"])
    @pytest.mark.parametrize(("batch", "length", "media"), [(0, 6, 2), (2, 0, 2), (2, 6, 0)])
    def test_empty(self, policy, batch, length, media, backend):
        fused = block(policy=policy)
        locations = LOCATIONS[:batch, :length]
        results = []
        for module in (fused, reference(fused)):
            x, latents = (
                t.requires_grad_() for t in (torch.ones(batch, length, D), torch.ones(batch, media, R, V))
            )
            with fk.use_backend(backend):
                results.append(gradients(module, x, latents, call=lambda *ts, m=module: m(*ts, locations)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)

    def test_the_output_may_change_in_place(self, backend):
        fused, tensors = block(), inputs()

        def call(module, x, media):
            out = module(x, media, LOCATIONS)
            out *= 2
            return out

        with fk.use_backend(backend):
            ours, theirs = (
                gradients(module, *tensors, call=lambda x, m, to=module: call(to, x, m))
                for module in (fused, reference(fused))
            )
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)

    def test_wrong_locations(self):
        x, media = inputs()
        with pytest.raises(ValueError, match=r"media_locations with shape \(2, 6\) to match x, got \(2, 5\)"):
            block()(x, media, LOCATIONS[:, :5])
        with pytest.raises(ValueError, match=r"got torch\.float32"):
            block()(x, media, LOCATIONS.float())

    @pytest.mark.parametrize("cached", [False, True])
    @pytest.mark.parametrize("part", ["block", "attn"])
    @torch.no_grad()
    def test_batches_that_differ(self, part, cached):
        """Texts share media by a `MediaCache`, and not because there happen to be twice as many."""
        fused = block() if part == "block" else block().attn
        x, media = inputs()
        x, places = x.repeat(2, 1, 1)[:, : 1 if cached else T], LOCATIONS.repeat(2, 1)
        for given in (
            (x, media, places),
            (x[:2], media, places),
            (x, media, places[:2]),
            (x[0], media, places),
        ):
            with pytest.raises(ValueError, match=r"^MaskedCrossAttention: expected "):
                fused(*given, cached)


class Shifted(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


def with_norm(norm):
    return lambda fused: fused.ff.__setitem__(0, norm)


def with_forward(fused):
    norm = fused.ff[0]
    norm.forward = lambda x: nn.LayerNorm.forward(norm, x) + 1


def with_hook(choose, hook):
    return lambda fused: choose(fused).register_forward_hook(lambda module, args, out: hook(out))


class TestFeedForward:
    """A feed-forward network takes part in the fusion only where nobody can tell."""

    @pytest.mark.parametrize(
        ("change", "fused"),
        [
            pytest.param(lambda fused: None, 1, id="plain"),
            pytest.param(with_norm(nn.LayerNorm(D, eps=0.3)), 1, id="eps"),
            pytest.param(with_norm(nn.LayerNorm(D, bias=False)), 1, id="no bias"),
            pytest.param(with_norm(nn.LayerNorm(D, elementwise_affine=False)), 0, id="not affine"),
            pytest.param(with_norm(nn.LayerNorm((T, D))), 0, id="two dimensions"),
            pytest.param(with_norm(Shifted(D)), 0, id="subclass"),
            pytest.param(with_norm(nn.Identity()), 0, id="no norm"),
            pytest.param(with_forward, 0, id="forward on the instance"),
            pytest.param(with_hook(lambda f: f.ff, lambda out: 2 * out), 0, id="hook"),
            pytest.param(with_hook(lambda f: f.ff[0], lambda out: 2 * out), 0, id="hook on the norm"),
            pytest.param(with_hook(lambda f: f.ff[1], lambda out: 2 * out), 0, id="hook on a linear"),
            pytest.param(lambda f: setattr(f, "ff", nn.Linear(D, D)), 0, id="a linear"),
            pytest.param(lambda f: setattr(f, "ff", nn.Sequential()), 0, id="empty"),
            pytest.param(
                lambda f: setattr(f, "ff", nn.Sequential(nn.LayerNorm(D), *[nn.GELU()] * 2)),
                0,
                id="one twice",
            ),
            pytest.param(
                lambda f: setattr(f, "ff", nn.Sequential(*f.ff, nn.Linear(D, D))),
                0,
                id="one more",
            ),
        ],
    )
    def test_forms(self, change, fused, monkeypatch):
        calls = []
        sublayer = fused_layers.gated_feed_forward
        monkeypatch.setattr(
            fused_layers,
            "gated_feed_forward",
            lambda *args, **kw: calls.append(args) or sublayer(*args, **kw),
        )
        model = block()
        change(model)
        for name, parameter in model.named_parameters():
            if name.startswith("ff"):
                nn.init.normal_(parameter)
        x, media = inputs()
        ours = model(x, media, LOCATIONS)
        theirs = reference(model)(x, media, LOCATIONS)
        # Weights of 1 make numbers of a hundred.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert len(calls) == fused


@pytest.fixture
def built(monkeypatch):
    """The masks that are built, in order."""
    masks = []
    build = _kept.MaskKey.build

    def record(key, locations):
        masks.append(build(key, locations))
        return masks[-1]

    monkeypatch.setattr(_kept.MaskKey, "build", record)
    vars(_kept._threads).clear()
    return masks


class TestSharedMask:
    def test_one_mask_a_batch(self, built):
        first, second, locations = block(), block(), LOCATIONS.clone()
        x, media = inputs()
        second(first(x, media, locations), media, locations)
        assert len(built) == 1
        first(x, media, LOCATIONS.clone())
        assert len(built) == 2

    def test_a_change_in_place_is_seen(self, built):
        fused, locations = block(), LOCATIONS.clone()
        x, media = inputs()
        fused(x, media, locations)
        locations[0, 0] = True
        torch.testing.assert_close(fused(x, media, locations), reference(fused)(x, media, locations))
        assert len(built) == 2

    def test_everything_a_mask_depends_on(self, built):
        locations = LOCATIONS.clone()
        x, media = inputs()
        ways = [
            (block(), x, media, False),
            (block(policy="open_flamingo"), x, media, False),
            (block(only_attend_immediate_media=False), x, media, False),
            (block(), x, media[:, :1], False),
            (block(), x, media, True),
            (block(), x[:, :1], media, True),
        ]
        for n, (fused, x, media, cached) in enumerate(ways):
            for layer in (fused, copy.deepcopy(fused)):
                out = layer(x, media, locations, cached)
                torch.testing.assert_close(out, reference(fused)(x, media, locations, cached))
                assert len(built) == n + 1

    def test_a_layer_that_asks_again_begins_another_pass(self, built):
        """Numbers may have changed since, without a count of torch's."""
        fused, numbers = block(), LOCATIONS.numpy().copy()
        locations = torch.from_numpy(numbers)
        x, media = inputs()
        fused(x, media, locations)
        numbers[:] = numbers[:, ::-1]
        torch.testing.assert_close(fused(x, media, locations), reference(fused)(x, media, locations))
        assert len(built) == 2

    def test_keeps_one_mask_and_no_locations(self, built):
        fused = block()
        x, media = inputs()
        masks = []
        for _ in range(3):
            locations = LOCATIONS.clone()
            fused(x, media, locations)
            masks.append(weakref.ref(built.pop()))
        alive = weakref.ref(locations)
        del locations
        gc.collect()
        assert [mask() is None for mask in masks] == [True, True, False]
        assert alive() is None

    def test_a_mask_of_inference_mode_serves_no_training(self, built):
        first, second, third = block(), block(), block()
        x, media = inputs()
        locations = LOCATIONS.clone()
        with torch.inference_mode():
            first(x, media, locations)
            second(x, media, locations)
        assert len(built) == 1
        third(x, media, locations).sum().backward()
        assert len(built) == 2

    def test_locations_of_inference_mode_are_read_anew(self, built):
        fused = block()
        x, media = inputs()
        with torch.inference_mode():
            locations = LOCATIONS.clone()
            fused(x, media, locations)
            locations[0, 0] = True
            torch.testing.assert_close(fused(x, media, locations), reference(fused)(x, media, locations))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_a_trace_follows_its_input(self, built):
        fused, locations = block(), LOCATIONS.clone()
        x, media = (t.detach() for t in inputs())
        fused(x, media, locations)
        with fk.use_backend("reference"):
            traced = torch.jit.trace(fused, (x, media, locations), check_trace=False)
        other = LOCATIONS.flip(1)
        torch.testing.assert_close(traced(x, media, other), fused(x, media, other))


class TestCopies:
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: save_and_load(m)],
        ids=["deepcopy", "pickle", "torch.save"],
    )
    def test_are_equal_and_fused(self, duplicate):
        fused = block()
        again = duplicate(fused)
        assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]
        x, media = inputs()
        assert_same(
            gradients(fused, x, media, call=lambda *ts: fused(*ts, LOCATIONS)),
            gradients(again, x, media, call=lambda *ts: again(*ts, LOCATIONS)),
        )


def save_and_load(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, backend):
    fused = block()
    tensors = inputs()

    def checkpointed(x, media):
        return checkpoint(fused, x, media, LOCATIONS, use_reentrant=use_reentrant)

    with fk.use_backend(backend):
        plain = gradients(fused, *tensors, call=lambda *ts: fused(*ts, LOCATIONS))
        out = checkpointed(*tensors)
        dout = torch.linspace(-1, 1, out.numel()).view_as(out).sin()
        out.backward(dout)
    grads = [t.grad for t in (*tensors, *fused.parameters())]
    assert_same([out.detach(), *grads], plain)


@pytest.fixture
def compilations():
    """How many graphs were compiled, counted from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_any_length(compilations, compiler):
    if compiler == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    fused = block()
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=compiler)
    for length in (6, 9):
        x, media = inputs(length)
        locations = torch.rand(B, length) < 0.3
        ours = gradients(fused, x, media, call=lambda x, m, at=locations: compiled(x, m, at))
        theirs = gradients(fused, x, media, call=lambda x, m, at=locations: fused(x, m, at))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)
    assert compilations() == 1


def test_compiled_perceiver_attention(compilations):
    fused = randomise(layers.PerceiverAttention(dim=D, dim_head=8, heads=3))
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for features in (7, 11):
        tensors = [torch.randn(B, M, n, D, requires_grad=True) for n in (features, R)]
        ours, theirs = gradients(fused, *tensors, call=compiled), gradients(fused, *tensors)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)
    assert compilations() == 1


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_are_those_of_eager(x_dtype, gate_dtype, autocast, backend):
    """The dtypes of the output and of every gradient, wherever eager runs at all."""
    fused = block()
    fused.attn.to(torch.float32 if autocast else x_dtype)
    for gate in (fused.attn_gate, fused.ff_gate):
        gate.data = gate.data.to(gate_dtype)
    if not autocast:
        fused.ff.to(torch.promote_types(x_dtype, gate_dtype))
    tensors = inputs(dtype=x_dtype)
    results = []
    for module in (fused, reference(fused)):
        with fk.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(*tensors, LOCATIONS)
        grads = torch.autograd.grad(out.sum(), [*tensors, *module.parameters()])
        results.append([out.dtype, *(grad.dtype for grad in grads)])
    assert results[0] == results[1]
