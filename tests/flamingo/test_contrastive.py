"""The contrastive objective against its formula, its clipping against a loop, and that it learns to see."""

import copy
import itertools
import math

import pytest
import torch

from flamingo import NFNet, VisionEncoder
from flamingo.contrastive import (
    ContrastiveModel,
    Pairs,
    class_embeddings,
    clip_gradients_adaptively,
    contrastive_loss,
    training_step,
    zero_shot,
)
from tests.helpers.weights import randomise

transformers = pytest.importorskip("transformers")


def units(rows: int, dim: int) -> torch.Tensor:
    """Rows of length 1."""
    return torch.nn.functional.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=-1)


def bert(vocabulary: int = 20, hidden: int = 16):
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def small(dim: int = 8) -> ContrastiveModel:
    """Every weight random, in float64."""
    vision = VisionEncoder(image_size=16, patch_size=8, dim=12, layers=1, heads=2)
    return randomise(ContrastiveModel(vision, bert(), dim=dim)).double()


def some_pairs(rows: int = 4) -> Pairs:
    """Texts of 1 to `rows` tokens, padded on the right."""
    mask = torch.ones(rows, rows).tril()
    pixels = torch.randn(rows, 3, 16, 16, dtype=torch.float64)
    return Pairs(pixels, torch.randint(20, (rows, rows)), mask)


class TestLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_against_a_loop(self, smoothing):
        images, texts, scale = units(5, 7), units(5, 7), 3.7
        scores = [
            [scale * sum(a * b for a, b in zip(i, t, strict=True)).item() for t in texts] for i in images
        ]
        expected = 0.0
        for i, j in itertools.product(range(5), range(5)):
            target = smoothing / 5 + (1 - smoothing) * (i == j)
            of_texts = math.log(sum(math.exp(scores[i][k]) for k in range(5)))
            of_images = math.log(sum(math.exp(scores[k][j]) for k in range(5)))
            expected -= target * (2 * scores[i][j] - of_texts - of_images) / 5
        found = contrastive_loss(images, texts, scale, label_smoothing=smoothing)
        assert found.item() == pytest.approx(expected, rel=1e-12)

    def test_of_perfect_pairs(self):
        """Own pairs at 1 and all others at 0: of each softmax the logarithm of one term over N terms."""
        images = torch.eye(6, dtype=torch.float64)
        for scale in (0.0, 2.0, 20.0):
            expected = 2 * math.log(1 + 5 * math.exp(-scale))
            found = contrastive_loss(images, images, scale, label_smoothing=0.0)
            assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)

    def test_smoothing_keeps_it_from_zero(self):
        """Own pairs `gap` above all others is best where the softmax is the target, whose entropy remains."""
        own, other = 0.9 + 0.1 / 6, 0.1 / 6
        best = math.log(own / other)
        losses = [contrastive_loss(torch.eye(6), torch.eye(6), best + more).item() for more in (-0.2, 0, 0.2)]
        assert losses[1] == pytest.approx(-2 * (own * math.log(own) + 5 * other * math.log(other)), rel=1e-6)
        assert losses[1] < min(losses[0], losses[2])

    def test_one_text_for_each_image(self):
        with pytest.raises(ValueError, match=r"one text for each image, .*got \(3, 4\) and \(2, 4\)"):
            contrastive_loss(torch.zeros(3, 4), torch.zeros(2, 4), 1.0)


class TestEmbeddings:
    def test_images(self):
        model, pixels = small(), torch.randn(2, 3, 3, 16, 16, dtype=torch.float64)
        embeddings = model.image_embedding(pixels)
        assert embeddings.shape == (2, 3, 8)
        features = model.vision(pixels[1, 2][None, None, None])[0, 0, 0]
        expected = model.image_projection.weight @ features.mean(dim=0)
        torch.testing.assert_close(embeddings[1, 2], expected / expected.square().sum().sqrt())

    def test_texts_without_their_padding(self):
        model, pairs = small(), some_pairs()
        embeddings = model.text_embedding(pairs.input_ids, pairs.attention_mask)
        for row, length in enumerate((1, 2, 3, 4)):
            tokens = model.text(input_ids=pairs.input_ids[row : row + 1, :length]).last_hidden_state[0]
            expected = model.text_projection.weight @ tokens.mean(dim=0)
            torch.testing.assert_close(embeddings[row], expected / expected.square().sum().sqrt())

    def test_an_empty_text_has_a_finite_embedding(self):
        model, pairs = small(), some_pairs()
        empty = torch.zeros_like(pairs.attention_mask)
        assert model.text_embedding(pairs.input_ids, empty).isfinite().all()

    def test_the_loss_is_of_them(self):
        model, pairs = small(), some_pairs()
        with torch.no_grad():
            model.log_scale.fill_(math.log(5))
        images, texts = model.image_embedding(pairs.pixels), model.text_embedding(*pairs[1:])
        torch.testing.assert_close(model(pairs), contrastive_loss(images, texts, 5.0))
        assert model(pairs) != model(pairs, label_smoothing=0.0)

    def test_sizes_of_the_paper(self):
        with torch.device("meta"):
            model = ContrastiveModel(NFNet.preset("nfnet-f6"), bert())
            assert model.image_embedding(torch.empty(1, 3, 288, 288)).shape == (1, 1376)
            assert model.image_projection.in_features == 3072


