"""Load a model to train or to talk to: a folder under runs/, or a hub id; full weights, an adapter, 4 bits, Unsloth.

One function for every lab. With a GPU and Unsloth installed it takes Unsloth; elsewhere transformers + PEFT, with
bitsandbytes where 4 bits are asked for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared import LabsError
from shared.training import atomic_folder, progress

BACKENDS = ("auto", "transformers", "unsloth")


def check_access(model_id: str, revision: str | None = None) -> None:
    """Ask the hub, before anything is written, whether the model's files can be read (or are in its cache).

    Raises LabsError with the next step for a gated model without a token, an unknown model and a missing network.
    """
    import httpx
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    unknown = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError, ValueError)
    try:
        if not isinstance(try_to_load_from_cache(model_id, "config.json", revision=revision), str):
            get_hf_file_metadata(hf_hub_url(model_id, "config.json", revision=revision))
    except errors.GatedRepoError:
        raise LabsError(
            f"{model_id} is gated: accept its licence at https://huggingface.co/{model_id}, then log in with "
            "`hf auth login` or set HF_TOKEN; or take an ungated model such as Qwen/Qwen2.5-0.5B"
        ) from None
    except unknown:
        named = f"{model_id} (revision {revision})" if revision else model_id
        raise LabsError(f"{named} is no folder here and no model on the hub, or private: check the name") from None
    except (OSError, httpx.HTTPError):
        raise LabsError(
            f"cannot reach the hub for {model_id}: use --profile tiny, or go online and try again"
        ) from None


def _moved(path: Path) -> Path:
    """The same place in this runs folder: an adapter notes the path of its base, which breaks when all of it is moved."""
    from shared.profiles import PROFILES, STAGES, runs_root

    for place, (part, following) in enumerate(zip(path.parts, path.parts[1:], strict=False)):
        if part in PROFILES and following in STAGES:
            return runs_root() / Path(*path.parts[place:])
    return path


def _locate(name_or_path: str, revision: str | None) -> str:
    """A folder that exists, or a hub id that can be read."""
    path = Path(name_or_path)
    if not path.exists() and path.is_absolute():
        path = _moved(path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise LabsError(f"{path} holds no model (no config.json): run the stage that makes it again")
        return str(path)
    if path.is_absolute() or name_or_path.startswith((".", "runs/")) or name_or_path.count("/") > 1:
        raise LabsError(f"no model at {name_or_path}: `labs list` shows the stages, `labs run STAGE` builds one")
    check_access(name_or_path, revision)
    return name_or_path


def load_model(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    for_training: bool = False,
    backend: str = "auto",
    load_in_4bit: bool = False,
    lora: Mapping[str, Any] | None = None,
    dtype: Any = None,
    max_seq_length: int = 1024,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """The model and its tokenizer.

    `lora` (fields of `peft.LoraConfig`) puts a new adapter on it; `adapter` loads a saved one. Without either the model
    has all its weights trainable. `load_in_4bit` stores the frozen weights in NF4 with double quantisation (Dettmers et
    al. 2023), so it needs an adapter to train. dtype None: bfloat16 (float16 on older cards) on a GPU, float32 on CPU.
    Only safetensors are read, and no code from the hub is run.
    Raises LabsError for a missing folder, a gated or unknown model, a missing network and an impossible combination.
    """
    import torch
    from safetensors import SafetensorError

    if lora is not None and adapter is not None:
        raise LabsError("lora= makes a new adapter and adapter= loads one: give one of the two")
    if backend not in BACKENDS:
        raise LabsError(f"backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if load_in_4bit and for_training and lora is None and adapter is None:
        raise LabsError("4-bit weights cannot be trained: use an adapter (method=lora)")
    name = _locate(str(name_or_path), revision)
    if adapter is not None and not (Path(adapter) / "adapter_model.safetensors").exists():
        raise LabsError(f"no adapter at {adapter}: `labs list` shows the stages, `labs run STAGE` builds one")
    on_gpu = torch.cuda.is_available()
    if dtype is None:
        # A T4 only emulates bfloat16, slowly.
        has_bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bfloat16 else torch.float16 if on_gpu else torch.float32
    if backend == "auto":
        backend = "unsloth" if on_gpu and _has_unsloth() and adapter is None else "transformers"
    # A gradient for every weight is wanted only where all of them are to learn.
    everything = for_training and lora is None and adapter is None
    # At import bitsandbytes warns that an optional CPU kernel is not installed; nothing here wants it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if backend == "unsloth":
            model, tokenizer = _load_with_unsloth(name, load_in_4bit, lora, dtype, max_seq_length, revision, everything)
        else:
            model, tokenizer = _load_with_transformers(name, load_in_4bit, lora, dtype, revision, for_training)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=for_training)
    except (OSError, ValueError, TypeError, ImportError, SafetensorError) as error:  # a bad file, field or layer name
        raise LabsError(f"cannot load {name}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Answers go on at the right end, so there the padding stands on the left; training wants it out of the way.
    tokenizer.padding_side = "right" if for_training else "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = not for_training
    model.train(for_training)
    return model, tokenizer


def save_adapter_or_model(model, tokenizer, folder: str | Path) -> Path:
    """Save into `folder`/adapter (a PEFT model) or `folder`/model (all weights) and return that path.

    An ordinary Hugging Face folder with its tokenizer, there whole or not at all.
    """
    from peft import PeftModel

    path = Path(folder) / ("adapter" if isinstance(model, PeftModel) else "model")
    uses_cache, model.config.use_cache = model.config.use_cache, True  # off in training, but whoever loads it generates
    try:
        with atomic_folder(path) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    finally:
        model.config.use_cache = uses_cache
    return path


def _has_unsloth() -> bool:
    import importlib.util

    return importlib.util.find_spec("unsloth") is not None


def _load_with_transformers(name, load_in_4bit, lora, dtype, revision, for_training):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"dtype": dtype, "revision": revision or "main", "use_safetensors": True}
    if load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    if on_gpu:
        options["device_map"] = {"": 0}
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main")
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    if load_in_4bit and not on_gpu:
        # bitsandbytes repacks weights for its fast CPU kernel, and fails where a width is no multiple of 64.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if load_in_4bit and for_training:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=on_gpu)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**lora))
    return model, tokenizer


def _load_with_unsloth(name, load_in_4bit, lora, dtype, max_seq_length, revision, everything):
    if not _has_unsloth():
        raise LabsError("backend unsloth is not installed: see colab_setup.md, or use backend=transformers")
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=name,
        max_seq_length=max_seq_length,
        dtype=dtype,
        load_in_4bit=load_in_4bit,
        full_finetuning=everything,
        revision=revision,
        use_safetensors=True,
    )
    if lora is not None:
        known = {key: value for key, value in lora.items() if key != "task_type"}  # Unsloth only does causal models
        model = FastLanguageModel.get_peft_model(model, **known, max_seq_length=max_seq_length)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------- talking


def chat_prompt(tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping] | None = None) -> str:
    """The conversation as the model reads it, up to where its reply begins. Raises LabsError where the template cannot."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise LabsError("this model's tokenizer has no chat template: talk to it with --raw, or take an instruct model")
    texts = template.values() if isinstance(template, dict) else [template]
    if tools and not any("tools" in text for text in texts):
        # Rendered all the same, the prompt would lack them without a word.
        raise LabsError("this model's chat template has no place for tools: take one that was made for tool use")
    # An empty list is no tools: some templates announce tools for any list.
    shown = [dict(tool) for tool in tools] if tools else None
    return tokenizer.apply_chat_template(list(messages), tools=shown, tokenize=False, add_generation_prompt=True)


