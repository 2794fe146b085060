"""The two loaders of the real profiles, run for real on a CPU: bitsandbytes 4 bits, and Unsloth in its own process.

Each loads through `shared.models.load_model`, trains a LoRA with TRL's SFTTrainer until the loss has fallen, saves the
adapter and loads it again to answer. Unsloth patches transformers when it is imported, so it gets a process of its own:
this file run as a script (`python tests/lab01/test_quantized_backends.py FOLDER`).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LORA = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}
QUESTIONS = {"Where does Ana live?": "Rome", "How many maps are there?": "7", "Who has the pens?": "Cora"}


def train_lora(base, folder, backend, load_in_4bit):
    """Train on three questions, save, load again, and return what a test wants to know, as plain JSON values."""
    from shared.models import generate_replies, load_model, save_adapter_or_model

    model, tokenizer = load_model(
        base, for_training=True, backend=backend, load_in_4bit=load_in_4bit, lora=LORA, max_seq_length=64
    )
    import torch  # after Unsloth, which wants to be imported first
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from data_formatting import render

    linear = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in QUESTIONS.items()
    ]
    rows = []
    for chat in chats:
        ids, mask = render(chat, tokenizer)
        rows.append({"input_ids": ids, "labels": [i if one else -100 for i, one in zip(ids, mask, strict=True)]})
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "checkpoints"), max_steps=150, per_device_train_batch_size=3, learning_rate=3e-3,
            lr_scheduler_type="linear", logging_steps=1, save_strategy="no", report_to=[], max_length=64, seed=0,
            use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows * 4),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    unchanged = all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    trained = sorted({name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad})
    saved = save_adapter_or_model(model, tokenizer, folder)
    prompts = [chat[:1] for chat in chats]
    answers = generate_replies(model, tokenizer, prompts, max_new_tokens=4)
    again, tokenizer = load_model(base, adapter=saved, load_in_4bit=load_in_4bit, backend="transformers")
    return {
        "losses": losses,
        "unchanged": unchanged,
        "trained": trained,
        "layer": type(linear).__name__,
        "weight": str(linear.weight.dtype),
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "unsloth": "unsloth" in sys.modules,
        "files": sorted(path.name for path in saved.iterdir()),
        "answers": answers,
        "answers_again": generate_replies(again, tokenizer, prompts, max_new_tokens=4),
    }


def check(found):
    assert found["losses"][-1] < 0.3 * found["losses"][0], found["losses"]
    assert found["unchanged"] and found["trained"] == sorted(LORA["target_modules"])
    assert "adapter_model.safetensors" in found["files"] and "tokenizer.json" in found["files"]
    assert found["answers"] == found["answers_again"] == list(QUESTIONS.values())


@pytest.fixture
def loud_base(tiny_base):
    """The random base with larger embeddings: the head is tied to them, and no adapter makes its logits larger."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    model.save_pretrained(tiny_base)
    return tiny_base


@pytest.mark.slow
def test_bitsandbytes_four_bits_trains_a_lora_on_this_cpu(loud_base, tmp_path):
    pytest.importorskip("bitsandbytes")
    found = train_lora(loud_base, tmp_path, "transformers", True)
    assert found["layer"] == "Linear4bit" and found["weight"] == "torch.uint8"  # two NF4 weights in a byte
    assert not found["unsloth"]
    check(found)


@pytest.mark.slow
def test_unsloth_trains_a_lora_on_this_cpu(loud_base, tmp_path):
    if importlib.util.find_spec("unsloth") is None:
        if os.environ.get("LABS_REQUIRE_UNSLOTH") == "1":
            pytest.fail("unsloth is not installed: pip install --no-deps -r requirements-unsloth.txt")
        pytest.skip("unsloth is not installed: pip install --no-deps -r requirements-unsloth.txt")
    command = [sys.executable, __file__, str(loud_base), str(tmp_path)]
    # Unsloth writes compiled trainers into the working directory.
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["unsloth"] and found["weight"] == "torch.float32"
    check(found)


if __name__ == "__main__":
    base, folder = map(Path, sys.argv[1:])
    (folder / "found.json").write_text(json.dumps(train_lora(base, folder, "unsloth", False)))
