"""Small models with gates of every sort, for the tests of the contract.

Shape legend: B batch, L length, D width, H heads, K channels of a head, C channels, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import penstock
from penstock.gates import Gate, ParameterGate, Routing, SigmoidGate, TopKRouter


class OutputGate(Gate):
    """A value for each head, or for each of its channels: (B, L, D) -> (B, L, H, 1 or K)."""

    passes = "head"

    def __init__(self, dim: int, num_heads: int, width: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj = nn.Linear(dim, num_heads * width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.proj(x_BLD).unflatten(-1, (self.num_heads, -1)).sigmoid()


class Layer(nn.Module):
    def __init__(self, dim: int, num_heads: int, width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gate = OutputGate(dim, num_heads, width)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLD = self.norms[0](x_BLD)
        q, k, v = self.qkv(h_BLD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y_BLHK = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x_BLD = x_BLD + self.out((y_BLHK * self.gate(h_BLD)).flatten(-2))
        return x_BLD + self.mlp(self.norms[1](x_BLD))


class GPT(nn.Module):
    """A small language model with an output gate in every layer: (B, L) ids -> (B, L, vocabulary)."""

    def __init__(self, dim: int = 16, num_heads: int = 4, depth: int = 2, vocab: int = 11, width: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Layer(dim, num_heads, width) for _ in range(depth))
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids_BL: Tensor) -> Tensor:
        x_BLD = self.embed(ids_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.head(x_BLD)


class SqueezeExcite(nn.Module):
    """A foreign block as vision libraries have it: its gate is an anonymous ``nn.Sigmoid``. (B, C, H, W) images."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.gate = nn.Sigmoid()
        self.head = nn.Linear(channels, 5)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv(image_BCHW)
        pooled = x_BCHW.mean((2, 3), keepdim=True)
        x_BCHW = x_BCHW * self.gate(self.expand(self.reduce(pooled).relu()))
        return self.head(x_BCHW.mean((2, 3)))


def marked_squeeze_excite() -> SqueezeExcite:
    model = SqueezeExcite()
    penstock.mark(model.gate, kind="scale", passes="channel")
    return model


class Gated(nn.Module):
    """A linear layer behind a gate of its input: (..., D) -> (..., D)."""

    def __init__(self, dim: int, gate: nn.Module) -> None:
        super().__init__()
        self.proj, self.gate = nn.Linear(dim, dim), gate

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.gate(x)


class Static(nn.Module):
    """A free parameter for each feature: (B, D) -> (B, D)."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.proj, self.gate = nn.Linear(dim, dim), ParameterGate(dim, init=0.3)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.proj(x_BD) * self.gate()


class Pairs(nn.Module):
    """A free parameter for each pair of fields, weighing their product: (B, F, D) -> (B,)."""

    def __init__(self, fields: int = 4, dim: int = 3) -> None:
        super().__init__()
        self.gate = ParameterGate(fields, fields, init=-0.2)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        x_BFD = self.proj(x_BFD)
        return torch.einsum("bfd,bgd,fg->b", x_BFD, x_BFD, self.gate())


class Experts(nn.Module):
    """Linear experts, each given the tokens whose routing names it: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int = 8, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.router = TopKRouter(dim, num_experts, top_k)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_experts))

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_TD = x_BLD.flatten(0, 1)
        routing: Routing = self.router(x_TD)
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(routing.indices == number)
            y_TD = y_TD.index_add(0, token, expert(x_TD[token]) * routing.weights[token, place, None])
        return y_TD.view_as(x_BLD)


class DepthGate(Gate):
    """Which exit each sample takes, one-hot with a straight-through gradient: (B, D) -> (B, exits)."""

    passes = "layer"
    kind = "ordinal"

    def __init__(self, dim: int, exits: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, exits)

    def forward(self, x_BD: Tensor) -> Tensor:
        soft = self.proj(x_BD).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        return hard + soft - soft.detach()


class EarlyExit(nn.Module):
    """Stops each sample after the layer its gate names: (B, D) -> (B, D)."""

    def __init__(self, dim: int = 6, exits: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(exits))
        self.exit_gate = DepthGate(dim, exits)

    def forward(self, x_BD: Tensor) -> Tensor:
        choice_BE = self.exit_gate(x_BD)
        states = []
        for layer in self.layers:
            x_BD = layer(x_BD).tanh()
            states.append(x_BD)
        return torch.einsum("be,ebd->bd", choice_BE, torch.stack(states))


