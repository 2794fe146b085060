"""Lab 02: a reward model, which gives every answer a number so that preferred answers get the higher one (Bradley–Terry).

    python reward_model.py                                       # the profile that fits this machine
    python reward_model.py reward.trainer.max_steps=200
    python reward_model.py reward.trainer.learning_rate=0        # the negative control: its criterion must fail

It starts from the hardened policy, whose last layer is replaced by one that gives a single number. Lab 03's PPO learns from it.
Interrupt it when you like: the same command goes on from the last checkpoint, to the same result.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import alignment_world
from preference_data_creation import as_messages, labelled
from preference_losses import safedpo_transform
from preference_stage import check_trainer, finish, to_dataset
from shared import LabsError
from shared.profiles import ensure_stage
from shared.report import Measurement, read_metrics
from shared.stages import (
    claim_folder,
    log_callback,
    newest_checkpoint,
    open_stage,
    stage_command,
    trainer_defaults,
)
from shared.training import (
    TrainLog,
    atomic_folder,
    atomic_write_text,
    plot_curves,
    progress,
    quiet_when_unwatched,
    seed_everything,
    wandb_run,
)
from train_dpo import check_sources, prepare_pairs

LOGGED = {
    "loss": "train/loss",
    "accuracy": "train/pair_accuracy",
    "margin": "train/reward_margin",
    "eval_loss": "validation/loss",
    "eval_accuracy": "validation/pair_accuracy",
    "eval_margin": "validation/reward_margin",
}


def load_reward_model(name_or_path: str | Path, adapter: str | Path | None = None, load_in_4bit: bool = False):
    """(sequence classifier with one output, tokenizer) from a causal model (a new, random head) or a finished reward model.

    `adapter`, a policy's, is merged into the weights first; in 4 bits it cannot be, and LabsError says so, as it does
    where there is no model. Only safetensors are read.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

    if adapter is not None:
        from shared.models import load_model

        if load_in_4bit:
            raise LabsError("an adapter cannot be merged into 4-bit weights: set reward.load_in_4bit=false")
        policy, tokenizer = load_model(name_or_path, adapter=adapter)
        with tempfile.TemporaryDirectory() as merged:  # transformers changes a model's head only while it loads
            policy.merge_and_unload().save_pretrained(merged)
            tokenizer.save_pretrained(merged)
            return load_reward_model(merged)
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"num_labels": 1, "use_safetensors": True, "dtype": torch.float32}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    if on_gpu:
        options["device_map"] = {"": 0}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, **options)
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LabsError(f"cannot load {name_or_path} ({reason}): `labs list` shows the stages") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def rewards(model, tokenizer, prompts: Sequence[str], replies: Sequence[str], batch_size: int = 64) -> list[float]:
    """The reward of each reply to its prompt, read off the last token of the whole conversation."""
    import torch

    texts = [
        tokenizer.apply_chat_template([*as_messages(prompt), {"role": "assistant", "content": reply}], tokenize=False)
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    was_training, found = model.training, []
    model.eval()
    with torch.no_grad():
        for start in progress(range(0, len(texts), batch_size), "scoring"):
            batch = tokenizer(
                texts[start : start + batch_size], return_tensors="pt", padding=True, add_special_tokens=False
            ).to(model.device)
            batch.pop("token_type_ids", None)
            found += model(**batch).logits[:, 0].float().tolist()
    model.train(was_training)
    return found


def pair_margins(model, tokenizer, pairs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Reward of the chosen answer minus that of the rejected one, for each pair."""
    prompts = [pair["prompt"] for pair in pairs]
    sides = (rewards(model, tokenizer, prompts, [pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    return [chosen - rejected for chosen, rejected in zip(*sides, strict=True)]


def calibration(margins: Sequence[float], n_bins: int = 10) -> tuple[list[dict[str, Any]], float]:
    """(bins, expected calibration error) of the claim "a is preferred with probability σ(reward a − reward b)".

    Every second pair is shown with its rejected answer as a, so that there is something to predict. A bin holds the mean
    claim, the share of pairs in which a was preferred, and how many there were. Raises ValueError where there is no pair.
    """
    if not margins:
        raise ValueError("calibration needs at least one pair")
    claims = []
    for index, margin in enumerate(margins):
        margin = max(-60.0, min(60.0, margin if index % 2 == 0 else -margin))
        claims.append((1 / (1 + math.exp(-margin)), index % 2 == 0))
    bins, error = [], 0.0
    for lower in range(n_bins):
        members = [(p, won) for p, won in claims if min(int(p * n_bins), n_bins - 1) == lower]
        if members:
            claimed = sum(p for p, _ in members) / len(members)
            observed = sum(won for _, won in members) / len(members)
            bins.append({"claimed": claimed, "observed": observed, "n": len(members)})
            error += abs(claimed - observed) * len(members) / len(claims)
    return bins, error


def plot_calibration(bins: Sequence[Mapping[str, Any]], path: str | Path | None = None):
    """Claimed against observed, with Wilson intervals; on the diagonal the reward model's probabilities can be believed."""
    import matplotlib

    if path is not None:
        matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from shared.significance import wilson_interval

    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], linestyle="--", color="grey", linewidth=1)
    for part in bins:
        low, high = wilson_interval(round(part["observed"] * part["n"]), part["n"])
        axes.plot([part["claimed"]] * 2, [low, high], color="tab:blue", linewidth=1)
    claimed, observed = ([part[name] for part in bins] for name in ("claimed", "observed"))
    axes.scatter(claimed, observed, s=[20 + 2 * part["n"] ** 0.5 * 4 for part in bins])
    axes.set(xlabel="claimed probability that a is preferred", ylabel="share in which it was", title="calibration")
    axes.grid(alpha=0.3)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return axes


