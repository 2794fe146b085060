"""The data registry: the same rows from mirror, hub and generator; errors that name file, row and field."""

import gzip
import json
import re

import pytest

from shared import LabsError, data
from shared.data import DATASETS, fetch, first_rows, load_rows, load_text


@pytest.fixture(autouse=True)
def no_sources(monkeypatch):
    monkeypatch.delenv("LABS_DATA_DIR", raising=False)
    monkeypatch.delenv("LABS_ALLOW_HUB", raising=False)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A hand-made mirror (no manifest) with three gsm8k rows, one of them holding a U+2028 line separator."""
    folder = tmp_path / "mirror"
    rows = [{"question": f"How many\u2028are {i}?", "answer": f"#### {i}", "extra": 1} for i in range(3)]
    write(folder / "gsm8k/train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    monkeypatch.setenv("LABS_DATA_DIR", str(folder))
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


GENERATED = [(name, split) for name, spec in DATASETS.items() if spec.fallback for split in spec.files]


@pytest.mark.parametrize(("name", "split"), GENERATED)
def test_generator_gives_the_registry_columns_and_the_same_rows_twice(name, split):
    rows = load_rows(name, split, source="generated")
    assert all(list(row) == list(DATASETS[name].columns) for row in rows)
    assert rows == load_rows(name, split, source="generated")


def test_mirror_and_generator_have_identical_columns(mirror):
    real, generated = load_rows("gsm8k"), load_rows("gsm8k", source="generated")
    assert len(real) == 3 and list(real[0]) == list(generated[0])
    assert "#### 2" in real[2]["answer"] and re.search(r"#### \d+$", generated[0]["answer"])


def test_every_mirrored_set_reads_back_what_was_fetched(tmp_path, monkeypatch):
    """Each file format, gzipped JSON lines and CSV among them, returns the rows that were written."""
    samples = {str: 'a, "b"\n\u2028c', list: [{"x": [1, None]}], bool: True, int: 3}
    for spec in DATASETS.values():
        for split, relative in spec.files.items():
            columns = spec.columns_of(split)
            row = {column: samples[kind] for column, kind in columns.items()}
            rows = [row] * (1 if relative.endswith(".txt") else 2)
            data._write_bytes(tmp_path / relative, data._encode(rows, list(columns), relative))
            monkeypatch.setenv("LABS_DATA_DIR", str(tmp_path))
            assert load_rows(spec.name, split, source="mirror") == rows, relative


def test_generated_play_looks_like_a_play_and_is_not_trivial():
    text, used = load_text("tinyshakespeare")
    assert used == "generated" and 1_000_000 < len(text) < 1_200_000
    assert re.search(r"^[A-Z ]+:\n", text)
    assert len(gzip.compress(text.encode())) > 0.15 * len(text)


def test_broken_json_line_names_file_and_row(mirror):
    path = mirror / "gsm8k/train.jsonl"
    write(path, path.read_text() + '{"question": "cut sho\n')
    with pytest.raises(LabsError, match=r"train\.jsonl, row 4: not JSON"):
        load_rows("gsm8k")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "no answer"}', "row 1: field 'answer' is missing"),
        ('{"question": "q", "answer": 7}', "row 1: field 'answer' must be str, not int"),
        ("[1, 2]", "row 1: not an object"),
    ],
)
def test_wrong_rows_name_row_and_field(mirror, row, message):
    write(mirror / "gsm8k/train.jsonl", row + "\n")
    with pytest.raises(LabsError, match=message):
        load_rows("gsm8k")


def test_damaged_gzip_and_wrong_encoding_are_one_line(mirror):
    target = mirror / "humaneval/HumanEval.jsonl.gz"
    target.parent.mkdir()
    target.write_bytes(gzip.compress(b"{}\n" * 1000)[:20])
    with pytest.raises(LabsError, match=r"cannot read .*HumanEval\.jsonl\.gz"):
        load_rows("humaneval", "test")
    (mirror / "gsm8k/train.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(LabsError, match=r"cannot read .*train\.jsonl"):
        load_rows("gsm8k")


def test_unknown_names_get_the_nearest():
    with pytest.raises(LabsError, match="did you mean gsm8k"):
        load_rows("gsm8")
    with pytest.raises(LabsError, match="no split 'validation': choose one of train, test"):
        load_rows("gsm8k", "validation")
    with pytest.raises(LabsError, match="choose one of auto"):
        load_rows("gsm8k", source="web")
    with pytest.raises(LabsError, match="use load_rows"):
        load_text("gsm8k")


def test_missing_mirror_file_and_missing_stand_in_say_what_to_do(mirror, monkeypatch):
    with pytest.raises(LabsError, match=r"test\.jsonl is not there: fetch it"):
        load_rows("gsm8k", "test", source="mirror")
    with pytest.raises(LabsError, match="LABS_DATA_DIR to a folder with nl2bash"):
        load_rows("nl2bash")
    monkeypatch.delenv("LABS_DATA_DIR")
    with pytest.raises(LabsError, match="LABS_DATA_DIR is not set"):
        load_rows("gsm8k", source="mirror")


def test_limit_draws_with_the_seed():
    assert load_rows("gsm8k", limit=5) == load_rows("gsm8k", limit=5)
    assert load_rows("gsm8k", limit=5) != load_rows("gsm8k", limit=5, seed=1)


def test_generated_dialogues_share_their_history_and_differ_in_the_last_answer():
    for split in ("train", "test"):
        rows = load_rows("hh-rlhf", split)
        humans = {row["chosen"].count("\n\nHuman: ") for row in rows}
        assert humans == {1, 2}
        for row in rows:
            (before, chosen), (shared, rejected) = (row[side].rsplit("\n\nAssistant: ", 1) for side in row)
            assert before == shared and before.startswith("\n\nHuman: ")
            assert chosen.strip() and rejected.strip() and chosen != rejected
    train, test = ({row["chosen"] for row in load_rows("hh-rlhf", split)} for split in ("train", "test"))
    assert not train & test


def test_the_first_split_that_the_mirror_has_is_taken(tmp_path, monkeypatch):
    rows, split, used = first_rows("hh-rlhf", ("train", "test"), limit=5)
    assert (split, used) == ("train", "generated") and rows == load_rows("hh-rlhf", "train", limit=5)
    real = {"train": [{"chosen": "a", "rejected": "b"}], "test": [{"chosen": "c", "rejected": "d"}]}
    monkeypatch.setenv("LABS_DATA_DIR", str(tmp_path))
    assert first_rows("hh-rlhf", ("train", "test"))[1:] == ("train", "generated")  # a mirror with neither
    for there in ("test", "train"):
        relative = DATASETS["hh-rlhf"].files[there]
        data._write_bytes(tmp_path / relative, data._encode(real[there], ["chosen", "rejected"], relative))
        assert first_rows("hh-rlhf", ("train", "test")) == (real[there], there, "mirror")
    with pytest.raises(LabsError, match="no split 'dev'"):
        first_rows("hh-rlhf", ("train", "dev"))


# ---------------------------------------------------------------------------------------------------------------- hub


def fake_hub(monkeypatch, rows):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(path, name=None, **options):
        asked.update(path=path, name=name, **options)
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_is_asked_for_a_pinned_commit_and_gives_the_same_columns(monkeypatch):
    asked = fake_hub(monkeypatch, [{"question": "q", "answer": "#### 1"}])
    monkeypatch.setenv("LABS_ALLOW_HUB", "1")
    assert load_rows("gsm8k") == [{"question": "q", "answer": "#### 1"}]
    assert asked["path"] == "openai/gsm8k" and re.fullmatch("[0-9a-f]{40}", asked["revision"])


def test_hub_columns_are_renamed_and_rows_chosen(monkeypatch):
    fake_hub(monkeypatch, [{"prompt": "p", "target": "t"}])
    assert load_rows("advbench", "test", source="hub") == [{"goal": "p", "target": "t"}]
    row = {"question": "q", "choices": ["a", "b"], "answer": 1}
    fake_hub(monkeypatch, [{**row, "subject": "world_religions"}, {**row, "subject": "astronomy"}])
    assert load_rows("mmlu_stem", "test", source="hub") == [{**row, "type": "astronomy"}]


def test_repository_files_come_from_the_pinned_commit(monkeypatch):
    asked = []
    monkeypatch.setattr(data, "_download", lambda url: asked.append(url) or b"ALL:\nSpeak.\n")
    assert load_text("tinyshakespeare", source="hub") == ("ALL:\nSpeak.\n", "hub")
    assert re.fullmatch(r"https://raw\.githubusercontent\.com/karpathy/char-rnn/[0-9a-f]{40}/.*input\.txt", asked[0])


@pytest.mark.parametrize(
    ("error", "step"), [(OSError("Dataset is gated. 401"), "hf auth login"), (ConnectionError(), "go online")]
)
def test_hub_errors_are_one_line_with_a_next_step(monkeypatch, error, step):
    fake_hub(monkeypatch, error)
    with pytest.raises(LabsError, match=step) as caught:
        load_rows("gsm8k", source="hub")
    assert "\n" not in str(caught.value)


def test_unpinned_sets_are_refused_from_the_hub():
    with pytest.raises(LabsError, match="no pinned source"):
        load_rows("nl2bash", source="hub")


def test_every_pin_is_a_full_commit():
    for spec in DATASETS.values():
        assert spec.revision is None or re.fullmatch("[0-9a-f]{40}", spec.revision), spec.name
        assert not spec.hub_id or spec.revision, spec.name


# ------------------------------------------------------------------------------------------------------------- mirror


def test_fetch_writes_a_manifest_and_load_verifies_it(mirror, tmp_path, monkeypatch):
    copy = fetch(tmp_path / "copy", ["self-instruct"], source="generated")
    entry = json.loads((copy / "MANIFEST.json").read_text())["files"]["self-instruct/seed_tasks.jsonl"]
    assert entry["rows"] == 3000 and entry["source"] == "generated" and entry["licence"] == "Apache-2.0"
    monkeypatch.setenv("LABS_DATA_DIR", str(copy))
    assert load_rows("self-instruct") == load_rows("self-instruct", source="generated")
    with (copy / "self-instruct/seed_tasks.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(LabsError, match=r"seed_tasks\.jsonl is not as it was fetched .* run `labs data fetch"):
        load_rows("self-instruct")


def test_fetched_stand_ins_do_not_pass_for_the_real_text(tmp_path, monkeypatch):
    monkeypatch.setenv("LABS_DATA_DIR", str(fetch(tmp_path, ["tinyshakespeare"], source="generated")))
    assert load_text("tinyshakespeare")[1] == "generated"


def test_fetch_never_invents_a_named_set_and_skips_what_it_was_not_asked_for(tmp_path, capsys, mirror):
    with pytest.raises(LabsError, match="no pinned source"):
        fetch(tmp_path / "copy", ["nl2bash"])
    with pytest.raises(LabsError, match=r"test\.jsonl|hub"):
        fetch(tmp_path / "copy", ["gsm8k"])  # the mirror has its train split only, and there is no network
    assert not (tmp_path / "copy/gsm8k/test.jsonl").exists()


def test_fetch_goes_on_where_it_stopped_and_repairs_damage(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_download", lambda url: b"ROMEO:\nO!\n")
    monkeypatch.setattr(data, "_mirror_folder", lambda: None)
    target = fetch(tmp_path / "copy", ["tinyshakespeare"]) / "tinyshakespeare/input.txt"
    monkeypatch.setattr(data, "_download", lambda url: pytest.fail("a whole file is not fetched again"))
    fetch(tmp_path / "copy", ["tinyshakespeare"])
    target.write_text("damaged")
    # The folder that is repaired is the mirror in use: it must not be repaired from itself.
    monkeypatch.setattr(data, "_mirror_folder", lambda: tmp_path / "copy")
    monkeypatch.setattr(data, "_download", lambda url: b"ROMEO:\nO!\n")
    fetch(tmp_path / "copy", ["tinyshakespeare"])
    assert target.read_text() == "ROMEO:\nO!\n" and load_text("tinyshakespeare")[1] == "mirror"
    assert not list(target.parent.glob(".*"))


def test_damaged_manifest_and_unwritable_destination_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "MANIFEST.json").write_text("{")
    with pytest.raises(LabsError, match=r"MANIFEST\.json is damaged"):
        fetch(tmp_path, ["gsm8k"], source="generated")
    (tmp_path / "file").write_text("")
    with pytest.raises(LabsError, match="cannot write"):
        fetch(tmp_path / "file", ["gsm8k"], source="generated")
