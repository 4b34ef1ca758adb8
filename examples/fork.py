"""One conversation, several continuations, and nothing is read twice: python examples/fork.py [MODEL]"""

import sys
from dataclasses import replace

import mlx_gemma4
from mlx_gemma4 import ReplyOptions, Session

lm = mlx_gemma4.load(*sys.argv[1:])
session = Session(lm, "You tell short tales.", options=ReplyOptions(max_tokens=60))
for _ in session.send("Tell me a tale about a goose."):
    pass
print(f"{session.reply.text}\n[read {session.reply.statistics.prompt_tokens} tokens]")

for temperature in (0.0, 0.7, 1.2):
    sampling = replace(lm.sampling, temperature=temperature, seed=1)
    other = session.fork()  # the same past by reference: no keys or values are copied
    for _ in other.send("Go on.", ReplyOptions(max_tokens=40, sampling=sampling)):
        pass
    statistics = other.reply.statistics
    print(f"\n--- temperature {temperature}\n{other.reply.text}")
    print(f"[read {statistics.prompt_tokens} tokens, had {statistics.reused_tokens} already]")
