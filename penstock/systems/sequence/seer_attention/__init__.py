"""SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (Gao et al. 2024)."""
