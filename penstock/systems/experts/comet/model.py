"""Mixtures of experts whose gate keeps at most k experts and stays differentiable (COMET), beside other gates.

Paper: Ibrahim et al., KDD 2023, "COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local
Search". K soft trees choose a leaf, that is an expert, each; a smooth step makes their splits exactly 0 or 1 outside
a window. A learned permutation of the experts (local search) repairs a bad start.

Shape legend: B batch, D routing width, N experts, K trees (selectors), F id fields, R numeric columns, S sequences
of ids, L longest sequence, T tasks, M nodes of a tree or bits of an expert's number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from penstock.gates import Gate, Routing, TopKRouter
from penstock.nn.experts import Dispatch, Experts, add_loss, mixtures
from penstock.ops.routing import assignment, branch, entropy, sinkhorn, smooth_step

GateName = Literal["comet", "dselect_k", "dselect_k_static", "topk", "hash", "softmax", "uniform"]

#: Added to path probabilities inside the logarithm, and the score of a leaf that cannot be reached (authors' code).
_PATH_EPS = 1e-8
_UNREACHABLE = torch.finfo(torch.float32).min


class CometGate(Gate):
    """K soft binary trees over the experts, mixed by one softmax over all their leaves.

    Splits are numbered as in a heap, so that the number of experts need not be a power of two; experts are the
    leaves from left to right. Split s sends the share smooth_step(w_s x + b_s) to the left.

    Args:
        dim: width D of the routing input.
        num_experts: N, 2 or more.
        top_k: trees K, from 1 to N; once every split is saturated, as many experts are open at most.
        gamma: width of the smooth step. Small ones saturate at once and may freeze a tree as it was initialised.
        entropy_reg: weight of the entropy of the path probabilities, added to the training loss: how fast the gate
            becomes sparse.

    Shapes: (B, D), permutation (K, N, N) or none -> `Routing` over all N experts, rows summing to one.
    """

    passes = "expert"
    kind = "simplex"

    def __init__(
        self, dim: int, num_experts: int, top_k: int = 2, *, gamma: float = 1.0, entropy_reg: float = 0.0
    ) -> None:
        super().__init__()
        _check_choice(num_experts, top_k)
        _check_gamma(gamma)
        self.num_experts, self.top_k, self.gamma, self.entropy_reg = num_experts, top_k, gamma, entropy_reg
        # For each tree its splits in heap order, then its leaves in the order of the experts.
        self.nodes = nn.Linear(dim, top_k * (2 * num_experts - 1))
        for parameter in self.nodes.parameters():
            split, leaf = self.nodes_of(parameter).split((num_experts - 1, num_experts), 1)
            nn.init.uniform_(split, -gamma / 100, gamma / 100)
            nn.init.uniform_(leaf, -0.05, 0.05)

    def nodes_of(self, parameter: Tensor) -> Tensor:
        """A view of the weight or bias by tree and node, (K, 2N - 1, ...)."""
        return parameter.detach().view(self.top_k, 2 * self.num_experts - 1, *parameter.shape[1:])

    def paths(self, left_BKM: Tensor) -> Tensor:
        """Probability of each leaf from the share each split sends to its left, (B, K, N - 1) -> (B, K, N)."""
        path = torch.ones_like(left_BKM[..., :1])
        start = 0
        while start < self.num_experts - 1:
            # The last level may be incomplete: its first nodes split, the rest are leaves already.
            splits = min(path.shape[-1], self.num_experts - 1 - start)
            children = branch(path[..., :splits], left_BKM[..., start : start + splits])
            path = torch.cat([children, path[..., splits:]], -1)
            start += splits
        return path

    def forward(self, x_BD: Tensor, permutation_KNN: Tensor | None = None) -> Routing:
        node_BKM = _precise(self.nodes(x_BD)).unflatten(-1, (self.top_k, -1))
        split_BKM, leaf_BKN = node_BKM.split((self.num_experts - 1, self.num_experts), -1)
        path_BKN = self.paths(smooth_step(split_BKM, self.gamma))
        if self.training and self.entropy_reg:
            add_loss("entropy", self.entropy_reg * entropy(path_BKN).sum(-1).mean())
        score_BKN = (leaf_BKN + (path_BKN + _PATH_EPS).log()).masked_fill(path_BKN <= 0, _UNREACHABLE)
        tree_BKN = score_BKN.flatten(1).softmax(-1).view_as(score_BKN)
        return _routing(_normalise(_permute(tree_BKN, permutation_KNN)))


class DSelectKGate(Gate):
    """K selectors that each read an expert's number off M smooth steps, mixed by a softmax (Hazimeh et al. 2021).

    Args:
        dim: width D of the routing input; ``None`` makes the static gate, the same for every sample.
        num_experts: N, 2 or more. If it is no power of two, a row sums to less than one while a selector gives
            mass to numbers that name no expert.
        top_k: selectors K.
        gamma: width of the smooth step.
        entropy_reg: weight of the selectors' entropy in the training loss.
        zeta: weight of the penalty that keeps mass on the numbers in use (a sum over the batch, as the authors do).

    Shapes: (B, D), permutation (K, N, N) or none -> `Routing` over all N experts.
    """

    passes = "expert"
    kind = "simplex"

    def __init__(
        self,
        dim: int | None,
        num_experts: int,
        top_k: int = 2,
        *,
        gamma: float = 1.0,
        entropy_reg: float = 0.0,
        zeta: float = 1.0,
    ) -> None:
        super().__init__()
        _check_choice(num_experts, top_k)
        _check_gamma(gamma)
        self.num_experts, self.top_k, self.gamma = num_experts, top_k, gamma
        self.entropy_reg, self.zeta = entropy_reg, zeta
        bits = (num_experts - 1).bit_length()
        self.codes: nn.Module = _Static(top_k * bits) if dim is None else nn.Linear(dim, top_k * bits)
        self.weights: nn.Module = _Static(top_k) if dim is None else nn.Linear(dim, top_k)
        for parameter in self.codes.parameters():
            nn.init.uniform_(parameter, -gamma / 100, gamma / 100)
        for parameter in self.weights.parameters():
            nn.init.uniform_(parameter, -0.05, 0.05)

    def selectors(self, x_BD: Tensor) -> Tensor:
        """What each selector gives to each expert, (B, K, N), before any permutation."""
        bit_BKM = smooth_step(_precise(self.codes(x_BD)).unflatten(-1, (self.top_k, -1)), self.gamma)
        code = torch.ones_like(bit_BKM[..., :1])
        for bit in bit_BKM.split(1, -1):  # The most significant first; 1 is the right child.
            code = branch(code, 1 - bit)
        return code[..., : self.num_experts]

    def forward(self, x_BD: Tensor, permutation_KNN: Tensor | None = None) -> Routing:
        selector_BKN = self.selectors(x_BD)
        if self.training:
            self.regularise(selector_BKN)
        weight_BK1 = _precise(self.weights(x_BD)).softmax(-1)[..., None]
        return _routing(_permute(weight_BK1 * selector_BKN, permutation_KNN))

    def regularise(self, selector_BKN: Tensor) -> None:
        """Add the entropy and, unless N is a power of two, the reachability penalty to the training loss."""
        if self.entropy_reg:
            add_loss("entropy", self.entropy_reg * entropy(selector_BKN).sum(-1).mean())
        if self.zeta and self.num_experts & (self.num_experts - 1):
            add_loss("reachability", self.zeta * (1 / (1e-6 + selector_BKN.sum(-1))).sum())


class TopkGate(TopKRouter):
    """Linear scores, the K largest kept, softmax over those; the permutations' mean on the right (Shazeer et al. 2017).

    Args:
        dim: width D of the routing input.
        num_experts: N, 2 or more.
        top_k: K, from 1 to N.
        jitter: learned Gaussian noise on the scores while training.

    Shapes: (B, D), permutation (K, N, N) or none -> `Routing`, over K experts or, permuted, over all N.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 2, *, jitter: bool = False) -> None:
        _check_choice(num_experts, top_k)
        super().__init__(dim, num_experts, top_k, bias=True, noise=jitter)
        for parameter in self.parameters():
            (nn.init.xavier_uniform_ if parameter.ndim > 1 else nn.init.zeros_)(parameter)

    def forward(self, x_BD: Tensor, permutation_KNN: Tensor | None = None) -> Routing:
        return _reorder(super().forward(x_BD), permutation_KNN)


