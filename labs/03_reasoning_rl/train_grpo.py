"""Lab 03: group-relative policy optimisation with TRL, from rewards that a program can verify.

    python train_grpo.py                                        # the profile that fits this machine
    python train_grpo.py --profile tiny grpo.trainer.max_steps=40
    python train_grpo.py --profile local grpo.data=gsm8k        # QLoRA on a 24 GB card, vLLM generates if it is installed
    python train_grpo.py grpo.trainer.learning_rate=0           # the negative control: its criteria must fail

Each step draws several answers to each of some problems, pays every answer by a program, and makes those likelier that did
better than the others of their group (DeepSeekMath, arXiv 2402.03300). `grpo_from_scratch.py` is the same in one flat loop
that can be read from top to bottom; this is what one uses.

Interrupt it when you like: the same command goes on from the last checkpoint, to the same result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cold_start import held_out
from gsm8k_data_prep import prepare, refuse_overlap
from reasoning_stage import ask, check_trainer, gain, judge, pass_at, share
from reward_functions import checked, make_reward
from rollouts import greedy_replies, sample_groups
from shared import LabsError
from shared.profiles import nearest
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
from shared.training import TrainLog, seed_everything, wandb_run
from training_monitor import Monitor, logged_names, monitor_callback, plot_panel

# What the losses and scales of TRL's trainer are called.
CHOICES = {
    "loss_type": ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
}
COLUMNS = ("prompt", "answer", "tests", "setup", "entry_point")  # what the trainer and the rewards read of a problem


def reward_functions_of(parts: Mapping[str, float]) -> tuple[list[Callable], list[float]]:
    """{"correctness": 1.0, ...} → (functions, weights), each checked: what is no reward stops the training by name.

    A weight of 0 leaves a reward out. Raises LabsError for an unknown name, and where nothing is left.
    """
    functions = {name: checked(make_reward(name)) for name in parts}
    kept = [name for name in functions if parts[name]]
    if not kept:
        raise LabsError("rewards: every weight is 0, so nothing would be rewarded; give one a weight")
    return [functions[name] for name in kept], [parts[name] for name in kept]


def to_dataset(problems: Sequence[Mapping[str, Any]]):
    """The prompts and what the rewards compare with. Raises LabsError for a problem without a gold answer or tests."""
    from datasets import Dataset

    for problem in problems:
        if not str(problem.get("answer") or "").strip() and not problem.get("tests"):
            raise LabsError(f"{problem.get('id', problem['prompt'])} has no answer to reward: mend or drop the row")
    names = [name for name in COLUMNS if any(problem.get(name) is not None for problem in problems)]
    return Dataset.from_list([{name: problem.get(name) for name in names} for problem in problems])


def fast_rollouts(prompts: Sequence, trainer) -> dict[str, list]:
    """TRL's `rollout_func`: our sampler instead of `model.generate`. Prompts come repeated, a group one after another."""
    from shared.models import stop_tokens

    tokenizer, args = trainer.processing_class, trainer.args
    size = args.num_generations if trainer.model.training else args.num_generations_eval or args.num_generations
    kept = list(prompts)[::size]
    if [row for row in kept for _ in range(size)] != list(prompts):
        kept, size = list(prompts), 1
    ids = [tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=False) for row in kept]
    drawn = sample_groups(
        trainer.model, ids, size, args.max_completion_length, temperature=args.temperature,
        eos_token_id=stop_tokens(trainer.model, tokenizer), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    completions = drawn.completions()
    log_probs = [row[: len(new)] for row, new in zip(drawn.log_probs.tolist(), completions, strict=True)]
    return {
        "prompt_ids": [row for row in ids for _ in range(size)],
        "completion_ids": completions,
        "logprobs": log_probs,
    }


def trainer_config(settings: Mapping[str, Any], folder: Path, seed: int, weights: Sequence[float]):
    """The `trl.GRPOConfig` of a profile's `trainer`."""
    from trl import GRPOConfig

    ours = {
        "eval_strategy": "no",
        "eval_on_start": False,
        "reward_weights": list(weights),
        "log_completions": False,
        "disable_tqdm": True,
    }  # the monitor draws its own bar
    return GRPOConfig(**{**trainer_defaults(folder, seed), **ours, **settings})


def reinforce(
    model, tokenizer, problems: Sequence[Mapping[str, Any]], rewards: Mapping[str, float] | Sequence[Callable],
    trainer_settings: Mapping[str, Any], *, folder: Path, seed: int = 0, lora: Mapping[str, Any] | None = None,
    validation: Sequence[Mapping[str, Any]] = (), resume: bool = True, wandb=None, fast: bool = True,
    monitor: Monitor | None = None,
):  # fmt: skip
    """Train with TRL's `GRPOTrainer`; return (the trained model, the rows of `folder`/train_log.jsonl).

    `rewards`: {name: weight} of `reward_functions`, or functions with TRL's signature, weighted equally. `fast` samples with
    `rollouts.sample_groups`; else as TRL does, with vLLM where `use_vllm` is set. Every `eval_steps` the validation
    problems are answered greedily and scored. Raises LabsError when a reward function does not give rewards.
    """
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    if isinstance(rewards, Mapping):
        functions, weights = reward_functions_of(rewards)
    else:
        functions, weights = [checked(function) for function in rewards], [1.0] * len(rewards)
    folder = Path(folder)
    checkpoints = folder / "checkpoints"
    last = newest_checkpoint(checkpoints, resume)
    log = TrainLog(folder / "train_log.jsonl", resume_from=int(last.rsplit("-", 1)[1]) if last else 0)
    settings = dict(trainer_settings)
    every = settings.pop("eval_steps", 0)
    args = trainer_config(settings, checkpoints, seed, weights)
    with warnings.catch_warnings():  # of a new parameter of TRL's, about which a reader of this run can do nothing
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=functions,
            args=args,
            processing_class=tokenizer,
            train_dataset=to_dataset(problems),
            peft_config=LoraConfig(**lora) if lora else None,
            rollout_func=fast_rollouts if fast and not args.use_vllm else None,
            callbacks=[
                log_callback(log, logged_names(function.__name__ for function in functions), wandb),
                monitor_callback(monitor or Monitor(rows=log.rows)),
            ],
        )
    trainer.remove_callback(PrinterCallback)
    if validation and every:
        trainer.add_callback(
            validation_callback(trainer, tokenizer, validation, every, args.max_completion_length, log)
        )
    trainer.train(resume_from_checkpoint=last)
    trainer.model.eval()
    return trainer.model, log.rows


