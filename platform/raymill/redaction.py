"""Secrets: what looks like one, and how it is kept out of whatever leaves a process: records, messages, logs, MLflow.

One predicate, `is_secret`, decides about a key and its value; a job is refused by it (`find_secrets`) and records are redacted by
it (`redact`). Of a text only the part that looks like a secret is replaced (`redact_text`), so that a message stays a message.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

MIN_VARIABLE_LETTERS = 6
"""Shorter values of secret-looking environment variables are not looked for in text: they would be found in any word."""

_ALWAYS = re.compile(
    r".*(?:password|passwd|passphrase|pwd|secret|credential|(?:api|access|secret|private|account)key"
    r"|(?:access|api|auth|bearer|refresh|session)token)s?"
)
"""A word in a key that says that its value is a secret, whatever kind of value it is."""

_OF_TEXT = {"key", "keys", "token", "tokens", "auth", "authorization", "pat", "dsn"}
"""Last words of keys under which a text is a secret. Numbers and lists are settings: `pad_token: 0`, `keys: [image, label]`."""

_OPENERS = {
    *("access", "account", "api", "auth", "client", "cloud", "decryption", "encryption", "license", "master", "private"),
    *("secret", "service", "session", "shared", "signing", "ssh", "ssl", "storage", "tls", "user"),
}
"""Words that say of a key what it opens. Of another, as of a table, a plain word is a column's name: `label_key: label`."""

_PLAIN_WORD = re.compile(r"(?=.{1,24}$)[a-z]+(?:_[a-z]+)*")
"""What names a column and is no key to anything: those hold digits or capitals, or are longer."""

_ABOUT = {"file", "path", "folder", "length", "column", "columns", "field", "fields", "env", "variable"}
"""Last words of keys that speak of a secret without holding it: `password_file`, `key_columns`."""

_COUNTS = {"num", "max", "min"}
_SIGNATURES = {"sig", "signature"}
_NO_TEXT = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_NO_SECRET = {"", "none", "null", "true", "false", HIDDEN}
_NOT_ENVIRONMENT_SECRETS = {"PWD", "OLDPWD"}

# Lengths are bounded, so that no text takes more than linear time.
_PASSWORD_OF_URI = re.compile(
    r"""(?<=://)([^/\s:@"'<>]{0,256}:)(?!\d+[/?\#]|\*\*\*@)(?:[^\s"'<>/]{1,512}(?=@)|[^\s"'<>@]{1,512}(?=@))"""
)
_USER_OF_WEB_ADDRESS = re.compile(r"""(https?://)(?!\*\*\*@)[^/\s:@"'<>]{1,512}(?=@)""", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer\s+)(?!(?:token|auth)\w*\b)[\w.~+/=-]{1,4096}", re.IGNORECASE)
_NAME = re.compile(r"""(?<![\w.-])([\w.-]{1,100})(\\?["']?(?:\s{0,2}=(?!=)\s{0,2}|:\s{0,2}))""")
_VALUE = re.compile(r"""\\?"(?P<double>[^"\n]*)"?|\\?'(?P<single>[^'\n]*)'?|\{[^}]*\}|[^\s;"'<>]+(?=;)|[^\s&;,"'<>]+""")
_QUOTE = re.compile(r"""(?:\\?["'])?""")
_SCHEME = re.compile(r"(?:basic|bearer|digest|token)\s+", re.IGNORECASE)


def is_secret(key: str, value: Any) -> bool:
    """Whether a value under this key looks like a secret."""
    words = _words(key)
    if not words or value is None or isinstance(value, bool) or words[-1] in _ABOUT:
        return False
    if isinstance(value, str) and value.lower() in _NO_SECRET:
        return False
    if any(_ALWAYS.fullmatch(word) for word in words) and words[0] not in _COUNTS:
        return not isinstance(value, Mapping | Sequence) or bool(value)
    if not isinstance(value, str) or words[-1] not in _OF_TEXT or words[0] in _COUNTS:
        return False
    return words[-1] not in ("key", "keys") or bool(_OPENERS & {*words}) or not _PLAIN_WORD.fullmatch(value)


def find_secrets(values: Any, path: str = "") -> Iterator[str]:
    """The dotted paths of all values that look like secrets, in nested dicts and lists."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list | tuple) else ()
    for key, value in items:
        place = f"{path}.{key}" if path else str(key)
        hidden = isinstance(value, str) and _without_secrets(value) != value
        if hidden or (isinstance(key, str) and is_secret(key, value)):
            yield place
        else:
            yield from find_secrets(value, place)


def redact(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which every value that looks like a secret is "***", and every text is as `redact_text` leaves it.

    For what goes out, never for a record that is read back: a job that holds a secret is refused before there is one.
    """
    return {key: HIDDEN if is_secret(key, value) else _redacted(value) for key, value in values.items()}


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line in which every value that looks like a secret is "***"."""
    shown: list[str] = []
    for argument in arguments:
        option_before = shown[-1] if shown and shown[-1].startswith("-") and "=" not in shown[-1] else ""
        shown.append(HIDDEN if is_secret(option_before, argument) else _redacted_argument(argument))
    return shown


def _redacted_argument(argument: str) -> str:
    names = argument.split("=")
    for count in range(1, len(names)):
        # All that follows the name is the value, spaces and further "=" included: --set=data.password=a b=c
        if is_secret(names[count - 1], _typed("=".join(names[count:]))):
            return "=".join([*names[:count], HIDDEN])
    return redact_text(argument)


# ---------------------------------------------------------------- text


def redact_text(text: str) -> str:
    """The text with "***" for each part that looks like a secret: in addresses, after names, and values of the environment."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    return _without_secrets(text)


