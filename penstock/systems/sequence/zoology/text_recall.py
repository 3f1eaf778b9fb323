"""Associative recall in real text: the loss on tokens that could be looked up in the context, and on the others.

A token is a recall hit if the bigram of the token before it and itself stood earlier in the same context and is rare
in the training text, so that it can hardly be known by heart (Arora et al. 2023, sec. 3).

Shape legend: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F


class Bigrams:
    """How often each pair of neighbouring tokens occurs in a text.

    Args:
        tokens: (N,) ids of the text.
        vocab_size: V.
    """

    def __init__(self, tokens: NDArray[Any], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._codes, self._counts = np.unique(self._code(tokens[:-1], tokens[1:]), return_counts=True)

    def _code(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.int64]:
        return first.astype(np.int64) * self.vocab_size + second.astype(np.int64)

    def counts(self, windows: Tensor) -> Tensor:
        """Of the bigrams in windows (B, L + 1), how often each is in the text, (B, L)."""
        codes = self._code(windows[:, :-1].numpy(), windows[:, 1:].numpy())
        places = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return torch.from_numpy(np.where(self._codes[places] == codes, self._counts[places], 0))


def recall_hits(windows: Tensor, bigrams: Bigrams, most: int) -> Tensor:
    """Which tokens of windows (B, L + 1) are recall hits, from the second on, (B, L).

    Args:
        windows: token ids.
        bigrams: of the training text.
        most: occurrences there that still count as rare.
    """
    first, second = windows[:, :-1], windows[:, 1:]
    same_BLL = (first[:, :, None] == first[:, None, :]) & (second[:, :, None] == second[:, None, :])
    return same_BLL.tril(-1).any(-1) & (bigrams.counts(windows) <= most)


@torch.no_grad()
def recall_losses(model: nn.Module, batches: Iterable[Tensor], bigrams: Bigrams, most: int) -> dict[str, float]:
    """The loss in nats a token on recall hits and on all others, and the share of hits.

    Args:
        model: tokens (B, L) -> logits (B, L, V).
        batches: windows (B, L + 1).
        bigrams, most: see `recall_hits`.

    Returns:
        loss_recall and loss_other, where there are such tokens, and recall_share.
    """
    losses, hits = [], []
    device = next(model.parameters()).device
    for windows in batches:
        logits = model(windows[:, :-1].to(device))
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten().to(device), reduction="none").cpu()
        )
        hits.append(recall_hits(windows, bigrams, most).flatten())
    loss, hit = torch.cat(losses), torch.cat(hits)
    measured = {"recall_share": float(hit.float().mean())}
    for name, chosen in (("loss_recall", hit), ("loss_other", ~hit)):
        if chosen.any():
            measured[name] = float(loss[chosen].mean())
    return measured
