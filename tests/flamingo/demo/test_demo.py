"""The demo: its text, its documents, its trainings, and (slow) that it learns."""

import pytest
import torch

from flamingo.demo import run, stages
from flamingo.demo.digits import WAYS, episode, load, prompt
from flamingo.demo.words import NAMES, NOUNS, WordTokenizer, lists

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_tokenizer():
    tokenizer = WordTokenizer()
    ids = tokenizer.encode("lamp is nine<EOC><image>")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.pad_id]) == "lamp is nine <EOC> <image>"
    assert len(set(tokenizer.words)) == tokenizer.vocab_size
    with pytest.raises(ValueError, match="expected words of the demo, got 'dog'"):
        tokenizer.encode("dog is nine")


def test_a_noun_keeps_its_number():
    tokenizer = WordTokenizer()
    texts = lists(50, 9, generator())
    assert texts.shape == (50, 37)
    again = 0
    for text in texts:
        words = tokenizer.decode(text).replace(" <EOC>", "").split()
        assert words[1::3] == ["is"] * 9
        pairs = list(zip(words[::3], words[2::3], strict=True))
        numbers = dict(pairs)
        assert all(noun in NOUNS and number in NAMES for noun, number in pairs)
        assert all(numbers[noun] == number for noun, number in pairs)
        again += 9 - len(numbers)
    assert again > 50
    numbers = {
        dict(zip(t[1::4].tolist(), t[3::4].tolist(), strict=True)).get(texts[0, 1].item()) for t in texts
    }
    assert len(numbers - {None}) > 1, "a noun has a number of its own in every text"


def test_digits_are_held_out():
    digits, held_out = load()
    assert (len(digits.labels), len(held_out.labels)) == (1400, 397)
    assert digits.images.shape[1:] == (3, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 1)
    rows = {tuple(image.flatten().tolist()) for image in digits.images}
    assert not rows & {tuple(image.flatten().tolist()) for image in held_out.images}


@pytest.mark.parametrize("codes", [False, True])
def test_episodes(codes):
    """Names are the digits' own, or one for each digit that is drawn for the episode."""
    digits, _ = load()
    label_of = {
        tuple(x.flatten().tolist()): y for x, y in zip(digits.images, digits.labels.tolist(), strict=True)
    }
    draw, own = generator(), 0
    for _ in range(20):
        query, shots = episode(digits, 8, draw, codes=codes)
        pairs = [(label_of[tuple(s.image.flatten().tolist())], s.answer) for s in (*shots, query)]
        names = dict(pairs)
        assert all(names[digit] == name for digit, name in pairs)
        assert len(set(names.values())) == len(names)
        assert not codes or len(names) <= WAYS
        own += all(NAMES[digit] == name for digit, name in pairs)
    assert own == (0 if codes else 20)


def test_prompts():
    digits, _ = load()
    query, (shot,) = episode(digits, 1, generator(), codes=True)
    document = prompt(query, [shot], codes=True)
    batch = stages.make_processor()([document], prompt=True)
    assert WordTokenizer().decode(batch.input_ids[0]) == (
        f"codes <EOC> <image> is {shot.answer} <EOC> <image> is"
    )
    assert batch.pixels.shape == (1, 2, 1, 3, 8, 8)
    assert abs(stages._normalised(digits.images).mean()) < 0.01
    assert torch.allclose(batch.pixels[0, 1, 0], stages._normalised(query.image), atol=1e-6)


def test_what_is_frozen_stays_and_what_is_not_learns():
    digits, _ = load()
    torch.manual_seed(0)
    model = run.Flamingo(stages.CONFIG).freeze()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = stages.train(model, stages.documents(digits, stages.make_processor(), count=8), steps=12)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("vision.", "language."))
        assert torch.equal(parameter, before[name]) == frozen, name


def test_quick(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert run.main(tmp_path / "digits.png", quick=True) == 0
    said = capsys.readouterr().out
    assert "with the kernels the first losses differ by at most" in said
    assert "GatedCrossAttentionBlock" in said
    assert (tmp_path / "digits.png").stat().st_size > 1000


def test_patched_training_has_the_same_losses():
    """Within what rounding in another order does to ten steps."""
    from flamingo_kernels import patch

    digits, _ = load()
    torch.manual_seed(0)
    model = run.Flamingo(stages.CONFIG).freeze()
    assert run._same_losses(model, digits, patch, steps=10) < 1e-5

    def a_little_wrong(model):
        model.cross_attn["0"].attn_gate.data.mul_(1.01)

    assert run._same_losses(model, digits, a_little_wrong, steps=10) > 1e-5


def test_what_counts_as_learnt():
    def found(zero, eight, names):
        return run.Findings(names={0: names}, codes={0: zero, 8: eight})

    assert run._has_learnt(found(0.1, 0.8, 0.95))
    assert not run._has_learnt(found(0.1, 0.25, 0.95))
    assert not run._has_learnt(found(0.1, 0.8, 0.85))


@pytest.mark.slow
def test_it_learns(tmp_path):
    assert run.main(tmp_path / "digits.png") == 0
