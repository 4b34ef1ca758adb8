"""Quantized blocks: the table of formats, and their repacking into planar arrays."""
