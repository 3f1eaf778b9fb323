"""Language modelling: predict the next token.

Shape legend: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection

from penstock.data.text import make_tokenizer, read_documents
from penstock.tasks.base import Task

#: Where `LanguageModelling.speed` measures, in tokens, and how often.
_SPEED_LENGTHS = (256, 1024, 4096)
_SPEED_PASSES = 4


class LanguageModelling(Task):
    """Cross-entropy of the next token, in nats; reports bits a byte, perplexity and next-token accuracy.

    A batch is (B, L + 1) int64 tokens; the model maps (B, L) tokens to (B, L, V) logits.
    """

    monitor = ("loss", "min")
    leaderboard = {"loss": "min", "bits_per_byte": "min", "perplexity": "min", "accuracy": "max"}

    def step(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), logits

    def new_metrics(self) -> MetricCollection:
        return MetricCollection({"accuracy": MeanMetric()})

    def update(self, metrics: MetricCollection, outputs: Tensor, batch: Tensor) -> None:
        metrics["accuracy"].update((outputs.argmax(-1) == batch[:, 1:]).float())

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        loss = metrics["loss"]
        return {
            "bits_per_byte": loss / math.log(2) / self.data.spec["bytes_per_token"],
            "perplexity": math.exp(min(loss, 700.0)),
        }

    def inputs(self, batch: Tensor) -> tuple[Tensor]:
        return (batch[:, :-1],)

    @classmethod
    @torch.no_grad()
    def speed(cls, build: Callable[[Mapping[str, Any]], nn.Module], spec: Mapping[str, Any]) -> dict[str, float]:
        """Tokens a second of a forward pass over one sequence, at several lengths; the fastest of a few passes."""
        measured = {}
        for length in _SPEED_LENGTHS:
            model = build({**spec, "window": length}).eval()
            tokens_BL = torch.randint(spec["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
            times = []
            for _ in range(_SPEED_PASSES):
                start = time.perf_counter()
                model(tokens_BL)
                times.append(time.perf_counter() - start)
            measured[f"tokens_per_s_at_{length}"] = length / min(times)
        return measured

    @classmethod
    @torch.no_grad()
    def predict_file(cls, model: nn.Module, spec: Mapping[str, Any], path: Path, batch_size: int = 64) -> pl.DataFrame:
        """How surprising each document is: its tokens, loss in nats a token, perplexity and bits a byte."""
        tokenizer = make_tokenizer(spec["tokenizer"])
        window = spec["window"]
        rows = []
        for number, text in enumerate(read_documents(path, spec["column"])):
            tokens = torch.from_numpy(tokenizer.encode(text).astype("int64"))
            total, count = 0.0, len(tokens) - 1
            starts = range(0, max(count, 0), window)
            pieces = [tokens[s : s + window + 1] for s in starts]
            full = [p for p in pieces if len(p) == window + 1]
            for group in [torch.stack(full[i : i + batch_size]) for i in range(0, len(full), batch_size)] + [
                p[None] for p in pieces if 1 < len(p) <= window
            ]:
                logits = model(group[:, :-1])
                total += float(F.cross_entropy(logits.flatten(0, 1), group[:, 1:].flatten(), reduction="sum"))
            loss = total / count if count > 0 else None
            size = len(text.encode())
            rows.append(
                {
                    "document": number,
                    "tokens": len(tokens),
                    "loss": loss,
                    "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
                    "bits_per_byte": None if loss is None else total / math.log(2) / size,
                }
            )
        return pl.DataFrame(rows, schema={"document": pl.Int64, "tokens": pl.Int64, "loss": pl.Float64, "perplexity": pl.Float64, "bits_per_byte": pl.Float64})  # fmt: skip
