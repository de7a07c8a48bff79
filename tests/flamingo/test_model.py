"""The model whole: what it computes at the start, and what may influence what."""

import copy
import pickle

import pytest
import torch

from flamingo import Flamingo, FlamingoConfig, GatedCrossAttentionBlock, NFNet
from flamingo.language import loss
from tests.helpers.logits import Logits
from tests.helpers.weights import randomise

IMAGE = 256
# text, image, text, image, text; and a document padded on the right
INPUT_IDS = torch.tensor(
    [[259, 72, IMAGE, 105, 33, IMAGE, 98, 121, 101], [259, IMAGE, 97, 98, IMAGE, 99, 258, 258, 258]]
)
ATTENTION_MASK = INPUT_IDS != 258


def pixels(frames=1):
    return torch.randn(2, 2, frames, 3, 32, 32)


@pytest.fixture
def fresh(seed):
    return Flamingo(FlamingoConfig.preset("tiny"))


@pytest.fixture
def model(seed):
    """Every weight random, gates included, in float64 so that an influence cannot drown in rounding."""
    return randomise(Flamingo(FlamingoConfig.preset("tiny")), std=0.2).double()


class TestGates:
    @pytest.mark.parametrize("mask", [None, ATTENTION_MASK])
    def test_at_zero_the_language_model_speaks_alone(self, fresh, mask):
        logits = fresh(INPUT_IDS, pixels(), mask).logits
        assert torch.equal(logits, fresh.language(INPUT_IDS, mask))

    def test_open_gates_change_the_logits(self, model):
        logits = model(INPUT_IDS, pixels().double()).logits
        assert (logits != model.language(INPUT_IDS)).any(dim=-1).all()

    def test_at_zero_the_gates_learn_and_nothing_else(self, fresh):
        fresh.freeze()(INPUT_IDS, pixels(), labels=INPUT_IDS).loss.backward()
        gates = {f"cross_attn.{i}.{gate}" for i in (0, 2) for gate in ("attn_gate", "ff_gate")}
        assert {n for n, p in fresh.named_parameters() if p.grad is not None and (p.grad != 0).any()} == gates


class TestLoss:
    """Of the next token, with logits and without."""

    LABELS = INPUT_IDS.masked_fill((INPUT_IDS == IMAGE) | (INPUT_IDS == 258), -100)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_without_logits_it_is_the_same(self, model, reduction):
        given = (INPUT_IDS, pixels().double(), ATTENTION_MASK, self.LABELS)
        gradients = []
        for loss_only in (False, True):
            logits, value = model(*given, loss_only=loss_only, reduction=reduction)
            assert (logits is None) is loss_only
            gradients.append([value, *torch.autograd.grad(value, list(model.parameters()))])
        for whole, alone in zip(*gradients, strict=True):
            torch.testing.assert_close(alone, whole, rtol=1e-9, atol=1e-9)
        rows = model(*given[:3]).logits.log_softmax(-1)
        learned = [(b, t) for b in range(2) for t in range(8) if self.LABELS[b, t + 1] != -100]
        expected = -sum(rows[b, t, self.LABELS[b, t + 1]] for b, t in learned)
        divisor = {"mean": len(learned), "sum": 1}[reduction]
        torch.testing.assert_close(gradients[1][0], expected / divisor, rtol=1e-9, atol=0)

    def test_logits_never_exist_at_once(self, fresh, monkeypatch):
        monkeypatch.setattr(loss, "PIECE", 3 * 261)
        for loss_only, rows in ((True, 3), (False, 18)):
            with Logits(261) as seen:
                fresh.freeze()(INPUT_IDS, pixels(), labels=INPUT_IDS, loss_only=loss_only).loss.backward()
            assert seen.rows == rows

    def test_clips_and_where_media_start_count(self, model):
        """As they do for logits."""
        frames, starts = torch.tensor([[1, 2], [2, 1]]), (INPUT_IDS == IMAGE).roll(-1, dims=1)
        given = (INPUT_IDS, pixels(frames=2).double(), ATTENTION_MASK, self.LABELS)
        found = [
            model(*given, *options, loss_only=loss_only).loss.item()
            for options in ((frames, starts), (None, starts), (frames, None))
            for loss_only in (True, False)
        ]
        assert found[0::2] == pytest.approx(found[1::2], rel=1e-9)
        assert len({round(each, 6) for each in found}) == 3

    def test_features_stand_for_pixels(self, model):
        """What the encoder made of them, which then is not called; other tensors are its own business."""
        given = pixels().double()
        features = model.vision(given)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(model.vision, "forward", lambda *_: pytest.fail("the encoder was called"))
            logits = model(INPUT_IDS, features).logits
        assert torch.equal(logits, model(INPUT_IDS, given).logits)
        with pytest.raises(ValueError, match="VisionEncoder: expected pixels with shape"):
            model(INPUT_IDS, features[..., :-1])

    def test_a_loss_needs_labels_and_a_known_reduction(self, fresh):
        with pytest.raises(ValueError, match="expected labels with loss_only=True, got None"):
            fresh(INPUT_IDS, pixels(), loss_only=True)
        with pytest.raises(ValueError, match="expected reduction 'mean' or 'sum', got 'none'"):
            fresh(INPUT_IDS, pixels(), labels=INPUT_IDS, reduction="none")


