"""PSA: pyramid sparse attention (Li et al. 2025); see card.toml."""
