"""The Python API: language models, replies, sessions."""
