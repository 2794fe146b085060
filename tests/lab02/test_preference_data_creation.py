"""Triplets from dialogues, samples and files: each bad row is named and counted, and nothing is written for it."""

import json
import os
from pathlib import Path

import pytest

import alignment_world
import preference_data_creation as pairs_module
from preference_data_creation import (
    as_messages,
    collect,
    filter_pairs,
    from_dialogues,
    from_samples,
    held_out_prompts,
    labelled,
    read_triplets,
    report_lines,
    split_dialogues,
    split_pairs,
    turns,
    write_triplets,
)
from shared import LabsError

SCRIPT = "labs/02_preference_alignment/preference_data_creation.py"
GOOD = {"prompt": "Where is Rome?", "chosen": "In Italy.", "rejected": "Rome is a town, and towns are somewhere."}


# --------------------------------------------------------------------------------------------------------- dialogues


def dialogue(*texts):
    """Turns of the two speakers by turns, as HH-RLHF writes them."""
    return "".join(f"\n\n{('Human', 'Assistant')[index % 2]}: {text}" for index, text in enumerate(texts))


def test_dialogues_become_the_shared_history_and_two_last_answers():
    history = ("Hi", "Hello", "Where?\n\nAnd when?")
    triplet = split_dialogues(dialogue(*history, "Here."), dialogue(*history, "There."))
    assert triplet == {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Where?\n\nAnd when?",
        "chosen": "Here.",
        "rejected": "There.",
        "source": "hh-rlhf",
    }
    assert split_dialogues(dialogue("Hi", "a"), dialogue("Hi", "b"))["prompt"] == "\n\nHuman: Hi"


def test_white_space_around_turns_makes_no_other_history():
    triplet = split_dialogues("\n\nHuman:  Hi \n\nAssistant:  a\n", "\n\nHuman: Hi\n\nAssistant: b")
    assert (triplet["prompt"], triplet["chosen"]) == ("\n\nHuman: Hi", "a")


MALFORMED = {
    'does not begin with "Human:"': [
        ("Human: Hi\n\nAssistant: a", dialogue("Hi", "b")),
        ("\n\nAssistant: a\n\nHuman: Hi\n\nAssistant: b", dialogue("Hi", "b")),
        ("Well." + dialogue("Hi", "a"), dialogue("Hi", "b")),
        ("", dialogue("Hi", "b")),
    ],
    "two turns of one speaker in a row": [
        ("\n\nHuman: Hi\n\nHuman: You\n\nAssistant: a", dialogue("Hi", "b")),
        (dialogue("Hi", "b"), "\n\nHuman: Hi\n\nAssistant: a\n\nAssistant: c"),
    ],
    "ends with the human's turn": [(dialogue("Hi", "a", "And?"), dialogue("Hi", "b"))],
    "empty turn": [
        (dialogue("Hi", ""), dialogue("Hi", "b")),
        (dialogue("Hi", " \n"), dialogue("Hi", "b")),
        (dialogue("", "a"), dialogue("", "b")),
    ],
    "the two histories differ": [
        (dialogue("Hi", "a"), dialogue("Hi you", "b")),
        (dialogue("Hi", "a"), dialogue("Hi", "a", "And?", "b")),
    ],
    "both answers are the same": [(dialogue("Hi", "a"), dialogue("Hi", "a ")), (dialogue("Hi", "a"),) * 2],
}


def test_each_malformed_kind_is_counted_under_its_reason():
    rows = [{"chosen": chosen, "rejected": rejected} for cases in MALFORMED.values() for chosen, rejected in cases]
    good = {"chosen": dialogue("Hi", "a"), "rejected": dialogue("Hi", "b")}
    triplets, malformed = from_dialogues([good, *rows, good])
    assert len(triplets) == 2
    assert malformed == {reason: len(cases) for reason, cases in MALFORMED.items()}


def test_prompts_and_messages_go_there_and_back():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello\n\nyou"},
        {"role": "user", "content": "And?"},
    ]
    prompt = split_dialogues(dialogue("Hi", "Hello\n\nyou", "And?", "a"), dialogue("Hi", "Hello\n\nyou", "And?", "b"))[
        "prompt"
    ]
    assert as_messages(prompt) == turns(prompt) == messages
    for plain in ("Where is Rome?", "He said\n\nHuman: no", "Human: hi"):
        assert as_messages(plain) == [{"role": "user", "content": plain}]


