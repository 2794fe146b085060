"""SafeDPO's trainer against the loss by hand, value and gradient; whole runs; nothing harmful is written down."""

import json
import re

import pytest
import torch

import alignment_world
import safety_hardening_dpo as safety
from preference_losses import safedpo_counts, safedpo_loss, safedpo_transform, sequence_log_probs
from preference_stage import to_dataset
from refusals import classify_reply
from safedpo_trainer import SafeDPOTrainer
from shared import LabsError
from shared.profiles import load_profile
from shared.training import read_log

SCRIPT = "labs/02_preference_alignment/safety_hardening_dpo.py"
SHORT = [
    "safedpo.trainer.max_steps=24",
    "safedpo.trainer.save_steps=4",
    "safedpo.trainer.eval_steps=12",
    "safedpo.trainer.logging_steps=4",
    "safedpo.trainer.per_device_train_batch_size=4",
    "safedpo.data=[safety:80,persona:20]",
    "safedpo.n_test=8",
]
BETA = 0.3


# ----------------------------------------------------------------------------------------------------------- the loss


def transformed_pairs():
    """Eight pairs of all the labels that the transform leaves, of different lengths."""
    pairs = safedpo_transform(alignment_world.safety_pairs(60, 1))
    unsafe = [pair for pair in pairs if pair["rejected_unsafe"]]
    return [*unsafe[:5], *[pair for pair in pairs if not pair["rejected_unsafe"]][:3]]


class Trainer:
    """A trainer on a tiny model in float64, whose adapter is no longer the reference, and its own collator's batch."""

    def __init__(self, tmp_path, tiny_base, kind, loss_type=("sigmoid",), loss_weights=(1.0,), **arguments):
        from peft import LoraConfig
        from trl import DPOConfig

        from shared.models import load_model

        torch.manual_seed(0)
        model, tokenizer = load_model(tiny_base)
        pairs = transformed_pairs()
        settings = {
            "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
            "disable_tqdm": True, "per_device_train_batch_size": 8, "beta": BETA, "precompute_ref_log_probs": True,
            "loss_type": list(loss_type), "loss_weights": list(loss_weights), "max_length": 256,
        }  # fmt: skip
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        self.trainer = kind(
            model=model.double(),
            args=DPOConfig(**settings),
            processing_class=tokenizer,
            train_dataset=to_dataset(pairs),
            peft_config=lora,
            **arguments,
        )
        self.model = self.trainer.model
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.3)
        self.batch = self.trainer.data_collator([self.trainer.train_dataset[i] for i in range(len(pairs))])
        labels = [[int(pair[f"{side}_unsafe"]) for pair in pairs] for side in ("chosen", "rejected")]
        self.labels = [torch.tensor(each) for each in labels]

    def theirs(self):
        batch = {key: value for key, value in self.batch.items() if key != "safety_gap" or self.takes_gap}
        return self.trainer.compute_loss(self.model, batch)

    @property
    def takes_gap(self):
        return isinstance(self.trainer, SafeDPOTrainer)

    def log_probs(self):
        """policy chosen, policy rejected, reference chosen, reference rejected: by hand, the reference without adapter."""
        ids, mask = self.batch["input_ids"], self.batch["completion_mask"]
        inputs = {"input_ids": ids, "attention_mask": self.batch["attention_mask"]}
        policy = sequence_log_probs(self.model(**inputs).logits, ids, mask)
        with torch.no_grad(), self.model.disable_adapter():
            reference = sequence_log_probs(self.model(**inputs).logits, ids, mask)
        return *policy.chunk(2), *reference.chunk(2)

    def gradients(self, loss):
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.autograd.grad(loss, learned, retain_graph=True)

    def same(self, ours, theirs):
        """Loss and every gradient of the adapter; the precomputed reference comes back in single precision."""
        pairs = list(zip(self.gradients(ours), self.gradients(theirs), strict=True))
        assert len(pairs) == 8 and any(gradient.abs().max() > 1e-3 for gradient, _ in pairs)
        close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
        return close and torch.allclose(ours, theirs.double(), rtol=1e-5, atol=1e-6)


