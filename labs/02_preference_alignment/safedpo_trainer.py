"""TRL's trainer with SafeDPO's margin. In a module of its own, because a class needs TRL as soon as it is defined."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from trl import DPOTrainer

from preference_data_creation import SAFETY_LABELS


class SafeDPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with SafeDPO's margin: −log σ(β·d − (h_l − h_w)·Δ).

    β·d − (h_l − h_w)·Δ is β·(d − (h_l − h_w)·Δ/β): a margin is the same as a reference that finds the chosen answer likelier
    by (h_l − h_w)·Δ/β. So the margin is added to the precomputed reference, and everything else is TRL's. The implicit rewards
    in the log have the margin taken off. The data set needs the columns chosen_unsafe and rejected_unsafe (0 or 1).
    """

    def __init__(self, *args, margin: float = 10.0, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.precompute_ref_logps:
            raise ValueError("SafeDPOTrainer needs precompute_ref_log_probs=True")
        self.margin = margin
        self.data_collator = partial(_collate_with_gap, self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *SAFETY_LABELS]))

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        gap = inputs.pop("safety_gap")
        inputs["ref_chosen_logps"] = inputs["ref_chosen_logps"] + gap * self.margin / self.beta
        return super()._compute_loss(model, inputs, return_outputs)


def _collate_with_gap(collate, examples: list[dict]) -> dict[str, Any]:
    batch = collate(examples)
    gaps = [example["rejected_unsafe"] - example["chosen_unsafe"] for example in examples]
    batch["safety_gap"] = torch.tensor(gaps, dtype=torch.float32)
    return batch
