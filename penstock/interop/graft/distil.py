"""Training grafted attention gates by distillation, and what sparse attention then costs in accuracy.

Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (2024), sec. 3.2 and 4.

Shape legend: B batch, L length, H heads, N blocks, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.errors import UserError
from penstock.gates import Table, force, watch
from penstock.interop.graft.layout import Place
from penstock.interop.graft.seer import block_tables, gate_in, gate_of, gated_places, sparse_prefill
from penstock.interop.graft.tap import Heads, run_decoder, tapped
from penstock.systems.sequence.seer_attention.tiles import (
    TargetPool,
    causal_tiles,
    density,
    distillation_loss,
    ground_truth,
    open_tiles,
    select_tiles,
    sink_local_scores,
    tile_recall,
)

#: Token ids (B, L), or what transformers calls a batch.
Batch: TypeAlias = Tensor | Mapping[str, Tensor]


def distil(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int | None = None,
    lr: float = 1e-3,
    warmup_steps: int = 20,
    loss_scale: float = 10.0,
    pool: TargetPool = "max",
) -> list[float]:
    """Teach the grafted attention gates which tiles of the frozen model's own attention maps matter.

    The model runs densely, without gradients, and each layer's gate learns from its own layer's map, so errors do not add
    up. AdamW without weight decay, a linear warm-up, then a cosine to zero. The authors train on 500M tokens, 16
    sequences of 32k to 64k tokens a step, with these defaults; small models on short sequences like a larger ``lr``.

    Args:
        model: with gates of ``graft(model, "seer_attention")``; nothing but these gates changes.
        batches: token ids (B, L) of whole sequences, without padding, of at least two blocks; or mappings with
            ``input_ids``.
        steps: how many batches are used, one a step; default all, for ``batches`` that have a length.
        lr, warmup_steps: the learning rate's top, and after how many steps it is reached.
        loss_scale: of the loss, while training.
        pool: of the attention map over tiles; the authors take the maximum.

    Returns:
        the loss of each step, summed over layers and without ``loss_scale``.

    Raises:
        UserError: if the model has no such gates, the number of steps is not known or wrong, or a batch does not do.
    """
    places, steps = gated_places(model), _count(batches, steps)
    if pool not in get_args(TargetPool):
        raise UserError(f"pool={pool!r}: it must be one of {', '.join(get_args(TargetPool))}")
    parameters = [parameter for place in places for parameter in gate_of(place).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(warmup_steps, steps))
    found: list[Tensor] = []

    def learn(attention: nn.Module, heads: Heads) -> None:
        gate = gate_in(attention)
        with torch.enable_grad():
            logits = gate.logits(heads.raw_queries, heads.raw_keys, block_tables(heads.tables, gate.block_size))
            loss = distillation_loss(
                logits, heads.queries, heads.keys, block_size=gate.block_size, pool=pool, scale=heads.scale
            )
            (loss_scale * loss).backward()
        found.append(loss.detach())

    losses = []
    with _training(model, parameters), tapped(model, places, learn):
        for batch in islice(batches, steps):
            optimizer.zero_grad()
            found.clear()
            run_decoder(model, token_ids(batch, places))
            optimizer.step()
            schedule.step()
            losses.append(float(torch.stack(found).sum()))
    if len(losses) < steps:
        raise UserError(f"distil: the batches ended after {len(losses)} of {steps} steps")
    return losses


def _count(batches: Iterable[Batch], steps: int | None) -> int:
    """How many steps there are to be."""
    if steps is None:
        if not isinstance(batches, Sized):
            raise UserError("distil: these batches have no length; give steps=")
        steps = len(batches)
    if steps < 1:
        raise UserError(f"distil: steps={steps} must be at least 1")
    return steps


@contextmanager
def _training(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The gates' parameters can be trained, and nothing in the model is random; afterwards all is as before."""
    training, trainable = model.training, [parameter.requires_grad for parameter in parameters]
    try:
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        model.train(training)
        for parameter, before in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None


def warm_cosine(warmup_steps: int, steps: int) -> Callable[[int], float]:
    """The share of the learning rate at a step: linear up, then half a cosine to zero."""

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1))

    return share


def token_ids(batch: Batch, places: Sequence[Place]) -> Tensor:
    """Whole sequences (B, L) of a batch.

    Raises:
        UserError: if it holds none, or they are padded or shorter than two blocks.
    """
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise UserError(f"a batch with {', '.join(batch)} has no input_ids")
        mask = batch.get("attention_mask")
        if mask is not None and not bool((mask != 0).all()):
            raise UserError("the batch is padded (attention_mask); give whole sequences of equal length")
        batch = batch["input_ids"]
    block = max(gate_of(place).block_size for place in places)
    if batch.ndim != 2 or batch.shape[1] < 2 * block:
        raise UserError(f"tokens are {tuple(batch.shape)}; they must be (B, L), L at least two blocks of {block}")
    return batch


