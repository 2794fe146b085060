"""Lab 03, the cold start: a few worked answers show the model the form in which it is to think.

    python cold_start.py                                       # the profile that fits this machine
    python cold_start.py --profile tiny cold_start.n_traces=300
    python cold_start.py cold_start.trainer.learning_rate=0    # the negative control: its criteria must fail
    python cold_start.py cold_start.data=mine.jsonl            # your own questions and solutions

Supervised fine-tuning as in lab 01, on conversations whose answers are `<think>steps</think> number`. Few of them on purpose:
enough that a sampled answer is now and then right, so that reinforcement learning has something to reward, and not so many
that nothing is left to learn. How many is chosen on validation problems, never on those of the test.

Interrupt it when you like: the same command goes on from the last checkpoint, to the same result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gsm8k_data_prep import prepare, refuse_overlap
from reasoning_rows import to_trace
from reasoning_stage import ask, check_trainer, continuations, few_shot_prompt, judge, pass_at, share
from shared import LabsError
from shared.profiles import ensure_stage
from shared.report import Measurement, read_metrics
from shared.stages import (
    claim_folder,
    finish,
    load_policy,
    log_callback,
    newest_checkpoint,
    open_stage,
    save,
    stage_command,
    trainer_defaults,
)
from shared.training import TrainLog, plot_curves, seed_everything, wandb_run

LOGGED = {"loss": "train/loss", "eval_loss": "validation/loss", "grad_norm": "train/grad_norm"}


def to_dataset(problems: Sequence[Mapping[str, Any]]):
    """Problems as TRL's conversational rows {"prompt", "completion"}: the loss counts the completion alone."""
    from datasets import Dataset

    answers = [[{"role": "assistant", "content": to_trace(problem)}] for problem in problems]
    rows = zip(problems, answers, strict=True)
    return Dataset.from_list([{"prompt": problem["prompt"], "completion": answer} for problem, answer in rows])


def imitate(
    model, tokenizer, problems, validation, trainer_settings: Mapping[str, Any], *, folder: Path, seed: int = 0,
    lora: Mapping[str, Any] | None = None, resume: bool = True, wandb=None,
):  # fmt: skip
    """Fine-tune on the problems' traces with TRL's `SFTTrainer`; return (the model, the rows of `folder`/train_log.jsonl)."""
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    folder = Path(folder)
    checkpoints = folder / "checkpoints"
    last = newest_checkpoint(checkpoints, resume)
    log = TrainLog(folder / "train_log.jsonl", resume_from=int(last.rsplit("-", 1)[1]) if last else 0)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**trainer_defaults(checkpoints, seed), **trainer_settings}),
        processing_class=tokenizer,
        train_dataset=to_dataset(problems),
        eval_dataset=to_dataset(validation),
        peft_config=LoraConfig(**lora) if lora else None,
        callbacks=[log_callback(log, LOGGED, wandb)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last)
    trainer.model.eval()
    return trainer.model, log.rows


def problems_of(config, seed: int) -> dict[str, list[dict]]:
    """{"train", "validation", "test"}: what to imitate, what settings are chosen on, and what counts.

    Of the tiny world validation and test both have held-out people, things and sums, and differ from one another. Raises
    LabsError where a question of one part stands in another, too, and for rows without worked steps.
    """
    levels = {int(level): weight for level, weight in config.levels.items()}
    train = prepare(config.data, "train", config.n_traces, seed, levels)[: config.n_traces]
    bare = [problem["id"] for problem in train if not problem["solution"]]
    if bare:
        raise LabsError(f"{bare[0]} has no worked steps to imitate: cold_start.data needs solutions (… #### 42)")
    validation, test = held_out(config)
    refuse_overlap(train, [*test, *validation])
    return {"train": train, "validation": validation, "test": test}


