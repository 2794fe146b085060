"""Eleven tools in two domains, and people who ask for them in many ways: the data of the tiny profile.

Held out by construction, one by one: *values* (the held-out part of every pool of the tiny world), *phrasings* (sentences
that no training row uses) and *one whole tool*, `sell`, which training neither shows nor calls.

    python tool_world.py        # print a request of every kind
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from shared import tiny_world
from tool_functions import FUNCTIONS
from tool_requests import (
    ALL_TOOLS,
    NOUN_FRAMES,
    NOUN_FRAMES_HELD_OUT,
    VERB_FRAMES,
    VERB_FRAMES_HELD_OUT,
    Asks,
    Tool,
)

DECLINE = "I have no tool for that."
ASK_BACK = "Please tell me the {slot}."
FAILED = "I cannot do that."
CLAUSES = ("how", "what", "when", "where")
STRANGE = 0.25  # share of training's requests in which values are words of any kind


TOOLS: dict[str, Tool] = {tool.name: tool for tool in ALL_TOOLS}
HELD_OUT_TOOL = "sell"
DOMAINS = ("market", "office")


def tool_names(domains: Iterable[str] = DOMAINS) -> list[str]:
    """The tools of these domains that training may use."""
    return [name for name, tool in TOOLS.items() if tool.domain in domains and name != HELD_OUT_TOOL]


def variants(text: str) -> list[str]:
    """Every sentence that a phrasing with `[a|b]` stands for."""
    parts = [part.split("|") for part in re.split(r"\[([^\]]*)\]", text)[1::2]]
    fixed = re.split(r"\[[^\]]*\]", text)
    return ["".join(a + b for a, b in zip(fixed, (*chosen, ""), strict=True)) for chosen in product(*parts)]


def phrasings(asks: Asks, held_out: bool = False) -> list[tuple[str, str]]:
    """Every (frame, what stands in it) of these ways to ask. "What Ida does" alone is no request, so no clause stands bare."""
    nouns, verbs = (NOUN_FRAMES_HELD_OUT, VERB_FRAMES_HELD_OUT) if held_out else (NOUN_FRAMES, VERB_FRAMES)
    return [
        (frame, core)
        for frames, cores in ((nouns, asks.nouns), (verbs, asks.verbs))
        for frame in frames
        for core in cores
        if not (frame.startswith("{}") and core.split()[0] in CLAUSES)
    ]


def _choose(rng: random.Random, text: str) -> str:
    return re.sub(r"\[([^\]]*)\]", lambda found: rng.choice(found[1].split("|")), text)


def _phrase(rng: random.Random, asks: Asks, sentences: Sequence[str], held_out: bool) -> str:
    """A sentence with slots: one of `sentences` or, as often, a noun or verb in a frame."""
    framed = phrasings(asks, held_out)
    if sentences and (not framed or rng.random() < 0.5):
        return _choose(rng, rng.choice(sentences))
    frame, core = rng.choice(framed)
    return _choose(rng, frame).format(_choose(rng, core))


def _large_number(rng: random.Random) -> int:
    """A number of three digits that is not held out.

    Among those up to 99 every seventh is held out, so that some pairs of digits, like the 7 after the 1 of 17, would never
    be seen. Larger numbers have them all.
    """
    while True:
        number = rng.randint(tiny_world.LARGEST + 1, 999)
        if not tiny_world.is_held_out_number(number):
            return number


def _value(rng: random.Random, kind: str, split: str, strange: bool = False) -> Any:
    if strange and kind in (*tiny_world.POOLS, "things"):
        other = rng.choice(list(tiny_world.POOLS))
        return rng.sample(tiny_world.pool(other, split), 2) if kind == "things" else tiny_world.value(rng, other, split)
    if kind == "things":
        return rng.sample(tiny_world.pool("thing", split), 2)
    if kind in ("number", "program"):
        draw = _large_number if strange else lambda rng: tiny_world.value(rng, "number", split)
        return draw(rng) if kind == "number" else f"print({draw(rng)} + {draw(rng)})"
    return tiny_world.value(rng, kind, split)


def _said(argument: Any) -> str:
    """An argument as people say it: a list with "and", a program without its print."""
    if isinstance(argument, list):
        return ", ".join(argument[:-1]) + " and " + argument[-1]
    return re.sub(r"^print\((.*)\)$", r"\1", str(argument))


def request(
    rng: random.Random, tool: Tool, split: str = "train", phrasing: str = "train", without: str | None = None
) -> tuple[str, dict[str, Any]]:
    """(what is said, the call it asks for as {"name", "arguments"}); `without` leaves a required argument out."""
    asks = tool.missing[without] if without else tool.asks
    held_out = phrasing == "held_out" and not without
    text = _phrase(rng, asks, tool.held_out_sentences if held_out else asks.sentences, held_out)
    slots = re.findall(r"{(\w+)}", text)
    # Now and then a word of another kind: what stands in a slot is to be copied, whatever it is.
    strange = phrasing == "train" and split == "train" and rng.random() < STRANGE
    arguments = {slot: _value(rng, kind, split, strange) for slot, kind in tool.slots.items() if slot in slots}
    said = text.format(**{slot: _said(argument) for slot, argument in arguments.items()})
    if text[0] != "{":  # a sentence begins with a capital, unless it begins with a value
        said = said[0].upper() + said[1:]
    return said, {"name": tool.name, "arguments": arguments}


def result(call: dict[str, Any]) -> dict[str, Any]:
    """What the tool gives for a well-formed call of this module's own making, worked out here and not in a sandbox."""
    if call["name"] == "python":
        return {"output": sum(int(number) for number in re.findall(r"\d+", call["arguments"]["program"]))}
    return FUNCTIONS[call["name"]](**call["arguments"])


def spoken_result(call: dict[str, Any], found: dict[str, Any]) -> str:
    """What to say when the tool has given `found`."""
    if "error" in found:
        return FAILED
    given = {f"result_{key}": value for key, value in found.items()}
    return TOOLS[call["name"]].answer.format(**{**found, **call["arguments"], **given})


def accepted(calls: Sequence[dict[str, Any]]) -> list[dict[str, dict[str, list]]]:
    """The calls as the Berkeley leaderboard writes its answers: {name: {argument: [accepted values]}}."""
    return [{call["name"]: {key: [value] for key, value in call["arguments"].items()}} for call in calls]


if __name__ == "__main__":
    dice = random.Random(0)
    for shown in TOOLS.values():
        texts = [*shown.asks.sentences, *(frame.format(core) for frame, core in phrasings(shown.asks))]
        print(f"\n{shown.name} ({shown.domain}): {len({each for text in texts for each in variants(text)})} phrasings")
        said, made = request(dice, shown)
        print(f"  {said}  ->  {json.dumps(made)}")
        if made["name"] != "python":
            found = result(made)
            print(f"  {json.dumps(found)}  ->  {spoken_result(made, found)}")
