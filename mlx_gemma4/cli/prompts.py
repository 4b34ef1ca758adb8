"""`mlx-gemma4 generate --prompts`: a file of prompts in, a line of JSON for each out, in the same order.

What an output file holds already is not asked again: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, reason
from ..paths import check_target
from .options import EXIT_INTERRUPTED, echo, load_with_progress, progress, read_text, say

if TYPE_CHECKING:
    from ..conversation.language_model import LanguageModel
    from ..conversation.reply import Prompt, Reply, ReplyOptions


@dataclass(frozen=True)
class _Line:
    """A line of the file."""

    place: str  # FILE:LINE, for errors
    name: str | int  # its id; the line's number where it has none
    prompt: str | list[dict[str, Any]]
    given: Mapping[str, Any]  # options of its own


def answer_file(
    source: Path,
    output: Path | None,
    model: str | None,
    kv: str,
    system: str | None,
    raw: bool,
    max_tokens: int | None,
    options_of: Callable[[LanguageModel], ReplyOptions],
    draft_max: int,
) -> None:
    """Answer the prompts of `source` on standard output, or in `output` behind those that it has answers to."""
    lines = _read(source)
    if output is not None and (output.is_file() or not output.exists()):
        check_target(output)
    answered = 0 if output is None else _answered(output, lines)
    if answered == len(lines):
        echo(f"{output or source}: all {len(lines)} prompts are answered")
        return
    from ..conversation.batch import batch
    from ..memory import DEFAULT_CONTEXT

    left = lines[answered:]
    longest = max(len(json.dumps(line.prompt, ensure_ascii=False).encode()) for line in left)
    lm, _ = load_with_progress(
        model, kv, longest // 3 + (max_tokens or DEFAULT_CONTEXT), draft_max=draft_max
    )  # a token has over 3 bytes
    options = [_options(line, options_of(lm)) for line in left]
    prompts = [_prompt(lm, line, system, raw) for line in left]
    start, tokens, failed, cut, broken, written = time.monotonic(), 0, 0, 0, False, 0
    early: dict[int, str] = {}  # replies done before those of earlier lines
    try:
        with ExitStack() as stack:
            file = None if output is None else stack.enter_context(output.open("a", encoding="utf-8"))
            update = stack.enter_context(progress("Answered", 1, " prompts"))
            for i, reply in stack.enter_context(closing(batch(lm, prompts, options, kv=kv, on_progress=update))):
                early[i] = json.dumps(_record(left[i].name, reply), ensure_ascii=False)
                tokens, failed = tokens + len(reply.tokens), failed + (reply.error is not None)
                if reply.error is None and reply.finish_reason == "length":
                    cut, broken = cut + 1, broken or options[i].schema is not None
                while written in early:
                    if file is None:
                        say(early.pop(written))
                    else:
                        file.write(early.pop(written) + "\n")
                        file.flush()
                    written += 1
    except KeyboardInterrupt:
        again = "" if output is None else "; the same command goes on from there"
        echo(f"Interrupted: {answered + written} of {len(lines)} prompts are answered{again}")
        sys.exit(EXIT_INTERRUPTED)
    seconds = time.monotonic() - start
    echo(
        f"{written} prompts answered, {answered} were before, {failed} failed; "
        + f"{cut} cut off at their max_tokens, see finish_reason; " * bool(cut)
        + f"{tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s"
    )
    if broken:  # JSON that is cut
        sys.exit(1)


def _read(path: Path) -> list[_Line]:
    from ..conversation.reply import ReplyOptions
    from ..generation.sampling import Sampling

    known = {f.name for kind in (ReplyOptions, Sampling) for f in fields(kind)} - {"sampling", "logprobs"}
    lines = []
    for number, text in enumerate(read_text(str(path), "--prompts ").split("\n"), 1):  # U+2028 ends no line of JSON
        if not text.strip():
            continue
        place = f"{path}:{number}"
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: is not JSON ({reason(error)})") from error
        if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
            raise InputError(f'{place}: must be an object with either "prompt" or "messages"')
        name, prompt, messages = entry.pop("id", number), entry.pop("prompt", ""), entry.pop("messages", [])
        lists = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
        if not isinstance(prompt, str) or not lists or not (prompt or messages):
            raise InputError(f"{place}: prompt must be text, messages a list of objects, and neither empty")
        if not isinstance(name, str | int):
            raise InputError(f"{place}: id must be text or an integer")
        if unknown := entry.keys() - known:
            raise InputError(f'{place}: there is no option "{min(unknown)}"; there are {", ".join(sorted(known))}')
        lines.append(_Line(place, name, prompt or messages, entry))
    if not lines:
        raise InputError(f"--prompts {path}: holds no prompts")
    return lines


def _answered(path: Path, lines: list[_Line]) -> int:
    """Return how many of the first lines an output file answers, after dropping the half-written end of it."""
    if not path.is_file():
        return 0
    try:
        whole = path.read_bytes().rpartition(b"\n")
        names = [json.loads(text)["id"] for text in whole[0].splitlines()]
        if whole[2]:
            with path.open("r+b") as file:
                file.truncate(len(whole[0]) + len(whole[1]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"--output {path}: isn't what --prompts writes ({error!r}); give another file") from error
    if names != [line.name for line in lines[: len(names)]]:
        raise InputError(f"--output {path}: has answers to other prompts than {lines[0].place} on; give another file")
    return len(names)


def _options(line: _Line, options: ReplyOptions) -> ReplyOptions:
    """Return the options of all, changed as a line says."""
    try:
        sampling = {f.name: line.given[f.name] for f in fields(type(options.sampling)) if f.name in line.given}  # type: ignore[arg-type]
        rest = {name: value for name, value in line.given.items() if name not in sampling}
        return replace(options, **rest, sampling=replace(options.sampling, **sampling))  # type: ignore[type-var]
    except (InputError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{line.place}: {error}") from error


def _prompt(lm: LanguageModel, line: _Line, system: str | None, raw: bool) -> Prompt:
    if raw:
        if not isinstance(line.prompt, str):
            raise InputError(f"{line.place}: messages need the chat template: leave out --raw")
        return lm.encode_prompt(line.prompt, raw=True)
    messages = [{"role": "user", "content": line.prompt}] if isinstance(line.prompt, str) else line.prompt
    told = system is not None and messages[0].get("role") != "system"
    return [{"role": "system", "content": system}, *messages] if told else messages


def _record(name: str | int, reply: Reply) -> dict[str, Any]:
    """Return a line of the output."""
    if reply.error is not None:
        return {"id": name, "error": reply.error}
    s, said = reply.statistics, reply.message
    record = {"id": name, "text": reply.text, "finish_reason": reply.finish_reason}
    record |= {"thinking": reply.thinking} if reply.thinking else {}
    record |= {"tool_calls": said["tool_calls"]} if reply.tool_calls else {}
    return {**record, "prompt_tokens": s.prompt_tokens + s.reused_tokens, "reply_tokens": s.reply_tokens}
