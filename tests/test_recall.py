"""Recall data: the generator's invariants, segments, the user's files; and the task's loss, metrics and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.data.base import Source
from penstock.data.recall import (
    UNLABELLED,
    RecallBatch,
    RecallConfig,
    RecallData,
    SegmentBatches,
    is_recall_file,
    mqar,
    read_recall,
    read_segments,
)
from penstock.errors import UserError
from penstock.nn.experts import add_loss
from penstock.tasks.associative_recall import AssociativeRecall, distance_figure, example_means, key_distances
from penstock.tasks.base import Training

SMALL = RecallConfig(train_examples=40, test_examples=20)


# -- the generator ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "length", "pairs"), [(64, 24, 3), (41, 40, 10), (33, 8, 1)])
def test_every_key_comes_back_once_and_is_labelled_with_its_value(vocab: int, length: int, pairs: int) -> None:
    batch = mqar(vocab, 50, length, pairs, seed=3, random_non_queries=False)
    for row, answer in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < vocab // 2 for key in keys)
        assert all(vocab // 2 <= value < vocab for value in values)
        asked = [place for place, label in enumerate(answer) if label != UNLABELLED]
        assert len(asked) == pairs
        assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)
        assert {row[place]: answer[place] for place in asked} == dict(zip(keys, values, strict=True))
        assert all(row[place] == 0 for place in range(2 * pairs, length) if place not in asked)


def test_a_small_power_asks_soon_and_one_asks_evenly() -> None:
    def places(a: float) -> Tensor:
        labels = mqar(300, 400, 256, 4, seed=0, power_a=a, random_non_queries=False).labels
        return (labels != UNLABELLED).nonzero()[:, 1].float()

    assert float(places(1.0).mean()) == pytest.approx(8 + 123, abs=8)  # evenly over the gaps
    assert float(places(0.01).mean()) < 70


def test_filler_replaces_zeros_only_and_has_a_seed() -> None:
    plain = mqar(64, 30, 24, 3, seed=1, random_non_queries=False)
    filled, again = (mqar(64, 30, 24, 3, seed=1) for _ in range(2))
    other = mqar(64, 30, 24, 3, seed=1, filler_seed=9)
    kept = plain.inputs != 0
    assert torch.equal(filled.inputs[kept], plain.inputs[kept])
    assert torch.equal(filled.inputs, again.inputs)
    assert not torch.equal(filled.inputs, other.inputs)
    assert torch.equal(filled.labels, plain.labels)
    assert int(filled.inputs[~kept].max()) > 55


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input_seq_len": 23}, "length 23 must be even"),
        ({"num_kv_pairs": 7}, r"7 pairs in length 24: from 1 to 6"),
        ({"num_kv_pairs": 0}, "0 pairs"),
        ({"vocab_size": 24}, "vocab_size 24 must be above the length 24"),
        ({"num_examples": 0}, "0 examples"),
        ({"power_a": 0.0}, "power_a 0.0 must be above 0"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], says: str) -> None:
    sizes = {"vocab_size": 64, "num_examples": 5, "input_seq_len": 24, "num_kv_pairs": 3, "seed": 0}
    with pytest.raises(UserError, match=says):
        mqar(**(sizes | changes))


# -- segments --------------------------------------------------------------------------------------------------


def test_segments_have_the_seeds_of_the_authors_and_differ() -> None:
    config = RecallConfig(lengths=(16, 16), pairs=(2, 2), train_examples=10, test_examples=10, seed=5)
    data = read_recall(config, Source())
    random = RandomState(5)
    seeds = random.randint(0, 2**31, 2).tolist() + random.randint(2**31, 2**32, 2).tolist()
    for segment, seed in zip(data.splits["train"] + data.splits["test"], seeds, strict=True):
        assert torch.equal(segment.inputs, mqar(64, 10, 16, 2, seed=seed, random_non_queries=False).inputs)
    everything = [s.inputs for segments in data.splits.values() for s in segments]
    assert len({tuple(one.flatten().tolist()) for one in everything}) == 6


def test_batches_hold_one_segment_each_and_every_example_once() -> None:
    def numbered(low: int, size: int, length: int) -> RecallBatch:
        inputs = torch.arange(low, low + size)[:, None].expand(-1, length)
        return RecallBatch(inputs, inputs)

    segments = [numbered(0, 10, 4), numbered(10, 7, 6)]
    fixed = [batch.inputs[:, 0].tolist() for batch in SegmentBatches(segments, 4)]
    assert fixed == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15, 16]]
    shuffled = SegmentBatches(segments, 4, shuffle=True, seed=2)
    first, second = ([batch.inputs for batch in shuffled] for _ in range(2))
    assert len(first) == len(shuffled) == 5
    assert sorted(torch.cat([b[:, 0] for b in first]).tolist()) == list(range(17))
    assert {b.shape[1] for b in first} == {4, 6}
    assert [b[:, 0].tolist() for b in first] != [b[:, 0].tolist() for b in second]
    mixed = [SegmentBatches(segments, 2, shuffle=True, seed=seed) for seed in range(4)]
    assert any([b.inputs.shape[1] for b in one] != [4] * 5 + [6] * 4 for one in mixed), "segments take turns"


@pytest.mark.parametrize("stop", [1, 4])
def test_batches_go_on_where_they_were(stop: int) -> None:
    segments = [mqar(64, 11, 16, 2, seed=0), mqar(64, 9, 24, 3, seed=1)]
    whole = [b.inputs.tolist() for b in SegmentBatches(segments, 4, shuffle=True, seed=3)]
    before = SegmentBatches(segments, 4, shuffle=True, seed=3)
    iterator = iter(before)
    seen = [next(iterator).inputs.tolist() for _ in range(stop)]
    after = SegmentBatches(segments, 4, shuffle=True, seed=3)
    after.load_state_dict(before.state_dict())
    assert seen + [b.inputs.tolist() for b in after] == whole


def test_training_order_is_fixed_where_asked() -> None:
    fixed = read_recall(RecallConfig(train_examples=40, test_examples=5, shuffle=False), Source())
    assert torch.equal(next(iter(fixed.train(8, seed=1))).inputs, fixed.splits["train"][0].inputs[:8])
    shuffled = read_recall(SMALL, Source())
    assert not torch.equal(next(iter(shuffled.train(8, seed=1))).inputs, next(iter(shuffled.train(8, seed=2))).inputs)


def test_tests_may_have_shapes_of_their_own() -> None:
    config = RecallConfig(test_lengths=(24, 48), test_pairs=(3, 6), train_examples=8, test_examples=8)
    data = read_recall(config, Source())
    assert data.spec["window"] == 48
    assert (data.spec["lengths"], data.spec["pairs"]) == ([24, 48], [3, 6])
    assert [s.inputs.shape[1] for s in data.splits["train"]] == [24]
    assert "first example, [answers]:" in data.overview()
    with pytest.raises(UserError, match=r"--recall\.lengths has 2 entries and --recall.pairs 1"):
        read_recall(RecallConfig(lengths=(24, 48)), Source())


# -- the user's own --------------------------------------------------------------------------------------------


def write(path: Path, batch: RecallBatch) -> Path:
    if path.suffix == ".npz":
        np.savez(path, inputs=batch.inputs.numpy(), labels=batch.labels.numpy())
    else:
        rows = zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True)
        path.write_text("\n".join(json.dumps({"inputs": i, "labels": o}) for i, o in rows))
    return path


def test_both_formats_give_the_same_examples(tmp_path: Path) -> None:
    batch = mqar(64, 50, 24, 3, seed=0)
    (a,), (b,) = (read_segments(write(tmp_path / name, batch)) for name in ("a.npz", "a.jsonl"))
    assert torch.equal(a.inputs, batch.inputs)
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.labels, b.labels)
    data = read_recall(SMALL, Source(tmp_path / "a.npz"))
    assert {name: len(parts[0].inputs) for name, parts in data.splits.items()} == {
        "train": 40, "validation": 5, "test": 5,
    }  # fmt: skip
    everything = torch.cat([parts[0].inputs for parts in data.splits.values()])
    assert sorted(everything.tolist()) == sorted(batch.inputs.tolist())
    assert not data.spec["generated"]


def test_a_test_file_of_ones_own_is_used_whole(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", mqar(32, 30, 24, 3, seed=0))
    test = mqar(60, 12, 32, 4, seed=1)
    write(tmp_path / "test.npz", test)
    data = read_recall(SMALL, Source(tmp_path / "train.jsonl", tmp_path / "test.npz"))
    assert torch.equal(data.splits["test"][0].inputs, test.inputs)
    assert data.spec["vocab_size"] == int(max(test.inputs.max(), test.labels.max())) + 1
    assert data.spec["window"] == 32


def test_recall_files_are_told_from_text(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "broken.jsonl").write_text("{")
    recall = write(tmp_path / "recall.jsonl", mqar(32, 2, 8, 1, seed=0))
    found = [is_recall_file(tmp_path / name) for name in ("a.npz", "a.txt", "text.jsonl", "broken.jsonl", "no.jsonl")]
    assert found == [True, False, False, False, False]
    assert is_recall_file(recall)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "row 2: not JSON"),
        ('{"inputs": [1]}', r"row 2: no inputs and labels \(it has \['inputs'\]\)"),
        ('{"inputs": [1, 2], "labels": [3]}', "row 2: 2 inputs and 1 labels"),
        ('{"inputs": [1, -2], "labels": [3, 4]}', "row 2: token -2 at position 2"),
        ('{"inputs": [1, 2], "labels": [-1, 4]}', "row 2: label -1 at position 1; a token, or -100"),
        ('{"inputs": [1, 2], "labels": [-100, -100]}', "row 2: no position is labelled"),
        ('{"inputs": [1, "a"], "labels": [-100, 1]}', "row 2: inputs: must be a list of whole numbers"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"inputs": [1, 2], "labels": [-100, 1]}) + "\n" + line)
    with pytest.raises(UserError, match=says):
        read_segments(path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", inputs=np.zeros((2, 4), dtype=int))
    np.savez(tmp_path / "float.npz", inputs=np.zeros((2, 4)), labels=np.zeros((2, 4), dtype=int))
    np.savez(tmp_path / "odd.npz", inputs=np.zeros((2, 4), dtype=int), labels=np.zeros((2, 5), dtype=int))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, says in {
        "one.npz": "no array 'labels'; it has inputs",
        "float.npz": r"inputs is float64 \(2, 4\); it must be whole numbers",
        "odd.npz": r"inputs is \(2, 4\) and labels \(2, 5\)",
        "broken.npz": "not a readable .npz",
        "empty.jsonl": "holds no examples",
        "gone.npz": "no such file",
        "other.csv": "come in .npz or .jsonl",
    }.items():
        if name == "other.csv":
            (tmp_path / name).write_text("a,b\n")
        with pytest.raises(UserError, match=says):
            read_segments(tmp_path / name)
    few = write(tmp_path / "few.jsonl", mqar(32, 2, 8, 1, seed=0))
    with pytest.raises(UserError, match="no examples are left for the"):
        read_recall(SMALL, Source(few))
    with pytest.raises(UserError, match="must be above 0 and leave"):
        read_recall(RecallConfig(test_ratio=0.0), Source(few))


# -- the task --------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Answers what stood behind the same token last time, as sure as ``sharpness``."""

    def __init__(self, vocab_size: int, sharpness: float = 9.0) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            add_loss("extra", self.sharpness)
        length = tokens.shape[1]
        distance = key_distances(tokens)
        source = (torch.arange(length) - distance + 1).clamp(max=length - 1)
        return F.one_hot(tokens.gather(1, source), self.vocab_size).float() * self.sharpness


