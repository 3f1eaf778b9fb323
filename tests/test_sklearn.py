"""Click models as scikit-learn estimators: its own checks, frames of any kind, and what becomes of their columns."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import penstock
from penstock.data.base import Source
from penstock.data.frames import FrameTable, to_polars
from penstock.data.tables import TableConfig, read_table
from penstock.errors import UserError
from penstock.interop.sklearn import ClickClassifier

UNEQUAL = {
    "check_sample_weight_equivalence_on_dense_data": "a row given twice makes other batches than a row of weight two, "
    "and counts twice in the vocabulary"
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@parametrize_with_checks(
    [
        ClickClassifier("dnn", epochs=8, lr=1e-2),
        ClickClassifier("optfs", epochs=4, lr=1e-2, config={"search.epochs": 2}),
    ],
    expected_failed_checks=lambda _: UNEQUAL,
)
def test_scikit_learns_own_checks(estimator: BaseEstimator, check: Any) -> None:
    check(estimator)


def clicks(rows: int = 1200, seed: int = 0) -> pl.DataFrame:
    """City and device interact, price and day matter, tags say a little, note nothing."""
    draw = np.random.default_rng(seed)
    city, device = draw.choice(["Oslo", "Rome", "Lima"], rows), draw.choice(["tv", "phone"], rows)
    price = draw.exponential(20, rows).round(2)
    day = draw.integers(0, 200, rows)
    tags = [draw.choice(["a", "b", "c"], draw.integers(0, 4)).tolist() for _ in range(rows)]
    logit = 3 * (((city == "Oslo") == (device == "tv")) - 0.5) + 0.04 * (price - 20) + 0.01 * (day - 100)
    return pl.DataFrame(
        {
            "city": pl.Series(city, dtype=pl.Categorical),
            "device": pl.Series(device, dtype=pl.Enum(["tv", "phone"])),
            "price": np.where(draw.random(rows) < 0.1, np.nan, price),
            "day": [datetime(2024, 1, 1) + timedelta(days=int(d)) for d in day],
            "tags": pl.Series(tags, dtype=pl.List(pl.String)),
            "opened": draw.random(rows) < 0.5,
            "label": np.where(draw.random(rows) < 1 / (1 + np.exp(-logit)), "yes", "no"),
        }
    )


def halves(**options: Any) -> tuple[pl.DataFrame, NDArray[Any], pl.DataFrame, NDArray[Any]]:
    table = clicks(**options)
    X, y = table.drop("label"), table["label"].to_numpy()
    return X[:800], y[:800], X[800:], y[800:]


def pandas_of(frame: pl.DataFrame) -> pd.DataFrame:
    """As pandas users have it: categories, objects with lists, and an index of their own."""
    columns = {
        name: pd.Categorical(frame[name].to_list())
        if frame[name].dtype in (pl.Categorical, pl.Enum)
        else frame[name].to_list()
        for name in frame.columns
    }
    return pd.DataFrame(columns, index=range(7, 7 + len(frame)))


def quick(model: str = "dnn", **options: Any) -> ClickClassifier:
    return ClickClassifier(model, **{"epochs": 4, "lr": 1e-2, "random_state": 0} | options)


@pytest.mark.parametrize("model", ["optfs", "finalmlp", "autoint", "optinter", "deepfm"])
def test_every_kind_of_model_learns_and_survives_pickling(model: str) -> None:
    X, y, new, truth = halves()
    classifier = quick(model).fit(X, y)
    probability = classifier.predict_proba(new)
    assert roc_auc_score(truth, probability[:, 1]) > 0.75
    assert list(classifier.classes_) == ["no", "yes"]
    assert (classifier.predict(new) == np.where(probability[:, 1] > 0.5, "yes", "no")).all()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(classifier)).predict_proba(new), probability)
    buffer = io.BytesIO()
    joblib.dump(classifier, buffer)
    buffer.seek(0)
    np.testing.assert_array_equal(joblib.load(buffer).predict_proba(new), probability)


def test_pandas_and_polars_frames_are_one() -> None:
    X, y, new, _ = halves()
    a, b = quick().fit(X, y), quick().fit(pandas_of(X), pd.Series(y, dtype="category"))
    assert a.schema_ == b.schema_
    np.testing.assert_array_equal(a.predict_proba(new), b.predict_proba(pandas_of(new)))
    assert {f.name: f.kind for f in a.schema_.fields} == {
        "city": "categorical",
        "device": "categorical",
        "price": "numeric",
        "day": "numeric",
        "opened": "categorical",
        "tags": "sequence",
    }
    assert list(b.feature_names_in_) == X.columns


def test_arrays_of_numbers_objects_and_lists() -> None:
    X, y, new, _ = halves()
    mixed = ["city", "price", "opened"]
    rows = X.select(pl.col("city").cast(pl.String), "price", "opened")
    a = quick().fit(pandas_of(X)[mixed].to_numpy(object), y)
    b = quick().fit([list(row) for row in rows.iter_rows()], y)
    assert [(f.name, f.kind) for f in a.schema_.fields] == [
        ("x0", "categorical"),
        ("x1", "numeric"),
        ("x2", "categorical"),
    ]
    assert a.schema_ == b.schema_
    np.testing.assert_array_equal(
        a.predict_proba(pandas_of(new)[mixed].to_numpy(object)),
        b.predict_proba(
            [list(row) for row in new.select(pl.col("city").cast(pl.String), "price", "opened").iter_rows()]
        ),
    )


def test_columns_by_type() -> None:
    day = datetime(1970, 1, 3, 12)
    frame = pd.DataFrame(
        {
            "category": pd.Categorical([11, 12, None]),
            "mixed": pd.Series([1, "a", pd.NA], dtype=object),
            "dict": [{"a": 1}, {"a": 2}, None],
            "nullable": pd.array([1, None, 3], dtype="Int64"),
            "when": [day, None, day],
            "gap": [timedelta(hours=6), timedelta(0), None],
            "interval": pd.cut([1, 5, np.nan], [0, 2, 6]),
        }
    )
    found = FrameTable(to_polars(frame, list(frame)))
    assert found.frame.to_dict(as_series=False) == {
        "category": ["11", "12", None],
        "mixed": ["1", "a", None],
        "dict": ["{'a': 1}", "{'a': 2}", None],
        "nullable": [1, None, 3],
        "when": [2.5, None, 2.5],
        "gap": [0.25, 0.0, None],
        "interval": ["(0, 2]", "(2, 6]", None],
    }
    assert {name for name in found.columns if name not in found.settings} == {"nullable", "when", "gap"}


def test_a_frame_is_read_as_the_same_file_is(tmp_path: Path) -> None:
    table = clicks().select(pl.col("city").cast(pl.String), "price", label=(pl.col("label") == "yes").cast(pl.Int8))
    split = ["train"] * 900 + ["validation"] * 200 + ["test"] * 100
    table.with_columns(pl.Series("split", split)).write_parquet(tmp_path / "clicks.parquet")
    config = TableConfig(split_column="split", numeric="quantile")
    data = read_table(config, Source(tmp_path / "clicks.parquet", None, "label"))
    frame = table[:900].drop("label")
    classifier = quick(patience=0, epochs=1).fit(frame, table["label"][:900])
    assert classifier.schema_.fields == data.schema.fields


def test_whole_numbers_may_be_called_categories_and_columns_dropped() -> None:
    X, y, *_ = halves()
    X = X.select("city", "price", shop=pl.int_range(pl.len()) % 40)
    columns = {"shop": "categorical", "price": "drop", "city": {"min_count": 10**6}}
    classifier = quick(columns=columns, epochs=1).fit(X, y)
    assert {f.name: (f.kind, f.size) for f in classifier.schema_.fields} == {
        "city": ("categorical", 2),
        "shop": ("categorical", 42),
    }
    with pytest.raises(UserError, match="no column 'shopp'; did you mean 'shop'"):
        quick(columns={"shopp": "drop"}).fit(X, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "finalmpl"}, "did you mean finalmlp"),
        ({"model": "gla"}, "did you mean"),
        ({"config": {"train.step": 3}}, "no field 'step'; did you mean steps"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must be above 0 and below 1"),
        ({"dim": 0}, "dim=0"),
        ({"epochs": 0}, "one must be positive"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    X, y, *_ = halves()
    with pytest.raises(ValueError, match=message):
        quick(**options).fit(X, y)


def test_frames_that_do_not_fit() -> None:
    X, y, new, _ = halves()
    doubled = pandas_of(X)[["city", "city"]]
    with pytest.raises(UserError, match="'city' names more than one column"):
        quick().fit(doubled, y)
    classifier = quick(epochs=1).fit(X, y)
    with pytest.raises(
        ValueError, match=r"unseen at fit time:\n- town\nFeature names seen at fit time, yet now missing:\n- city"
    ):
        classifier.predict(new.rename({"city": "town"}))
    with pytest.raises(
        UserError, match="the frame, column 'price': holds text, as 'dear', where the training table has"
    ):
        classifier.predict(new.with_columns(price=pl.lit("dear")))
    assert classifier.predict_proba(new[:0]).shape == (0, 2)


def test_pipelines_searches_and_calibration() -> None:
    X, y, new, truth = halves()
    frame, new = pandas_of(X), pandas_of(new)
    impute = make_column_transformer(
        (SimpleImputer(), ["price"]), remainder="passthrough", verbose_feature_names_out=False
    ).set_output(transform="pandas")
    pipeline = make_pipeline(impute, quick(epochs=2))
    assert roc_auc_score(truth, pipeline.fit(frame, y).predict_proba(new)[:, 1]) > 0.7
    assert cross_val_score(quick(epochs=2), X, y, cv=2, scoring="roc_auc").min() > 0.7
    search = GridSearchCV(pipeline, {"clickclassifier__dim": [1, 4]}, cv=2, scoring="roc_auc").fit(frame, y)
    assert (
        search.best_estimator_[-1].model_.embedding.table.embedding_dim == search.best_params_["clickclassifier__dim"]
    )
    calibrated = CalibratedClassifierCV(quick(epochs=2), cv=2).fit(frame, y)
    assert roc_auc_score(truth, calibrated.predict_proba(new)[:, 1]) > 0.7


def test_weights_are_those_of_the_loss() -> None:
    X, y, new, _ = halves()
    even = quick().fit(X, y)
    probability = even.predict_proba(new)
    np.testing.assert_allclose(quick().fit(X, y, np.full(len(X), 3.0)).predict_proba(new), probability, atol=1e-5)
    heavy = quick().fit(X, y, np.where(y == "yes", 5.0, 1.0)).predict_proba(new)
    assert heavy[:, 1].mean() > probability[:, 1].mean() + 0.1
    seen = np.arange(len(X)) % 2
    np.testing.assert_array_equal(
        quick().fit(X, y, seen).predict_proba(new), quick().fit(X.filter(seen > 0), y[seen > 0]).predict_proba(new)
    )


def test_few_rows_are_all_trained_on() -> None:
    X, y, *_ = halves()
    scores = [row["value"] for row in quick(epochs=3).fit(X[:100], y[:100]).history_ if row["metric"] == "val/auc"]
    assert len(scores) == 3
    assert quick(epochs=1).fit(X[:100], y[:100]).config_.train.patience == 0
    assert quick(epochs=1).fit(X, y).config_.train.patience == 1


def test_randomness_and_threads_are_left_alone_and_a_seed_decides() -> None:
    X, y, new, _ = halves()
    X, y = X[:200], y[:200]

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    undisturbed = drawn()
    seed()
    torch.set_num_threads(2)
    first = quick().fit(X, y)
    assert drawn() == undisturbed
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    first = first.predict_proba(new)
    assert not np.array_equal(quick(random_state=1).fit(X, y).predict_proba(new), first)
    with ThreadPoolExecutor(2) as pool:
        for again in pool.map(lambda _: quick().fit(X, y).predict_proba(new), range(2)):
            np.testing.assert_array_equal(again, first)


def test_gates_stay_open_to_their_user() -> None:
    X, y, new, _ = halves()
    classifier = quick("finalmlp", epochs=1).fit(X, y)
    before = classifier.predict_proba(new)
    with penstock.watch(classifier.model_) as log:
        np.testing.assert_array_equal(classifier.predict_proba(new), before)
    assert set(log) == {"gate_1", "gate_2"}
    with penstock.force(classifier.model_, "closed"):
        np.testing.assert_allclose(np.ptp(classifier.decision_function(new)), 0, atol=1e-6)


def test_hyper_parameters_reach_the_system() -> None:
    classifier = clone(quick("finalmlp")).set_params(mlp_dims=(8, 4), config={"stream_2.hidden": (12,), "num_heads": 2})
    X, y, *_ = halves()
    config = classifier.set_params(epochs=1, batch_size=50, weight_decay=0.1).fit(X, y).config_
    assert (config.stream_1.hidden, config.stream_2.hidden, config.num_heads) == ((8, 4), (12,), 2)
    assert (config.train.epochs, config.train.batch_size, config.train.weight_decay) == (1, 50, 0.1)


def test_only_the_verbose_speak(capfd: pytest.CaptureFixture[str]) -> None:
    X, y, *_ = halves()
    quick(epochs=1).fit(X, y)
    assert capfd.readouterr() == ("", "")
    quick(epochs=1, verbose=1).fit(X, y)
    out, err = capfd.readouterr()
    assert not out
    assert "the frame: rows train" in err


def test_the_package_offers_it_without_loading_it() -> None:
    code = "import sys, penstock; assert 'ClickClassifier' in dir(penstock); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert penstock.ClickClassifier is ClickClassifier
