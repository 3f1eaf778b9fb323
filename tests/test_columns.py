"""What a columns file can ask for: hashed ids, ids shared by two columns, numbers scaled to 0 .. 1."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from penstock.cli import main
from penstock.data.base import Source
from penstock.data.hashing import hashed
from penstock.data.schema import Schema
from penstock.data.tables import TableConfig, TableData, read_table
from penstock.errors import UserError
from penstock.lab.system import system
from penstock.nn.embeddings import FieldEmbedding
from penstock.systems.recommendation.finalmlp.model import Context, Embedding
from penstock.tasks.click_prediction import model_inputs

SYSTEMS = ["optfs", "finalmlp", "autoint", "optinter", "dcnv2"]


def table(rows: int = 400) -> pl.DataFrame:
    draw = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "item": [f"i{n}" for n in draw.integers(0, 20, rows)],
            "city": draw.choice(["Oslo", "Rome", "Lima"], rows),
            "price": draw.uniform(5, 25, rows),
            "history": ["^".join(f"i{n}" for n in draw.integers(0, 25, draw.integers(1, 5))) for _ in range(rows)],
            "click": draw.integers(0, 2, rows),
        }
    )


def read(tmp_path: Path, columns: str, frame: pl.DataFrame | None = None, **settings: object) -> TableData:
    (tmp_path / "columns.yaml").write_text(columns, encoding="utf-8")
    (table() if frame is None else frame).write_csv(tmp_path / "clicks.csv")
    settings = {"columns": str(tmp_path / "columns.yaml"), **settings}
    return read_table(TableConfig(**settings), Source(tmp_path / "clicks.csv", None, "click"))  # type: ignore[arg-type]


# -- hashing -------------------------------------------------------------------------------------------------


def test_hashes_are_the_same_everywhere() -> None:
    # From zlib's CRC-32 and the published constants of splitmix64, computed with Python's whole numbers.
    def slow(word: str, seed: int) -> int:
        x = (zlib.crc32(word.encode()) + (seed + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    words = ["Oslo", "Rome", "", "Åre", "Oslo"]
    for seed in (0, 7):
        assert hashed(pl.Series(words), seed).tolist() == [slow(word, seed) for word in words]
    assert hashed(pl.Series(["Oslo", None])).tolist() == [3412298684522511363, slow("", 0)]


def test_hashes_spread_evenly() -> None:
    counts = np.bincount((hashed(pl.Series(map(str, range(200_000)))) % np.uint64(1000)).astype(np.int64))
    assert len(counts) == 1000
    # Poisson with mean 200: the variance is the mean.
    assert 0.8 < counts.var() / counts.mean() < 1.2


def test_hashed_columns_keep_no_words(tmp_path: Path) -> None:
    frame = table().with_columns(city=pl.when(pl.int_range(pl.len()) == 5).then(None).otherwise("city"))
    data = read(tmp_path, "city: {kind: categorical, hash_buckets: 50}\nhistory: {hash_buckets: 7}\n", frame)
    fields = {f.name: f for f in data.schema.fields}
    assert (fields["city"].words, fields["city"].size, fields["history"].size) == ((), 51, 8)
    city = fields["city"]
    ids = np.concatenate([rows.ids[:, data.spec["fields"].index("city")] for rows in data.splits.values()])
    expected = {0} | {1 + int(h) for h in hashed(pl.Series(["Oslo", "Rome", "Lima"])) % np.uint64(50)}
    assert set((ids - city.offset).tolist()) == expected
    assert data.schema.locate(city.offset) == ("city", "(missing)")
    assert data.schema.locate(city.offset + 18) == ("city", "(bucket 17)")
    assert "hashed" in str(data.schema.table())
    assert Schema.from_dict(json.loads(json.dumps(data.schema.to_dict()))) == data.schema


def test_many_values_are_hashed_by_default(tmp_path: Path) -> None:
    data = read(tmp_path, "{}", hash_above=10)
    assert {f.name: f.hash_buckets for f in data.schema.fields if not f.numeric} == {
        "item": 10,
        "city": 0,
        "history": 10,
    }


# -- one range of ids for two columns ------------------------------------------------------------------------


def test_shared_words_are_counted_over_both(tmp_path: Path) -> None:
    data = read(tmp_path, "history: {kind: sequence, share: item}\n", min_count=1)
    fields = {f.name: f for f in data.schema.fields}
    item, history = fields["item"], fields["history"]
    assert item.words == history.words
    assert item.offset == history.offset
    assert set(item.words) == {f"i{n}" for n in range(25)}  # of which five only histories have
    assert data.spec["num_ids"] == data.schema.num_ids == item.size + fields["city"].size + fields["price"].size
    assert data.schema.locate(item.offset + 1) == ("item", item.words[0])
    batch = data.splits["train"].batch()
    assert batch.ids.max() < data.schema.num_ids
    assert batch.sequences.min() == history.offset
    assert "those of item" in str(data.schema.table())
    plain = json.dumps(data.schema.to_dict())
    assert plain.count('"i24"') == 1
    assert Schema.from_dict(json.loads(plain)) == data.schema


def test_hashed_ids_can_be_shared(tmp_path: Path) -> None:
    data = read(tmp_path, "item: {hash_buckets: 9}\nhistory: {share: item}\n")
    fields = {f.name: f for f in data.schema.fields}
    assert fields["history"].hash_buckets == 9
    assert fields["history"].offset == fields["item"].offset


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_takes_shared_ids(tmp_path: Path, name: str) -> None:
    read(tmp_path, "history: {share: item}\n")
    found = system(name)
    config = found.Config()
    config.table = TableConfig(columns=str(tmp_path / "columns.yaml"))
    if name == "finalmlp":
        config.context_1, config.context_2 = ("item", "history"), ("history",)
    data: Any = found.load_data(config, Source(tmp_path / "clicks.csv", None, "click"))
    row = next(f for f in data.schema.fields if f.name == "item").offset + 1
    for arm, build in found.arms(config, data.spec).items():
        torch.manual_seed(0)
        model = build().eval()
        inputs = model_inputs(data.splits["train"].batch(slice(64)))
        with torch.no_grad():
            before = model(*inputs)
            assert torch.isfinite(before).all(), arm
            for module in model.modules():
                if isinstance(module, FieldEmbedding) and module.num_ids == data.schema.num_ids:
                    module.table.weight[row] += 1
            after = model(*inputs)
        # The row acts on those rows alone that have it, as item or in their history.
        has = (inputs[0] == row).any(1) | (inputs[-1] == row).flatten(1).any(1)
        assert torch.equal(before[~has], after[~has]), arm
        assert not torch.equal(before[has], after[has]), arm


def test_end_to_end_offsets_change_nothing() -> None:
    sizes = [5, 7, 1, 4]
    for offsets in (None, [0, 5, 12, 13]):
        torch.manual_seed(0)
        embedding = Embedding(sizes, 3, num_numeric=1, num_sequences=1, offsets=offsets)
        assert (embedding.num_ids, embedding.numeric_ids.tolist(), embedding.padding_ids.tolist()) == (17, [12], [13])
        assert embedding.table.weight[0].eq(0).all()
        context = Context([1, 3], sizes, 3, num_numeric=1, num_sequences=1, offsets=offsets)
        assert context.shift.tolist() == [-5, -6]


def test_a_context_shares_what_the_row_shares() -> None:
    context = Context([0, 2], [5, 4, 5], 3, num_numeric=0, num_sequences=1, offsets=[4, 0, 4])
    assert (context.embedding.num_ids, context.shift.tolist()) == (5, [-4, -4])
    ids, sequences = torch.tensor([[6, 0]]), torch.tensor([[[6, 6, 4]]])
    first, second = context(ids, None, sequences).chunk(2, 1)
    torch.testing.assert_close(first, second)


# -- numbers between 0 and 1 ---------------------------------------------------------------------------------


def test_minmax_uses_the_ends_of_training(tmp_path: Path) -> None:
    frame = table().with_columns(constant=2.5)
    data = read(tmp_path, "price: {numeric: minmax}\nconstant: {kind: numeric, numeric: minmax}\n", frame)
    train = data.splits["train"].numeric
    place = [f.name for f in data.schema.of("numeric")].index("price")
    assert (train[:, place].min(), train[:, place].max()) == (0.0, 1.0)
    assert not train[:, 1 - place].any()
    price = data.schema.of("numeric")[place]
    assert frame["price"].min() <= price.mean < price.mean + price.std <= frame["price"].max()  # type: ignore[operator]
    assert f"from {price.mean:.4g} to" in str(data.schema.table())


# -- what cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("city: {hash_buckets: 0}", "hash_buckets is 0 and must be a whole number, 1 or more"),
        ("price: {hash_buckets: 10}", "price: hash_buckets is for words, and the column is numeric; say kind:"),
        ("price: {share: item}", "price: share is for words"),
        ("history: {share: itme}", "share is 'itme' and must be another column of words: item, city"),
        ("history: {share: history}", "share is 'history' and must be another column of words: item, city"),
        ("history: {share: price}", "share is 'price' and must be another column of words: item, city"),
        ("history: {share: item}\ncity: {share: history}", "history shares the ids of item itself; say share: item"),
        ("history: {share: item, hash_buckets: 9}", "history: has the ids of item; give hash_buckets there"),
        ("history: {shared: item}", "'shared' is no setting; there are kind, numeric,"),
        ("city: {hash_buckets: true}", "hash_buckets is True and must be a whole number"),
        ("city: {numeric: minmax}", "city: numeric is for a numeric column, and this is categorical"),
        ("price: {max_length: 3}", "price: max_length is for a sequence column, and this is numeric"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, columns: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, columns)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, "city: {hash_buckets: 20}\nhistory: {share: item}\nprice: {numeric: minmax}\n")
    out = tmp_path / "run"
    flags = ["--label", "click", "--table.columns", str(tmp_path / "columns.yaml"), "--train.epochs", "1"]
    flags += ["--search.epochs", "2", "--arms", "gated", "--out", str(out), "--json"]
    assert main(["run", "optfs", "--data", str(tmp_path / "clicks.csv"), *flags]) == 0
    capsys.readouterr()
    assert main(["predict", str(out), "--data", str(tmp_path / "clicks.csv"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 400


def test_whole_numbers_that_share_or_hash_ids_are_categories(tmp_path: Path) -> None:
    frame = table().with_columns(shop=pl.int_range(pl.len()) % 40, other=pl.int_range(pl.len()) % 30)
    data = read(tmp_path, "shop: {hash_buckets: 9}\nhistory: {share: other}\n", frame)
    fields = {f.name: f for f in data.schema.fields}
    assert (fields["shop"].kind, fields["shop"].hash_buckets) == ("categorical", 9)
    assert (fields["other"].kind, fields["history"].share) == ("categorical", "other")
    plain = {f.name: f.kind for f in read(tmp_path, "{}", frame).schema.fields}
    assert plain["shop"] == plain["other"] == "numeric"


@pytest.mark.parametrize("name", SYSTEMS[:4])
def test_published_settings_take_ids_that_are_numbers(tmp_path: Path, name: str) -> None:
    presets = system(name).presets
    assert presets
    for preset, config in presets.items():
        assert (config.table.whole_numbers == "inferred") == ("criteo" in preset), preset
    frame = pl.DataFrame({"user": [n % 40 for n in range(400)], "click": [n % 3 == 0 for n in range(400)]})
    frame.write_csv(tmp_path / "frappe.csv")
    config = TableConfig(min_count=1, whole_numbers="categorical")
    (user,) = read_table(config, Source(tmp_path / "frappe.csv", None, "click")).schema.fields
    assert (user.kind, len(user.words)) == ("categorical", 40)


def test_a_list_that_shares_words_stays_a_sequence(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    items = draw.integers(0, 9, 300)
    frame = pl.DataFrame({"item": items, "history": [[int(i), int(i) % 3] for i in items], "click": items % 2})
    frame.write_parquet(tmp_path / "a.parquet")
    (tmp_path / "columns.yaml").write_text("history: {share: item}\n")
    found = read_table(
        TableConfig(columns=str(tmp_path / "columns.yaml")), Source(tmp_path / "a.parquet", None, "click")
    )
    assert {one.name: one.kind for one in found.schema.fields} == {"item": "categorical", "history": "sequence"}
