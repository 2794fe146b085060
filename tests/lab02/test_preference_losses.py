"""Preference losses by hand against TRL's trainers, in float64: loss and parameter gradients; wrong variants are caught."""

import math

import pytest
import torch
import torch.nn.functional as F

import preference_losses as lesson
from preference_losses import (
    bradley_terry_loss,
    dpo_loss,
    safedpo_counts,
    safedpo_loss,
    safedpo_transform,
    sequence_log_probs,
)

WORDS = [f"w{number}" for number in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def ragged_pairs(n, seed):
    """Texts of 1 to 9 words: prompt, chosen, rejected."""
    generator = torch.Generator().manual_seed(seed)

    def text():
        length = int(torch.randint(1, 10, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))

    return [{"prompt": text(), "chosen": " " + text(), "rejected": " " + text()} for _ in range(n)]


def llama(seed, kind="LlamaForCausalLM", **settings):
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(WORDS) + 2, pad_token_id=0, **sizes, **settings)
    model = getattr(transformers, kind)(config).double()
    with torch.no_grad():
        for parameter in model.parameters():  # so large that the log-ratios are not all near 0
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def arguments(tmp_path):
    return {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "disable_tqdm": True, "per_device_train_batch_size": 8,
    }  # fmt: skip


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)


def same(ours, theirs, model, rtol=1e-9):
    """Loss and every parameter's gradient."""
    pairs = zip(gradients(ours, model), gradients(theirs, model), strict=True)
    close = all(a is b is None or torch.allclose(a, b, rtol=rtol, atol=rtol / 100) for a, b in pairs)
    return close and torch.allclose(ours, theirs, rtol=rtol / 10, atol=0)


class DPO:
    """TRL's trainer on a random policy and reference, its own collator's batch, and its own loss."""

    def __init__(self, tokenizer, tmp_path, n=6, seed=0, beta=0.3, loss_type="sigmoid", label_smoothing=0.0):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        self.policy, self.reference, self.beta = llama(seed), llama(seed + 100), beta
        settings = {"beta": beta, "loss_type": [loss_type], "label_smoothing": label_smoothing}
        self.trainer = DPOTrainer(
            self.policy,
            self.reference,
            args=DPOConfig(**arguments(tmp_path), **settings),
            train_dataset=Dataset.from_list(ragged_pairs(n, seed)),
            processing_class=tokenizer,
        )
        self.batch = self.trainer.data_collator([self.trainer.train_dataset[i] for i in range(n)])
        self.batch = {key: value for key, value in self.batch.items() if key != "prompt"}

    def swapped(self):
        """The batch with chosen and rejected exchanged."""
        return {key: torch.cat(value.chunk(2)[::-1]) for key, value in self.batch.items()}

    def theirs(self, batch=None):
        return self.trainer.compute_loss(self.policy, dict(batch or self.batch))

    def log_probs(self, log_probs=sequence_log_probs):
        """policy chosen, policy rejected, reference chosen, reference rejected."""
        ids, mask = self.batch["input_ids"], self.batch["completion_mask"]
        labels = ids.masked_fill(mask == 0, -100)
        inputs = {"input_ids": ids, "attention_mask": self.batch["attention_mask"]}
        policy = log_probs(self.policy(**inputs).logits, labels, mask)
        with torch.no_grad():
            reference = log_probs(self.reference(**inputs).logits, labels, mask)
        return *policy.chunk(2), *reference.chunk(2)


@pytest.mark.parametrize("seed, n, beta", [(0, 6, 0.3), (1, 1, 0.1), (2, 5, 1.5)])
def test_dpo_equals_trl(tokenizer, tmp_path, seed, n, beta):
    dpo = DPO(tokenizer, tmp_path, n=n, seed=seed, beta=beta)
    widths = dpo.batch["completion_mask"].sum(1)
    assert n == 1 or len(set(widths.tolist())) > 2  # ragged indeed
    assert same(dpo_loss(*dpo.log_probs(), beta=beta), dpo.theirs(), dpo.policy)


def mask_one_late(logits, labels, mask):
    return sequence_log_probs(logits, labels, mask & mask.roll(1, 1))  # the first token of each answer is lost


def mask_one_early(logits, labels, mask):
    padded = labels.masked_fill(labels == -100, 3)
    return sequence_log_probs(logits, padded, mask | mask.roll(-1, 1))  # the prompt's last token counts too


