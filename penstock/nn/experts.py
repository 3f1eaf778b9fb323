"""What every mixture of experts shares: stacked experts, the weighted sum of their outputs, balance losses.

A router decides (a `Routing`); `mixture` applies what the router returned, and nothing else, to the experts.

Shape legend: T tokens (any leading axes), D input width, O output width, E experts, K chosen experts, N pairs of
a token and an expert.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from penstock.gates import Routing
from penstock.nn.conditional import may_skip
from penstock.ops.routing import grouped_matmul

Dispatch = Literal["auto", "dense", "sparse"]


class ExpertBank(Protocol):
    """Experts of equal input and output widths, evaluated all on all tokens or each on its own."""

    num_experts: int

    def __call__(self, x_TD: Tensor, /) -> Tensor:
        """Every expert on every token: (T, D) -> (E, T, O)."""

    def grouped(self, x_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """Expert e on its own ``counts[e]`` consecutive rows: (N, D) -> (N, O)."""


class StackedLinear(nn.Module):
    """E linear maps whose weights are one parameter (E, I, O) and biases another (E, O)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        bound = 1 / math.sqrt(in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(T, I), or (E, T, I) with rows of each expert's own, -> (E, T, O)."""
        x_ETI = x.expand(self.weight.shape[0], -1, -1)
        if self.bias is None:
            return torch.bmm(x_ETI, self.weight)
        return torch.baddbmm(self.bias[:, None], x_ETI, self.weight)

    def grouped(self, x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """(N, I) sorted by expert, ``counts[e]`` rows for expert e, -> (N, O)."""
        y_NO = grouped_matmul(x_NI, self.weight, counts)
        if self.bias is None:
            return y_NO
        repeats = torch.tensor(counts, device=y_NO.device)
        return y_NO + self.bias.repeat_interleave(repeats, 0, output_size=len(y_NO))


class Experts(nn.Module):
    """E perceptrons of the same shape, evaluated together; with two widths they are linear maps.

    Args:
        num_experts: E, 1 or more.
        widths: input width, hidden widths, output width.
        activation: between layers.
        activate_output: also after the last layer.
        dropout: after every activation.
        bias: whether the layers have biases.

    Raises:
        ValueError: for fewer than one expert or two widths.
    """

    def __init__(
        self,
        num_experts: int,
        widths: Sequence[int],
        *,
        activation: nn.Module | None = None,
        activate_output: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_experts < 1 or len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"num_experts={num_experts}, widths={tuple(widths)}: one expert or more, two widths of 1 or more"
            )
        self.num_experts, self.in_features, self.out_features = num_experts, widths[0], widths[-1]
        self.layers = nn.ModuleList(StackedLinear(num_experts, a, b, bias=bias) for a, b in pairwise(widths))
        self.activation = nn.Sequential(activation or nn.ReLU(), nn.Dropout(dropout))
        self.activations = len(self.layers) - (not activate_output)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Every expert on every token: (T, D) -> (E, T, O)."""
        h = x_TD
        for number, layer in enumerate(self.layers):
            h = layer(h)
            if number < self.activations:
                h = self.activation(h)
        return h

    def grouped(self, x_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """Each expert on its own rows: (N, D) sorted by expert, ``counts`` rows each -> (N, O)."""
        h = x_ND
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, StackedLinear)
            h = layer.grouped(h, counts)
            if number < self.activations:
                h = self.activation(h)
        return h


def mixture(
    experts: ExpertBank, x: Tensor, gate: Tensor | Routing, *, dispatch: Dispatch = "auto", saturated: bool = False
) -> Tensor:
    """The experts' outputs, weighted by what a gate returned; see `mixtures`."""
    return mixtures(experts, x, [gate], dispatch=dispatch, saturated=saturated)[0]


def mixtures(
    experts: ExpertBank,
    x: Tensor,
    gates: Sequence[Tensor | Routing],
    *,
    dispatch: Dispatch = "auto",
    saturated: bool = False,
) -> list[Tensor]:
    """Several weighted sums over the same experts, one for each gate; an expert is evaluated once for all of them.

    Args:
        experts: E experts.
        x: (..., D) tokens.
        gates: values as the gates returned them, each a tensor (..., E) or a `Routing`. There is no capacity:
            every token reaches every expert it has weight for.
        dispatch: "dense" evaluates every expert on every token: the reference. "sparse" evaluates the pairs of
            token and expert whose weight is not zero; values and gradients are those of the dense form, except
            that a weight that is exactly zero gets no gradient. "auto" is sparse where fewer than half of all pairs
            have weight and no gradient can be lost: a gate is not trained, or names fewer experts than there are,
            or ``saturated`` says so; inside `evaluate_everything` and in compiled and exported graphs it is dense.
        saturated: promise that the gates' zeros are flat (smooth steps at their ends, a ReLU): they pass no
            gradient on, so that they may be skipped in training too.

    Returns:
        for each gate (..., O).
    """
    x_TD = x.flatten(0, -2)
    rows = [_dense(gate).flatten(0, -2) for gate in gates]
    if dispatch == "auto":
        lossless = not torch.compiler.is_compiling() and (saturated or not any(map(_trains_zeros, gates)))
        dispatch = "sparse" if lossless and may_skip() and _open_share(rows) < 0.5 else "dense"
    if dispatch == "dense":
        y_ETO = experts(x_TD)
        sums = [weighted_sum(y_ETO, row_TE) for row_TE in rows]
    else:
        sums = _sparse(experts, x_TD, rows)
    return [total.unflatten(0, x.shape[:-1]) for total in sums]


def weighted_sum(y_ETO: Tensor, gate: Tensor | Routing) -> Tensor:
    """Outputs of every expert (E, T, O), weighted by gate values (T, E) or a `Routing` -> (T, O)."""
    return torch.einsum("te,eto->to", _dense(gate).to(y_ETO.dtype), y_ETO)


def _sparse(experts: ExpertBank, x_TD: Tensor, rows: list[Tensor]) -> list[Tensor]:
    active_TE = _active(rows)
    expert_N, token_N = active_TE.T.nonzero(as_tuple=True)  # sorted by expert
    y_NO = experts.grouped(x_TD[token_N], active_TE.sum(0).tolist())
    zeros = y_NO.new_zeros(len(x_TD), y_NO.shape[-1])
    return [zeros.index_add(0, token_N, y_NO * row[token_N, expert_N, None].to(y_NO.dtype)) for row in rows]


def _active(rows: list[Tensor]) -> Tensor:
    """(T, E) whether any gate gives a pair weight."""
    return torch.stack(rows).ne(0).any(0)


def _open_share(rows: list[Tensor]) -> float:
    return float(_active(rows).sum()) / max(rows[0].numel(), 1)


def _dense(gate: Tensor | Routing) -> Tensor:
    return gate.dense() if isinstance(gate, Routing) else gate


def _trains_zeros(gate: Tensor | Routing) -> bool:
    """Whether a gradient may be due to a weight that is zero: the gate is trained and lists every expert."""
    weights = gate.weights if isinstance(gate, Routing) else gate
    every = not isinstance(gate, Routing) or gate.weights.shape[-1] >= gate.num_experts
    return every and weights.requires_grad and torch.is_grad_enabled()


# -- auxiliary losses ------------------------------------------------------------------------------------------

_collecting: list[dict[str, Tensor]] = []


@contextmanager
def collect_losses() -> Iterator[dict[str, Tensor]]:
    """Gather what modules add with `add_loss` in the forward passes inside the context, by name.

    Example:
        >>> with collect_losses() as losses:
        ...     add_loss("balance", torch.tensor(0.5))
        >>> float(losses["balance"])
        0.5
    """
    losses: dict[str, Tensor] = {}
    _collecting.append(losses)
    try:
        yield losses
    finally:
        _collecting.pop()


def add_loss(name: str, value: Tensor) -> None:
    """Add a scalar to the training loss: modules call it in their forward pass while training.

    The innermost `collect_losses` gets it, summed with others of the same name. Without one a term with a gradient
    would be lost unnoticed, and that is warned about.
    """
    if value.is_meta:  # A twin asks the gate it replaces for shapes only.
        return
    if _collecting:
        losses = _collecting[-1]
        losses[name] = losses[name] + value if name in losses else value
    elif value.requires_grad and torch._C._current_graph_task_id() == -1:
        # Not in a backward pass, where gradient checkpointing runs a layer whose loss has been collected before.
        warnings.warn(
            f"the auxiliary loss {name!r} is not collected: run the model inside penstock.nn.experts.collect_losses() "
            "and add what it gathers to the loss",
            stacklevel=3,
        )


def switch_loss(routing: Routing, keep: Tensor | None = None) -> Tensor:
    """Balance loss of Switch Transformer: E * sum_e f_e P_e, 1 at perfect balance.

    f_e is the share of all assignments that went to expert e (no gradient; the shares sum to 1 for any K), P_e the
    mean of the softmax over all experts' logits, chosen or not.

    Args:
        routing: of (..., K) weights.
        keep: (...) boolean, false for padding.

    Source: Fedus et al. 2021, eq. 4-6.
    """
    logits_TE, dense_TE = _tokens(routing, keep)
    load_E = dense_TE.detach().ne(0).sum(0).to(logits_TE.dtype)
    share_E = load_E / load_E.sum().clamp_min(1)
    return routing.num_experts * (share_E * _mean(logits_TE.softmax(-1))).sum()


def z_loss(routing: Routing, keep: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the logits: keeps them small (Zoph et al. 2022, "ST-MoE", eq. 5).

    Args:
        routing: with raw logits (..., E).
        keep: (...) boolean, false for padding.
    """
    logits_TE, _ = _tokens(routing, keep)
    return _mean(logits_TE.logsumexp(-1).square())


def importance_loss(routing: Routing, keep: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' total weight (Shazeer et al. 2017, eq. 6-7).

    Args:
        routing: of (..., K) weights.
        keep: (...) boolean, false for padding.
    """
    _, dense_TE = _tokens(routing, keep)
    return squared_variation(dense_TE.sum(0))


def load_loss(routing: Routing, clean: Tensor, std: Tensor, keep: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' expected number of tokens under noisy top-k.

    Expert e's part of a token is the probability that it would be chosen if only its own noise were drawn anew.

    Args:
        routing: of noisy top-k: (..., K) weights, K < E, and noisy logits (..., E).
        clean: (..., E) logits before the noise.
        std: (..., E) standard deviation of the noise, above 0.
        keep: (...) boolean, false for padding.

    Raises:
        ValueError: if every expert is chosen, so that there is no noise to be on either side of.

    Source: Shazeer et al. 2017, appendix A, eq. 8-11.
    """
    noisy, top_k = routing.logits, routing.weights.shape[-1]
    if top_k >= routing.num_experts:
        raise ValueError(f"the load of noisy top-k needs top_k < num_experts, not {top_k} of {routing.num_experts}")
    edges = noisy.topk(top_k + 1, dim=-1).values
    is_in = noisy > edges[..., -1:]
    threshold = torch.where(is_in, edges[..., -1:], edges[..., -2:-1])
    probability = torch.special.ndtr((clean - threshold) / std)
    return squared_variation(_kept(probability, keep).sum(0))


def squared_variation(x_E: Tensor) -> Tensor:
    """Variance over squared mean of the entries, (E,) -> (); 0 for all zeros."""
    return x_E.var(correction=0) / x_E.mean().square().clamp_min(torch.finfo(x_E.dtype).tiny)


def _tokens(routing: Routing, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    return _kept(routing.logits, keep), _kept(routing.dense(), keep)


def _kept(values: Tensor, keep: Tensor | None) -> Tensor:
    return values.flatten(0, -2) if keep is None else values[keep]


def _mean(values_T: Tensor) -> Tensor:
    return values_T.sum(0) / max(len(values_T), 1)


__all__ = [
    "Dispatch", "ExpertBank", "Experts", "StackedLinear", "add_loss", "collect_losses", "importance_loss", "load_loss",
    "mixture", "mixtures", "squared_variation", "switch_loss", "weighted_sum", "z_loss",
]  # fmt: skip
