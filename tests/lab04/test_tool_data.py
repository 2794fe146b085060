"""Conversations about tools: targets that are right, tests that training never saw, and the mask on what the assistant says."""

import copy
import functools
import json
import random
import re
from collections import Counter
from importlib import resources

import pytest
from tool_rows import calls_of, is_direct, shown, turns, written

import tool_data
import tool_functions
import tool_stage
from function_calls import argument_problems, check_calls, check_tools, parse_calls
from shared import LabsError, tiny_world
from tool_data import CALL_KINDS, KINDS, NO_CALL_KINDS, TEST_PARTS, conversation, encode, schemas, training_rows
from tool_sources import overlaps
from tool_stage import replayed, tokenized
from tool_world import ASK_BACK, DECLINE, DOMAINS, HELD_OUT_TOOL, spoken_result, tool_names

N = 2000


@pytest.fixture(scope="module")
def train():
    return training_rows(N, 0)


@pytest.fixture(scope="module")
def tests():
    return {part: tool_data.test_rows(200, part) for part in TEST_PARTS}


def text_of(row):
    return json.dumps(row["messages"])


# ------------------------------------------------------------------------------------------------------------ held out


HELD_OUT = {word for kind in tiny_world.POOLS for word in tiny_world.pool(kind, "held_out")}
TRAINED = {word for kind in tiny_world.POOLS for word in tiny_world.pool(kind, "train")}


def held_out_words(text):
    return set(re.findall(r"\w+", text)) & HELD_OUT


def held_out_numbers(text):
    """Held-out numbers among those that are values: programs, counts and the like have none above 99."""
    return [number for number in map(int, re.findall(r"\d+", text)) if tiny_world.is_held_out_number(number)]


def test_no_request_and_no_call_in_training_has_a_held_out_value(train):
    """All turns but those that need no tool, which `test_facts_told…` is about. Calls are made of what is asked."""
    asked = [
        (said, reply) for row in train for said, reply in turns(row) if calls_of(reply) or reply["content"] == DECLINE
    ]
    asked += [
        (said, reply) for row in train for said, reply in turns(row) if reply["content"].startswith("Please tell")
    ]
    assert len(asked) > N and any("print(" in text_of({"messages": calls_of(reply)}) for _, reply in asked)
    for said, reply in asked:
        text = f"{said} {json.dumps(calls_of(reply))}"
        assert not held_out_words(text) and not held_out_numbers(text), text
    assert held_out_words("Send Otto a message on Monday.") == {"Otto"} and held_out_numbers("Buy 10 pens.") == [10]


def test_facts_told_in_training_have_no_held_out_value(train):
    direct = [(said, reply["content"]) for row in train for said, reply in turns(row) if is_direct(reply)]
    assert len(direct) > 50
    for said, reply in direct:
        assert not held_out_words(said + reply) and not held_out_numbers(said + reply), said


def test_results_in_training_have_no_held_out_word(train):
    for row in train:
        for message in row["messages"]:
            if message["role"] == "tool":
                assert not held_out_words(message["content"]), message


def test_what_is_judged_is_asked_with_held_out_values_alone(tests):
    for part, rows in tests.items():
        for row in rows:
            call_text = json.dumps([calls_of(message) for message in row["messages"]])
            words = set(re.findall(r"\w+", call_text)) & TRAINED
            numbers = [n for n in map(int, re.findall(r"\d+", call_text)) if not tiny_world.is_held_out_number(n)]
            assert not words and not numbers, (part, call_text)
            if row["kind"] in CALL_KINDS:
                assert held_out_words(call_text) or held_out_numbers(call_text)


def test_no_held_out_sentence_is_in_training_nor_in_the_other_parts(train, tests, sentences):
    held_out = [re.escape(text) for text in sentences.hollowed(sentences.held_out)]
    anywhere = re.compile("|".join(sorted(held_out, key=len, reverse=True)))
    for row in [*train, *(row for part in TEST_PARTS if part != "phrasings" for row in tests[part])]:
        for said, _ in turns(row):
            assert not anywhere.search(sentences.hollow(said)), said
    # The search finds what is there: requests joined in one sentence have lost their first one's mark.
    found = [bool(anywhere.search(sentences.hollow(row["messages"][0]["content"]))) for row in tests["phrasings"]]
    assert sum(found) > 0.9 * len(found)