@torch.no_grad()
def sparse_report(
    model: nn.Module,
    tokens: Batch,
    keep_ratios: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0),
    *,
    last_block_dense: bool = False,
    seed: int = 0,
) -> Table:
    """What attention in part of the tiles costs: error and loss against the share kept, beside other masks' of that share.

    Args:
        model: a causal language model with gates of ``graft(model, "seer_attention")``.
        tokens: (B, L) whole sequences without padding, at least two blocks long.
        keep_ratios: shares of the causal tiles to keep, above 0, at most 1.
        last_block_dense: keep all tiles of the last two block rows besides, as the authors do.
        seed: of the random mask.

    Returns:
        a row for each ratio and mask: ratio, mask ("learned", "oracle": the truest tiles, "sink_local": the first block
        and the nearest, "random"), kept (share of the causal tiles computed), recall (share of the true map's mass, pooled
        as in distillation, in these tiles), error (of the logits, relative to dense attention, in the Euclidean norm),
        loss increase (nats a token).

    Raises:
        UserError: if the model has no such gates, or for tokens or a ratio that do not do.
    """
    places = gated_places(model)
    if wrong := [ratio for ratio in keep_ratios if not 0 < ratio <= 1]:
        raise UserError(f"keep_ratios: {wrong[0]} must be above 0 and at most 1")
    training = model.training
    model.eval()
    try:
        return _report(model, places, token_ids(tokens, places), keep_ratios, last_block_dense, seed)
    finally:
        model.train(training)


def _report(
    model: nn.Module,
    places: Sequence[Place],
    tokens_BL: Tensor,
    keep_ratios: Sequence[float],
    last_block_dense: bool,
    seed: int,
) -> Table:
    names = {module: name for name, module in model.named_modules()}
    gates = {names[gate_of(place)]: gate_of(place) for place in places}
    tokens_BL = tokens_BL.to(next(model.parameters()).device)
    truths, dense_BLV = _true_tiles(model, places, tokens_BL)
    masks = {"learned": None, **_other_scores(truths, seed)}
    rows = Table()
    for ratio in keep_ratios:
        with sparse_prefill(model, nz_ratio=ratio, last_block_dense=last_block_dense):
            for mask, scores in masks.items():
                forcing: AbstractContextManager[object] = nullcontext()
                if scores is not None:
                    pairs = zip(gates.items(), scores, strict=True)
                    tiles = {name: select_tiles(s, gate.rule, block_size=gate.block_size) for (name, gate), s in pairs}
                    forcing = force(model, {name: own.float() for name, own in tiles.items()})
                with forcing, watch(model, list(gates), keep="values") as log:
                    logits_BLV = model(tokens_BL, use_cache=False).logits
                values = log.values()
                kept = [open_tiles(values[name][0]).tril() for name in gates]
                recalls = [tile_recall(own, truth).mean() for own, truth in zip(kept, truths, strict=True)]
                rows.append(
                    {
                        "ratio": ratio,
                        "mask": mask,
                        "kept": float(torch.stack([density(own).mean() for own in kept]).mean()),
                        "recall": float(torch.stack(recalls).mean()),
                        "error": float((logits_BLV - dense_BLV).norm() / dense_BLV.norm()),
                        "loss increase": _loss(logits_BLV, tokens_BL) - _loss(dense_BLV, tokens_BL),
                    }
                )
    return rows


def _true_tiles(model: nn.Module, places: Sequence[Place], tokens_BL: Tensor) -> tuple[list[Tensor], Tensor]:
    """The pooled attention maps of the dense model, (B, H, N, N) a layer, and its logits."""
    truths: list[Tensor] = []

    def look(attention: nn.Module, heads: Heads) -> None:
        size = gate_in(attention).block_size
        truths.append(ground_truth(heads.queries, heads.keys, block_size=size, scale=heads.scale))

    with tapped(model, places, look):
        return truths, model(tokens_BL, use_cache=False).logits


def _other_scores(truths: list[Tensor], seed: int) -> dict[str, list[Tensor]]:
    """What the masks beside the learned one choose by, a tensor (B, H, N, N) a layer."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        "oracle": truths,
        "sink_local": [sink_local_scores(t.shape[-1], t.device).expand(t.shape) for t in truths],
        "random": [torch.rand(t.shape, generator=generator).to(t.device) for t in truths],
    }
    return {
        mask: [score.masked_fill(~causal_tiles(score.shape[-1], score.device), -math.inf) for score in own]
        for mask, own in scores.items()
    }


def _loss(logits_BLV: Tensor, tokens_BL: Tensor) -> float:
    """Cross-entropy of the next token, in nats."""
    return float(F.cross_entropy(logits_BLV[:, :-1].float().flatten(0, 1), tokens_BL[:, 1:].flatten()))
