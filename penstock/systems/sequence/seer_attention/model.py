"""Causal attention that computes only the tiles a learned gate keeps, and a language model of such layers.

Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (2024), for prefilling, and
"SeerAttention-R" (2025), for decoding. The gates (gates.py) are added to a trained model and distilled from its own
attention maps (`SeerLM.distil`, or `distillation_loss` with any model's queries and keys); the model stays as it is.

Shape legend: B batch, L length, T tokens so far, D width, H query heads, G key/value heads, K head width, N blocks,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.nn.causal_lm import Span, State, causal_attention
from penstock.nn.conditional import may_skip
from penstock.nn.decoder import DecoderLM, RMSNorm, initialise_normal, rotary_tables, rotate
from penstock.ops import block_sparse_attention
from penstock.systems.sequence.seer_attention.gates import (
    AttnGate,
    DecodeGate,
    QueryPooling,
    Tables,
    parse_gate_type,
)
from penstock.systems.sequence.seer_attention.tiles import (
    Method,
    TargetPool,
    TileRule,
    decode_distillation_loss,
    density,
    distillation_loss,
    ground_truth,
    open_tiles,
    select_tiles,
    tile_recall,
)

__all__ = [
    "VARIANTS",
    "AttnGate",
    "DecodeGate",
    "GateStack",
    "Heads",
    "SeerAttention",
    "SeerLM",
    "TileRule",
    "decode_distillation_loss",
    "density",
    "distillation_loss",
    "ground_truth",
    "open_tiles",
    "parse_gate_type",
    "select_tiles",
    "tile_recall",
]

Gates = Literal["prefill", "decode"]
TileGate = AttnGate | DecodeGate
#: One number, one a layer, or one a layer and head.
Thresholds = float | Sequence[float | Sequence[float]]


class Heads(NamedTuple):
    """What a layer attends with: queries (B, H, L, K), keys and values (B, G, L, K), positions applied.

    ``raw_queries`` (B, L, H, K) and ``raw_keys`` (B, L, G, K) are before rotary positions, as the gates want them.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    raw_queries: Tensor
    raw_keys: Tensor


