"""What no trained arm shows: how far back a look-up reaches, and how the time grows with the length.

Shape legend: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.data.recall import UNLABELLED, mqar
from penstock.systems.sequence.gam.model import GAMLanguageModel

#: The recall task: sequences of 24 with three pairs, half of the vocabulary keys and half values.
_LENGTH, _PAIRS, _VOCABULARY = 24, 3, 64
_LAYERS, _KERNEL, _WIDTH = 2, 3, 32
#: How many tokens back two layers of kernel 3 see, and the accuracy of naming any value.
REACH, CHANCE = _LAYERS * (_KERNEL - 1), 2 / _VOCABULARY
#: Lengths at which a forward and backward pass is timed.
LENGTHS = (512, 1024, 2048, 4096)


def recall_by_distance(
    seed: int, *, dropout: float, epochs: int = 12, batch_size: int = 128, examples: int = 6000
) -> dict[str, float]:
    """Train on multi-query associative recall and measure accuracy by how far back the key lies.

    Returns near and far (the key within `REACH` tokens, or beyond), overall, and distance_2, distance_4, ...

    Source: the task and the recipe are Zoology's (Arora et al. 2023) at miniature size.
    """
    torch.manual_seed(seed)
    train, test = (
        mqar(_VOCABULARY, size, _LENGTH, _PAIRS, seed=own + seed, random_non_queries=False)
        for size, own in ((examples, 0), (1000, 2**31))
    )
    model = GAMLanguageModel(_VOCABULARY, _LENGTH, _WIDTH, _LAYERS, num_slots=32, kernel_size=_KERNEL, dropout=dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for tokens, labels in zip(train.inputs.split(batch_size), train.labels.split(batch_size), strict=True):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=UNLABELLED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(test.inputs).argmax(-1) == test.labels
    distance = key_distance(test.inputs, test.labels)

    def accuracy(these: Tensor) -> float:
        return float(right[these].float().mean())

    measured = {
        "near": accuracy((distance > 0) & (distance <= REACH)),
        "far": accuracy(distance > REACH),
        "overall": accuracy(distance > 0),
    }
    return measured | {f"distance_{d}": accuracy(distance == d) for d in distance.unique().tolist() if d}


def key_distance(tokens_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """How many tokens before each query its key was first seen, (B, L); zero where nothing is asked."""
    same = tokens_BL[:, :, None] == tokens_BL[:, None, :]
    first = same.to(torch.uint8).argmax(-1)
    here = torch.arange(tokens_BL.shape[1])
    return torch.where(labels_BL == UNLABELLED, 0, here - first)


def time_by_length(seed: int, *, repeats: int = 15) -> dict[str, float]:
    """CPU time of a forward and backward pass of three layers of width 64 at each of `LENGTHS`.

    Returns ms_512, ... (the fastest of interleaved repeats), and the smallest and the largest ratio from one length
    to the next, which is its double. Time of the process, so that a busy machine disturbs less; on one thread (which
    trials have) it is the time that passes.
    """
    torch.manual_seed(seed)
    model = GAMLanguageModel(256, max(LENGTHS), 64, 3, num_slots=64)
    tokens_BL = torch.randint(256, (2, max(LENGTHS)))
    fastest = dict.fromkeys(LENGTHS, float("inf"))
    for _ in range(repeats):
        for length in LENGTHS:
            model.zero_grad()
            start = time.process_time()
            model(tokens_BL[:, :length]).square().mean().backward()
            fastest[length] = min(fastest[length], 1000 * (time.process_time() - start))
    ratios = [fastest[long] / fastest[short] for short, long in pairwise(LENGTHS)]
    return {f"ms_{length}": ms for length, ms in fastest.items()} | {
        "smallest_ratio": min(ratios), "largest_ratio": max(ratios),
    }  # fmt: skip
