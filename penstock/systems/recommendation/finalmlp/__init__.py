"""FinalMLP: two perceptrons, each behind its own gate on the features, fused by a bilinear form in several heads."""
