"""Text to token ids and back: bytes (no vocabulary to learn) or byte-level BPE through the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from train.config import DataConfig
from train.errors import DataError


class Tokenizer(Protocol):
    """What data and sampling need. `end_id` separates documents."""

    vocab_size: int
    end_id: int

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text` as a 1-d unsigned integer array."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; what is no valid UTF-8 becomes a replacement character."""

    def to_json(self) -> str:
        """What `load_tokenizer` builds the same tokenizer from."""


class ByteTokenizer:
    """One id a byte of UTF-8, and 256 for the end of a document."""

    vocab_size = 257
    end_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return ""


class BpeTokenizer:
    """Byte-level BPE. `inner` is a `tokenizers.Tokenizer`; its end token is `<|end|>`, added where it is missing."""

    END = "<|end|>"

    def __init__(self, inner):
        self._inner = inner
        if inner.token_to_id(self.END) is None:
            inner.add_special_tokens([self.END])
        self.vocab_size = inner.get_vocab_size()
        self.end_id = inner.token_to_id(self.END)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._inner.encode(text).ids, dtype=np.uint32)

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode([i for i in ids if i < self.vocab_size])

    def to_json(self) -> str:
        return self._inner.to_str()


def load_tokenizer(kind: str, text: str) -> Tokenizer:
    """The tokenizer whose `to_json` gave `text`. kind: `bytes` or `bpe`."""
    if kind == "bytes":
        return ByteTokenizer()
    import tokenizers

    return BpeTokenizer(tokenizers.Tokenizer.from_str(text))


def make_tokenizer(config: DataConfig, documents: Iterable[str]) -> Tokenizer:
    """Build what `config` asks for; learns a BPE vocabulary from `documents` when no file is given."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer_file:
        path = Path(config.tokenizer_file)
        try:
            return load_tokenizer("bpe", path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception for a malformed file
            problem = f"is no tokenizer.json ({error})"
            raise DataError(str(path), problem, "Pass a file saved by the tokenizers library") from error
    return _learn_bpe(config.bpe_vocab, documents)


def _learn_bpe(vocab_size: int, documents: Iterable[str]) -> BpeTokenizer:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BpeTokenizer.END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(documents, trainer)
    return BpeTokenizer(inner)
