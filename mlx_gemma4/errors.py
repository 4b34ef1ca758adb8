"""The one exception that reaches people: a mistake in what was given, said in one line."""

from __future__ import annotations


class InputError(Exception):
    """What the user gave (a file, a flag, a prompt) can't be used.

    `str(error)` is one line: what is wrong with which file or flag, and what to do about it.
    `exit_code` is what the command line exits with: 2 for wrong input, 3 where the machine is too small.
    `field` is the option of `ReplyOptions` that the error is about ("schema", "tools"), if it is about one.
    """

    def __init__(self, message: str, exit_code: int = 2, field: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code, self.field = exit_code, field


class TooLong(InputError):
    """A prompt that the model's context has no room for."""


class NoRoom(InputError):
    """A prompt and reply that the KV budget has no room for beside the states now in use."""
