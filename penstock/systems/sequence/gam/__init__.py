"""Gated Associative Memory (Acharya 2025)."""