class HashGate(Gate):
    """The expert of a sample is fixed by its key, a user's id say (Roller et al. 2021).

    Args:
        num_experts: N, 2 or more.
        table: (keys,) int64, the expert of each key; ``None``: keys are experts.

    Shapes: keys (B,) int64, permutation (K, N, N) or none -> `Routing`, one expert or, permuted, over all N.

    Raises:
        ValueError: for keys or experts out of range.
    """

    passes = "expert"
    kind = "one-hot"

    def __init__(self, num_experts: int, table: Tensor | None = None) -> None:
        super().__init__()
        _check_choice(num_experts, 1)
        if table is not None:
            _check_range(table, num_experts, "expert")
        self.num_experts = num_experts
        self.register_buffer("table", torch.arange(num_experts) if table is None else table.long())
        self.table: Tensor

    def forward(self, key_B: Tensor, permutation_KNN: Tensor | None = None) -> Routing:
        if not torch.compiler.is_compiling():
            _check_range(key_B, len(self.table), "key")
        index_B1 = self.table[key_B][:, None]
        weight_B1 = torch.ones_like(index_B1, dtype=torch.get_default_dtype())
        row_BN = weight_B1.new_zeros(key_B.shape[0], self.num_experts).scatter(-1, index_B1, weight_B1)
        return _reorder(Routing(weight_B1, index_B1, row_BN), permutation_KNN)


