"""The text between `<|start|>` and `<|message|>`: role, recipient, channel and content type."""

import re
from dataclasses import dataclass
from typing import get_args

from gptoss_jax.text.harmony.messages import ROLES, Role

_CHANNEL = "<|channel|>"
_CONSTRAIN = "<|constrain|>"
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
_CHANNEL_END = re.compile(f"[{_SPACE}<]")
_EDGES = re.compile(f"^[{_SPACE}]+|[{_SPACE}]+$")
_WORD = re.compile(r"[^\t\n\x0c\r ]+")  # separated by ASCII whitespace


@dataclass(frozen=True)
class Header:
    """The fields of a header.

    `malformed` lists violations of the format. `rest` holds the words that are content, not header. `written` is the
    header's text, or None where the text includes content.
    """

    role: Role
    name: str | None = None
    recipient: str | None = None
    channel: str | None = None
    content_type: str | None = None
    rest: str = ""
    malformed: tuple[str, ...] = ()
    written: str | None = None


def read_header(text: str, role: Role | None, *, fields: bool = True) -> Header:
    """Reads a header as openai-harmony does; where openai-harmony raises, reads as much as possible.

    `role` is the role announced by the prompt, if any; the header may repeat it. Without `fields` the words after role
    and channel are content, as in a message that lacks `<|message|>`.
    """
    malformed: list[str] = []
    written = text if fields else None
    channel, text = _take_channel(text, malformed)
    text = text.replace(_CONSTRAIN, f" {_CONSTRAIN}")
    words = _WORD.findall(_EDGES.sub("", text))
    role, name = _take_role(words, role, malformed)
    recipient = content_type = None
    if fields and words:
        if len(words) > 2:
            recipient, content_type = _take_marked(words, malformed)
        else:
            recipient, content_type = _take_fields(words, malformed)
    return Header(role, name, recipient, channel, content_type, " ".join(words), tuple(malformed), written)


def _take_channel(text: str, malformed: list[str]) -> tuple[str | None, str]:
    before, mark, after = text.partition(_CHANNEL)
    if not mark:
        return None, text
    end = _CHANNEL_END.search(after)
    value = after[: end.start()] if end else after
    if not value:
        malformed.append("header: <|channel|> without a channel")
    return value or None, before + after[len(value) :]


def _take_role(words: list[str], role: Role | None, malformed: list[str]) -> tuple[Role, str | None]:
    name: str | None = None
    if role is None:
        first = words[0] if words else ""
        base, colon, author = first.partition(":")
        if first in ROLES:
            role = _role(first)
        elif len(words) == 1 and colon and base in ROLES and base != "tool":
            words.pop(0)
            return _role(base), author
        elif not words:
            malformed.append("header: no role")
            return "assistant", None
        else:
            if len(words) == 1 and not first.startswith("to="):
                malformed.append(f"header: unknown role {shorten(first)}, read as a tool's name")
            words.pop(0)
            role = "tool"
        name = first if role == "tool" else None
    if words and words[0] == role:
        words.pop(0)
    return role, name


def _role(word: str) -> Role:
    return next(role for role in get_args(Role) if role == word)


def _take_fields(words: list[str], malformed: list[str]) -> tuple[str | None, str | None]:
    """Recipient and content type from at most two words, in this order."""
    last = words.pop()
    if last.startswith("to="):
        recipient, content_type = last, None
        if words:
            malformed.append(f"header: unexpected {shorten(words.pop())} before the recipient")
    elif words:
        recipient, content_type = words.pop(), last
    else:
        recipient, content_type = last, None
    if not recipient.startswith("to="):
        malformed.append(f"header: recipient {shorten(recipient)} without to=")
    return recipient.removeprefix("to="), content_type


def _take_marked(words: list[str], malformed: list[str]) -> tuple[str | None, str | None]:
    """Recipient and content type from more words than a header has: only to=NAME and <|constrain|>TYPE are used."""
    recipient = next((word for word in words if word.startswith("to=")), None)
    content_type = next((word for word in words if word.startswith(_CONSTRAIN)), None)
    others = [word for word in words if not (word is recipient or word is content_type)]
    if others:
        malformed.append(f"header: unexpected {shorten(' '.join(others))}")
    words.clear()
    return recipient and recipient.removeprefix("to="), content_type


def shorten(text: str, limit: int = 60) -> str:
    """`text` in quotes, truncated to `limit` characters for error lines, because model output can be of any length."""
    return repr(text if len(text) <= limit else text[:limit] + "...")