def for_people(text: object) -> str:
    """What may be printed of a text that came from a file, an event or an error: no secrets, nothing that steers a terminal."""
    shown = "".join(letter if letter.isprintable() or letter in "\n\t" else "" for letter in str(text))
    return redact_text(shown)


def print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error with its traceback to stderr, without secrets; in the form of `sys.excepthook`."""
    print(redact_text("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


def _environment_secrets() -> list[str]:
    """What stands in the environment under names that look secret, and the passwords in its addresses; the longest first."""
    found = set()
    for name, value in os.environ.items():
        if name not in _NOT_ENVIRONMENT_SECRETS and is_secret(name, _typed(value)):
            found.add(value)
        elif "://" in value:
            for match in _PASSWORD_OF_URI.finditer(value):
                password = match.group()[len(match.group(1)) :]
                found |= {password, unquote(password)}
    return sorted((value for value in found if len(value) >= MIN_VARIABLE_LETTERS), key=lambda value: (-len(value), value))


def _without_secrets(text: str) -> str:
    text = _PASSWORD_OF_URI.sub(rf"\1{HIDDEN}", text)
    text = _USER_OF_WEB_ADDRESS.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    return _without_named_secrets(text)


def _without_named_secrets(text: str) -> str:
    """Hide what stands after a name that says so: `password=x`, `'api_key': 'x'`, `?token=x&sig=y`, `Authorization: Basic x`."""
    shown, done = [], 0
    for name in _NAME.finditer(text):
        if name.start() < done or not _announces_secret(text, name):
            continue
        scheme = _SCHEME.match(text, name.end())
        start = scheme.end() if scheme else name.end()
        value = _VALUE.match(text, start)
        if value is None or not is_secret(_plain_name(name.group(1)), _typed(_unquoted(value))):
            continue
        quote = match.group() if (match := _QUOTE.match(value.group())) else ""
        shown += [text[done:start], quote, HIDDEN, quote]
        done = value.end()
    return "".join([*shown, text[done:]])


def _announces_secret(text: str, name: re.Match[str]) -> bool:
    """Whether a name in a text is that of a value, not a word of a sentence such as `unexpected token: }`."""
    words, separator = _words(name.group(1)), name.group(2)
    if text[max(0, name.start() - 1) : name.start()] in ("?", "&"):
        return True
    if not words or words in (["key"], ["keys"], ["sig"], ["signature"]):
        return False
    if "'" in separator or '"' in separator:
        return True
    if ":" in separator and "." in name.group(1):
        return False  # the place of a problem: "data.password: found a literal secret"
    known = words == ["authorization"] or any(_ALWAYS.fullmatch(word) for word in words)
    return known or (separator == "=" if len(words) == 1 else separator.strip() == "=" or ":" in separator)


def _plain_name(name: str) -> str:
    """The name; one of a signature in an address counts as a key."""
    words = _words(name)
    return f"{name}_key" if words and words[-1] in _SIGNATURES else name


def _unquoted(value: re.Match[str]) -> str:
    inner = value["double"] if value["double"] is not None else value["single"]
    return value.group() if inner is None else inner.rstrip("\\")


def _typed(text: str) -> Any:
    """A text as `is_secret` asks for it: numbers and lists are no texts."""
    if _NO_TEXT.fullmatch(text):
        return float(text)
    return [text] if text.startswith("[") else text


def _words(name: str) -> list[str]:
    """The words of a name, in lower case: dbPassword, X-Amz-Signature, data.api_key."""
    return re.findall(r"[a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())


# ---------------------------------------------------------------- source code


def code_holds_secret(source: bytes) -> bool:
    """Whether a text in the code looks like a secret, by the name it is given or as part of an address."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        nodes = []
    return any(any(find_secrets({name: text})) for node in nodes for name, text in _named_texts(node))


def _named_texts(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(name, text) of each text that a node gives to a name: in an assignment, a call, a dict or as a default."""
    pairs: list[tuple[str, ast.expr | None]] = []
    if isinstance(node, ast.Assign):
        pairs = [(_last_part(target), node.value) for target in node.targets]
    elif isinstance(node, ast.AnnAssign):
        pairs = [(_last_part(node.target), node.value)]
    elif isinstance(node, ast.keyword):
        pairs = [(node.arg or "", node.value)]
    elif isinstance(node, ast.Dict):
        pairs = [
            (str(key.value), value) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)
        ]
    elif isinstance(node, ast.arguments):
        given = [*node.posonlyargs, *node.args][::-1]
        pairs = [(one.arg, value) for one, value in zip(given, node.defaults[::-1], strict=False)]
        pairs += [(one.arg, value) for one, value in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
    for name, value in pairs:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield name or "text", value.value


def _last_part(target: ast.expr) -> str:
    return ast.unparse(target).rpartition(".")[2]
