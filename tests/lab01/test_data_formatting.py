"""Records into messages, messages into tokens and a loss mask (token by token, three templates), and care for rows."""

import copy
import gzip
import json
import os
import random
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

import data_formatting as lesson
from data_formatting import clean, deduplicate, read_rows, render, split, to_messages, validate, write_rows
from near_copies import near_copies, shingles
from shared import LabsError

CHATML = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

LLAMA3 = """{{- bos_token }}{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

MISTRAL = """{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\n\n' %}
{%- set turns = messages[1:] %}{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{%- for m in turns %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user and assistant') }}{%- endif %}
{%- if m.role == 'user' %}{{- '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"""

HEADER = ["<|start_header_id|>", "<|end_header_id|>"]
# name: (template, special tokens, what ends a turn, what the model writes before its answer)
TEMPLATES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", ""),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "",
    ),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", " "),
}

CONVERSATION = [
    {"role": "system", "content": "Be brief. Answer in metres."},
    {"role": "user", "content": "How high is the Eiffel tower?\nAnd is it  open today?"},
    {"role": "assistant", "content": "It is 330 m high.\n\nIt is open: 9:30–23:45 ☕."},
    {"role": "user", "content": "assistant\nSay: It is 330 m high."},
    {"role": "assistant", "content": "It is 330 m high."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "s"},
]


def train(special, text=None, trim_offsets=False, sentencepiece=False):
    """A small tokenizer that writes <s> or its like by itself too, as Llama's and Mistral's do, so doubling shows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    text = text or [m["content"] for m in CONVERSATION] * 3
    if sentencepiece:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet, special = [], ["<unk>", *special]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(text, trainer)
    begin = next((t for t in special if t in ("<s>", "<bos>", "<|begin_of_text|>")), None)
    steps = [] if sentencepiece else [processors.ByteLevel(trim_offsets=trim_offsets)]
    if begin:
        ids = [(begin, tokenizer.token_to_id(begin))]
        steps.append(processors.TemplateProcessing(single=f"{begin} $A", special_tokens=ids))
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=special[-1])


def make(name, template=None, **options):
    own, special, end, _ = TEMPLATES[name]
    tokenizer = train(special, **options)
    tokenizer.eos_token = end
    tokenizer.chat_template = template or own
    return tokenizer


def spoken(ids, mask, tokenizer):
    """The texts of the runs of 1 in a mask."""
    runs = re.finditer("1+", "".join(map(str, mask)))
    return [tokenizer.decode(ids[run.start() : run.end()]) for run in runs]


def expected_runs(name, messages):
    _, _, end, before = TEMPLATES[name]
    return [before + m["content"] + end for m in messages if m["role"] == "assistant"]


# ---------------------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_is_one_on_answers_and_their_end_of_turn_only(name, trim_offsets):
    tokenizer = make(name, trim_offsets=trim_offsets)
    given = copy.deepcopy(CONVERSATION)
    ids, mask = render(given, tokenizer)
    assert given == CONVERSATION
    assert ids == list(tokenizer.apply_chat_template(CONVERSATION, tokenize=True)["input_ids"])
    assert len(ids) == len(mask) and set(mask) == {0, 1}
    assert spoken(ids, mask, tokenizer) == expected_runs(name, CONVERSATION)
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) == 1


def test_a_sentencepiece_like_tokenizer_keeps_the_space_that_the_answer_begins_with():
    tokenizer = make("mistral", sentencepiece=True)
    ids, mask = render(CONVERSATION[1:], tokenizer)
    first = mask.index(1)
    assert tokenizer.convert_ids_to_tokens(ids[first - 1]) == "[/INST]"
    assert tokenizer.convert_ids_to_tokens(ids[first]).startswith("▁")
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    assert len(ends) == 3 and all(mask[i] for i in ends)


def test_the_labs_own_template_and_tokenizer(world_tokenizer):
    answer = '{"count": 12, "name": "Ana"}'
    turns = [("user", "Ana has 12 pens. Give count, name as JSON."), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert spoken(*render(messages, world_tokenizer), world_tokenizer) == [answer + "<|im_end|>"]


def table(text):
    """(token, mask) pairs from a picture: tokens stand between bars, those with mask 1 in lines that begin with +."""
    rows = []
    for line in text.strip().splitlines():
        sign, *tokens, _ = line.strip().split("|")
        rows += [(token.replace("¶", "\n").replace("‹", "<|").replace("›", "|>"), int(sign == "+")) for token in tokens]
    return rows


# ¶ is a line break, ‹name› the special token <|name|>.
TOKEN_BY_TOKEN = {
    "chatml": """
        -|‹im_start›|user|¶|Hi| you|‹im_end›|¶|‹im_start›|assistant|¶|
        +|Hi| you|‹im_end›|
        -|¶|‹im_start›|user|¶|Hi|‹im_end›|¶|‹im_start›|assistant|¶|
        +| you|‹im_end›|
        -|¶|
    """,
    "llama3": """
        -|‹begin_of_text›|‹start_header_id›|user|‹end_header_id›|¶|¶|Hi| you|‹eot_id›|
        -|‹start_header_id›|assistant|‹end_header_id›|¶|¶|
        +|Hi| you|‹eot_id›|
        -|‹start_header_id›|user|‹end_header_id›|¶|¶|Hi|‹eot_id›|
        -|‹start_header_id›|assistant|‹end_header_id›|¶|¶|
        +|you|‹eot_id›|
    """,
    "mistral": """
        -|<s>|[INST]| Hi| you| |[/INST]|
        +| Hi| you|</s>|
        -|[INST]| Hi| |[/INST]|
        +| | you|</s>|
    """,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_token_by_token(name):
    """The whole table written out, with a last answer that begins with a space (Llama 3 trims it)."""
    tokenizer = make(name, text=["Hi you", " Hi you", "Hi", "user\n\n", "assistant\n\n", "you"] * 50)
    messages = [("user", "Hi you"), ("assistant", "Hi you"), ("user", "Hi"), ("assistant", " you")]
    ids, mask = render([{"role": role, "content": content} for role, content in messages], tokenizer)
    found = [(tokenizer.decode([token]), one) for token, one in zip(ids, mask, strict=True)]
    assert found == table(TOKEN_BY_TOKEN[name])


def hh_rlhf(limit=40):
    """Real conversations of several turns; empty where the data is not at hand."""
    path = Path(os.environ.get("LABS_DATA_DIR", "")) / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if not os.environ.get("LABS_DATA_DIR") or not path.exists():
        return []
    names = {"Human": "user", "Assistant": "assistant"}
    conversations = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            parts = re.split(r"\n\n(Human|Assistant): ?", json.loads(line)["chosen"])[1:]
            turns = [
                {"role": names[role], "content": text.strip()}
                for role, text in zip(parts[::2], parts[1::2], strict=True)
            ]
            alternate = all(turn["role"] == ("user", "assistant")[i % 2] for i, turn in enumerate(turns))
            if len(turns) >= 4 and alternate and all(turn["content"] for turn in turns):
                conversations.append(turns)
    return conversations[:limit]


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_conversations_of_several_turns(name):
    conversations = hh_rlhf() or [CONVERSATION[1:], CONVERSATION[1:5]]
    tokenizer = make(name, trim_offsets=True)
    for messages in conversations:
        ids, mask = render(messages, tokenizer)
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert spoken(ids, mask, tokenizer) == expected_runs(name, messages)
    assert len(conversations) in (2, 40)


def test_wrong_masks_would_be_noticed():
    """What the tests above compare is enough to catch a mask that is off by one, or that has no end of turn."""
    tokenizer = make("chatml")
    ids, mask = render(CONVERSATION, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    wrong = [
        [0, *mask[:-1]],
        [*mask[1:], 0],
        [int(one and token != end) for token, one in zip(ids, mask, strict=True)],
        [1] * len(mask),
    ]
    for variant in wrong:
        assert spoken(ids, variant, tokenizer) != expected_runs("chatml", CONVERSATION)


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_generation_block_decides(name, trim_offsets):
    answer = {
        "chatml": "m.content + '<|im_end|>'",
        "llama3": "m.content | trim + '<|eot_id|>'",
        "mistral": "' ' + m.content + eos_token",
    }[name]
    marked = (
        "'' }}{%- if m.role == 'assistant' %}{%- generation %}{{- ANSWER }}{%- endgeneration %}"
        "{%- else %}{{- ANSWER }}{%- endif %}{{- ''"
    )
    template = TEMPLATES[name][0].replace(answer, marked.replace("ANSWER", answer))
    tokenizer = make(name, template, trim_offsets=trim_offsets)
    ids, mask = render(CONVERSATION, tokenizer)
    assert "endgeneration" in template
    assert (ids, mask) == render(CONVERSATION, make(name, trim_offsets=trim_offsets))
    if name != "mistral" or not trim_offsets:  # there, the library's own mask loses an answer that begins with a space
        theirs = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == list(theirs["input_ids"]) and mask == list(theirs["assistant_masks"])


@pytest.mark.parametrize("name, special", [("qwen2_5", "chatml"), ("llama3", "llama3"), ("gemma", "gemma")])
def test_templates_that_trl_ships_agree_with_their_training_variants(name, special):
    """Templates from the wild. Their training variants mark the answers themselves: the same, white space apart."""
    folder = resources.files("trl") / "chat_templates"
    tokenizer = train(["<bos>", "<start_of_turn>", "<end_of_turn>"] if special == "gemma" else TEMPLATES[special][1])
    messages = CONVERSATION[1:] if special == "gemma" else CONVERSATION  # Gemma knows no system turn
    found = []
    for variant in ("", "_training"):
        tokenizer.chat_template = (folder / f"{name}{variant}.jinja").read_text(encoding="utf-8")
        assert ("endgeneration" in tokenizer.chat_template) == bool(variant)
        found.append([text.strip() for text in spoken(*render(messages, tokenizer), tokenizer)])
    derived, marked = found
    assert derived == marked and len(derived) == 3


def test_a_template_that_rewrites_earlier_turns_is_refused():
    stripping = CHATML.replace("m.content +", "(m.content.split('</think>')[-1] if not loop.last else m.content) +")
    tokenizer = make("chatml", stripping)
    thinking = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>easy</think>4"},
        {"role": "user", "content": "3 + 3?"},
        {"role": "assistant", "content": "<think>easy</think>6"},
    ]
    with pytest.raises(LabsError, match="turn 2 differently.*generation"):
        render(thinking, tokenizer)
    assert spoken(*render(thinking[:2], tokenizer), tokenizer) == ["<think>easy</think>4<|im_end|>"]
    qwen3 = train(TEMPLATES["chatml"][1])
    qwen3.chat_template = (resources.files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    with pytest.raises(LabsError, match="differently"):
        render(thinking, qwen3)


def test_mistakes_in_conversations_and_tokenizers_are_named():
    tokenizer = make("mistral")
    with pytest.raises(LabsError, match="no chat template"):
        render(CONVERSATION, train(TEMPLATES["chatml"][1]))
    with pytest.raises(LabsError, match="must alternate"):
        render([CONVERSATION[1], CONVERSATION[1]], tokenizer)
    with pytest.raises(LabsError, match="turn 1 is the assistant's"):
        render([CONVERSATION[2]], make("chatml"))
    with pytest.raises(LabsError, match="changes the text"):
        render(CONVERSATION, make("chatml", CHATML.replace("m.content", "m.content | upper")))
    with pytest.raises(LabsError, match="marks nothing"):
        render(CONVERSATION, make("chatml", CHATML + "{% if false %}{% generation %}x{% endgeneration %}{% endif %}"))
    assert sum(render(CONVERSATION[:2], tokenizer)[1]) == 0  # no answer, nothing to learn


# ------------------------------------------------------------------------------------------------- records and rows

ALPACA = {"instruction": "Add.", "input": "2 3", "output": "5"}
PAIR = [{"role": "user", "content": "Add.\n\n2 3"}, {"role": "assistant", "content": "5"}]


@pytest.mark.parametrize(
    "record",
    [
        ALPACA,
        {"instruction": "Add.\n\n2 3", "input": "", "output": "5"},
        {"instruction": "Add.\n\n2 3", "output": "5", "id": 7},
        {"messages": PAIR},
        {"conversations": [{"from": "human", "value": "Add.\n\n2 3"}, {"from": "gpt", "value": "5"}]},
        {"conversations": [{"from": "user", "value": "Add.\n\n2 3"}, {"from": "assistant", "value": "5"}]},
        {"instruction": "Add.", "instances": [{"input": "2 3", "output": "5"}, {"input": "1 1", "output": "2"}]},
    ],
)
def test_every_shape_gives_the_same_messages_and_is_left_alone(record):
    before = copy.deepcopy(record)
    messages = to_messages(record)
    assert messages == PAIR and record == before
    messages[0]["content"] = "changed"
    assert record == before


def test_a_system_turn_keeps_its_role():
    record = {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "H"}]}
    assert [m["role"] for m in to_messages(record)] == ["system", "user"]


@pytest.mark.parametrize(
    "record, message",
    [
        ("text", "must be a mapping"),
        ({"question": "?"}, "unknown record shape with fields \\['question'\\]"),
        ({"instruction": "Add."}, "'output' is missing"),
        ({"instruction": "Add.", "output": ""}, "'output' is empty"),
        ({"instruction": " ", "output": "5"}, "'instruction' is empty"),
        ({"instruction": "Add.", "output": 5}, "'output' must be text, not int"),
        ({"instruction": "Add.", "input": 5, "output": "5"}, "'input' must be text, not int"),
        ({"instruction": "Add.", "instances": []}, "'instances' must be"),
        ({"instruction": "Add.", "instances": [{"input": "2"}]}, r"'instances\[0\].output' is missing"),
        ({"messages": []}, "at least one turn"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "turn 1 has the unknown role 'robot'"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": " \n"}]}, r"turn 2 \(assistant\) is empty"),
        ({"messages": [PAIR[0], {"role": "assistant"}]}, "turn 2 has no field 'content'"),
        ({"messages": [{"content": "x"}]}, "turn 1 has no field 'role'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "list of content parts"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": ["x"]}, "turn 1 must be a mapping"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown role 'narrator'"),
        ({"conversations": [{"from": "human", "value": None}]}, "must be text, not NoneType"),
    ],
)
def test_records_that_cannot_be_read_are_named(record, message):
    with pytest.raises(LabsError, match=message) as caught:
        to_messages(record)
    assert "\n" not in str(caught.value)


def test_clean_normalises_reports_and_drops_the_empty():
    rows = [
        {"instruction": "Cafe\u0301?  \r\nNow.\r", "input": "", "output": "yes \t\n\n  two\n"},
        ALPACA,
        {"instruction": "x", "output": " \r\n"},
        {"broken": True},
    ]
    before, report = copy.deepcopy(rows), Counter()
    kept = clean(rows, report)
    assert rows == before
    assert kept[0] == {"instruction": "Café?\nNow.", "input": "", "output": "yes\n\n  two"}
    assert kept[1:] == [ALPACA, {"broken": True}] and report == {"changed": 1, "empty": 1}
    assert clean(kept) == kept


def test_validate_counts_rows_from_one_and_lists_the_first_few():
    rows = [ALPACA, {"messages": [PAIR[0]]}, ALPACA, {"messages": [*PAIR, {"role": "system", "content": "late"}]}]
    with pytest.raises(LabsError) as caught:
        validate(rows + [{"x": 1}] * 7)
    text = str(caught.value)
    assert "9 of 11 rows" in text and "row 2: no assistant turn" in text and "row 4: turn 3 is a system" in text
    assert "row 5: unknown record shape" in text and "and 4 more" in text and "row 1:" not in text and "\n" not in text
    validate([ALPACA, {"messages": PAIR}])
    validate([])


def chat(question, answer, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def noisy_rows(n, seed=0):
    """Rows of random words; a third are copies of an earlier row with one word changed."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(60)]
    rows = []
    for _ in range(n):
        if rows and rng.random() < 0.35:
            question, answer = (turn["content"].split() for turn in rng.choice(rows)["messages"])
            question[rng.randrange(len(question))] = rng.choice(words)
        else:
            question, answer = rng.choices(words, k=rng.randint(2, 40)), rng.choices(words, k=rng.randint(1, 6))
        rows.append(chat(" ".join(question), " ".join(answer)))
    return rows


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_copies_are_exactly_those_that_comparing_all_pairs_finds(threshold):
    texts = [row["messages"][0]["content"] for row in noisy_rows(300)] + ["w1 w2 w3 w4", "W1 w2  w3 w4"]
    sets = [shingles(text) for text in texts]
    slow = [
        (i, j)
        for j in range(len(sets))
        for i in range(j)
        if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j]) - 1e-9
    ]
    assert list(near_copies(texts, threshold)) == slow and slow


def test_deduplicate_keeps_the_first_and_different_signs_apart():
    long = "Please explain in a few words why the sky is blue at noon and red in the evening over the open sea today"
    rows = [
        chat(long, "Scattering."),
        chat("What is 3 + 4?", "7"),
        chat(long.upper() + "!", "Scattering."),
        chat("What is 3 - 4?", "-1"),
        chat("What is 3 + 4?", "7"),
        chat(long, "Scattering.", system="Speak as a pirate."),
    ]
    before = copy.deepcopy(rows)
    assert deduplicate(rows, 0.8) == [rows[0], rows[1], rows[3], rows[5]] and rows == before
    assert deduplicate([]) == []
    for threshold in (0, 1.5):
        with pytest.raises(LabsError, match="threshold"):
            deduplicate(rows, threshold)


def test_a_long_system_message_does_not_make_near_copies():
    tools = "You may call these functions: " + " ".join(f"function_{i}(x)" for i in range(200))
    rows = [chat(f"Weather in {town} please", f"weather({town})", tools) for town in ("Oslo", "Rome", "Kyiv", "Cork")]
    assert len(deduplicate(rows)) == 4
    assert len(split(rows, 0.25)[1]) == 1


def test_split_does_not_leak_and_does_not_depend_on_the_order():
    rows = noisy_rows(400) + [chat("The very same prompt", f"answer {i} {i * 7}") for i in range(9)]
    random.Random(1).shuffle(rows)
    train, held_out = split(rows, 0.2, seed=3)
    assert len(held_out) == pytest.approx(0.2 * len(rows), abs=2) and len(train) + len(held_out) == len(rows)
    prompts = [{row["messages"][0]["content"] for row in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1]
    texts = [" ".join(f"{m['role']} {m['content']}" for m in row["messages"]) for row in train + held_out]
    pairs = list(near_copies(texts, 0.8))
    assert len(pairs) > 30 and all((i < len(train)) == (j < len(train)) for i, j in pairs)

    shuffled = rows[:]
    random.Random(2).shuffle(shuffled)
    text = lambda side: sorted(map(json.dumps, side))  # noqa: E731
    assert text(split(shuffled, 0.2, seed=3)[1]) == text(held_out) != text(split(rows, 0.2, seed=4)[1])
    assert [row for row in rows if row in held_out] == held_out  # in the order given


def test_split_refuses_what_it_cannot_do():
    for fraction in (0, 1, -0.1):
        with pytest.raises(LabsError, match="fraction"):
            split([ALPACA] * 3, fraction)
    with pytest.raises(LabsError, match="cannot hold out"):
        split([ALPACA] * 10, 0.1)
    with pytest.raises(LabsError, match="cannot hold out"):
        split([ALPACA], 0.5)


# --------------------------------------------------------------------------------------------- files, command line


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_rows_survive_a_file(ending, tmp_path):
    rows = [{"messages": PAIR}, ALPACA, {"instruction": "Grüße ☕\u2028", "output": "x", "weights": [1, 2]}]
    write_rows(rows, tmp_path / "new" / f"rows{ending}")
    assert read_rows(tmp_path / "new" / f"rows{ending}") == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"rows{ending}"]
    write_rows([], tmp_path / f"none{ending}")
    assert read_rows(tmp_path / f"none{ending}") == []


def test_files_that_cannot_be_read_are_named(tmp_path):
    broken = tmp_path / "rows.jsonl"
    cases = [
        ('{"a": 1}\n\n{"a": \n', "rows.jsonl, row 3: broken JSON"),
        ("[1, 2]\n", "row 1: expected one JSON object"),
        ('[\n{"a": 1}]', "one object a line"),
    ]
    for text, message in cases:
        broken.write_text(text)
        with pytest.raises(LabsError, match=message):
            read_rows(broken)
    broken.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(LabsError, match="not UTF-8"):
        read_rows(broken)
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    with pytest.raises(LabsError, match="Parquet"):
        read_rows(tmp_path / "rows.parquet")
    for path, message in (("none.jsonl", "none.jsonl: No such file"), ("rows.csv", "unknown kind of file '.csv'")):
        with pytest.raises(LabsError, match=message):
            read_rows(tmp_path / path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    for ending in (".jsonl", ".parquet"):
        path = tmp_path / f"rows{ending}"
        write_rows([ALPACA], path)
        with pytest.raises(LabsError, match="cannot write"):
            write_rows([{"x": object()}], path)
        assert read_rows(path) == [ALPACA]
    with pytest.raises(LabsError, match="cannot write .*rows.jsonl"):
        write_rows([ALPACA], tmp_path / "rows.jsonl" / "rows.jsonl")
    assert len(list(tmp_path.iterdir())) == 2


def test_command_line(script, tmp_path):
    rows = noisy_rows(60) + [{"instruction": "x", "output": " "}]
    write_rows(rows, tmp_path / "in.jsonl")
    done = script(lesson.__file__, tmp_path / "in.jsonl", tmp_path / "out", "--held-out", 0.2, "--threshold", 0.7)
    assert done.returncode == 0, done.stderr
    train, held_out = (read_rows(tmp_path / "out" / f"{side}.jsonl") for side in ("train", "held_out"))
    assert re.search(rf"wrote +{len(train)} rows", done.stdout) and "1 empty ones dropped" in done.stdout
    assert len(held_out) == round(0.2 * (len(train) + len(held_out)))
    validate(train + held_out)

    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "robot", "content": "x"}]}\n')
    failed = script(lesson.__file__, tmp_path / "in.jsonl", tmp_path / "out2")
    assert failed.returncode == 1 and failed.stdout == "" and not (tmp_path / "out2").exists()
    assert failed.stderr.startswith("error: 1 of 1 rows") and "row 1" in failed.stderr
    assert failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr


def test_real_instruction_seeds_are_read_and_split(real_data):
    rows = clean(read_rows(real_data("self-instruct/seed_tasks.jsonl")))
    validate(rows)
    train, held_out = split(rows, 0.1)
    assert len(rows) == 175 and len(held_out) in (17, 18)