def task(data: RecallData, **options: Any) -> AssociativeRecall:
    return AssociativeRecall(Oracle(64), Training(batch_size=16), data, **options)


def test_loss_is_over_labelled_positions_and_auxiliary_losses_are_not_reported() -> None:
    data = read_recall(SMALL, Source())
    one = task(data)
    batch = next(iter(data.test(16)))
    loss, outputs = one.step(batch)
    asked = batch.labels != UNLABELLED
    expected = F.cross_entropy(outputs.logits[asked], batch.labels[asked])
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(loss, expected + 9.0)
    assert one.reported_loss(loss, outputs, batch) is outputs.loss


def test_accuracy_is_the_mean_over_examples_and_sliced_by_shape() -> None:
    config = RecallConfig(test_lengths=(24, 32), test_pairs=(3, 4), train_examples=8, test_examples=8)
    one = task(read_recall(config, Source()))
    metrics = one.new_metrics()
    for number, batch in enumerate(one.data.test(8)):
        _, outputs = one.step(batch)
        if number == 0:  # spoil one of the answers of one example, in favour of another value of its context
            place = (batch.labels[0] != UNLABELLED).nonzero()[0, 0]
            other = batch.labels[0][batch.labels[0] != UNLABELLED][1]
            outputs.logits[0, place, other] = 99.0
        one.update(metrics, outputs, batch)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found["accuracy"] == pytest.approx(1 - 1 / 3 / 16)
    assert found["accuracy_length_24"] == found["accuracy_pairs_3"] == pytest.approx(1 - 1 / 3 / 8)
    assert found["accuracy_length_32"] == found["accuracy_pairs_4"] == 1.0
    assert found["from_context"] == 1.0
    labels = torch.tensor([[1, UNLABELLED, UNLABELLED], [1, 2, 3]])
    torch.testing.assert_close(example_means(labels == 1, labels), torch.tensor([1.0, 1 / 3]))


