"""The eleven tools: what is held out is held out by construction, requests fit their tools, results are those of the tools."""

import random
import re
from dataclasses import replace

import pytest

import tool_functions
import tool_world
from function_calls import argument_problems, check_calls, check_tools
from shared import tiny_world
from tool_runner import run_tool, sandbox_problem
from tool_world import (
    DOMAINS,
    FAILED,
    HELD_OUT_TOOL,
    TOOLS,
    accepted,
    phrasings,
    request,
    result,
    spoken_result,
    tool_names,
    variants,
)

TRAINED = tool_names()
SCHEMAS = [tool.schema() for tool in TOOLS.values()]


def draws(n=150, names=TRAINED, **options):
    """(tool, what is said, call) of `n` requests for each of these tools."""
    for name in names:
        rng = random.Random(f"draws {name}")
        for _ in range(n):
            yield TOOLS[name], *request(rng, TOOLS[name], **options)


# ------------------------------------------------------------------------------------------------------------- the tools


def test_ten_tools_in_two_domains_and_one_that_training_does_not_have():
    assert len(TRAINED) == 10 and len(TOOLS) == 11 and DOMAINS == ("market", "office")
    assert [len(tool_names((domain,))) for domain in DOMAINS] == [5, 5]
    assert set(TOOLS) - set(TRAINED) == {HELD_OUT_TOOL} == {"sell"}
    assert HELD_OUT_TOOL not in tool_names((TOOLS[HELD_OUT_TOOL].domain,))
    assert tool_names(()) == []


def test_the_schemas_are_openais():
    check_tools(SCHEMAS)
    for tool in TOOLS.values():
        parameters = tool.schema()["function"]["parameters"]
        assert list(parameters["properties"]) == list(tool.slots)
        assert set(parameters["required"]) | set(tool.optional) == set(tool.slots)
        assert not set(parameters["required"]) & set(tool.optional)
    buy = TOOLS["buy"].schema()["function"]["parameters"]
    assert {name: schema["type"] for name, schema in buy["properties"].items()} == {
        "thing": "string", "count": "integer", "colour": "string",
    }  # fmt: skip
    assert TOOLS["shop"].schema()["function"]["parameters"]["properties"]["things"]["items"] == {"type": "string"}


def test_every_tool_can_run_and_every_function_has_its_tool():
    assert set(tool_functions.FUNCTIONS) == set(TOOLS) - {"python"}


# ------------------------------------------------------------------------------------------------------------- phrasings


def test_variants_are_all_combinations_and_no_other():
    assert variants("Say it.") == ["Say it."]
    assert variants("[Tell|Show] me {}[, please|].") == [
        "Tell me {}, please.", "Tell me {}.", "Show me {}, please.", "Show me {}.",
    ]  # fmt: skip
    assert variants("[a|b|c]") == ["a", "b", "c"]
    assert variants("[|a] b[c]") == [" bc", "a bc"]


def in_both(train, held_out, form):
    """The held-out sentences that are among training's, in one form."""
    return {form(text) for text in held_out} & {form(text) for text in train}


def words_alone(text):
    return " ".join(re.findall(r"[a-z]+|{}", text))


def test_no_held_out_sentence_is_among_trainings(sentences):
    train = {text for group in (sentences.train, sentences.missing) for texts in group.values() for text in texts}
    held_out = {text for texts in sentences.held_out.values() for text in texts}
    assert len(train) > 2000 and len(held_out) > 200
    assert min(map(len, sentences.held_out.values())) >= 4  # of every tool
    # Nor where the case, the slots and the marks are others.
    forms = (str.casefold, sentences.hollow, lambda text: words_alone(sentences.hollow(text)))
    for form in forms:
        assert in_both(train, held_out, form) == set()
    for name, planted in (
        ("buy", "there are no {thing}, so [have|get] {count}."),  # among others, and in small letters
        ("weather", "In {town}, is the weather good?"),
        ("message", "On {day} {name} needs a message."),
    ):
        asks = replace(TOOLS[name].asks, sentences=(*TOOLS[name].asks.sentences, planted))
        assert in_both(sentences.of(asks, asks.sentences), held_out, str.casefold)
    marked = sentences.of(TOOLS["price"].asks, ("In {town} for how much does one get {thing}",))
    assert [bool(in_both(marked, held_out, form)) for form in forms] == [False, False, True]


