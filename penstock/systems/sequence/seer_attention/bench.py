"""Block-sparse attention beside causal softmax attention and compiled FlexAttention; how its time follows the blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from penstock.lab.bench import Benchmark, Contest
from penstock.ops import block_sparse_attention

_HEADS, _WIDTH, _LENGTH, _BLOCK = 4, 64, 8192, 128


def kept_blocks(share: float) -> Tensor:
    """A random causal block mask for each head with this share of the causal blocks, the diagonal among them."""
    number = _LENGTH // _BLOCK
    causal = torch.ones(number, number, dtype=torch.bool).tril()
    scores = torch.rand(_HEADS, number, number, generator=torch.Generator().manual_seed(0))
    scores = scores.masked_fill(~causal, -1.0).masked_fill(torch.eye(number, dtype=torch.bool), 2.0)
    kept = round(share * number * (number + 1) / 2)
    threshold = scores.flatten(1).kthvalue(number * number - kept + 1).values
    return scores >= threshold[:, None, None]


def _tensors() -> list[Tensor]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return list(torch.randn(3, 1, _HEADS, _LENGTH, _WIDTH, device=device).unbind())


def _forward(function: Callable[..., object], *arguments: object, **options: object) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            function(*arguments, **options)

    return call


def _flex_mask(blocks: Tensor) -> BlockMask:
    """The same blocks for FlexAttention: those on the diagonal are partly hidden, the others whole."""

    def listed(some: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(some.int(), dim=-1, descending=True, stable=True)
        return some.sum(-1)[None].int(), order[None].int()

    diagonal = torch.eye(blocks.shape[-1], dtype=torch.bool, device=blocks.device)
    return BlockMask.from_kv_blocks(
        *listed(blocks & diagonal),
        *listed(blocks & ~diagonal),
        BLOCK_SIZE=_BLOCK,
        mask_mod=lambda _b, _h, query, key: query >= key,
    )


def beside_peers() -> Contest:
    q, k, v = _tensors()
    blocks = kept_blocks(0.1).to(q.device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    weigh = torch.randn_like(q)

    def both_ways() -> None:
        output = block_sparse_attention(leaves[0], leaves[1], leaves[2], blocks, block_size=_BLOCK)
        torch.autograd.grad(output, leaves, weigh)

    flex = torch.compile(flex_attention)
    return Contest(
        {
            "penstock forward": _forward(block_sparse_attention, q, k, v, blocks, block_size=_BLOCK),
            "penstock forward + backward": both_ways,
            "causal attention (SDPA) forward": _forward(F.scaled_dot_product_attention, q, k, v, is_causal=True),
            "FlexAttention compiled, forward": _forward(flex, q, k, v, block_mask=_flex_mask(blocks)),
        },
        flops=4 * int(blocks.sum()) * _BLOCK * _BLOCK * _WIDTH,
        note=f"Batch 1, {_HEADS} heads, width {_WIDTH}, length {_LENGTH}, blocks of {_BLOCK}, a tenth of the causal blocks kept at random, "
        "float32; FlexAttention has the same blocks and cannot train on a CPU.",
    )


def by_share() -> Contest:
    q, k, v = _tensors()
    shares = (0.05, 0.1, 0.25, 0.5)
    return Contest(
        {
            f"{share:.0%} of the blocks": _forward(
                block_sparse_attention, q, k, v, kept_blocks(share).to(q.device), block_size=_BLOCK
            )
            for share in shares
        },
        note=f"As above, forward; proportional times would be {', '.join(f'{share / shares[0]:g}' for share in shares)}.",
    )


def benchmarks() -> dict[str, Benchmark]:
    return {
        "block_sparse_attention": Benchmark("Block-sparse attention beside its peers", beside_peers),
        "block_sparse_attention_shares": Benchmark("Block-sparse attention by the share of blocks kept", by_share),
    }
