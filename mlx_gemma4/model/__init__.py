"""The forward pass: weights, stock operations, the traced step, the replayed step."""
