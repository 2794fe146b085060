"""Loading, saving, answering: small random Llamas in a temporary folder, and a stand-in for the hub on this machine."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from shared import REPO_ROOT, LabsError
from shared.models import check_access, generate_replies, load_model, save_adapter_or_model, stream_reply

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TEMPLATE = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
CHATS = [[{"role": "user", "content": text}] for text in ("Hi", "A much longer question, is it not?", "Why", "2 + 2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as a stage leaves it, with a tokenizer that has no padding token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([chat[0]["content"] for chat in CHATS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_tokens(["<think>"])  # an ordinary added token, as think and tool tags must be
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=fast.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("runs") / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_model_to_train_and_a_model_to_ask(folder):
    model, tokenizer = load_model(folder, for_training=True)
    assert model.training and not model.config.use_cache and tokenizer.padding_side == "right"
    assert len(trainable(model)) == len(list(model.parameters())) and model.dtype == torch.float32
    assert tokenizer.pad_token == "<|im_end|>" and model.config.pad_token_id == tokenizer.pad_token_id
    model, tokenizer = load_model(str(folder), dtype=torch.bfloat16)
    assert not model.training and model.config.use_cache and tokenizer.padding_side == "left"
    assert model.dtype == torch.bfloat16


def test_the_base_of_an_adapter_is_found_where_the_runs_folder_was_moved(folder, runs, tmp_path):
    noted = tmp_path / "elsewhere" / "tiny" / "sft" / "model"
    with pytest.raises(LabsError, match=f"no model at {noted}"):
        load_model(noted)
    shutil.copytree(folder, runs / "tiny" / "sft" / "model")
    model, _ = load_model(noted)
    assert model.config._name_or_path == str(runs / "tiny" / "sft" / "model")
    with pytest.raises(LabsError, match="no model at"):  # not a stage's folder: nobody knows what that was
        load_model(tmp_path / "elsewhere" / "tiny" / "mine" / "model")


def test_an_adapter_is_made_saved_and_loaded_with_the_same_answers(folder, tmp_path):
    from peft import PeftModel

    model, tokenizer = load_model(folder, for_training=True, lora=LORA)
    assert isinstance(model, PeftModel) and all("lora_" in name for name in trainable(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = generate_replies(model, tokenizer, CHATS, max_new_tokens=12)
    saved = save_adapter_or_model(model, tokenizer, tmp_path)
    assert saved == tmp_path / "adapter" and not model.config.use_cache
    assert {p.suffix for p in saved.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}

    again, tokenizer = load_model(folder, adapter=saved)
    assert generate_replies(again, tokenizer, CHATS, max_new_tokens=12) == before
    assert not trainable(again)
    again, _ = load_model(folder, adapter=saved, for_training=True)
    assert trainable(again) == trainable(model)
    assert before != generate_replies(*load_model(folder), CHATS, max_new_tokens=12)


def test_a_whole_model_is_saved_with_its_cache_on(folder, tmp_path):
    model, tokenizer = load_model(folder, for_training=True)
    saved = save_adapter_or_model(model, tokenizer, tmp_path)
    assert saved == tmp_path / "model" and [p.name for p in tmp_path.iterdir()] == ["model"]
    assert json.loads((saved / "config.json").read_text()).get("use_cache", True)
    again, _ = load_model(saved)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"backend": "tensorflow"}, "backend 'tensorflow': choose one of auto"),
        ({"load_in_4bit": True, "for_training": True}, "4-bit weights cannot be trained"),
        ({"lora": LORA, "adapter": "x"}, "one of the two"),
        ({"lora": {**LORA, "ranks": 4}}, "ranks"),
        ({"lora": {**LORA, "target_modules": ["query"]}}, "query"),
        ({"adapter": "nowhere"}, "no adapter at nowhere: `labs list`"),
    ],
)
def test_impossible_requests_are_named(folder, arguments, message):
    with pytest.raises(LabsError, match=message) as caught:
        load_model(folder, **arguments)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_model_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the project's own folder may hold a runs/tiny/base/model
    for path in (tmp_path / "none", "./none", "runs/tiny/base/model"):
        with pytest.raises(LabsError, match="no model at .*labs run STAGE"):
            load_model(path)
    with pytest.raises(LabsError, match="no config.json"):
        load_model(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:200] if "safetensors" in file.name else file.read_bytes())
    with pytest.raises(LabsError, match="cannot load .*broken"):
        load_model(broken)
    (broken / "model.safetensors").unlink()
    torch.save({}, broken / "pytorch_model.bin")  # a pickle is not read
    with pytest.raises(LabsError, match="cannot load .*broken"):
        load_model(broken)


def test_batches_of_any_size_give_the_answers_of_one_at_a_time(folder):
    model, tokenizer = load_model(folder, for_training=True)
    state = torch.random.get_rng_state()
    together = generate_replies(model, tokenizer, CHATS, max_new_tokens=10, batch_size=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training and tokenizer.padding_side == "right" and not model.config.use_cache
    assert together == [generate_replies(model, tokenizer, [chat], max_new_tokens=10)[0] for chat in CHATS]
    assert generate_replies(model, tokenizer, [], max_new_tokens=10) == []


def test_sampling_follows_its_seed(folder):
    model, tokenizer = load_model(folder)
    sample = lambda seed: generate_replies(model, tokenizer, CHATS, 12, temperature=1.0, seed=seed)  # noqa: E731
    assert sample(1) == sample(1) != sample(2)


def test_the_models_own_generation_defaults_do_not_change_what_is_measured(folder):
    model, tokenizer = load_model(folder)
    greedy, sampled = (generate_replies(model, tokenizer, CHATS, 12, temperature=t) for t in (0.0, 1.0))
    model.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=0.1, top_k=1, top_p=0.5)
    assert generate_replies(model, tokenizer, CHATS, 12) == greedy
    assert generate_replies(model, tokenizer, CHATS, 12, temperature=1.0) == sampled


def test_special_tokens_are_dropped_and_think_tags_stay(folder):
    """A model made to write <think>, then its end of turn, whatever it is asked."""
    model, tokenizer = load_model(folder)
    think, end = tokenizer.convert_tokens_to_ids(["<think>", "<|im_end|>"])

    def write(input_ids=None, **kwargs):
        out = forward(input_ids=input_ids, **kwargs)
        out.logits[:] = 0
        out.logits[:, :, end] = 1
        out.logits[input_ids != think] += 2 * torch.nn.functional.one_hot(torch.tensor(think), out.logits.shape[-1])
        return out

    forward, model.forward = model.forward, write
    assert generate_replies(model, tokenizer, CHATS, max_new_tokens=10) == ["<think>"] * 4
    assert "".join(stream_reply(model, tokenizer, CHATS[0], max_new_tokens=10)) == "<think>"
    # A base model from the hub: the end of its documents is not the end of a turn.
    tokenizer.eos_token = "<|im_start|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert generate_replies(model, tokenizer, CHATS, max_new_tokens=10) == ["<think>"] * 4


def test_a_prefix_is_where_the_reply_goes_on(folder):
    model, tokenizer = load_model(folder)
    begun = ["W", "2 +", "Hi", "q"]
    rest = generate_replies(model, tokenizer, CHATS, max_new_tokens=6, prefixes=begun)
    for chat, beginning, text in zip(CHATS, begun, rest, strict=True):
        written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + beginning
        raw = stream_reply(model, tokenizer, [{"role": "user", "content": written}], max_new_tokens=6, raw=True)
        assert "".join(raw) == text
    assert rest != generate_replies(model, tokenizer, CHATS, max_new_tokens=6)
    with pytest.raises(ValueError):
        generate_replies(model, tokenizer, CHATS, prefixes=["one"])


def test_a_streamed_reply_is_the_reply(folder):
    model, tokenizer = load_model(folder)
    pieces = list(stream_reply(model, tokenizer, CHATS[1], max_new_tokens=12))
    assert len(pieces) > 1 and "".join(pieces) == generate_replies(model, tokenizer, [CHATS[1]], 12)[0]
    assert list(stream_reply(model, tokenizer, CHATS[0], max_new_tokens=3, raw=True))


def test_failures_while_streaming_reach_the_reader(folder):
    model, tokenizer = load_model(folder)
    model.generate = lambda **kwargs: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_reply(model, tokenizer, CHATS[0]))
    tokenizer.chat_template = None
    with pytest.raises(LabsError, match="no chat template"):
        generate_replies(model, tokenizer, CHATS)


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: gated, unknown, a known model without that revision."""

    def do_HEAD(self):
        code, error = (403, "GatedRepo") if "llama" in self.path else (404, "RepoNotFound")
        if "known" in self.path:
            code, error = 404, "RevisionNotFound"
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


