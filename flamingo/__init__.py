"""A Flamingo (arXiv 2204.14198) in plain PyTorch, to be read.

modules      the layers that are trained: gated cross-attention and the Perceiver Resampler
model        Flamingo, put together
config       sizes, and the presets of the published models
processor    documents of text and images to tensors
tokenizer    bytes and special tokens
vision       a small vision encoder
language     a small language model
transformer  the layer those two share
"""

from flamingo.config import FlamingoConfig
from flamingo.language import LanguageModel
from flamingo.model import Flamingo, FlamingoOutput
from flamingo.modules import (
    FeedForward,
    GatedCrossAttentionBlock,
    MaskedCrossAttention,
    PerceiverAttention,
    PerceiverResampler,
    dense_masked_attention,
    interpolate_time,
    text_time,
)
from flamingo.processor import Batch, Processor
from flamingo.tokenizer import ByteTokenizer
from flamingo.vision import VisionEncoder

__all__ = [
    "Batch",
    "ByteTokenizer",
    "FeedForward",
    "Flamingo",
    "FlamingoConfig",
    "FlamingoOutput",
    "GatedCrossAttentionBlock",
    "LanguageModel",
    "MaskedCrossAttention",
    "PerceiverAttention",
    "PerceiverResampler",
    "Processor",
    "VisionEncoder",
    "dense_masked_attention",
    "interpolate_time",
    "text_time",
]