def unshifted(logits, labels, mask):
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * mask).sum(-1)


def mean_of_tokens(logits, labels, mask):
    return sequence_log_probs(logits, labels, mask) / mask.sum(-1)


def everything(logits, labels, mask):
    return sequence_log_probs(logits, labels.clamp(min=0), torch.ones_like(mask))


def not_normalised(logits, labels, mask):
    chosen = logits[:, :-1].gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return (chosen * mask[:, 1:]).sum(-1)


@pytest.mark.parametrize(
    "wrong", [mask_one_late, mask_one_early, unshifted, mean_of_tokens, everything, not_normalised]
)
def test_wrong_log_probs_are_caught(tokenizer, tmp_path, wrong):
    dpo = DPO(tokenizer, tmp_path)
    assert not same(dpo_loss(*dpo.log_probs(wrong), beta=dpo.beta), dpo.theirs(), dpo.policy)


WRONG_DPO = {
    "beta on the reference only": lambda pc, pr, rc, rr, b: -F.logsigmoid((pc - pr) - b * (rc - rr)).mean(),
    "beta on the policy only": lambda pc, pr, rc, rr, b: -F.logsigmoid(b * (pc - pr) - (rc - rr)).mean(),
    "no reference": lambda pc, pr, rc, rr, b: -F.logsigmoid(b * (pc - pr)).mean(),
    "no beta": lambda pc, pr, rc, rr, b: -F.logsigmoid((pc - pr) - (rc - rr)).mean(),
    "sides exchanged": lambda pc, pr, rc, rr, b: dpo_loss(pr, pc, rr, rc, b),
    "reference added": lambda pc, pr, rc, rr, b: -F.logsigmoid(b * ((pc - pr) + (rc - rr))).mean(),
    "sum": lambda pc, pr, rc, rr, b: dpo_loss(pc, pr, rc, rr, b, reduction="sum"),
    "hinge": lambda pc, pr, rc, rr, b: torch.relu(1 - b * ((pc - pr) - (rc - rr))).mean(),
}


@pytest.mark.parametrize("wrong", WRONG_DPO.values(), ids=WRONG_DPO)
def test_wrong_dpo_losses_are_caught(tokenizer, tmp_path, wrong):
    dpo = DPO(tokenizer, tmp_path)
    assert not same(wrong(*dpo.log_probs(), dpo.beta), dpo.theirs(), dpo.policy)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing_equals_trl_three_ways(tokenizer, tmp_path, smoothing):
    """TRL 1.14's "sigmoid" ignores `label_smoothing`. What it computes with it is held against ours all the same."""
    # A pair labelled the wrong way round with probability ε: the mixture of the plain loss on both batches.
    plain = DPO(tokenizer, tmp_path, label_smoothing=smoothing)
    log_probs = plain.log_probs()
    ours = dpo_loss(*log_probs, beta=plain.beta, label_smoothing=smoothing)
    mixture = (1 - smoothing) * plain.theirs() + smoothing * plain.theirs(plain.swapped())
    # The library's RMSNorm rounds to float32, and another order of the rows rounds differently.
    assert same(ours, mixture, plain.policy, rtol=1e-4)
    assert smoothing == 0 or not same(dpo_loss(*log_probs, beta=plain.beta), mixture, plain.policy, rtol=1e-4)
    # "robust" subtracts the flipped term and rescales: (clean − flipped) / (1 − 2ε), with cDPO = clean + flipped.
    robust = DPO(tokenizer, tmp_path, label_smoothing=smoothing, loss_type="robust")
    pc, pr, rc, rr = robust.log_probs()
    d = robust.beta * ((pc - pr) - (rc - rr))
    clean_minus_flipped = (-(1 - smoothing) * F.logsigmoid(d) + smoothing * F.logsigmoid(-d)).mean()
    assert same(clean_minus_flipped / (1 - 2 * smoothing), robust.theirs(), robust.policy)
    # On a single pair TRL's "aot" has nothing to sort and is the smoothed loss itself.
    single = DPO(tokenizer, tmp_path, n=1, label_smoothing=smoothing, loss_type="aot")
    ours = dpo_loss(*single.log_probs(), beta=single.beta, label_smoothing=smoothing)
    assert same(ours, single.theirs(), single.policy)


