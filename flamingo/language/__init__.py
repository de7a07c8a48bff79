"""Language models: tokens to logits, one layer after the other, with room in front of every layer.

decoder      a decoder of one's own, Chinchilla's
cache        what it keeps of the tokens it has read
pretrained   any causal language model of transformers
new_tokens   tokens that are learnt beside a frozen language model
loss         of the next token, where logits of all tokens need not exist
mpt_1b       the language model of OpenFlamingo-3B, which transformers lacks

Both are called alike; `before_layer` is where Flamingo slips its blocks in::

    logits = language(input_ids, attention_mask, cache=language.new_cache(), before_layer=lambda i, x: x)
"""

from flamingo.language.cache import KVCache
from flamingo.language.decoder import LanguageModel
from flamingo.language.mpt_1b import load_mpt_1b
from flamingo.language.new_tokens import NewTokens
from flamingo.language.pretrained import PretrainedLanguage

__all__ = ["KVCache", "LanguageModel", "NewTokens", "PretrainedLanguage", "load_mpt_1b"]
