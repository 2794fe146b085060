"""Texts in one spelling, so that they can be compared, and every mending of them named.

What people call the same text may differ in bytes: in encoding, in how an accent is composed, in letters that nobody sees.
"""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared import LabsError

Text = str | bytes | Sequence[Mapping[str, Any]] | None

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\u202a-\u202e\u2066-\u2069\ufeff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))


def normalise_text(raw: Text) -> tuple[str, list[str]]:
    """(text in one spelling, names of what had to be mended): bytes are decoded, equivalent characters made equal.

    A conversation is the texts of its messages. None, and what is nothing but space, gives "" and the name "empty text".
    Raises LabsError for what is no text.
    """
    named: list[str] = []
    if raw is None:
        return "", ["empty text"]
    if isinstance(raw, bytes | bytearray):
        raw, how = _decoded(bytes(raw))
        named += how
    elif isinstance(raw, Sequence) and not isinstance(raw, str):
        if not all(isinstance(message, Mapping) for message in raw):
            raise LabsError("a list must be a conversation: messages with a role and a content")
        raw = "\n".join(str(message.get("content") or "") for message in raw)
    if not isinstance(raw, str):
        raise LabsError(f"found {type(raw).__name__} instead of a text: name the field that holds the text")
    text = raw
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        named.append("half a character (lone surrogate)")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "\ufffd" in text:
        named.append("character lost earlier (U+FFFD)")
    if _INVISIBLE.search(text):
        named.append("invisible characters")
        text = _INVISIBLE.sub("", text)
    if _CONTROL.search(text):
        named.append("control characters")
        text = _CONTROL.sub(" ", text)
    composed = unicodedata.normalize("NFC", text)
    if composed != text:
        named.append("decomposed letters (not NFC)")
    text = unicodedata.normalize("NFKC", composed)
    if text != composed:
        named.append("compatibility characters (not NFKC)")
    # Case folding may take a text out of its normal form: the Turkish İ becomes an i and a dot.
    text = unicodedata.normalize("NFKC", text.translate(_MINUS).casefold())
    text = " ".join(text.split())
    return text, named if text else [*named, "empty text"]


def _decoded(content: bytes) -> tuple[str, list[str]]:
    """Bytes as text: by their byte order mark, else UTF-8, else Windows-1252, which reads every byte that it has."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if content.startswith(mark):
            text = content[len(mark) :].decode(encoding, "replace")
            return text, ["byte order mark" if encoding == "utf-8" else "UTF-16"]
    try:
        return content.decode("utf-8"), []
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace"), ["not UTF-8, read as Windows-1252"]


def read_texts(path: str | Path, fields: Sequence[str]) -> tuple[list[Text], Counter]:
    """(text of the named fields of every row of a .jsonl or .jsonl.gz file, how its bytes had to be read).

    A field that is null counts as empty. Raises LabsError naming file, row and field.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise LabsError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; check the path") from None
    reading: Counter = Counter()
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        whole, how = _decoded(content)
        reading.update(how)
        content = whole.encode("utf-8", "surrogatepass")
    texts: list[Text] = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        decoded, how = _decoded(line)
        reading.update(how)
        try:
            row = json.loads(decoded)
        except (ValueError, RecursionError):
            raise LabsError(f"{path}, row {number}: not JSON; write one object a line") from None
        if not isinstance(row, dict):
            raise LabsError(f"{path}, row {number}: found {type(row).__name__}, not an object with fields")
        missing = [name for name in fields if name not in row]
        if missing:
            raise LabsError(f"{path}, row {number}: no field {missing[0]!r}; it has {', '.join(map(repr, row))[:200]}")
        parts = []
        for name in fields:
            value = row[name]
            is_talk = isinstance(value, list) and all(isinstance(message, dict) for message in value)
            if value is not None and not isinstance(value, str) and not is_talk:
                raise LabsError(f"{path}, row {number}: field {name!r} is {type(value).__name__}, not a text")
            parts.append("\n".join(str(m.get("content") or "") for m in value) if is_talk else value or "")
        texts.append("\n".join(parts))
    return texts, reading
