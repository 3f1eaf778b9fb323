"""Codebooks: an activation is replaced by the mean of the few learned vectors that match it best.

Tamkin, Taufeeque and Goodman, "Codebook Features: Sparse and Discrete Interpretability for Neural Networks" (2023).
What passes at such a place is a few code ids, which can be read (`record_codes`), forbidden (`without_codes`) and written
(`force_codes`; all in `penstock.nn.code_reading`), in any model that has a codebook around an output of shape (B, L, D).

Shape legend: B batch, L length, T = B L tokens, D width, C codes, K chosen codes, H codebooks of a group, N rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import Gate, Routing, observed

Similarity = Literal["inner_product", "cosine", "euclidean"]
CodebookType = Literal["vanilla", "group"]

#: Scores computed at a time, so that (T, C) of them never exist at once; no slower than all together.
_SCORES_CPU, _SCORES = 2**22, 2**26
#: Through more codes than this times K, as when a gate is forced open, one matrix product is faster than look-ups.
_MANY = 4
_TINY = 1e-12


class CodebookKey(NamedTuple):
    """Where a codebook is: layer of the model, place in the block, head (or chunk) of a group."""

    layer: int
    place: str
    head: int | None = None


class CodeSelector(Gate):
    """Lets the K codes through that are most similar to each token: (B, L, D), (C, D) -> `Routing` over codes.

    The weights are one for each chosen code, best first; as a row over all codes, the k-hot indicator. Who calls it
    divides by K. The scores (``logits``) of all codes are kept only while the gate is watched or forced: with many
    codes they are most of the memory. They are not a number (NaN) otherwise; the choice is the same.

    Args:
        top_k: K.
        similarity: inner product with the code of unit length; the same with the input's length divided out too; or
            the negative Euclidean distance.
    """

    passes = "code"
    kind = "k-hot"
    unit_dims = 1

    def __init__(self, top_k: int, similarity: Similarity = "inner_product") -> None:
        super().__init__()
        self.top_k, self.similarity = top_k, similarity

    def scores(self, u_TD: Tensor, codes_CD: Tensor) -> Tensor:
        """How similar each token is to each code, (T, C)."""
        if self.similarity == "euclidean":
            wide = torch.promote_types(u_TD.dtype, torch.float32)  # half precision has no distances on a CPU
            return -torch.cdist(u_TD.to(wide), codes_CD.to(wide)).to(u_TD.dtype)
        if self.similarity == "cosine":
            u_TD = F.normalize(u_TD, dim=-1, eps=_TINY)
        return u_TD @ F.normalize(codes_CD, dim=-1, eps=_TINY).T

    @torch.no_grad()
    def forward(self, u_BLD: Tensor, codes_CD: Tensor) -> Routing:
        axes, keep = u_BLD.shape[:2], observed(self)
        kept, chosen = [], []
        for part_TD in self._parts(u_BLD.flatten(0, 1), len(codes_CD)):
            scores_TC = self.scores(part_TD, codes_CD)
            chosen.append(scores_TC.topk(self.top_k).indices)
            if keep:
                kept.append(scores_TC)
        ids_BLK = torch.cat(chosen).unflatten(0, axes)
        if keep:
            logits_BLC = torch.cat(kept).unflatten(0, axes)
        else:
            logits_BLC = u_BLD.new_full((), float("nan")).expand(*axes, len(codes_CD))
        return Routing(torch.ones_like(ids_BLK, dtype=u_BLD.dtype), ids_BLK, logits_BLC)

    @staticmethod
    def _parts(u_TD: Tensor, num_codes: int) -> Sequence[Tensor]:
        if torch.compiler.is_compiling():  # the number of parts must not depend on the batch
            return [u_TD]
        return u_TD.split(max((_SCORES_CPU if u_TD.device.type == "cpu" else _SCORES) // num_codes, 1))


@dataclass(frozen=True)
class CodebookLoss:
    """What trains the codes and their input; it acts in the backward pass only and is in no reported loss.

    Attributes:
        task: the codes get the gradient of the model's own loss.
        reconstruction: they get that of the mean over tokens of ||y - u||^2.
        commitment: beta: the input gets that of beta times the sum over tokens of ||u - y||^2.
    """

    task: bool
    reconstruction: bool
    commitment: float = 0.0

    @classmethod
    def parse(cls, name: str) -> CodebookLoss:
        """From "base", "aeloss", "vqvae", "fullaeloss"; the last two take a beta as in "vqvae-0.25".

        Raises:
            ValueError: for another name, or a beta that is no number of 0 or more.
        """
        if name == "base":
            return cls(task=True, reconstruction=False)
        if name == "aeloss":
            return cls(task=True, reconstruction=True)
        named = re.fullmatch(r"(vqvae|fullaeloss)(?:-(\d*\.?\d+(?:e-?\d+)?))?", name)
        if named is None:
            raise ValueError(
                f"loss={name!r}: it must be base, aeloss, vqvae or fullaeloss, the last two also with a beta of 0 or more "
                "('vqvae-0.25')"
            )
        kind, beta = named.groups()
        return cls(task=kind == "fullaeloss", reconstruction=True, commitment=float(beta or 0.25))


class _StraightThrough(torch.autograd.Function):
    """y forward; backward, y's gradient goes to u as well, and both get the codebook loss's on top."""

    @staticmethod
    def forward(ctx: Any, u_BLD: Tensor, y_BLD: Tensor, loss: CodebookLoss) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(u_BLD, y_BLD)
        return y_BLD.view_as(y_BLD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), loss = grads, ctx.loss
        u_BLD, y_BLD = ctx.saved_tensors
        grad_u, grad_y = grad, grad if loss.task else torch.zeros_like(grad)
        if loss.reconstruction:
            grad_y = grad_y + (2 / (grad.shape[0] * grad.shape[1])) * (y_BLD - u_BLD)
        if loss.commitment:
            grad_u = grad_u + (2 * loss.commitment) * (u_BLD - y_BLD)
        return grad_u, grad_y, None


class CodebookMetrics:
    """What a codebook did since the last `reset`, in training and evaluation alike.

    The tensors are no buffers: they keep their precision in a model of half precision and are in no checkpoint.
    """

    def __init__(self, num_codes: int) -> None:
        self.num_codes = num_codes
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None

    def reset(self) -> None:
        """Forget everything."""
        self._counts = self._sums = None

    @torch.no_grad()
    def update(self, routing: Routing, u_BLD: Tensor, y_BLD: Tensor) -> None:
        """Add a batch: what was let through, its input u and its output y."""
        wide = torch.promote_types(u_BLD.dtype, torch.float32)
        u_BLD, y_BLD = u_BLD.to(wide), y_BLD.to(wide)
        if self._counts is None or self._sums is None or self._counts.device != u_BLD.device:
            self._counts = torch.zeros(self.num_codes, dtype=torch.int64, device=u_BLD.device)
            self._sums = torch.zeros(
                4, dtype=torch.float32 if u_BLD.device.type == "mps" else torch.float64, device=u_BLD.device
            )
        fired = torch.zeros_like(self._counts)
        fired.scatter_reduce_(0, routing.indices.flatten(), (routing.weights.flatten() != 0).long(), "amax")
        self._counts += fired
        per_token = ((y_BLD - u_BLD).square().sum(-1), u_BLD.norm(dim=-1), y_BLD.norm(dim=-1))
        self._sums += torch.stack([self._sums.new_tensor(u_BLD[..., 0].numel()), *(one.sum() for one in per_token)])

    @property
    def counts(self) -> Tensor:
        """In how many batches each code was used, (C,)."""
        return torch.zeros(self.num_codes, dtype=torch.int64) if self._counts is None else self._counts

    @property
    def tokens(self) -> int:
        """How many tokens passed."""
        return 0 if self._sums is None else int(self._sums[0])

    @property
    def active_codes(self) -> int:
        """How many codes were used at all."""
        return int((self.counts > 0).sum())

    @property
    def dead_share(self) -> float:
        """Share of codes that were never used."""
        return 1 - self.active_codes / self.num_codes

    @property
    def mse(self) -> float:
        """Mean over tokens of ||y - u||^2, summed over channels; u is the normalised input."""
        return self._mean(1)

    @property
    def input_norm(self) -> float:
        """Mean over tokens of ||u||."""
        return self._mean(2)

    @property
    def output_norm(self) -> float:
        """Mean over tokens of ||y||."""
        return self._mean(3)

    def _mean(self, place: int) -> float:
        return float("nan") if self._sums is None else float(self._sums[place] / self._sums[0])


class CodebookLayer(nn.Module):
    """A bottleneck of K codes: (B, L, D) -> (B, L, D), the mean of the chosen codes and nothing of the input.

    The mean is over K, or over more where a forced gate lets more through; fewer leave the divisor. The input's gradient
    is the output's (straight through, then the layer norm).

    Args:
        dim: width D.
        num_codes: C.
        top_k: K, from 1 to C.
        similarity: see `CodeSelector`.
        loss: see `CodebookLoss.parse`.
        replace_after: every so many training passes, codes unused since become random inputs of the batch; 0: never.
        replace_noise: Gaussian noise on those, as a share of their norm (a channel).
        key: where it is, for `force_codes`.

    Attributes:
        enabled: ``False`` passes the input unchanged.
        metrics: what it did since they were reset.

    Raises:
        ValueError: for impossible sizes or an unknown similarity or loss; in a call, for an input of another shape.
    """

    def __init__(
        self,
        dim: int,
        num_codes: int,
        *,
        top_k: int = 1,
        similarity: Similarity = "inner_product",
        loss: str = "aeloss",
        replace_after: int = 0,
        replace_noise: float = 0.0,
        key: CodebookKey | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or not 1 <= top_k <= num_codes:
            raise ValueError(
                f"top_k={top_k}, num_codes={num_codes}, dim={dim}: top_k must be from 1 to num_codes, dim 1 or more"
            )
        if similarity not in get_args(Similarity):
            raise ValueError(f"similarity={similarity!r}: it must be one of {', '.join(get_args(Similarity))}")
        if replace_after < 0 or replace_noise < 0:
            raise ValueError(f"replace_after={replace_after}, replace_noise={replace_noise}: both must be 0 or more")
        self.dim, self.num_codes, self.top_k, self.key = dim, num_codes, top_k, key
        self.loss = CodebookLoss.parse(loss)
        self.replace_after, self.replace_noise = replace_after, replace_noise
        self.enabled = True
        self.codebook = nn.Embedding(num_codes, dim)
        self.ln = nn.LayerNorm(dim)
        self.selector = CodeSelector(top_k, similarity)
        self.metrics = CodebookMetrics(num_codes)
        self._passes = 0
        # Which codes were used since the last replacement.
        self.register_buffer("used", torch.zeros(num_codes, dtype=torch.bool), persistent=False)
        self.used: Tensor

    def forward(self, x_BLD: Tensor) -> Tensor:
        if x_BLD.ndim != 3 or x_BLD.shape[-1] != self.dim:
            raise ValueError(f"the codebook's input is {tuple(x_BLD.shape)}; it must be (B, L, {self.dim})")
        if not self.enabled:
            return x_BLD
        u_BLD = self.ln(x_BLD)
        counted = not (torch.compiler.is_exporting() or _recomputing())
        if counted and self.training and self.replace_after:
            self._replace_unused(u_BLD)
        routing = self.selector(u_BLD, self.codebook.weight)
        y_BLD = self.decode(routing)
        if counted:
            self.metrics.update(routing, u_BLD, y_BLD)
        if counted and self.training and self.replace_after:
            self.used.index_fill_(0, routing.indices.flatten(), True)
            self._passes += 1
        return straight_through(u_BLD, y_BLD, self.loss)

    def decode(self, routing: Routing) -> Tensor:
        """The mean of the codes that a routing lets through, (B, L, D)."""
        weights_BLK, ids_BLK = routing.weights, routing.indices
        share_BLK = weights_BLK / weights_BLK.sum(-1, keepdim=True).clamp(min=self.top_k)
        if ids_BLK.shape[-1] > _MANY * self.top_k:
            return routing._replace(weights=share_BLK).dense() @ self.codebook.weight
        ids_TK, share_TK = ids_BLK.flatten(0, 1), share_BLK.flatten(0, 1)
        y_TD = F.embedding_bag(ids_TK, self.codebook.weight, per_sample_weights=share_TK, mode="sum")
        return y_TD.unflatten(0, ids_BLK.shape[:2])

    @torch.no_grad()
    def _replace_unused(self, u_BLD: Tensor) -> None:
        """Every `replace_after` passes, give each code that none of them used a random input of this batch."""
        if self._passes < self.replace_after:
            return
        unused = (~self.used).nonzero().flatten()
        u_TD = u_BLD.flatten(0, 1)
        order = torch.randperm(len(u_TD), device=u_TD.device)
        new_ND = u_TD[order[torch.arange(len(unused), device=u_TD.device) % len(order)]]
        new_ND = new_ND + self.replace_noise * new_ND.norm(dim=-1, keepdim=True) * torch.randn_like(new_ND)
        self.codebook.weight[unused] = new_ND.to(self.codebook.weight.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(self.codebook.weight, 0)  # each process has drawn its own
        self.used.zero_()
        self._passes = 0


def straight_through(u_BLD: Tensor, y_BLD: Tensor, loss: CodebookLoss) -> Tensor:
    """y, with a gradient for u: y's own, and for both that of the codebook loss (see `CodebookLoss`)."""
    out: Tensor = _StraightThrough.apply(u_BLD, y_BLD, loss)
    return out


