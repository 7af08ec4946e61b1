"""Tokens on disk and batches out of them.

One rank reads and tokenizes the corpus into the run's folder (`build_token_store`); all ranks map that file. A batch is
a pure function of (seed, step, micro-step, rank), so there is no sampler state: resuming at step s needs nothing but s.
The samples of a step do not depend on how many ranks share them, only on how many there are in all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.config import DataConfig
from train.errors import DataError
from train.files import write_text_atomic
from train.readers import find_files, read_documents
from train.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

_TRAIN_STREAM = 0
_VAL_STREAM = 1


@dataclass(frozen=True, kw_only=True)
class TokenStoreInfo:
    """What `meta.json` beside the tokens says about them."""

    source_digest: str
    """Hash of the data settings and of every file's path, size and time: decides whether the store can be reused."""
    content_digest: str
    """SHA-256 of the token bytes: decides whether a run continues on the data it began with."""
    dtype: str
    """numpy type of one id."""
    num_tokens: int
    """Ids in all, document ends included."""
    num_documents: int
    """Documents read."""
    num_val: int
    """Ids at the end that are kept for validation."""
    tokenizer: str
    """`bytes` or `bpe`."""
    vocab_size: int
    """Number of ids the tokenizer can give."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Input and target ids of one micro-batch, both [B, S] int64; targets are the inputs moved by one."""

    tokens_BS: Tensor
    targets_BS: Tensor


class TokenStore:
    """A tokenized corpus, mapped read-only."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.info = TokenStoreInfo(**json.loads((folder / "meta.json").read_text(encoding="utf-8")))
        self._tokens = np.memmap(folder / "tokens.bin", dtype=self.info.dtype, mode="r")
        self.tokenizer: Tokenizer = load_tokenizer(
            self.info.tokenizer, (folder / "tokenizer.json").read_text(encoding="utf-8")
        )

    @property
    def train_tokens(self) -> np.ndarray:
        """Ids to learn from, 1-d."""
        return self._tokens[: self.info.num_tokens - self.info.num_val]

    @property
    def val_tokens(self) -> np.ndarray:
        """Ids held back, 1-d."""
        return self._tokens[self.info.num_tokens - self.info.num_val :]

    def val_prompt(self, num_tokens: int) -> list[int]:
        """The first ids of a held-back document, or of the held-back text if no document starts in it early enough."""
        tokens = self.val_tokens
        ends = np.flatnonzero(tokens[:-num_tokens] == self.tokenizer.end_id)
        start = int(ends[0]) + 1 if len(ends) else 0
        return [int(i) for i in tokens[start : start + num_tokens]]


@dataclass(frozen=True, kw_only=True)
class BatchSampler:
    """Random windows over the tokens, as a pure function of where in the run one stands."""

    store: TokenStore
    seq_len: int
    micro_batch: int
    seed: int
    rank: int
    world_size: int

    def train_batch(self, step: int, micro_step: int) -> Batch:
        """The micro-batch of this rank. step counts from 1, micro_step from 0."""
        return self._batch(self.store.train_tokens, _TRAIN_STREAM, step, micro_step)

    def val_batch(self, index: int) -> Batch:
        """Validation micro-batch `index` of this rank: the same at every validation of a run."""
        return self._batch(self.store.val_tokens, _VAL_STREAM, 0, index)

    def _batch(self, tokens: np.ndarray, stream: int, step: int, micro_step: int) -> Batch:
        num_starts = len(tokens) - self.seq_len
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, stream, step, micro_step])))
        starts = rng.integers(0, num_starts, size=self.world_size * self.micro_batch)
        starts = starts[self.rank * self.micro_batch :][: self.micro_batch]
        rows = np.stack([tokens[start : start + self.seq_len + 1] for start in starts]).astype(np.int64)
        rows_BS = torch.from_numpy(rows)
        return Batch(tokens_BS=rows_BS[:, :-1].contiguous(), targets_BS=rows_BS[:, 1:].contiguous())


def build_token_store(config: DataConfig, folder: Path, *, progress: bool = False) -> TokenStoreInfo:
    """Read, tokenize and write the corpus to `folder`, or keep what is there if it came from the same files.

    For one rank only. Raises DataError naming the path that cannot be used.
    """
    source_digest = _source_digest(config)
    meta = folder / "meta.json"
    if meta.is_file():
        info = TokenStoreInfo(**json.loads(meta.read_text(encoding="utf-8")))
        if info.source_digest == source_digest:
            return info
        meta.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    documents = list(read_documents(config.paths, max_bytes=config.max_bytes, progress=progress))
    tokenizer = make_tokenizer(config, documents)
    tokens = _encode(documents, tokenizer)
    num_val = _split(config, tokens)
    tokens.tofile(folder / "tokens.bin")
    write_text_atomic(folder / "tokenizer.json", tokenizer.to_json())
    info = TokenStoreInfo(
        source_digest=source_digest,
        content_digest=hashlib.sha256(tokens.tobytes()).hexdigest(),
        dtype=str(tokens.dtype),
        num_tokens=len(tokens),
        num_documents=len(documents),
        num_val=num_val,
        tokenizer=config.tokenizer,
        vocab_size=tokenizer.vocab_size,
    )
    write_text_atomic(meta, json.dumps(asdict(info), indent=2))
    return info


def _encode(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = np.asarray([tokenizer.end_id], dtype=dtype)
    parts: list[np.ndarray] = []
    for document in documents:
        parts += [tokenizer.encode(document).astype(dtype), end]
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def _split(config: DataConfig, tokens: np.ndarray) -> int:
    """How many ids at the end are for validation: the configured share, and never less than one sequence."""
    window = config.seq_len + 1
    num_val = max(int(len(tokens) * config.val_fraction), window)
    if len(tokens) - num_val < window:
        where = ", ".join(config.paths) or "the standard library's sources"
        problem = f"has {len(tokens)} tokens, and training plus validation need {2 * window} (data.seq_len + 1 each)"
        raise DataError(where, problem, "Give more text, or a smaller data.seq_len")
    return num_val


def _source_digest(config: DataConfig) -> str:
    settings = asdict(config)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    tokenizer_files = [Path(config.tokenizer_file)] if config.tokenizer_file else []
    for path in find_files(config.paths) + tokenizer_files:
        if not path.is_file():
            raise DataError(str(path), "no such file", "Check data.tokenizer_file")
        stat = path.stat()
        digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
