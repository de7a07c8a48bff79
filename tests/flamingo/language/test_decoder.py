"""The decoder: what a token sees and where it stands, with a cache and without."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from flamingo import LanguageModel
from tests.helpers.weights import randomise

IDS = torch.randint(10, (3, 9), generator=torch.Generator().manual_seed(1))
# padded on the left, on the right, and between
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1, 1, 1]])


@pytest.fixture(params=["rotary", "relative"])
def language(request, seed):
    model = LanguageModel(vocab_size=10, dim=16, layers=2, heads=2, positions=request.param)
    return randomise(model, std=0.5).double()


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_head(tie_embeddings):
    language = LanguageModel(vocab_size=10, dim=8, layers=1, heads=2, tie_embeddings=tie_embeddings)
    randomise(language)
    weight = language.embedding.weight if tie_embeddings else language.head.weight
    assert ("head.weight" in language.state_dict()) is not tie_embeddings
    x = torch.randn(1, 3, 8)
    torch.testing.assert_close(language.logits(x), F.linear(language.norm(x), weight))


def test_a_layer_is_what_its_formula_says(language):
    """Score by score, each sum written out."""
    layer, length, heads, d = language.layers[0], 5, 2, 8
    x = torch.randn(1, length, 16, dtype=torch.float64)
    got = layer(x, language.places(IDS[:1, :length]))

    def rms_norm(x, weight):
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight

    q, k, v = (
        (rms_norm(x, layer.norm.weight) @ layer.attn.to_qkv.weight.T)[0].view(length, 3, heads, d).unbind(1)
    )
    rows = torch.zeros(length, heads, d, dtype=torch.float64)
    for h, i in itertools.product(range(heads), range(length)):
        scores = [score(language, layer.attn, q[i, h], k[j, h], h, i - j) for j in range(i + 1)]
        rows[i, h] = torch.stack(scores).softmax(dim=0) @ v[: i + 1, h]
    x = x + rows.view(1, length, heads * d) @ layer.attn.to_out.weight.T
    hidden = F.gelu(rms_norm(x, layer.ff[0].weight) @ layer.ff[1].weight.T)
    torch.testing.assert_close(got, x + hidden @ layer.ff[3].weight.T, rtol=1e-5, atol=1e-5)


def score(language, attn, q, k, head, distance):
    d = len(q)
    if language.positions == "rotary":
        pairs = [10000 ** (-2 * n / d) for n in range(d // 2)]
        turned = 0
        for n, frequency in enumerate(pairs):  # the angle between them alone counts
            cos, sin = math.cos(distance * frequency), math.sin(distance * frequency)
            a, b, c, e = q[n], q[n + d // 2], k[n], k[n + d // 2]
            turned = turned + (a * c + b * e) * cos - (b * c - a * e) * sin
        return turned / d**0.5
    width = 2 * d
    angles = [distance * 10000 ** (-2 * n / width) for n in range(width // 2)]
    sinusoid = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
    r = attn.to_distance.weight[head * d : (head + 1) * d] @ sinusoid
    return ((q + attn.content_bias[head, 0]) @ k + (q + attn.distance_bias[head, 0]) @ r) / d**0.5


def test_an_all_ones_mask_is_no_mask(language):
    torch.testing.assert_close(language(IDS, torch.ones_like(IDS)), language(IDS))


def test_padding_changes_nothing(language):
    """Wherever it stands: a token's position is the number of tokens before it."""
    logits = language(IDS, MASK)
    for row in range(3):
        real = MASK[row] != 0
        torch.testing.assert_close(
            logits[row, real], language(IDS[row, real][None])[0], rtol=1e-12, atol=1e-12
        )


def test_order_matters(language):
    # Without positions, the last token could not tell the order of those before it.
    language.layers = language.layers[:1]
    first, second = language(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))[:, -1]
    assert not torch.allclose(first, second)


