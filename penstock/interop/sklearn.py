"""Click models as scikit-learn estimators.

from penstock.interop.sklearn import ClickClassifier

classifier = ClickClassifier("finalmlp", random_state=0).fit(X, y)  # a pandas or polars frame, or an array
classifier.predict_proba(X_new)[:, 1]
"""

from __future__ import annotations

import random
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from penstock.data.frames import FrameSource, FrameTable, is_frame, to_polars
from penstock.data.schema import Numeric, Schema
from penstock.data.tables import TableData, checked_chunks
from penstock.errors import UserError, nearest
from penstock.lab.cards import PLAIN_MODELS, all_cards
from penstock.lab.config import override
from penstock.lab.progress import Reporter
from penstock.lab.run import threads
from penstock.lab.system import System, system
from penstock.lab.train import Hardware, hush, train_arm
from penstock.tasks.click_prediction import model_inputs

#: Rows predicted at a time.
_ROWS = 4096
#: Early stopping needs this many held-out rows of either class.
_FEWEST = 30
#: Where batch_size is not given, an epoch has at least this many steps, if that leaves as many rows a step.
_STEPS, _SMALLEST_BATCH = 20, 8
#: The fields of the configuration that `mlp_dims` sets, where they are not called so.
_MLP_DIMS = {"finalmlp": ("stream_1.hidden", "stream_2.hidden"), "autoint": ("dnn_hidden_units",)}
#: PyTorch's random state and number of threads belong to the process: estimators fitted in threads take turns.
_TURN = threading.Lock()


