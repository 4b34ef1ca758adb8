"""The KV state: segments, marks, quantized keys and values. Knows no model and no kernel."""
