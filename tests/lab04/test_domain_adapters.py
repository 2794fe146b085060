"""The stage `adapters`: the gain of the own adapter over the others', and whole runs: stopped, resumed, repeated, refused."""

import json

import pytest
import torch

import domain_adapters
import tool_data
from domain_adapters import own_over_others
from function_calls import CheckResult
from shared.training import TrainLog, read_log
from tool_stage import ask
from tool_world import DOMAINS

SCRIPT = "labs/04_tool_use/domain_adapters.py"
STEPS = 4
TRAINER = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "warmup_steps": 0,
    "logging_steps": 1, "eval_steps": 2, "save_steps": 2, "learning_rate": 0.02,
}  # fmt: skip
SHORT = [
    *(f"adapters.trainer.{name}={value}" for name, value in TRAINER.items()),
    "adapters.drill=0.5", "adapters.markup_steps=0",
    "adapters.n_train=30", "adapters.n_validation=4",
    "adapters.n_test=5", "adapters.max_new_tokens=8", "adapters.wandb=disabled",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the gain


def verdicts(pattern):
    """`1` for right, `0` for wrong."""
    return [CheckResult(mark == "1", "ok" if mark == "1" else "no_call", "") for mark in pattern]


def test_the_gain_is_over_the_best_other_on_the_same_requests():
    results = {
        "market": {"market": verdicts("1111111101"), "office": verdicts("1" * 10)},
        "office": {"market": verdicts("1100000000"), "office": verdicts("0" * 10)},
        "garden": {"market": verdicts("0011110000"), "office": verdicts("0101010101")},
    }
    gain = own_over_others(results, "market")
    assert gain.value == pytest.approx(0.9 - 0.4) and gain.n == 10 and gain.baseline == pytest.approx(0.4)
    assert gain.ci95[0] < gain.value < gain.ci95[1]
    # Not over the mean of the others (0.3), nor over the worst (0.2), nor over what the own one does elsewhere.
    del results["garden"]
    assert own_over_others(results, "market").value == pytest.approx(0.9 - 0.2)
    # Over others that are better, it is a loss.
    assert own_over_others(results, "office").value == -1.0


def test_the_gain_is_paired():
    """Where the own adapter is right wherever the other is, and on as many more, the interval is narrow."""

    def width(other):
        results = {"market": {"market": verdicts("1" * 60 + "0" * 40)}, "office": {"market": verdicts(other)}}
        gain = own_over_others(results, "market")
        assert gain.value == pytest.approx(0.3)
        return gain.ci95[1] - gain.ci95[0]

    assert width("1" * 30 + "0" * 70) < 0.8 * width("0" * 70 + "1" * 30)


def test_equal_adapters_gain_nothing():
    same = {domain: {"market": verdicts("1101"), "office": verdicts("0110")} for domain in DOMAINS}
    for domain in DOMAINS:
        gain = own_over_others(same, domain)
        assert gain.value == 0 and gain.ci95 == (0, 0)


# ---------------------------------------------------------------------------------------------------------- whole runs


def adapter_of(stage, domain):
    from safetensors.torch import load_file

    return load_file(stage / domain / "adapter" / "adapter_model.safetensors")


def log_of(stage, domain):
    rows = read_log(stage / domain / "train_log.jsonl")
    return [{name: value for name, value in row.items() if name not in ("elapsed_seconds", "tokens")} for row in rows]


def same_end(whole, other):
    for domain in DOMAINS:
        theirs = adapter_of(other, domain)
        for name, value in adapter_of(whole, domain).items():
            assert torch.allclose(value, theirs[name], atol=1e-6), (domain, name)
        one, two = log_of(whole, domain), log_of(other, domain)
        assert [row.keys() for row in one] == [row.keys() for row in two]
        for mine, its in zip(one, two, strict=True):
            assert its == pytest.approx(mine, abs=1e-5)
        assert not (other / domain / "checkpoints").exists()
    found = [json.loads((stage / "metrics.json").read_text()) for stage in (whole, other)]
    assert found[0]["criteria"] == found[1]["criteria"] and found[0]["cross_table"] == found[1]["cross_table"]


@pytest.mark.slow
def test_the_shared_base_learns_how_calls_are_written_once(runs, with_policy, monkeypatch):
    from safetensors.torch import load_file

    with_policy(runs)
    settings = [*SHORT, "adapters.markup_steps=3"]
    stage, start = runs / "tiny" / "adapters", runs / "tiny" / "sft" / "model"
    made, trained = stage / "base" / "model", []
    real = domain_adapters.finetune

    def finetune(*arguments, **options):
        trained.append(options["folder"].name)
        if len(trained) == 2:  # the first adapter's training is stopped, the base is made
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(domain_adapters, "finetune", finetune)
    with pytest.raises(KeyboardInterrupt):
        domain_adapters.run("tiny", 0, False, settings)
    first = load_file(made / "model.safetensors")
    metrics = domain_adapters.run("tiny", 0, False, settings)
    assert trained == ["base", "market", "market", "office"] and metrics["base"] == str(made)
    before, after = load_file(start / "model.safetensors"), load_file(made / "model.safetensors")
    assert all(torch.equal(first[name], after[name]) for name in first)
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    for domain in DOMAINS:
        said = json.loads((stage / domain / "adapter" / "adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == str(made)
    domain_adapters.run("tiny", 1, False, settings)  # another seed makes another
    assert trained[4:] == ["base", "market", "office"]


@pytest.mark.slow
def test_two_adapters_on_one_base_and_no_second_time(runs, with_policy, capsys):
    from shared.models import load_model

    with_policy(runs)
    metrics = domain_adapters.run("tiny", 0, False, SHORT)
    stage, base = runs / "tiny" / "adapters", runs / "tiny" / "sft" / "model"
    assert metrics == json.loads((stage / "metrics.json").read_text()) and metrics["base"] == str(base)
    assert [row["name"] for row in metrics["criteria"]] == [
        "market_gain", "market_gain_low", "office_gain", "office_gain_low",
    ]  # fmt: skip
    assert all(row["n"] == 5 for row in metrics["criteria"])
    assert {name: set(per) for name, per in metrics["cross_table"].items()} == {name: set(DOMAINS) for name in DOMAINS}
    assert (stage / "plots" / "loss.png").stat().st_size > 1000
    tests = {domain: tool_data.test_rows(5, "values", (domain,)) for domain in DOMAINS}
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 5
    for domain in DOMAINS:
        said = json.loads((stage / domain / "adapter" / "adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == str(base) and said["r"] == 16
        size = (stage / domain / "adapter" / "adapter_model.safetensors").stat().st_size
        assert metrics["adapter_bytes"][domain] == size < (base / "model.safetensors").stat().st_size
        assert not (stage / domain / "checkpoints").exists()
        assert [row["step"] for row in log_of(stage, domain) if "train/loss" in row] == list(range(1, STEPS + 1))
        losses = [row["validation/loss"] for row in log_of(stage, domain) if "validation/loss" in row]
        assert len(losses) == 3 and losses[-1] < losses[0]
        model, tokenizer = load_model(base, adapter=stage / domain / "adapter")
        for asked, rows in tests.items():
            mine = [row for row in samples if (row["adapter"], row["domain"]) == (domain, asked)]
            assert [row["prompt"] for row in mine] == [row["messages"][0]["content"] for row in rows]
            assert [row["reply"] for row in mine] == ask(model, tokenizer, rows, 8)
    market, office = (adapter_of(stage, domain) for domain in DOMAINS)
    assert market.keys() == office.keys() and any(not torch.equal(market[name], office[name]) for name in market)
    when = (stage / "office" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert domain_adapters.run("tiny", 0, False, SHORT) == metrics
    assert "adapters is finished" in capsys.readouterr().out
    assert (stage / "office" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == when
    again = domain_adapters.run("tiny", 0, True, SHORT)
    assert (stage / "office" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns > when
    assert again["criteria"] == metrics["criteria"]


@pytest.mark.slow
def test_without_a_learning_rate_nothing_is_gained(runs, with_policy):
    with_policy(runs)
    metrics = domain_adapters.run("tiny", 0, False, [*SHORT, "adapters.trainer.learning_rate=0"])
    assert len(metrics["criteria"]) == 4
    for row in metrics["criteria"]:
        assert row["value"] == 0 and not row["passed"], row
    for domain in DOMAINS:
        its = adapter_of(runs / "tiny" / "adapters", domain)
        assert all(not value.any() for name, value in its.items() if "lora_B" in name)  # so the base answers


@pytest.mark.slow
@pytest.mark.parametrize("domain, step", [("market", 3), ("office", 3), ("office", 0)])
def test_interrupted_it_ends_the_same(tmp_path, monkeypatch, with_policy, domain, step):
    """In the first adapter, in the second, and before that one has its first checkpoint."""
    stages = {name: tmp_path / name / "tiny" / "adapters" for name in ("whole", "interrupted")}
    for name, stage in stages.items():
        monkeypatch.setenv("LABS_RUNS_DIR", str(with_policy(tmp_path / name)))
        if name == "interrupted":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                write = TrainLog.write

                def write_or_stop(log, at, write=write, **numbers):
                    if log.path.parent.name == domain and at >= step:
                        raise KeyboardInterrupt
                    return write(log, at, **numbers)

                patch.setattr(TrainLog, "write", write_or_stop)
                domain_adapters.run("tiny", 3, False, SHORT)
            assert (stage / "market" / "adapter").exists() == (domain == "office")
            assert not (stage / "metrics.json").exists()
        domain_adapters.run("tiny", 3, False, SHORT)
    same_end(*stages.values())


@pytest.mark.slow
def test_killed_by_sigkill_it_ends_the_same(tmp_path, with_policy, killed, script):
    command = ["--profile", "tiny", "--seed", "5", *SHORT, "adapters.trainer.max_steps=8"]
    stages = {name: tmp_path / name / "tiny" / "adapters" for name in ("whole", "killed")}
    for name, stage in stages.items():
        environment = {"LABS_RUNS_DIR": str(with_policy(tmp_path / name)), "OMP_NUM_THREADS": "1"}
        if name == "killed":
            killed(SCRIPT, command, stage / "office" / "train_log.jsonl", environment, steps=(3, 6))
            assert not (stage / "metrics.json").exists()
        done = script(SCRIPT, *command, **environment)
        assert done.returncode == 0, done.stderr
    same_end(*stages.values())


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--profile", "big"], "unknown profile 'big'"),
        (["adapters.trainer.lr=1"], "adapters.trainer.lr"),
        (["adapters.method=full"], "adapters.method"),
        (["adapters.trainer.optim=magic"], "adapters.trainer: "),
        (["adapters.n_train=0"], "adapters.n_train=0 must be at least 1"),
        (["adapters.n_validation=-1"], "adapters.n_validation=-1 must be at least 1"),
        (["adapters.n_test=0"], "adapters.n_test=0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(runs, with_policy, nothing_written, arguments, words):
    with_policy(runs)
    refused(arguments, words, nothing_written)


def refused(arguments, words, nothing_written):
    from typer.testing import CliRunner

    from shared.stages import stage_command

    nothing_written.begin()
    profile = [] if "--profile" in arguments else ["--profile", "tiny"]
    done = CliRunner().invoke(stage_command(domain_adapters.run, None), [*profile, *SHORT, *arguments])
    assert done.exit_code == 1 and words in done.stderr, done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert nothing_written


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["adapters.trainer.max_length=20"], "longer than trainer.max_length=20 tokens: raise it"),
        (["adapters.lora.r=0"], "cannot load"),
        (["adapters.lora.target_modules=[nothing]"], "cannot load"),
        (["adapters.backend=magic"], "backend 'magic'"),
    ],
)
def test_adapters_that_cannot_be_are_one_line(runs, with_policy, nothing_written, arguments, words):
    with_policy(runs)
    refused(arguments, words, nothing_written)


def test_a_base_that_is_an_adapter_itself_is_refused(runs, with_policy, nothing_written):
    with_policy(runs)
    stage = runs / "tiny" / "sft"
    (stage / "model").rename(stage / "adapter")
    refused([], "holds an adapter: adapters are trained on whole weights", nothing_written)
