"""Gates added to trained models of transformers: output gates, sparse attention, codebooks; and measures of any model."""

from penstock.interop.graft.codebooks import CodebookPlace, enable_codebooks
from penstock.interop.graft.distil import distil, sparse_report
from penstock.interop.graft.layout import LAYOUTS, Layers, Layout
from penstock.interop.graft.main import graft, ungraft
from penstock.interop.graft.measures import attention_sink, massive_activation
from penstock.interop.graft.output_gate import Granularity
from penstock.interop.graft.seer import is_sparse, set_sparse, sparse_prefill
from penstock.interop.graft.store import load_gates, save_gates
from penstock.systems.sequence.seer_attention.tiles import TileRule

__all__ = [
    "LAYOUTS",
    "CodebookPlace",
    "Granularity",
    "Layers",
    "Layout",
    "TileRule",
    "attention_sink",
    "distil",
    "enable_codebooks",
    "graft",
    "is_sparse",
    "load_gates",
    "massive_activation",
    "save_gates",
    "set_sparse",
    "sparse_prefill",
    "sparse_report",
    "ungraft",
]