class FieldMask(Gate):
    """Keeps the k fields of the largest scores, one mask for each sample: (B, F, D) -> (B, F)."""

    passes = "feature"
    kind = "k-hot"
    unit_dims = 1

    def __init__(self, dim: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.score = nn.Linear(dim, 1)

    def forward(self, x_BFD: Tensor) -> Tensor:
        soft = self.score(x_BFD).squeeze(-1).sigmoid()
        hard = torch.zeros_like(soft).scatter(-1, soft.topk(self.k, -1).indices, 1.0)
        return hard + soft - soft.detach()


class Fields(nn.Module):
    """Sums the fields that its mask keeps: (B, F, D) -> (B, D)."""

    def __init__(self, dim: int = 3, k: int = 2) -> None:
        super().__init__()
        self.gate = FieldMask(dim, k)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        return (self.proj(x_BFD) * self.gate(x_BFD)[..., None]).sum(1)


class DecayGate(Gate):
    """The decay of a recurrence, or with ``log`` its logarithm: (B, L, D) -> (B, L, D)."""

    passes = "channel"
    kind = "decay"

    def __init__(self, dim: int, *, log: bool) -> None:
        super().__init__()
        self.proj, self.log = nn.Linear(dim, dim), log
        if log:
            self.range = (-float("inf"), 0.0)

    def forward(self, x_BLD: Tensor) -> Tensor:
        logits = self.proj(x_BLD)
        return F.logsigmoid(logits) if self.log else logits.sigmoid()


class Recurrence(nn.Module):
    """h_t = a_t h_(t-1) + x_t with a decay gate: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int = 5, *, log: bool = True) -> None:
        super().__init__()
        self.gate = DecayGate(dim, log=log)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        decay = self.gate(x_BLD)
        decay, x_BLD = decay.exp() if self.gate.log else decay, self.proj(x_BLD)
        state, states = torch.zeros_like(x_BLD[:, 0]), []
        for step in range(x_BLD.shape[1]):
            state = decay[:, step] * state + x_BLD[:, step]
            states.append(state)
        return torch.stack(states, 1)


class SignedGate(Gate):
    """Hyperbolic tangent, in (-1, 1): (..., D) -> (..., D)."""

    range = (-1.0, 1.0)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).tanh()


class Shared(nn.Module):
    """One gate module under two parents and, in one of them, under two names."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        gate = SigmoidGate(dim, dim)
        self.left, self.right = Gated(dim, gate), Gated(dim, gate)
        self.left.again = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x) + self.left.again(x)


class NestedGate(Gate):
    """A gate that has a gate of its own inside: (..., D) -> (..., D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner, self.outer = SigmoidGate(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x * self.inner(x)).sigmoid()


@dataclass(frozen=True)
class Example:
    """A model under test: how to build it and an input of a given batch size."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    static: bool = False
    closes: bool = True

    def __call__(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model, x = self.build().to(dtype), self.inputs(6)
        return model, x.to(dtype) if x.is_floating_point() else x


def _noise(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def _ids(batch: int) -> Tensor:
    return torch.randint(0, 11, (batch, 7), generator=torch.Generator().manual_seed(batch))


EXAMPLES: list[Any] = [
    Example("sigmoid", lambda: Gated(4, SigmoidGate(4, 4)), _noise(4)),
    Example("twice_sigmoid", lambda: Gated(4, SigmoidGate(4, 4, scale=2.0)), _noise(4)),
    Example("signed", lambda: Gated(4, SignedGate(4)), _noise(3, 4)),
    Example("static", Static, _noise(4), static=True),
    Example("pairs", Pairs, _noise(4, 3), static=True),
    Example("output_gates", GPT, _ids),
    Example("squeeze_excite", marked_squeeze_excite, _noise(3, 5, 4)),
    Example("experts", Experts, _noise(3, 8), closes=False),
    Example("early_exit", EarlyExit, _noise(6)),
    Example("field_mask", Fields, _noise(4, 3)),
    Example("decay", lambda: Recurrence(log=False), _noise(4, 5)),
    Example("log_decay", Recurrence, _noise(4, 5)),
    Example("shared", Shared, _noise(4)),
    Example("nested", lambda: Gated(4, NestedGate(4)), _noise(4)),
]


def hooks_left(model: nn.Module) -> int:
    """How many hooks of any sort, and instance attributes put there for them, a model still has."""
    on_modules = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ("forward" in m.__dict__)
        for m in model.modules()
    )
    return on_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())
