"""What lab 04's stages have in common: rows to train on and to be judged on, training, and judging replies."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from function_calls import CheckResult, check_calls, parse_calls
from muon_optimizer import MuonWithAdamW
from shared import LabsError, tiny_world
from shared.report import Measurement
from shared.stages import log_callback, newest_checkpoint, trainer_defaults
from shared.training import TrainLog
from tool_data import drill_rows, encode
from tool_world import DOMAINS

LOGGED = {
    "loss": "train/loss",
    "eval_loss": "validation/loss",
    "mean_token_accuracy": "train/token_accuracy",
    "eval_mean_token_accuracy": "validation/token_accuracy",
    "grad_norm": "train/grad_norm",
}


def replayed(n: int, tokenizer, length: int = 128, seed: int | str = 0) -> list[dict[str, list[int]]]:
    """`n` rows of up to `length` tokens of lab 00's copying: `a b c = a b c`, of which the copies are to be learnt.

    Whoever trains on calls alone forgets the words that no call mentions: asked about somebody whose name it has not met in
    training, the model names somebody else. A little of what it learnt first, read again, prevents that. Three in ten
    write the copy as a list of JSON, as calls do: there, too, any word may come first.
    """
    rng = random.Random(f"replayed {seed}")
    rows = []
    for _ in range(n):
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            text = tiny_world.copy_text(rng)
            said = text.partition(" = ")[0]
            if rng.random() < 0.3:
                text = f"{said} = {json.dumps(said.split())}"
            whole, first = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, said))
            ids += [tokenizer.bos_token_id, *whole]
            labels += [-100] * (len(first) + 2) + whole[len(first) + 1 :]  # the mark of the beginning, and "="
        rows.append({"input_ids": ids[:length], "labels": labels[:length]})
    return rows


def tokenized(rows: Sequence[Mapping[str, Any]], tokenizer, max_length: int) -> list[dict[str, list[int]]]:
    """input_ids and labels of each row: -100 wherever the assistant does not speak. Rows that are too long are left out.

    Raises LabsError where nothing is left.
    """
    examples = []
    for row in rows:
        ids, mask = encode(row, tokenizer)
        if len(ids) <= max_length:
            labels = [token if counts else -100 for token, counts in zip(ids, mask, strict=True)]
            examples.append({"input_ids": ids, "labels": labels})
    if not examples:
        raise LabsError(f"every row is longer than trainer.max_length={max_length} tokens: raise it")
    return examples


def _in_batches(
    examples: Sequence[Mapping[str, list[int]]], size: int, rng: random.Random
) -> list[Mapping[str, list[int]]]:
    """The examples in random order, but neighbours of like length, so that a batch of `size` has little to pad.

    What does not fill a batch is left out, unless nothing else is there.
    """
    examples = rng.sample(list(examples), len(examples))
    batches = []
    for start in range(0, len(examples), 50 * size):
        group = sorted(examples[start : start + 50 * size], key=lambda example: len(example["input_ids"]))
        batches += [group[first : first + size] for first in range(0, len(group), size)]
    whole = [batch for batch in batches if len(batch) == size] or batches
    rng.shuffle(whole)
    return [example for batch in whole for example in batch]


def lessons(
    rows: Sequence[Mapping], tokenizer, config, seed: int, domains: Sequence[str] = DOMAINS
) -> list[dict[str, list[int]]]:
    """All that is learnt from, tokenized, in the order in which it is: for a trainer that reads it one after the other.

    For the share `config.drill` of the steps short requests, most without a list of tools, then `rows`: from easy to hard, a
    curriculum (Bengio et al. 2009). Among both is the share `config.replay` of lab 00's copying. Where other data than the
    tiny world's is learnt, there is no such drill.
    """
    trainer = config.trainer
    size = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    n_drill = round(config.drill * trainer.max_steps) * size if config.get("data", "tiny_world") == "tiny_world" else 0
    rng = random.Random(f"order {seed}")
    ordered = []
    for part, most in ((drill_rows(n_drill, seed, domains) if n_drill > 0 else [], n_drill), (rows, None)):
        if part:
            examples = tokenized(part, tokenizer, trainer.max_length)
            examples += replayed(round(config.replay * len(examples)), tokenizer, seed=f"{seed} {len(ordered)}")
            ordered += _in_batches(examples, size, rng)[:most]
    return ordered


@contextmanager
def noisy_values(model, tokenizer, scale: float):
    """While training, noise on embeddings of words and digits that can be values, `scale` times the root mean square of all.

    A value is to be copied, whatever it is; a model that cannot be quite sure of it learns that, and not a list of thirty
    names. All other words, by which a request is understood, stay as they are. (NEFTune, arXiv 2310.05914, does it to all.)
    """
    import torch

    embedding = model.get_input_embeddings()
    size = scale * embedding.weight.detach().float().pow(2).mean().sqrt().item()
    noisy = torch.zeros(embedding.num_embeddings, 1, device=embedding.weight.device)
    for word in (*tiny_world.KNOWN_VALUES, *map(str, range(tiny_world.LARGEST + 1))):
        for text in (word, f" {word}", f'"{word}'):  # at the beginning, after a space, in quotes
            last = tokenizer(text, add_special_tokens=False)["input_ids"][-1]
            if tokenizer.decode([last]).strip() == word:
                noisy[last] = size

    def add_noise(module, inputs, output):
        return output + torch.randn_like(output) * noisy[inputs[0]] if module.training else output

    hook = embedding.register_forward_hook(add_noise) if scale else None
    try:
        yield
    finally:
        if hook:
            hook.remove()


def finetune(
    model, tokenizer, examples: Sequence[Mapping], validation: Sequence[Mapping], trainer_settings: Mapping[str, Any], *,
    folder: Path, seed: int = 0, lora: Mapping[str, Any] | None = None, muon_learning_rate: float = 0.0,
    value_noise: float = 0.0, resume: bool = True, wandb=None,
):  # fmt: skip
    """Train with TRL's `SFTTrainer` on `tokenized` rows; return (the model, the rows of `folder`/train_log.jsonl).

    With a `muon_learning_rate`, and where all weights are trained, the matrices inside the blocks learn by Muon; `value_noise`
    is for `noisy_values`. Goes on from the last checkpoint in `folder`, to the same result. Raises LabsError for settings that
    the trainer does not take.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    folder = Path(folder)
    checkpoints = folder / "checkpoints"
    last = newest_checkpoint(checkpoints, resume)
    done = int(last.rsplit("-", 1)[1]) if last else 0
    log = TrainLog(folder / "train_log.jsonl", resume_from=done)
    # A run that goes on from a checkpoint has that step's validation loss in its log already.
    args = SFTConfig(**{**trainer_defaults(checkpoints, seed), "eval_on_start": last is None, **trainer_settings})
    optimizer = None
    # A learning rate of 0 is 0 for all of the model: it is the negative control.
    if muon_learning_rate and args.learning_rate and lora is None and not hasattr(model, "peft_config"):
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = MuonWithAdamW(model, args.learning_rate, muon_learning_rate, betas=betas)
    try:
        trainer = SFTTrainer(
            model=model,
            args=args,
            optimizers=(optimizer, None),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(list(examples)),
            eval_dataset=Dataset.from_list(list(validation)),
            peft_config=LoraConfig(**lora) if lora else None,
            callbacks=[log_callback(log, LOGGED, wandb)],
        )
    except (ValueError, TypeError) as error:  # a field of the adapter, or settings that do not go together
        raise LabsError(f"the trainer does not take these settings: {str(error).splitlines()[0]}") from error
    trainer.remove_callback(PrinterCallback)  # the log file and the plot show the same numbers, readably
    if done and done == args.max_steps:  # all trained, then stopped: train() would take one step more
        trainer._load_from_checkpoint(last)
    else:
        with noisy_values(model, tokenizer, value_noise):
            trainer.train(resume_from_checkpoint=last)
    trainer.model.eval()
    return trainer.model, log.rows