@pytest.mark.parametrize("kind", ["NOUN_FRAMES", "VERB_FRAMES"])
def test_a_held_out_frame_in_training_would_be_seen(sentences, monkeypatch, kind):
    held_out = {text for texts in sentences.held_out.values() for text in texts}
    frame = getattr(tool_world, f"{kind}_HELD_OUT")[2]
    monkeypatch.setattr(tool_world, kind, (*getattr(tool_world, kind), frame.lower()))
    name = "weather" if kind == "NOUN_FRAMES" else "buy"
    assert in_both(sentences.of(TOOLS[name].asks, ()), held_out, str.casefold)


def kinds_said(name, text):
    """The sentence with the kind of value for each slot's name: what a reader can tell apart."""
    kinds = TOOLS[name].slots
    return re.sub(r"{(\w+)}", lambda slot: f"{{{kinds[slot[1]]}}}", text).casefold()


def test_a_sentence_belongs_to_one_tool(sentences):
    """Or the right call could not be told from the request."""
    owner = {}
    for group in (sentences.train, sentences.held_out):
        for name, texts in group.items():
            for text in texts:
                assert owner.setdefault(kinds_said(name, text), name) == name, text


def test_what_must_be_given_is_said_and_what_is_missing_is_not(sentences):
    for group in (sentences.train, sentences.held_out):
        for name, texts in group.items():
            required = {slot for slot in TOOLS[name].slots if slot not in TOOLS[name].optional}
            for text in texts:
                slots = re.findall(r"{(\w+)}", text)
                assert required <= set(slots) <= set(TOOLS[name].slots) and len(set(slots)) == len(slots), text
    for (name, missing), texts in sentences.missing.items():
        assert missing in TOOLS[name].slots and missing not in TOOLS[name].optional
        for text in texts:
            slots = set(re.findall(r"{(\w+)}", text))
            assert missing not in slots and slots <= set(TOOLS[name].slots), text
    assert {name for name, _ in sentences.missing} == set(TRAINED)
    # An incomplete request is no complete one: a colour where the number should stand is seen to be none.
    groups = (sentences.train, sentences.held_out)
    complete = {kinds_said(name, text) for group in groups for name, texts in group.items() for text in texts}
    assert not complete & {kinds_said(name, text) for (name, _), texts in sentences.missing.items() for text in texts}


@pytest.mark.parametrize("phrasing", ["train", "held_out"])
def test_requests_use_the_sentences_of_their_phrasing(sentences, phrasing):
    mine, others = (sentences.train, sentences.held_out)[:: 1 if phrasing == "train" else -1]
    others = sentences.hollowed(others)
    mine = {name: {sentences.hollow(text) for text in texts} for name, texts in mine.items()}
    used = {}
    for tool, said, _ in draws(phrasing=phrasing):
        form = sentences.hollow(said)
        assert form in mine[tool.name] and form not in others, said
        used.setdefault(tool.name, set()).add(form)
    # And of many kinds.
    for name, forms in used.items():
        assert len(forms) >= min(40, len(mine[name]) / 2), name


def test_sentences_of_their_own_and_frames_are_as_frequent():
    whole = {text for text in variants("[Where can|In what town can] [I|one] [buy|get|find] {things}?")}
    rng = random.Random(0)
    drawn = [tool_world._phrase(rng, TOOLS["shop"].asks, tuple(whole), False) for _ in range(1000)]
    assert sum(text in whole for text in drawn) / 1000 == pytest.approx(0.5, abs=0.06)


