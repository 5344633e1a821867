"""Secrets: what looks like one, by its key or as a URI with a password, and how it is kept out of what is written down."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
_SECRET_ENDINGS = {"key", "keys", "token"}
_URI_WITH_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE)
_HIDDEN = "***"


def redact(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which every value that looks like a secret, by its key or as a URI with a password, is "***"."""
    return {key: _HIDDEN if is_secret(key, value) else _redacted(value) for key, value in values.items()}


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    if isinstance(value, str) and _URI_WITH_PASSWORD.search(value):
        return _HIDDEN
    return value


def is_secret(key: str, value: Any) -> bool:
    """Whether a value under this key looks like a secret."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", key).lower())
    if not words or value is None or isinstance(value, bool):
        return False
    # Numbers such as num_key or pad_token are settings; a number under "password" is not.
    return bool(_SECRET_WORDS & set(words)) or (words[-1] in _SECRET_ENDINGS and not isinstance(value, int | float))


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line in which every value that looks like a secret is "***"."""
    shown: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        option_before = shown[-1] if shown and shown[-1].startswith("-") and "=" not in shown[-1] else ""
        if equals and is_secret(name, value):
            shown.append(f"{name}={_HIDDEN}")
        elif is_secret(option_before, argument):
            shown.append(_HIDDEN)
        else:
            shown.append(_redacted(argument))
    return shown


def find_secrets(values: Any, path: str = "") -> Iterator[str]:
    """The dotted paths of all values that look like secrets, in nested dicts and lists."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        place = f"{path}.{key}" if path else str(key)
        if (isinstance(value, str) and _URI_WITH_PASSWORD.search(value)) or (
            isinstance(value, str | int) and isinstance(key, str) and is_secret(key, value)
        ):
            yield place
        yield from find_secrets(value, place)
