"""Contamination: planted copies are found, nothing else is, and odd encodings are named and never a silent zero."""

import gzip
import json
import random
import time
import unicodedata

import pytest

import contamination
from contamination import normalise_text, overlap_report, read_texts, words_of
from shared import LabsError, tiny_world
from shared.significance import wilson_interval
from stage_overlap import STAGE_TEXTS, stage_overlap, stage_texts

WORDS = [f"w{index}" for index in range(5000)]


def sentence(rng, length):
    return " ".join(rng.choice(WORDS) for _ in range(length))


@pytest.fixture
def planted():
    """60 test texts and 300 training texts of random words; what is planted is known."""
    rng = random.Random(1)
    return [sentence(rng, 30) for _ in range(60)], [sentence(rng, 40) for _ in range(300)]


def naive(test, training, n):
    """The definition itself, without an index: {test position: covered word positions}."""
    runs = {tuple(words[i : i + n]) for words in map(str.split, training) for i in range(len(words) - n + 1)}
    covered = {}
    for position, words in enumerate(map(str.split, test)):
        hit = {i + j for i in range(len(words) - n + 1) if tuple(words[i : i + n]) in runs for j in range(n)}
        covered[position] = len(hit) / len(words)
    return covered


@pytest.mark.parametrize("n", [1, 5, 8, 13])
def test_equals_the_definition(planted, n):
    test, training = planted
    rng = random.Random(n)
    for row in range(0, 60, 4):  # plant a run of 4 to 20 words of a training text
        words, source = test[row].split(), rng.choice(training).split()
        length = rng.randint(4, 20)
        words[5 : 5 + length] = source[3 : 3 + length]
        test[row] = " ".join(words)
    report = overlap_report(test, training, n)
    expected = naive(test, training, n)
    assert report.coverage == [pytest.approx(expected[row]) for row in range(60)]
    assert report.flagged == [row for row in range(60) if expected[row] > 0]
    assert 0 < report.n_flagged
    assert report.share == report.n_flagged / 60 and report.ci95 == wilson_interval(report.n_flagged, 60)


def test_a_run_one_word_short_is_no_overlap(planted):
    test, training = planted
    source = training[7].split()
    for length, flagged in ((12, 0), (13, 1)):
        test[3] = " ".join([*source[:length], *test[3].split()[length:]])
        report = overlap_report(test, training)
        assert report.n_flagged == flagged
    assert report.flagged == [3] and report.coverage[3] == pytest.approx(13 / 30)
    example = report.examples[0]
    assert (example["test"], example["training"]) == (3, 7)
    assert example["shared"] == " ".join(source[:13])


def test_coverage_border(planted):
    test, training = planted
    test[0] = " ".join(training[0].split()[:30])
    test[1] = " ".join([*training[1].split()[:15], *test[1].split()[:15]])
    assert overlap_report(test, training).flagged == [0, 1]
    report = overlap_report(test, training, min_coverage=0.7)
    assert report.flagged == [0] and report.n_mostly_covered == 1
    assert overlap_report(test, training, min_coverage=1.0).coverage[:2] == [1.0, 0.5]


def test_the_order_of_words_counts(planted):
    test, training = planted
    words = training[0].split()[:30]
    test[0] = " ".join(reversed(words))
    assert overlap_report(test, training).n_flagged == 0


def test_short_texts_are_looked_for_whole():
    training = ["Ana has 9 pens and Ben has 4 hats . 12 + 30 = 42", "5 - 3 = 2"]
    report = overlap_report(["12 + 30 =", "12 - 30 =", "30 = 12 +", "Ana has 9 hats"], training)
    assert report.flagged == [0] and report.n_short == 4
    assert report.coverage == [1.0, 0.0, 0.0, 0.0]


def test_case_marks_and_spaces_do_not_hide_a_copy():
    text = "The quick brown fox, jumping over a lazy dog, ran home at nine o'clock."
    for copy in (text.upper(), text.replace(" ", "\n\t "), text.replace(",", ";"), f"“{text}”"):
        assert overlap_report([copy], [text], 8).n_flagged == 1
    assert overlap_report([text.replace("lazy", "tired").replace("home", "off")], [text], 8).n_flagged == 0


