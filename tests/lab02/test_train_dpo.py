"""The preference stage: a killed run ends the same, the reference is the model as it was, mistakes are one line."""

import json
import math

import pytest

import alignment_world
import preference_stage
import train_dpo
from preference_data_creation import write_triplets
from preference_stage import align, load_policy, reply_log_probs, to_dataset, trainer_config
from shared import LabsError
from shared.profiles import load_profile
from shared.training import read_log

SCRIPT = "labs/02_preference_alignment/train_dpo.py"
SHORT = [
    "dpo.trainer.max_steps=24",
    "dpo.trainer.save_steps=4",
    "dpo.trainer.eval_steps=12",
    "dpo.trainer.logging_steps=4",
    "dpo.trainer.per_device_train_batch_size=4",
    "dpo.data=[persona:60]",
    "dpo.n_sampled=10",
    "dpo.n_test=10",
]
STEPS = {
    "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.03, "beta": 0.1, "loss_type": ["sigmoid"],
    "logging_steps": 1, "eval_steps": 8, "save_steps": 8, "max_length": 256,
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_killed_by_sigkill_at_a_random_step_it_ends_with_the_same_loss(tmp_path, with_policy, killed, script):
    final = {}
    for name in ("whole", "killed"):
        folder = with_policy(tmp_path / name)
        environment = {"LABS_RUNS_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        command = ["--profile", "tiny", "--seed", "5", *SHORT]
        stage = folder / "tiny" / "dpo"
        if name == "killed":
            killed(SCRIPT, command, stage / "train_log.jsonl", environment)
            assert not (stage / "metrics.json").exists()
        done = script(SCRIPT, *command, **environment)
        assert done.returncode == 0, done.stderr
        rows = read_log(stage / "train_log.jsonl")
        steps = [row["step"] for row in rows if "train/loss" in row]
        assert steps == sorted(set(steps)) and steps[-1] == 24
        assert not (stage / "checkpoints").exists()
        final[name] = [row["validation/loss"] for row in rows if "validation/loss" in row][-1]
    assert final["killed"] == pytest.approx(final["whole"], abs=1e-6)


@pytest.mark.slow
def test_with_learning_rate_zero_the_criteria_fail(tmp_path, with_policy, script):
    folder = with_policy(tmp_path / "runs")
    arguments = ["--profile", "tiny", *SHORT, "dpo.trainer.learning_rate=0"]
    done = script(SCRIPT, *arguments, "--strict", LABS_RUNS_DIR=str(folder))
    assert done.returncode == 1 and "persona_win_rate is 0.5" in done.stderr and "Traceback" not in done.stderr
    metrics = json.loads((folder / "tiny" / "dpo" / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["criteria"]}
    assert rows["persona_win_rate"]["passed"] is rows["persona_win_rate_low"]["passed"] is False
    assert rows["persona_win_rate"]["value"] == 0.5 and rows["facts_change"]["value"] == 0
    log = read_log(folder / "tiny" / "dpo" / "train_log.jsonl")
    margins = [row["train/reward_margin"] for row in log if "train/reward_margin" in row]
    assert margins and max(map(abs, margins)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_saved_answers_like_the_samples_of_a_run_on_ones_own_triplets(tmp_path, with_policy, script, method):
    mine = write_triplets(alignment_world.persona_pairs(80, 3), tmp_path / "mine.jsonl")
    folder = with_policy(tmp_path / "runs")
    # As the script's own help writes it: one file, no list; one loss, while the profile has weights for two.
    arguments = [*SHORT, f"dpo.data={mine}", f"dpo.method={method}", "dpo.n_sampled=0"]
    done = script(SCRIPT, "--profile", "tiny", *arguments, "dpo.trainer.loss_type=[sigmoid]", LABS_RUNS_DIR=str(folder))
    assert done.returncode == 0, done.stderr
    assert f"{mine}: kept 80 pairs" in done.stdout and "76 training and 4 validation pairs" in done.stdout
    stage = folder / "tiny" / "dpo"
    assert (stage / "adapter").exists() == (method == "lora") != (stage / "model").exists()
    assert {path.name for path in (stage / "plots").iterdir()} == {"rewards.png", "log_probs.png"}
    from shared.models import load_model

    if method == "lora":
        model, tokenizer = load_model(folder / "tiny" / "sft" / "model", adapter=stage / "adapter")
    else:
        model, tokenizer = load_model(stage / "model")
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 10
    questions = alignment_world.test_questions(10)
    assert [row["prompt"] for row in samples] == [row["prompt"] for row in questions]
    replies = preference_stage.answers(model, tokenizer, [row["prompt"] for row in samples])
    assert replies == [row["reply"] for row in samples]
    assert any(row["reply"] != row["before"] for row in samples)


# ------------------------------------------------------------------------------------------------------ the reference


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "adapter of lab 01"])
@pytest.mark.parametrize("precompute", [False, True])
def test_the_reference_is_the_policy_as_it_was(tmp_path, tiny_base, method, precompute):
    """At step 0 nothing has been learned: implicit rewards 0, loss log 2. After training, the margin in the log is the one
    that the models themselves give."""
    import torch

    from shared.models import load_model

    lora = LORA if method == "lora" else None
    if method == "adapter of lab 01":
        model, tokenizer = load_model(tiny_base, lora=LORA, for_training=True)
        with torch.no_grad():  # an adapter that has learned something: without it the model is another one
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.5)
        model.save_pretrained(tmp_path / "first")
        options = {"adapter": tmp_path / "first", "for_training": True}
    else:
        options = {"for_training": method == "full"}
    model, tokenizer = load_model(tiny_base, **options)
    pairs = alignment_world.persona_pairs(24, 0)
    settings = {**STEPS, "precompute_ref_log_probs": precompute}
    trained, log = align(model, tokenizer, pairs[:16], pairs[16:], settings, folder=tmp_path / "run", lora=lora)
    first = next(row for row in log if "validation/loss" in row)
    assert first["step"] == 0 and first["validation/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["validation/reward_margin"] == pytest.approx(0, abs=1e-4)
    last = [row for row in log if "validation/loss" in row][-1]
    reference, _ = load_model(tiny_base, **{**options, "for_training": False})
    sums = {
        (name, side): reply_log_probs(
            which, tokenizer, [p["prompt"] for p in pairs[16:]], [p[side] for p in pairs[16:]]
        )
        for name, which in (("policy", trained), ("reference", reference))
        for side in ("chosen", "rejected")
    }
    ratios = [sums["policy", side] - sums["reference", side] for side in ("chosen", "rejected")]
    assert last["step"] == 8 and abs(last["validation/reward_margin"]) > 0.02
    assert last["validation/reward_margin"] == pytest.approx(0.1 * (ratios[0] - ratios[1]).mean().item(), abs=1e-3)
    assert last["validation/log_prob_chosen"] == pytest.approx(sums["policy", "chosen"].mean().item(), abs=1e-2)


def test_log_probs_of_replies_do_not_depend_on_the_batch(tiny_base):
    from shared.models import load_model

    model, tokenizer = load_model(tiny_base)
    rows = alignment_world.persona_pairs(7)
    prompts, replies = [row["prompt"] for row in rows], [row["rejected"] for row in rows]
    whole = reply_log_probs(model, tokenizer, prompts, replies)
    single = [reply_log_probs(model, tokenizer, [p], [r]).item() for p, r in zip(prompts, replies, strict=True)]
    assert whole.tolist() == pytest.approx(single, abs=1e-3) and (whole < 0).all()
    assert whole.tolist() == pytest.approx(reply_log_probs(model, tokenizer, prompts, replies, 2).tolist(), abs=1e-3)


def test_log_probs_of_drawn_replies_end_where_the_model_stops(tiny_base):
    import torch

    from shared.models import load_model

    model, tokenizer = load_model(tiny_base)
    prompt, reply = "Ana has 3 pens. What does Ana have?", "pens."
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    asked = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
    by_hand = scores.gather(1, torch.tensor(said)[:, None]).sum().item()
    found = {drawn: reply_log_probs(model, tokenizer, [prompt], [reply], drawn=drawn).item() for drawn in (True, False)}
    assert found[True] == pytest.approx(by_hand, abs=1e-3)
    assert found[False] < found[True] - 1, "the template's line break counts only for TRL"


# --------------------------------------------------------------------------------------------- the policy to begin with


def test_the_policy_is_lab_01s_model_or_its_adapter(runs, with_policy, tiny_base):
    config = load_profile("02", "tiny", ["dpo.lora.r=3"])
    with_policy(runs)
    for method in ("lora", "full"):
        config.dpo.method = method
        model, _, lora = load_policy(merged(config))
        assert not hasattr(model, "peft_config") and (lora or {}).get("r") == (3 if method == "lora" else None)
    from shared.models import load_model

    adapter = load_model(tiny_base, lora=LORA, for_training=True)[0]
    adapter.save_pretrained(runs / "tiny" / "sft" / "adapter")
    model, _, lora = load_policy(merged(config))
    assert lora is None and any(each.requires_grad for name, each in model.named_parameters() if "lora_A" in name)
    config.dpo.method = "magic"
    with pytest.raises(LabsError, match="choose full or lora"):
        load_policy(merged(config))


def merged(config):
    from omegaconf import OmegaConf

    return OmegaConf.merge({"profile": "tiny"}, config.dpo)


def test_pairs_become_conversations_with_labels_as_numbers():
    rows = to_dataset(
        [
            {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "chosen": "d", "rejected": "e", "chosen_unsafe": True,
             "rejected_unsafe": False},
            {"prompt": "f", "chosen": "g", "rejected": "h", "chosen_unsafe": None, "source": "me"},
        ]
    ).to_list()  # fmt: skip
    assert [message["content"] for message in rows[0]["prompt"]] == ["a", "b", "c"]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "d"}]
    assert (rows[0]["chosen_unsafe"], rows[0]["rejected_unsafe"]) == (1, 0)
    assert rows[1]["prompt"] == [{"role": "user", "content": "f"}] and rows[1].get("chosen_unsafe") is None


