"""Operations: each a kernel launcher beside its reference in stock MLX. Knows no model and no KV state."""
