"""MPT-1B in transformers' MPT: what its paper and configuration say, computed plainly."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from flamingo import PretrainedLanguage
from flamingo.language.mpt_1b import load_mpt_1b

pytest.importorskip("transformers")

DIM, HEADS, LAYERS, WORDS = 32, 4, 2, 50
CONFIG = {
    "model_type": "mosaic_gpt",
    "d_model": DIM,
    "n_heads": HEADS,
    "n_layers": LAYERS,
    "max_seq_len": 64,
    "vocab_size": WORDS,
    "mlp_ratio": 4,
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_qk_ln": True,
    "attn_clip_qkv": None,
    "no_bias": True,
}


def weights():
    """By the names of the published checkpoint."""
    shapes = {"wte": (WORDS, DIM), "ln_f": (DIM,)}
    for layer in range(LAYERS):
        block = {"ln_1": (DIM,), "ln_2": (DIM,), "attn.Wqkv": (3 * DIM, DIM), "attn.out_proj": (DIM, DIM)}
        block |= {"attn.q_ln": (DIM,), "attn.k_ln": (DIM,)}
        block |= {"mlp.mlp_up": (4 * DIM, DIM), "mlp.mlp_down": (DIM, 4 * DIM)}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return {f"transformer.{name}.weight": 0.4 * torch.randn(shape) for name, shape in shapes.items()}


def save(folder, state, **changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    torch.save(state, folder / "pytorch_model.bin")
    return str(folder)


def plain(state, ids):
    """Its forward pass: ids `[B, T]` to logits `[B, T, V]`."""

    def norm(x, name):
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"])

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"])

    place = torch.arange(ids.shape[1])
    slopes = 2.0 ** -(8 * torch.arange(1, HEADS + 1) / HEADS)
    bias = slopes[:, None, None] * (place - place[:, None])  # ALiBi: minus the distance
    bias = bias.masked_fill(place > place[:, None], -torch.inf)
    x = state["transformer.wte.weight"][ids]
    for layer in range(LAYERS):
        block = f"transformer.blocks.{layer}."
        q, k, v = linear(norm(x, f"{block}ln_1"), f"{block}attn.Wqkv").chunk(3, dim=-1)
        q, k = norm(q, f"{block}attn.q_ln"), norm(k, f"{block}attn.k_ln")
        q, k, v = (rearrange(t, "b t (h d) -> b h t d", h=HEADS) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(DIM // HEADS) + bias
        x = x + linear(rearrange(scores.softmax(-1) @ v, "b h t d -> b t (h d)"), f"{block}attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}ln_2"), f"{block}mlp.mlp_up")), f"{block}mlp.mlp_down")
    return norm(x, "transformer.ln_f") @ state["transformer.wte.weight"].T


def test_logits(tmp_path):
    state = weights()
    language, ids = PretrainedLanguage(load_mpt_1b(save(tmp_path, state))), torch.randint(WORDS, (2, 12))
    expected = plain(state, ids)
    torch.testing.assert_close(language(ids), expected, rtol=1e-4, atol=1e-4)
    cache = language.new_cache()
    pieces = [language(piece, cache=cache) for piece in ids.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_rows_are_added_and_cut(tmp_path):
    state = weights()
    model = load_mpt_1b(save(tmp_path, state))
    for rows in (WORDS - 4, WORDS + 3):
        model.resize_token_embeddings(rows, mean_resizing=False)
        assert PretrainedLanguage(model, new_tokens=[rows - 1]).vocab_size == rows
    ids = torch.randint(WORDS - 4, (1, 6))
    assert model(ids).logits.shape == (1, 6, WORDS + 3)
    torch.testing.assert_close(
        model(ids).logits[..., : WORDS - 4], plain(state, ids)[..., : WORDS - 4], rtol=1e-4, atol=1e-4
    )


def test_several_files_and_a_precision(tmp_path):
    state = weights()
    names = list(state)
    save(tmp_path, {})
    (tmp_path / "pytorch_model.bin").unlink()
    for part, chosen in enumerate((names[::2], names[1::2])):
        torch.save({name: state[name] for name in chosen}, tmp_path / f"pytorch_model-{part}.bin")
    model = load_mpt_1b(str(tmp_path), dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.transformer.wte.weight, state["transformer.wte.weight"].bfloat16())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.training


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mpt"},
        {"attn_qk_ln": False},
        {"alibi": False},
        {"no_bias": False},
        {"attn_clip_qkv": 6},
    ],
    ids=str,
)
def test_another_kind_of_checkpoint(tmp_path, changes):
    ((key, value),) = changes.items()
    message = rf"expected a checkpoint of MPT-1B, with .*{key}.*, got .*{value}.*from_pretrained"
    with pytest.raises(ValueError, match=message):
        load_mpt_1b(save(tmp_path, weights(), **changes))


def test_other_weights(tmp_path):
    state = weights()
    del state["transformer.blocks.1.attn.q_ln.weight"]
    state["transformer.wpe.weight"] = torch.ones(64, DIM)
    message = (
        r"got 1 others \['transformer.wpe.weight'\] and not 1 of them \['transformer.blocks.1.attn.Wqkv.q_ln"
    )
    with pytest.raises(ValueError, match=message):
        load_mpt_1b(save(tmp_path, state))
    del state["transformer.wpe.weight"]
    with pytest.raises(ValueError, match=r"got 0 others .* and not 1 of them"):
        load_mpt_1b(save(tmp_path, state))