class TestClipping:
    def test_against_a_loop(self):
        encoder = randomise(NFNet(widths=(32,) * 4, depths=(1,) * 4, group_width=16), std=0.1).double()
        for i, (name, parameter) in enumerate(encoder.named_parameters()):
            parameter.grad = torch.randn_like(parameter) * 10.0 ** (i % 7 - 5)
            if name.endswith("skipinit_gain"):
                torch.nn.init.zeros_(parameter)  # eps decides
        before = {name: p.grad.clone() for name, p in encoder.named_parameters()}
        clip_gradients_adaptively(encoder.parameters(), 0.02)
        kept = 0
        for name, parameter in encoder.named_parameters():
            # A filter is a unit; a gain `[n, 1, 1, 1]` or a bias `[n]` is one as a whole.
            one = parameter.numel() == max([*parameter.shape, 1])
            for weight, grad, found in (
                [(parameter, before[name], parameter.grad)]
                if one
                else zip(parameter, before[name], parameter.grad, strict=True)
            ):
                longest = 0.02 * max(weight.square().sum().sqrt().item(), 1e-3)
                length = grad.square().sum().sqrt().item()
                torch.testing.assert_close(found, grad * min(1.0, longest / length))
                kept += length <= longest
        assert 0 < kept < sum(len(p) for p in encoder.parameters() if p.ndim)

    def test_what_has_no_gradient_is_passed_over(self):
        frozen, trained = torch.ones(3), torch.ones(3, requires_grad=True)
        trained.grad = torch.full((3,), 5.0)
        clip_gradients_adaptively([frozen, trained])
        assert trained.grad.norm().item() == pytest.approx(0.01 * 3**0.5)


class Recorder(torch.optim.SGD):
    """Keeps the gradients an update was made with."""

    def step(self, closure=None):
        (group,) = self.param_groups
        self.seen = [p.grad.clone() for p in group["params"]]
        return super().step(closure)


class TestTrainingStep:
    def step(self, model, batches, **clipping):
        optimizer = Recorder(model.parameters(), lr=0.1)
        losses = training_step(model, optimizer, batches, **clipping)
        names = [name for name, _ in model.named_parameters()]
        return losses, dict(zip(names, optimizer.seen, strict=True))

    def test_gradients_of_all_datasets_are_added_up_for_one_update(self):
        model, batches = small(), [some_pairs(4), some_pairs(3)]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)  # left over from before
        total = model(batches[0]) + model(batches[1])
        trained = [p for p in model.parameters() if p.requires_grad]
        expected = torch.autograd.grad(total, trained, allow_unused=True)
        losses, seen = self.step(model, iter(batches), vision_clipping=1e9, text_clipping=1e9)
        assert sum(losses) == pytest.approx(total.item())
        for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(seen[name], gradient)
            torch.testing.assert_close(parameter, before[name] - 0.1 * gradient)

    def test_each_tower_is_clipped_in_its_way(self):
        model, pairs = small(), some_pairs()
        _, free = self.step(copy.deepcopy(model), [pairs], vision_clipping=1e9, text_clipping=1e9)
        _, seen = self.step(copy.deepcopy(model), [pairs], vision_clipping=1e-4, text_clipping=1e-3)
        text = torch.cat([grad.flatten() for name, grad in seen.items() if name.startswith("text.")])
        assert text.norm().item() == pytest.approx(1e-3, rel=1e-3)
        for name, parameter in model.named_parameters():
            if name.startswith("vision."):
                parameter.grad = free[name]
        clip_gradients_adaptively(model.vision.parameters(), 1e-4)
        for name, parameter in model.vision.named_parameters():
            torch.testing.assert_close(seen[f"vision.{name}"], parameter.grad)
            assert not torch.equal(parameter.grad, 0 * parameter.grad)
        for name in ("image_projection.weight", "text_projection.weight", "log_scale"):
            assert torch.equal(seen[name], free[name])

    def test_the_scale_stays_below_100(self):
        model = small()
        with torch.no_grad():
            model.log_scale.fill_(math.log(200))
        training_step(model, torch.optim.SGD(model.parameters(), lr=1e-6), [some_pairs()])
        assert model.log_scale.exp().item() == pytest.approx(100)

    def test_without_a_batch(self):
        with pytest.raises(ValueError, match="expected a batch of each dataset, got none"):
            self.step(small(), [])


COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}
FIGURES = ("disc", "cross", "stripes")
NAMES = [f"{colour} {figure}" for colour in COLOURS for figure in FIGURES]
WORDS = ["[PAD]", "a", "picture", "of", *COLOURS, *FIGURES]


