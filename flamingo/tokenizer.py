"""Text as its UTF-8 bytes, and five special tokens."""

import re
from collections.abc import Iterable


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
        self._spelled_out = {"<image>": self.image_id, "<EOC>": self.eoc_id}

    def encode(self, text: str) -> list[int]:
        """Text to ids, without `<BOS>` and `<EOS>`."""
        ids: list[int] = []
        for part in re.split("(<image>|<EOC>)", text):
            ids += [self._spelled_out[part]] if part in self._spelled_out else part.encode()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text: `<image>` and `<EOC>` spelled out, other special tokens left out, bad UTF-8 as `�`."""
        names = {id: name.encode() for name, id in self._spelled_out.items()}
        data = b"".join(bytes([id]) if id < 256 else names.get(id, b"") for id in map(int, ids))
        return data.decode(errors="replace")
