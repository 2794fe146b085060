"""The stage `tools`: how replies are judged, what is learnt from, and whole runs: stopped, resumed, repeated, refused."""

import json

import pytest
import torch
from tool_rows import calls_of, written

import tool_data
import tool_stage
import train_tool_use
from function_calls import CheckResult
from record_files import as_bfcl, write_rows
from shared import LabsError
from shared.profiles import load_profile
from shared.training import read_log
from tool_data import TEST_PARTS, encode, training_rows
from tool_stage import ask, finetune, judge, mistakes, share, tokenized
from train_tool_use import rows_of

SCRIPT = "labs/04_tool_use/train_tool_use.py"
STEPS = 6
TRAINER = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "warmup_steps": 0,
    "logging_steps": 1, "eval_steps": 3, "save_steps": 3,
}  # fmt: skip
SHORT = [
    *(f"tools.trainer.{name}={value}" for name, value in TRAINER.items()),
    "tools.drill=0.34", "tools.n_train=40", "tools.n_validation=6",
    "tools.n_test=4", "tools.max_new_tokens=8", "tools.wandb=disabled",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch):
    """These tests are about the tiny world and own files."""
    monkeypatch.delenv("LABS_DATA_DIR", raising=False)


def config_of(*overrides):
    return load_profile("04", "tiny", [*SHORT, *overrides]).tools


# ------------------------------------------------------------------------------------------------------------- verdicts


def replies_of(rows):
    return [written(row["messages"][-1]) for row in rows]


@pytest.mark.parametrize("part", TEST_PARTS)
def test_the_right_replies_are_right_and_those_to_other_requests_wrong(part):
    rows = tool_data.test_rows(40, part)
    assert all(result.ok and result.kind == "ok" for result in judge(replies_of(rows), rows))
    shifted = judge(replies_of([*rows[1:], rows[0]]), rows)
    if part == "irrelevance":  # where no call is right every reply without one is
        assert all(result.ok for result in shifted)
        called = judge(replies_of(tool_data.test_rows(40, "values")), rows)
        assert {result.kind for result in called} == {"unwanted_call"}
    else:
        assert sum(result.ok for result in shifted) <= 2


def test_mistakes_have_their_kinds():
    told, called, none = (tool_data.test_rows(1, part)[0] for part in ("answers", "tool", "irrelevance"))
    call = written(called["messages"][-1])
    answer = written(told["messages"][-1])
    cut = call.removesuffix("\n</tool_call>")[:-3]
    for row, reply, kind in (
        (told, answer, "ok"),
        (told, f" {answer}\n", "ok"),
        (told, answer.removesuffix("."), "wrong_answer"),
        (told, "", "wrong_answer"),
        (told, call, "unwanted_call"),
        (called, call, "ok"),
        (called, "I have no tool for that.", "no_call"),
        (called, f"{call}\n{call}", "wrong_count"),
        (called, call.replace('"sell"', '"buy"'), "wrong_function"),
        (called, cut, "parse_failure"),
        (none, "Whatever.", "ok"),
        (none, call, "unwanted_call"),
        (none, cut, "parse_failure"),
    ):
        (result,) = judge([reply], [row])
        assert (result.kind, result.ok) == (kind, kind == "ok"), (reply, result)
    with pytest.raises(ValueError):
        judge([answer], [told, told])


RIGHT, WRONG, OTHER = (
    CheckResult(True, "ok", ""),
    CheckResult(False, "no_call", ""),
    CheckResult(False, "wrong_value", ""),
)


def test_shares_and_what_went_wrong():
    results = [RIGHT] * 6 + [WRONG, OTHER, OTHER, OTHER]
    measured = share(results, [RIGHT, WRONG])
    assert (measured.value, measured.n, measured.baseline) == (0.6, 10, 0.5)
    low, high = measured.ci95
    assert (low, high) == pytest.approx((0.3127, 0.8318), abs=1e-3)  # Wilson's, which is not symmetric
    assert share(results).baseline is None
    assert share([RIGHT] * 5).ci95[0] < 0.6  # five of five prove little
    assert list(mistakes(results).items()) == [("wrong_value", 3), ("no_call", 1)]
    assert mistakes([RIGHT]) == {}


def test_settings_that_trl_does_not_take_are_named():
    from omegaconf import OmegaConf

    tool_stage.check_trainer("tools", load_profile("04", "tiny").tools.trainer)
    with pytest.raises(LabsError, match=r"^tools\.trainer: .*magic"):
        tool_stage.check_trainer("tools", OmegaConf.create({"optim": "magic"}))
    with pytest.raises(LabsError, match=r"^adapters\.trainer: .*learning_rte"):
        tool_stage.check_trainer("adapters", OmegaConf.create({"learning_rte": 1}))


