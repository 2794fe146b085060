"""Criteria that can fail, metrics.json written whole, and a report page that needs nothing from elsewhere."""

import base64
import html
import json
import math
import re

import pytest

from shared import LabsError
from shared.profiles import STAGES
from shared.report import (
    CriterionFailed,
    Measurement,
    check,
    criteria_table,
    evaluate,
    read_metrics,
    render_markdown,
    render_terminal,
    update_readme,
    write_metrics,
)
from shared.report_html import render_html, write_html

KEYS = "name description value unit n ci95 baseline threshold comparison passed".split()
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


def declared(comparison=">=", threshold=0.9, description="right answers"):
    return {"description": description, "unit": "share", "comparison": comparison, "threshold": threshold}


@pytest.fixture
def stage(tmp_path):
    """A finished stage with everything a report shows, some of it hostile."""
    folder = tmp_path / "tiny" / "sft"
    rows = evaluate(
        {"exact": declared(description="right | <b>answers</b> [bold]")},
        {"exact": Measurement(0.95, 200, (0.91, 0.97), 0.02)},
    )
    write_metrics(folder, stage="sft", profile="tiny", seed=3, wall_seconds=61.23, criteria=rows)
    log = [{"step": i, "elapsed_seconds": i, "train/loss": 2 / i, "accuracy": i / 9, "note": "x"} for i in range(1, 9)]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log) + '{"step": 9, "tra')
    (folder / "samples.jsonl").write_text(json.dumps({"prompt": "<script>alert(1)</script>"}) + "\n" + '{"cut')
    (folder / "plots").mkdir()
    (folder / "plots" / "induction_heads.png").write_bytes(PIXEL)
    return folder


@pytest.mark.parametrize(
    ("comparison", "value", "passed"),
    [(">=", 0.9, True), (">=", 0.89, False), (">", 0.9, False), ("<=", 0.9, True), ("<", 0.9, False), ("<", 0.1, True)],
)
def test_comparisons_at_the_threshold(comparison, value, passed):
    (row,) = evaluate({"exact": declared(comparison)}, {"exact": Measurement(value, 10, (0, 1))})
    assert row["passed"] is passed and list(row) == KEYS


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("comparison", [">=", "<="])
def test_unmeasured_nan_and_infinity_fail(comparison, value):
    measured = {} if value is None else {"exact": Measurement(value, 5, (math.nan, 1.0), math.nan)}
    (row,) = evaluate({"exact": declared(comparison)}, measured)
    assert not row["passed"] and row["value"] is None and row["ci95"] is None and row["baseline"] is None
    json.dumps(row, allow_nan=False)
    with pytest.raises(CriterionFailed, match="stage sft: exact is –, must be"):
        check({"stage": "sft", "criteria": [row]})


def test_numpy_numbers_become_plain_ones():
    numpy = pytest.importorskip("numpy")
    measured = Measurement(numpy.float32(0.5), numpy.int64(4), (numpy.float64(0), numpy.float32(1)), numpy.int64(0))
    json.dumps(evaluate({"exact": declared()}, {"exact": measured}), allow_nan=False)


def test_declarations_must_be_complete_and_measurements_declared():
    with pytest.raises(LabsError, match="not declared in profiles.yaml: speed"):
        evaluate({"exact": declared()}, {"speed": Measurement(1.0)})
    with pytest.raises(LabsError, match="criterion exact: comparison '=='"):
        evaluate({"exact": declared("==")}, {})
    with pytest.raises(LabsError, match="criterion exact has no threshold"):
        evaluate({"exact": declared(threshold=None)}, {})


def test_no_criterion_is_no_success():
    with pytest.raises(CriterionFailed, match="no criterion was measured"):
        check({"stage": "sft", "criteria": []})