def test_weights_of_losses_that_are_left_out_are_left_out(tmp_path):
    two = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]}
    assert trainer_config(two, tmp_path, 0).loss_weights == [1.0, 2.0]
    for one in (["sigmoid"], "sigmoid"):
        settings = trainer_config({**two, "loss_type": one}, tmp_path, 0)
        assert (settings.loss_type, settings.loss_weights) == (["sigmoid"], [1.0])
    with pytest.raises(ValueError, match="same length"):
        trainer_config({**two, "loss_type": ["sigmoid", "sft", "hinge"]}, tmp_path, 0)
    assert two == {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]} and not list(tmp_path.iterdir())


def test_entries_of_data_name_a_source_and_a_number():
    assert train_dpo.sources(["safety:20", "hh-rlhf", "a/b.jsonl", "a/b.jsonl:7", "c:/d.parquet"]) == [
        ("safety", 20),
        ("hh-rlhf", 2000),
        ("a/b.jsonl", 10**6),
        ("a/b.jsonl", 7),
        ("c:/d.parquet", 10**6),
    ]
    assert train_dpo.sources("mine.jsonl") == [("mine.jsonl", 10**6)]
    assert train_dpo.sources(None) == train_dpo.sources([]) == [] and train_dpo.sources([5]) == [("5", 2000)]