def test_asking_shows_all_but_the_last_message(policy, monkeypatch):
    import shared.models

    asked = []
    monkeypatch.setattr(
        shared.models, "generate_replies",
        lambda model, tokenizer, conversations, **options: asked.append((conversations, options)) or ["x"] * 3,
    )  # fmt: skip
    rows = tool_data.test_rows(3, "answers")
    assert ask(None, None, rows, 7) == ["x"] * 3
    ((conversations, options),) = asked
    assert conversations == [row["messages"][:-1] for row in rows] and options["max_new_tokens"] == 7
    assert options["tools"] == [row["tools"] for row in rows]
    assert all(conversation[-1]["role"] == "tool" for conversation in conversations)


# ------------------------------------------------------------------------------------------------- what is learnt from


@pytest.fixture
def untrained(monkeypatch, tmp_path, policy):
    """Call it for the trainer that `finetune` makes of these rows and settings, untrained."""
    import trl

    def make(rows, lora=None, muon=0.01, **settings):
        made = []
        monkeypatch.setattr(trl.SFTTrainer, "train", lambda trainer, **options: made.append(trainer))
        model, tokenizer = policy()
        examples = tokenized(rows, tokenizer, 512)
        common = {"max_length": 512, "learning_rate": 0.01, "lr_scheduler_type": "linear"}
        finetune(
            model, tokenizer, examples, examples[:2], {**TRAINER, **common, **settings}, folder=tmp_path, lora=lora,
            muon_learning_rate=muon,
        )  # fmt: skip
        return made[0], tokenizer

    return make


def test_the_loss_counts_what_the_assistant_says_alone(untrained):
    rows = training_rows(12, 5)
    trainer, tokenizer = untrained(rows)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(12)])
    for ids, labels, row in zip(batch["input_ids"], batch["labels"], rows, strict=True):
        expected, mask = encode(row, tokenizer)
        assert ids[: len(mask)].tolist() == expected
        assert (labels != -100).int().tolist() == mask + [0] * (len(ids) - len(mask))
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        said = [message for message in row["messages"] if message["role"] == "assistant"]
        assert tokenizer.decode(labels[labels != -100]).count("<|im_end|>") == len(said)
        assert (labels == -100).sum() > len(mask) / 3  # learnt from all alike, it would be none


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def test_muon_turns_matrices_where_all_weights_are_trained_and_only_there(untrained):
    from muon_optimizer import MuonWithAdamW

    rows = training_rows(6, 5)
    trainer, _ = untrained(rows)
    assert isinstance(trainer.optimizer, MuonWithAdamW)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01
    assert untrained(rows, muon=0.0)[0].optimizer is None
    assert untrained(rows, learning_rate=0.0)[0].optimizer is None  # the negative control
    adapted, _ = untrained(rows, lora=LORA)
    assert adapted.optimizer is None
    assert {name.split(".")[-2] for name, p in adapted.model.named_parameters() if p.requires_grad} == {"default"}


@pytest.mark.parametrize("change, words", [({"r": 0}, "positive"), ({"target_modules": ["nothing"]}, "nothing")])
def test_an_adapter_that_cannot_be_is_one_line(untrained, change, words):
    with pytest.raises(LabsError, match=f"^the trainer does not take these settings: .*{words}") as caught:
        untrained(training_rows(4, 5), lora={**LORA, **change})
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- rows of a run


def test_each_part_has_its_rows():
    parts = rows_of(config_of(), 0)
    assert {part: len(rows) for part, rows in parts.items()} == {
        "train": 40, "validation": 6, **dict.fromkeys(TEST_PARTS, 4)
    }  # fmt: skip
    assert not {row["id"] for row in parts["train"]} & {row["id"] for row in parts["validation"]}


def test_own_files_to_learn_from_and_to_be_judged_on(tmp_path):
    mine = write_rows(training_rows(30, 7), tmp_path / "mine.jsonl")
    test = write_rows(
        [*tool_data.test_rows(6, "values", seed=3), *tool_data.test_rows(3, "irrelevance", seed=3)],
        tmp_path / "test.jsonl",
    )
    parts = rows_of(config_of(f"tools.data={mine}", f"tools.test_data={test}", "tools.n_test=20"), 0)
    assert (len(parts["train"]), len(parts["validation"])) == (24, 6)
    assert {part: len(parts[part]) for part in TEST_PARTS if part in parts} == {"values": 6, "irrelevance": 3}
    assert all(row["accepted"] for row in parts["values"])
    few = rows_of(config_of(f"tools.data={mine}", "tools.n_train=10", "tools.n_validation=5"), 0)
    assert (len(few["train"]), len(few["validation"])) == (12, 3)  # never more than a fifth is only watched