def test_metrics_have_the_documented_keys_and_read_back(stage):
    metrics = read_metrics(stage)
    assert list(metrics) == ("stage profile seed wall_seconds peak_memory_bytes hardware versions criteria".split())
    assert metrics["peak_memory_bytes"] > 1e6 and metrics["versions"]["python"] and metrics["wall_seconds"] == 61.2
    check(metrics)
    assert [path.name for path in stage.glob(".*")] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not there: run `labs run sft`"), ("{", "damaged"), ("[]", "has no stage"), ('{"stage": 1}', "no profile")],
)
def test_missing_and_damaged_metrics_say_what_to_run(tmp_path, content, message):
    folder = tmp_path / "sft"
    folder.mkdir()
    if content is not None:
        (folder / "metrics.json").write_text(content)
    with pytest.raises(LabsError, match=message):
        read_metrics(folder)


def test_unwritable_output_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LabsError, match="cannot write .*LABS_RUNS_DIR"):
        write_metrics(tmp_path / "file", stage="sft", profile="tiny", seed=0, wall_seconds=1, criteria=[])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tables_show_n_interval_baseline_and_threshold(stage, capsys):
    metrics = read_metrics(stage)
    for text in (render_markdown([metrics]), criteria_table(metrics)):
        for cell in ("0.95", "0.91 to 0.97", "200", "0.02", ">= 0.9", "yes", r"right \| <b>", "61 s", "seed 3"):
            assert cell in text
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {9}
    render_terminal([metrics])
    assert "0.95" in capsys.readouterr().out


