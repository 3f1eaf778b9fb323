"""What watching costs, and the gated layer beside transformers' and the ungated one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from penstock.gates import watch
from penstock.lab.bench import Benchmark, Contest, training_step
from penstock.systems.sequence.gated_attention.checkpoint import load_layer
from penstock.systems.sequence.gated_attention.model import GatedAttention, GatedAttentionLM


def watching() -> Contest:
    torch.manual_seed(0)
    entries: dict[str, Callable[[], None]] = {}
    tokens = torch.randint(256, (16, 128))
    for gate in ("headwise", "elementwise"):
        model = GatedAttentionLM(256, 128, 4, 4, intermediate_size=344, gate=gate)
        step = training_step(model, tokens)
        entries[f"{gate}, not watched"] = step
        entries[f"{gate}, watched"] = _watched(model, step)
    return Contest(
        entries,
        note="The demo's model and batch (16 x 128 bytes), forward, backward and optimiser; elementwise has 32 times the gate values.",
    )


def _watched(model: nn.Module, step: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        with watch(model):
            step()

    return call


def layer() -> Contest:
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

    torch.manual_seed(0)
    batch, length, width, heads = 4, 512, 512, 8
    config = Qwen3NextConfig(
        hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads
    )
    config._attn_implementation = "sdpa"
    peer = Qwen3NextAttention(config, 0).eval()
    settings = config.to_dict()
    ours = load_layer(peer.state_dict(), settings, "qwen3_next").eval()
    build = partial(GatedAttention, width, heads, rotary_fraction=0.25, zero_centred_norm=True)
    headwise, ungated = build(gate="headwise").eval(), build(gate=None).eval()
    x = torch.randn(batch, length, width)
    rotary = Qwen3NextRotaryEmbedding(config)(x, torch.arange(length)[None])

    def run(module: nn.Module) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                module(x)

        return call

    def theirs() -> None:
        with torch.no_grad():
            peer(x, rotary, None)

    flops = batch * (2 * length * width * width * 5 + 2 * 2 * length * length * width)
    return Contest(
        {
            "penstock elementwise": run(ours),
            "transformers Qwen3-Next": theirs,
            "penstock headwise": run(headwise),
            "penstock ungated": run(ungated),
        },
        flops=flops,
        note=f"Forward, batch {batch}, length {length}, width {width}, {heads} heads, float32; the first two have the same weights.",
    )


def benchmarks() -> dict[str, Benchmark]:
    return {
        "watch": Benchmark("What watching every gate costs a training step", watching),
        "gated_attention": Benchmark("An attention layer with and without its output gate", layer),
    }