def test_no_row_of_the_mask_is_empty(language):
    # Some attention kernels return NaN for such a row, which would spread from the padding.
    assert language.places(IDS, MASK).visible.any(dim=-1).all()


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("pieces", [[9], [5, 4], [1] * 9, [2, 1, 6]], ids=str)
def test_a_cache_changes_nothing(language, mask, pieces):
    cache, logits, read = language.new_cache(), [], 0
    for piece in pieces:
        assert cache.get_seq_length() == read
        seen = None if mask is None else mask[:, : read + piece]
        logits.append(language(IDS[:, read : read + piece], seen, cache=cache))
        read += piece
    real = slice(None) if mask is None else mask != 0
    whole = language(IDS, mask)
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], whole[real], rtol=1e-12, atol=1e-12)


def test_a_cache_for_other_texts(language):
    """As beams need it: rows come again, in another order, and the last tokens are forgotten."""
    cache = language.new_cache()
    language(IDS, cache=cache)
    cache.crop(-4)
    rows = torch.tensor([2, 0, 2, 1])
    cache.reorder_cache(rows)
    assert cache.get_seq_length() == 5
    new = IDS[[0, 1, 2, 0]].flip(1)[:, :6]  # longer than what was forgotten
    whole = language(torch.cat((IDS[rows, :5], new), dim=1))[:, 5:]
    torch.testing.assert_close(language(new, cache=cache), whole, rtol=1e-12, atol=1e-12)
    cache.crop(0)
    assert cache.get_seq_length() == 11


def test_before_a_layer(language):
    seen = []

    def before_layer(index, x):
        seen.append(index)
        return 2 * x if index == 1 else x

    logits = language(IDS, before_layer=before_layer)
    assert seen == [0, 1]
    language.layers[0].register_forward_hook(lambda module, args, x: 2 * x)
    assert torch.equal(language(IDS), logits)
    assert not torch.equal(language(IDS, before_layer=before_layer), logits)


def test_logits_of_the_last_tokens(language):
    whole, rows = language(IDS, MASK), []
    language.norm.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    for keep in (1, 4, 9):
        torch.testing.assert_close(language(IDS, MASK, logits_to_keep=keep), whole[:, -keep:])
    assert rows == [1, 4, 9]


def test_sizes(language):
    assert (language.dim, language.vocab_size, language.num_layers) == (16, 10, 2)
    assert not [name for name, _ in language.named_parameters() if name.endswith(".bias")]


def test_weights_start_so_that_layers_add_as_much_as_the_embedding(seed):
    """Of variance 1 / width; what is added, in two places a layer, of that over the number of places."""
    for layer in (layers := LanguageModel(vocab_size=9, dim=64, layers=8, heads=2).layers):
        for module in (layer.attn.to_qkv, layer.attn.to_out, layer.ff[1], layer.ff[3]):
            places = 2 * len(layers) if module in (layer.attn.to_out, layer.ff[3]) else 1
            expected = (module.in_features * places) ** -0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)


def test_gradients_pass_a_frozen_model(language):
    x = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    language.freeze()(IDS, before_layer=lambda i, h: h + x).sum().backward()
    assert x.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in language.parameters())


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_empty(language, batch, length):
    assert language(IDS[:batch, :length]).shape == (batch, length, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "learnt"}, "positions 'rotary' or 'relative', got 'learnt'"),
        ({"dim": 6}, "dim to be an even multiple of heads=2, got 6"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(**{"vocab_size": 10, "dim": 8, "layers": 1, "heads": 2, **changes})


def test_mask_of_another_shape(language):
    with pytest.raises(ValueError, match=r"attention_mask with shape \(3, 9\).*got \(3, 8\)"):
        language(IDS, MASK[:, :8])
    cache = language.new_cache()
    language(IDS, cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask with shape \(3, 10\), .*cache.*got \(3, 1\)"):
        language(IDS[:, :1], MASK[:, :1], cache=cache)
