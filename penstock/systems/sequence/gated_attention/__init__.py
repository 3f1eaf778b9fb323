"""Gated Attention for Large Language Models (Qiu et al. 2025)."""
