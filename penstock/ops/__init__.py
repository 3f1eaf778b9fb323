"""Functional kernels, each beside its plain reference; `last_backend` says which form of each ran last."""

from penstock.ops.block_attention import block_sparse_attention, pooled_attention_map, pyramid_attention
from penstock.ops.convolution import causal_depthwise_conv, long_convolution
from penstock.ops.dispatch import last_backend
from penstock.ops.linear_attention import gated_linear_attention
from penstock.ops.memory import memory_read, slot_weights

__all__ = [
    "block_sparse_attention",
    "causal_depthwise_conv",
    "gated_linear_attention",
    "last_backend",
    "long_convolution",
    "memory_read",
    "pooled_attention_map",
    "pyramid_attention",
    "slot_weights",
]