def test_a_wrong_sign_of_the_smoothing_is_caught(tokenizer, tmp_path):
    single = DPO(tokenizer, tmp_path, n=1, label_smoothing=0.2, loss_type="aot")
    pc, pr, rc, rr = single.log_probs()
    d = single.beta * ((pc - pr) - (rc - rr))
    for wrong in (
        -0.8 * F.logsigmoid(d) + 0.2 * F.logsigmoid(-d),
        -0.2 * F.logsigmoid(d) - 0.8 * F.logsigmoid(-d),
        -F.logsigmoid(d) - 0.2 * F.logsigmoid(-d),
        (-0.8 * F.logsigmoid(d) + 0.2 * F.logsigmoid(-d)) / 0.6,  # the "robust" loss
    ):
        assert not same(wrong.mean(), single.theirs(), single.policy)


class Reward:
    """TRL's reward trainer on a random model, and both rewards of its batch."""

    def __init__(self, tokenizer, tmp_path, n=6):
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer

        self.model = llama(0, "LlamaForSequenceClassification", num_labels=1)
        rows = [{"chosen": each["chosen"], "rejected": each["rejected"]} for each in ragged_pairs(n, 7)]
        self.trainer = RewardTrainer(
            self.model,
            args=RewardConfig(**arguments(tmp_path)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        self.batch = self.trainer.data_collator([self.trainer.train_dataset[i] for i in range(n)])

    def theirs(self):
        return self.trainer.compute_loss(self.model, dict(self.batch))

    def rewards(self):
        return self.model(**self.batch).logits.squeeze(-1).chunk(2)


def test_bradley_terry_equals_trl_and_wrong_variants_do_not(tokenizer, tmp_path):
    reward = Reward(tokenizer, tmp_path)
    chosen, rejected = reward.rewards()
    assert same(bradley_terry_loss(chosen, rejected), reward.theirs(), reward.model)
    for wrong in (
        bradley_terry_loss(rejected, chosen),
        bradley_terry_loss(chosen, rejected, "sum"),
        torch.relu(1 - (chosen - rejected)).mean(),
        -F.logsigmoid(chosen - rejected - 1).mean(),
        -(chosen - rejected).mean(),
    ):
        assert not same(wrong, reward.theirs(), reward.model)


# Log-probabilities of answers


def random_batch(seed=0, shape=(5, 8, 11)):
    torch.manual_seed(seed)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(shape[2], shape[:2])
    return logits, labels, torch.rand(shape[:2]) < 0.6


def test_log_probs_equal_trls_helper_token_by_token():
    from trl.trainer.utils import selective_log_softmax

    logits, labels, mask = random_batch()
    expected = (selective_log_softmax(logits[:, :-1], labels[:, 1:]) * mask[:, 1:]).sum(1)
    ours = sequence_log_probs(logits, labels.masked_fill(~mask, -100), mask)
    assert ours.shape == (5,) and torch.allclose(ours, expected, atol=1e-13)
    weights = torch.linspace(1, 2, 5, dtype=torch.float64)
    (a,), (b,) = (torch.autograd.grad(each @ weights, logits, retain_graph=True) for each in (ours, expected))
    assert torch.allclose(a, b, atol=1e-13)


def test_log_probs_of_a_known_case():
    uniform = torch.zeros(2, 4, 10, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    # Position 0 is never predicted, whatever its mask says.
    expected = torch.tensor([3.0, 1.0], dtype=torch.float64) * math.log(1 / 10)
    assert torch.allclose(sequence_log_probs(uniform, torch.ones(2, 4, dtype=torch.long), mask), expected)


def test_mask_as_bool_integer_or_float_and_no_token_at_all():
    logits, labels, mask = random_batch()
    expected = sequence_log_probs(logits, labels, mask)
    for other in (mask.long(), mask.double(), mask.to(torch.uint8)):
        assert torch.equal(sequence_log_probs(logits, labels, other), expected)
    assert (sequence_log_probs(logits, torch.full_like(labels, -100), torch.zeros_like(mask)) == 0).all()
    assert (sequence_log_probs(logits[:, :1], labels[:, :1], mask[:, :1]) == 0).all()


def test_inputs_stay_as_they_are_and_padding_has_no_gradient():
    logits, labels, mask = random_batch()
    before = labels.clone(), mask.clone()
    (gradient,) = torch.autograd.grad(sequence_log_probs(logits, labels, mask).sum(), logits)
    assert torch.equal(labels, before[0]) and torch.equal(mask, before[1])
    learned = torch.cat([mask[:, 1:], torch.zeros(5, 1, dtype=torch.bool)], 1)
    assert (gradient[~learned] == 0).all() and (gradient[learned] != 0).any(-1).all()


def test_numbers_that_are_not_finite_in_the_padding_do_no_harm():
    logits, labels, mask = random_batch()
    expected = sequence_log_probs(logits, labels, mask)
    hidden = torch.cat([~mask[:, 1:], torch.ones(5, 1, dtype=torch.bool)], 1)
    broken = logits.detach().masked_fill(hidden[..., None], float("nan"))
    assert torch.equal(sequence_log_probs(broken, labels, mask), expected)


def test_precision():
    logits, labels, mask = random_batch(shape=(4, 400, 50))
    exact = sequence_log_probs(logits, labels, mask)
    assert exact.dtype == torch.float64
    assert sequence_log_probs(logits.float(), labels, mask).dtype == torch.float32
    half = logits.to(torch.bfloat16)
    result = sequence_log_probs(half, labels, mask)
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), sequence_log_probs(half.double(), labels, mask), rtol=1e-5)
    # In bfloat16 throughout, hundreds of terms lose their last digits.
    coarse = (half[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0] * mask[:, 1:]).sum(-1)
    assert (coarse.double() - sequence_log_probs(half.double(), labels, mask)).abs().max() > 0.1
    huge = torch.tensor([[[3e4, -3e4], [0.0, 0.0]]])
    assert sequence_log_probs(huge, torch.tensor([[0, 1]]), torch.ones(1, 2)).item() == -6e4


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3), (2, 3)), ((2, 3, 4), (2, 4), (2, 4)), ((2, 3, 4), (2, 3), (2, 1))])
def test_shapes_that_do_not_fit(shapes):
    logits, labels, mask = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="do not fit"):
        sequence_log_probs(logits, labels.long(), mask)