PROGRAM = """
import sys
from shared import LabsError
from shared.models import load_model
for name in sys.argv[1:]:
    try:
        load_model(*name.split("@")[:1], revision=(name.split("@") + [None])[1])
    except LabsError as error:
        print(error)
"""


def test_gated_and_unknown_models_and_a_missing_network_are_told_apart(tmp_path):
    """The real client of the hub against a server on this machine; then with nobody behind the port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(REPO_ROOT),
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)

    def ask(*names):
        command = [sys.executable, "-c", PROGRAM, *names]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    gated, unknown, revision, invalid = ask("meta/llama-9", "nobody/nothing", "someone/known@v9", "no such name!")
    assert gated.startswith("meta/llama-9 is gated") and "huggingface.co/meta/llama-9" in gated
    assert "HF_TOKEN" in gated and "Qwen/Qwen2.5-0.5B" in gated
    assert "nobody/nothing is no folder here and no model on the hub" in unknown
    assert "someone/known (revision v9)" in revision and "no such name!" in invalid
    server.shutdown()
    server.server_close()
    (offline,) = ask("meta/llama-9")
    assert "cannot reach the hub for meta/llama-9" in offline and "--profile tiny" in offline
    assert not list(tmp_path.glob("hub/**/*.safetensors"))


def test_without_a_network_and_a_cache_the_hub_is_named():
    with pytest.raises(LabsError, match="cannot reach the hub for nobody/nothing"):  # tests run in offline mode
        check_access("nobody/nothing")
