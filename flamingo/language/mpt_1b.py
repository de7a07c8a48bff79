"""MPT-1B, the language model of OpenFlamingo-3B; transformers has only its successors.

It is an MPT whose queries and keys have a LayerNorm each, over the width of all heads. Its code on the hub is
that of "mosaic_gpt", for transformers 4.27; here its weights go into transformers' MPT.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flamingo.pretrained import read_json

# What its configuration says, and transformers' MPT computes.
_CHOICES = {
    "model_type": "mosaic_gpt",
    "attn_qk_ln": True,
    "alibi": True,
    "alibi_bias_max": 8,
    "no_bias": True,
    "attn_clip_qkv": None,
    "softmax_scale": None,
    "logit_scale": None,
    "prefix_lm": False,
}
_SIZES = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size")
_RENAMED = {
    r"\.ln_([12f])\.": r".norm_\1.",
    r"\.mlp\.mlp_(up|down)\.": r".ffn.\1_proj.",
    r"\.attn\.([qk]_ln)\.": r".attn.Wqkv.\1.",
}


class NormedProjection(nn.Linear):
    """Queries, keys and values by one matrix, the first two normed: `[LN(q) ; LN(k) ; v]`.

    >>> NormedProjection(8)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 24])
    """

    def __init__(self, dim: int):
        super().__init__(dim, 3 * dim, bias=False)
        self.q_ln = nn.LayerNorm(dim, bias=False)
        self.k_ln = nn.LayerNorm(dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., D]` to `[..., 3 * D]`."""
        q, k, v = super().forward(x).chunk(3, dim=-1)
        return torch.cat((self.q_ln(q), self.k_ln(k), v), dim=-1)


def load_mpt_1b(name: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """The language model of a checkpoint, for `PretrainedLanguage`.

    Args:
        name: its name on the hub, as "anas-awadalla/mpt-1b-redpajama-200b" or the same with "-dolly", or its
            folder. None of its code is run.
        dtype: of the weights.

    Returns:
        A `MptForCausalLM` of transformers in eval mode.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if it is another kind of checkpoint, or has other weights than its configuration says.

    Source: the configuration and attention of "mosaic_gpt" (MosaicML, 2023); arXiv 2108.12409 (ALiBi).

    ::

        language_model = load_mpt_1b("anas-awadalla/mpt-1b-redpajama-200b")  # downloads 5 GB
        language = PretrainedLanguage(language_model)
    """
    from transformers import MptConfig, MptForCausalLM

    folder = _folder(name)
    config = read_json(folder / "config.json")
    wrong = {key: value for key, value in _CHOICES.items() if config.get(key, value) != value}
    if wrong:
        raise ValueError(
            f"load_mpt_1b: expected a checkpoint of MPT-1B, with {wrong}, got {name} with "
            f"{ ({key: config[key] for key in wrong}) }. Others: PretrainedLanguage.from_pretrained(name)."
        )
    with torch.device("meta"):
        model: Any = MptForCausalLM(MptConfig(**{key: config[key] for key in _SIZES}))
        for block in model.transformer.blocks:
            block.attn.Wqkv = NormedProjection(config["d_model"])
    state = {_renamed(key): value.to(dtype) for key, value in _weights(folder).items()}
    missing, others = model.load_state_dict(state, strict=False, assign=True)
    missing = [key for key in missing if key != "lm_head.weight"]  # which is the embedding
    if missing or others:
        raise ValueError(
            f"{folder}: expected the weights that config.json describes, got {len(others)} others "
            f"{others[:3]} and not {len(missing)} of them {missing[:3]}. Download it again."
        )
    model.tie_weights()
    return model.eval()


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    hub = import_module("huggingface_hub")
    return Path(hub.snapshot_download(name, allow_patterns=["config.json", "*.bin", "*.safetensors"]))


def _weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= import_module("safetensors.torch").load_file(file)
    if not state:
        for file in sorted(folder.glob("pytorch_model*.bin")):
            state |= torch.load(file, map_location="cpu", weights_only=True)
    return state


def _renamed(key: str) -> str:
    for old, new in _RENAMED.items():
        key = re.sub(old, new, key)
    return key
