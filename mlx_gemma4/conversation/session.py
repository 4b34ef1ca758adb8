"""A conversation that continues: messages, and the KV state that has read them.

In: what a user says. Out: events of the reply. The messages decide: before each reply, the state is rewound to what it
shares with them and reads the rest. So undo, retry and edit only change messages and rewind; unchanged text is not
read again.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..chat_format.messages import media_parts
from ..chat_format.replies import Event
from ..chat_format.template import Message
from ..errors import InputError, reason
from ..generation.prefix import MAX_MARKS, thin
from ..kv.file import FORMAT as STATE_MARK
from ..kv.state import KVState, window_bytes
from ..paths import check_source, check_target, whole_file
from .background import OnPrompt, in_thread
from .language_model import LanguageModel
from .parts import name_of, remembered
from .reply import Reply, ReplyOptions, as_held, go_back, prompt_ids, stream

log = logging.getLogger("mlx_gemma4")
FORMAT, VERSION = "mlx-gemma4 conversation", 1
# Bytes that a session's marks may hold; it always keeps four. Undo and retry rewind to them.
_MARK_BYTES = 4_000_000_000


class Session:
    """A conversation with a model. One thread at a time may use it.

    Attributes:
        lm: the model.
        messages: the conversation in OpenAI's form, the system message first if there is one. May be changed.
        options: of replies, if `send` and the others are given none.
        state: what the model has read: less than the messages or more, until the next reply.
        reply: the latest Reply, or None. It grows while events arrive.

    >>> import mlx_gemma4
    >>> session = Session(mlx_gemma4.load(), options=ReplyOptions(max_tokens=8))
    >>> text = "".join(event.text for event in session.send("Tell me a tale."))
    >>> text == session.reply.text == session.messages[-1]["content"]
    True
    >>> session.undo()
    'Tell me a tale.'
    >>> session.messages
    []
    """

    def __init__(
        self,
        lm: LanguageModel,
        system: str | None = None,
        *,
        options: ReplyOptions | None = None,
        messages: Sequence[Message] = (),
        state: KVState | None = None,
        kv: str = "full",
    ) -> None:
        """
        Args:
            system: content of the system message.
            messages: a conversation to continue.
            state: what has been read already; by default a new state.
            kv: kind of keys and values of a new state (see `Model.new_state`).
        """
        self.lm = lm
        self.options = options or ReplyOptions()
        first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = [*first, *(dict(message) for message in messages)]
        self.state = lm.model.new_state(kv=kv) if state is None else state
        self.reply: Reply | None = None

    def send(
        self,
        content: str | Message | Sequence[Message],
        options: ReplyOptions | None = None,
        *,
        on_prompt: OnPrompt | None = None,
    ) -> Generator[Event, None, None]:
        """Say something, and yield the events of the reply. Closing the iterator stops it; what was made is kept.

        If no token is made (an error, or stopped before), the session stays as it was.

        Args:
            content: what the user says, or messages as they are: results of tools (see `messages.tool_result`).
            options: for this reply, instead of the session's.
            on_prompt: called with (tokens read, tokens in all) while the prompt is read.
        """
        new = [{"role": "user", "content": content}] if isinstance(content, str) else content
        new = [new] if isinstance(new, Mapping) else new
        yield from self._reply([*self.messages, *(dict(message) for message in new)], options, on_prompt)

    def undo(self) -> str | None:
        """Remove the user's last message and all that followed; return its content, or None if there is none."""
        at = self._last_user()
        if at is None:
            return None
        said = self.messages[at].get("content")
        if isinstance(said, list | tuple):
            said = "".join(str(part.get("text", "")) for part in said if isinstance(part, Mapping))
        self.messages = self.messages[:at]
        self.rewind()
        return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)

    def retry(
        self, options: ReplyOptions | None = None, *, on_prompt: OnPrompt | None = None
    ) -> Generator[Event, None, None]:
        """Reply again to the same messages. The old reply stays until the new one begins. Raises InputError."""
        messages = list(self.messages)
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        if not any(message.get("role") == "user" for message in messages):
            raise InputError("there is nothing to reply to yet")
        return self._reply(messages, options, on_prompt)

    def edit(
        self, text: str, options: ReplyOptions | None = None, *, on_prompt: OnPrompt | None = None
    ) -> Generator[Event, None, None]:
        """Replace the user's last message by `text`, and reply to it. Raises InputError."""
        at = self._last_user()
        if at is None:
            raise InputError("there is nothing to edit yet")
        return self._reply([*self.messages[:at], {"role": "user", "content": text}], options, on_prompt)

    def asend(
        self,
        content: str | Message | Sequence[Message],
        options: ReplyOptions | None = None,
        *,
        on_prompt: OnPrompt | None = None,
    ) -> AsyncGenerator[Event, None]:
        """As `send`, for `async for`. Leaving or cancelling stops the reply within a token."""
        return in_thread(lambda check: self.send(content, options, on_prompt=check), on_prompt)

    def fork(self) -> Session:
        """Return another session with the same past. Copies no keys or values."""
        messages = copy.deepcopy(self.messages)
        other = Session(self.lm, options=self.options, messages=messages, state=self.state.fork())
        other.reply = self.reply
        return other

    def rewind(self) -> None:
        """Remove from the state what the messages don't hold. Each reply begins with this, too."""
        if self.state.length:
            begun = any(message.get("role") != "system" for message in self.messages)
            ids = prompt_ids(self.lm, self.messages, self.options, reply=False) if begun else []
            go_back(self.state, as_held(self.lm.tokenizer, ids, self.state.tokens))

    def save(self, path: str | Path, *, state: bool = True) -> None:
        """Write the conversation as JSON to `path`, and the KV state to a file beside it, `path` with `.kv` added.

        Of pictures and sounds their names are kept, and what tells them from others. With the KV state a loaded session
        goes on with what it has read of them; what needs them again is refused.

        Args:
            state: write the KV state. Without it, a loaded session reads its messages again.

        Raises:
            InputError: a file can't be written; an existing one is left as it was.
        """
        path = Path(path)
        self.check_place(path)
        saved = {"format": FORMAT, "version": VERSION, "messages": remembered(self.messages, self.lm.media)}
        try:
            with whole_file(path) as file:
                file.write((json.dumps(saved, ensure_ascii=False, indent=1) + "\n").encode())
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{path}: the conversation can't be saved ({reason(error)}); choose another place"
            ) from error
        beside = _state_file(path)
        if state and self.state.length:
            self.lm.model.save_state(self.state, beside)
        else:
            with contextlib.suppress(OSError):
                beside.unlink()

    @staticmethod
    def check_place(path: str | Path) -> None:
        """Raise InputError unless a conversation can be saved there, in place of no files but saved conversations."""
        check_target(Path(path), FORMAT, "conversation")
        check_target(_state_file(Path(path)), STATE_MARK, "conversation's state")

    @classmethod
    def load(
        cls, lm: LanguageModel, path: str | Path, *, options: ReplyOptions | None = None, kv: str = "full"
    ) -> Session:
        """Load what `save` wrote. The KV state is used if its file exists and fits the model.

        Args:
            kv: kind of keys and values of a new state, if none is loaded.

        Raises:
            InputError: the file isn't a conversation.
        """
        path = Path(path)
        check_source(path, "a file that /save, --state or Session.save wrote")
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            what = f"can't be read as a saved conversation ({reason(error)})"
            raise InputError(f"{path}: {what}; give a file that /save, --state or Session.save wrote") from error
        messages = saved.get("messages") if isinstance(saved, dict) and saved.get("format") == FORMAT else None
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise InputError(f"{path}: is not a conversation that was saved here")
        if not all("pieces" in part for part in media_parts(messages)):  # or a file could have others read
            raise InputError(f"{path}: names files of pictures or sounds, which no saved conversation does")
        return cls(lm, options=options, messages=messages, state=_read_state(lm, _state_file(path)), kv=kv)

    @property
    def media(self) -> list[str]:
        """Names of the pictures and sounds in its messages."""
        return [name_of(part) for part in media_parts(self.messages)]

    def close(self) -> None:
        """Release the KV state."""
        self.state.close()

    def _last_user(self) -> int | None:
        return max((i for i, message in enumerate(self.messages) if message.get("role") == "user"), default=None)

    def _reply(
        self, messages: list[dict[str, Any]], options: ReplyOptions | None, on_prompt: OnPrompt | None
    ) -> Generator[Event, None, None]:
        """Yield the events of a reply to `messages`, which become the session's with its first token."""
        chunks = stream(self.lm, messages, options or self.options, state=self.state, on_prompt=on_prompt)
        begun = False
        try:
            for chunk in chunks:
                if not begun:
                    begun, self.reply = True, chunk.reply
                    self.messages = [*messages, chunk.reply.message]
                yield from chunk.events
        finally:
            chunks.close()
            if begun and self.reply:
                self.messages[-1] = self.reply.message
                self.state.mark()  # to rewind to later
                window = window_bytes(self.lm.config, self.state.dtype)
                thin(self.state, min(MAX_MARKS, max(4, _MARK_BYTES // max(window, 1))))


def _state_file(path: Path) -> Path:
    return path.with_name(path.name + ".kv")


def _read_state(lm: LanguageModel, path: Path) -> KVState | None:
    try:
        return lm.model.load_state(path) if path.is_file() else None
    except InputError as error:
        log.warning("%s The conversation is read again instead.", error)
        return None