ENCODED = [
    ("decomposed letters (not NFC)", unicodedata.normalize("NFD", "Le café où René a été élevé près de Béziers")),
    ("compatibility characters (not NFKC)", "Ｌｅ café où René a été élevé près de Béziers"),
    ("invisible characters", "Le ca\u200bfé où Re\u00adné a été élevé \ufeffprès de Béziers"),
    ("control characters", "Le café\x00où René a été élevé près de Béziers"),
    ("not UTF-8, read as Windows-1252", "Le café où René a été élevé près de Béziers".encode("cp1252")),
    ("byte order mark", b"\xef\xbb\xbf" + "Le café où René a été élevé près de Béziers".encode()),
    ("UTF-16", "Le café où René a été élevé près de Béziers".encode("utf-16")),
]


@pytest.mark.parametrize("name, raw", ENCODED, ids=[name for name, _ in ENCODED])
def test_encodings_are_mended_named_and_counted(name, raw):
    plain = "Le café où René a été élevé près de Béziers"
    for test, training, field in (([raw, plain], [plain], "test_problems"), ([plain], [raw], "training_problems")):
        report = overlap_report(test, training, 5)
        assert report.n_flagged == len(test) and all(value == 1.0 for value in report.coverage)
        assert getattr(report, field) == {name: 1}
        assert any(f"1 texts with {name}" in line for line in report.lines())


def test_normalisation_is_stable_and_plain_text_has_no_problem():
    for text in ("plain text, 12 + 3 = 15", "İstanbul ﬁne ½ Ⅳ", "数学の問題 12", "a\u0301\u200d e\u0301"):
        once, _ = normalise_text(text)
        assert normalise_text(once)[0] == once
    assert normalise_text("plain text")[1] == []
    assert normalise_text("caf\u00e9")[1] == []
    assert "half a character (lone surrogate)" in normalise_text("ab\ud800c")[1]
    assert "character lost earlier (U+FFFD)" in normalise_text("ab\ufffdc")[1]


def test_text_without_spaces_is_not_one_word():
    text = "小明有九支铅笔他又买了三支现在他一共有多少支铅笔"
    assert len(words_of(normalise_text(text)[0])) == len(text)
    report = overlap_report([text], ["题目：" + text[:18] + "请回答"], 13)
    assert report.n_flagged == 1 and report.coverage[0] == pytest.approx(18 / len(text))


def test_empty_texts_are_counted_and_leave_the_share():
    text = "one two three four five six"
    report = overlap_report([text, "", None, " \n", "\u200b", "?!"], [text, ""], 3)
    assert report.n_test == 6 and report.n_compared == 1 and report.share == 1.0
    assert report.coverage == [1.0, None, None, None, None, None]
    assert report.test_problems == {"empty text": 4, "invisible characters": 1, "no word in it": 1}
    assert report.training_problems == {"empty text": 1} and report.n_training == 1


@pytest.mark.parametrize(
    "test, training, options, said",
    [
        ([], ["a b"], {}, "0 test texts"),
        (["", None], ["a b"], {}, "2 test texts, none with a word"),
        (["a b"], [], {}, "no training text"),
        (["a b"], ["", "..."], {}, "no training text"),
        (["a b", 7], ["a b"], {}, "test text 2: found int"),
        (["a b"], ["a b", ["x"]], {}, "training text 2: a list must be a conversation"),
        (["a b"], ["a b"], {"n": 0}, "n=0"),
        (["a b"], ["a b"], {"min_coverage": 1.5}, "min_coverage=1.5"),
    ],
)
def test_what_cannot_be_compared_is_no_zero(test, training, options, said):
    with pytest.raises(LabsError, match=said.replace("(", r"\(")):
        overlap_report(test, training, **options)


def test_masks():
    test = ["Ana has 12 pens. She buys 3 more and then gives 4 of them away to Ben in Rome."]
    numbers = [test[0].replace("12", "95").replace("3", "1,234").replace("4 of", "7 of")]
    values = [numbers[0].replace("Ana", "Otto").replace("Ben", "Kira").replace("pens", "hats").replace("Rome", "Oslo")]
    known = tiny_world.KNOWN_VALUES
    for training, found in ((test, (1, 1, 1)), (numbers, (0, 1, 1)), (values, (0, 0, 1))):
        flagged = [
            overlap_report(test, training, 13, **mask).n_flagged
            for mask in ({}, {"mask_numbers": True}, {"mask_numbers": True, "mask_words": known})
        ]
        assert tuple(flagged) == found
    other = ["What is the price of the red boots in Lima on a Monday, if one may ask you so late?"]
    assert overlap_report(test, other, 13, mask_numbers=True, mask_words=known).n_flagged == 0