# SafeDPO


def safedpo_case():
    torch.manual_seed(0)
    log_probs = [torch.randn(8, dtype=torch.float64, requires_grad=True) * 30 for _ in range(4)]
    h_w, h_l = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 1, 0, 1, 1, 0])
    return log_probs, h_w, h_l


def safedpo_from_the_library(log_probs, h_w, h_l, beta, margin):
    """The same loss in a library's words: a binary cross-entropy on shifted logits whose target is always 1."""
    pc, pr, rc, rr = log_probs
    shifted = beta * (pc - rc) - beta * (pr - rr) - margin * (h_l.double() - h_w.double())
    return F.binary_cross_entropy_with_logits(shifted, torch.ones_like(shifted))


def agree(ours, theirs, inputs):
    a, b = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs))
    close = all(torch.allclose(x, y, rtol=1e-10, atol=1e-14) for x, y in zip(a, b, strict=True))
    return close and torch.allclose(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta, margin", [(0.1, 10.0), (0.5, 2.0), (1.0, 0.0)])
@pytest.mark.parametrize("as_label", [torch.Tensor.long, torch.Tensor.bool, torch.Tensor.double])
def test_safedpo_value_and_gradient(beta, margin, as_label):
    log_probs, h_w, h_l = safedpo_case()
    ours = safedpo_loss(*log_probs, as_label(h_w), as_label(h_l), beta=beta, margin=margin)
    assert agree(ours, safedpo_from_the_library(log_probs, h_w, h_l, beta, margin), log_probs)
    wrong = {
        "margin inside beta": safedpo_loss(*log_probs, h_w, h_l, beta=beta, margin=beta * margin),
        "labels exchanged": safedpo_loss(*log_probs, h_l, h_w, beta=beta, margin=margin),
        "labels inverted": safedpo_loss(*log_probs, 1 - h_w, 1 - h_l, beta=beta, margin=margin),
        "rejected label only": safedpo_loss(*log_probs, 0 * h_w, h_l, beta=beta, margin=margin),
        "margin for every pair": safedpo_loss(*log_probs, 0 * h_w, 0 * h_l + 1, beta=beta, margin=margin),
        "no margin": safedpo_loss(*log_probs, h_w, h_l, beta=beta, margin=0.0),
    }
    same_by_right = set(wrong) if margin == 0 else {"margin inside beta"} if beta == 1 else set()
    theirs = safedpo_from_the_library(log_probs, h_w, h_l, beta, margin)
    assert {name for name, loss in wrong.items() if agree(loss, theirs, log_probs)} == same_by_right


def test_safedpo_without_margin_is_trls_dpo(tokenizer, tmp_path):
    dpo = DPO(tokenizer, tmp_path)
    h_w, h_l = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 1, 1, 0])
    ours = safedpo_loss(*dpo.log_probs(), h_w, h_l, beta=dpo.beta, margin=0.0)
    assert same(ours, dpo.theirs(), dpo.policy)
    with_margin = safedpo_loss(*dpo.log_probs(), h_w, h_l, beta=dpo.beta, margin=1.0)
    assert not same(with_margin, dpo.theirs(), dpo.policy)


