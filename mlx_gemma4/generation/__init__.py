"""Logits to tokens: the loop, sampling, stop strings, the prefix cache."""