def generate_replies(
    model,
    tokenizer,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    max_new_tokens: int = 64,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    prefixes: Sequence[str] | None = None,
    tools: Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
) -> list[str]:
    """One reply to each conversation, as text without special tokens. Think and tool tags are ordinary and stay.

    With `prefixes`, one a conversation, the assistant's turn already begins with that text, and what follows it is returned.
    With `tools`, one list a conversation (OpenAI's JSON schema), the chat template shows them to the model.
    temperature 0 takes the likeliest token. The model's mode, the tokenizer's padding side and torch's random numbers
    are as before afterwards, so that looking at samples in the middle of a training run does not change the run.
    """
    import torch

    beginnings = [""] * len(conversations) if prefixes is None else prefixes
    offered = [None] * len(conversations) if tools is None else tools
    rows = zip(conversations, offered, beginnings, strict=True)
    prompts = [chat_prompt(tokenizer, messages, shown) + text for messages, shown, text in rows]
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    replies: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # like lengths together: less padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            for batch in progress(batches, "answering"):
                texts = [prompts[index] for index in batch]
                inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
                out = _generate(model, tokenizer, inputs, max_new_tokens, temperature)
                new = out[:, inputs["input_ids"].shape[1] :]
                for index, reply in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                    replies[index] = reply
    finally:
        tokenizer.padding_side = side
        model.train(was_training)
    return replies


def _generate(model, tokenizer, inputs, max_new_tokens: int, temperature: float, **options):
    inputs.pop("token_type_ids", None)
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_tokens(model, tokenizer),
        # A model's own defaults (Qwen brings a repetition penalty) would change what is measured.
        repetition_penalty=1.0,
        **({"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else greedy),
        **options,
    )


def stop_tokens(model, tokenizer) -> list[int]:
    """Whatever ends a reply: the model's own end tokens, the tokenizer's, and what the chat template ends a turn with.

    A base model such as Qwen2.5-0.5B knows only the end of a document; tuned, it ends its turn as the template does.
    """
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("answer")[2].strip()
        first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        ends.update(token for token in first if token in tokenizer.added_tokens_decoder)
    return sorted(ends)


def stream_reply(
    model,
    tokenizer,
    messages: Sequence[Mapping[str, Any]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[str]:
    """The reply piece by piece, as it is made. `raw` continues the last message's text without a chat template.

    `tools` (OpenAI's JSON schema) are shown by the chat template.
    """
    import torch
    from transformers import TextIteratorStreamer

    text = messages[-1]["content"] if raw else chat_prompt(tokenizer, messages, tools)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            _generate(model, tokenizer, inputs, max_new_tokens, temperature, streamer=streamer)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the text
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]
