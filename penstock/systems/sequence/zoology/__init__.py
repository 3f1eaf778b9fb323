"""Zoology: Measuring and Improving Recall in Efficient Language Models (Arora et al. 2023)."""
