"""Proves the kernels on this machine against their references."""