def test_learning_rate_goes_to_zero_by_epochs_and_everything_decays() -> None:
    data = read_recall(SMALL, Source())  # 40 examples: 3 batches of 16 an epoch
    train = Training(batch_size=16, warmup=0.0)
    one = AssociativeRecall(Oracle(64), train, data)
    rates = [one._rate(step, 12) for step in range(12)]
    optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for epoch in range(4):
        assert rates[3 * epoch : 3 * epoch + 3] == pytest.approx([expected.get_last_lr()[0]] * 3)
        optimizer.step()
        expected.step()
    assert one.parameter_groups()[0]["params"] == list(one.model.parameters())
    assert task(data)._rate(0, 100) == pytest.approx(1 / 5)  # with a warm-up as everywhere


def test_training_stops_when_the_task_is_learned() -> None:
    from penstock.lab.train import Hardware, make_trainer

    data = read_recall(SMALL, Source())
    for stop_above, steps in ((0.99, 3), (1.0, 9)):
        one = AssociativeRecall(Oracle(64), Training(batch_size=16, lr=1e-9), data, stop_above=stop_above)
        trainer = make_trainer(Hardware(accelerator="cpu"), max_epochs=3, logger=False)
        trainer.fit(one, data.train(16, 0), data.validation(16))
        assert trainer.global_step == steps


