"""ConViT: attention heads that start as a convolution, with a gate to leave it."""
