"""What follows a prompt.

tokens       greedy, sampled, all at once or one by one
beams        the search
texts        documents to texts
context      what a model has read, so that further turns can follow
prompts      a prompt that is read once, for many to go on from
latents      what a model makes of images and clips, each made once and kept
command      `python -m flamingo complete`
"""

from flamingo.generation.beams import beam_search
from flamingo.generation.context import Context, Model
from flamingo.generation.latents import Latents
from flamingo.generation.prompts import Prompt, read_prompt
from flamingo.generation.texts import complete, stream_text
from flamingo.generation.tokens import choose, generate, stream

__all__ = [
    "Context",
    "Latents",
    "Model",
    "Prompt",
    "beam_search",
    "choose",
    "complete",
    "generate",
    "read_prompt",
    "stream",
    "stream_text",
]