def test_terminal_shows_brackets_as_they_are(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    render_terminal([read_metrics(stage)])
    assert "[bold]" in capsys.readouterr().out


def test_page_is_self_contained_escaped_and_readable_aloud(stage, tmp_path):
    page = write_html([stage], tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "<b>answers" not in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", page) and "url(http" not in page
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert page.count("<svg") == 2 and page.count("role='img' aria-label=") == 2  # loss and accuracy
    assert "train/loss over the step" in page and "accuracy over the step" in page
    assert "<img alt='sft: induction heads' src='data:image/png;base64," in page
    for shown in ("0.91 to 0.97", "torch", "61 s", "GiB", "color-scheme: light dark", "lang='en'", "@media print"):
        assert shown in page
    from html.parser import HTMLParser

    opened, closed = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: opened.append(tag)
    parser.handle_endtag = lambda tag: closed.append(tag)
    parser.feed(page)
    for tag in ("table", "tr", "td", "th", "figure", "svg", "p", "div", "dl", "dt", "h2", "main"):
        assert opened.count(tag) == closed.count(tag), tag


def test_page_of_a_stage_that_left_only_metrics(tmp_path):
    folder = tmp_path / "base"
    rows = evaluate({"exact": declared()}, {})
    write_metrics(folder, stage="base", profile="tiny", seed=0, wall_seconds=1, criteria=rows)
    assert "class='NO'>NO<" in write_html([folder], tmp_path / "page.html").read_text()


def life(tmp_path, **samples):
    """Three stages as a run leaves them: base and sft with weights, grpo with samples from before and after."""
    import torch
    from safetensors.torch import save_file

    folders = []
    for number, stage in enumerate(("base", "sft", "grpo")):
        folder = tmp_path / "tiny" / stage
        rows = evaluate({"exact": declared()}, {"exact": Measurement(0.95 if number else 0.2, 200, (0.1, 0.97), 0.02)})
        extra = {"time_budget_seconds": 90, "trainable_parameters": 4}
        write_metrics(folder, stage=stage, profile="tiny", seed=3, wall_seconds=60, criteria=rows, extra=extra)
        (folder / "model").mkdir()
        if number < 2:
            weights = {"a": torch.zeros(3, 5), "b": torch.zeros(7)}
            save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
        log = [{"step": i, "tokens": 600 * i, "reward/mean": i, "learning_rate": 1} for i in range(1, 11)]
        (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        folders.append(folder)
    for stage, rows in samples.items():
        path = tmp_path / "tiny" / stage / "samples.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folders


def words(page):
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_page_tells_the_life_in_order_with_its_costs(tmp_path):
    page = render_html(life(tmp_path))
    text = words(page[page.index("<body>") :])
    assert "criteria met 2 of 3; stages: 3" in text and "180 s of training in all (3.0 minutes)" in text
    assert "model 22 parameters" in text and "seed 3" in text and "torch" in text
    assert text.index("Lab 00: base") < text.index("Lab 01: sft") < text.index("Lab 03: grpo")
    for stage in ("base", "sft", "grpo"):
        assert f"href='#{stage}'" in page and f"id='{stage}'" in page and html.escape(STAGES[stage].title) in text
    assert "starts from random weights" in text and "starts from cold_start" in text
    assert "60.0 s of a budget of 90 s" in text and "6,000, 100 a second" in text and "22 (4 trained)" in text
    assert "reward/mean over the step" in page and "learning_rate over" not in page


def test_samples_stand_side_by_side_from_first_to_last(tmp_path):
    rows = [
        {"prompt": f"q{i}", "before": f"old{i}", "reply": f"new{i}", "right": i % 2 == 0, "calls": []}
        for i in range(50)
    ]
    folders = life(tmp_path, grpo=rows)
    page = render_html(folders, samples=3)
    text = words(page)
    assert "Samples: 3 of 50 prompt before after right q0 old0 new0 true" in text and "new49 false" in text
    assert "q1 " not in text and "calls" not in text
    assert "Samples" not in render_html(folders, samples=0)


def test_what_answers_a_harmful_request_is_never_shown_whole(tmp_path):
    text = "first do this, then that, " * 20
    rows = [{"kind": kind, "prompt": "p", "before": text, "reply": text} for kind in ("harmful", "harmless")]
    page = render_html(life(tmp_path, sft=rows))
    assert page.count(text) == 2 and page.count("460 more characters]") == 2 == page.count(text[:60] + " […")
    page = render_html(life(tmp_path / "b", sft=[{"prompt": "x" * 5000}]))
    assert "x" * 601 not in page and "4400 more characters]" in page


def test_the_evaluation_table_and_loose_pictures_are_shown(tmp_path):
    folders = life(tmp_path)
    (folders[2] / "table.md").write_text(
        "| stage | what |\n|---|---|\n| sft | a \\| <b>b |\n| grpo | – |\n\np: exact <i>McNemar\n- last\n"
    )
    (folders[2] / "all_differences.png").write_bytes(PIXEL)
    page = render_html(folders)
    text = words(page)
    assert "stage what sft a | &lt;b&gt;b grpo – p: exact &lt;i&gt;McNemar - last" in text
    assert "<th scope='row'>sft</th>" in page and "alt='grpo: all differences'" in page


def test_damaged_weights_and_samples_do_not_stop_the_page(tmp_path):
    folders = life(tmp_path)
    (folders[0] / "model" / "model.safetensors").write_bytes(b"\xff" * 40)
    (folders[0] / "samples.jsonl").write_text('[1]\n"x"\n{"prompt": "kept"}\n{"cut')
    (folders[1] / "part").mkdir()
    (folders[1] / "part" / "train_log.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    page = render_html(folders)
    assert "Samples: 1 of 1" in page and "<figcaption>part train/loss</figcaption>" in page


def test_readme_block_is_replaced_and_only_it(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results:sft:begin -->\nold\n<!-- results:sft:end -->\nafter\n")
    for _ in range(2):  # a second time changes nothing
        update_readme(path, "sft", "new\n")
        assert path.read_text() == "before\n<!-- results:sft:begin -->\nnew\n<!-- results:sft:end -->\nafter\n"
    with pytest.raises(LabsError, match="results:base:begin"):
        update_readme(path, "base", "new")
    with pytest.raises(LabsError, match="cannot read .*NONE.md"):
        update_readme(tmp_path / "NONE.md", "sft", "new")
