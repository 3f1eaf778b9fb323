"""Gated linear attention (Yang et al. 2023)."""