def validation_callback(trainer, tokenizer, problems, every: int, max_new_tokens: int, log: TrainLog):
    """Greedy accuracy and format on `problems`, before the first step, every `every` steps and at the end."""
    from transformers import TrainerCallback

    def measure(step: int) -> None:
        prompts = [problem["prompt"] for problem in problems]
        judged = judge(greedy_replies(trainer.model, tokenizer, prompts, max_new_tokens), problems)
        log.write(
            step,
            **{
                "validation/accuracy": sum(row.flexible for row in judged) / len(judged),
                "validation/format": sum(row.formatted for row in judged) / len(judged),
            },
        )

    class ValidationCallback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                measure(0)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                measure(state.global_step)

    return ValidationCallback()


def prepare_problems(config, seed: int) -> dict[str, list[dict]]:
    """{"train", "validation", "test"}. Raises LabsError where a test question stands in train, too."""
    levels = {int(level): weight for level, weight in config.levels.items()}
    # Other problems than the cold start's: drawn with another seed.
    train = prepare(config.data, "train", config.n_train, 1000 + seed, levels)
    validation, test = held_out(config)
    refuse_overlap(train, test)
    return {"train": train, "validation": validation, "test": test}


def refuse_unknown_choices(stage: str, settings: Mapping[str, Any]) -> None:
    """Raises LabsError for what TRL's configuration takes and its trainer, some minutes later, does not."""
    for name, known in CHOICES.items():
        if name in settings and settings[name] not in known:
            raise LabsError(f"{stage}.trainer.{name}={settings[name]}: {nearest(str(settings[name]), known)}")
    if not settings.get("temperature", 1.0) > 0:
        raise LabsError(f"{stage}.trainer.temperature={settings['temperature']} must be above 0: a group must differ")


