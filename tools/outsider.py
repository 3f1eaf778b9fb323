"""What scikit-learn's gradient boosting makes of a table: the outsider that click models should be set beside.

python -m tools.outsider TRAIN TEST LABEL
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl
import torch
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder

from penstock.tasks.click_metrics import AUCError

_MOST_CATEGORIES = 254  # the booster's own limit is 255, and one stands for values not seen


def outsider(train: Path, test: Path, label: str) -> tuple[float, float]:
    """Test AUC of `HistGradientBoostingClassifier` at its defaults, and its standard error over test rows.

    Args:
        train, test: tables in CSV or Parquet.
        label: the column to predict, of two values.
    """
    tables = [pl.read_parquet(p) if p.suffix == ".parquet" else pl.read_csv(p) for p in (train, test)]
    classes = sorted(tables[0][label].unique().to_list())
    words = [name for name, kind in tables[0].drop(label).schema.items() if kind == pl.String]
    encoder = OrdinalEncoder(
        handle_unknown="use_encoded_value", unknown_value=np.nan, encoded_missing_value=np.nan,
        max_categories=_MOST_CATEGORIES,
    )  # fmt: skip
    model = make_pipeline(
        make_column_transformer((encoder, words), remainder="passthrough"),
        HistGradientBoostingClassifier(categorical_features=list(range(len(words))), random_state=0),
    )
    x, y = (
        [part(t) for t in tables] for part in (lambda t: t.drop(label).to_pandas(), lambda t: t[label] == classes[1])
    )
    scores = model.fit(x[0], y[0].to_numpy()).predict_proba(x[1])[:, 1]
    error = AUCError()
    error.update(torch.from_numpy(scores), torch.from_numpy(y[1].to_numpy()))
    return float(roc_auc_score(y[1], scores)), float(error.compute())


if __name__ == "__main__":
    auc, error = outsider(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    print(f"HistGradientBoostingClassifier: auc {auc:.4f} [{auc - 1.96 * error:.4f}, {auc + 1.96 * error:.4f}]")