def test_predictions_are_one_row_an_answer_in_the_order_of_the_file(tmp_path: Path) -> None:
    first, second = mqar(64, 3, 24, 3, seed=0, random_non_queries=False), mqar(64, 2, 16, 2, seed=1)
    path = tmp_path / "own.jsonl"
    rows = [*zip(first.inputs.tolist(), first.labels.tolist(), strict=True)]
    rows.insert(1, (second.inputs[0].tolist(), second.labels[0].tolist()))  # lengths are mixed
    path.write_text("\n".join(json.dumps({"inputs": i, "labels": o}) for i, o in rows))
    spec = {"vocab_size": 64, "window": 24}
    frame = AssociativeRecall.predict_file(Oracle(64).eval(), spec, path, batch_size=2)
    assert frame["row"].to_list() == [1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4]
    for row, position, token, label, correct in frame.select("row", "position", "token", "label", "correct").rows():
        inputs, labels = rows[row - 1]
        assert (inputs[position - 1], labels[position - 1]) == (token, label)
        assert correct or row == 2  # random filler may stand between a key and its return
    assert float(frame["probability"].max()) <= 1.0
    with pytest.raises(UserError, match=r"row 1: length 24; the model was trained for up to 20"):
        AssociativeRecall.predict_file(Oracle(64), {"vocab_size": 64, "window": 20}, path)
    with pytest.raises(UserError, match=r"row \d: token \d+; the model knows tokens 0 to 30"):
        AssociativeRecall.predict_file(Oracle(31), {"vocab_size": 31, "window": 24}, path)


def test_distances_are_to_the_latest_of_the_same_token() -> None:
    tokens = torch.tensor([[7, 5, 7, 7, 2, 5]])
    assert key_distances(tokens).tolist() == [[0, 0, 2, 1, 0, 4]]
    figure = distance_figure(torch.tensor([1, 1, 2, 9, 9]), torch.tensor([True, False, True, True, True]), bins=4)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[0] == 0.5 or heights == [pytest.approx(2 / 3), 1.0]
    assert len(task(read_recall(SMALL, Source())).eval().figures()) == 1