class TestInfluence:
    """logits[:, t] as a function of what the document holds."""

    def changed(self, model, first, second):
        """`[B, T]`: where the logits of two inputs differ."""
        return (model(*first).logits != model(*second).logits).any(dim=-1)

    def test_tokens_do_not_look_ahead(self, model):
        images, other = pixels().double(), INPUT_IDS.clone()
        other[:, 3] = 7
        changed = self.changed(model, (INPUT_IDS, images), (other, images))
        assert changed.tolist() == [[t >= 3 for t in range(9)]] * 2

    @pytest.mark.parametrize("only_immediate", [True, False])
    @pytest.mark.parametrize("medium", [0, 1])
    def test_an_image_reaches_its_token_and_what_follows(self, seed, only_immediate, medium):
        config = FlamingoConfig.preset("tiny", only_attend_immediate_media=only_immediate)
        model = randomise(Flamingo(config), std=0.2).double()
        images = pixels().double()
        other = images.clone()
        other[:, medium] += 1
        changed = self.changed(model, (INPUT_IDS, images), (INPUT_IDS, other))
        places = [(row == IMAGE).nonzero()[medium].item() for row in INPUT_IDS]
        assert changed.tolist() == [[t >= place for t in range(9)] for place in places]

    def test_a_block_sees_the_last_image_only(self, seed):
        # With one block, in front of the last layer, nothing carries the first image past the second.
        config = FlamingoConfig.preset("tiny", cross_attn_first=3)
        model = randomise(Flamingo(config), std=0.2).double()
        block, seen = model.cross_attn["3"], []
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        images = pixels().double()
        other = images.clone()
        other[:, 0] += 1
        model(INPUT_IDS, images)
        model(INPUT_IDS, other)
        changed = (seen[0] != seen[1]).any(dim=-1)
        times = (INPUT_IDS == IMAGE).cumsum(dim=1)
        assert torch.equal(changed, times == 1)

    def test_padding_changes_nothing(self, model):
        images = pixels().double()
        length = 6  # of the second document
        alone = model(INPUT_IDS[1:, :length], images[1:]).logits
        right = model(INPUT_IDS, images, ATTENTION_MASK).logits[1:, :length]
        torch.testing.assert_close(right, alone)
        shifted = INPUT_IDS[1:].roll(3, dims=1)
        left = model(shifted, images[1:], shifted != 258).logits[:, 3:]
        torch.testing.assert_close(left, alone)
        unmasked = model(shifted, images[1:]).logits[:, 3:]
        assert not torch.allclose(unmasked, alone)
        padded = shifted != 258
        shifted[:, 1] = IMAGE
        torch.testing.assert_close(model(shifted, images[1:], padded).logits[:, 3:], alone)

    def test_frames_past_the_end_of_a_clip_change_nothing(self, model):
        clips = pixels(frames=3).double()
        num_frames = torch.tensor([[1, 3], [2, 1]])
        past = torch.arange(3) >= num_frames[..., None]
        noisy = clips + 10 * past[..., None, None, None]
        first = model(INPUT_IDS, clips, num_frames=num_frames).logits
        torch.testing.assert_close(model(INPUT_IDS, noisy, num_frames=num_frames).logits, first)
        assert not torch.allclose(model(INPUT_IDS, noisy).logits, model(INPUT_IDS, clips).logits)