class ClickClassifier(ClassifierMixin, BaseEstimator):
    """A click-prediction system, trained as `penstock run` trains its gated arm, on a frame or array of two classes.

    Columns of text, categories and bools are categorical, lists are sequences, dates and durations count as days, and
    numbers are numeric unless they are whole and either few or named as ids. Missing values are values of their own.

    Args:
        model: optfs, finalmlp, autoint, optinter, or a plain logistic_regression, fm, dnn, dualmlp, deepfm, dcnv2.
        dim: width of the embeddings. This and the next six: ``None`` leaves the model's own default.
        mlp_dims: hidden widths of the perceptron (finalmlp: of both streams), where the model has one.
        epochs: passes over the training rows, at most.
        batch_size: rows a step; the default is made smaller for tables of a few thousand rows.
        lr: learning rate.
        weight_decay: as the model's optimiser understands it.
        patience: epochs without a better AUC on held-out rows before training stops and the best weights are kept; 0
            trains to the end, on all rows. So does a table too small to hold out 30 rows of each class.
        validation_fraction: share of the rows held out for that, drawn within each class.
        numeric: what becomes of numbers: categories by "quantile", which suits amounts and counts beside categories, or
            by the Criteo benchmark's "bucket"; or numbers still ("standardize"), which suits smooth measurements.
        min_count: categories seen less often in training share their column's "unseen" one.
        columns: kinds for columns by name, where what is inferred is wrong: "categorical", "numeric", "drop", or a
            mapping as ``{"kind": "sequence", "separator": "|"}``. The columns of an array are x0, x1 ...
        config: any other field of the system's ``Config``, by dotted name: ``{"stream_1.dropout": 0.2}``.
        accelerator: of Lightning: "auto", "cpu", "gpu" ...; the fitted model is on the CPU.
        n_threads: CPU threads of training; ``None``: one, which serves models of this size best; 0 takes all.
        random_state: of the weights, the order of rows and the rows held out. NumPy's and PyTorch's are left as they were.
        verbose: 1 shows what was read, and bars.

    Attributes:
        classes_: the two labels, sorted; the second is what `decision_function` is positive for.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
        model_: the trained module, open to `penstock.watch`, `penstock.force` and `penstock.ablate`.
        schema_: what became of each column (`Schema.table` prints it).
        config_: the system's whole configuration, as used.
        history_: what was logged: one mapping with stage, step, metric and value for each number.

    Pickle and joblib keep ``model_`` as it is, a module with plain tensors, so a pickle needs the same version of
    Penstock.
    """

    def __init__(
        self,
        model: str = "finalmlp",
        *,
        dim: int | None = None,
        mlp_dims: Sequence[int] | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        patience: int | None = None,
        validation_fraction: float = 0.1,
        numeric: Numeric = "quantile",
        min_count: int = 2,
        columns: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        accelerator: str = "auto",
        n_threads: int | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.dim = dim
        self.mlp_dims = mlp_dims
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.numeric = numeric
        self.min_count = min_count
        self.columns = columns
        self.config = config
        self.accelerator = accelerator
        self.n_threads = n_threads
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Learn to tell the two classes of ``y`` apart.

        Args:
            X: (rows, columns), a pandas or polars frame or an array.
            y: (rows,) labels with two values.
            sample_weight: (rows,) how much each row counts in the training loss, 0 or more; rows of weight 0 are left
                out. Vocabularies, quantiles and early stopping count every row once.

        Raises:
            ValueError: for rows, labels or settings that nothing can be learnt from.
        """
        found = _find(self.model)
        X = self._features(X, reset=True)
        y = column_or_1d(y, warn=True)
        check_consistent_length(X, y)
        check_classification_targets(y)
        if (kind := type_of_target(y, input_name="y")) != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        self.classes_, label = np.unique(y, return_inverse=True)
        frame = to_polars(X, self._names())
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
            frame, label, weight = frame.filter(weight > 0), label[weight > 0], weight[weight > 0]
        if len(seen := np.unique(label)) < 2:
            raise ValueError(
                f"y has {len(seen)} class in the rows to learn from; there must be 2 classes to tell apart"
            )

        draw = check_random_state(self.random_state)
        seed = int(draw.randint(2**31 - 1))
        config, source, trained_on = self._planned(found, frame, label, draw)
        reporter = Reporter(quiet=not self.verbose)
        hardware = Hardware(accelerator=self.accelerator)
        count = found.threads if self.n_threads is None else self.n_threads
        with _TURN, _randomness_kept(), threads(count), warnings.catch_warnings():
            hush()
            data = found.load_data(config, source)
            assert isinstance(data, TableData)
            if weight is not None:
                kept = weight[trained_on]
                rows = data.splits["train"]._replace(weight=(kept / kept.mean()).astype(np.float32))
                data.splits = {**data.splits, "train": rows}
            reporter.say(data.overview())
            stages = train_arm(found, config, data, "gated", seed=seed, hardware=hardware, reporter=reporter)
        self.model_ = stages[-1].task.model.cpu().eval()
        self.model_.zero_grad()
        self.schema_: Schema = data.schema
        self.config_ = config
        shown = ("stage", "step", "metric", "value")
        self.history_ = [{key: row[key] for key in shown} for stage in stages for row in stage.rows]
        return self

    def decision_function(self, X: Any) -> NDArray[np.float32]:
        """(rows,) the model's logits: above zero for the second of ``classes_``."""
        check_is_fitted(self)
        table = FrameTable(to_polars(self._features(X, reset=False), self._names()))
        self.model_.eval()
        device = next(self.model_.parameters()).device
        logits = [torch.empty(0)]
        with torch.no_grad():
            for chunk in checked_chunks(self.schema_, table, "score", table.columns):
                rows = self.schema_.encode(chunk, with_labels=False)
                for first in range(0, len(rows.label), _ROWS):
                    batch = rows.batch(slice(first, first + _ROWS))
                    logits.append(self.model_(*(x.to(device) for x in model_inputs(batch))).float().cpu())
        return torch.cat(logits).numpy()

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """(rows, 2) the probability of each of ``classes_``."""
        logits = self.decision_function(X).astype(np.float64)
        return np.stack([expit(-logits), expit(logits)], 1)

    def predict(self, X: Any) -> NDArray[Any]:
        """(rows,) the more probable of ``classes_``."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(np.intp)]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.categorical = True
        tags.input_tags.string = True
        tags.input_tags.allow_nan = True
        return tags

    def _features(self, X: Any, *, reset: bool) -> Any:
        """A frame as it is, anything else as an array, checked as scikit-learn does."""
        if is_frame(X):
            if doubled := [str(name) for name, times in Counter(X.columns).items() if times > 1]:
                raise UserError(f"X: {doubled[0]!r} names more than one column; names must differ")
            return validate_data(self, X, reset=reset, skip_check_array=True)
        # As objects, a list of rows keeps its numbers beside its text.
        dtype = None if hasattr(X, "dtype") else object
        fewest = 2 if self.model == "optinter" else 1  # it is about pairs
        return validate_data(self, X, reset=reset, dtype=dtype, ensure_all_finite=False, ensure_min_features=fewest)

    def _names(self) -> list[str]:
        return list(getattr(self, "feature_names_in_", (f"x{place}" for place in range(self.n_features_in_))))

    def _planned(
        self, found: System[Any], frame: pl.DataFrame, label: NDArray[np.intp], draw: np.random.RandomState
    ) -> tuple[Any, FrameSource, NDArray[np.bool_]]:
        """The system's configuration, the frame with label and marks of the split, and which rows are trained on."""
        given = {
            "dim": self.dim,
            **dict.fromkeys(
                _MLP_DIMS.get(self.model, ("mlp_dims",)), None if self.mlp_dims is None else tuple(self.mlp_dims)
            ),
            "train.epochs": self.epochs,
            "train.steps": None if self.epochs is None else 0,
            "train.batch_size": self.batch_size,
            "train.lr": self.lr,
            "train.weight_decay": self.weight_decay,
            "train.patience": self.patience,
            "table.numeric": self.numeric,
            "table.min_count": self.min_count,
        }
        changes = {name: value for name, value in given.items() if value is not None} | dict(self.config or {})
        config = override(found.Config(), changes)
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} must be above 0 and below 1")

        held_out = _drawn(label, self.validation_fraction, draw)
        label_name, mark = (_free(name, frame.columns) for name in ("label", "split"))
        frame = frame.with_columns(pl.Series(label_name, label))
        few = np.bincount(label[held_out]).min() < _FEWEST
        if config.train.patience and not few:
            trained_on = ~held_out
            parts = {"train": frame.filter(trained_on), "validation": frame.filter(held_out)}
        else:
            config = override(config, {"train.patience": 0})
            trained_on = np.ones_like(held_out)
            parts = {"train": frame, "validation": frame if few else frame.filter(held_out)}
        if "train.batch_size" not in changes:
            small = max(int(trained_on.sum()) // _STEPS, _SMALLEST_BATCH)
            config = override(config, {"train.batch_size": min(config.train.batch_size, small)})
        config = override(config, {"table.split_column": mark})
        table = FrameTable(
            pl.concat([part.with_columns(pl.lit(name).alias(mark)) for name, part in parts.items()]), self.columns
        )
        return config, FrameSource(Path("the frame"), None, label_name, table=table), trained_on


def _find(name: str) -> System[Any]:
    known = [*(n for n, c in all_cards().items() if c.task == "click_prediction" and c.ready), *PLAIN_MODELS]
    if name not in known:
        raise UserError(f"model={name!r}: did you mean {' or '.join(nearest(str(name), known) or known)}?")
    return system(name)


def _drawn(label: NDArray[np.intp], share: float, draw: np.random.RandomState) -> NDArray[np.bool_]:
    """A random share of the rows of each class, at least one."""
    chosen = np.zeros(len(label), np.bool_)
    for value in (0, 1):
        rows = draw.permutation(np.flatnonzero(label == value))
        chosen[rows[: max(round(share * len(rows)), 1)]] = True
    return chosen


def _free(name: str, taken: Sequence[str]) -> str:
    """A name like this one that no column has."""
    while name in taken:
        name += "_"
    return name


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Leave the random states of Python, NumPy and PyTorch as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