def test_training_neither_shows_nor_calls_the_held_out_tool(train, tests):
    verbs = set()
    for row in train:
        assert HELD_OUT_TOOL not in shown(row)
        assert all(call["name"] != HELD_OUT_TOOL for message in row["messages"] for call in calls_of(message))
        assert not re.search(rf"\b{HELD_OUT_TOOL} (\d+|\w+ \w+ in)", text_of(row).lower())  # nobody asks for it
        verbs |= set(shown(row))
    assert len(verbs) == 10
    for row in tests["tool"]:
        ((call,),) = (calls_of(row["messages"][-1]),)
        assert call["name"] == HELD_OUT_TOOL and HELD_OUT_TOOL in shown(row) and len(shown(row)) == 6
    for part in set(TEST_PARTS) - {"tool"}:
        assert all(HELD_OUT_TOOL not in shown(row) for row in tests[part])


def test_test_rows_are_none_of_trainings_and_the_same_for_every_training_seed(train, tests):
    from shared.profiles import load_profile
    from train_tool_use import rows_of

    judged = [row for part in TEST_PARTS for row in tests[part]]
    assert not overlaps(train, judged)
    assert overlaps([*train, judged[7]], judged)
    said = {text_of({"messages": row["messages"][:-1]}) for row in train}
    assert not said & {text_of({"messages": row["messages"][:-1]}) for row in judged if row["kind"] != "missing"}
    config = load_profile("04", "tiny", ["tools.n_train=30", "tools.n_validation=5", "tools.n_test=12"]).tools
    parts = [rows_of(config, seed) for seed in (0, 1)]
    assert parts[0]["train"] != parts[1]["train"] and parts[0]["validation"] != parts[1]["validation"]
    assert len(parts[0]["train"]) == 30 and len(parts[0]["validation"]) == 5
    for part in TEST_PARTS:
        assert parts[0][part] == parts[1][part] == tool_data.test_rows(12, part)


def test_the_profiles_train_on_thousands_and_judge_hundreds():
    from shared.profiles import load_profile

    tiny = load_profile("04", "tiny")
    assert tiny.tools.data == tiny.tools.test_data == "tiny_world"
    assert min(tiny.tools.n_train, tiny.adapters.n_train) >= 2000
    for profile in ("tiny", "colab", "local"):
        assert all(load_profile("04", profile)[stage].n_test >= 200 for stage in ("tools", "adapters"))


# ------------------------------------------------------------------------------------------------- right by the rules


@functools.cache
def check_once(tools):
    """They are the same ones in all rows of a domain, in another order."""
    check_tools(json.loads(tools))


def problem_of(row):
    """What is wrong with a row, by the leaderboard's rules and the schemas; None where nothing is."""
    check_once(json.dumps(sorted(row["tools"], key=lambda tool: tool["function"]["name"])))
    *before, last = row["messages"]
    if last["role"] != "assistant":
        return "the last message is not the assistant's"
    for message in [*before, last]:
        for call in calls_of(message):
            if argument_problems(call, row["tools"]):
                return argument_problems(call, row["tools"])[0]
    if row["kind"] in CALL_KINDS:
        result = check_calls(calls_of(last), row["accepted"], row["tools"])
        return None if result.ok else result.reason
    return "a call is accepted" if row["accepted"] or parse_calls(last["content"]) or calls_of(last) else None


def test_every_target_is_right_by_its_own_answers(train, tests):
    for row in [*train, *(row for rows in tests.values() for row in rows)]:
        assert problem_of(row) is None, row


def spoilt(row, how):
    row = copy.deepcopy(row)
    call = row["messages"][-1]["tool_calls"][0]["function"]
    key = next(iter(call["arguments"]))
    if how == "a value":
        call["arguments"][key] = "nothing" if isinstance(call["arguments"][key], str) else -1
    elif how == "an argument less":
        del call["arguments"][key]
    elif how == "another name":
        call["name"] = "other"
    elif how == "no call":
        row["messages"][-1] = {"role": "assistant", "content": DECLINE}
    elif how == "no answer":
        row["accepted"] = []
    elif how == "not shown":
        row["tools"] = [tool for tool in row["tools"] if tool["function"]["name"] != call["name"]]
    elif how == "no reply":
        row["messages"].pop()
    return row