def held_out(config) -> tuple[list[dict], list[dict]]:
    """(validation, test) problems: the same for every seed and every stage, so that results can be paired.

    Raises LabsError for a size below 1 and for a set with too few problems.
    """
    for name in ("n_test", "n_validation", "n_pass", "pass_k"):
        if config.get(name, 1) < 1:
            raise LabsError(f"{name}={config[name]} must be at least 1")
    levels = {int(level): weight for level, weight in config.levels.items()}
    drawn = prepare(config.test_data, "test", config.n_test + config.n_validation, 0, levels)
    if len(drawn) < config.n_test + 1:
        raise LabsError(f"{config.test_data} has {len(drawn)} test problems: lower n_test={config.n_test}")
    return drawn[config.n_test :], drawn[: config.n_test]


def run(profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None) -> dict:
    """Run the stage, or find it done, and return its metrics. Raises LabsError for a mistake in the arguments."""
    config, folder, mark, finished = open_stage("03", "cold_start", profile, seed, restart, overrides)
    if finished:
        return finished
    check_trainer("cold_start", config.trainer, "SFTConfig")
    problems = problems_of(config, seed)
    model, tokenizer, lora = load_policy(config, "midtrain")
    claim_folder(folder, mark, restart)
    train_stage(config, folder, model, tokenizer, lora, problems, seed, mark)
    return read_metrics(folder)


def prompted(model, tokenizer, problems, examples, max_new_tokens: int) -> list[bool]:
    """Which problems the model solves as it is, shown worked examples: flexible scoring."""
    prompts = [few_shot_prompt(problem, examples) for problem in problems]
    return [row.flexible for row in judge(continuations(model, tokenizer, prompts, max_new_tokens), problems)]


def baselines(config, model, tokenizer, problems) -> dict[str, Any]:
    """Flexible accuracy of the few-shot prompted lab 00 base (where there is one) and of the model read on."""
    from shared.models import load_model

    examples = problems["train"][: config.shots]
    found = {"prompted_midtrained": prompted(model, tokenizer, problems["test"], examples, config.max_new_tokens)}
    base = ensure_stage("base", config.profile)
    if base is not None:
        found["prompted_base"] = prompted(
            *load_model(base / "model"), problems["test"], examples, config.max_new_tokens
        )
    return found


def train_stage(config, folder: Path, model, tokenizer, lora, problems, seed: int, mark: str) -> None:
    """Baselines, training, measurement, and everything the stage leaves in its folder."""
    from omegaconf import OmegaConf

    seed_everything(seed)
    test = problems["test"]
    before = baselines(config, model, tokenizer, problems)
    trainer = OmegaConf.to_container(config.trainer)
    with wandb_run("cold_start", config, folder, config.wandb) as wandb:
        model, log = imitate(
            model, tokenizer, problems["train"], problems["validation"], trainer,
            folder=folder, seed=seed, lora=lora, wandb=wandb,
        )  # fmt: skip
    judged = judge(ask(model, tokenizer, test, config.max_new_tokens), test)
    few = test[: config.n_pass]
    pass_1, pass_k = pass_at(model, tokenizer, few, config.pass_k, config.max_new_tokens, seed=seed)
    flexible = [row.flexible for row in judged]
    prompted_base = before.get("prompted_base", before["prompted_midtrained"])
    measured = {
        "accuracy": share(flexible, sum(prompted_base) / len(prompted_base)),
        "strict_format": share([row.formatted for row in judged]),
        "pass_at_k": Measurement(pass_k, len(few), None, pass_1),
    }
    rows = [
        {"prompt": problem["question"], "reply": row.reply, "expected": problem["answer"], "right": row.flexible}
        for problem, row in zip(test, judged, strict=True)
    ]
    save(model, tokenizer, folder, rows)
    columns = ["train/loss", "validation/loss"]
    plot_curves({"cold start": log}, columns, folder / "plots" / "loss.png", y_label="nats a token")
    shares = {name: {"share": sum(right) / len(right), "n": len(right)} for name, right in before.items()}
    finish(config, folder, "cold_start", seed, mark, log, measured, **shares,
           strict_accuracy=sum(row.strict for row in judged) / len(judged), pass_at_1=pass_1)  # fmt: skip


if __name__ == "__main__":
    stage_command(run, __doc__)()