class SoftmaxGate(Gate):
    """Softmax of linear scores: every expert for every sample. (B, D) -> `Routing` over all N experts."""

    passes = "expert"
    kind = "simplex"

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        _check_choice(num_experts, 1)
        self.proj = nn.Linear(dim, num_experts)

    def forward(self, x_BD: Tensor, permutation_KNN: Tensor | None = None) -> Routing:
        logits_BN = self.proj(x_BD)
        return _reorder(Routing.from_dense(logits_BN.softmax(-1), logits_BN), permutation_KNN)


class UniformGate(Gate):
    """Every expert alike, for every sample: the ungated twin. (B, ...) -> `Routing` over all N experts."""

    passes = "expert"
    kind = "simplex"

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        _check_choice(num_experts, 1)
        self.num_experts = num_experts

    def forward(self, x_BD: Tensor, permutation_KNN: Tensor | None = None) -> Routing:
        row_BN = x_BD.new_full((x_BD.shape[0], self.num_experts), 1 / self.num_experts)
        return Routing.from_dense(row_BN, torch.zeros_like(row_BN))


class SinkhornPermutation(nn.Module):
    """Local search: a learned order of the experts, from soft to hard in ``steps`` training calls.

    Every training call advances the schedule: Sinkhorn's iteration on (scores + noise) / tau, with tau falling
    log-linearly from ``tau0`` to ``tau1``; after ``steps`` calls, and in every evaluation, the assignment of the
    largest total in the last soft matrix (the identity before the first call). A row of gate values g becomes g P:
    what position i holds goes to the expert in whose column row i has its one.

    **The scale rule**: scores start within ``init``, and init / tau0 should be about 1 or less, else the matrix
    is nearly hard from the first call and no gradient reaches the scores. The authors' values, kept as defaults,
    have a ratio of 50: in isolation the search then does no better than chance (see the card).

    Args:
        num_experts: N, 2 or more.
        num_trees: K, how many copies are returned.
        steps: T, training calls until the permutation is hard, 1 or more.
        tau0, tau1: temperature at the start and at the end.
        iterations: of Sinkhorn at the start and at the end, rising linearly.
        noise: factor of Gumbel noise on the scores.
        entropy_reg: weight of the matrix' entropy in the training loss.
        per_tree: one permutation for each tree instead of one for all.
        init: scores start uniformly in (-init, init).

    Returns of ``forward()``: (K, N, N), rows and columns summing to (nearly) one.
    """

    def __init__(
        self,
        num_experts: int,
        num_trees: int,
        *,
        steps: int,
        tau0: float = 1e-3,
        tau1: float = 1e-7,
        iterations: tuple[int, int] = (20, 150),
        noise: float = 0.0,
        entropy_reg: float = 1e-4,
        per_tree: bool = False,
        init: float = 0.05,
    ) -> None:
        super().__init__()
        _check_choice(num_experts, 1)
        if steps < 1:
            raise ValueError(f"steps={steps}: learning a permutation needs 1 training step or more (or leave it out)")
        if tau0 <= 0 or tau1 <= 0 or min(iterations) < 1:
            raise ValueError(f"tau0={tau0}, tau1={tau1}, iterations={iterations} must be positive")
        self.num_trees, self.steps, self.tau0, self.tau1, self.iterations = num_trees, steps, tau0, tau1, iterations
        self.noise, self.entropy_reg = noise, entropy_reg
        shape = (num_trees if per_tree else 1, num_experts, num_experts)
        self.scores = nn.Parameter(torch.empty(shape).uniform_(-init, init))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("soft", torch.zeros(shape))
        # Follows from `soft`; kept so that evaluation needs no solver.
        self.register_buffer("hard", torch.eye(num_experts).repeat(shape[0], 1, 1))
        self.calls: Tensor
        self.soft: Tensor
        self.hard: Tensor

    def schedule(self, call: int) -> tuple[float, int]:
        """Temperature and iterations of a training call, counted from 1."""
        log0, log1 = math.log10(self.tau0), math.log10(self.tau1)
        first, last = self.iterations
        return 10 ** (log0 + (log1 - log0) * call / self.steps), first + (last - first) * call // self.steps

    def forward(self) -> Tensor:
        if not self.training:
            return self.hard.expand(self.num_trees, -1, -1)
        self.calls += 1
        call = int(self.calls)
        permutation = self.search(*self.schedule(call)) if call < self.steps else self.hard
        if self.entropy_reg:
            rows = permutation / permutation.sum(-1, keepdim=True)
            both = entropy(permutation).sum(-1).mean() + entropy(rows).sum(-1).mean()
            add_loss("permutation", self.entropy_reg * both)
        return permutation.expand(self.num_trees, -1, -1)

    def search(self, tau: float, iterations: int) -> Tensor:
        """The soft permutation at a temperature, (1 or K, N, N); it is stored, and its hard form with it."""
        scores = _precise(self.scores)
        if self.noise:
            scores = scores - self.noise * torch.empty_like(scores).exponential_().log()
        permutation = sinkhorn(scores / tau, iterations)
        self.soft.copy_(permutation.detach())
        self.hard.copy_(assignment(self.soft))
        return permutation


