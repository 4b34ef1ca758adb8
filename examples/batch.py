"""A reply to each line of a file, as lines of JSON: python examples/batch.py [MODEL [FILE]]

The common beginning of the prompts (the system message) is read once and kept in a `PrefixCache`. The file grows line
by line; an interrupted run continues where it stopped: lines that have an answer are left out.
"""

import json
import sys
from pathlib import Path

import mlx_gemma4
from mlx_gemma4 import InputError, PrefixCache, ReplyOptions

model = sys.argv[1] if len(sys.argv) > 1 else None
prompts = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("prompts.txt")
answers = Path(f"{prompts.stem}.answers.jsonl")

lm = mlx_gemma4.load(model)
store = PrefixCache(lm.model, max_kv_bytes=500_000_000)
options = ReplyOptions(max_tokens=60)
system = {"role": "system", "content": "You tell tales, in three sentences at most."}

done = {json.loads(line)["prompt"] for line in answers.read_text().splitlines()} if answers.exists() else set()
with answers.open("a", encoding="utf-8") as file:
    for prompt in prompts.read_text(encoding="utf-8").splitlines():
        if not prompt.strip() or prompt in done:
            continue
        try:
            reply = mlx_gemma4.chat(lm, [system, {"role": "user", "content": prompt}], options, store=store)
        except InputError as error:  # too long, for example: the others go on
            print(f"{prompt:.40}: {error}", file=sys.stderr)
            continue
        answer = {"prompt": prompt, "reply": reply.text, "finish_reason": reply.finish_reason}
        file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        file.flush()
        read, had = reply.statistics.prompt_tokens, reply.statistics.reused_tokens
        print(f"{prompt:.40}: {len(reply.tokens)} tokens; of the prompt {read} read, {had} known")
print(f"Answers are in {answers}")