def test_pairs(n: int) -> list[dict[str, Any]]:
    """`n` pairs about held-out people, half for the persona and half for safety, in wrappers never seen in training."""
    safety = safedpo_transform(alignment_world.safety_pairs(n, 1, "held_out"))[: n // 2]
    return [*alignment_world.persona_pairs(n - len(safety), 1, "held_out"), *safety]


def reward_config(settings: Mapping[str, Any], folder: Path, seed: int):
    """The `trl.RewardConfig` of a profile's `trainer`. Raises ValueError or TypeError for what TRL does not take."""
    from trl import RewardConfig

    return RewardConfig(**{**trainer_defaults(folder, seed), **settings})


def train_reward_model(
    model, tokenizer, pairs, validation, trainer_settings: Mapping[str, Any], *,
    folder: Path, seed: int = 0, lora: Mapping[str, Any] | None = None, resume: bool = True, wandb=None,
):  # fmt: skip
    """Train with TRL's `RewardTrainer`; returns (the model, the rows of `folder`/train_log.jsonl)."""
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import RewardTrainer

    checkpoints = Path(folder) / "checkpoints"
    last = newest_checkpoint(checkpoints, resume)
    log = TrainLog(Path(folder) / "train_log.jsonl", resume_from=int(last.rsplit("-", 1)[1]) if last else 0)
    adapter = LoraConfig(**{**lora, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}) if lora else None
    trainer = RewardTrainer(
        model=model,
        args=reward_config(trainer_settings, checkpoints, seed),
        processing_class=tokenizer,
        train_dataset=to_dataset(pairs),
        eval_dataset=to_dataset(validation),
        peft_config=adapter,
        callbacks=[log_callback(log, LOGGED, wandb)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last)
    trainer.model.eval()
    return trainer.model, log.rows


def run(profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None) -> dict:
    """Run the stage, or find it done, and return its metrics. Raises LabsError for a mistake in the arguments."""
    config, folder, mark, finished = open_stage("02", "reward", profile, seed, restart, overrides)
    if finished:
        return finished
    if config.method not in ("full", "lora"):
        raise LabsError(f"reward.method={config.method!r}: choose full or lora")
    if config.n_sampled:
        raise LabsError("reward.n_sampled must be 0: a reward model has no answers of its own to compare")
    check_sources(config, seed)
    check_trainer("reward", config.trainer, reward_config)
    start = starting_point(config)
    claim_folder(folder, mark, restart)
    train_stage(config, folder, start, seed, mark)
    return read_metrics(folder)


def starting_point(config) -> dict[str, Any]:
    """`load_reward_model`'s arguments: the hardened policy where there is one, else the hub model of the profile.

    What the policy has learned about harm, the reward model need not find again from one number a pair.
    """
    policy = ensure_stage("safedpo", config.profile)
    if policy is None or config.load_in_4bit:
        return {"name_or_path": config.model, "load_in_4bit": config.load_in_4bit}
    if (policy / "model").exists():
        return {"name_or_path": policy / "model"}
    base = json.loads((policy / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    return {"name_or_path": base, "adapter": policy / "adapter"}


def train_stage(config, folder: Path, start: Mapping[str, Any], seed: int, mark: str) -> None:
    """Training, accuracy on held-out pairs, calibration, and what the stage leaves in its folder."""
    from omegaconf import OmegaConf

    from shared.significance import wilson_interval

    quiet_when_unwatched()
    seed_everything(seed)
    model, tokenizer = load_reward_model(**start)
    parts = prepare_pairs(config, None, None, seed)
    pairs, validation = (safedpo_transform(labelled(part)) for part in parts)
    held_out = test_pairs(config.n_test)
    before = pair_margins(model, tokenizer, held_out)
    with wandb_run("reward", config, folder, config.wandb) as wandb:
        model, log = train_reward_model(
            model, tokenizer, pairs, validation, OmegaConf.to_container(config.trainer), folder=folder, seed=seed,
            lora=OmegaConf.to_container(config.lora) if config.method == "lora" else None, wandb=wandb,
        )  # fmt: skip
    margins = pair_margins(model, tokenizer, held_out)
    right = [margin > 0 for margin in margins]
    bins, error = calibration(margins)
    first = sum(margin > 0 for margin in before) / len(before)
    measured = {
        "pair_accuracy": Measurement(
            sum(right) / len(right), len(right), wilson_interval(sum(right), len(right)), first
        )
    }
    by_source: dict[str, dict[str, int]] = {}
    for pair, won in zip(held_out, right, strict=True):
        counts = by_source.setdefault(pair["source"], {"right": 0, "n": 0})
        counts["right"] += won
        counts["n"] += 1
    rows = [{**pair, "margin": round(margin, 3)} for pair, margin in zip(held_out, margins, strict=True)]
    hidden = [{**row, "rejected": "[…]"} if row.get("rejected_unsafe") else row for row in rows]
    atomic_write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in hidden))
    kind = "adapter" if config.method == "lora" else "model"
    with atomic_folder(folder / kind) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder / ("model" if kind == "adapter" else "adapter"), ignore_errors=True)
    plot_calibration(bins, folder / "plots" / "calibration.png")
    plot_curves({"": log}, ["train/loss", "validation/loss"], folder / "plots" / "loss.png", y_label="nats a pair")
    extra = {"calibration": bins, "expected_calibration_error": error, "by_source": by_source, "pairs": len(pairs)}
    finish(config, folder, "reward", seed, mark, log, measured, **extra)


if __name__ == "__main__":
    stage_command(run, __doc__)()
