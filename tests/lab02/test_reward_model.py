"""The reward model: what its numbers mean, whatever batch they come from; from the policy to the finished stage."""

import json
import math
import random

import pytest
import torch

import alignment_world
import reward_model
from preference_stage import to_dataset
from reward_model import calibration, load_reward_model, pair_margins, plot_calibration, rewards
from shared import LabsError
from shared.training import read_log

SCRIPT = "labs/02_preference_alignment/reward_model.py"
SHORT = [
    "reward.trainer.max_steps=24",
    "reward.trainer.save_steps=4",
    "reward.trainer.eval_steps=12",
    "reward.trainer.logging_steps=4",
    "reward.trainer.per_device_train_batch_size=4",
    "reward.data=[persona:60,safety:60]",
    "reward.n_test=20",
]


def logit(p):
    return math.log(p / (1 - p))


# -------------------------------------------------------------------------------------------------------- calibration


def test_claims_that_hold_have_no_error():
    margins = []
    for index in range(160):
        a_is_chosen = index % 2 == 0
        # Of the 80 pairs with a chosen, 60 get the claim 3/4 and 20 the claim 1/4; of the others the mirror image.
        high = (index // 2) % 4 < 3
        claim = (0.75 if high else 0.25) if a_is_chosen else (0.25 if high else 0.75)
        margins.append(logit(claim) if a_is_chosen else -logit(claim))
    bins, error = calibration(margins)
    assert error == pytest.approx(0, abs=1e-12)
    assert [(part["n"], part["claimed"], part["observed"]) for part in bins] == [
        (80, pytest.approx(0.25), pytest.approx(0.25)),
        (80, pytest.approx(0.75), pytest.approx(0.75)),
    ]


def test_certainty_is_an_error_where_it_is_wrong():
    sure, doubtful = 1000.0, [1000.0, 1000.0, -1000.0, -1000.0]
    assert calibration([sure] * 10)[1] == pytest.approx(0, abs=1e-12)
    assert calibration([-sure] * 10)[1] == pytest.approx(1)
    bins, error = calibration(doubtful * 10)
    assert error == pytest.approx(0.5) and [part["n"] for part in bins] == [20, 20]
    assert [part["observed"] for part in bins] == [0.5, 0.5]


def test_no_opinion_is_calibrated_and_says_nothing():
    bins, error = calibration([0.0] * 10)
    assert error == 0 and bins == [{"claimed": 0.5, "observed": 0.5, "n": 10}]


def test_larger_margins_than_the_truth_are_overconfident():
    """Pairs won with probability σ(m), claimed as σ(3 m)."""
    rng = random.Random(0)
    truth = [abs(rng.gauss(0, 1)) for _ in range(4000)]
    signed = [m if rng.random() < 1 / (1 + math.exp(-m)) else -m for m in truth]
    honest, boastful = (calibration([scale * m for m in signed])[1] for scale in (1, 3))
    assert honest < 0.03 and boastful > 0.12
    bins = calibration([3 * m for m in signed])[0]
    assert bins[0]["observed"] > bins[0]["claimed"] and bins[-1]["observed"] < bins[-1]["claimed"]


def test_bins_hold_every_pair_once_and_no_pair_is_an_error():
    rng = random.Random(1)
    margins = [rng.gauss(0, 4) for _ in range(501)]
    for n_bins in (1, 7, 10):
        bins, error = calibration(margins, n_bins)
        assert sum(part["n"] for part in bins) == 501 and len(bins) <= n_bins and 0 <= error <= 1
        assert [part["claimed"] for part in bins] == sorted(part["claimed"] for part in bins)
        assert sum(part["observed"] * part["n"] for part in bins) == pytest.approx(251)
    with pytest.raises(ValueError, match="at least one pair"):
        calibration([])


def test_picture_of_the_calibration(tmp_path):
    bins, _ = calibration([-2.0, -1.0, 0.5, 1.0, 3.0, 800.0])
    plot_calibration(bins, tmp_path / "plots" / "calibration.png")
    assert (tmp_path / "plots" / "calibration.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------------- rewards


@pytest.fixture
def scorer(tiny_base):
    torch.manual_seed(1)
    model, tokenizer = load_reward_model(tiny_base)
    return model.double(), tokenizer


def test_rewards_do_not_depend_on_batch_and_padding(scorer):
    pairs = alignment_world.persona_pairs(11)
    prompts, replies = [pair["prompt"] for pair in pairs], [pair["rejected"] for pair in pairs]
    model, tokenizer = scorer
    model.train()
    whole = rewards(model, tokenizer, prompts, replies)
    assert model.training  # as it was before
    assert len(set(whole)) == 11
    for size in (1, 2, 3):
        assert rewards(model, tokenizer, prompts, replies, size) == pytest.approx(whole, abs=1e-5)
    assert rewards(model, tokenizer, prompts[::-1], replies[::-1], 4) == pytest.approx(whole[::-1], abs=1e-5)
    assert rewards(model, tokenizer, [], []) == []
    with pytest.raises(ValueError):
        rewards(model, tokenizer, prompts, replies[:-1])


def test_rewards_are_those_of_trls_own_batches(scorer, tmp_path):
    """The trainer and `rewards` must read the same tokens: else the model is asked what it never learned."""
    from trl import RewardConfig, RewardTrainer

    model, tokenizer = scorer
    pairs = alignment_world.safety_pairs(6)
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**settings, gradient_checkpointing=False),
        processing_class=tokenizer,
        train_dataset=to_dataset(pairs),
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    model.eval()
    with torch.no_grad():
        chosen, rejected = model(**batch).logits[:, 0].chunk(2)
    prompts = [pair["prompt"] for pair in pairs]
    for side, theirs in (("chosen", chosen), ("rejected", rejected)):
        assert rewards(model, tokenizer, prompts, [pair[side] for pair in pairs]) == pytest.approx(
            theirs.tolist(), abs=1e-5
        )


def test_margins_are_chosen_minus_rejected(scorer):
    pairs = alignment_world.persona_pairs(5)
    margins = pair_margins(*scorer, pairs)
    for pair, margin in zip(pairs, margins, strict=True):
        chosen, rejected = (rewards(*scorer, [pair["prompt"]], [pair[side]])[0] for side in ("chosen", "rejected"))
        assert margin == pytest.approx(chosen - rejected, abs=1e-5) and margin != 0
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    assert pair_margins(*scorer, swapped) == pytest.approx([-margin for margin in margins], abs=1e-5)


def test_a_reward_is_read_off_the_end_of_the_whole_conversation(scorer):
    model, tokenizer = scorer
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Where is Rome?"
    one = rewards(model, tokenizer, [prompt], ["Italy."])
    for other in (prompt.replace("Hi", "Bye"), prompt.replace("Hello", "What?"), prompt.replace("Rome", "Lima")):
        assert rewards(model, tokenizer, [other], ["Italy."]) != one
    assert rewards(model, tokenizer, [prompt], ["Italy. Or so."]) != one


# ------------------------------------------------------------------------------------------------------------- loading


def test_a_policys_adapter_is_merged_before_the_head_is_changed(tiny_base, tmp_path):
    from shared.models import load_model

    torch.manual_seed(2)
    lora = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    policy, tokenizer = load_model(tiny_base, lora=lora, for_training=True)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    policy.save_pretrained(tmp_path / "adapter")
    policy.eval()
    model, _ = load_reward_model(tiny_base, adapter=tmp_path / "adapter")
    ids = tokenizer("Ana lives in Rome. Where does Ana live?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        logits = policy.base_model.model.lm_head(hidden)
        expected = policy(input_ids=ids).logits
        with policy.disable_adapter():
            without = policy(input_ids=ids).logits
    assert torch.allclose(logits, expected, atol=1e-4) and not torch.allclose(logits, without, atol=1e-2)
    assert model.config.num_labels == 1 and model.score.weight.shape[0] == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    with pytest.raises(LabsError, match="cannot be merged into 4-bit"):
        load_reward_model(tiny_base, adapter=tmp_path / "adapter", load_in_4bit=True)


def test_the_hardened_policy_is_the_start(runs, with_policy, tiny_base):
    from types import SimpleNamespace

    config = SimpleNamespace(profile="tiny", model="hub/model", load_in_4bit=False)
    with_policy(runs, "safedpo")
    stage = runs / "tiny" / "safedpo"
    assert reward_model.starting_point(config) == {"name_or_path": stage / "model"}
    (stage / "model").rename(stage / "kept")
    (stage / "adapter").mkdir()
    (stage / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    assert reward_model.starting_point(config) == {"name_or_path": "base", "adapter": stage / "adapter"}
    config.load_in_4bit = True
    assert reward_model.starting_point(config) == {"name_or_path": "hub/model", "load_in_4bit": True}
    config.profile = "colab"
    assert reward_model.starting_point(config)["name_or_path"] == "hub/model"


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(LabsError, match="labs list") as caught:
            load_reward_model(path)
        assert "\n" not in str(caught.value)


def test_held_out_pairs_are_half_of_each_kind_and_never_prefer_harm():
    pairs = reward_model.test_pairs(40)
    assert len(pairs) == 40 and pairs == reward_model.test_pairs(40)
    assert sum(pair["source"] == "persona" for pair in pairs) == 20
    assert not any(pair.get("chosen_unsafe") for pair in pairs) and any(pair.get("rejected_unsafe") for pair in pairs)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_leaves_a_model_that_gives_the_margins_of_the_samples(runs, with_policy, script, method):
    with_policy(runs, "safedpo")
    done = script(SCRIPT, "--profile", "tiny", *SHORT, f"reward.method={method}", LABS_RUNS_DIR=str(runs))
    assert done.returncode == 0, done.stderr
    stage = runs / "tiny" / "reward"
    metrics = json.loads((stage / "metrics.json").read_text())
    assert metrics["criteria"][0]["n"] == 20 and sum(part["n"] for part in metrics["calibration"]) == 20
    assert sum(part["n"] for part in metrics["by_source"].values()) == 20
    right = sum(part["right"] for part in metrics["by_source"].values())
    assert metrics["criteria"][0]["value"] == pytest.approx(right / 20)
    assert {path.name for path in (stage / "plots").iterdir()} == {"calibration.png", "loss.png"}
    assert not (stage / "checkpoints").exists() and (stage / "adapter").exists() == (method == "lora")
    pairs = reward_model.test_pairs(20)
    if method == "lora":
        from peft import PeftModel

        model, tokenizer = load_reward_model(runs / "tiny" / "safedpo" / "model")
        model = PeftModel.from_pretrained(model, stage / "adapter")
    else:
        model, tokenizer = load_reward_model(stage / "model")
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    assert pair_margins(model, tokenizer, pairs) == pytest.approx([row["margin"] for row in samples], abs=2e-3)
    for row, pair in zip(samples, pairs, strict=True):
        assert row["rejected"] == ("[…]" if pair.get("rejected_unsafe") else pair["rejected"])


@pytest.mark.slow
def test_with_learning_rate_zero_the_criterion_fails(runs, with_policy, script):
    with_policy(runs, "safedpo")
    arguments = ["--profile", "tiny", *SHORT, "reward.n_test=200", "reward.trainer.learning_rate=0", "--strict"]
    done = script(SCRIPT, *arguments, LABS_RUNS_DIR=str(runs))
    assert done.returncode == 1 and "pair_accuracy is 0." in done.stderr and "Traceback" not in done.stderr
    (row,) = json.loads((runs / "tiny" / "reward" / "metrics.json").read_text())["criteria"]
    assert row["passed"] is False and row["value"] == row["baseline"]


@pytest.mark.slow
def test_killed_by_sigkill_at_a_random_step_it_ends_with_the_same_loss(tmp_path, with_policy, killed, script):
    final = {}
    for name in ("whole", "killed"):
        folder = with_policy(tmp_path / name, "safedpo")
        environment = {"LABS_RUNS_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        command = ["--profile", "tiny", "--seed", "5", *SHORT]
        log = folder / "tiny" / "reward" / "train_log.jsonl"
        if name == "killed":
            killed(SCRIPT, command, log, environment)
        done = script(SCRIPT, *command, **environment)
        assert done.returncode == 0, done.stderr
        rows = read_log(log)
        assert [row["step"] for row in rows if "train/loss" in row] == list(range(4, 25, 4))
        final[name] = [row["validation/loss"] for row in rows if "validation/loss" in row][-1]
    assert final["killed"] == pytest.approx(final["whole"], abs=1e-6)


@pytest.mark.parametrize(
    "override, words",
    [
        ("reward.method=magic", "choose full or lora"),
        ("reward.n_sampled=5", "reward.n_sampled"),
        ("reward.data=[nowhere.jsonl]", "check the path"),
        ("reward.data=[]", "nothing to train on"),
        ("reward.trainer.optim=magic", "reward.trainer: "),
    ],
)
def test_mistakes_are_named_before_anything_is_written(runs, override, words):
    with pytest.raises(LabsError, match=words) as caught:
        reward_model.run("tiny", 0, False, [override])
    assert "\n" not in str(caught.value) and not runs.exists()