def draw(name: str) -> torch.Tensor:
    """A figure of random size in a random place, with noise: `[3, 32, 32]`."""
    colour, figure = name.split()
    y = (torch.arange(32) - torch.randint(10, 22, ()))[:, None]
    x = (torch.arange(32) - torch.randint(10, 22, ()))[None]
    size = torch.randint(5, 9, ())
    inside = (x.abs() <= size) & (y.abs() <= size)
    mask = {
        "disc": x**2 + y**2 <= size**2,
        "cross": inside & ((x.abs() <= 1) | (y.abs() <= 1)),
        "stripes": inside & (y % 4 < 2),
    }[figure]
    return mask * torch.tensor(COLOURS[colour])[:, None, None] * 2.0 - 1 + 0.2 * torch.randn(3, 32, 32)


def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
    rows = [torch.tensor([WORDS.index(word) for word in text.split()]) for text in texts]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).int()}


def drawn(templates=("{}", "a {}", "a picture of a {}")) -> Pairs:
    """One new picture of each kind and its text."""
    texts = [templates[torch.randint(len(templates), ())].format(name) for name in NAMES]
    return Pairs(torch.stack([draw(name) for name in NAMES]), **tokenize(texts))


class TestLearning:
    @pytest.fixture(scope="class")
    @staticmethod
    def trained():
        """A tiny NFNet and a tiny BERT, from nothing, as the paper trains its own."""
        torch.manual_seed(0)
        vision = NFNet(widths=(32, 64, 64, 64), depths=(1, 1, 1, 1), group_width=16)
        model = ContrastiveModel(vision, bert(len(WORDS), hidden=32), dim=32)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=120)
        losses = []
        for _ in range(120):
            losses.append(sum(training_step(model, optimizer, [drawn(), drawn()])) / 2)
            schedule.step()
        return model.eval(), losses

    def test_the_loss_falls(self, trained):
        _, losses = trained
        assert losses[0] > 0.75 * 2 * math.log(12)
        assert sum(losses[-10:]) < 0.6 * sum(losses[:10])

    @torch.no_grad()
    def test_new_pictures_and_texts_find_each_other(self, trained):
        model, _ = trained
        found = []
        for _ in range(20):
            pairs = drawn(["a {}"])
            scores = model.image_embedding(pairs.pixels) @ model.text_embedding(*pairs[1:]).T
            found.append([(scores.argmax(dim) == torch.arange(12)).float().mean().item() for dim in (0, 1)])
        pictures, texts = torch.tensor(found).mean(dim=0).tolist()
        print(f"text to image {pictures:.0%}, image to text {texts:.0%}, by chance {1 / 12:.0%}")
        assert min(pictures, texts) > 0.6

    def test_zero_shot(self, trained):
        model, _ = trained
        classes = class_embeddings(model, NAMES, tokenize, ["a {}", "a picture of a {}"])
        torch.testing.assert_close(classes.norm(dim=-1), torch.ones(12))
        pixels = torch.stack([drawn().pixels for _ in range(20)])
        logits = zero_shot(model, pixels, classes)
        assert logits.shape == (20, 12, 12)
        accuracy = (logits.argmax(dim=-1) == torch.arange(12)).float().mean().item()
        print(f"zero-shot accuracy {accuracy:.0%}")
        assert accuracy > 0.6
        # Colours alone, in words it never saw alone.
        colours = class_embeddings(model, list(COLOURS), tokenize, ["{} " + figure for figure in FIGURES])
        right = zero_shot(model, pixels, colours).argmax(dim=-1) == torch.arange(4).repeat_interleave(3)
        assert right.float().mean() > 0.8

    def test_similar_pictures_are_near(self, trained):
        """As RICES needs: the nearest pictures are of the same kind far more often than by chance."""
        model, _ = trained
        with torch.no_grad():
            stored, asked = (
                model.image_embedding(torch.stack([drawn().pixels for _ in range(8)])) for _ in "ab"
            )
        nearest = (asked.flatten(0, 1) @ stored.flatten(0, 1).T).argmax(dim=-1) % 12
        assert (nearest == torch.arange(12).repeat(8)).float().mean() > 0.6


def test_zero_shot_by_the_formula():
    model, pixels = small(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        model.log_scale.fill_(math.log(7))
    tokens = {"x": 3, "y": 4, "good": 5}

    def tokenize(texts):
        rows = torch.tensor([[tokens[word] for word in text.split()] for text in texts])
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    classes = class_embeddings(model, ["x", "y"], tokenize, ["good {}", "{} good"])
    for row, token in enumerate((3, 4)):
        two = model.text_embedding(torch.tensor([[5, token], [token, 5]]), torch.ones(2, 2))
        torch.testing.assert_close(classes[row], (two[0] + two[1]) / (two[0] + two[1]).norm())
    logits = zero_shot(model, pixels, classes)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, 7 * model.image_embedding(pixels) @ classes.T)
