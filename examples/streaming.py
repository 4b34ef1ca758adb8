"""A reply as it is made, thinking dimmed, and its statistics: python examples/streaming.py [MODEL]"""

import sys

import mlx_gemma4

DIM, PLAIN = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")

lm = mlx_gemma4.load(*sys.argv[1:])
for chunk in mlx_gemma4.stream(lm, "Tell me a tale about a goose.", think=True, max_tokens=150):
    print(f"{DIM}{chunk.thinking}{PLAIN}{chunk.text}", end="", flush=True)

reply = chunk.reply  # the same object in every chunk, now complete
print(f"\n\n[{reply.finish_reason}: {len(reply.tokens)} tokens, {reply.statistics.reply_rate:.0f} a second]")