def test_loss_and_gradients_equal_the_loss_by_hand(tmp_path, tiny_base):
    run = Trainer(tmp_path, tiny_base, SafeDPOTrainer, margin=0.0)
    assert len(set(run.batch["completion_mask"].sum(1).tolist())) > 3  # ragged indeed
    assert sorted(run.batch["safety_gap"].tolist()) == [0.0] * 3 + [1.0] * 5
    log_probs = run.log_probs()
    chosen, rejected = run.labels
    d = (log_probs[0] - log_probs[1]) - (log_probs[2] - log_probs[3])
    for margin in (0.0, 3.0, 10.0):
        run.trainer.margin = margin
        theirs = run.theirs()
        assert run.same(safedpo_loss(*log_probs, chosen, rejected, BETA, margin), theirs)
        wrong = {
            "margin inside beta": safedpo_loss(*log_probs, chosen, rejected, BETA, margin * BETA),
            "margin divided by beta": safedpo_loss(*log_probs, chosen, rejected, BETA, margin / BETA),
            "labels inverted": safedpo_loss(*log_probs, rejected, chosen, BETA, margin),
            "margin on every pair": safedpo_loss(*log_probs, 0 * chosen, 0 * rejected + 1, BETA, margin),
            "margin on the safe pairs": safedpo_loss(*log_probs, 0 * chosen, 1 - rejected, BETA, margin),
            "no margin": safedpo_loss(*log_probs, chosen, rejected, BETA, 0.0),
            "outside the sigmoid": -(torch.nn.functional.logsigmoid(BETA * d) - (rejected - chosen) * margin).mean(),
        }
        assert [name for name, loss in wrong.items() if run.same(loss, theirs)] == ([] if margin else list(wrong))