@pytest.mark.parametrize(
    "how", ["a value", "an argument less", "another name", "no call", "no answer", "not shown", "no reply"]
)
def test_a_wrong_target_would_be_seen(train, how):
    rows = [row for row in train if row["kind"] in CALL_KINDS][:20]
    for row in rows:
        try:
            assert problem_of(spoilt(row, how)) is not None
        except LabsError:  # the accepted answer's function is not shown
            assert how == "not shown"


def test_conversations_take_turns_and_results_follow_calls(train):
    for row in train:
        roles = [message["role"] for message in row["messages"]]
        assert re.fullmatch("(ua(t+a)?)*", "".join(role[0] for role in roles)), roles
        assert 1 <= roles.count("user") <= 3 and row["messages"][-1]["role"] == "assistant"
        for index, message in enumerate(row["messages"]):
            calls = calls_of(message)
            if not calls or index == len(roles) - 1:
                continue
            told = [json.loads(each["content"]) for each in row["messages"][index + 1 : index + 1 + len(calls)]]
            for call, found in zip(calls, told, strict=True):
                if call["name"] != "python":  # that one's results: see test_tool_world
                    assert found == tool_functions.call(**call)
            answer = row["messages"][index + 1 + len(calls)]
            assert answer["role"] == "assistant" and answer["content"] == " ".join(map(spoken_result, calls, told))
            assert calls_of(answer) == []
    assert {row["messages"][-1]["content"] == "" for row in train} == {True, False}


def test_answers_are_rows_whose_results_are_to_be_told(train, tests):
    for row in [*train, *tests["answers"]]:
        assert (row["kind"] == "answer") == (row["messages"][-2]["role"] == "tool")
        assert row["kind"] != "answer" or row["accepted"] == []
    assert all(row["kind"] == "answer" for row in tests["answers"])
    share = Counter(row["kind"] for row in train)
    assert min(share[kind] for kind in (*KINDS, "answer")) > 10


def test_all_tools_of_the_domain_are_shown_in_any_order(train):
    orders = Counter(tuple(shown(row)) for row in train)
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(tool_names((domain,)))) for domain in DOMAINS}
    assert len(orders) > 200  # of 240
    assert all(row["tools"] == schemas(shown(row)) for row in train[:50])
    called = Counter(call["name"] for row in train for message in row["messages"] for call in calls_of(message))
    assert set(called) == set(tool_names()) and min(called.values()) > 0.5 * max(called.values())


def test_kinds_come_by_their_weights(train, tests):
    assert sum(KINDS.values()) == pytest.approx(1)
    drawn = Counter()
    for row in train:
        for _, reply in turns(row):
            calls = calls_of(reply)
            said = reply["content"]
            drawn[
                "parallel" if len(calls) > 1 else "single" if calls else "no_tool" if said == DECLINE
                else "direct" if is_direct(reply) else "missing"
            ] += 1  # fmt: skip
    total = sum(drawn.values())
    assert {kind: drawn[kind] / total for kind in KINDS} == pytest.approx(KINDS, abs=0.03)
    kinds = {part: {row["kind"] for row in rows} for part, rows in tests.items()}
    assert kinds["values"] == kinds["phrasings"] == set(CALL_KINDS) and kinds["irrelevance"] == set(NO_CALL_KINDS)
    assert kinds["tool"] == {"single"} and kinds["answers"] == {"answer"}
    only = training_rows(50, 0, kinds={"missing": 1.0}, most_turns=1)
    assert {row["kind"] for row in only} == {"missing"} and all(len(row["messages"]) == 2 for row in only)


def test_parallel_calls_differ_and_half_are_of_one_tool():
    rng = random.Random(0)
    # Of the few held-out names two would often be the same.
    pairs = [calls_of(conversation(rng, ["parallel"], "held_out", domain="office")["messages"][-1]) for _ in range(500)]
    assert all(len(pair) == 2 and pair[0] != pair[1] for pair in pairs)
    same = sum(first["name"] == second["name"] for first, second in pairs) / len(pairs)
    assert same == pytest.approx(0.5 + 0.5 / 5, abs=0.08)


def test_both_requests_of_a_parallel_turn_are_said():
    rng = random.Random(1)
    for _ in range(100):
        (said, reply), *_ = turns(conversation(rng, ["parallel"], "held_out", domain=rng.choice(DOMAINS)))
        for call in calls_of(reply):
            for value in re.findall(r"\w+", json.dumps(list(call["arguments"].values()))):
                assert value == "print" or re.search(rf"\b{value}\b", said), (said, call)


