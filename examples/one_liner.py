"""A prompt, a reply: python examples/one_liner.py [MODEL]. Without a model, the built-in demo tells a tale."""

import sys

import mlx_gemma4

print(mlx_gemma4.generate(mlx_gemma4.load(*sys.argv[1:]), "Tell me a tale about a goose.", max_tokens=120))
