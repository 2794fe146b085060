"""What a model can do, measured: validation loss, copying, arithmetic, and the heads that do the copying."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_implementation import LanguageModel
from shared import tiny_world


@torch.no_grad()
def validation_loss(model: LanguageModel, ids: Tensor, context: int, n_windows: int | None = None) -> float:
    """Mean loss (nats a token) over non-overlapping windows of `ids` (N,): all of them, or `n_windows` evenly spread."""
    total = (len(ids) - 1) // context
    chosen = range(total) if n_windows is None else [i * total // n_windows for i in range(n_windows)]
    device = next(model.parameters()).device
    losses = []
    for first in range(0, len(chosen), 256):
        starts = [index * context for index in chosen[first : first + 256]]
        windows = torch.stack([ids[start : start + context + 1] for start in starts]).long().to(device)
        _, loss = model(windows[:, :-1], windows[:, 1:])
        losses.append((loss.item(), len(starts)))
    return sum(loss * count for loss, count in losses) / len(chosen)


@torch.no_grad()
def continuations(model: LanguageModel, tokenizer, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The likeliest continuation of each prompt. Prompts of one length run together, so that no padding is needed."""
    device = next(model.parameters()).device
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        by_length[len(ids)].append((index, ids))
    texts = [""] * len(prompts)
    for length, group in by_length.items():
        rows = torch.tensor([ids for _, ids in group], device=device)
        out = model.generate(rows, max_new_tokens, temperature=0, eos_id=tokenizer.bos_token_id)
        for (index, _), row in zip(group, out[:, length:].tolist(), strict=True):
            texts[index] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def first_number(text: str) -> str | None:
    """The digits that `text` starts with, or None."""
    digits = text.strip().split("\n")[0].split(".")[0].strip()
    return digits if digits.isdigit() else None


def copy_accuracy(
    model: LanguageModel, tokenizer, n: int, seed: int, split: str = "held_out", facts: int = 1
) -> list[bool]:
    """For `n` questions about facts just told: is the value given back right? Values and facts are from `split`.

    With two `facts` the model must bind as well as copy: each value is somebody's, and only one of them was asked about.
    """
    rng = random.Random(f"copy {seed}")
    rows = [tiny_world.lookup(rng, split, facts) for _ in range(n)]
    texts = continuations(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=4)
    return [text.split(".")[0].strip() + "." == row["answer"] for text, row in zip(texts, rows, strict=True)]


def sum_accuracy(model: LanguageModel, tokenizer, n: int, seed: int, split: str = "held_out") -> list[bool]:
    """For `n` sums and differences whose operands training never paired: is the result right?"""
    rng = random.Random(f"sum {seed}")
    rows = [tiny_world.sum_problem(rng, split) for _ in range(n)]
    texts = continuations(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=4)
    return [first_number(text) == row["answer"] for text, row in zip(texts, rows, strict=True)]


def repeated_words(tokenizer, n: int, length: int = 8, seed: int = 0) -> Tensor:
    """`n` texts "a b c … = a b c …" of `length` random words each: token ids (n, 2·length + 2), with the start token."""
    words = torch.tensor(word_ids(tokenizer))
    first = words[torch.randint(len(words), (n, length), generator=torch.Generator().manual_seed(seed))]
    (equals,) = tokenizer(" = ", add_special_tokens=False)["input_ids"]
    column = lambda token: torch.full((n, 1), token)  # noqa: E731
    return torch.cat([column(tokenizer.bos_token_id), first, column(equals), first], dim=1)


@torch.no_grad()
def induction_scores(model: LanguageModel, tokenizer, n: int = 32, length: int = 8) -> Tensor:
    """How much each head looks where copying needs it to look: (layers, heads), between 0 and 1.

    In the second half of a repeated text an induction head (Olsson et al. 2022) looks from a word to the one that
    followed it the first time; the score is the attention that it gives to that place, averaged.
    """
    maps = attention_maps(model, repeated_words(tokenizer, n, length).to(next(model.parameters()).device))
    queries = torch.arange(length + 2, 2 * length + 1)  # the second half without its last word
    return maps[..., queries, queries - length].mean(dim=(1, 3)).cpu()


@torch.no_grad()
def attention_maps(model: LanguageModel, token_ids: Tensor) -> Tensor:
    """Every head's attention for token_ids (B, T): (layers, B, heads, T, T)."""
    for block in model.layers:
        block.self_attn.keep_weights = True
    model(token_ids)
    maps = []
    for block in model.layers:
        maps.append(block.self_attn.last_weights)
        block.self_attn.keep_weights, block.self_attn.last_weights = False, None
    return torch.stack(maps)


@torch.no_grad()
def repeated_text_losses(model: LanguageModel, tokenizer, n: int = 64, length: int = 8) -> tuple[float, float]:
    """Mean loss (nats a token) on random words, and on the same words again: the second falls when copying is learned."""
    rows = repeated_words(tokenizer, n, length, seed=1).to(next(model.parameters()).device)
    logits, _ = model(rows[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none").view(n, -1)
    return losses[:, :length].mean().item(), losses[:, length + 1 :].mean().item()


def word_ids(tokenizer) -> list[int]:
    """The token of every word of the tiny world: what random sequences are drawn from."""
    words = [word for pool in tiny_world.POOLS.values() for word in pool]
    encoded = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    return [ids[0] for ids in encoded if len(ids) == 1]