class MixtureOfExperts(nn.Module, PyTorchModelHubMixin):
    """A mixture of experts for one or several tasks: embeddings, experts, one gate and one head for each task.

    Args:
        num_ids: rows of the embedding table, over all id fields together.
        num_fields: id fields F.
        num_numeric: numeric columns R.
        sequence_offsets: the id that pads each of the S sequences; a sequence counts as its items' mean embedding.
        embed_dim: width of an id's embedding.
        num_tasks: T; each has its gate and its head and is one column of the output.
        num_experts: N.
        expert_dim: output width of an expert (a linear map); 0 for the bare prediction without a head.
        head_dim: hidden width of a head.
        dropout: of the experts' outputs.
        gate: which gate.
        top_k: how many experts a gate may keep: K.
        gamma, entropy_reg: of the smooth-step gates.
        zeta: of DSelect-k.
        jitter: of top-k.
        hash_keys: keys of the hash gate when there is no id field to go by.
        permutation_steps: training steps of local search; 0 leaves it out.
        tau0, tau1: of local search.
        dispatch: of the experts, see `penstock.nn.experts.mixtures`; "auto" skips those without weight where it pays.

    Shapes: ids (B, F) int64, numbers (B, R), sequences (B, S, L) int64 -> (B, T) predictions (logits of binary tasks).

    Raises:
        ValueError: for sizes that cannot be.
    """

    def __init__(
        self,
        *,
        num_ids: int = 0,
        num_fields: int = 0,
        num_numeric: int = 0,
        sequence_offsets: Sequence[int] = (),
        embed_dim: int = 16,
        num_tasks: int = 1,
        num_experts: int = 8,
        expert_dim: int = 0,
        head_dim: int = 0,
        dropout: float = 0.0,
        gate: GateName = "comet",
        top_k: int = 2,
        gamma: float = 1.0,
        entropy_reg: float = 0.0,
        zeta: float = 1.0,
        jitter: bool = False,
        hash_keys: int = 1024,
        permutation_steps: int = 0,
        tau0: float = 1e-3,
        tau1: float = 1e-7,
        dispatch: Dispatch = "auto",
    ) -> None:
        super().__init__()
        embedded = num_fields + len(sequence_offsets)
        dim = embedded * embed_dim + num_numeric
        if dim < 1 or num_tasks < 1:
            raise ValueError(
                f"{embedded} id fields, {num_numeric} numbers, {num_tasks} tasks: need an input and a task"
            )
        if (expert_dim > 0) != (head_dim > 0):
            raise ValueError(
                f"expert_dim={expert_dim}, head_dim={head_dim}: give both, or neither for experts that predict"
            )
        _check_choice(num_experts, top_k)
        self.top_k, self.dispatch = top_k, dispatch
        self.embedding = nn.Embedding(num_ids, embed_dim) if embedded else None
        self.register_buffer("padding", torch.tensor(sequence_offsets, dtype=torch.int64)[:, None], persistent=False)
        self.padding: Tensor
        widths = (dim, expert_dim or 1)
        self.experts = Experts(num_experts, widths, activate_output=expert_dim > 0, dropout=dropout)
        makers: dict[str, Callable[[], Gate]] = {
            "comet": lambda: CometGate(dim, num_experts, top_k, gamma=gamma, entropy_reg=entropy_reg),
            "dselect_k": lambda: DSelectKGate(dim, num_experts, top_k, gamma=gamma, entropy_reg=entropy_reg, zeta=zeta),
            "dselect_k_static": lambda: DSelectKGate(
                None, num_experts, top_k, gamma=gamma, entropy_reg=entropy_reg, zeta=zeta
            ),
            "topk": lambda: TopkGate(dim, num_experts, top_k, jitter=jitter),
            "hash": lambda: HashGate(num_experts, torch.randint(num_experts, (self.hash_keys,))),
            "softmax": lambda: SoftmaxGate(dim, num_experts),
            "uniform": lambda: UniformGate(num_experts),
        }
        if gate not in makers:
            raise ValueError(f"gate={gate!r} must be one of {', '.join(makers)}")
        self.hashes, self.hash_keys = gate == "hash", num_ids if num_fields else hash_keys
        self.gates = nn.ModuleList(makers[gate]() for _ in range(num_tasks))
        self.permutation = (
            SinkhornPermutation(num_experts, top_k, steps=permutation_steps, tau0=tau0, tau1=tau1)
            if permutation_steps
            else None
        )
        self.heads = nn.ModuleList(_head(expert_dim, head_dim) for _ in range(num_tasks))

    def features(self, id_BF: Tensor, numeric_BR: Tensor, sequence_BSL: Tensor) -> Tensor:
        """What experts and gates see: embeddings of ids, mean embeddings of sequences, numbers; (B, D)."""
        if self.embedding is None:
            return numeric_BR
        parts = [self.embedding(id_BF).flatten(1), numeric_BR]
        if len(self.padding):
            item_BSL1 = (sequence_BSL != self.padding)[..., None]
            total_BSD = (self.embedding(sequence_BSL) * item_BSL1).sum(-2)
            parts.insert(1, (total_BSD / item_BSL1.sum(-2).clamp_min(1)).flatten(1))
        return torch.cat(parts, -1)

    def keys(self, id_BF: Tensor, numeric_BR: Tensor) -> Tensor:
        """The hash gate's key of each sample: its first id or, without ids, a hash of its numbers; (B,)."""
        if id_BF.shape[1]:
            return id_BF[:, 0]
        factors = 2654435761 * (2 * torch.arange(numeric_BR.shape[1], device=numeric_BR.device) + 1)
        return (numeric_BR.mul(1000).round().long() * factors).sum(-1) % self.hash_keys

    def forward(self, id_BF: Tensor, numeric_BR: Tensor, sequence_BSL: Tensor) -> Tensor:
        x_BD = self.features(id_BF, numeric_BR, sequence_BSL)
        routed = self.keys(id_BF, numeric_BR) if self.hashes else x_BD
        permutation_KNN = None if self.permutation is None else self.permutation()
        routings = [gate(routed, permutation_KNN) for gate in self.gates]
        # The zeros of all these gates are flat. In training mode without gradients a full pass is being counted.
        counted = self.training and not torch.is_grad_enabled()
        dispatch = "dense" if counted else self.dispatch
        mixed = mixtures(self.experts, x_BD, routings, dispatch=dispatch, saturated=True)
        return torch.cat([head(y) for head, y in zip(self.heads, mixed, strict=True)], -1)

    def no_weight_decay(self) -> set[str]:
        """Biases of stacked experts are matrices, and the permutation's scores have a scale of their own."""
        return {n for n, _ in self.named_parameters() if n.endswith("bias") or n.startswith("permutation.")}