class TestForward:
    def test_loss_is_the_cross_entropy_of_the_next_token(self, model):
        labels = INPUT_IDS.masked_fill(~ATTENTION_MASK, -100)
        out = model(INPUT_IDS, pixels().double(), ATTENTION_MASK, labels)
        log_p = out.logits.log_softmax(dim=-1)
        picked = [
            log_p[b, t - 1, labels[b, t]] for b in range(2) for t in range(1, 9) if labels[b, t] != -100
        ]
        torch.testing.assert_close(out.loss, -torch.stack(picked).mean())

    def test_every_block_gets_one_tensor_of_locations(self, model):
        seen = []
        for block in model.cross_attn.values():
            block.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
        model(INPUT_IDS, pixels().double())
        assert len(seen) == 2
        assert seen[0] is seen[1]
        assert torch.equal(seen[0], INPUT_IDS == IMAGE)

    def test_blocks_stand_in_front_of_their_layers(self, model):
        order = []
        for name, module in [*model.language.layers.named_children(), *model.cross_attn.named_children()]:
            kind = "block" if isinstance(module, GatedCrossAttentionBlock) else "layer"
            module.register_forward_pre_hook(lambda m, a, step=(kind, name): order.append(step))
        model(INPUT_IDS, pixels().double())
        blocks = [("block", "0"), ("block", "2")]
        layers = [("layer", str(i)) for i in range(4)]
        assert order == [blocks[0], layers[0], layers[1], blocks[1], layers[2], layers[3]]

    def test_freeze_leaves_the_new_layers(self, fresh):
        assert fresh.freeze() is fresh
        trained = {name.split(".")[0] for name, p in fresh.named_parameters() if p.requires_grad}
        frozen = {name.split(".")[0] for name, p in fresh.named_parameters() if not p.requires_grad}
        assert trained == {"resampler", "cross_attn"}
        assert frozen == {"vision", "language"}

    @pytest.mark.parametrize(("batch", "tokens", "media"), [(0, 9, 2), (2, 0, 2), (2, 9, 0), (2, 0, 0)])
    def test_empty(self, model, batch, tokens, media):
        out = model(INPUT_IDS[:batch, :tokens], pixels().double()[:batch, :media])
        out.logits.sum().backward()
        assert out.logits.shape == (batch, tokens, 261)
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    def test_copies_and_pickles(self, model):
        images = pixels().double()
        logits = model(INPUT_IDS, images).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(INPUT_IDS, images).logits, logits)

    def test_a_few_steps_lower_the_loss(self, fresh):
        images = pixels()
        trained = [p for p in fresh.freeze().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for _ in range(12):
            loss = fresh(INPUT_IDS, images, ATTENTION_MASK, INPUT_IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


class TestVision:
    def test_an_nfnet_by_name(self):
        config = FlamingoConfig.preset("tiny", vision="nfnet-f0", vision_dim=3072, resampler_depth=1)
        with torch.device("meta"):
            model = Flamingo(config)
            assert isinstance(model.vision, NFNet)
            assert len(model.vision.stages[2]) == 6
            # Neither square nor of image_size: an NFNet takes any.
            assert model.encode_media(torch.zeros(1, 2, 3, 3, 64, 40)).shape == (1, 2, 8, 40)

    def test_one_s_own(self):
        class Mean(torch.nn.Module):
            dim = 3

            def forward(self, pixels):
                return pixels.mean(dim=(-2, -1))[..., None, :]

        model = randomise(
            Flamingo(FlamingoConfig.preset("tiny", vision_dim=3, vision_heads=1), vision=Mean())
        )
        black, white = torch.zeros(1, 1, 1, 3, 5, 7), torch.ones(1, 1, 1, 3, 5, 7)
        ids = torch.tensor([[IMAGE, 65]])
        assert not torch.allclose(model(ids, black).logits, model(ids, white).logits)

    @pytest.mark.parametrize(
        ("vision", "found"),
        [
            (NFNet(widths=(32,) * 4, depths=(1,) * 4, group_width=16), "NFNet with dim 64"),
            (torch.nn.Identity(), "dim missing"),
        ],
    )
    def test_another_width_is_refused(self, vision, found):
        with pytest.raises(ValueError, match=rf"vision_dim=48, got .*{found}\. .*vision_dim=\.\.\."):
            Flamingo(FlamingoConfig.preset("tiny"), vision=vision)
