"""The exception that users see: a mistake in their input, told in one line."""


class InputError(Exception):
    """The user's input (a file, a flag, a prompt) can't be used.

    `str(error)` is one line: what is wrong with which file or flag, and what to do about it.
    `exit_code` is the command line's: 2 for wrong input, 3 where the machine is too small.
    `field` is the option of `ReplyOptions` that the error is about ("schema", "tools"), if it is about one.
    """

    def __init__(self, message: str, exit_code: int = 2, field: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code, self.field = exit_code, field


class TooLong(InputError):
    """The prompt is longer than the model's context."""


class NoRoom(InputError):
    """The KV budget has no room for this prompt and reply beside the states now in use."""
