"""Associative recall: sequences of keys and values in which keys come back and their values are asked for.

The default is MQAR (multi-query associative recall), generated with the authors' random stream bit for bit; the
user's own is ``inputs`` and ``labels`` in .npz or .jsonl.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023), sec. 4 and appendix.

Shape legend: E examples, T positions, N key-value pairs, V vocabulary.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor

from penstock.data.base import Data, Source
from penstock.data.loader import Batches
from penstock.errors import UserError

#: The label of a position that is not asked.
UNLABELLED = -100
_HALF, _WHOLE = 2**31, 2**32

Integers = NDArray[np.int64]


@dataclass
class RecallConfig:
    """Which recall examples: MQAR of these shapes, or how your own are divided."""

    vocab_size: int = 64
    """Tokens V, more than the longest sequence; 0 is the filler, keys come from the lower half, values from the upper."""
    lengths: tuple[int, ...] = (24,)
    """Length T of the sequences of each training segment, even."""
    pairs: tuple[int, ...] = (3,)
    """Key-value pairs N of each training segment, at most T/4: as many positions are asked."""
    test_lengths: tuple[int, ...] = ()
    """The same of the validation and test segments; empty: those of training."""
    test_pairs: tuple[int, ...] = ()
    """The same of the validation and test segments; empty: those of training."""
    train_examples: int = 6000
    """Training examples a segment."""
    test_examples: int = 1000
    """Validation examples a segment, and as many for the test."""
    power_a: float = 0.01
    """How queries are spread: near 0 soon after the pairs (gap i has weight i^(a-1)), 1 evenly."""
    random_non_queries: bool = False
    """Fill what is neither pair nor query with random tokens instead of zeros."""
    seed: int = 0
    """Of the examples, the filler included (each segment has its own, drawn from this one)."""
    shuffle: bool = True
    """Draw a new order each epoch; the authors keep one fixed. Segments are never mixed within a batch."""
    validation_ratio: float = 0.1
    """Of your own examples, the share kept for validation."""
    test_ratio: float = 0.1
    """Of your own examples, the share kept for the test, unless --test brings its own."""


class RecallBatch(NamedTuple):
    """inputs (E, T) and labels (E, T), int64; labels are -100 where nothing is asked, and are not shifted."""

    inputs: Tensor
    labels: Tensor


def mqar(
    vocab_size: int,
    num_examples: int,
    input_seq_len: int,
    num_kv_pairs: int,
    *,
    seed: int,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    filler_seed: int | None = None,
) -> RecallBatch:
    """Multi-query associative recall: k1 v1 k2 v2 ... and then each key once more, asking for its value.

    The value is the label at the position that holds the query, and is never shown there. Numpy's legacy stream is
    drawn from as the authors do: all keys row by row, all values, all gaps; then the filler by PyTorch.

    Args:
        vocab_size: V, above ``input_seq_len``.
        num_examples: E, 1 or more.
        input_seq_len: T, even.
        num_kv_pairs: N, from 1 to T/4.
        seed: of keys, values and gaps.
        power_a: of the gaps, above 0; see `RecallConfig`.
        random_non_queries: replace every zero of the inputs by a random token of the whole vocabulary.
        filler_seed: of these; default ``seed``.

    Returns:
        (E, T) inputs and labels, exactly N labels a row.

    Raises:
        UserError: for sizes that leave no room, saying which.

    Source: Arora et al. 2023, algorithm 1; HazyResearch/zoology.
    """
    _check_sizes(vocab_size, num_examples, input_seq_len, num_kv_pairs, power_a)
    random = RandomState(seed)
    first_value = vocab_size // 2

    def rows(choices: Integers, p: NDArray[np.float64] | None = None) -> Integers:
        return np.stack([random.choice(choices, num_kv_pairs, replace=False, p=p) for _ in range(num_examples)])

    keys, values = rows(np.arange(1, first_value)), rows(np.arange(first_value, vocab_size))
    context = 2 * num_kv_pairs
    space = (input_seq_len - context) // 2
    weights = power_a * np.arange(1, space + 1) ** (power_a - 1)
    queries = context + 2 * rows(np.arange(space), weights / weights.sum())

    sequence = np.zeros((num_examples, input_seq_len + 1), dtype=np.int64)
    sequence[:, 0:context:2], sequence[:, 1:context:2] = keys, values
    np.put_along_axis(sequence, queries, keys, 1)
    labels = np.full((num_examples, input_seq_len), UNLABELLED, dtype=np.int64)
    np.put_along_axis(labels, queries, values, 1)
    inputs = torch.from_numpy(sequence[:, :-1].copy())
    if random_non_queries:
        generator = torch.Generator().manual_seed(seed if filler_seed is None else filler_seed)
        filler = torch.randint(vocab_size, inputs.shape, generator=generator)  # one for every position, as the authors
        inputs = torch.where(inputs == 0, filler, inputs)
    return RecallBatch(inputs, torch.from_numpy(labels))


def _check_sizes(vocab_size: int, num_examples: int, length: int, pairs: int, power_a: float) -> None:
    """Refuse what leaves no room; enough keys, values and gaps follow from V > T >= 4N."""
    if length % 2:
        raise UserError(f"length {length} must be even: queries stand at even positions")
    if pairs < 1 or 4 * pairs > length:
        raise UserError(
            f"{pairs} pairs in length {length}: from 1 to {length // 4}, a pair and its query take 4 positions"
        )
    if vocab_size <= length:
        raise UserError(f"vocab_size {vocab_size} must be above the length {length}, so that there are keys enough")
    if num_examples < 1:
        raise UserError(f"{num_examples} examples: at least 1 a segment")
    if not power_a > 0:
        raise UserError(f"power_a {power_a} must be above 0")


class SegmentBatches(Batches):
    """Batches that hold examples of one segment each.

    Examples come in the order of the epoch and wait with others of their segment until a batch is full; without
    shuffling, one segment follows the other. The last batch of a segment may be smaller.

    Args:
        segments: of different shapes.
        batch_size, shuffle, seed: see `Batches`.
    """

    def __init__(
        self, segments: Sequence[RecallBatch], batch_size: int, *, shuffle: bool = False, seed: int = 0
    ) -> None:
        self.segments = segments
        self.starts = np.cumsum([0, *(len(s.inputs) for s in segments)]).tolist()
        super().__init__(self._examples, self.starts[-1], batch_size, shuffle=shuffle, seed=seed)

    def __len__(self) -> int:
        return sum(-(-len(segment.inputs) // self.batch_size) for segment in self.segments)

    def _examples(self, indices: Tensor) -> RecallBatch:
        number = int(np.searchsorted(self.starts, int(indices[0]), side="right")) - 1
        rows = indices - self.starts[number]
        return RecallBatch(self.segments[number].inputs[rows], self.segments[number].labels[rows])

    def _from(self, order: Tensor, start: int) -> Iterator[RecallBatch]:
        places: list[Tensor] = []
        for low, high in zip(self.starts, self.starts[1:], strict=False):
            places += ((order >= low) & (order < high)).nonzero().squeeze(1).split(self.batch_size)
        places.sort(key=lambda one: int(one[-1]))
        for number in range(start, len(places)):
            self.position = number + 1
            yield self.fetch(self._share(order[places[number]]))


class RecallData(Data):
    """Recall examples in segments of one length each; batches are `RecallBatch`.

    Args:
        splits: the segments of "train", "validation" and "test".
        vocab_size: V.
        origin: "mqar", or where the examples are from.
        shuffle: whether training batches have a new order each epoch.
    """

    def __init__(
        self, splits: dict[str, list[RecallBatch]], vocab_size: int, origin: str, *, shuffle: bool = True
    ) -> None:
        self.splits, self.origin, self.shuffle = splits, origin, shuffle
        for name, segments in splits.items():
            if not sum(len(segment.inputs) for segment in segments):
                raise UserError(f"{origin}: no examples are left for the {name} split; give more")
        tested = sorted({shape for segment in splits["test"] for shape in _shapes(segment)})
        self.spec = {
            "vocab_size": vocab_size,
            "window": max(segment.inputs.shape[1] for segments in splits.values() for segment in segments),
            "lengths": sorted({length for length, _ in tested}),
            "pairs": sorted({pairs for _, pairs in tested}),
            "generated": origin == "mqar",
        }

    def train(self, batch_size: int, seed: int) -> Batches:
        return SegmentBatches(self.splits["train"], batch_size, shuffle=self.shuffle, seed=seed)

    def validation(self, batch_size: int) -> Batches:
        return SegmentBatches(self.splits["validation"], batch_size)

    def test(self, batch_size: int) -> Batches:
        return SegmentBatches(self.splits["test"], batch_size)

    def describe(self) -> dict[str, Any]:
        return {
            "origin": "MQAR, generated" if self.spec["generated"] else self.origin,
            "vocabulary": self.spec["vocab_size"],
            "lengths": self.spec["lengths"],
            "asked positions": self.spec["pairs"],
            "examples": {name: sum(len(s.inputs) for s in segments) for name, segments in self.splits.items()},
        }

    def overview(self) -> str:
        segment = self.splits["train"][0]
        asked = (segment.labels[0] != UNLABELLED).nonzero().squeeze(1).tolist()
        shown = " ".join(
            f"{token}[{int(segment.labels[0, place])}]" if place in asked else str(token)
            for place, token in enumerate(segment.inputs[0, :64].tolist())
        )
        return (
            f"{super().overview()}\nfirst example, [answers]: {shown}{' ...' if segment.inputs.shape[1] > 64 else ''}"
        )


def read_recall(config: RecallConfig, source: Source) -> RecallData:
    """MQAR as ``config`` says, or the user's own examples.

    Train segments have seeds below 2^31 and all others seeds above, as in the authors' code, so that no two coincide.

    Raises:
        UserError: for impossible sizes, files that cannot be read (with file, row and what would be right), or too few
            examples.
    """
    if source.data is None:
        if source.test is not None:
            raise UserError("--test needs --data")
        return _generated(config)
    segments = read_segments(source.data)
    largest = max(_largest(segments), 0)
    if source.test is None:
        splits = _divided(segments, config)
    else:
        train, validation = _cut(segments, [1 - config.validation_ratio, config.validation_ratio], config.seed)
        splits = {"train": train, "validation": validation, "test": read_segments(source.test)}
        largest = max(largest, _largest(splits["test"]))
    return RecallData(splits, largest + 1, str(source.data), shuffle=config.shuffle)


def _generated(config: RecallConfig) -> RecallData:
    train = _paired(config.lengths, config.pairs, "recall.lengths", "recall.pairs")
    test = _paired(config.test_lengths, config.test_pairs, "recall.test_lengths", "recall.test_pairs") or train
    if not train:
        raise UserError("--recall.lengths is empty: at least one segment")
    random = RandomState(config.seed)
    seeds = {"train": random.randint(0, _HALF, len(train)), "test": random.randint(_HALF, _WHOLE, len(test))}
    free = [seed for seed in random.randint(_HALF, _WHOLE, 2 * len(test) + 1).tolist() if seed not in seeds["test"]]
    seeds["validation"] = np.asarray(free[: len(test)])
    splits = {
        name: [
            mqar(
                config.vocab_size,
                config.train_examples if name == "train" else config.test_examples,
                length,
                pairs,
                seed=int(seed),
                power_a=config.power_a,
                random_non_queries=config.random_non_queries,
            )
            for (length, pairs), seed in zip(shapes, seeds[name], strict=True)
        ]
        for name, shapes in (("train", train), ("validation", test), ("test", test))
    }
    return RecallData(splits, config.vocab_size, "mqar", shuffle=config.shuffle)


def _paired(lengths: Sequence[int], pairs: Sequence[int], *names: str) -> list[tuple[int, int]]:
    if len(lengths) != len(pairs):
        raise UserError(f"--{names[0]} has {len(lengths)} entries and --{names[1]} {len(pairs)}: one each a segment")
    return list(zip(lengths, pairs, strict=True))


def _divided(segments: list[RecallBatch], config: RecallConfig) -> dict[str, list[RecallBatch]]:
    held = config.validation_ratio + config.test_ratio
    if not (config.validation_ratio > 0 and config.test_ratio > 0 and held < 1):
        raise UserError(
            f"validation_ratio={config.validation_ratio} and test_ratio={config.test_ratio} must be above 0 and leave "
            "examples for training"
        )
    parts = _cut(segments, [1 - held, config.validation_ratio, config.test_ratio], config.seed)
    return dict(zip(("train", "validation", "test"), parts, strict=True))


def _cut(segments: list[RecallBatch], shares: Sequence[float], seed: int) -> list[list[RecallBatch]]:
    """Each segment's examples, in random order, divided by ``shares``; empty parts are left out."""
    parts: list[list[RecallBatch]] = [[] for _ in shares]
    random = RandomState(seed)
    for segment in segments:
        size = len(segment.inputs)
        order = torch.from_numpy(random.permutation(size))
        edges = [round(size * edge) for edge in np.cumsum([0.0, *shares])]
        for part, low, high in zip(parts, edges, edges[1:], strict=False):
            if high > low:
                rows = order[low:high]
                part.append(RecallBatch(segment.inputs[rows], segment.labels[rows]))
    return parts