def test_safedpo_at_zero_log_ratio():
    zero = torch.zeros(4, dtype=torch.float64)
    h_w, h_l = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    losses = safedpo_loss(zero, zero, zero, zero, h_w, h_l, margin=10.0, reduction="none")
    expected = [math.log(2), 10 + math.log1p(math.exp(-10)), math.log1p(math.exp(-10)), math.log(2)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert losses[1].item() == pytest.approx(10.0000454, abs=1e-7)
    # The margin stands outside beta: at zero log-ratio beta changes nothing.
    assert torch.equal(losses, safedpo_loss(zero, zero, zero, zero, h_w, h_l, beta=7.0, reduction="none"))


def pair(chosen_unsafe, rejected_unsafe, names=("chosen_unsafe", "rejected_unsafe"), **other):
    labels = {names[0]: chosen_unsafe, names[1]: rejected_unsafe}
    return {"prompt": "p", "chosen": "c", "rejected": "r", **labels, **other}


@pytest.mark.parametrize("names", lesson.SAFETY_LABELS)
@pytest.mark.parametrize("kind", [int, bool])
def test_transform_of_all_four_combinations(names, kind):
    rows = [pair(kind(w), kind(l), names, source=f"{w}{l}") for w in (0, 1) for l in (0, 1)]  # noqa: E741
    before = [dict(row) for row in rows]
    result = safedpo_transform(rows)
    assert rows == before and result[0] is not rows[0]
    kept = [pair(kind(0), kind(0), names, source="00"), pair(kind(0), kind(1), names, source="01")]
    swapped = {**pair(kind(0), kind(1), names, source="10"), "chosen": "r", "rejected": "c"}
    assert result == [*kept, swapped]
    assert [list(row) for row in result] == [list(rows[0])] * 3  # the same columns in the same order
    assert all(type(row[name]) is kind for row in result for name in names)
    assert safedpo_counts(rows) == {"kept": 2, "swapped": 1, "dropped": 1}


def test_transform_leaves_no_unsafe_answer_chosen_and_is_done_once():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (300, 2), generator=generator).tolist()
    rows = [{**pair(w, l), "chosen": ("bad", w), "rejected": ("bad", l)} for w, l in labels]  # noqa: E741
    result = safedpo_transform(rows)
    assert not any(row["chosen_unsafe"] for row in result)
    # Each label still belongs to its text: the variant that swaps the texts alone fails here.
    assert all(
        row["chosen"][1] == row["chosen_unsafe"] and row["rejected"][1] == row["rejected_unsafe"] for row in result
    )
    counts = safedpo_counts(rows)
    assert sum(counts.values()) == 300 and len(result) == counts["kept"] + counts["swapped"]
    assert safedpo_transform(result) == result and safedpo_counts(result)["kept"] == len(result)
    assert safedpo_transform([]) == [] and safedpo_counts([]) == {"kept": 0, "swapped": 0, "dropped": 0}


def texts_only(rows):
    result = []
    for row in rows:
        if row["chosen_unsafe"] and row["rejected_unsafe"]:
            continue
        texts = {"chosen": row["rejected"], "rejected": row["chosen"]} if row["chosen_unsafe"] else {}
        result.append({**row, **texts})
    return result


