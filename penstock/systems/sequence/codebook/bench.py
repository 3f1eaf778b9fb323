"""What a codebook costs: the choice of codes unseen and watched, and beside a product with the whole indicator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.gates import watch
from penstock.lab.bench import Benchmark, Contest
from penstock.nn.codebook import CodebookLayer

#: One head of the authors' model; their batch is 24 windows of 512.
_BATCH, _LENGTH, _WIDTH, _CODES, _TOP_K = 2, 512, 64, 10_000, 8


def layer() -> Contest:
    torch.manual_seed(0)
    codebook = CodebookLayer(_WIDTH, _CODES, top_k=_TOP_K)
    x_BLD = torch.randn(_BATCH, _LENGTH, _WIDTH)

    def step(output: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            codebook.zero_grad()
            output(x_BLD.clone().requires_grad_()).square().mean().backward()

        return call

    def watched(x_BLD: Tensor) -> Tensor:
        with watch(codebook, "selector"):
            return codebook(x_BLD)

    def dense(x_BLD: Tensor) -> Tensor:
        """The indicator of the chosen codes as one row over all, times the codes; straight through by hand."""
        u_BLD, codes_CD = codebook.ln(x_BLD), codebook.codebook.weight
        scores_BLC = u_BLD.detach() @ F.normalize(codes_CD.detach(), dim=-1).T
        share_BLC = torch.zeros_like(scores_BLC).scatter_(-1, scores_BLC.topk(_TOP_K).indices, 1 / _TOP_K)
        y_BLD = share_BLC @ codes_CD
        return y_BLD + u_BLD - u_BLD.detach()

    return Contest(
        {"penstock": step(codebook), "dense indicator": step(dense), "penstock, watched": step(watched)},
        flops=2 * _BATCH * _LENGTH * _WIDTH * _CODES,
        note=f"Forward and backward, {_BATCH} x {_LENGTH} tokens, width {_WIDTH}, {_CODES} codes, k = {_TOP_K}; the share of the "
        "matrix rate counts the scores only. Watching forms the indicator and its statistics in float64.",
    )


def benchmarks() -> dict[str, Benchmark]:
    return {"codebook": Benchmark("A codebook of many codes, unseen, watched, and as one dense product", layer)}