def test_phrasings_pair_frames_with_nouns_or_verbs():
    asks = tool_world.Asks(nouns=("the a", "the b"), verbs=("do it",))
    pairs = phrasings(asks)
    assert len(pairs) == 2 * len(tool_world.NOUN_FRAMES) + len(tool_world.VERB_FRAMES)
    assert (tool_world.NOUN_FRAMES[0], "the b") in pairs and (tool_world.VERB_FRAMES[1], "do it") in pairs
    assert (tool_world.VERB_FRAMES[0], "the a") not in pairs
    held_out = phrasings(asks, held_out=True)
    assert {frame for frame, _ in held_out} == {*tool_world.NOUN_FRAMES_HELD_OUT, *tool_world.VERB_FRAMES_HELD_OUT}
    assert phrasings(tool_world.Asks(sentences=("a",))) == []


# ---------------------------------------------------------------------------------------------------------------- values


def values_of(call):
    """(word or number) of every argument, lists and programs taken apart."""
    for argument in call["arguments"].values():
        if isinstance(argument, str) and argument.startswith("print("):
            yield from map(int, re.findall(r"\d+", argument))
        else:
            yield from argument if isinstance(argument, list) else [argument]


def held_out_values(call):
    held_out = {word for kind in tiny_world.POOLS for word in tiny_world.pool(kind, "held_out")}
    return [
        value
        for value in values_of(call)
        if (tiny_world.is_held_out_number(value) if isinstance(value, int) else value in held_out)
    ]


def test_the_values_of_a_split_are_that_splits():
    every = {"train": set(), "held_out": set()}
    for split, found in every.items():
        for _, said, call in draws(split=split):
            values = list(values_of(call))
            assert values and len(held_out_values(call)) == (0 if split == "train" else len(values)), said
            found.update(values)
    assert not every["train"] & every["held_out"]
    assert held_out_values({"name": "python", "arguments": {"program": "print(5 + 10)"}}) == [10]
    assert held_out_values({"name": "shop", "arguments": {"things": ["books", "cards"]}}) == ["cards"]
    # And all of them are drawn, but for numbers, of which there are many.
    for split, found in every.items():
        for kind in tiny_world.POOLS:
            assert set(tiny_world.pool(kind, split)) <= found


def test_now_and_then_training_says_a_word_of_another_kind_and_tests_never_do():
    def strange(only, **options):
        wrong = total = 0
        for tool, _, call in draws(60, **options):
            for slot, value in call["arguments"].items():
                kind = {"things": "thing"}.get(tool.slots[slot], tool.slots[slot])
                if kind in tiny_world.POOLS and kind in only:
                    total += 1
                    values = value if isinstance(value, list) else [value]
                    wrong += not set(values) <= set(tiny_world.POOLS[kind])
        return wrong / total

    everything = tuple(tiny_world.POOLS)
    # A share of tool_world.STRANGE, less the words that happen to be of the kind; in lists of things, too.
    assert 0.05 < strange(everything) < 0.3 and 0.05 < strange(("thing",)) < 0.3
    assert strange(everything, split="held_out") == strange(everything, phrasing="held_out") == 0


def test_requests_fit_their_schemas_and_say_their_arguments():
    for split, phrasing in (("train", "train"), ("held_out", "train"), ("held_out", "held_out")):
        for tool, said, call in draws(60, split=split, phrasing=phrasing):
            assert call["name"] == tool.name and not argument_problems(call, SCHEMAS), call
            assert said[-1] in ".?" and not re.search(r"[{}\[\]|]", said), said
            for value in values_of(call):
                assert re.search(rf"\b{value}\b", said), (said, call)
    wrong = {"name": "boat", "arguments": {"town": "Rome"}}
    assert argument_problems(wrong, SCHEMAS)


def test_optional_arguments_are_given_where_they_are_said():
    for name, slot in (("weather", "day"), ("buy", "colour")):
        given = [slot in call["arguments"] for _, _, call in draws(names=[name])]
        assert 0.15 < sum(given) / len(given) < 0.85


