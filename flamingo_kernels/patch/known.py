"""The known code of the classes that are swapped, and of those within them whose forward is replaced too.

The table holds hashes, see `source.code_hash`, by the name of the class. `python -m flamingo_kernels.patch`
prints those of the installed libraries, and the entry of a class by its name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from torch import nn

from .source import Unreadable, code_hash

KNOWN: Mapping[str, Mapping[str, str]] = {
    "flamingo.modules.MaskedCrossAttention": {
        "1513437f1a1ae75b": "this one",
    },
    "flamingo.modules.GatedCrossAttentionBlock": {
        "3ff08dd62a3747d3": "this one",
    },
    "flamingo.modules.PerceiverAttention": {
        "cfe7f6b0f00cb7a9": "this one",
    },
    "flamingo.modules.PerceiverResampler": {
        "0f69823ef86b81cb": "this one",
    },
    "flamingo.modules.SquaredReLU": {
        "fe4adc1642696e92": "this one",
    },
    "open_flamingo.src.helpers.MaskedCrossAttention": {
        "251493196b2a65ff": "open-flamingo 2.0.0 to 2.0.1",
    },
    "open_flamingo.src.helpers.GatedCrossAttentionBlock": {
        "c13e63bfbd1095ee": "open-flamingo 2.0.0 to 2.0.1",
    },
    "open_flamingo.src.helpers.PerceiverAttention": {
        "fc7f9122dc2a592f": "open-flamingo 0.0.2 to 2.0.1",
        "57919814209b2820": "mmpretrain 1.2.0",
    },
    "open_flamingo.src.helpers.PerceiverResampler": {
        "1e08ed73f12b15c7": "open-flamingo 0.0.2 to 2.0.1",
        "f50d4cdba35a0052": "mmpretrain 1.2.0",
    },
    "open_flamingo_v1.src.helpers.MaskedCrossAttention": {
        "825ec420653ee3a3": "open-flamingo 0.0.2",
        "d8f8f4a777fdac6c": "mmpretrain 1.2.0",
    },
    "open_flamingo_v1.src.helpers.GatedCrossAttentionBlock": {
        "2a06425635803021": "open-flamingo 0.0.2",
    },
    "open_flamingo_vlm.src.helpers.MaskedCrossAttention": {
        "489d6802192311f7": "open_flamingo@mllm 2023.12",
    },
    "open_flamingo_vlm.src.helpers.PerceiverResampler": {
        "ce16666a2f249768": "open_flamingo@mllm 2023.12",
    },
    "xgen_mm.src.helpers.PerceiverAttention": {
        "0743d48dd526ba6c": "LAVIS@xgen-mm 2024.10",
    },
    "xgen_mm.src.helpers.PerceiverResampler": {
        "38e7d0e3653debf4": "LAVIS@xgen-mm 2024.10",
    },
    "otter_ai.models.otter.modeling_otter.OtterMaskedCrossAttention": {
        "55e0419d0e32a628": "otter-ai 0.0.0a8",
        "b91d4e393f6c3248": "otter-ai 0.0.0a8",
    },
    "otter_ai.models.otter.modeling_otter.OtterGatedCrossAttentionBlock": {
        "07e5ea7f478ce7ea": "otter-ai 0.0.0a8",
    },
    "otter_ai.models.otter.modeling_otter.OtterPerceiverBlock": {
        "54c4f87cb4c6cb8b": "otter-ai 0.0.0a8",
    },
    "otter_ai.models.otter.modeling_otter.OtterPerceiverResampler": {
        "f81f345f13cdbbe7": "otter-ai 0.0.0a8",
    },
    "flamingo_pytorch.flamingo_pytorch.MaskedCrossAttention": {
        "3ca1bb121539714f": "flamingo-pytorch 0.1.2",
    },
    "flamingo_pytorch.flamingo_pytorch.GatedCrossAttentionBlock": {
        "c2589dae700cd693": "flamingo-pytorch 0.1.0 to 0.1.2",
    },
    "flamingo_pytorch.flamingo_pytorch.PerceiverAttention": {
        "540657ba1ada1652": "flamingo-pytorch 0.1.0 to 0.1.2",
    },
    "flamingo_pytorch.flamingo_pytorch.PerceiverResampler": {
        "3ef74601e0d7986e": "flamingo-pytorch 0.1.0 to 0.1.2",
    },
    "transformers.models.idefics.modeling_idefics.IdeficsGatedCrossAttentionLayer": {
        "694f25f00d138d3c": "transformers 4.57.6",
        "0c7d2b68f287492c": "transformers 5.0.0 to 5.22.2",
        "0130a98c519832e7": "transformers 5.23.0",
        "453a380902491e3a": "transformers 5.24.0",
    },
    "transformers.models.idefics.modeling_idefics.IdeficsAttention": {
        "ace1ea51e496329e": "transformers 4.57.6",
        "76598930a80a2d54": "transformers 5.0.0",
        "aa791a1321fe8090": "transformers 5.1.0 to 5.3.0",
        "5fae73460d0b11a7": "transformers 5.4.0 to 5.16.1",
        "7e0cddbbd131b578": "transformers 5.17.0 to 5.23.0",
        "e12ccf5a489846fe": "transformers 5.24.0",
    },
    "transformers.models.idefics.modeling_idefics.IdeficsMLP": {
        "c7f46661918c0ac9": "transformers 4.57.6 to 5.24.0",
    },
    "transformers.models.idefics.modeling_idefics.IdeficsRMSNorm": {
        "f8cd92445899b658": "transformers 4.57.6 to 5.24.0",
    },
    "transformers.models.idefics.perceiver.IdeficsPerceiverAttention": {
        "12d5585e2de91882": "transformers 4.57.6 to 5.24.0",
    },
    "transformers.models.idefics2.modeling_idefics2.Idefics2PerceiverAttention": {
        "e0a850602734f548": "transformers 4.57.6",
        "ed750a68b3b75676": "transformers 5.0.0",
        "a3333e2d963746b0": "transformers 5.1.0",
        "64052da08b18cded": "transformers 5.2.0 to 5.23.0",
        "357c860b5936b0d6": "transformers 5.24.0",
    },
    "transformers.models.mllama.modeling_mllama.MllamaTextCrossAttention": {
        "6900fa28af13a06d": "transformers 4.57.6",
        "70ebd5cec3709533": "transformers 5.0.0",
        "67b53f1477d15e55": "transformers 5.1.0",
        "7e3638c91da21f95": "transformers 5.2.0 to 5.3.0",
        "5706c0dde7ef0018": "transformers 5.4.0 to 5.17.0",
        "f8313c393bfce548": "transformers 5.18.0 to 5.23.0",
        "10e5a9d489bb53b5": "transformers 5.24.0",
    },
    "transformers.models.mllama.modeling_mllama.MllamaCrossAttentionDecoderLayer": {
        "ebc6789285126f9a": "transformers 4.57.6",
        "32766ed3b7a42aed": "transformers 5.0.0 to 5.3.0",
        "7f934cf19b255ae4": "transformers 5.4.0 to 5.22.2",
        "1bb90e4fb3f7f064": "transformers 5.23.0",
        "a9b233cf02e79cde": "transformers 5.24.0",
    },
    "transformers.models.mllama.modeling_mllama.MllamaTextRMSNorm": {
        "f48863d8f97ba423": "transformers 4.57.6 to 5.24.0",
    },
    "transformers.models.mllama.modeling_mllama.MllamaTextMLP": {
        "0c3c6a76784e6be0": "transformers 4.57.6 to 5.24.0",
    },
    "transformers.models.evolla.modeling_evolla.EvollaSequenceCompressorAttention": {
        "1c7e5ad2f7bb375c": "transformers 4.57.6 to 5.24.0",
    },
    "transformers.models.evolla.modeling_evolla.EvollaSequenceAlignerCrossAttention": {
        "b06df8e5b535acd2": "transformers 4.57.6",
        "d67a2941d884cb7e": "transformers 5.0.0 to 5.23.0",
        "a7e878f5830bc530": "transformers 5.24.0",
    },
    "transformers.models.evolla.modeling_evolla.EvollaFeedForward": {
        "7ec54a96c5ec9131": "transformers 4.57.6 to 5.24.0",
    },
    "transformers.models.evolla.modeling_evolla.EvollaRMSNorm": {
        "f48863d8f97ba423": "transformers 4.57.6 to 5.24.0",
    },
    "flamingo_mini.gated_cross_attention.MaskedCrossAttention": {
        "0b13ecd38632c08f": "flamingo-mini main",
    },
    "flamingo_mini.gated_cross_attention.GatedCrossAttentionBlock": {
        "579a673668e132a2": "flamingo-mini main",
    },
    "flamingo_mini.perceiver_resampler.PerceiverAttentionLayer": {
        "88f09851b0800af1": "flamingo-mini main",
    },
    "torchtune.modules.transformer.TransformerCrossAttentionLayer": {
        "0b36eea78d0ad876": "torchtune 0.5.0 to 0.6.1",
    },
    "torchtune.modules.attention.MultiHeadAttention": {
        "11205f46a5fa9a49": "torchtune 0.5.0 to 0.6.1",
    },
    "torchtune.modules.rms_norm.RMSNorm": {
        "c4fda1712a91141f": "torchtune 0.5.0 to 0.6.1",
    },
    "torchtune.modules.feed_forward.FeedForward": {
        "d89c6228df7635be": "torchtune 0.5.0 to 0.6.1",
    },
    "torchtune.modules.tanh_gate.TanhGate": {
        "c4eb33690616810d": "torchtune 0.5.0 to 0.6.1",
    },
    "audio_flamingo_2.src.helpers.MaskedCrossAttention": {
        "521e4d328615819f": "audio-flamingo 1 to 2",
    },
    "audio_flamingo_2.src.helpers.GatedCrossAttentionBlock": {
        "2f80b7781b8988d4": "audio-flamingo 1 to 2",
    },
    "inference_HF_pretrained.src.helpers.MaskedCrossAttention": {
        "50e0ca2f97e5c427": "audio-flamingo 2",
    },
    "whisper_flamingo.whisper.model.ResidualAttentionBlock": {
        "e4a7eae02aa5c269": "whisper-flamingo main",
    },
    "whisper_flamingo.whisper.model.MultiHeadAttention": {
        "3f76f20c7659d758": "whisper-flamingo main",
    },
    "whisper_flamingo.whisper.model.Linear": {
        "04eed6ceb42a2f87": "whisper-flamingo main",
    },
    "ip_adapter.resampler.PerceiverAttention": {
        "345dac61ee8da60b": "IP-Adapter 2023.8.23 to 2024.6.28",
    },
    "ip_adapter.resampler.Resampler": {
        "6755ef65b316ca47": "IP-Adapter 2023.8.23",
        "62489ec5d0ee9cd0": "IP-Adapter 2023.11.8 to 2024.6.28",
    },
    "transformers.activations.ReLUSquaredActivation": {
        "7035acac655aec0c": "transformers 4.57.6 to 5.24.0",
    },
    "transformers.activations.SiLUActivation": {
        "a5a9b55f9411597a": "transformers 4.57.6 to 5.24.0",
    },
    "transformers.activations.GELUActivation": {
        "086ef2d89fd7dfba": "transformers 4.57.6 to 5.24.0",
    },
}


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def load(name: str) -> type[nn.Module]:
    """A class by its full name. Raises ImportError, AttributeError, or TypeError if it is no class."""
    from ..testing.tiny import open_flamingo_module

    home, _, cls = name.rpartition(".")
    if home.startswith("open_flamingo."):
        open_flamingo_module(home.rpartition(".")[2])  # without the libraries that it needs for a whole model
    found = getattr(importlib.import_module(home or cls), cls)
    if not isinstance(found, type):
        raise TypeError(f"it is a {type(found).__name__}")
    return found


def installed() -> Iterator[tuple[str, str]]:
    """Every class of the table whose library is installed, with its hash or the reason why it has none."""
    for name in KNOWN:
        try:
            yield name, code_hash(load(name))
        except ImportError:
            continue
        except (AttributeError, Unreadable) as error:
            yield name, str(error)