def ask(model, tokenizer, rows: Sequence[Mapping[str, Any]], max_new_tokens: int = 96) -> list[str]:
    """The model's greedy reply to each row: to all of its messages but the last."""
    from shared.models import generate_replies

    conversations = [row["messages"][:-1] for row in rows]
    tools = [row["tools"] for row in rows]
    return generate_replies(model, tokenizer, conversations, max_new_tokens=max_new_tokens, tools=tools)


def judge(replies: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Each reply against its row: calls by the leaderboard's rules, told results word by word."""
    results = []
    for reply, row in zip(replies, rows, strict=True):
        calls = parse_calls(reply)
        if row["kind"] == "answer" and not calls:
            right = reply.strip() == row["messages"][-1]["content"]
            results.append(CheckResult(right, "ok" if right else "wrong_answer", "the result told" if right else reply))
        else:
            results.append(check_calls(calls, row["accepted"], row["tools"]))
    return results


def share(results: Sequence[CheckResult], baseline: Sequence[CheckResult] | None = None) -> Measurement:
    """The share that is right, with its Wilson interval, and that of the baseline."""
    from shared.significance import wilson_interval

    n, right = len(results), sum(result.ok for result in results)
    before = sum(result.ok for result in baseline) / len(baseline) if baseline else None
    return Measurement(right / n, n, wilson_interval(right, n), before)


def mistakes(results: Sequence[CheckResult]) -> dict[str, int]:
    """How often each kind of mistake was made, the most frequent first."""
    return dict(Counter(result.kind for result in results if not result.ok).most_common())


def check_trainer(stage: str, settings) -> None:
    """Raises LabsError for settings of `stage`.trainer that TRL does not take, before anything is written."""
    from omegaconf import OmegaConf
    from trl import SFTConfig

    try:
        SFTConfig(**{"output_dir": "checkpoints", "use_cpu": True, "bf16": False, **OmegaConf.to_container(settings)})
    except (ValueError, TypeError) as error:
        raise LabsError(f"{stage}.trainer: {str(error).splitlines()[0]}") from None