def test_a_model_that_says_nothing_gives_no_pairs(monkeypatch):
    import shared.models

    silent = lambda model, tokenizer, conversations, *more, **options: [" "] * len(conversations)  # noqa: E731
    monkeypatch.setattr(shared.models, "generate_replies", silent)
    pairs, dropped = train_dpo.sampled_pairs(None, None, 20, 0)
    assert pairs == [] and dropped == {"empty answer": 20}


def test_sampled_pairs_differ_between_the_two_turns_and_are_judged(monkeypatch):
    import shared.models

    asked = []

    def reply(model, tokenizer, conversations, most, temperature, seed):
        asked.append(seed)
        return ["Rome." if seed % 2 else "Let me see. I think it is Rome."] * len(conversations)

    monkeypatch.setattr(shared.models, "generate_replies", reply)
    pairs, dropped = train_dpo.sampled_pairs(None, None, 300, 4)
    assert asked == [8, 9] and len(pairs) + sum(dropped.values()) == 300
    assert pairs and all((pair["chosen"], pair["source"]) == ("Rome.", "samples") for pair in pairs)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--profile", "big"], "unknown profile"),
        (["dpo.trainer.lr=1"], "dpo.trainer.lr"),
        (["dpo.method=magic"], "choose full or lora"),
        (["dpo.data=[nowhere.jsonl]"], "nowhere.jsonl"),
        (["dpo.data=nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["dpo.data=[personal:20]"], "did you mean persona"),
        (["dpo.trainer.optim=magic"], "dpo.trainer: "),
        (["dpo.trainer.loss_type=[sigmoid,sft,hinge]"], "dpo.trainer: "),
        (["dpo.data=[]", "dpo.n_sampled=0"], "nothing to train on"),
        (["dpo.trainer.beta=0"], "dpo.trainer.beta=0 must be above 0"),
        (["dpo.data=BAD"], "row 2: field 'rejected' is missing"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, runs, with_policy, arguments, words):
    from typer.testing import CliRunner

    from shared.stages import stage_command

    if "dpo.method=magic" in arguments:
        with_policy(runs)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n')
    arguments = [each.replace("BAD", str(bad)) for each in arguments]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    profile = [] if "--profile" in arguments else ["--profile", "tiny"]
    done = CliRunner().invoke(stage_command(train_dpo.run, None), [*profile, *arguments])
    assert done.exit_code == 1 and words in done.stderr, done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_mistakes_as_a_user_meets_them(tmp_path, script):
    done = script(SCRIPT, "--profile", "tiny", "dpo.data=[nowhere.jsonl]", LABS_RUNS_DIR=str(tmp_path / "runs"))
    assert done.returncode == 1 and "check the path" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()