class _Static(nn.Module):
    """In the place of a linear map: the same numbers for every sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.bias.expand(x_BD.shape[0], -1)


def _head(expert_dim: int, head_dim: int) -> nn.Module:
    if not head_dim:
        return nn.Identity()
    return nn.Sequential(nn.Linear(expert_dim, head_dim), nn.ReLU(), nn.Linear(head_dim, 1))


def _precise(x: Tensor) -> Tensor:
    """Gates decide in float32 at least, whatever the precision of the rest."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _permute(values_BKN: Tensor, permutation_KNN: Tensor | None) -> Tensor:
    """The sum over trees, each tree's row in the order of its permutation; (B, N)."""
    if permutation_KNN is None:
        return values_BKN.sum(1)
    return torch.einsum("bkn,knm->bm", values_BKN, permutation_KNN.to(values_BKN.dtype))


def _reorder(routing: Routing, permutation_KNN: Tensor | None) -> Routing:
    """A routing in the order of the permutations' mean, its rows summing to one again."""
    if permutation_KNN is None:
        return routing
    dtype = torch.promote_types(routing.weights.dtype, permutation_KNN.dtype)
    mean_NN = permutation_KNN.mean(0).to(dtype)
    return Routing.from_dense(_normalise(routing.dense().to(dtype) @ mean_NN), routing.logits.to(dtype) @ mean_NN)