def test_what_no_tool_can_do_belongs_to_no_tool_that_is_shown(sentences):
    rng, foreign = random.Random(2), 0
    for domain in DOMAINS:
        mine = {sentences.hollow(text) for name in tool_names((domain,)) for text in sentences.train[name]}
        foreign_names = set(tool_names()) - set(tool_names((domain,)))
        others = {sentences.hollow(text) for name in foreign_names for text in sentences.train[name]}
        for _ in range(200):
            row = conversation(rng, ["no_tool"], domain=domain)
            assert row["kind"] == "no_tool" and row["messages"][-1]["content"] == DECLINE and not row["accepted"]
            said = sentences.hollow(row["messages"][0]["content"])
            assert not any(said == text for text in mine), said
            foreign += any(text in said for text in others)
    assert 0.55 < foreign / 400 < 0.9  # 0.7 are drawn so; some vain requests hold a short foreign one


def test_an_adapters_rows_know_nothing_of_the_other_domain(sentences):
    for domain, other in (DOMAINS, DOMAINS[::-1]):
        others = {sentences.hollow(text) for name in tool_names((other,)) for text in sentences.train[name]}
        rows = training_rows(300, 0, (domain,))
        assert {tuple(sorted(shown(row))) for row in rows} == {tuple(sorted(tool_names((domain,))))}
        declined = [said for row in rows for said, reply in turns(row) if reply["content"] == DECLINE]
        assert len(declined) > 20 and not any(sentences.hollow(said) in others for said in declined)
        assert {tuple(sorted(shown(row))) for row in tool_data.test_rows(20, "values", (domain,))} == {
            tuple(sorted(tool_names((domain,))))
        }


def test_what_is_missing_is_asked_back(sentences):
    rng, found = random.Random(3), set()
    incomplete = {key: {sentences.hollow(text) for text in texts} for key, texts in sentences.missing.items()}
    for index in range(300):
        row = conversation(rng, ["missing"], domain=DOMAINS[index % 2])
        ((said, reply),) = turns(row)
        said = sentences.hollow(said)
        asked = {(name, slot) for name, slot in incomplete if reply["content"] == ASK_BACK.format(slot=slot)}
        fits = {
            key for key in asked if key[0] in shown(row) and any(text in said for text in incomplete[key])
        }  # small talk may stand beside it
        assert fits, (said, reply)
        found |= fits
    assert found == set(incomplete)


def test_what_needs_no_tool_is_answered_from_the_request():
    rng = random.Random(4)
    for split in tiny_world.SPLITS:
        for _ in range(100):
            row = conversation(rng, ["direct"], split)
            (said, reply), *_ = turns(row)
            told = re.findall(r"\w+", said)
            value = re.fullmatch(r"(?:It is )?(\w+)\.", reply["content"])[1]
            assert value in told and row["accepted"] == [], (said, reply)


def test_rows_are_drawn_by_seed(train):
    again, other = training_rows(50, 0), training_rows(50, 1)
    assert again == train[:50] and again != other  # more rows: these and others
    assert len({text_of(row) for row in train}) > 0.97 * N
    assert len({row["id"] for row in train}) == N
    for part in TEST_PARTS:
        assert tool_data.test_rows(9, part) == tool_data.test_rows(9, part) != tool_data.test_rows(9, part, seed=1)
        assert [row["id"] for row in tool_data.test_rows(2, part)] == [f"{part}_0", f"{part}_1"]


def test_mistakes_are_named():
    rng = random.Random(0)
    with pytest.raises(LabsError, match="no turns of kind 'singel': choose from single, "):
        conversation(rng, ["single", "singel"])
    with pytest.raises(LabsError, match="no tools of domain 'shop': choose from market, office"):
        conversation(rng, ["single"], domain="shop")
    with pytest.raises(LabsError, match="no test part 'value': choose from values, "):
        tool_data.test_rows(3, "value")


# ------------------------------------------------------------------------------------------------------- the loss mask

