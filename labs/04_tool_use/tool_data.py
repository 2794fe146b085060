"""Conversations about tools: the generated ones, and the form that every data set is brought into.

A row is {"id", "kind", "messages", "tools", "accepted"}: a conversation whose last message is the assistant's, the tools
shown in it (OpenAI's JSON schema), and the calls that count as right in the Berkeley leaderboard's form (none where no call
is right). Kinds: `single`, `parallel` (several calls at once), `missing` (a required argument is not given: ask for it),
`no_tool` (none of the tools shown can do it: say so), `direct` (the answer stands in the request: no tool is needed) and
`answer` (the tools have given their results: tell them).

    python tool_data.py         # print a row of every kind
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shared import LabsError, tiny_world
from tool_world import (
    ASK_BACK,
    DECLINE,
    DOMAINS,
    HELD_OUT_TOOL,
    TOOLS,
    Tool,
    accepted,
    request,
    result,
    spoken_result,
    tool_names,
)

KINDS = {"single": 0.40, "parallel": 0.32, "missing": 0.13, "no_tool": 0.12, "direct": 0.03}  # of training's turns
TEST_KINDS = {"single": 0.75, "parallel": 0.25, "missing": 0.45, "no_tool": 0.45, "direct": 0.1}
HELD_OUT = {word for kind in tiny_world.POOLS for word in tiny_world.pool(kind, "held_out")}
CALL_KINDS = ("single", "parallel")
NO_CALL_KINDS = ("missing", "no_tool", "direct")
TEST_PARTS = ("values", "phrasings", "tool", "irrelevance", "answers")
DRILL_LISTS = 0.4  # share of the drill that shows tools
MOST_TURNS = 2  # of a training conversation: the tools are read once, and asked for more than once
ASKS_IN_VAIN = ("I want to {purpose}.", "Help me to {purpose}.", "Can you {purpose}?", "Please {purpose}.")


def tool_calls(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The assistant's message that makes these calls."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": dict(c)} for c in calls],
    }


def schemas(names: Sequence[str]) -> list[dict[str, Any]]:
    """The tools of these names in OpenAI's form."""
    return [TOOLS[name].schema() for name in names]


def _with_talk(rng: random.Random, text: str) -> str:
    if rng.random() < 0.85:
        return text
    talk = rng.choice(tiny_world.SMALL_TALK).format(thing=rng.choice(tiny_world.pool("thing", "train")))
    return f"{talk} {text}" if rng.random() < 0.6 else f"{text} {talk}"


def _holds_held_out(text: str) -> bool:
    """Whether a word of the text, or a number, is held out from training."""
    words = re.findall(r"\w+", text)
    return any(tiny_world.is_held_out_number(int(word)) if word.isdecimal() else word in HELD_OUT for word in words)


def _join(rng: random.Random, first: str, second: str) -> str:
    """Two requests in one message: one after the other, or joined in one sentence."""
    if rng.random() < 0.6 or first[-1] == "?":
        return f"{first} {second}"
    begin, space, rest = second.partition(" ")
    begin = begin if begin == "I" or begin in tiny_world.KNOWN_VALUES else begin.lower()
    return f"{first[:-1]} and {begin}{space}{rest}"


def _in_one_sentence(rng: random.Random, tool: Tool, split: str, phrasing: str) -> tuple[str, dict[str, Any]]:
    """A request for the tool that is one sentence: two of two sentences each, side by side, would be a riddle."""
    said, call = request(rng, tool, split, phrasing)
    while re.search(r"[.?] ", said):
        said, call = request(rng, tool, split, phrasing)
    return said, call


