"""A tiny random model of every family of transformers that `PretrainedLanguage` knows."""

import pytest
import torch

from tests.helpers.weights import shake

VOCABULARY, WIDTH, LAYERS = 101, 32, 3

_PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
# By family: the configuration's class and its options.
_CONFIGS = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 5}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "ffn_dim": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            # OPT-350m's way: embeddings of another width than the layers
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _PLAIN),
    "mpt": ("MptConfig", {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4}),
    "gemma": ("GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "sliding_window_pattern": 2}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
}
FAMILIES = tuple(_CONFIGS)


def build(family: str, **changes):
    """A causal language model in float32 and eval mode, its weights random and well off where they start."""
    transformers = pytest.importorskip("transformers")
    name, options = _CONFIGS[family]
    config = getattr(transformers, name)(**options | changes)
    return shake(transformers.AutoModelForCausalLM.from_config(config)).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape)  # 0 to 2 are special in some