# In the manner of Qwen2.5: the tools as JSON in the system's turn, results in turns of the user, several in one.
QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\nYou can call functions.\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nCall as <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
        {%- for call in m.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture
def speaking(world_tokenizer):
    """Call it for the curriculum's tokenizer with another chat template."""

    def make(template):
        tokenizer = copy.deepcopy(world_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


def few_of_every_kind(n=6):
    rng, rows = random.Random(5), []
    for kind in KINDS:
        for index in range(n):
            answered = kind in CALL_KINDS and index % 2 == 0
            rows.append(conversation(rng, [kind], domain=DOMAINS[index % 2], answered=answered))
    return rows + [row for row in training_rows(60, 9) if len(turns(row)) > 1][:10]


def spoken(ids, mask, tokenizer):
    """The texts of the runs of tokens where the mask is 1."""
    runs, before = [], 0
    for token, counts in zip(ids, mask, strict=True):
        if counts and not before:
            runs.append([])
        if counts:
            runs[-1].append(token)
        before = counts
    return [tokenizer.decode(run) for run in runs]


def whole_turns(row):
    return [f"{written(message)}<|im_end|>" for message in row["messages"] if message["role"] == "assistant"]


def whole(row, tokenizer, **options):
    return tokenizer.apply_chat_template(row["messages"], tools=row["tools"] or None, **options)


def test_the_mask_is_the_templates_own(world_tokenizer):
    assert "generation" in world_tokenizer.chat_template
    for row in few_of_every_kind():
        ids, mask = encode(row, world_tokenizer)
        theirs = whole(row, world_tokenizer, return_dict=True, return_assistant_tokens_mask=True)
        end = len(ids)  # behind it stands the line break between turns
        assert ids == theirs["input_ids"][:end] and mask == theirs["assistant_masks"][:end]
        assert len(theirs["input_ids"]) - end <= 1 and not any(theirs["assistant_masks"][end:])
        assert spoken(ids, mask, world_tokenizer) == whole_turns(row)
        assert mask[-1] == 1 and world_tokenizer.decode(ids[-1]) == "<|im_end|>"
        # Masks that would be wrong: on everything, on the last turn alone, one token late.
        last = len(mask) - mask[::-1].index(0)
        for wrong in ([1] * len(mask), [0, *mask[:-1]]):
            assert wrong != theirs["assistant_masks"][:end]
        if len(turns(row)) > 1:
            assert [0] * last + mask[last:] != theirs["assistant_masks"][:end]


@pytest.mark.parametrize("template", ["own", "qwen"])
def test_the_ids_are_those_of_the_whole_conversation(speaking, world_tokenizer, template):
    tokenizer = speaking(QWEN) if template == "qwen" else world_tokenizer
    for row in few_of_every_kind(4):
        text = whole(row, tokenizer, tokenize=False)
        ids, mask = encode(row, tokenizer)
        assert ids == tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text.rstrip("\n")
        assert spoken(ids, mask, tokenizer) == whole_turns(row)
    if template == "qwen":
        assert "<tool_response>" in text or "<tools>" in text


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "llama3_2"])
def test_templates_from_the_wild(speaking, name):
    """The templates that TRL keeps copies of; Qwen2.5's has a variant that marks what the assistant says itself."""
    folder = resources.files("trl") / "chat_templates"
    tokenizer = speaking((folder / f"{name}.jinja").read_text(encoding="utf-8"))
    marked = speaking((folder / "qwen2_5_training.jinja").read_text(encoding="utf-8"))
    rows = [row for row in few_of_every_kind(2) if not any(len(calls_of(m)) > 1 for m in row["messages"])]
    for row in rows:
        ids, mask = encode(row, tokenizer)
        text = whole(row, tokenizer, tokenize=False)
        assert tokenizer.decode(ids) == text.rstrip("\n")
        found = spoken(ids, mask, tokenizer)
        assert len(found) == sum(message["role"] == "assistant" for message in row["messages"])
        for said, message in zip(found, (m for m in row["messages"] if m["role"] == "assistant"), strict=True):
            calls = calls_of(message)
            assert parse_calls(said.removesuffix("<|im_end|>").removesuffix("<|eot_id|>")) == calls, said
            assert calls or said.startswith(message["content"])
        if name == "qwen2_5":
            theirs = whole(row, marked, return_dict=True, return_assistant_tokens_mask=True)
            assert ids == theirs["input_ids"][: len(ids)]
            # TRL's variant counts the line breaks before a call and behind a turn as said; nobody has to write them.
            runs = spoken(theirs["input_ids"], theirs["assistant_masks"], tokenizer)
            assert found == [text.strip("\n") for text in runs]


