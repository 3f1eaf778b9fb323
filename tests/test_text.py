"""Text data: splits, windows, formats, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from penstock.data.base import Source
from penstock.data.loader import Batches
from penstock.data.text import TextConfig, read_text
from penstock.errors import UserError

CONFIG = TextConfig(window=16, max_bytes=300_000)


def test_windows_overlap_by_one_token_and_tile_the_split() -> None:
    data = read_text(CONFIG, Source())
    (first, second), *_ = list(data.validation(2))
    assert first[-1] == second[0]
    assert first.dtype == torch.int64
    assert data.describe()["tokens"]["train"] > 10 * data.describe()["tokens"]["test"] > 0


def test_training_order_is_a_function_of_seed_and_epoch() -> None:
    data = read_text(CONFIG, Source())
    one, two = data.train(8, seed=1), data.train(8, seed=1)
    assert torch.equal(next(iter(one)), next(iter(two)))
    assert not torch.equal(next(iter(one)), next(iter(data.train(8, seed=2))))
    second_epoch = next(iter(one))
    assert not torch.equal(second_epoch, next(iter(data.train(8, seed=1))))


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_batches_go_on_where_they_were(stop: int) -> None:
    def batches() -> Batches:
        return Batches(lambda i: i, 20, 5, shuffle=True, seed=3)

    whole = batches()
    order = [b.tolist() for _ in range(3) for b in whole]
    before = batches()
    iterator = iter(before)
    seen = [next(iterator).tolist() for _ in range(stop)]
    after = batches()
    after.load_state_dict(before.state_dict())
    while len(seen) < len(order):
        seen += [b.tolist() for b in after]
    assert seen == order


def test_formats_give_the_same_documents(tmp_path: Path) -> None:
    texts = [f"document {i}: " + "abc " * (20 + i) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    pl.DataFrame({"text": texts}).write_parquet(tmp_path / "a.parquet")
    a, b = (read_text(CONFIG, Source(tmp_path / f"a.{end}")) for end in ("jsonl", "parquet"))
    for split in ("train", "validation", "test"):
        assert (a.splits[split] == b.splits[split]).all()  # type: ignore[index]


def test_a_test_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("train " * 400)
    (tmp_path / "test.txt").write_text("other " * 40)
    data = read_text(CONFIG, Source(tmp_path / "train.txt", tmp_path / "test.txt"))
    assert bytes(data.splits["test"]).decode().count("other") == 40
    assert b"other" not in bytes(data.splits["train"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "empty"),
        ("blank.txt", b"  \n ", "no text"),
        ("latin.txt", b"caf\xe9 " * 100, "not UTF-8 at byte 3"),
        ("short.txt", b"short text", "a window needs 17"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', "line 1: no text under 'text'"),
        ("no.parquet", b"not parquet at all", "not a Parquet file"),
    ],
)
def test_unusable_text_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_text(CONFIG, Source(path))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    pl.DataFrame({"body": ["x"], "n": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="body, n"):
        read_text(CONFIG, Source(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="not text"):
        read_text(TextConfig(window=16, column="n"), Source(tmp_path / "a.parquet"))


def test_a_hugging_face_tokenizer_from_a_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = "the quick brown fox jumps over the lazy dog " * 200
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=80, special_tokens=["[UNK]"], show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text(text)
    data = read_text(TextConfig(window=16, tokenizer=str(tmp_path / "tokenizer")), Source(tmp_path / "a.txt"))
    assert data.spec["vocab_size"] <= 80
    assert data.spec["bytes_per_token"] > 2
    assert "quick" in data.tokenizer.decode(data.splits["train"][:20])
    with pytest.raises(UserError, match="nowhere"):
        read_text(TextConfig(window=16, tokenizer=str(tmp_path / "nowhere")), Source(tmp_path / "a.txt"))