def _turn(
    rng: random.Random, kind: str, split: str, phrasing: str, shown: Sequence[str], absent: Sequence[str]
) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(what the user says, the assistant's right message, its calls) with the tools `shown`; those `absent` are not."""
    if kind == "direct":
        asked = tiny_world.question(rng, split)
        while split == "train" and _holds_held_out(asked["prompt"]):  # lab 00's facts may tell one such value
            asked = tiny_world.question(rng, split)
        return asked["prompt"], {"role": "assistant", "content": asked["brief"]}, []
    if kind == "no_tool":
        if absent and rng.random() < 0.7:
            said, _ = request(rng, TOOLS[rng.choice(absent)], split, phrasing)
        else:
            name = rng.choice(tiny_world.pool("name", split))
            said = rng.choice(ASKS_IN_VAIN).format(purpose=rng.choice(tiny_world.PURPOSES)[1].format(name=name))
        return _with_talk(rng, said), {"role": "assistant", "content": DECLINE}, []
    tool = TOOLS[rng.choice(shown)]
    if kind == "missing":
        slot = rng.choice(list(tool.missing))
        said, _ = request(rng, tool, split, phrasing, without=slot)
        return _with_talk(rng, said), {"role": "assistant", "content": ASK_BACK.format(slot=slot)}, []
    ask = _in_one_sentence if kind == "parallel" else request
    said, call = ask(rng, tool, split, phrasing)
    calls = [call]
    while kind == "parallel" and len(calls) == 1:
        # Half of the pairs ask the same tool twice: then only the values tell the calls apart.
        more, other = ask(rng, tool if rng.random() < 0.5 else TOOLS[rng.choice(shown)], split, phrasing)
        if other != call:
            said, calls = _join(rng, said, more), [call, other]
    return _with_talk(rng, said), tool_calls(calls), calls


def _told(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What follows calls: each tool's result, and the assistant's answer."""
    found = [result(call) for call in calls]
    said = " ".join(spoken_result(call, its) for call, its in zip(calls, found, strict=True))
    return [*({"role": "tool", "content": json.dumps(its)} for its in found), {"role": "assistant", "content": said}]


def conversation(
    rng: random.Random, kinds: Sequence[str], split: str = "train", phrasing: str = "train", domain: str = DOMAINS[0],
    others: Sequence[str] = DOMAINS, id: str = "", answered: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A generated row with a turn of each of these kinds; values and phrasing each from their own part.

    All of the domain's tools are shown, in any order; what no tool can do is asked of the domains `others`.
    A turn of calls is followed by the results and the answer unless it is the last; with `answered` the last is, too, and the
    row's kind is then `answer`. Raises LabsError for an unknown kind or domain.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise LabsError(f"no turns of kind {min(unknown)!r}: choose from {', '.join(KINDS)}")
    if domain not in DOMAINS:
        raise LabsError(f"no tools of domain {domain!r}: choose from {', '.join(DOMAINS)}")
    shown = tool_names((domain,))
    absent = [name for name in tool_names(others) if name not in shown]
    rng.shuffle(shown)
    messages: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for index, kind in enumerate(kinds):
        said, reply, calls = _turn(rng, kind, split, phrasing, shown, absent)
        messages += [{"role": "user", "content": said}, reply]
        if calls and (index < len(kinds) - 1 or answered):
            messages += _told(calls)
    kind = "answer" if answered else kinds[-1]
    right = [] if answered else accepted(calls)
    return {"id": id, "kind": kind, "messages": messages, "tools": schemas(shown), "accepted": right}


def training_rows(
    n: int, seed: int = 0, domains: Sequence[str] = DOMAINS, kinds: Mapping[str, float] = KINDS, most_turns: int = MOST_TURNS,
    id: str = "train",
) -> list[dict[str, Any]]:  # fmt: skip
    """`n` training conversations, each in one of these domains and each kind of turn in proportion to its weight.

    Of other domains nothing is said: an adapter of one domain does not learn to decline what another is for.
    """
    rng = random.Random(f"{id} rows {seed} {' '.join(domains)}")
    rows = []
    for index in range(n):
        turns = rng.choices(list(kinds), list(kinds.values()), k=rng.randint(1, most_turns))
        domain, told = rng.choice(list(domains)), rng.random() < 0.2 and turns[-1] in CALL_KINDS
        rows.append(conversation(rng, turns, domain=domain, others=domains, id=f"{id}_{index}", answered=told))
    return rows


def drill_rows(n: int, seed: int = 0, domains: Sequence[str] = DOMAINS) -> list[dict[str, Any]]:
    """`n` short rows of one turn, most of them without a list of tools: what a request means, learnt at half the price.

    Where no list is shown nothing depends on one, so there are no rows of kind `no_tool`. The share `DRILL_LISTS` has the list
    and every kind: whether to call at all is learnt from the beginning.
    """
    lists = round(DRILL_LISTS * n)
    kinds = {kind: weight for kind, weight in KINDS.items() if kind != "no_tool"}
    bare = training_rows(n - lists, seed, domains, kinds, most_turns=1, id="drill")
    return [{**row, "tools": []} for row in bare] + training_rows(lists, seed, domains, most_turns=1, id="drill_list")


def markup_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` rows that teach how a call is written and nothing of what people ask: a list of names and values becomes calls.

    For models whose vocabulary has the marks of a call but has never used them, so that their embeddings say nothing.
    """
    rng = random.Random(f"markup rows {seed}")
    rows = []
    for index in range(n):
        calls = [request(rng, TOOLS[rng.choice(tool_names())])[1] for _ in range(rng.choice((1, 1, 2)))]
        lines = [
            " ".join([call["name"], *(f"{slot} {value}" for slot, value in call["arguments"].items())])
            for call in calls
        ]
        messages = [{"role": "user", "content": ". ".join(lines)}, tool_calls(calls)]
        rows.append(
            {"id": f"markup_{index}", "kind": "single", "messages": messages, "tools": [], "accepted": accepted(calls)}
        )
    return rows


def test_rows(n: int, part: str = "values", domains: Sequence[str] = DOMAINS, seed: int = 0) -> list[dict[str, Any]]:
    """`n` rows of one turn to be judged on, the same for every training seed. All have held-out values throughout.

    `part`: "values" (calls asked for in training's words), "phrasings" (in sentences that training never uses), "tool" (calls
    of the tool that training never shows), "irrelevance" (no call is right), "answers" (results are to be told). Raises
    LabsError for another.
    """
    if part not in TEST_PARTS:
        raise LabsError(f"no test part {part!r}: choose from {', '.join(TEST_PARTS)}")
    rng = random.Random(f"held-out tool rows {part} {' '.join(domains)} {seed}")
    if part == "tool":
        return [_held_out_tool(rng, f"tool_{index}") for index in range(n)]
    kinds = NO_CALL_KINDS if part == "irrelevance" else CALL_KINDS
    phrasing, answered = "held_out" if part == "phrasings" else "train", part == "answers"
    rows: list[dict[str, Any]] = []
    for kind in rng.choices(kinds, [TEST_KINDS[kind] for kind in kinds], k=n):
        domain, made = rng.choice(list(domains)), None
        # "Where can I find it?" asks for something, but holds no value: training may ask it in the same words.
        while made is None or (kind == "missing" and not _holds_held_out(made["messages"][0]["content"])):
            made = conversation(rng, [kind], "held_out", phrasing, domain, domains, f"{part}_{len(rows)}", answered)
        rows.append(made)
    return rows


def _held_out_tool(rng: random.Random, id: str) -> dict[str, Any]:
    """A request that the tool never trained on serves, shown among those of its domain."""
    tool = TOOLS[HELD_OUT_TOOL]
    shown = [*tool_names((tool.domain,)), tool.name]
    rng.shuffle(shown)
    said, call = request(rng, tool, "held_out")
    messages = [{"role": "user", "content": said}, tool_calls([call])]
    return {"id": id, "kind": "single", "messages": messages, "tools": schemas(shown), "accepted": accepted([call])}


def encode(row: Mapping[str, Any], tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the conversation, and a loss mask that is 1 on what the assistant says, the end of its turn included.

    A turn is the difference between the conversation with it and the conversation before it with the generation prompt: this
    holds for every chat template that goes on from its generation prompt. Raises LabsError for one that does not.
    """
    ids: list[int] = []
    mask: list[int] = []
    text = ""
    for index, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        before, after = row["messages"][:index], row["messages"][: index + 1]
        prompt = tokenizer.apply_chat_template(
            before, tools=row["tools"] or None, add_generation_prompt=True, tokenize=False
        )
        whole = tokenizer.apply_chat_template(after, tools=row["tools"] or None, tokenize=False).rstrip("\n")
        if not (prompt.startswith(text) and whole.startswith(prompt)):
            raise LabsError("this chat template rewrites earlier turns: train on conversations of one turn")
        for piece, counts in ((prompt[len(text) :], 0), (whole[len(prompt) :], 1)):
            new = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += new
            mask += [counts] * len(new)
        text = whole
    return ids, mask


if __name__ == "__main__":
    dice = random.Random(1)
    for kind in KINDS:
        made = conversation(dice, [kind], domain=dice.choice(DOMAINS), answered=kind in CALL_KINDS)
        print(f"\n[{kind}] tools: {', '.join(tool['function']['name'] for tool in made['tools'])}")
        for message in made["messages"]:
            calls = [call["function"] for call in message.get("tool_calls", [])]
            print(f"  {message['role']:<9} {message['content'] or json.dumps(calls)}")