def test_a_template_that_rewrites_earlier_turns_is_refused(speaking):
    forgetful = speaking(QWEN.replace("+ m.content +", "+ (m.content if loop.last else m.content | upper) +"))
    rng, rows = random.Random(6), few_of_every_kind()
    for kinds in (["no_tool", "single"], ["missing", "missing"], ["direct", "no_tool"]):
        row = conversation(rng, kinds)
        with pytest.raises(LabsError, match="rewrites earlier turns: train on conversations of one turn"):
            encode(row, forgetful)
    # One whose generation prompt says more than it writes later cannot be trained on either.
    prompt = "'<|im_start|>assistant\\n' }}{%- endif %}"
    assert QWEN.endswith(prompt)
    thinking = speaking(QWEN.removesuffix(prompt) + prompt.replace("\\n'", "\\n<think>'"))
    with pytest.raises(LabsError, match="rewrites"):
        encode(rows[0], thinking)


def test_without_tools_none_are_shown(speaking, world_tokenizer):
    row = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}], "tools": []}
    for tokenizer, system in ((world_tokenizer, 0), (speaking(QWEN), 1)):
        text = tokenizer.decode(encode(row, tokenizer)[0])
        assert text.count("<|im_start|>system") == system and "<tools>" not in text
        assert text.endswith("<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>")


def test_labels_are_what_the_assistant_says_and_long_rows_stay_out(world_tokenizer):
    rows = few_of_every_kind(3)
    examples = tokenized(rows, world_tokenizer, 512)
    assert len(examples) == len(rows)
    for row, example in zip(rows, examples, strict=True):
        ids, mask = encode(row, world_tokenizer)
        assert example["input_ids"] == ids
        assert example["labels"] == [token if counts else -100 for token, counts in zip(ids, mask, strict=True)]
    lengths = sorted(len(example["input_ids"]) for example in examples)
    middle = lengths[len(lengths) // 2]
    kept = tokenized(rows, world_tokenizer, middle)
    assert kept == [example for example in examples if len(example["input_ids"]) <= middle]
    assert max(len(example["input_ids"]) for example in kept) == middle  # exactly as long is not too long
    with pytest.raises(LabsError, match="every row is longer than trainer.max_length=10 tokens: raise it"):
        tokenized(rows, world_tokenizer, 10)


# ---------------------------------------------------------------------------------------------------- what is read again


def test_replayed_rows_learn_the_copies_alone(world_tokenizer):
    rows = replayed(20, world_tokenizer)
    assert len(rows) == 20 and all(len(row["input_ids"]) == len(row["labels"]) == 128 for row in rows)
    begin, checked, lists = world_tokenizer.bos_token_id, 0, 0
    for row in rows:
        starts = [index for index, token in enumerate(row["input_ids"]) if token == begin]
        assert starts[0] == 0
        for start, end in zip(starts, starts[1:], strict=False):  # the last text is cut off
            ids, labels = row["input_ids"][start:end], row["labels"][start:end]
            first, _, second = world_tokenizer.decode(ids[1:]).partition(" = ")
            as_list = json.dumps(first.split())
            assert second in (first, as_list[1:-1], as_list)  # the first two are lab 00's
            lists += second == as_list
            learnt = [label != -100 for label in labels]
            at = learnt.index(True)
            assert all(learnt[at:]) and labels[at:] == ids[at:]
            assert world_tokenizer.decode(ids[1:at]).rstrip(' "') == f"{first} ="
            assert world_tokenizer.decode(ids[at:]).lstrip(' "') == second.lstrip('"')
            checked += 1
    assert checked > 50 and 0.15 * checked < lists < 0.45 * checked
    assert replayed(3, world_tokenizer) == rows[:3] != replayed(3, world_tokenizer, seed=1)
    assert replayed(0, world_tokenizer) == [] and len(replayed(1, world_tokenizer, length=40)[0]["input_ids"]) == 40
    assert tool_stage.replayed is replayed
    held_out = [word for row in rows for word in held_out_words(world_tokenizer.decode(row["input_ids"]))]
    assert len(set(held_out)) > 20  # they are there so that words which no call mentions are not forgotten