@pytest.mark.skipif(not os.environ.get("LABS_DATA_DIR"), reason="needs the real rows: LABS_DATA_DIR")
def test_every_real_row_is_a_triplet_or_counted():
    from shared.data import first_rows

    rows, _, used = first_rows("hh-rlhf", ("test", "train"))
    triplets, malformed = from_dialogues(rows)
    assert used == "mirror" and len(rows) >= 1200
    assert len(triplets) + malformed.total() == len(rows) and len(triplets) > 0.9 * len(rows)
    assert set(malformed) <= set(MALFORMED)
    for triplet in triplets:
        assert pairs_module.problem(triplet) is None
        assert as_messages(triplet["prompt"])[-1]["role"] == "user"


# ----------------------------------------------------------------------------------------------------------- samples


def test_samples_take_the_side_that_wins_and_count_the_rest():
    def judge(prompt, first, second):
        if prompt == "broken":
            return None
        if prompt == "positional":
            return "first"
        return "tie" if len(first) == len(second) else "first" if len(first) < len(second) else "second"

    prompts = ["a wins", "b wins", "tie", "broken", "positional"]
    triplets, dropped = from_samples(prompts, ["x", "long", "x", "x", "x"], ["long", "y", "y", "long", "long"], judge)
    assert triplets == [
        {"prompt": "a wins", "chosen": "x", "rejected": "long", "source": "samples"},
        {"prompt": "b wins", "chosen": "y", "rejected": "long", "source": "samples"},
    ]
    assert dropped == {"tie": 2, "no verdict": 1}
    assert from_samples([], [], [], judge) == ([], {})


# ------------------------------------------------------------------------------------------------------------- files


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def without(field):
    return {key: value for key, value in GOOD.items() if key != field}