def test_a_request_of_the_test_in_the_own_file_is_refused(tmp_path):
    taken = tool_data.test_rows(4, "phrasings")[2]
    mine = write_rows([*training_rows(20, 7), taken], tmp_path / "mine.jsonl")
    config = config_of(f"tools.data={mine}")
    with pytest.raises(LabsError, match="and test row phrasings_2 make the same request: drop the train rows"):
        for seed in range(5):  # one of these has it among the rows to train on, not to watch
            rows_of(config, seed)
    write_rows(training_rows(20, 7), tmp_path / "mine.jsonl")
    assert rows_of(config, 0)


# ---------------------------------------------------------------------------------------------------------- whole runs


def weights_of(stage):
    from safetensors.torch import load_file

    adapter = stage / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else stage / "model" / "model.safetensors")


def log_of(stage):
    """The steps and numbers of the log, without its times and the tokens read, which TRL counts anew after a stop."""
    rows = read_log(stage / "train_log.jsonl")
    return [{name: value for name, value in row.items() if name not in ("elapsed_seconds", "tokens")} for row in rows]


def same_log(one, other):
    assert [row.keys() for row in one] == [row.keys() for row in other]
    for mine, theirs in zip(one, other, strict=True):
        assert theirs == pytest.approx(mine, abs=1e-5)


def last_loss(stage):
    return [row["validation/loss"] for row in log_of(stage) if "validation/loss" in row][-1]