def run_stage(stage: str, train_stage: Callable, refuse: Callable, profile, seed, restart, overrides) -> dict:
    """Open the stage, check what can be checked before anything is built, and train it.

    `refuse(config)` raises LabsError for rewards, and other settings of this stage alone, that cannot be.
    """
    config, folder, mark, finished = open_stage("03", stage, profile, seed, restart, overrides)
    if finished:
        return finished
    check_trainer(stage, config.trainer, "GRPOConfig")
    refuse_unknown_choices(stage, config.trainer)
    refuse(config)
    problems = prepare_problems(config, seed)
    model, tokenizer, lora = load_policy(config, "cold_start")
    claim_folder(folder, mark, restart)
    seed_everything(seed)
    train_stage(config, folder, model, tokenizer, lora, problems, seed, mark)
    return read_metrics(folder)


def run(profile: str | None = None, seed: int = 0, restart: bool = False, overrides: list[str] | None = None) -> dict:
    """Run the stage, or find it done, and return its metrics. Raises LabsError for a mistake in the arguments."""
    refuse = lambda config: reward_functions_of(config.rewards)  # noqa: E731
    return run_stage("grpo", train_stage, refuse, profile, seed, restart, overrides)


def train_stage(config, folder: Path, model, tokenizer, lora, problems, seed: int, mark: str) -> None:
    """Measurement before, training, measurement after, and everything the stage leaves in its folder."""
    from omegaconf import OmegaConf

    test, tokens = problems["test"], config.max_new_tokens
    before = judge(ask(model, tokenizer, test, tokens), test)
    few = test[: config.n_pass]
    pass_1, pass_k = pass_at(model, tokenizer, few, config.pass_k, tokens, seed=seed)
    with wandb_run("grpo", config, folder, config.wandb) as wandb:
        model, log = reinforce(
            model, tokenizer, problems["train"], dict(config.rewards), OmegaConf.to_container(config.trainer),
            folder=folder, seed=seed, lora=lora, validation=problems["validation"], wandb=wandb,
        )  # fmt: skip
    after = judge(ask(model, tokenizer, test, tokens), test)
    after_pass_1, after_pass_k = pass_at(model, tokenizer, few, config.pass_k, tokens, seed=seed)
    lift = gain([row.flexible for row in after], [row.flexible for row in before])
    measured = {
        "accuracy_gain": lift,
        "accuracy_gain_low": Measurement(lift.ci95[0], lift.n),
        "accuracy": share([row.flexible for row in after], sum(row.flexible for row in before) / len(before)),
        "strict_format": share([row.formatted for row in after], sum(row.formatted for row in before) / len(before)),
    }
    rows = [
        {"prompt": problem["question"], "before": old.reply, "reply": new.reply, "expected": problem["answer"],
         "right": new.flexible, "right_before": old.flexible, "level": problem["level"]}
        for problem, old, new in zip(test, before, after, strict=True)
    ]  # fmt: skip
    save(model, tokenizer, folder, rows)
    plot_panel(log, folder / "plots" / "panel.png")
    words = lambda judged: sum(len(row.reply.split()) for row in judged) / len(judged)  # noqa: E731
    finish(
        config, folder, "grpo", seed, mark, log, measured,
        strict_accuracy={name: sum(row.strict for row in judged) / len(test)
                         for name, judged in (("before", before), ("after", after))},
        sampled={"n": len(few), "k": config.pass_k, "pass_at_1_before": pass_1, "pass_at_k_before": pass_k,
                 "pass_at_1": after_pass_1, "pass_at_k": after_pass_k},
        words_in_an_answer={"before": words(before), "after": words(after)},
    )  # fmt: skip


if __name__ == "__main__":
    stage_command(run, __doc__)()
