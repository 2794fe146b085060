"""Preference losses by hand: DPO, its smoothed and its safe variant, and the reward model's loss.

A lesson module: plain PyTorch, no import from `shared/`. `tests/lab02/test_preference_losses.py` holds it against TRL,
value and gradient. With log π(y|x) the log-probability of a whole answer, σ(z) = 1 / (1 + e^−z), and

    d = (log π(chosen) − log π(rejected)) − (log π_ref(chosen) − log π_ref(rejected)):

    DPO             −log σ(β d)                                    Rafailov et al. 2023, arXiv 2305.18290
    DPO, smoothed   −(1 − ε) log σ(β d) − ε log σ(−β d)            labels that are wrong with probability ε
    SafeDPO         −log σ(β d − (h_l − h_w) Δ)                    Kim et al. 2025, arXiv 2505.20065
    Bradley–Terry   −log σ(reward(chosen) − reward(rejected))      Bradley and Terry 1952

h = 1 says that an answer is unsafe: h_w the chosen one, h_l the rejected one, after the pairs have been reordered by
`safedpo_transform`. All losses take one number an answer, tensors of shape (B,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_log_probs(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each answer: the sum of log p(label_t | labels before t) where `mask` is 1.

    logits (B, T, V), labels (B, T), mask (B, T) bool or 0/1 → (B,). Labels stand where their tokens stand; the shift is
    made in here: the logits at t − 1 predict the label at t, and position 0 is never predicted. Where the mask is 0 a
    label may be anything, -100 too. Half precision is computed and returned in float32. Raises ValueError for shapes
    that do not fit.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2] or mask.shape != labels.shape:
        raise ValueError(
            f"logits (B, T, V), labels (B, T) and mask (B, T) do not fit: "
            f"{tuple(logits.shape)}, {tuple(labels.shape)}, {tuple(mask.shape)}"
        )
    ### BEGIN SOLUTION
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    mask = mask[:, 1:].bool()
    # An index that gather would refuse is replaced by one that counts for nothing.
    labels = labels[:, 1:].masked_fill(~mask, 0)
    token_log_probs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    # Not `token_log_probs * mask`: where a padding row holds -inf or nan, 0 times it is nan.
    return token_log_probs.masked_fill(~mask, 0.0).sum(-1)
    ### END SOLUTION


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r}: choose mean, sum or none")
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def _log_ratio_difference(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """d of the module's docstring, (B,): how much more than the reference the policy prefers the chosen answer."""
    shapes = {tuple(each.shape) for each in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)}
    if len(shapes) != 1:  # (B,) and (B, 1) would quietly become (B, B)
        raise ValueError(f"the four log-probabilities must have one shape, not {sorted(shapes)}")
    if not beta > 0:
        raise ValueError(f"beta={beta} must be above 0")
    ### BEGIN SOLUTION
    return (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
    ### END SOLUTION


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Direct preference optimisation from four log-probabilities of answers, (B,) each, sums over their tokens.

    `beta`: how dear it is to leave the reference. `label_smoothing` ε, 0 ≤ ε < 0.5: the share of pairs that is taken to
    be labelled the wrong way round; the loss is then least at a finite d ("conservative DPO", Mitchell 2023).
    `reduction`: "mean" or "sum" → a scalar, "none" → (B,). Raises ValueError for settings out of range.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 0.5")
    d = _log_ratio_difference(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    ### BEGIN SOLUTION
    # log σ by its own function: the logarithm of a sigmoid that has rounded to 0 would be -inf.
    losses = -(1 - label_smoothing) * F.logsigmoid(beta * d) - label_smoothing * F.logsigmoid(-beta * d)
    ### END SOLUTION
    return _reduce(losses, reduction)


# (label of the chosen answer, of the rejected one): this project's names, and those of the SafeDPO paper.
SAFETY_LABELS = (("chosen_unsafe", "rejected_unsafe"), ("h_w", "h_l"))


def _safety_labels(pair: Mapping[str, Any], number: int) -> tuple[str, str]:
    """The names under which this pair keeps its two labels, both checked."""
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in pair]
    if missing:
        raise ValueError(f"pair {number}: {' and '.join(missing)} missing")
    for names in SAFETY_LABELS:
        if all(name in pair for name in names):
            for name in names:
                if not isinstance(pair[name], int) or pair[name] not in (0, 1):  # bool is an int
                    raise ValueError(f"pair {number}: {name} is {pair[name]!r}, not 0 (safe) or 1 (unsafe)")
            return names
    raise ValueError(f"pair {number}: no safety labels; give chosen_unsafe and rejected_unsafe (or h_w and h_l)")


def safedpo_transform(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Reorder preference pairs so that safety comes first: what SafeDPO trains on.

    Each pair has "prompt", "chosen", "rejected" and two labels, 1 or True for unsafe: "chosen_unsafe" and
    "rejected_unsafe", or the paper's "h_w" and "h_l"; the result keeps the spelling and every other field.

    chosen unsafe, rejected safe → answers *and* labels change places: the safe one is now chosen;
    both unsafe → the pair is dropped: neither may be taught;
    otherwise → as it is. So no chosen answer of the result is unsafe. The rows given are not changed. Raises ValueError
    with the number of the pair, from 1, for a missing field and for a label that is not 0, 1 or a bool.
    """
    result = []
    for number, pair in enumerate(pairs, 1):
        chosen_label, rejected_label = _safety_labels(pair, number)
        ### BEGIN SOLUTION
        row = dict(pair)
        if row[chosen_label] and row[rejected_label]:
            continue
        if row[chosen_label]:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            row[chosen_label], row[rejected_label] = row[rejected_label], row[chosen_label]
        result.append(row)
        ### END SOLUTION
    return result


def safedpo_counts(pairs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many pairs `safedpo_transform` leaves as they are, swaps and drops: {"kept", "swapped", "dropped"}."""
    counts = {"kept": 0, "swapped": 0, "dropped": 0}
    for number, pair in enumerate(pairs, 1):
        chosen_label, rejected_label = _safety_labels(pair, number)
        outcome = "kept" if not pair[chosen_label] else "dropped" if pair[rejected_label] else "swapped"
        counts[outcome] += 1
    return counts


def safedpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_unsafe: Tensor,
    rejected_unsafe: Tensor,
    beta: float = 0.1,
    margin: float = 10.0,
    reduction: str = "mean",
) -> Tensor:
    """SafeDPO (arXiv 2505.20065) on pairs that `safedpo_transform` has reordered; all tensors (B,).

    Where the chosen answer is safe and the rejected one is not, β d has to exceed `margin` before the loss falls below
    log 2; pairs of two safe answers train as in DPO. The margin stands outside β: it is in units of β d. The labels are
    bool or 0/1 (1 unsafe). `margin` 0 is `dpo_loss`. Raises ValueError for settings out of range.
    """
    d = _log_ratio_difference(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    if chosen_unsafe.shape != d.shape or rejected_unsafe.shape != d.shape:
        raise ValueError(
            f"safety labels {tuple(chosen_unsafe.shape)} and {tuple(rejected_unsafe.shape)} do not fit {tuple(d.shape)}"
        )
    if not margin >= 0:
        raise ValueError(f"margin={margin} must be at least 0")
    ### BEGIN SOLUTION
    # As numbers: two tensors of bools cannot be subtracted.
    h_w, h_l = chosen_unsafe.to(d.dtype), rejected_unsafe.to(d.dtype)
    losses = -F.logsigmoid(beta * d - (h_l - h_w) * margin)
    ### END SOLUTION
    return _reduce(losses, reduction)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, reduction: str = "mean") -> Tensor:
    """The reward model's loss, −log σ(chosen − rejected), from the rewards of both answers, (B,) each."""
    if chosen.shape != rejected.shape:
        raise ValueError(f"rewards of different shapes: {tuple(chosen.shape)} and {tuple(rejected.shape)}")
    ### BEGIN SOLUTION
    losses = -F.logsigmoid(chosen - rejected)
    ### END SOLUTION
    return _reduce(losses, reduction)