def test_conversations_and_generators():
    talk = [{"role": "user", "content": "How many pens has Ana now?"}, {"role": "assistant", "content": None}]
    assert overlap_report([talk], (text for text in ["Tell me: how many pens has Ana now?"]), 6).n_flagged == 1


def test_eight_thousand_rows_against_twenty_thousand_are_quick():
    rng = random.Random(3)
    words = [f"v{index}" for index in range(400)]
    make = lambda count: [" ".join(rng.choices(words, k=40)) for _ in range(count)]  # noqa: E731
    test, training = make(8000), make(20_000)
    training[123] = test[77]
    start = time.process_time()
    report = overlap_report(test, training)
    assert report.flagged == [77] and report.coverage[77] == 1.0
    assert time.process_time() - start < 60


# ------------------------------------------------------------------------------------------------------- files and commands


def write(path, rows):
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def test_files_in_mixed_encodings(tmp_path):
    latin = '{"text": "où René a été élevé"}\n'.encode("cp1252")
    path = write(tmp_path / "a.jsonl", [{"text": "où René a été élevé"}, latin, {"text": None}])
    texts, reading = read_texts(path, ["text"])
    assert texts == ["où René a été élevé", "où René a été élevé", ""]
    assert reading == {"not UTF-8, read as Windows-1252": 1}
    whole = tmp_path / "b.jsonl"
    whole.write_bytes('{"text": "où René"}\n{"text": "été"}\n'.encode("utf-16"))
    assert read_texts(whole, ["text"]) == (["où René", "été"], {"UTF-16": 1})
    zipped = tmp_path / "c.jsonl.gz"
    zipped.write_bytes(gzip.compress(b'{"question": "a b", "answer": "c"}\n'))
    assert read_texts(zipped, ["question", "answer"])[0] == ["a b\nc"]


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"text": "a"}\n{broken\n', "row 2: not JSON"),
        (b'{"text": "a"}\n[1]\n', "row 2: found list"),
        (b'{"txt": "a"}\n', "row 1: no field 'text'; it has 'txt'"),
        (b'{"text": 3}\n', "row 1: field 'text' is int"),
    ],
)
def test_broken_files_are_named(tmp_path, content, said):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(LabsError) as error:
        read_texts(path, ["text"])
    assert said in str(error.value) and "x.jsonl" in str(error.value)


def test_the_command(tmp_path, script):
    text = "a b c d e f g h i j k l m n o p"
    test = write(tmp_path / "test.jsonl", [{"q": text}, {"q": "nothing of the kind " * 5}, {"q": ""}])
    train = write(tmp_path / "train.jsonl", [{"q": text.upper()}])
    module = contamination.__file__
    done = script(module, test, train, "--field", "q", "--n", "13", "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 test texts share one with 1 training texts" in done.stdout
    assert "test: 1 texts with empty text" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["coverage"] == [1.0, 0.0, None]
    failed = script(module, test, tmp_path / "none.jsonl", "--field", "q")
    assert failed.returncode == 1 and failed.stderr.startswith("error: cannot read")
    assert "Traceback" not in failed.stderr


# ------------------------------------------------------------------------------------------------------------------- stages


def test_reasoning_stages_share_sentences_and_no_problem():
    found = stage_overlap("cold_start")
    assert found.exact.n_flagged == 0 and found.exact.n_compared == 300
    assert found.values_masked.share > 0.9  # templates are shared by design
    row = found.row()
    assert row["exact"]["ci95"][1] > 0 and "coverage" not in row["exact"]
    assert found.line().startswith("cold_start")


def test_a_test_row_in_training_would_be_seen():
    tests, training, _ = stage_texts("cold_start")
    assert overlap_report(tests, [*training, tests[5]]).flagged == [5]


def test_unknown_stage_is_named():
    with pytest.raises(LabsError, match="did you mean sft"):
        stage_texts("sftt")
    assert set(STAGE_TEXTS) >= {"base", "sft", "dpo", "safedpo", "cold_start", "grpo", "tools"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted(STAGE_TEXTS))
def test_no_stage_is_asked_what_it_has_read(stage):
    report = stage_overlap(stage).exact
    if (
        stage == "tools"
    ):  # half-finished requests without a value, such as "Where can I find it?", which must not be served
        assert report.n_mostly_covered / report.n_compared < 0.06
    elif stage == "reward":  # one pair's two answers: the question that both repeat is nearly all of them
        assert report.n_mostly_covered / report.n_compared < 0.02
    else:
        assert report.n_mostly_covered == 0
