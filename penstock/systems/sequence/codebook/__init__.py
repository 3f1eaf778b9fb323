"""Codebook Features (Tamkin, Taufeeque and Goodman 2023)."""