def test_labels_that_stay_when_the_texts_are_swapped_turn_the_margin_round():
    rows = [pair(1, 0)]
    zero = torch.zeros(1, dtype=torch.float64)

    def loss(transformed):
        h_w, h_l = (torch.tensor([row[name] for row in transformed]) for name in ("chosen_unsafe", "rejected_unsafe"))
        return safedpo_loss(zero, zero, zero, zero, h_w, h_l).item()

    assert loss(safedpo_transform(rows)) > 10 and loss(texts_only(rows)) < 1e-4


@pytest.mark.parametrize("function", [safedpo_transform, safedpo_counts])
@pytest.mark.parametrize(
    "bad, words",
    [
        (pair(2, 0), "pair 2: chosen_unsafe is 2"),
        (pair(0, None), "pair 2: rejected_unsafe is None"),
        (pair("1", 0), "pair 2: chosen_unsafe is '1'"),
        (pair(0, 1.0), "pair 2: rejected_unsafe is 1.0"),
        (pair(0, -1, ("h_w", "h_l")), "pair 2: h_l is -1"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_unsafe": 0}, "pair 2: no safety labels"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_unsafe": 0, "h_l": 0}, "pair 2: no safety labels"),
        ({"prompt": "p", "chosen": "c", "chosen_unsafe": 0, "rejected_unsafe": 0}, "pair 2: rejected missing"),
    ],
)
def test_bad_labels_name_the_row(function, bad, words):
    with pytest.raises(ValueError, match=words):
        function([pair(0, 0), bad])


# What holds for all losses


def test_reductions():
    values = [torch.tensor(each, dtype=torch.float64) for each in ([-1.0, -2], [-3.0, -1], [-2.0, -2], [-2.0, -2])]
    labels = torch.tensor([0, 1]), torch.tensor([1, 0])
    for loss in (
        lambda reduction: dpo_loss(*values, label_smoothing=0.1, reduction=reduction),
        lambda reduction: safedpo_loss(*values, *labels, reduction=reduction),
        lambda reduction: bradley_terry_loss(*values[:2], reduction=reduction),
    ):
        each = loss("none")
        assert each.shape == (2,) and each[0] != each[1]
        assert loss("sum") == each.sum() and loss("mean") == each.mean()
        with pytest.raises(ValueError, match="reduction"):
            loss("average")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_huge_log_ratios_stay_finite(dtype):
    big = torch.tensor([1e6, -1e6, 3e4], dtype=dtype, requires_grad=True)
    zero, ones = torch.zeros(3, dtype=dtype), torch.ones(3)
    for loss in (
        dpo_loss(big, zero, zero, zero, beta=1.0),
        dpo_loss(big, zero, zero, zero, beta=1.0, label_smoothing=0.3),
        safedpo_loss(big, zero, zero, zero, zero.bool(), ones, margin=1e4),
        bradley_terry_loss(big, zero),
    ):
        (gradient,) = torch.autograd.grad(loss, big)
        assert loss.dtype == dtype and loss.isfinite() and gradient.isfinite().all()
    # The variant without a log σ of its own.
    assert not (-torch.sigmoid(big).log()).isfinite().all()


def test_smoothed_loss_is_least_at_a_finite_difference():
    d = torch.linspace(-5, 15, 2001, dtype=torch.float64)
    zero = torch.zeros_like(d)
    losses = dpo_loss(d, zero, zero, zero, beta=0.5, label_smoothing=0.1, reduction="none")
    assert d[losses.argmin()].item() == pytest.approx(math.log(0.9 / 0.1) / 0.5, abs=0.01)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": -1.0}, {"beta": math.nan}])
def test_beta_must_be_above_zero(settings):
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match="beta"):
        dpo_loss(zero, zero, zero, zero, **settings)
    with pytest.raises(ValueError, match="beta"):
        safedpo_loss(zero, zero, zero, zero, zero, zero, **settings)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_smoothing_must_be_below_a_half(smoothing):
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo_loss(zero, zero, zero, zero, label_smoothing=smoothing)


def test_tensors_that_would_broadcast_are_refused():
    a, column = torch.zeros(3), torch.zeros(3, 1)
    for call in (
        lambda: dpo_loss(a, column, a, a),
        lambda: safedpo_loss(a, a, a, a, column, a),
        lambda: bradley_terry_loss(a, column),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError, match="margin"):
        safedpo_loss(a, a, a, a, a, a, margin=-1.0)