def test_a_request_without_an_argument_lacks_that_one():
    for name in TRAINED:
        for slot in TOOLS[name].missing:
            for tool, said, call in draws(30, [name], without=slot):
                assert slot not in call["arguments"] and set(call["arguments"]) <= set(tool.slots)
                (problem, *_) = argument_problems(call, SCHEMAS)
                assert slot in problem, (said, problem)


def test_a_list_is_of_different_things():
    lists = [call["arguments"]["things"] for _, _, call in draws(names=["shop"])]
    assert all(len(each) >= 2 for each in lists)
    assert all(len(set(each)) == len(each) for each in lists)
    said, call = request(random.Random(2), TOOLS["shop"])
    *first, last = call["arguments"]["things"]
    assert f"{', '.join(first)} and {last}" in said


def test_the_same_numbers_make_the_same_requests():
    tool = TOOLS["buy"]
    assert request(random.Random(4), tool) == request(random.Random(4), tool)
    assert len({request(random.Random(seed), tool)[0] for seed in range(30)}) > 20


def test_accepted_is_the_leaderboards_form():
    calls = [
        {"name": "buy", "arguments": {"thing": "books", "count": 4}},
        {"name": "age", "arguments": {"name": "Ana"}},
    ]
    assert accepted(calls) == [{"buy": {"thing": ["books"], "count": [4]}}, {"age": {"name": ["Ana"]}}]
    assert accepted([]) == []
    assert check_calls(calls, accepted(calls), SCHEMAS).ok
    changed = [{**calls[0], "arguments": {"thing": "books", "count": 5}}, calls[1]]
    assert check_calls(changed, accepted(calls), SCHEMAS).kind == "wrong_value"
    # A list is one accepted value, not a list of them.
    shop = {"name": "shop", "arguments": {"things": ["books", "pens"]}}
    assert check_calls([shop], accepted([shop]), SCHEMAS).ok
    assert not check_calls([{**shop, "arguments": {"things": ["books"]}}], accepted([shop]), SCHEMAS).ok


# --------------------------------------------------------------------------------------------------------------- results


def test_results_are_those_of_the_functions():
    failed = 0
    for split in tiny_world.SPLITS:
        for tool, _, call in draws(40, [*TRAINED, HELD_OUT_TOOL], split=split):
            found = result(call)
            if tool.name != "python":
                assert found == tool_functions.call(**call)
            spoken = spoken_result(call, found)
            assert not re.search(r"[{}]", spoken)
            if "error" in found:
                assert spoken == FAILED and tool.name == "boat" and call["arguments"]["day"] in tool_functions.NO_BOATS
                failed += 1
            else:
                for value in found.values():
                    assert re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", spoken), (found, spoken)
    assert failed


def test_results_told_in_words():
    assert spoken_result({"name": "price", "arguments": {"thing": "pens", "town": "Rome"}}, {"price": 7}) == (
        "The pens cost 7 in Rome."
    )
    assert spoken_result({"name": "shop", "arguments": {"things": ["pens", "cups"]}}, {"town": "Oslo"}) == (
        "One can buy that in Oslo."
    )
    assert spoken_result({"name": "job", "arguments": {"name": "Ana"}}, {"job": "poet"}) == "The job of Ana is poet."
    assert spoken_result({"name": "python", "arguments": {"program": "print(4 + 9)"}}, {"output": 13}) == "It is 13."
    boat = {"name": "boat", "arguments": {"town": "Rome", "day": "Sunday"}}
    assert spoken_result(boat, result(boat)) == FAILED == "I cannot do that."


def test_results_are_those_of_a_real_run_in_the_sandbox():
    if sandbox_problem():
        pytest.skip(sandbox_problem())
    programs = [call for _, _, call in draws(4, ["python"])]
    programs += [call for _, _, call in draws(4, ["python"], split="held_out")]
    for call in [*programs, *(call for _, _, call in draws(1, [*TRAINED, HELD_OUT_TOOL]))]:
        assert run_tool(call, SCHEMAS) == result(call), call
    outputs = [result(call)["output"] for call in programs]
    assert len(set(outputs)) > 4  # so that one result for all would be seen