def _normalise(values_BN: Tensor) -> Tensor:
    return values_BN / values_BN.sum(-1, keepdim=True)


def _routing(values_BN: Tensor) -> Routing:
    """A routing over all experts; its logits are the values' logarithms, since scores belong to trees, not experts."""
    return Routing.from_dense(values_BN, values_BN.clamp_min(torch.finfo(values_BN.dtype).tiny).log())


def _check_choice(num_experts: int, top_k: int) -> None:
    if num_experts < 2:
        raise ValueError(f"num_experts={num_experts}: a mixture needs 2 experts or more")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must be from 1 to num_experts={num_experts}")


def _check_gamma(gamma: float) -> None:
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}: the width of the smooth step must be above 0")


def _check_range(index: Tensor, size: int, what: str) -> None:
    if not index.is_meta and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(
            f"{what}s run from {int(index.min())} to {int(index.max())}; they must be from 0 to {size - 1}"
        )


def _movielens(gate: GateName, permutation_steps: int) -> Callable[..., MixtureOfExperts]:
    def build(
        *,
        num_users: int = 6040,
        num_items: int = 3952,
        embed_dim: int = 128,
        num_tasks: int = 2,
        num_experts: int = 16,
        width: int = 256,
        top_k: int = 2,
        gamma: float = 10.0,
        entropy_reg: float = 0.0,
        dropout: float = 0.5,
    ) -> MixtureOfExperts:
        return MixtureOfExperts(
            num_ids=num_users + num_items,
            num_fields=2,
            embed_dim=embed_dim,
            num_tasks=num_tasks,
            num_experts=num_experts,
            expert_dim=width,
            head_dim=width,
            dropout=dropout,
            gate=gate,
            top_k=top_k,
            gamma=gamma,
            entropy_reg=entropy_reg,
            permutation_steps=permutation_steps,
        )

    return build


#: MovieLens-1M nets of the paper's supplement; local search over the first epoch (1.6 M samples, 512 a step).
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "comet_movielens": _movielens("comet", 3125),
    "comet_movielens_no_search": _movielens("comet", 0),
    "dselect_k_movielens": _movielens("dselect_k", 0),
    "topk_movielens": _movielens("topk", 0),
}
