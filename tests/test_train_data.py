"""Data: every reader, every refusal, and batches that are pure functions of where the run stands."""

import json

import numpy as np
import pytest
import torch

from train.config import DataConfig
from train.data import BatchSampler, TokenStore, build_token_store
from train.errors import DataError
from train.readers import find_files, read_documents
from train.tokenizer import ByteTokenizer, load_tokenizer, make_tokenizer


def documents(*paths, **options):
    return list(read_documents(tuple(str(p) for p in paths), **options))


def write_parquet(path, column, values):
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table({column: values}), path)


def test_reads_text_jsonl_and_parquet_in_a_fixed_order(tmp_path):
    (tmp_path / "b.md").write_text("markdown ü")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    (tmp_path / "sub").mkdir()
    write_parquet(tmp_path / "sub" / "c.parquet", "text", ["three", "four"])
    (tmp_path / ".hidden").write_bytes(b"\0")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "module.pyc").write_bytes(b"\0")
    assert documents(tmp_path) == ["one", "two", "markdown ü", "three", "four"]
    assert documents(tmp_path / "b.md", tmp_path / "a.jsonl") == ["markdown ü", "one", "two"]


def test_size_cap_cuts_at_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("aaü")
    (tmp_path / "b.txt").write_text("bbbb")
    assert documents(tmp_path, max_bytes=3) == ["aa"]
    assert documents(tmp_path, max_bytes=6) == ["aaü", "bb"]


def test_default_corpus_is_the_standard_library():
    files = find_files(())
    assert files == find_files(())
    assert any(path.name == "argparse.py" for path in files)
    assert not any("site-packages" in path.parts for path in files)
    text = documents(max_bytes=100_000)
    assert 99_000 < sum(len(t.encode()) for t in text) <= 100_000


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("nul.txt", b"abc\0def", "is not text: NUL byte at offset 3"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text: byte at offset 3"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2 has no string field `text`"),
        ("b.jsonl", b"{oops\n", "line 1 is not JSON"),
        ("c.jsonl", b"[1]\n", "line 1 has no string field `text`"),
        ("d.parquet", b"not parquet at all", "is no readable parquet file"),
    ],
)
def test_unusable_file_is_named(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        documents(tmp_path)
    assert caught.value.path == str(path)
    assert problem in str(caught.value)
    assert caught.value.remedy and caught.value.remedy in str(caught.value)


def test_parquet_without_text_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", "body", ["x"])
    with pytest.raises(DataError, match=r"a\.parquet: has no column `text` \(found: body\)"):
        documents(tmp_path)
    write_parquet(tmp_path / "a.parquet", "text", [1, 2])
    with pytest.raises(DataError, match="row 0 of column `text` is not a string"):
        documents(tmp_path)


def test_empty_folder_and_missing_path(tmp_path):
    with pytest.raises(DataError, match="the folder holds no files"):
        documents(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        documents(tmp_path / "nowhere")


def test_corpus_shorter_than_a_sequence(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(DataError, match=r"short\.txt: has 10 tokens, and training plus validation need 66"):
        build_token_store(DataConfig(paths=(str(path),), seq_len=32), tmp_path / "store")


ALPHABET_TEXT = "".join(chr(65 + i % 26) for i in range(4000))


def make_store(tmp_path, text=ALPHABET_TEXT, **settings):
    path = tmp_path / "text.txt"
    path.write_text(text)
    config = DataConfig(paths=(str(path),), seq_len=16, **settings)
    build_token_store(config, tmp_path / "store")
    return TokenStore(tmp_path / "store"), config


def test_token_store_round_trip_and_split(tmp_path):
    store, _ = make_store(tmp_path, val_fraction=0.1)
    assert store.info.num_tokens == 4001
    assert store.info.num_val == len(store.val_tokens) == 400
    everything = [*store.train_tokens, *store.val_tokens]
    assert store.tokenizer.decode([int(i) for i in everything]) == (tmp_path / "text.txt").read_text()
    assert everything[-1] == ByteTokenizer.end_id


def test_token_store_is_reused_until_the_source_changes(tmp_path):
    _, config = make_store(tmp_path)
    tokens = tmp_path / "store" / "tokens.bin"
    before = tokens.stat().st_mtime_ns
    first = build_token_store(config, tmp_path / "store")
    assert tokens.stat().st_mtime_ns == before
    (tmp_path / "text.txt").write_text("z" * 5000)
    second = build_token_store(config, tmp_path / "store")
    assert second.num_tokens == 5001
    assert second.content_digest != first.content_digest


def sampler(store, *, rank=0, world_size=1, micro_batch=4, seed=7):
    return BatchSampler(store=store, seq_len=16, micro_batch=micro_batch, seed=seed, rank=rank, world_size=world_size)


def test_batches_are_a_function_of_seed_step_and_rank(tmp_path):
    store, _ = make_store(tmp_path)
    batch = sampler(store).train_batch(3, 0)
    again = sampler(store).train_batch(3, 0)
    assert torch.equal(batch.tokens_BS, again.tokens_BS)
    assert torch.equal(batch.tokens_BS[:, 1:], batch.targets_BS[:, :-1])
    assert batch.tokens_BS.shape == batch.targets_BS.shape == (4, 16)
    for other in (
        sampler(store).train_batch(4, 0),
        sampler(store).train_batch(3, 1),
        sampler(store, seed=8).train_batch(3, 0),
    ):
        assert not torch.equal(batch.tokens_BS, other.tokens_BS)


def test_ranks_share_one_global_batch(tmp_path):
    store, _ = make_store(tmp_path)
    whole = sampler(store, micro_batch=4).train_batch(1, 0).tokens_BS
    parts = [sampler(store, rank=r, world_size=2, micro_batch=2).train_batch(1, 0).tokens_BS for r in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_validation_never_sees_training_tokens(tmp_path):
    store, _ = make_store(tmp_path, text="a" * 2000 + "b" * 1999, val_fraction=0.5)
    train = sampler(store, micro_batch=64).train_batch(1, 0)
    val = sampler(store, micro_batch=64).val_batch(0)
    assert set(train.targets_BS.unique().tolist()) <= {ord("a")}
    assert set(val.tokens_BS.unique().tolist()) <= {ord("b"), ByteTokenizer.end_id}


def test_bpe_learns_saves_and_loads(tmp_path):
    pytest.importorskip("tokenizers")
    text = "the quick brown fox and the lazy dog " * 200 + "ümläut"
    store, _ = make_store(tmp_path, text=text, tokenizer="bpe", bpe_vocab=300)
    assert 257 <= store.info.vocab_size <= 300
    assert store.info.num_tokens < len(text.encode()) / 2
    ids = store.tokenizer.encode(text)
    assert store.tokenizer.decode([int(i) for i in ids]) == text
    again = load_tokenizer("bpe", store.tokenizer.to_json())
    assert np.array_equal(again.encode(text), ids)
    from_file = DataConfig(tokenizer="bpe", tokenizer_file=str(tmp_path / "store" / "tokenizer.json"))
    assert np.array_equal(make_tokenizer(from_file, []).encode(text), ids)


def test_broken_tokenizer_file(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "?"}))
    with pytest.raises(DataError, match=r"tokenizer\.json: is no tokenizer\.json"):
        make_tokenizer(DataConfig(tokenizer="bpe", tokenizer_file=str(path)), [])
