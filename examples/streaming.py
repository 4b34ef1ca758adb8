"""A reply as it is made, thinking dimmed, and what it took: python examples/streaming.py [MODEL]"""

import sys

import mlx_gemma4
from mlx_gemma4 import ReplyOptions, Text, Thinking

DIM, PLAIN = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")

lm = mlx_gemma4.load(*sys.argv[1:])
options = ReplyOptions(think=True, max_tokens=150)
for chunk in mlx_gemma4.stream(lm, "Tell me a tale about a goose.", options):
    for event in chunk.events:  # mostly one for each token
        if isinstance(event, Thinking):
            print(f"{DIM}{event.text}{PLAIN}", end="", flush=True)
        elif isinstance(event, Text):
            print(event.text, end="", flush=True)

reply = chunk.reply  # the same object in every chunk, now complete
print(f"\n\n[{reply.finish_reason}: {len(reply.tokens)} tokens, {reply.statistics.reply_rate:.0f} a second]")