def loss_on_validation(model, tokenizer, seed):
    """Nats a token that the assistant says, of the short runs' rows to watch."""
    total = count = 0
    for example in tokenized(rows_of(config_of(), seed)["validation"], tokenizer, 512):
        ids, labels = (torch.tensor(example[name]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    return total / count


@pytest.mark.slow
def test_a_run_from_end_to_end_once_and_no_second_time(runs, with_policy, capsys, policy, same_weights):
    from shared.models import load_model

    with_policy(runs)
    metrics = train_tool_use.run("tiny", 0, False, SHORT)
    stage = runs / "tiny" / "tools"
    assert metrics == json.loads((stage / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["criteria"]}
    assert list(rows) == ["exact_values", "exact_phrasings", "irrelevance", "answers", "exact_before"]
    assert all(row["n"] == 4 and row["ci95"] for row in rows.values())
    assert set(metrics["mistakes"]) == set(TEST_PARTS) and metrics["new_tool"]["n"] == 4
    assert metrics["method"] == "full" and metrics["berkeley"] == {}
    assert (stage / "plots" / "loss.png").stat().st_size > 1000
    assert not (stage / "checkpoints").exists() and not (stage / "adapter").exists()
    log = log_of(stage)
    assert [row["step"] for row in log if "train/loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in log if "validation/loss" in row] == [0, 3, 6]
    losses = [row["validation/loss"] for row in log if "validation/loss" in row]
    assert losses[-1] < losses[0] - 0.1
    # What lies there answers like the samples.
    model, tokenizer = load_model(stage / "model")
    assert not same_weights(policy()[0], model)
    assert last_loss(stage) == pytest.approx(loss_on_validation(model, tokenizer, 0), abs=1e-4)
    test = {part: tool_data.test_rows(4, part) for part in TEST_PARTS}
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    judged = [row for part in TEST_PARTS for row in test[part]]
    assert [row["reply"] for row in samples] == [
        reply for part in TEST_PARTS for reply in ask(model, tokenizer, test[part], 8)
    ]
    assert [row["prompt"] for row in samples] == [row["messages"][-2]["content"] for row in judged]
    assert [row["expected"] for row in samples] == [row["accepted"] for row in judged]
    # Finished: not again. Other settings or --restart: again.
    when = (stage / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert train_tool_use.run("tiny", 0, False, SHORT) == metrics
    assert "tools is finished; --restart trains it again" in capsys.readouterr().out
    assert (stage / "model" / "model.safetensors").stat().st_mtime_ns == when
    again = train_tool_use.run("tiny", 0, True, SHORT)
    assert (stage / "model" / "model.safetensors").stat().st_mtime_ns > when
    assert again["criteria"] == metrics["criteria"]
    same_log(log, log_of(stage))


@pytest.mark.slow
def test_without_a_learning_rate_the_criteria_fail(runs, with_policy, policy):
    with_policy(runs)
    metrics = train_tool_use.run("tiny", 0, False, [*SHORT, "tools.trainer.learning_rate=0"])
    rows = {row["name"]: row for row in metrics["criteria"]}
    for name in ("exact_values", "exact_phrasings", "answers"):
        assert not rows[name]["passed"] and rows[name]["value"] == rows[name]["baseline"] == 0
    assert rows["irrelevance"]["value"] == rows["irrelevance"]["baseline"]
    stage = runs / "tiny" / "tools"
    kept = weights_of(stage)
    for name, value in policy()[0].state_dict().items():
        assert name not in kept or torch.equal(kept[name], value)
    losses = [row["validation/loss"] for row in log_of(stage) if "validation/loss" in row]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    before = {part: each["before"] for part, each in metrics["mistakes"].items()}
    assert before == {part: each["after"] for part, each in metrics["mistakes"].items()}


def same_end(whole, other):
    theirs = weights_of(other)
    for name, value in weights_of(whole).items():
        assert torch.allclose(value, theirs[name], atol=1e-6), name
    same_log(log_of(whole), log_of(other))
    found = [json.loads((stage / "metrics.json").read_text())["criteria"] for stage in (whole, other)]
    assert found[0] == found[1]
    assert not (other / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["tools.muon_learning_rate=0.01"],
        ["tools.muon_learning_rate=0"],
        ["tools.method=lora", "tools.trainer.learning_rate=0.02"],
        ["tools.n_train=8", "tools.n_validation=2"],  # three epochs, stopped in the third
        ["tools.n_train=11", "tools.n_validation=2"],  # checkpoints where an epoch ends
    ],
    ids=["muon", "adamw", "lora", "epochs", "end_of_epoch"],
)
def test_interrupted_it_ends_the_same(tmp_path, monkeypatch, with_policy, interrupted, settings):
    short = [*SHORT, *settings]
    stages = {name: tmp_path / name / "tiny" / "tools" for name in ("whole", "interrupted", "late")}
    for name, stage in stages.items():
        monkeypatch.setenv("LABS_RUNS_DIR", str(with_policy(tmp_path / name)))
        if name == "interrupted":
            interrupted(5, train_tool_use.run, "tiny", 3, False, short)
            assert (stage / "checkpoints" / "checkpoint-3").exists()
        if name == "late":  # all trained, not yet measured
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

                def stop(*arguments):
                    raise KeyboardInterrupt

                patch.setattr(train_tool_use, "save", stop)
                train_tool_use.run("tiny", 3, False, short)
        assert not any((stage / what).exists() for what in ("metrics.json", "model", "adapter", "samples.jsonl"))
        train_tool_use.run("tiny", 3, False, short)
        same_end(stages["whole"], stage)
    with pytest.raises(AssertionError):  # another seed ends elsewhere
        train_tool_use.run("tiny", 4, False, short)
        same_end(stages["whole"], stage)


@pytest.mark.slow
def test_killed_by_sigkill_at_a_random_step_it_ends_the_same(tmp_path, with_policy, killed, script):
    command = ["--profile", "tiny", "--seed", "5", *SHORT, "tools.trainer.max_steps=12"]
    stages = {name: tmp_path / name / "tiny" / "tools" for name in ("whole", "killed")}
    for name, stage in stages.items():
        environment = {"LABS_RUNS_DIR": str(with_policy(tmp_path / name)), "OMP_NUM_THREADS": "1"}
        if name == "killed":
            killed(SCRIPT, command, stage / "train_log.jsonl", environment, steps=(4, 8))
            assert not (stage / "metrics.json").exists()
        done = script(SCRIPT, *command, **environment)
        assert done.returncode == 0, done.stderr
        assert "exact_values" in done.stdout or "calls exact" in done.stdout
    same_end(*stages.values())


@pytest.mark.slow
def test_an_adapter_is_kept_and_answers_like_the_samples(runs, with_policy):
    from shared.models import load_model

    with_policy(runs)
    metrics = train_tool_use.run("tiny", 1, False, [*SHORT, "tools.method=lora", "tools.trainer.learning_rate=0.05"])
    stage, base = runs / "tiny" / "tools", runs / "tiny" / "sft" / "model"
    assert metrics["method"] == "lora" and not (stage / "model").exists()
    said = json.loads((stage / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(base) and said["r"] == 16
    samples = [json.loads(line)["reply"] for line in (stage / "samples.jsonl").read_text().splitlines()]
    model, tokenizer = load_model(base, adapter=stage / "adapter")
    assert samples == [reply for part in TEST_PARTS for reply in ask(model, tokenizer, tool_data.test_rows(4, part), 8)]
    assert last_loss(stage) == pytest.approx(loss_on_validation(model, tokenizer, 1), abs=1e-4)
    assert abs(last_loss(stage) - loss_on_validation(*load_model(base), 1)) > 0.01


@pytest.mark.slow
def test_records_of_ones_own_are_trained_on(tmp_path, runs, with_policy):
    """In the leaderboard's form, with a tool that the tiny world does not have."""
    record = {
        "question": [[{"role": "user", "content": "Paint the boat red."}]],
        "function": [
            {
                "name": "paint",
                "description": "Paint a thing.",
                "parameters": {
                    "type": "dict",
                    "properties": {"thing": {"type": "string"}, "colour": {"type": "string"}},
                    "required": ["thing", "colour"],
                },
            }
        ],
        "ground_truth": [{"paint": {"thing": ["boat"], "colour": ["red", "RED"]}}],
    }
    records = [as_bfcl(row) for row in training_rows(8, 3)]
    for index, thing in enumerate("hat cup map bag box pen".split()):
        mine = json.loads(json.dumps(record).replace("boat", thing))
        records.append({**mine, "id": f"paint_{index}"})
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    with_policy(runs)
    two = ["tools.trainer.max_steps=2", "tools.trainer.eval_steps=2", "tools.trainer.save_steps=2", "tools.replay=0"]
    metrics = train_tool_use.run("tiny", 0, False, [*SHORT, *two, f"tools.data={path}"])
    log = log_of(runs / "tiny" / "tools")
    assert [row["step"] for row in log if "train/loss" in row] == [1, 2]
    assert metrics["criteria"][0]["n"] == 4
    parts = rows_of(config_of(f"tools.data={path}"), 0)
    paint = [row for row in [*parts["train"], *parts["validation"]] if row["id"].startswith("paint")]
    assert len(paint) == 6 and all(calls_of(row["messages"][-1])[0]["arguments"]["colour"] == "red" for row in paint)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--profile", "big"], "unknown profile 'big'"),
        (["tools.trainer.lr=1"], "tools.trainer.lr"),
        (["tools.lora.rank=1"], "tools.lora.rank"),
        (["tools.n_train=many"], "must be a number"),
        (["tools.trainer.optim=magic"], "tools.trainer: "),
        (["tools.trainer.max_length=20"], "longer than trainer.max_length=20 tokens: raise it"),
        (["tools.n_train=0"], "tools.n_train=0 must be at least 1"),
        (["tools.n_validation=0"], "tools.n_validation=0 must be at least 1"),
        (["tools.n_test=0"], "tools.n_test=0 must be at least 1"),
        (["tools.n_test=-3"], "tools.n_test=-3 must be at least 1"),
        (["tools.n_berkeley=0"], "tools.n_berkeley=0 must be at least 1"),
        (["tools.n_train=2", "tools.n_validation=1"], "has 3 rows: at least 5 are needed"),
        (["tools.data=nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["tools.data=tiny_wold"], "did you mean tiny_world"),
        (["tools.data=tiny_world:0"], "take at least one row"),
        (["tools.data=BAD"], "row 2: not JSON"),
        (["tools.data=FOUR"], "has 4 rows: at least 5 are needed"),
        (["tools.data=SAME"], "make the same request"),
        (["tools.test_data=NONE"], "no row with a call to judge"),
        (["tools.method=magic"], "choose full or lora"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, runs, with_policy, nothing_written, arguments, words):
    from typer.testing import CliRunner

    from shared.stages import stage_command

    with_policy(runs)
    rows = training_rows(8, 3)
    files = {
        "FOUR": rows[:4],
        "SAME": [*rows, *tool_data.test_rows(4, "values")],
        "NONE": tool_data.test_rows(6, "irrelevance", seed=8),
    }
    for name, its in files.items():
        write_rows(its, tmp_path / f"{name}.jsonl")
    (tmp_path / "BAD.jsonl").write_text(json.dumps(as_bfcl(rows[0])) + "\n{\n")
    for name in (*files, "BAD"):
        arguments = [each.replace(f"={name}", f"={tmp_path / name}.jsonl") for each in arguments]
    nothing_written.begin()
    profile = [] if "--profile" in arguments else ["--profile", "tiny"]
    done = CliRunner().invoke(stage_command(train_tool_use.run, None), [*profile, *SHORT, *arguments])
    assert done.exit_code == 1 and words in done.stderr, done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert nothing_written
