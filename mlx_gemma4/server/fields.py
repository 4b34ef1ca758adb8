"""A request's fields, read one by one; the first that is wrong is named.

In: a JSON object. Out: checked values, or an ApiError (400) whose `param` is the field's path, as
`messages[0].content`. Null is the same as absent. What was never asked for is unknown, and `log_unknown` says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from .wire import ApiError

log = logging.getLogger(__name__)


class Fields:
    """A JSON object and where it stands in the request."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values, self.path = values, path
        self._known: set[str] = set()

    def wrong(self, name: str, message: str, code: str | None = None) -> ApiError:
        """An error about a field; `message` follows its name."""
        path = self._path(name)
        return ApiError(400, f"{path} {message}", path, code)

    def get(self, name: str) -> Any:
        """A field as it is; None where absent."""
        self._known.add(name)
        return self.values.get(name)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        # A whole number of JSON may be longer than any float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(name, f"must be a number {_between(low, high)}, not {_shown(value)}")
        return float(value)

    @overload
    def integer(self, name: str, low: int, high: int, default: int) -> int: ...
    @overload
    def integer(self, name: str, low: int, high: int, default: None = None) -> int | None: ...
    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"must be a whole number {_between(low, high)}, not {_shown(value)}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, f"must be true or false, not {_shown(value)}")
        return value

    @overload
    def text(self, name: str, default: str) -> str: ...
    @overload
    def text(self, name: str, default: None = None) -> str | None: ...
    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, f"must be a string, not {_shown(value)}")
        return value

    def one_of(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """A string among `choices`; without a default the field must be there."""
        value = self.text(name, default)
        if value is None:
            raise self.wrong(name, "is missing")
        if value not in choices:
            raise self.wrong(name, f"must be one of {', '.join(choices)}, not {_shown(value)}", "unsupported_value")
        return value

    def needed(self, name: str) -> Any:
        """A field that must be there."""
        value = self.get(name)
        if value is None:
            raise self.wrong(name, "is missing", "missing_required_parameter")
        return value

    def within(self, name: str) -> Fields | None:
        """An object's fields."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, f"must be an object, not {_shown(value)}")
        return Fields(value, self._path(name))

    def items(self, name: str) -> list[Any]:
        """A list's items; empty where absent."""
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, f"must be a list, not {_shown(value)}")
        return value

    def objects(self, name: str) -> Iterator[Fields]:
        """A list's items, which must be objects."""
        for i, item in enumerate(self.items(name)):
            if not isinstance(item, dict):
                raise self.wrong(f"{name}[{i}]", f"must be an object, not {_shown(item)}")
            yield Fields(item, self._path(f"{name}[{i}]"))

    def log_unknown(self) -> None:
        """A line in the log about fields that nobody asked for."""
        unknown = [self._path(name) for name in self.values if name not in self._known]
        if unknown:
            shown = ", ".join(f"{name!r:.60}" for name in unknown[:10])
            log.warning("Ignored %d unknown field(s) of a request: %s", len(unknown), shown)

    def _path(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _between(low: float, high: float) -> str:
    return f"from {low} to {high}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > 1e15:
        return "a number that large"
    return f"{value!r:.60}"