def _largest(segments: list[RecallBatch]) -> int:
    return max(int(torch.maximum(s.inputs.max(), s.labels.max())) for s in segments)


def _shapes(segment: RecallBatch) -> set[tuple[int, int]]:
    length = segment.inputs.shape[1]
    return {(length, asked) for asked in (segment.labels != UNLABELLED).sum(1).unique().tolist()}


# -- the user's own files ---------------------------------------------------------------------------------------


def is_recall_file(path: Path) -> bool:
    """Whether a file holds recall examples: .npz always, .jsonl if its first record has ``inputs`` and ``labels``."""
    if path.suffix == ".npz":
        return True
    if path.suffix not in (".jsonl", ".ndjson") or not path.is_file():
        return False
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        record = json.loads(first)
    except ValueError:
        return False
    return isinstance(record, dict) and {"inputs", "labels"} <= record.keys()


def read_segments(path: Path) -> list[RecallBatch]:
    """The examples of a .npz or .jsonl file, one segment a length, each in the order of the file.

    Raises:
        UserError: if the file is missing, of another format, or has rows that are no examples (with their number).
    """
    return [batch for _, batch in read_numbered(path)]


def read_numbered(path: Path) -> list[tuple[Tensor, RecallBatch]]:
    """As `read_segments`, each segment with the numbers of its rows in the file, from 1."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix == ".npz":
        rows = _npz(path)
    elif path.suffix in (".jsonl", ".ndjson"):
        rows = _jsonl(path)
    else:
        raise UserError(f"{path}: recall examples come in .npz or .jsonl with inputs and labels")
    by_length: dict[int, list[tuple[int, Integers, Integers]]] = {}
    for number, inputs, labels in rows:
        _check_row(f"{path}: row {number}", inputs, labels)
        by_length.setdefault(len(inputs), []).append((number, inputs, labels))
    if not by_length:
        raise UserError(f"{path}: holds no examples")
    return [
        (
            torch.tensor([number for number, _, _ in found]),
            RecallBatch(*(torch.from_numpy(np.stack([one[i] for one in found])) for i in (1, 2))),
        )
        for _, found in sorted(by_length.items())
    ]


def _npz(path: Path) -> Iterator[tuple[int, Integers, Integers]]:
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: holds one nameless array; save inputs and labels with numpy.savez")
        with arrays:
            held = {name: arrays[name] for name in arrays.files if name in ("inputs", "labels")}
    except UserError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not a readable .npz ({error})") from None
    if missing := {"inputs", "labels"} - held.keys():
        raise UserError(f"{path}: no array {min(missing)!r}; it has {', '.join(arrays.files) or 'none'}")
    inputs, labels = held["inputs"], held["labels"]
    for name, array in (("inputs", inputs), ("labels", labels)):
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise UserError(
                f"{path}: {name} is {array.dtype} {array.shape}; it must be whole numbers (examples, length)"
            )
    if inputs.shape != labels.shape:
        raise UserError(f"{path}: inputs is {inputs.shape} and labels {labels.shape}; they must be alike")
    yield from zip(range(1, len(inputs) + 1), inputs.astype(np.int64), labels.astype(np.int64), strict=True)


def _jsonl(path: Path) -> Iterator[tuple[int, Integers, Integers]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: row {number}: not JSON ({error})") from None
            if not isinstance(record, dict) or not {"inputs", "labels"} <= record.keys():
                have = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{path}: row {number}: no inputs and labels (it has {have})")
            inputs, labels = (_numbers(record[name], f"{path}: row {number}: {name}") for name in ("inputs", "labels"))
            yield number, inputs, labels


def _numbers(values: Any, where: str) -> Integers:
    # bool is an int to Python, but no token.
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UserError(f"{where}: must be a list of whole numbers")
    return np.asarray(values, dtype=np.int64)


def _check_row(where: str, inputs: Integers, labels: Integers) -> None:
    if len(inputs) != len(labels) or not len(inputs):
        raise UserError(f"{where}: {len(inputs)} inputs and {len(labels)} labels; one label a position, at least one")
    if inputs.min() < 0:
        raise UserError(f"{where}: token {inputs.min()} at position {int(inputs.argmin()) + 1}; tokens start at 0")
    if (wrong := (labels < 0) & (labels != UNLABELLED)).any():
        place = int(wrong.argmax())
        raise UserError(f"{where}: label {labels[place]} at position {place + 1}; a token, or {UNLABELLED} for none")
    if (labels == UNLABELLED).all():
        raise UserError(f"{where}: no position is labelled; all labels are {UNLABELLED}")