def test_without_a_margin_it_is_trls_own_trainer(tmp_path, tiny_base):
    from trl import DPOTrainer

    ours = Trainer(tmp_path / "a", tiny_base, SafeDPOTrainer, margin=0.0)
    theirs = Trainer(tmp_path / "b", tiny_base, DPOTrainer)
    assert torch.equal(ours.theirs(), theirs.theirs())
    pairs = zip(ours.gradients(ours.theirs()), theirs.gradients(theirs.theirs()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_sft_term_does_not_know_the_margin(tmp_path, tiny_base):
    rest = []
    for margin in (0.0, 10.0):
        both = Trainer(tmp_path, tiny_base, SafeDPOTrainer, ("sigmoid", "sft"), (1.0, 2.0), margin=margin)
        log_probs = both.log_probs()
        rest.append(both.theirs() - safedpo_loss(*log_probs, *both.labels, BETA, margin))
    mask = both.batch["completion_mask"].chunk(2)[0]
    by_hand = -2.0 * log_probs[0].sum() / mask[:, 1:].sum()  # the mean over all tokens of the chosen answers
    assert [value.item() for value in rest] == pytest.approx([by_hand.item()] * 2, rel=1e-5)


def test_labels_reach_the_training_batches_and_the_log_has_the_margin_taken_off(tmp_path, tiny_base):
    run = Trainer(tmp_path, tiny_base, SafeDPOTrainer, margin=10.0)
    (batch,) = run.trainer.get_train_dataloader()
    assert sorted(batch["safety_gap"].tolist()) == [0.0] * 3 + [1.0] * 5
    run.theirs()
    pc, pr, rc, rr = (each.detach() for each in run.log_probs())
    margins = BETA * ((pc - pr) - (rc - rr)) - 10.0 * (run.labels[1] - run.labels[0])
    logged = run.trainer._metrics["train" if run.model.training else "eval"]["rewards/margins"][-1]
    assert logged == pytest.approx(margins.mean().item(), rel=1e-4)


def test_it_needs_the_precomputed_reference(tmp_path, tiny_base):
    from peft import LoraConfig
    from trl import DPOConfig

    from shared.models import load_model

    model, tokenizer = load_model(tiny_base)
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True"):
        SafeDPOTrainer(
            model=model,
            args=DPOConfig(**settings),
            processing_class=tokenizer,
            train_dataset=to_dataset(transformed_pairs()[:2]),
            peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )


# --------------------------------------------------------------------------------------------------------- what is kept


def test_samples_hide_what_complied_with_harm_and_show_the_rest():
    rows = {
        "harmful": alignment_world.test_requests(3, True),
        "harmless": alignment_world.test_requests(2, False),
    }
    served = [row["output"] for row in rows["harmful"]]
    before = {"harmful": served, "harmless": ["a", "b"]}
    after = {"harmful": [served[0], alignment_world.REFUSAL, "}{ ]]"], "harmless": [rows["harmless"][0]["output"], "c"]}
    found = safety.samples(rows, before, after)
    assert [row["kind"] for row in found] == ["harmful"] * 3 + ["harmless"] * 2
    assert [row["reply"] for row in found] == [
        f"[{len(served[0])} characters that comply]",
        alignment_world.REFUSAL,
        "}{ ]]",
        *after["harmless"],
    ]
    assert [row["before"] for row in found] == [*(f"[{len(text)} characters]" for text in served), "a", "b"]
    assert not any(text in json.dumps(found, ensure_ascii=False) for text in served)


def test_flags_are_counted_by_wrapper():
    rows = [{"wrapper": name} for name in ("a", "b", "a", "a")]
    assert safety.by_wrapper(rows, [True, False, False, True]) == {"a": {"count": 2, "n": 3}, "b": {"count": 0, "n": 1}}
    with pytest.raises(ValueError):
        safety.by_wrapper(rows, [True])


@pytest.mark.slow
def test_a_run_counts_the_transform_and_writes_no_answer_that_serves_harm(runs, with_policy, monkeypatch):
    """With a model that serves everything, so that there is something to hide."""
    with_policy(runs)
    rows = [row for harmful in (True, False) for row in alignment_world.test_requests(8, harmful)]
    outputs = {row["prompt"]: row["output"] for row in rows}
    harmful = [row["output"] for row in rows if row["harmful"]]
    monkeypatch.setattr(safety, "answers", lambda model, tokenizer, prompts: [outputs.get(p, "x") for p in prompts])
    metrics = safety.run("tiny", 0, False, SHORT)
    config = load_profile("02", "tiny", SHORT).safedpo
    training, _ = (safety.labelled(part) for part in safety.prepare_pairs(config, None, None, 0))
    assert metrics["transform"] == safedpo_counts(training) and min(metrics["transform"].values()) > 0
    values = {row["name"]: row["value"] for row in metrics["criteria"]}
    assert values["attack_success"] == values["attack_success_before"] == values["attack_success_plain_dpo"] == 1.0
    assert values["over_refusal"] == values["harmless_right_change"] == 0.0
    assert metrics["replies"]["after"]["harmful"] == {"refusal": 0, "compliance": 8, "degenerate": 0}
    assert metrics["attack_success_by_wrapper"] == {
        name: {"count": 2, "n": 2} for name in alignment_world.HELD_OUT_WRAPPERS
    }
    stage = runs / "tiny" / "safedpo"
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    for path in (path for path in stage.rglob("*") if path.suffix in (".json", ".jsonl", ".txt", ".md")):
        text = path.read_text()
        assert not any(answer in text or json.dumps(answer)[1:-1] in text for answer in harmful), path
    assert (stage / "adapter").exists() and not list(stage.rglob("checkpoints"))
    assert [row["step"] for row in read_log(stage / "plain_dpo" / "train_log.jsonl") if "train/loss" in row][-1] == 24
    assert safety.run("tiny", 0, False, SHORT) == metrics  # finished: nothing is trained again


@pytest.mark.slow
def test_with_learning_rate_zero_the_criteria_fail(tmp_path, with_policy, script):
    folder = with_policy(tmp_path / "runs")
    arguments = ["--profile", "tiny", *SHORT, "safedpo.trainer.learning_rate=0", "safedpo.plain_dpo=false"]
    done = script(SCRIPT, *arguments, "--strict", LABS_RUNS_DIR=str(folder))
    assert done.returncode == 1 and "attack_success_before is 0" in done.stderr and "Traceback" not in done.stderr
    metrics = json.loads((folder / "tiny" / "safedpo" / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["criteria"]}
    assert not all(row["passed"] for row in rows.values())
    assert rows["attack_success"]["value"] == rows["attack_success_before"]["value"]
    assert rows["attack_success_plain_dpo"]["value"] is None and not rows["attack_success_plain_dpo"]["passed"]
    assert not (folder / "tiny" / "safedpo" / "plain_dpo").exists()
    for line in (folder / "tiny" / "safedpo" / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "harmful":
            assert re.fullmatch(r"\[\d+ characters\]", row["before"])
            hidden = re.fullmatch(r"\[\d+ characters that comply\]", row["reply"])
            assert hidden or classify_reply(row["reply"]) != "compliance"


@pytest.mark.slow
def test_killed_by_sigkill_at_a_random_step_it_ends_with_the_same_loss(tmp_path, with_policy, killed, script):
    final = {}
    for name in ("whole", "killed"):
        folder = with_policy(tmp_path / name)
        environment = {"LABS_RUNS_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        command = ["--profile", "tiny", "--seed", "5", *SHORT]
        stage = folder / "tiny" / "safedpo"
        if name == "killed":
            killed(SCRIPT, command, stage / "train_log.jsonl", environment)
            assert (stage / "plain_dpo" / "checkpoints" / "checkpoint-24").exists()  # it need not be trained again
        done = script(SCRIPT, *command, **environment)
        assert done.returncode == 0, done.stderr
        for part in (".", "plain_dpo"):
            rows = read_log(stage / part / "train_log.jsonl")
            steps = [row["step"] for row in rows if "train/loss" in row]
            assert steps == sorted(set(steps)) and steps[-1] == 24
            final[name, part] = [row["validation/loss"] for row in rows if "validation/loss" in row][-1]
    for part in (".", "plain_dpo"):
        assert final["killed", part] == pytest.approx(final["whole", part], abs=1e-6)


@pytest.mark.parametrize(
    "override, words",
    [
        ("safedpo.trainer.precompute_ref_log_probs=false", "must be true"),
        ("safedpo.margin=-1", "safedpo.margin=-1 must be at least 0"),
        ("safedpo.data=[nowhere.jsonl]", "check the path"),
        ("safedpo.method=magic", "choose full or lora"),
        ("safedpo.trainer.beta=0", "must be above 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(runs, override, words):
    with pytest.raises(LabsError, match=words) as caught:
        safety.run("tiny", 0, False, [override])
    assert "\n" not in str(caught.value) and not runs.exists()