class SeerAttention(nn.Module):
    """Causal grouped-query attention with an optional gate on its tiles: (B, L, D) -> (B, L, D).

    With an `AttnGate`, a whole sequence (or the prompt of a cache) is attended to in the tiles that the gate keeps; a token
    after a cache attends densely. With a `DecodeGate` it is the other way round. In training mode attention is always
    dense: a hard mask has no gradient, and the gates learn by distillation. Padding shifts nothing: blocks are counted
    from a sample's first real token.

    Args:
        hidden_size: width D.
        num_heads, num_kv_heads, head_dim: H; G, a divisor of H (default H); K, even (default D / H).
        gate: for the layer's tiles; ``None``: dense.
        qk_norm: RMS norm of queries and keys over the channels of a head (Qwen3).
        bias: of the query, key and value projections (Qwen2).
        rope_theta: base of the rotary frequencies, of the layer and its gate.
        eps: of the norms.

    Raises:
        ValueError: if ``num_kv_heads`` does not divide ``num_heads``, or the head width is odd.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        gate: TileGate | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        rope_theta: float = 10000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"num_heads={num_heads} must divide hidden_size={hidden_size}, or give head_dim")
            head_dim = hidden_size // num_heads
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even for rotary positions")
        self.num_heads, self.num_kv_heads, self.head_dim, self.rope_theta = (
            num_heads,
            num_kv_heads,
            head_dim,
            rope_theta,
        )
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity()
        self.gate: TileGate | None = gate

    def forward(self, x_BLD: Tensor, span: Span | None = None, number: int = 0) -> Tensor:
        """Attend over ``x_BLD``, already normalised.

        Args:
            x_BLD: the layer's input.
            span: positions, padding and what is remembered; default positions 0 to L - 1 and nothing else.
            number: of this layer in the span's states.
        """
        span = span or Span(torch.arange(x_BLD.shape[1], device=x_BLD.device))
        heads = self.project(x_BLD, span.positions)
        state = span.state(number)
        begins = state is None or "keys" not in state
        if isinstance(self.gate, AttnGate) and begins and not self.training:
            y_BHLK = self._prefill(heads, span, self.gate)
            if state is not None:
                state["keys"], state["values"] = heads.keys, heads.values
        elif isinstance(self.gate, DecodeGate) and state is not None:
            y_BHLK = self._decode(heads, span, number, state, self.gate)
        else:
            y_BHLK = causal_attention(heads.queries, heads.keys, heads.values, span, number)
        return self.output(y_BHLK)

    def project(self, x_BLD: Tensor, positions: Tensor) -> Heads:
        """Queries, keys and values of ``x_BLD``, whose tokens stand at ``positions`` (L,) or (B, L)."""
        q, k, v = (proj(x_BLD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self.tables(positions, self.head_dim, x_BLD.dtype)
        return Heads(rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2), q, k)

    def output(self, y_BHLK: Tensor) -> Tensor:
        """The heads' outputs, projected: (B, L, D)."""
        return self.o_proj(y_BHLK.transpose(1, 2).flatten(2))

    def tables(self, positions: Tensor, width: int, dtype: torch.dtype) -> Tables:
        """Rotary tables of this layer's base for ``width`` channels."""
        return rotary_tables(positions, width, self.rope_theta, dtype)

    def gate_logits(self, heads: Heads) -> Tensor:
        """The gate's scores for a whole sequence without padding: (B, H, N, N), of a decode gate (B, G, L, N)."""
        assert self.gate is not None, "the layer has no gate"
        q, k = heads.raw_queries.detach(), heads.raw_keys.detach()
        blocks = self._block_tables(self.gate, k)
        if isinstance(self.gate, AttnGate):
            return self.gate.logits(q, k, blocks)
        positions = torch.arange(k.shape[1], device=k.device)
        return self.gate.logits(q, k, self.tables(positions, self.gate.width, k.dtype), blocks)

    def distillation_loss(self, heads: Heads, pool: TargetPool = "max") -> Tensor:
        """How far the gate is from the layer's own attention map; gradients reach the gate alone."""
        assert self.gate is not None, "the layer has no gate"
        logits, size = self.gate_logits(heads), self.gate.block_size
        if isinstance(self.gate, AttnGate):
            return distillation_loss(logits, heads.queries, heads.keys, block_size=size, pool=pool)
        return decode_distillation_loss(logits, heads.queries, heads.keys, block_size=size)

    def _block_tables(self, gate: TileGate, k_BLGK: Tensor) -> Tables:
        firsts = torch.arange(0, k_BLGK.shape[1], gate.block_size, device=k_BLGK.device)
        return self.tables(firsts, gate.width, k_BLGK.dtype)

    def _prefill(self, heads: Heads, span: Span, gate: AttnGate) -> Tensor:
        """Attention in the tiles that the gate keeps."""
        order = None if span.mask is None else _real_first(span.mask)
        mask = span.mask
        if order is not None and mask is not None:
            heads, mask = _reorder(heads, order), mask.gather(1, order)
        tables = self._block_tables(gate, heads.raw_keys)
        kept = open_tiles(gate(heads.raw_queries, heads.raw_keys, tables, mask))
        y_BHLK = block_sparse_attention(
            heads.queries,
            heads.keys,
            heads.values,
            kept,
            block_size=gate.block_size,
            backend=None if may_skip() else "reference",
        )
        return y_BHLK if order is None else _take(y_BHLK, order.argsort(1), 2)

    def _decode(self, heads: Heads, span: Span, number: int, state: State, gate: DecodeGate) -> Tensor:
        """Dense attention that keeps the compressed keys; a single token after others attends to chosen blocks."""
        before = state["keys"].shape[2] if "keys" in state else 0
        length, device = heads.queries.shape[2], heads.queries.device
        real = (
            torch.ones(len(heads.queries), length, dtype=torch.bool, device=device) if span.mask is None else span.mask
        )
        if not before:
            raw_k = heads.raw_keys if span.mask is None else _take(heads.raw_keys, _real_first(span.mask), 1)
            gate.prefill(state, raw_k, real.sum(1), self._block_tables(gate, raw_k))
        else:
            positions = span.positions.expand(real.shape)
            for at in range(length):
                entry = self.tables(gate.entry_positions(positions[:, at : at + 1]), gate.width, heads.raw_keys.dtype)
                num_blocks = -(-(before + at + 1) // gate.block_size)
                gate.append(state, heads.raw_keys[:, at], positions[:, at], real[:, at], num_blocks, entry)
        if not before or length > 1:
            return causal_attention(heads.queries, heads.keys, heads.values, span, number)
        state["keys"] = torch.cat([state["keys"], heads.keys], 2)
        state["values"] = torch.cat([state["values"], heads.values], 2)
        newest = positions[:, 0] // gate.block_size
        tables = self.tables(positions, gate.width, heads.raw_queries.dtype)
        kept = gate(heads.raw_queries[:, 0], state["compressed"], newest, tables) > 0.5
        blocks = torch.arange(kept.shape[-1], device=device)
        # The token's own block, so that something is seen, and the first one, as the authors' kernel has it.
        kept = kept | (blocks == 0) | (blocks == newest[:, None])[:, None]
        allowed = self._keys_of(kept, span, gate.block_size, state["keys"].shape[2])
        return F.scaled_dot_product_attention(
            heads.queries,
            state["keys"],
            state["values"],
            allowed.repeat_interleave(self.num_heads // self.num_kv_heads, 1)[:, :, None],
            enable_gqa=self.num_heads != self.num_kv_heads,
        )

    @staticmethod
    def _keys_of(kept_BGN: Tensor, span: Span, block_size: int, total: int) -> Tensor:
        """Which keys the kept blocks hold, (B, G, T)."""
        if span.key_mask is None:
            return kept_BGN.repeat_interleave(block_size, 2)[:, :, :total]
        block_BT = (span.key_mask.cumsum(1) - 1).clamp(min=0) // block_size
        chosen = kept_BGN.gather(2, block_BT[:, None].expand(-1, kept_BGN.shape[1], -1))
        itself = torch.arange(total, device=kept_BGN.device) == total - 1
        return chosen & span.key_mask[:, None] | itself


def _real_first(mask_BL: Tensor) -> Tensor:
    """The order (B, L) that puts real tokens first and keeps theirs."""
    return (~mask_BL).int().argsort(stable=True, dim=1)


def _take(x: Tensor, order_BL: Tensor, dim: int) -> Tensor:
    """``x`` (B, ...) with the tokens of axis ``dim`` in this order, sample by sample."""
    shape = [len(x), *[1] * (x.ndim - 1)]
    shape[dim] = order_BL.shape[1]
    return x.gather(dim, order_BL.view(shape).expand(x.shape))


def _reorder(heads: Heads, order_BL: Tensor) -> Heads:
    turned = [_take(x, order_BL, 2) for x in heads[:3]]
    return Heads(*turned, *[_take(x, order_BL, 1) for x in heads[3:]])


class SeerLM(DecoderLM):
    """Decoder-only language model (Llama, Qwen2, Qwen3) with gated attention tiles: tokens (B, L) -> logits (B, L, V).

    With prefill gates, evaluation of a sequence is sparse and decoding after a cached prompt dense; so decoding token by
    token gives the logits of the full pass only while the gates are open. With decode gates a prompt is dense and each
    token after it attends to the blocks its gate chooses. Training mode is dense either way, see `SeerAttention`.

    Args:
        vocab_size: V.
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, qk_norm, bias, rope_theta, eps: see `SeerAttention`.
        intermediate_size: hidden width of the SwiGLU.
        tie_embeddings: the output matrix is the embedding.
        gates: "prefill", "decode", or ``None`` for the dense twin, whose other weights the same seed makes the same.
        block_size, gate_hidden_size, force_double: see `AttnGate`.
        gate_type: its pools, as "Qavg_Kmaxminavg"; of a decode gate the keys' part counts.
        query_pooling, gate_qk_norm, compat: see `DecodeGate`.
        method, nz_ratio, token_budget, last_block_dense: see `TileRule`.
        threshold: one for all, or one a layer, which may be one a head.

    Raises:
        ValueError: for impossible sizes.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        *,
        intermediate_size: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        rope_theta: float = 10000.0,
        eps: float = 1e-6,
        tie_embeddings: bool = False,
        gates: Gates | None = "prefill",
        block_size: int = 64,
        gate_hidden_size: int | None = None,
        gate_type: str = "Qavg_Kmaxminavg",
        force_double: bool = False,
        query_pooling: QueryPooling = "Qproj",
        gate_qk_norm: bool = True,
        compat: bool = False,
        method: Method = "nz_ratio",
        threshold: Thresholds = 2e-3,
        nz_ratio: float = 0.25,
        token_budget: int = 4096,
        last_block_dense: bool = True,
    ) -> None:
        attentions = [
            SeerAttention(
                hidden_size,
                num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                qk_norm=qk_norm,
                bias=bias,
                rope_theta=rope_theta,
                eps=eps,
            )
            for _ in range(num_layers)
        ]
        super().__init__(attentions, vocab_size, hidden_size, intermediate_size, eps=eps, tie_embeddings=tie_embeddings)
        self.apply(initialise_normal)
        # The gates come last, so that the base has the same weights with and without them.
        rule = TileRule(method, 0.0, nz_ratio, token_budget, last_block_dense)
        q_pool, k_pool = parse_gate_type(gate_type)
        for attention, own in zip(attentions, _by_layer(threshold, num_layers), strict=True):
            sizes = (attention.head_dim, num_heads, attention.num_kv_heads)
            shared: dict[str, Any] = {"block_size": block_size, "gate_hidden_size": gate_hidden_size}
            shared |= {"rule": replace(rule, threshold=own), "k_pool": k_pool}
            if gates == "prefill":
                attention.gate = AttnGate(*sizes, q_pool=q_pool, force_double=force_double, **shared)
            elif gates == "decode":
                attention.gate = DecodeGate(
                    *sizes, query_pooling=query_pooling, use_qk_norm=gate_qk_norm, compat=compat, **shared
                )

    @property
    def attentions(self) -> list[SeerAttention]:
        """The attention layers, typed."""
        return [block.self_attn for block in self.blocks if isinstance(block.self_attn, SeerAttention)]

    @property
    def gates(self) -> list[TileGate]:
        """The layers' gates; none in the dense twin."""
        return [a.gate for a in self.attentions if isinstance(a.gate, AttnGate | DecodeGate)]

    def set_rule(self, **changes: Any) -> None:
        """Change how all gates decide, as ``set_rule(method="threshold", threshold=5e-3)``; no training is needed.

        Raises:
            ValueError: see `TileRule`.
        """
        for gate in self.gates:
            gate.rule = replace(gate.rule, **changes)

    def dense_pass(self, tokens_BL: Tensor, look: Callable[[SeerAttention, Heads], None]) -> Tensor:
        """Logits with dense attention, showing each layer's queries and keys to ``look`` on the way."""
        span = self.span(tokens_BL, None, None)
        x_BLD = self.embed_tokens(tokens_BL)
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            heads = attention.project(block.input_layernorm(x_BLD), span.positions)
            look(attention, heads)
            x_BLD = x_BLD + attention.output(causal_attention(heads.queries, heads.keys, heads.values))
            x_BLD = x_BLD + block.mlp(block.post_attention_layernorm(x_BLD))
        return self.lm_head(self.norm(x_BLD))

    def distil(self, tokens_BL: Tensor, *, pool: TargetPool = "max") -> tuple[Tensor, Tensor]:
        """Logits of the dense model and the gates' distillation loss, summed over layers.

        Each layer's gate learns from its own layer's map in the dense model, so that errors do not add up. Gradients of
        the loss reach the gates alone; the caller multiplies it (the authors: by 10) and freezes the base, or adds the
        language model's loss.

        Args:
            tokens_BL: whole sequences without padding.
            pool: see `ground_truth`.
        """
        losses: list[Tensor] = []
        logits = self.dense_pass(tokens_BL, lambda layer, heads: losses.append(layer.distillation_loss(heads, pool)))
        return logits, torch.stack(losses).sum()


def _by_layer(threshold: Thresholds, num_layers: int) -> list[float | tuple[float, ...]]:
    if isinstance(threshold, int | float):
        return [float(threshold)] * num_layers
    if len(threshold) != num_layers:
        raise ValueError(f"{len(threshold)} thresholds for {num_layers} layers; give one, or one a layer")
    return [float(one) if isinstance(one, int | float) else tuple(one) for one in threshold]


class GateStack(nn.Module):
    """The gates of all layers of a base model without the base, as they are published: ``layers[i]`` is layer i's.

    Args:
        gates: one a layer.
    """

    def __init__(self, gates: Sequence[TileGate]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(gates)

    @property
    def gates(self) -> list[TileGate]:
        """The same, typed."""
        return [gate for gate in self.layers if isinstance(gate, AttnGate | DecodeGate)]


def _prefill_gates(layers: int, heads: int, kv_heads: int) -> Callable[..., GateStack]:
    def build(
        *, num_layers: int = layers, block_size: int = 64, gate_type: str = "Qavg_Kmaxminavg", threshold: float = 2e-3
    ) -> GateStack:
        q_pool, k_pool = parse_gate_type(gate_type)
        rule = TileRule(threshold=threshold)
        return GateStack(
            [
                AttnGate(128, heads, kv_heads, block_size=block_size, q_pool=q_pool, k_pool=k_pool, rule=rule)
                for _ in range(num_layers)
            ]
        )

    return build


def _decode_gates(layers: int, heads: int, kv_heads: int) -> Callable[..., GateStack]:
    def build(*, num_layers: int = layers, block_size: int = 64, token_budget: int = 4096) -> GateStack:
        rule = TileRule(method="token_budget", token_budget=token_budget)
        return GateStack(
            [DecodeGate(128, heads, kv_heads, block_size=block_size, rule=rule) for _ in range(num_layers)]
        )

    return build


#: The published sets of gates, each for the model it was distilled from.
VARIANTS: dict[str, Callable[..., GateStack]] = {
    "seer_attention_llama3_1_8b_gates": _prefill_gates(32, 32, 8),
    "seer_attention_llama3_1_70b_gates": _prefill_gates(80, 64, 8),
    "seer_attention_qwen2_5_7b_gates": _prefill_gates(28, 28, 4),
    "seer_attention_qwen2_5_14b_gates": _prefill_gates(48, 40, 8),
    "seer_attention_qwen2_5_32b_gates": _prefill_gates(64, 40, 8),
    "seer_attention_r_qwen3_4b_gates": _decode_gates(36, 32, 8),
}
