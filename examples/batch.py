"""A reply to each line of a file, several at once, as lines of JSON: python examples/batch.py [MODEL [FILE]]

Replies are written as they are done; an interrupted run continues where it stopped: lines that have an answer are left
out. The common beginning of the prompts (the system message) is read once. `mlx-gemma4 generate --prompts` does the
same for files of JSON lines.
"""

import json
import sys
from pathlib import Path

import mlx_gemma4

model = sys.argv[1] if len(sys.argv) > 1 else None
source = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("prompts.txt")
answers = Path(f"{source.stem}.answers.jsonl")

lm = mlx_gemma4.load(model)
system = {"role": "system", "content": "You tell tales, in three sentences at most, and each of them ends well."}

done = {json.loads(line)["prompt"] for line in answers.read_text().splitlines()} if answers.exists() else set()
lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip() and line not in done]
prompts = [[system, {"role": "user", "content": line}] for line in lines]
with answers.open("a", encoding="utf-8") as file:
    for i, reply in mlx_gemma4.batch(lm, prompts, max_tokens=60):
        if reply.error:  # too long, for example: the others go on
            print(f"{lines[i]:.40}: {reply.error}", file=sys.stderr)
            continue
        answer = {"prompt": lines[i], "reply": reply.text, "finish_reason": reply.finish_reason}
        file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        file.flush()
        read, had = reply.statistics.prompt_tokens, reply.statistics.reused_tokens
        print(f"{lines[i]:.40}: {len(reply.tokens)} tokens; of the prompt {read} read, {had} known")
print(f"Answers are in {answers}")
