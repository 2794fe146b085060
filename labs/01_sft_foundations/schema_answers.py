"""Is an answer in the schema that was asked for, and is every value right? JSON and XML, read by real parsers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

LONGEST_ANSWER = 10_000  # characters; a model that rambles is not worth a parser's time


@dataclass(frozen=True)
class SchemaResult:
    """`valid`: parses, and has the keys and kinds of value asked for. `right`: valid, and every value is right."""

    valid: bool
    right: bool
    reason: str


def json_schema(values: Mapping[str, Any]) -> dict:
    """The JSON Schema of an answer that holds exactly these keys, each with the kind of value that it has here."""
    kinds = {key: {"type": "integer" if isinstance(value, int) else "string"} for key, value in values.items()}
    return {"type": "object", "properties": kinds, "required": list(values), "additionalProperties": False}


def check_answer(text: str, style: str, values: Mapping[str, Any]) -> SchemaResult:
    """Check one answer. `style` is "JSON" or "XML" (children of one <record>); `values` are the right ones.

    The whole text must be the answer: words around it are not in the schema. Raises ValueError for another style.
    """
    ### BEGIN SOLUTION
    if style not in ("JSON", "XML"):
        raise ValueError(f"style {style!r}: choose JSON or XML")
    if len(text) > LONGEST_ANSWER:
        return SchemaResult(False, False, "too long")
    parsed, reason = (_read_json if style == "JSON" else _read_xml)(text, values)
    if parsed is None:
        return SchemaResult(False, False, reason)
    wrong = [key for key, value in values.items() if parsed[key] != value]
    return SchemaResult(True, not wrong, f"wrong value for {wrong[0]}" if wrong else "right")
    ### END SOLUTION


def _read_json(text: str, values: Mapping[str, Any]) -> tuple[dict | None, str]:
    import jsonschema

    try:
        parsed = json.loads(text)
        jsonschema.validate(parsed, json_schema(values))
    except (json.JSONDecodeError, RecursionError):
        return None, "not JSON"
    except jsonschema.ValidationError as error:
        return None, error.message
    return parsed, ""


def _read_xml(text: str, values: Mapping[str, Any]) -> tuple[dict | None, str]:
    if "<!" in text:  # an answer needs no document type, and entity bombs are made of them
        return None, "declarations are not allowed"
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None, "not XML"
    if root.tag != "record" or sorted(child.tag for child in root) != sorted(values):
        return None, "other elements than asked for"
    parsed: dict[str, Any] = {}
    for child in root:
        content = (child.text or "").strip()
        if len(child) or not content:
            return None, f"<{child.tag}> must hold a value"
        if isinstance(values[child.tag], int):
            if not (content.isascii() and content.isdigit()):
                return None, f"<{child.tag}> must be a number"
            parsed[child.tag] = int(content)
        else:
            parsed[child.tag] = content
    return parsed, ""


def score(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[SchemaResult]:
    """`check_answer` for each text against its row ({"format", "values"})."""
    return [check_answer(text, row["format"], row["values"]) for text, row in zip(texts, rows, strict=True)]


def enforced_answers(
    continue_texts: Callable[[Sequence[int], Sequence[str]], Sequence[str]], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Answers that are valid by construction: the program writes keys and punctuation, the model only the values.

    `continue_texts(row numbers, prefixes)` returns what the model writes after each prefix, the answer so far; it is cut
    where the value ends. This is the idea behind grammar-constrained decoding, without the grammar. Only the form is
    enforced: `rows` give their "format" and the keys and kinds of their "values", and no value is looked at.
    """
    filled: list[dict[str, Any]] = [{} for _ in rows]
    for position in range(max((len(row["values"]) for row in rows), default=0)):
        chosen = [index for index, row in enumerate(rows) if position < len(row["values"])]
        keys = [list(rows[index]["values"])[position] for index in chosen]
        numbers = [isinstance(rows[index]["values"][key], int) for index, key in zip(chosen, keys, strict=True)]
        prefixes = []
        for index, key, is_number in zip(chosen, keys, numbers, strict=True):
            if rows[index]["format"] == "XML":
                prefixes.append(_write("XML", filled[index]).removesuffix("</record>") + f"<{key}>")
            else:
                before = _write("JSON", filled[index]).removesuffix("}") + (", " if filled[index] else "")
                prefixes.append(f'{before}"{key}": ' + ("" if is_number else '"'))
        texts = continue_texts(chosen, prefixes)
        for index, key, is_number, text in zip(chosen, keys, numbers, texts, strict=True):
            if is_number:
                digits = re.match(r"\s*([0-9]{1,9})", text)
                filled[index][key] = int(digits[1]) if digits else 0
            else:  # an XML element must hold something
                filled[index][key] = re.split('[<"\n]', text, maxsplit=1)[0].strip() or "?"
    return [_write(row["format"], values) for row, values in zip(rows, filled, strict=True)]


def _write(style: str, values: Mapping[str, Any]) -> str:
    if style == "JSON":
        return json.dumps(values)
    return "<record>" + "".join(f"<{key}>{escape(str(value))}</{key}>" for key, value in values.items()) + "</record>"
