"""Text to ids and back: as bytes, or by any tokenizer of transformers."""

import re
from collections.abc import Iterable
from typing import Any, Protocol

IMAGE, EOC = "<image>", "<EOC>"
OPEN_FLAMINGO_EOC = "<|endofchunk|>"


class Tokenizer(Protocol):
    """What `Processor` asks of a tokenizer.

    `encode` recognises `<image>` and `<EOC>` where they are spelled out and adds nothing of its own; `decode`
    spells them out and leaves other special tokens out.
    """

    image_id: int
    eoc_id: int
    pad_id: int
    eos_id: int

    @property
    def bos_id(self) -> int | None: ...  # None: a text begins with its first word

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """Ids 0..255 are bytes; `<image>`, `<EOC>` (end of chunk), `<PAD>`, `<BOS>` and `<EOS>` follow.

    `<image>` and `<EOC>` are also recognised when they are spelled out in a text.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("Hi<image>")
    [72, 105, 256]
    >>> tokenizer.decode([72, 105, 256, 258])
    'Hi<image>'
    """

    image_id = 256
    eoc_id = 257
    pad_id = 258
    bos_id = 259
    eos_id = 260
    vocab_size = 261

    def __init__(self):
        self._spelled_out = {IMAGE: self.image_id, EOC: self.eoc_id}

    def encode(self, text: str) -> list[int]:
        """Text to ids, without `<BOS>` and `<EOS>`."""
        ids: list[int] = []
        for part in re.split(f"({IMAGE}|{EOC})", text):
            ids += [self._spelled_out[part]] if part in self._spelled_out else part.encode()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text: `<image>` and `<EOC>` spelled out, other special tokens left out, bad UTF-8 as `�`."""
        names = {id: name.encode() for name, id in self._spelled_out.items()}
        data = b"".join(bytes([id]) if id < 256 else names.get(id, b"") for id in map(int, ids))
        return data.decode(errors="replace")


class PretrainedTokenizer:
    """A tokenizer of transformers with `<image>` and `<EOC>` added to it.

    The language model needs to know them: `PretrainedLanguage(model, new_tokens=[image_id, eoc_id])`, and
    `FlamingoConfig(media_token_id=image_id)`. A tokenizer without a beginning of text begins with its end of
    text, as GPT-2 was trained; one without padding pads with it too, which the masks and labels leave out.

    Args:
        tokenizer: of transformers; it is changed.
        end_of_chunk: what the tokenizer calls `<EOC>`; in texts it is `<EOC>` all the same.
        begins: whether a text begins with a token for its beginning; if not, `bos_id` is None.

    Attributes:
        vocab_size: number of ids, those added included.

    Raises:
        ValueError: if it has no end of text.

    Example; `PretrainedTokenizer(AutoTokenizer.from_pretrained(name))` takes one by its name:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "cat": 2, "?": 3}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="?")
        >>> tokenizer = PretrainedTokenizer(tokenizer)
        >>> tokenizer.encode("<image>a cat<EOC>"), tokenizer.vocab_size
        ([4, 1, 2, 5], 6)
        >>> processor = Processor(image_size=32, tokenizer=tokenizer)
        >>> processor([[torch.zeros(3, 8, 8), "a cat"]]).input_ids.tolist()
        [[0, 4, 1, 2, 5, 0]]
    """

    def __init__(self, tokenizer: Any, *, end_of_chunk: str = EOC, begins: bool = True):
        tokenizer.add_tokens([IMAGE, end_of_chunk], special_tokens=True)
        self.tokenizer = tokenizer
        self.end_of_chunk = end_of_chunk
        self.image_id: int = tokenizer.convert_tokens_to_ids(IMAGE)
        self.eoc_id: int = tokenizer.convert_tokens_to_ids(end_of_chunk)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"PretrainedTokenizer: expected a tokenizer with an end of text, got "
                f"{type(tokenizer).__name__} without. Set its eos_token."
            )
        self.eos_id: int = tokenizer.eos_token_id
        bos_id: int = self.eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.bos_id: int | None = bos_id if begins else None
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.vocab_size: int = len(tokenizer)

    @staticmethod
    def open_flamingo(tokenizer: Any) -> "PretrainedTokenizer":
        """With the tokens of open_flamingo, under the same ids, for its checkpoints.

        They are `<|endofchunk|>`, `<image>` and, where the tokenizer pads with nothing, `<PAD>`. A text
        begins as the tokenizer begins one: LLaMA's with `<s>`, OPT's with `</s>`, GPT-NeoX's and MPT's with
        nothing. The texts given to `Processor` still spell the end of a chunk `<EOC>`.

        Args:
            tokenizer: of transformers; it is changed.

        Raises:
            ValueError: see the class.

        Source: open_flamingo 2.0.1, factory.py.

        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "cat": 2, "?": 3}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="?")
        >>> tokenizer = PretrainedTokenizer.open_flamingo(tokenizer)
        >>> tokenizer.eoc_id, tokenizer.image_id, tokenizer.pad_id
        (4, 5, 6)
        >>> processor = Processor(image_size=32, tokenizer=tokenizer)
        >>> processor([[torch.zeros(3, 8, 8), "a cat"]]).input_ids.tolist()
        [[5, 1, 2, 4, 0]]
        """
        begins = bool(tokenizer.encode(""))
        tokenizer.add_tokens([OPEN_FLAMINGO_EOC, IMAGE], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": "<PAD>"})
        return PretrainedTokenizer(tokenizer, end_of_chunk=OPEN_FLAMINGO_EOC, begins=begins)

    def encode(self, text: str) -> list[int]:
        """Text to ids, without any that begin or end a text."""
        text = text.replace(EOC, self.end_of_chunk)
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text: `<image>` and `<EOC>` spelled out, padding, beginning and end of text left out."""
        frame = {self.bos_id, self.eos_id, self.pad_id}
        text = self.tokenizer.decode([id for id in map(int, ids) if id not in frame])
        return text.replace(self.end_of_chunk, EOC)