def _recomputing() -> bool:
    """Whether this is gradient checkpointing's second forward pass, which runs inside the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class GroupCodebookLayer(nn.Module):
    """H codebooks side by side, each with its own chunk of the channels: (B, L, D) -> (B, L, D).

    An input with an axis of heads, (B, L, H, D / H), keeps it.

    Args:
        dim: width D of all chunks together.
        num_codes: codes C of each codebook.
        num_codebooks: H, a divisor of D.
        key: of the group; each codebook's has its number as the head.
        others: see `CodebookLayer`.

    Raises:
        ValueError: if H does not divide D, or see `CodebookLayer`.
    """

    def __init__(
        self,
        dim: int,
        num_codes: int,
        num_codebooks: int,
        *,
        top_k: int = 1,
        similarity: Similarity = "inner_product",
        loss: str = "aeloss",
        replace_after: int = 0,
        replace_noise: float = 0.0,
        key: CodebookKey | None = None,
    ) -> None:
        super().__init__()
        if num_codebooks < 1 or dim % num_codebooks:
            raise ValueError(f"num_codebooks={num_codebooks} must divide the width {dim}")
        self.dim, self.num_codebooks = dim, num_codebooks
        self.codebook = nn.ModuleList(
            CodebookLayer(
                dim // num_codebooks,
                num_codes,
                top_k=top_k,
                similarity=similarity,
                loss=loss,
                replace_after=replace_after,
                replace_noise=replace_noise,
                key=None if key is None else key._replace(head=head),
            )
            for head in range(num_codebooks)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = x.ndim == 4
        if (
            x.ndim not in (3, 4)
            or x.shape[-1] * (x.shape[2] if heads else 1) != self.dim
            or (heads and x.shape[2] != self.num_codebooks)
        ):
            per = self.dim // self.num_codebooks
            raise ValueError(
                f"the codebooks' input is {tuple(x.shape)}; it must be (B, L, {self.dim}) or (B, L, {self.num_codebooks}, {per})"
            )
        chunks = x.unbind(2) if heads else x.chunk(self.num_codebooks, -1)
        snapped = [own(chunk) for own, chunk in zip(self.codebook, chunks, strict=True)]
        return torch.stack(snapped, 2) if heads else torch.cat(snapped, -1)


def make_codebook(
    dim: int, num_codes: int, *, codebook_type: CodebookType = "vanilla", num_codebooks: int = 1, **options: Any
) -> CodebookLayer | GroupCodebookLayer:
    """One codebook ("vanilla") or several side by side ("group").

    Args:
        dim, num_codes: D and C.
        codebook_type: of the two.
        num_codebooks: H; vanilla has one.
        options: see `CodebookLayer`.

    Raises:
        ValueError: for an unknown type, a vanilla codebook of several, or see `CodebookLayer`.
    """
    if codebook_type not in get_args(CodebookType):
        raise ValueError(f"codebook_type={codebook_type!r}: it must be vanilla or group")
    if codebook_type == "group":
        return GroupCodebookLayer(dim, num_codes, num_codebooks, **options)
    if num_codebooks != 1:
        raise ValueError(f"codebook_type='vanilla' has one codebook, not num_codebooks={num_codebooks}; use 'group'")
    return CodebookLayer(dim, num_codes, **options)


class CodebookWrapper(nn.Module):
    """Any module with a codebook on its output (of a tuple: on its first element), under the authors' names.

    Other attributes are the module's own, so that the model around it finds what it reads there.

    Args:
        module_layer: its output is (B, L, D).
        codebook_layer: of width D.
    """

    def __init__(self, module_layer: nn.Module, codebook_layer: CodebookLayer | GroupCodebookLayer) -> None:
        super().__init__()
        self.module_layer, self.codebook_layer = module_layer, codebook_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module_layer(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.codebook_layer(output[0]), *output[1:])
        return self.codebook_layer(output)
