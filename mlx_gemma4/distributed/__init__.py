"""Several Macs: one model on several ranks over MLX's distributed engine. docs/several-macs.md"""
