"""Codes read and written in any model that has codebooks: which fire, forbidding some, forcing others.

`record_codes` keeps the ids of each forward pass, `without_codes` forbids codes or ranks, `force_codes` puts chosen
codes at chosen places, `bypass_codebooks` takes the bottleneck away, `kmeans_codebooks` starts codes from a model's own
activations.

Shape legend: B batch, L length, D width, C codes, K chosen codes, N rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import GateWarning, Routing, force
from penstock.gates.core import attach
from penstock.nn.codebook import CodebookKey, CodebookLayer


def find_codebooks(model: nn.Module) -> dict[CodebookKey, CodebookLayer]:
    """The codebooks of a model by where they are, in the order of its modules.

    Raises:
        ValueError: if it has none, or none that was given a key.
    """
    found = {m.key: m for m in model.modules() if isinstance(m, CodebookLayer) and m.key is not None}
    if not found:
        raise ValueError(f"{type(model).__name__} has no codebooks with a key")
    return found


@contextmanager
def bypass_codebooks(model: nn.Module) -> Iterator[None]:
    """Inside the context all codebooks pass their input unchanged: the network without its bottleneck."""
    layers = [m for m in model.modules() if isinstance(m, CodebookLayer)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


Change: TypeAlias = Callable[[Routing], Routing]


class ForcedCode(NamedTuple):
    """One intervention: which code stands where.

    Attributes:
        layer: of the model.
        place: in the block ("mlp", "attn_preproj", ...).
        head: of a group of codebooks; ``None`` for a single one.
        code: its number; -1 takes the slot's code away and leaves the divisor.
        position: of the token in each call, from the end if negative; ``None``: every token.
        slot: the rank whose code it replaces (0 is the most similar); "append" adds it to them.
    """

    layer: int
    place: str
    head: int | None
    code: int
    position: int | None = None
    slot: int | Literal["append"] = 0


@contextmanager
def force_codes(model: nn.Module, entries: Iterable[ForcedCode | tuple[Any, ...]]) -> Iterator[None]:
    """Write codes while the context is open, in training and evaluation mode alike.

    A call too short to have an entry's position, as when text is generated token by token, is left as it is.

    Args:
        model: with codebooks that have keys.
        entries: `ForcedCode`, or tuples in its order; applied in the order given.

    Raises:
        ValueError: for a place without a codebook, a code or slot that it does not have.

    Warns:
        GateWarning: on leaving, of entries whose position no call had.

    Example:
        >>> import torch
        >>> codebook = CodebookLayer(4, 10, key=CodebookKey(0, "mlp"))
        >>> with force_codes(codebook, [(0, "mlp", None, 7, -1)]), torch.no_grad():
        ...     torch.equal(codebook(torch.randn(1, 3, 4))[0, -1], codebook.codebook.weight[7])
        True
    """
    names = {m.key: f"{name}.selector".lstrip(".") for name, m in model.named_modules() if isinstance(m, CodebookLayer)}
    found = find_codebooks(model)
    plan: dict[str, list[_Writing]] = {}
    for given in entries:
        entry = ForcedCode(*given)
        key = CodebookKey(*entry[:3])
        if key not in found:
            known = ", ".join(str(tuple(one)) for one in found)
            raise ValueError(
                f"{tuple(entry)}: there is no codebook at {tuple(key)}; (layer, place, head) must be one of {known}"
            )
        layer = found[key]
        if not -1 <= entry.code < layer.num_codes or (entry.code == -1 and entry.slot == "append"):
            raise ValueError(
                f"{tuple(entry)}: code {entry.code} must be from 0 to {layer.num_codes - 1}, or -1 to empty a slot"
            )
        if entry.slot != "append" and not 0 <= entry.slot < layer.top_k:
            raise ValueError(f"{tuple(entry)}: slot {entry.slot} must be from 0 to {layer.top_k - 1}, or 'append'")
        plan.setdefault(names[key], []).append(_Writing(entry))
    if not plan:
        yield
        return
    with force(model, {name: _in_turn(writings) for name, writings in plan.items()}):
        yield
    for writing in (w for writings in plan.values() for w in writings if not w.acted):
        warnings.warn(f"{tuple(writing.entry)} changed nothing: no call had that position", GateWarning, stacklevel=3)


class _Writing:
    """A `ForcedCode` as a change of what passes."""

    def __init__(self, entry: ForcedCode) -> None:
        self.entry, self.acted = entry, False

    def __call__(self, routing: Routing) -> Routing:
        weights_BLK, ids_BLK, length = routing.weights, routing.indices, routing.indices.shape[1]
        entry = self.entry
        if entry.position is not None and not -length <= entry.position < length:
            return routing
        self.acted = True
        slot = entry.slot
        if slot == "append":
            weights_BLK, ids_BLK = F.pad(weights_BLK, (0, 1)), F.pad(ids_BLK, (0, 1))
            slot = ids_BLK.shape[-1] - 1
        else:
            weights_BLK, ids_BLK = weights_BLK.clone(), ids_BLK.clone()
        at = slice(None) if entry.position is None else entry.position
        ids_BLK[:, at, slot] = max(entry.code, 0)
        weights_BLK[:, at, slot] = float(entry.code >= 0)
        return Routing(weights_BLK, ids_BLK, routing.logits)


def _in_turn(changes: Sequence[Change]) -> Change:
    def change(routing: Routing) -> Routing:
        for one in changes:
            routing = one(routing)
        return routing

    return change


def without_codes(
    codes: Sequence[int] = (),
    *,
    top: int = 0,
    ranks: Sequence[int] = (),
    keep_k: bool = True,
    positions: Sequence[int] | None = None,
) -> Change:
    """Forbid codes: ``penstock.force(model, without_codes([3, 17]), "layers.2.*")``.

    Args:
        codes: never let through.
        top: nor the best so many ranks.
        ranks: emptied too, whatever the positions (only without ``keep_k``).
        keep_k: the next best codes take the places, so that K pass still; else the places stay empty and the divisor K.
        positions: tokens at which this holds (default all).

    Returns:
        what `penstock.force` takes. In a call it raises ValueError for a code or rank that is not there, or when fewer
        than K codes are left.
    """

    def change(routing: Routing) -> Routing:
        (length, top_k), num_codes = routing.indices.shape[1:], routing.num_experts
        if not all(0 <= code < num_codes for code in codes):
            raise ValueError(f"codes={list(codes)}: they must be from 0 to {num_codes - 1}")
        here = torch.zeros(length, dtype=torch.bool, device=routing.indices.device)
        here[slice(None) if positions is None else list(positions)] = True
        forbidden = torch.tensor(list(codes), dtype=torch.int64, device=here.device)
        if keep_k:
            if top_k + top + len(set(codes)) > num_codes:
                raise ValueError(
                    f"{num_codes} codes without {len(set(codes))} of them and the best {top}: fewer than {top_k} are left"
                )
            scores_BLC = routing.logits.index_fill(-1, forbidden, float("-inf"))
            others_BLK = scores_BLC.topk(top_k + top).indices[..., top:]
            ids_BLK = torch.where(here[:, None], others_BLK, routing.indices)
            weights_BLK = routing.weights.masked_fill(here[:, None], 1.0)
            return Routing(weights_BLK, ids_BLK, routing.logits)
        if not all(0 <= rank < top_k for rank in ranks):
            raise ValueError(f"ranks={list(ranks)}: they must be from 0 to {top_k - 1}")
        empty_BLK = torch.isin(routing.indices, forbidden)
        empty_BLK[..., :top] = True
        empty_BLK &= here[:, None]
        empty_BLK[..., list(ranks)] = True
        return routing._replace(weights=routing.weights.masked_fill(empty_BLK, 0.0))

    return change


@contextmanager
def record_codes(model: nn.Module) -> Iterator[dict[CodebookKey, list[Tensor]]]:
    """Collect which codes pass while the context is open.

    Yields:
        for each codebook the ids of every call, (B, L, K) on the CPU, best first, -1 where a slot is empty. What is
        forced is seen where the forcing was opened before.
    """
    log: dict[CodebookKey, list[Tensor]] = {}
    undo: list[Callable[[], None]] = []

    def hook(calls: list[Tensor]) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Routing) -> None:
            calls.append(output.indices.masked_fill(output.weights == 0, -1).cpu())

        return torch.compiler.disable(record)

    try:
        for key, layer in find_codebooks(model).items():
            undo.append(attach(layer.selector, hook(log.setdefault(key, []))))
        yield log
    finally:
        for take_off in undo:
            take_off()


@torch.no_grad()
def kmeans_codebooks(model: nn.Module, batches: Iterable[Tensor], *, examples: int = 1000, seed: int = 0) -> None:
    """Start all codes at the centres of mini-batch k-means of what the codebooks will be given.

    The codebooks pass their input unchanged meanwhile, and the model is in evaluation mode.

    Args:
        model: called with each batch.
        batches: (B, L), each with at least as many tokens as there are codes.
        examples: samples after which to stop.
        seed: of the clustering; a head's number is added to it.

    Raises:
        ValueError: if a batch has fewer tokens than a codebook codes, or there is none.
    """
    from sklearn.cluster import MiniBatchKMeans

    layers = find_codebooks(model)
    fits = {
        key: MiniBatchKMeans(layer.num_codes, random_state=seed + (key.head or 0), n_init=1)
        for key, layer in layers.items()
    }
    inputs: dict[CodebookKey, Tensor] = {}

    def keep(key: CodebookKey) -> Callable[..., None]:
        def hook(layer: CodebookLayer, args: tuple[Tensor, ...]) -> None:
            inputs[key] = layer.ln(args[0]).flatten(0, 1).double().cpu()

        return hook

    training, seen = model.training, 0
    handles = [layer.register_forward_pre_hook(keep(key)) for key, layer in layers.items()]
    try:
        model.eval()
        with bypass_codebooks(model):
            for batch in batches:
                if seen >= examples:
                    break
                model(batch)
                seen += len(batch)
                for key, fit in fits.items():
                    if len(inputs[key]) < layers[key].num_codes:
                        raise ValueError(
                            f"a batch of {len(inputs[key])} tokens cannot start {layers[key].num_codes} codes by k-means; give larger batches"
                        )
                    fit.partial_fit(inputs[key].numpy())
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if not seen:
        raise ValueError("k-means needs at least one batch")
    for key, layer in layers.items():
        layer.codebook.weight.copy_(torch.from_numpy(fits[key].cluster_centers_))
