"""Text for language models: the standard library's source by default, the user's .txt, .jsonl or .parquet.

Shape legend: B batch, L window length.
"""

from __future__ import annotations

import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.data.base import Data, Source
from penstock.data.loader import Batches
from penstock.errors import UserError

Split = Literal["train", "validation", "test"]
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
#: Stands between documents: a byte that text does not hold, or the tokenizer's end of text.
_SEPARATOR = 0
#: Fewer documents than this are cut by position as one text.
_FEWEST_DOCUMENTS = 20


@dataclass
class TextConfig:
    """Which text, and how it is cut."""

    window: int = 128
    """Tokens a training sample sees at once."""
    tokenizer: str = "bytes"
    """"bytes", or the folder or name of a Hugging Face tokenizer (needs penstock[hf])."""
    column: str = "text"
    """The field of .jsonl lines or the column of .parquet that holds the text."""
    max_bytes: int = 8_000_000
    """Of the embedded default, how much is used; the user's own text is used whole."""
    validation_ratio: float = 0.05
    """Share of the documents (of a single text: of its end) kept for validation."""
    test_ratio: float = 0.05
    """Share kept for the test, unless --test brings its own."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int

    def encode(self, text: str) -> np.ndarray[Any, Any]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes; id 0 stands between documents."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray[Any, Any]:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i != _SEPARATOR).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of the transformers library.

    Raises:
        UserError: if transformers is not installed or the tokenizer cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise UserError(f"tokenizer {name!r} needs the transformers library: pip install 'penstock[hf]'") from None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
        self.vocab_size = len(self._tokenizer)

    def encode(self, text: str) -> np.ndarray[Any, Any]:
        return np.asarray(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called ``name`` in `TextConfig`."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)


class TextData(Data):
    """Windows of ``window + 1`` tokens, (B, L + 1) int64: a model reads the first L and predicts the last L."""

    def __init__(self, splits: Mapping[Split, np.ndarray[Any, Any]], spec: dict[str, Any], origin: str) -> None:
        self.splits, self.spec, self.origin = splits, spec, origin
        self.window: int = spec["window"]
        for name in _SPLITS:
            if len(splits[name]) <= self.window:
                raise UserError(
                    f"{origin}: the {name} split has {len(splits[name])} tokens, a window needs {self.window + 1}; "
                    "give more text or a smaller --data.window"
                )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return make_tokenizer(self.spec["tokenizer"])

    def _batches(self, split: Split, batch_size: int, *, seed: int | None = None) -> Batches:
        tokens = self.splits[split]
        offsets = np.arange(self.window + 1)

        def fetch(indices: Tensor) -> Tensor:
            starts = indices.numpy()[:, None] * self.window
            return torch.from_numpy(tokens[starts + offsets].astype(np.int64))

        size = (len(tokens) - 1) // self.window
        return Batches(fetch, size, batch_size, shuffle=seed is not None, seed=seed or 0, drop_last=seed is not None)

    def train(self, batch_size: int, seed: int) -> Batches:
        return self._batches("train", batch_size, seed=seed)

    def validation(self, batch_size: int) -> Batches:
        return self._batches("validation", batch_size)

    def test(self, batch_size: int) -> Batches:
        return self._batches("test", batch_size)

    def describe(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "tokenizer": self.spec["tokenizer"],
            "vocabulary": self.spec["vocab_size"],
            "tokens": {name: len(self.splits[name]) for name in _SPLITS},
            "bytes_per_token": round(self.spec["bytes_per_token"], 3),
        }


def read_text(config: TextConfig, source: Source) -> TextData:
    """The embedded default, or the user's text.

    Documents (files of the default, records of .jsonl and .parquet) go whole into one split, in the order of a hash
    of their content; a single .txt is cut by position, its end being validation and test.

    Raises:
        UserError: if a file is missing, empty, not UTF-8 (with the offset), not of its format (with the line), or
            too short for a window.
    """
    if config.window < 2:
        raise UserError(f"--data.window {config.window}: a window has at least 2 tokens")
    if (
        not 0 < config.validation_ratio < 1
        or not 0 < config.test_ratio < 1
        or config.validation_ratio + config.test_ratio >= 1
    ):
        raise UserError(
            f"validation_ratio={config.validation_ratio} and test_ratio={config.test_ratio} must leave text for training"
        )
    tokenizer = make_tokenizer(config.tokenizer)
    if source.data is None:
        if source.test is not None:
            raise UserError("--test needs --data")
        origin = "Python standard library source"
        documents: Iterable[str] = _standard_library(config.max_bytes)
    else:
        origin = str(source.data)
        documents = read_documents(source.data, config.column)
    ratios = (config.validation_ratio, 0.0 if source.test else config.test_ratio)
    splits, size = _cut(documents, tokenizer, ratios)
    if source.test is not None:
        splits["test"] = _join([tokenizer.encode(text) for text in read_documents(source.test, config.column)])
    tokens = sum(len(part) for part in splits.values())
    spec = {
        "tokenizer": config.tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "window": config.window,
        "column": config.column,
        "bytes_per_token": size / max(tokens, 1) if config.tokenizer != "bytes" else 1.0,
    }
    return TextData(splits, spec, origin)


def read_documents(path: Path, column: str) -> list[str]:
    """The documents of a .txt (one), .jsonl or .parquet file (one a record).

    Raises:
        UserError: see `read_text`.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file"
            if not path.exists()
            else f"{path}: is not a file; give a .txt, .jsonl or .parquet file"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty")
    if path.suffix == ".parquet":
        documents = list(_parquet(path, column))
    elif path.suffix in (".jsonl", ".ndjson"):
        documents = list(_jsonl(path, column))
    else:
        documents = [_utf8(path)]
    if not any(text.strip() for text in documents):
        raise UserError(f"{path}: holds no text")
    return documents


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x}); convert it to UTF-8"
        ) from None


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
            have = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(
                f"{path}: line {number}: no text under {column!r} (it has {have}); name the field with --data.column"
            )
        yield record[column]


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError):
        raise UserError(f"{path}: is not a Parquet file") from None
    names = table.schema_arrow.names
    if column not in names:
        raise UserError(f"{path}: no column {column!r} (there are {', '.join(names)}); name it with --data.column")
    if not pa.types.is_string(table.schema_arrow.field(column).type) and not pa.types.is_large_string(
        table.schema_arrow.field(column).type
    ):
        raise UserError(f"{path}: column {column!r} is {table.schema_arrow.field(column).type}, not text")
    for batch in table.iter_batches(columns=[column]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _standard_library(limit: int) -> Iterator[str]:
    """Source files of the running Python's standard library in a fixed order, tests left out, up to ``limit`` bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "lib2to3",
        "idlelib",
        "turtledemo",
        "__pycache__",
        "pydoc_data",
        "encodings",
    }
    paths = [p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts)]
    # By hash of the name, so that a smaller budget is a fair sample and not the alphabet's beginning.
    for path in sorted(paths, key=lambda p: zlib.crc32(p.relative_to(root).as_posix().encode())):
        text = path.read_bytes().decode(errors="ignore")
        limit -= len(text)
        if limit < 0:
            return
        yield text


def _cut(
    documents: Iterable[str], tokenizer: Tokenizer, ratios: tuple[float, float]
) -> tuple[dict[Split, np.ndarray[Any, Any]], int]:
    """Tokens of each split, and how many bytes of text there are."""
    encoded = [(zlib.crc32(raw), len(raw), tokenizer.encode(text)) for text in documents for raw in [text.encode()]]
    size = sum(length for _, length, _ in encoded)
    if len(encoded) < _FEWEST_DOCUMENTS:
        tokens = _join([tokens for _, _, tokens in encoded])
        test = len(tokens) - int(len(tokens) * ratios[1])
        validation = test - int(len(tokens) * ratios[0])
        return {"train": tokens[:validation], "validation": tokens[validation:test], "test": tokens[test:]}, size
    parts: dict[Split, list[np.ndarray[Any, Any]]] = {name: [] for name in _SPLITS}
    # In the order of a hash, so that the splits are fair samples and the same every time.
    before = 0
    for _, length, tokens in sorted(encoded, key=lambda one: one[0]):
        place = before / size
        parts["validation" if place < ratios[0] else "test" if place < sum(ratios) else "train"].append(tokens)
        before += length
    return {name: _join(part) for name, part in parts.items()}, size


def _join(parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Documents one after the other, each behind a separator."""
    if not parts:
        return np.zeros(0, dtype=np.uint8)
    separator = np.full(1, _SEPARATOR, dtype=parts[0].dtype)
    return np.concatenate([piece for part in parts for piece in (separator, part)])
