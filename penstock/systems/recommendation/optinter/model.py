"""OptInter: for each pair of fields a choice of how to model it (Lyu et al. 2022, arXiv 2108.01265).

Two values that occur together can be *memorised* (the combination has an embedding of its own), *factorised* (the
product of an embedding of each) or left to the perceptron (*naive*). A soft gate over the three searches together with
the weights; then every pair takes its most likely method and the network is trained again from new weights.

Shape legend: B batch, F categorical fields with one id a row, N numeric fields, S sequences, L longest sequence,
M = F + N + S fields, P pairs of categorical fields, D embedding width, C width of a pair's interaction, R rows of the
cross table, X flat width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import Gate
from penstock.nn.embeddings import FieldEmbedding, RowTable, check_ids
from penstock.systems.recommendation.optinter.vocabulary import CrossVocabulary, all_pairs

#: "search" has a gate; the others use one method for every pair.
Method = Literal["search", "memorise", "factorise", "naive"]
AlphaInit = Literal["zeros", "xavier"]
#: The entries of the gate, in order.
METHODS: tuple[Method, ...] = get_args(Method)[1:]
MEMORISE = METHODS.index("memorise")
FACTORISE = METHODS.index("factorise")
_COLDEST = 0.01


class MethodGate(Gate):
    """How each pair is modelled, the same for every sample: () -> (P, 3) over memorise, factorise, naive.

    Soft it is softmax(alpha / t) with t = max(0.01, 1 - tau * step), hard the one-hot of the largest alpha.

    Args:
        num_pairs: P.
        tau: how much the temperature falls a step.
        init: "xavier" as the authors (normal, std sqrt(2 / (P + 3)): random preferences that a short search hardly
            leaves), or "zeros": no preference.
        gumbel: add Gumbel noise to alpha while training, as the paper says; the authors' code does not.

    Raises:
        ValueError: for no pairs, a negative tau or an unknown start.
    """

    passes = "feature"
    kind = "simplex"
    unit_dims = 2
    step: Tensor
    hard: Tensor

    def __init__(self, num_pairs: int, *, tau: float = 5e-5, init: AlphaInit = "xavier", gumbel: bool = False) -> None:
        super().__init__()
        if num_pairs < 1 or not tau >= 0:
            raise ValueError(f"num_pairs={num_pairs} must be 1 or more and tau={tau} must not be below 0")
        if init not in get_args(AlphaInit):
            raise ValueError(f"init={init!r}: alpha starts at {' or '.join(get_args(AlphaInit))}")
        self.tau, self.gumbel = tau, gumbel
        self.alpha = nn.Parameter(torch.zeros(num_pairs, len(METHODS)))
        if init == "xavier":
            nn.init.xavier_normal_(self.alpha)
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("hard", torch.tensor(False))

    def forward(self) -> Tensor:
        alpha_P3: Tensor = self.alpha
        if self.gumbel and self.training:
            alpha_P3 = alpha_P3 - torch.empty_like(alpha_P3).exponential_().log()
        soft_P3 = (alpha_P3 / self.temperature()).softmax(-1)
        one_hot_P3 = F.one_hot(self.choice(), len(METHODS)).to(soft_P3.dtype)
        # Chosen by a tensor and not by Python, so that a compiled or exported model follows its state.
        return torch.where(self.hard, one_hot_P3, soft_P3)

    def temperature(self) -> Tensor:
        """t, a float32 number, as the authors round it."""
        return (1 - self.tau * self.step.double()).clamp_min(_COLDEST).float()

    def choice(self) -> Tensor:
        """(P,) the method with the largest alpha, by its place in `METHODS`; the earlier of equals."""
        return self.alpha.detach().argmax(-1)

    def margin(self) -> Tensor:
        """(P,) how far the largest alpha is above the second."""
        top_P2 = self.alpha.detach().topk(2, -1).values
        return top_P2[:, 0] - top_P2[:, 1]

    @torch.no_grad()
    def advance(self) -> None:
        """One step colder; the authors count every call of the network, ours those that train."""
        self.step += 1

    @torch.no_grad()
    def harden(self) -> None:
        """Decide: from here on one-hot, also after loading the state, and not trained."""
        self.hard.fill_(True)
        self.alpha.requires_grad_(False)

    @torch.no_grad()
    def decide_at_random(self) -> None:
        """alpha ~ U(0, 1), hard: the control without a search."""
        self.alpha.uniform_()
        self.harden()


class NormedMLP(nn.Module):
    """[Linear, LayerNorm, ReLU] for each hidden width, then a linear output: (B, X) -> (B,).

    Args:
        dim: input width X.
        hidden: widths.
    """

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [dim, *hidden]
        if min(widths) < 1:
            raise ValueError(f"widths must be 1 or more; given {dim} and {tuple(hidden)}")
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in hidden)
        self.output = nn.Linear(widths[-1], 1)

    def forward(self, x_BX: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x_BX = norm(linear(x_BX)).relu()
        return self.output(x_BX).squeeze(1)


class NetOptions(TypedDict, total=False):
    """What can be set of an `InteractionNet`, beside its sizes."""

    method: Method
    dim: int
    pair_dim: int
    mlp_dims: Sequence[int]
    tau: float
    alpha_init: AlphaInit
    gumbel: bool
    numeric_ids: Sequence[int]
    padding_ids: Sequence[int]


class InteractionNet(nn.Module):
    """The network of both stages, on ids and rows of crosses that are already known.

    Args:
        num_ids: rows of the tables of feature values.
        num_fields: categorical fields F, 2 or more.
        num_crosses: rows R of the cross table.
        pairs: the fields of each pair; default all, in lexicographic order. The columns of ``crosses`` are theirs.
        method: "search" has a gate over the three methods; the others model every pair alike, without a gate and
            without the tables they do not need.
        dim: width D of a value's embedding.
        pair_dim: width C of an interaction.
        mlp_dims: hidden widths of the perceptron.
        tau, alpha_init, gumbel: of the gate, see `MethodGate`.
        numeric_ids: the row of each numeric field (N).
        padding_ids: the id that pads each sequence field (S).

    Shapes: ids (B, F) int64, crosses (B, P) int64 (not for factorise and naive), numeric (B, N), sequences (B, S, L)
    int64 -> logits (B,).

    Raises:
        ValueError: for sizes that cannot be, or pairs that are not in order.
    """

    first: Tensor
    second: Tensor

    def __init__(
        self,
        num_ids: int,
        num_fields: int,
        num_crosses: int,
        *,
        pairs: Sequence[Sequence[int]] | None = None,
        method: Method = "search",
        dim: int = 20,
        pair_dim: int = 10,
        mlp_dims: Sequence[int] = (700, 700, 700, 700, 700),
        tau: float = 5e-5,
        alpha_init: AlphaInit = "xavier",
        gumbel: bool = False,
        numeric_ids: Sequence[int] = (),
        padding_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if method not in get_args(Method):
            raise ValueError(f"method={method!r}: it must be one of {', '.join(get_args(Method))}")
        if num_fields < 2:
            raise ValueError(f"num_fields={num_fields}: a pair needs 2 categorical fields or more")
        if pair_dim < 1:
            raise ValueError(f"pair_dim={pair_dim} must be 1 or more")
        self.pairs = all_pairs(num_fields) if pairs is None else _checked(pairs, num_fields)
        self.method, self.num_fields, self.num_crosses, self.pair_dim = method, num_fields, num_crosses, pair_dim
        self.embedding = FieldEmbedding(num_ids, dim, numeric_ids=numeric_ids, padding_ids=padding_ids)
        self.cross_table: RowTable | None = None
        if method in ("search", "memorise"):
            if num_crosses < 1:
                raise ValueError(f"num_crosses={num_crosses}: memorising needs 1 row or more")
            self.cross_table = RowTable(num_crosses, pair_dim)
        self.factor_table = RowTable(num_ids, pair_dim) if method in ("search", "factorise") else None
        self.gate: MethodGate | None = None
        if method == "search":
            self.gate = MethodGate(len(self.pairs), tau=tau, init=alpha_init, gumbel=gumbel)
        fields = num_fields + len(numeric_ids) + len(padding_ids)
        self.mlp = NormedMLP(fields * dim + len(self.pairs) * pair_dim, mlp_dims)
        for name, side in (("first", 0), ("second", 1)):
            self.register_buffer(name, torch.tensor([pair[side] for pair in self.pairs]), persistent=False)
        self.reset_weights("search" if method == "search" else "retrain")

    def forward(
        self,
        ids_BF: Tensor,
        crosses_BP: Tensor | None = None,
        numeric_BN: Tensor | None = None,
        sequences_BSL: Tensor | None = None,
    ) -> Tensor:
        if ids_BF.shape[1] != self.num_fields:
            raise ValueError(f"ids have {ids_BF.shape[1]} fields; the model was built for {self.num_fields}")
        e_BMD = self.embedding(ids_BF, numeric_BN, sequences_BSL)
        v_BPC = self.interactions(ids_BF, crosses_BP)
        # The authors' order: numbers, categories, pairs.
        parts = (e_BMD[:, self.num_fields :], e_BMD[:, : self.num_fields], v_BPC)
        return self.mlp(torch.cat([part.flatten(1) for part in parts], 1))

    def interactions(self, ids_BF: Tensor, crosses_BP: Tensor | None) -> Tensor:
        """What each pair contributes, (B, P, C): pi_0 memorised + pi_1 factorised + pi_2 * 0."""
        weight = self.mlp.output.weight
        v_BPC = weight.new_zeros(ids_BF.shape[0], len(self.pairs), self.pair_dim)
        choice_P3 = weight.new_ones(len(self.pairs), len(METHODS)) if self.gate is None else self.gate()
        if self.cross_table is not None:
            if crosses_BP is None or crosses_BP.shape[1] != len(self.pairs):
                given = "none" if crosses_BP is None else crosses_BP.shape[1]
                raise ValueError(f"crosses: given {given}; the model has {len(self.pairs)} pairs, a column each")
            check_ids(crosses_BP, self.num_crosses)
            v_BPC = v_BPC + choice_P3[:, MEMORISE, None] * self.cross_table(crosses_BP)
        if self.factor_table is not None:
            f_BFC = self.factor_table(ids_BF)
            v_BPC = v_BPC + choice_P3[:, FACTORISE, None] * f_BFC[:, self.first] * f_BFC[:, self.second]
        return v_BPC

    @torch.no_grad()
    def reset_weights(self, stage: Literal["search", "retrain"]) -> None:
        """New weights, drawn as the authors draw them for a stage; the gate stays as it is.

        In the search tables are N(0, 1). In the retraining they are U(-a, a) with a = (3 / width of what they
        contribute)^2, as their code has it (a square root was probably meant), and linear weights Xavier-uniform.
        """
        for layer in self.mlp.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                layer.reset_parameters()
            if isinstance(layer, nn.Linear) and stage == "retrain":
                nn.init.xavier_uniform_(layer.weight)
        for table, blocks in (
            (self.embedding.table, self.num_fields),
            (self.factor_table, self.num_fields),
            (self.cross_table, len(self.pairs)),
        ):
            if table is not None and stage == "search":
                nn.init.normal_(table.weight)
            elif table is not None:
                bound = (3 / (blocks * table.embedding_dim)) ** 2
                nn.init.uniform_(table.weight, -bound, bound)

    def parameter_groups(
        self, *, weight_decay: float, gate_lr: float, train_layernorm: bool = False
    ) -> list[dict[str, Any]]:
        """What an optimiser trains: decay on the two tables of pairs only, and the gate at its own rate until it is hard.

        Args:
            weight_decay: added to the gradient by Adam (L2), as the authors have it.
            gate_lr: of alpha.
            train_layernorm: whether the norms' scale and shift are trained; the authors leave them out.
        """
        tables = [table.weight for table in (self.cross_table, self.factor_table) if table is not None]
        left = {id(p) for p in tables}
        left |= {id(p) for p in self.gate.parameters()} if self.gate is not None else set()
        left |= set() if train_layernorm else {id(p) for p in self.mlp.norms.parameters()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if id(p) not in left], "weight_decay": 0.0}
        ]
        if tables:
            groups.append({"params": tables, "weight_decay": weight_decay})
        if self.gate is not None and self.gate.alpha.requires_grad:
            groups.append({"params": [self.gate.alpha], "lr": gate_lr, "weight_decay": 0.0})
        return groups


class OptInterModel(nn.Module, PyTorchModelHubMixin):
    """An `InteractionNet` that finds the rows of crosses itself.

    Args:
        num_ids: rows of the tables of feature values.
        offsets, sizes: the first id and the number of ids of each categorical field (F).
        rows, exact: of each pair's crosses (P), see `CrossVocabulary`.
        options: see `InteractionNet`.

    Shapes: ids (B, F) int64, numeric (B, N), sequences (B, S, L) int64 -> logits (B,).

    Raises:
        ValueError: for sizes that cannot be.
    """

    def __init__(
        self,
        num_ids: int,
        offsets: Sequence[int],
        sizes: Sequence[int],
        rows: Sequence[int],
        exact: Sequence[bool],
        **options: Unpack[NetOptions],
    ) -> None:
        super().__init__()
        self.num_ids, self.options = num_ids, options
        self.crosses = CrossVocabulary(offsets, sizes, rows, exact)
        self.net = InteractionNet(num_ids, len(sizes), self.crosses.num_rows, **options)

    def forward(self, ids_BF: Tensor, numeric_BN: Tensor | None = None, sequences_BSL: Tensor | None = None) -> Tensor:
        crosses_BP = None if self.net.cross_table is None else self.crosses(ids_BF)
        return self.net(ids_BF, crosses_BP, numeric_BN, sequences_BSL)

    @property
    def gate(self) -> MethodGate:
        """The gate.

        Raises:
            ValueError: if every pair is modelled alike.
        """
        if self.net.gate is None:
            raise ValueError(f"this model has no gate: it was built with method={self.net.method!r}")
        return self.net.gate

    def memorised(self) -> Tensor:
        """(P,) bool: which pairs the gate memorises."""
        return self.gate.choice() == MEMORISE

    @torch.no_grad()
    def compact(self) -> OptInterModel:
        """The same model with rows for the crosses of memorised pairs only; its outputs are the same.

        Raises:
            ValueError: before the gate is hard, when every row is still used.
        """
        if not self.gate.hard:
            raise ValueError("only a hard gate leaves rows unused: call gate.harden() first")
        assert self.net.cross_table is not None
        crosses, old_rows = self.crosses.only(self.memorised())
        small = OptInterModel(
            self.num_ids,
            crosses.offset.tolist(),
            crosses.size.tolist(),
            crosses.rows,
            crosses.exact,
            **self.options,
        )
        weight = self.net.cross_table.weight
        state = self.state_dict() | {"crosses.keys": crosses.keys, "net.cross_table.weight": weight[old_rows]}
        small.to(weight.device, weight.dtype).load_state_dict(state)
        small.gate.harden()
        return small.train(self.training)


def _checked(pairs: Sequence[Sequence[int]], num_fields: int) -> list[tuple[int, int]]:
    """Pairs as tuples; they must be some of `all_pairs`, in its order, or columns of crosses would be mistaken."""
    given = [(int(i), int(j)) for i, j in pairs]
    if not given or given != sorted(set(given)) or not set(given) <= set(all_pairs(num_fields)):
        raise ValueError(
            f"pairs={given}: they must be pairs (i, j) with 0 <= i < j < {num_fields}, each once and in lexicographic "
            "order, as the columns of crosses"
        )
    return given


#: The published sizes; vocabularies and fields are the data's.
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "optinter_criteo": partial(InteractionNet, dim=20, pair_dim=10, mlp_dims=(700,) * 5),
    "optinter_avazu": partial(InteractionNet, dim=40, pair_dim=4, mlp_dims=(500,) * 5),
}
