"""Lab 04: teach the model to call functions exactly, and only when a call is right.

    python train_tool_use.py                                        # the profile that fits this machine
    python train_tool_use.py --profile tiny tools.method=lora       # an adapter instead of all weights
    python train_tool_use.py --profile local --seed 1               # QLoRA on a 24 GB card
    python train_tool_use.py tools.trainer.learning_rate=0          # the negative control: its criteria must fail
    python train_tool_use.py tools.data=my_calls.jsonl              # your own records, in BFCL's form or as messages

Interrupt it when you like: the same command goes on from the last checkpoint, to the same result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from function_calls import CheckResult
from shared import LabsError
from shared.report import read_metrics
from shared.stages import claim_folder, finish, load_policy, open_stage, save, stage_command
from shared.training import plot_curves, quiet_when_unwatched, seed_everything, wandb_run
from tool_data import TEST_PARTS, test_rows, training_rows
from tool_sources import berkeley_rows, read_rows, refuse_overlap
from tool_stage import ask, check_trainer, finetune, judge, lessons, mistakes, share, tokenized


def rows_of(config, seed: int) -> dict[str, list[dict]]:
    """{"train", "validation", and a list for each part of the test}: what is learnt, watched and judged on.

    A test of other data than the tiny world's has the parts "values" and "irrelevance", rows with calls and rows without.
    Raises LabsError for a size below 1, a source that cannot be read, and a request that stands in training and test.
    """
    for name in ("n_train", "n_validation", "n_test", "n_berkeley"):
        if config[name] < 1:
            raise LabsError(f"tools.{name}={config[name]} must be at least 1")
    if config.data == "tiny_world":
        rows = training_rows(config.n_train + config.n_validation, seed)
    else:
        rows = read_rows(config.data, config.n_train + config.n_validation, seed)
    if len(rows) < 5:
        raise LabsError(
            f"tools.data={config.data} has {len(rows)} rows: at least 5 are needed, to learn from and to watch"
        )
    validation = min(config.n_validation, len(rows) // 5)
    parts = {"train": rows[validation:], "validation": rows[:validation]}
    if config.test_data == "tiny_world":
        parts |= {part: test_rows(config.n_test, part) for part in TEST_PARTS}
    else:
        tests = read_rows(config.test_data, config.n_test, 0)
        parts |= {
            "values": [row for row in tests if row["accepted"]],
            "irrelevance": [row for row in tests if not row["accepted"]],
        }
        if not parts["values"]:
            raise LabsError(f"tools.test_data={config.test_data} has no row with a call to judge: take another source")
    refuse_overlap(parts["train"], [row for part in TEST_PARTS for row in parts.get(part, [])])
    return parts


def run(profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None) -> dict:
    """Run the stage, or find it done, and return its metrics. Raises LabsError for a mistake in the arguments."""
    config, folder, mark, finished = open_stage("04", "tools", profile, seed, restart, overrides)
    if finished:
        return finished
    quiet_when_unwatched()
    check_trainer("tools", config.trainer)
    rows = rows_of(config, seed)
    model, tokenizer, lora = load_policy(config)
    tokenized(rows["validation"], tokenizer, config.trainer.max_length)  # complains before anything is written
    claim_folder(folder, mark, restart)
    train_stage(config, folder, model, tokenizer, lora, rows, seed, mark)
    return read_metrics(folder)


def judged(
    model, tokenizer, rows: Mapping[str, Sequence[Mapping]], max_new_tokens: int
) -> dict[str, list[CheckResult]]:
    """The verdicts on every part of the test that there is, by part."""
    parts = [part for part in TEST_PARTS if rows.get(part)]
    return {part: judge(ask(model, tokenizer, rows[part], max_new_tokens), rows[part]) for part in parts}


def on_the_leaderboard(model, tokenizer, config) -> dict[str, dict[str, int]]:
    """By set of the Berkeley leaderboard, where LABS_DATA_DIR has it: how many records are right, read at all, and asked.

    What is longer than the model can read counts as wrong without being asked.
    """
    from shared.models import chat_prompt

    room = model.config.max_position_embeddings - config.max_new_tokens
    found = {}
    for name, rows in berkeley_rows(config.n_berkeley).items():
        prompts = [chat_prompt(tokenizer, row["messages"][:-1], row["tools"]) for row in rows]
        lengths = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
        short = [row for row, length in zip(rows, lengths, strict=True) if length <= room]
        results = judge(ask(model, tokenizer, short, config.max_new_tokens), short)
        found[name] = {"right": sum(result.ok for result in results), "read": len(short), "n": len(rows)}
    return found


def train_stage(config, folder: Path, model, tokenizer, lora, rows, seed: int, mark: str) -> None:
    """Baseline, training, measurement, and everything the stage leaves in its folder."""
    from omegaconf import OmegaConf

    seed_everything(seed)
    before = judged(model, tokenizer, rows, config.max_new_tokens)
    length = config.trainer.max_length
    examples = lessons(rows["train"], tokenizer, config, seed)
    trainer = OmegaConf.to_container(config.trainer)
    print(f"{len(examples)} training rows, {len(rows['validation'])} validation rows")
    with wandb_run("tools", config, folder, config.wandb) as wandb:
        model, log = finetune(
            model, tokenizer, examples, tokenized(rows["validation"], tokenizer, length), trainer,
            folder=folder, seed=seed, lora=lora, muon_learning_rate=config.muon_learning_rate,
            value_noise=config.value_noise, wandb=wandb,
        )  # fmt: skip
    replies = {part: ask(model, tokenizer, rows[part], config.max_new_tokens) for part in before}
    after = {part: judge(replies[part], rows[part]) for part in before}
    measured = {
        f"exact_{part}" if part in ("values", "phrasings") else part: share(after[part], before[part]) for part in after
    }
    measured["exact_before"] = share(before["values"])
    samples = [
        {"prompt": row["messages"][-2]["content"], "reply": reply, "expected": row["accepted"], "result": result.reason}
        for part in after
        for row, reply, result in zip(rows[part], replies[part], after[part], strict=True)
    ]
    save(model, tokenizer, folder, samples)
    plot_curves(
        {"tools": log}, ["train/loss", "validation/loss"], folder / "plots" / "loss.png", y_label="nats a token"
    )
    finish(
        config, folder, "tools", seed, mark, log,
        {name: measured[name] for name in config.criteria if name in measured},
        method=config.method,
        new_tool={"share": measured["tool"].value, "ci95": measured["tool"].ci95, "n": measured["tool"].n}
        if "tool" in measured
        else None,
        berkeley=on_the_leaderboard(model, tokenizer, config),
        mistakes={part: {"before": mistakes(before[part]), "after": mistakes(after[part])} for part in after},
    )  # fmt: skip


if __name__ == "__main__":
    stage_command(run, __doc__)()
