"""A Flamingo (arXiv 2204.14198) in plain PyTorch, to be read.

modules        the layers that are trained: gated cross-attention and the Perceiver Resampler
model          Flamingo, put together
config         sizes, and the presets of the published models
open_flamingo  the weights of OpenFlamingo's published models
processor      documents of text and images to tensors
media          images and videos, in memory or in files, to frames
pixels         images of every type and mode to colours
tokenizer      bytes and special tokens, or any tokenizer of transformers
vision         vision encoders: a small ViT, NFNet, CLIP and SigLIP
contrastive    pre-training of a vision encoder on pairs of images and texts
language       language models: a decoder, and those of transformers
pretrained     folders of transformers' models, read whole
generation     what follows a prompt: greedy, sampled, by beam search, token by token
fingerprint    what tells encoders and media apart, to know what was kept of them
saved          a whole model in one file
kernels        faster layers, for the commands
starting       Ctrl-C before a command has begun
threads        how long they wait for work
machine        what a result was computed on
command_line   what every command does with a mistake
ranges         which numbers a configuration may have
json_lines     what is handed in, and results and logs that a crash may have damaged
text_files     texts that are handed in
training       of what is new, on tar shards, by one process or many
demo           all of it on real digits, from nothing
fewshot        prompts, closed-ended scoring, retrieval, metrics, evaluation over datasets on disk
"""

from flamingo import starting, threads  # noqa: F401  first: torch's OpenMP looks once for what they set

# isort: split

from flamingo.config import FlamingoConfig
from flamingo.generation import (
    Context,
    Latents,
    Prompt,
    complete,
    generate,
    read_prompt,
    stream,
    stream_text,
)
from flamingo.language import KVCache, LanguageModel, NewTokens, PretrainedLanguage, load_mpt_1b
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
from flamingo.open_flamingo import load_open_flamingo
from flamingo.processor import Batch, Processor
from flamingo.saved import load_model, save_model
from flamingo.tokenizer import ByteTokenizer, PretrainedTokenizer
from flamingo.vision import NFNet, PretrainedVision, VisionEncoder

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Context",
    "FeedForward",
    "Flamingo",
    "FlamingoConfig",
    "FlamingoOutput",
    "GatedCrossAttentionBlock",
    "KVCache",
    "LanguageModel",
    "Latents",
    "MaskedCrossAttention",
    "NFNet",
    "NewTokens",
    "PerceiverAttention",
    "PerceiverResampler",
    "PretrainedLanguage",
    "PretrainedTokenizer",
    "PretrainedVision",
    "Processor",
    "Prompt",
    "VisionEncoder",
    "complete",
    "dense_masked_attention",
    "generate",
    "interpolate_time",
    "load_model",
    "load_mpt_1b",
    "load_open_flamingo",
    "read_prompt",
    "save_model",
    "stream",
    "stream_text",
    "text_time",
]
