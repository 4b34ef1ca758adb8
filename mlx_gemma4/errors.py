"""The exception that users see: a mistake in their input, told in one line; and text from elsewhere made harmless."""

import json

MOST = 480  # characters of an error; what it quotes of a file or a server may be of any length
_CONTROLS = {c: "\N{REPLACEMENT CHARACTER}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
_CONTROLS[ord("\r")] = ""


def printable(text: str) -> str:
    """Replace control characters, except line ends and tabs, so that no text can move the cursor or do worse."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """Return a text as one line that can be shown anywhere, its middle left out if it is long."""
    head, tail = text[: 2 * MOST], text[-2 * MOST :]  # not all of what may be megabytes
    line = printable(" ".join((head if len(text) <= 2 * MOST else f"{head} {tail}").split()))
    return line if len(line) <= MOST else f"{line[: MOST // 2]} ... {line[5 - MOST // 2 :]}"


def reason(error: BaseException) -> str:
    """Return in words why a file can't be read or written."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, UnicodeError):
        return "not text in UTF-8"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__


class InputError(Exception):
    """The user's input (a file, a flag, a prompt) can't be used.

    `str(error)` is one line: what is wrong with which file or flag, and what to do about it.
    `exit_code` is the command line's: 2 for wrong input, 3 where the machine is too small.
    `field` is the option of `ReplyOptions` that the error is about ("schema", "tools"), if it is about one.
    """

    def __init__(self, message: str, exit_code: int = 2, field: str | None = None) -> None:
        super().__init__(one_line(message))
        self.exit_code, self.field = exit_code, field


class TooLong(InputError):
    """The prompt is longer than the model's context."""


class NoRoom(InputError):
    """The KV budget has no room for this prompt and reply beside the states now in use."""