BAD_ROWS = {
    "no prompt": (without("prompt"), "field 'prompt' is missing"),
    "no chosen": (without("chosen"), "field 'chosen' is missing"),
    "no rejected": (without("rejected"), "field 'rejected' is missing"),
    "same answers": ({**GOOD, "chosen": "same", "rejected": " same\n"}, "chosen and rejected are the same"),
    "number": ({**GOOD, "chosen": 7}, "field 'chosen' must be text, not int"),
    "null": ({**GOOD, "prompt": None}, "field 'prompt' must be text, not NoneType"),
    "messages": ({**GOOD, "chosen": [{"role": "assistant", "content": "a"}]}, "'chosen' must be text, not list"),
    "empty": ({**GOOD, "rejected": " \n"}, "field 'rejected' is empty"),
    "half a character": ({**GOOD, "chosen": "\ud83d"}, "lone surrogate"),
    "no dialogue": ({**GOOD, "prompt": "\n\nHuman: a\n\nHuman: b"}, "no dialogue: two turns of one speaker"),
    "ends with the answer": ({**GOOD, "prompt": dialogue("a", "b")}, "nothing to answer"),
    "label in words": ({**GOOD, "chosen_unsafe": "yes"}, "field 'chosen_unsafe' must be true or false"),
    "label two": ({**GOOD, "rejected_unsafe": 2}, "field 'rejected_unsafe' must be true or false"),
    "label half": ({**GOOD, "rejected_unsafe": 1.0}, "field 'rejected_unsafe' must be true or false"),
    "list": ("[1, 2]", "found a list"),
    "text": ('"words"', "found a str"),
    "broken JSON": ('{"prompt": "cut sho', "broken JSON"),
    "long number": ('{"prompt": ' + "1" * 5000 + "}", "JSON that no triplet needs"),
    "deep": ("[" * 100_000, "JSON that no triplet needs"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_names_file_and_row(tmp_path, case):
    row, words = BAD_ROWS[case]
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines(GOOD, "", row))  # the empty line is no row, but it is a line
    with pytest.raises(LabsError) as caught:
        read_triplets(path)
    message = str(caught.value)
    assert f"{path}, row 3: " in message and words in message and "(1 rows are good)" in message
    assert "more row" not in message and "\n" not in message


def test_wrong_encodings_are_named_and_a_byte_order_mark_is_not_one(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines(GOOD) + '{"prompt": "Wo ist Köln?", "chosen": "a", "rejected": "b"}\n'.encode("latin-1"))
    with pytest.raises(LabsError, match=r"mine\.jsonl, row 2: not UTF-8 text \(byte 20\); convert"):
        read_triplets(path)
    path.write_bytes(lines(GOOD).decode().encode("utf-16"))
    with pytest.raises(LabsError, match=r"row 1: not UTF-8 text"):
        read_triplets(path)
    path.write_bytes(b"\xef\xbb\xbf" + lines(GOOD).replace(b"\n", b"\r\n"))
    assert read_triplets(path) == [GOOD]


def test_further_problems_are_counted(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines(GOOD, without("chosen"), "{", GOOD, "[]"))
    with pytest.raises(LabsError, match=r"row 2: field 'chosen' is missing; 2 more rows have problems; .*\(2 rows"):
        read_triplets(path)
    path.write_bytes(lines(GOOD, "{", "[]"))
    with pytest.raises(LabsError, match=r"row 2: broken JSON .*; 1 more row has problems"):
        read_triplets(path)


def test_files_that_hold_no_rows_at_all(tmp_path):
    with pytest.raises(LabsError, match=r"cannot read .*nowhere\.jsonl: No such file.*check the path"):
        read_triplets(tmp_path / "nowhere.jsonl")
    with pytest.raises(LabsError, match=r"cannot read .*nowhere\.parquet: No such file.*check the path"):
        read_triplets(tmp_path / "nowhere.parquet")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(LabsError, match="cannot read"):
        read_triplets(tmp_path / "folder.jsonl")
    (tmp_path / "table.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(LabsError, match=r"table\.csv: unknown kind of file '\.csv'; use \.jsonl or \.parquet"):
        read_triplets(tmp_path / "table.csv")
    for content in (b"", b"\n \n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(LabsError, match=r"empty\.jsonl holds no triplet"):
            read_triplets(tmp_path / "empty.jsonl")
    for content in (b"", b"PAR1 and then nothing", lines(GOOD)):
        (tmp_path / "no.parquet").write_bytes(content)
        with pytest.raises(LabsError, match=r"no\.parquet is not a readable Parquet file") as caught:
            read_triplets(tmp_path / "no.parquet")
        assert "\n" not in str(caught.value)


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_and_json_lines_give_the_same_rows(tmp_path):
    rows = [{**pair, "chosen": f"ä\u2028 {pair['chosen']}"} for pair in alignment_world.safety_pairs(30)]
    written = write_triplets(rows, tmp_path / "rows.jsonl")
    assert read_triplets(written) == read_triplets(parquet(tmp_path / "rows.parquet", rows)) == rows


def test_a_bad_row_of_a_parquet_file_is_named_too(tmp_path):
    path = parquet(tmp_path / "rows.parquet", [GOOD, {**GOOD, "chosen": None}])
    with pytest.raises(LabsError, match=r"rows\.parquet, row 2: field 'chosen' must be text"):
        read_triplets(path)


def test_labels_that_are_null_count_as_safe(tmp_path):
    rows = [{**GOOD, "chosen_unsafe": True, "rejected_unsafe": None}, {**GOOD, "chosen_unsafe": None}]
    read = read_triplets(parquet(tmp_path / "rows.parquet", rows))
    labels = [(row["chosen_unsafe"], row["rejected_unsafe"]) for row in labelled([*read, GOOD])]
    assert labels == [(True, False), (False, False), (False, False)]
    from preference_losses import safedpo_counts

    assert safedpo_counts(labelled(read)) == {"kept": 1, "swapped": 1, "dropped": 0}


def test_triplets_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "out.jsonl"
    with pytest.raises(LabsError, match="triplet 2: field 'chosen' is empty; nothing was written"):
        write_triplets([GOOD, {**GOOD, "chosen": ""}], path)
    with pytest.raises(LabsError, match="no triplet is left"):
        write_triplets([], path)
    with pytest.raises(LabsError, match=r"name the file \.jsonl"):
        write_triplets([GOOD], tmp_path / "out.parquet")
    assert not list(tmp_path.iterdir())
    write_triplets([GOOD], path)
    with pytest.raises(LabsError):
        write_triplets([GOOD, {}], path)
    assert read_triplets(path) == [GOOD] and [each.name for each in path.parent.iterdir()] == ["out.jsonl"]
    (tmp_path / "file").write_text("")
    with pytest.raises(LabsError, match="cannot write"):
        write_triplets([GOOD], tmp_path / "file" / "out.jsonl")


# ----------------------------------------------------------------------------------------------------------- filters


def pair(prompt, chosen="yes, it is", rejected="no, it is not"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_filters_drop_and_count_by_reason():
    rows = [
        pair("One?"),
        pair("Two?", "Same answer", " same  ANSWER\n"),
        pair(" held OUT\nprompt "),
        pair("one? "),
        pair("Three?", "a", "b" * 20),
        pair("Four?", "a" * 21, "b"),
        pair("five?", "a", "b" * 21),
        pair("ONE?", "another", "answer"),
    ]
    kept, dropped = filter_pairs(rows, held_out=["Held out prompt", "another"], max_length_ratio=20)
    assert kept == [rows[0], rows[4]]
    assert dropped == {"identical answers": 1, "held-out prompt": 1, "duplicate prompt": 2, "length ratio": 2}
    assert len(kept) + sum(dropped.values()) == len(rows)


def test_a_dropped_pair_does_not_take_its_prompt_with_it():
    kept, dropped = filter_pairs([pair("One?", "same", "same"), pair("One?")])
    assert kept == [pair("One?")] and dropped["identical answers"] == 1 and dropped["duplicate prompt"] == 0


def test_report_names_what_happened_and_nothing_else():
    dropped = {"identical answers": 0, "length ratio": 3}
    assert report_lines(5, dropped, {"empty turn": 2, "both answers are the same": 1}) == [
        "kept 5 pairs",
        "malformed: both answers are the same: 1",
        "malformed: empty turn: 2",
        "dropped: length ratio: 3",
    ]
    assert report_lines(5, {}) == ["kept 5 pairs"]


def test_every_test_prompt_leaks_are_looked_for_in():
    held_out = set(held_out_prompts())
    requests = [alignment_world.test_requests(400, harmful) for harmful in (True, False)]
    asked = [row["prompt"] for rows in (alignment_world.test_questions(400), *requests) for row in rows]
    asked += [row["instruction"] for row in pairs_module.test_instructions(400)]
    assert set(asked) <= held_out
    kept, dropped = filter_pairs([pair(prompt) for prompt in dict.fromkeys(asked)], held_out)
    assert not kept and dropped["held-out prompt"] == len(set(asked))


def test_split_keeps_a_prompt_on_one_side_and_neither_side_empty():
    rows = [pair(f"prompt {index % 40}", f"answer {index}") for index in range(60)]
    for share in (0.0, 0.05, 0.5, 0.99):
        training, validation = split_pairs(rows, share, seed=1)
        assert training and validation and len(training) + len(validation) == 60
        assert not {row["prompt"] for row in training} & {row["prompt"] for row in validation}
    assert split_pairs(rows, 0.1, 1) == split_pairs(rows, 0.1, 1) != split_pairs(rows, 0.1, 2)
    assert [len(part) for part in split_pairs(rows[:40], 0.1, 1)] == [36, 4]
    for few in ([], rows[:1], [rows[0], rows[40]]):
        with pytest.raises(LabsError, match=f"{len(few)} pairs of"):
            split_pairs(few, 0.1, 0)
    for share in (1.0, -0.1):
        with pytest.raises(LabsError, match="validation_fraction"):
            split_pairs(rows, share, 0)


# ----------------------------------------------------------------------------------------------------------- sources


def test_sources_take_as_many_rows_as_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("LABS_DATA_DIR", raising=False)
    path = write_triplets(alignment_world.persona_pairs(60), tmp_path / "mine.jsonl")
    rows, report = collect(str(path), 10, max_length_ratio=100)
    assert len(rows) == 10 and report == ["10 of 60 rows", "kept 10 pairs"]
    assert collect(str(path), 10, max_length_ratio=100)[0] == rows != collect(str(path), 10, 1, 100)[0]
    assert len(collect(str(path), 10**6, max_length_ratio=100)[0]) == 60
    for source in ("persona", "safety"):
        rows, report = collect(source, 40, max_length_ratio=100)
        assert len(rows) == 40 and report == ["kept 40 pairs"]
    with pytest.raises(LabsError, match="unknown source 'safty': did you mean safety"):
        collect("safty", 10)


def test_public_dialogues_say_where_they_come_from(tmp_path, monkeypatch):
    import gzip

    monkeypatch.delenv("LABS_DATA_DIR", raising=False)
    monkeypatch.delenv("LABS_ALLOW_HUB", raising=False)
    rows, report = collect("hh-rlhf", 50, max_length_ratio=100)
    assert report[0] == "50 rows of the train split, source: generated" and len(rows) == 50
    folder = tmp_path / "hh-rlhf"
    folder.mkdir()
    real = [{"chosen": dialogue("Hi", "a"), "rejected": dialogue("Hi", "b")}, {"chosen": "x", "rejected": "y"}]
    with gzip.open(folder / "harmless-base-test.jsonl.gz", "wb") as file:
        file.write(lines(*real))
    monkeypatch.setenv("LABS_DATA_DIR", str(tmp_path))
    rows, report = collect("hh-rlhf", 50)
    assert [row["prompt"] for row in rows] == ["\n\nHuman: Hi"]
    assert report == [
        "2 rows of the test split, source: mirror",
        "kept 1 pairs",
        'malformed: does not begin with "Human:": 1',
    ]


@pytest.mark.parametrize("source, labels", [("persona", set()), ("safety", {"chosen_unsafe", "rejected_unsafe"})])
def test_command_line_writes_rows_that_the_datasets_library_loads(tmp_path, script, source, labels):
    output = tmp_path / "new" / "out.jsonl"
    done = script(SCRIPT, source, output, "--n", 50, "--max-length-ratio", 100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["kept 50 pairs", f"wrote {output}"]
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert rows == read_triplets(output) and len(rows) == 50
    assert set(rows[0]) == {"prompt", "chosen", "rejected", "source"} | labels


def test_command_line_takes_all_of_a_file(tmp_path, script):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines(*(pair(f"Question {index}?") for index in range(1200))))
    done = script(SCRIPT, path, tmp_path / "clean.jsonl")
    assert done.returncode == 0 and done.stdout.startswith("kept 1200 pairs\n"), done.stderr
    assert (tmp_path / "clean.jsonl").read_bytes() == path.read_bytes()


BAD_FILES = {
    "bad row": ("mine.jsonl", lines(GOOD, without("chosen")), "mine.jsonl, row 2: field 'chosen' is missing"),
    "latin-1": ("mine.jsonl", "{'prompt': 'Köln'}".encode("latin-1"), "mine.jsonl, row 1: not UTF-8"),
    "Parquet": ("mine.parquet", b"nothing", "mine.parquet is not a readable Parquet file"),
    "ending": ("mine.csv", b"", "unknown kind of file"),
    "nothing left": ("mine.jsonl", lines(pair("One?", "Same", "same ")), "no triplet is left"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_command_line_mistakes_are_one_line_and_write_nothing(tmp_path, case, monkeypatch, capsys):
    name, content, words = BAD_FILES[case]
    Path(tmp_path / name).write_bytes(content)
    done = command_line(capsys, tmp_path / name, tmp_path / "out.jsonl")
    assert done[0] == 1 and done[1] == "" and done[2].startswith("error: ") and words in done[2]
    assert done[2].count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == [name]


def command_line(capsys, *arguments):
    """(exit code, standard output, standard error) of the command, without a process of its own."""
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(pairs_module.main)
    with pytest.raises(SystemExit) as ended:
        app([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def test_command_line_mistakes_as_a_user_meets_them(tmp_path, script):
    for source, words in ((tmp_path / "nowhere.jsonl", "check the path"), ("personal", "did you mean persona")):
        done = script(SCRIPT, source, tmp_path / "out.jsonl")
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not list(tmp_path.iterdir())
