"""A Flamingo (arXiv 2204.14198) in plain PyTorch, to be read.

modules      the layers that are trained: gated cross-attention and the Perceiver Resampler
model        Flamingo, put together
config       sizes, and the presets of the published models
processor    documents of text and images to tensors
media        images and videos, in memory or in files, to frames
tokenizer    bytes and special tokens, or any tokenizer of transformers
vision       vision encoders: a small ViT, NFNet, CLIP and SigLIP
contrastive  pre-training of a vision encoder on pairs of images and texts
language     a small language model
training     of what is new, on tar shards, by one process or many
transformer  the layer those two share
fewshot      prompts, closed-ended scoring, retrieval, metrics, evaluation over datasets on disk
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
from flamingo.tokenizer import ByteTokenizer, PretrainedTokenizer
from flamingo.vision import NFNet, PretrainedVision, VisionEncoder

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
    "NFNet",
    "PerceiverAttention",
    "PerceiverResampler",
    "PretrainedTokenizer",
    "PretrainedVision",
    "Processor",
    "VisionEncoder",
    "dense_masked_attention",
    "interpolate_time",
    "text_time",
]
