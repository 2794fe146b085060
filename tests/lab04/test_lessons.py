"""What lab 04 learns from, in which order, and the noise on values."""

import pytest
import torch
from tool_rows import calls_of

import tool_data
from shared import tiny_world
from shared.profiles import load_profile
from tool_data import DECLINE, HELD_OUT, drill_rows, markup_rows, training_rows
from tool_stage import lessons, noisy_values

SMALL = [
    "tools.trainer.max_steps=20", "tools.trainer.per_device_train_batch_size=4", "tools.drill=0.4", "tools.replay=0.1",
]  # fmt: skip


def config_of(*overrides):
    return load_profile("04", "tiny", [*SMALL, *overrides]).tools


def said(example, tokenizer):
    return tokenizer.decode(example["input_ids"])


def test_drills_are_short_and_most_show_no_tools():
    rows = drill_rows(400, 3)
    assert rows == drill_rows(400, 3) != drill_rows(400, 4)
    bare = [row for row in rows if not row["tools"]]
    assert len(bare) == 240 and {row["kind"] for row in bare} == {"single", "parallel", "missing", "direct", "answer"}
    assert all(message["content"] != DECLINE for row in bare for message in row["messages"])
    listed = [row for row in rows if row["tools"]]
    assert any(row["messages"][-1]["content"] == DECLINE for row in listed)
    assert all(sum(message["role"] == "user" for message in row["messages"]) == 1 for row in rows)
    whole = training_rows(400, 3)
    assert {row["id"] for row in rows}.isdisjoint(row["id"] for row in whole)
    same = {row["messages"][0]["content"] for row in rows} & {row["messages"][0]["content"] for row in whole}
    assert len(same) < 40  # drawn from another seed, not the same conversations without their list
    words = {word for row in rows for message in row["messages"] for word in message["content"].split()}
    assert not words & HELD_OUT
    market = drill_rows(50, 3, ("market",))
    assert all(
        call["name"] in tool_data.tool_names(("market",))
        for row in market for message in row["messages"] for call in calls_of(message)
    )  # fmt: skip


def test_markup_rows_teach_how_calls_are_written_and_no_request(sentences):
    rows = markup_rows(200, 1)
    assert rows == markup_rows(200, 1) != markup_rows(200, 2)
    asked = {text for texts in sentences.train.values() for text in texts}
    for row in rows:
        user, reply = row["messages"]
        calls = calls_of(reply)
        assert 1 <= len(calls) <= 2 and row["tools"] == []
        for call, line in zip(calls, user["content"].split(". "), strict=True):
            assert line.split()[0] == call["name"] and all(slot in line.split() for slot in call["arguments"])
        assert not set(user["content"].replace(".", "").split()) & HELD_OUT
        assert sentences.hollow(user["content"]) not in {sentences.hollow(text) for text in asked}


def test_the_drill_comes_first_and_batches_are_of_like_length(world_tokenizer):
    rows = training_rows(60, 1)
    ordered = lessons(rows, world_tokenizer, config_of(), 1)
    first = ordered[: 8 * 4]  # 0.4 of 20 steps of four rows
    rest = ordered[8 * 4 :]
    assert 0.15 < sum("<|im_start|>system" in said(example, world_tokenizer) for example in first) / len(first) < 0.6
    shown = ["<|im_start|>system" in said(example, world_tokenizer) for example in rest]
    assert 0.85 < sum(shown) / len(rest) < 1  # what shows no tools there is lab 00's copying
    assert len(rest) == 66 // 4 * 4
    for part in (first, rest):
        lengths = [len(example["input_ids"]) for example in part]
        spread = [max(lengths[i : i + 4]) - min(lengths[i : i + 4]) for i in range(0, len(lengths), 4)]
        assert sum(spread) / len(spread) < (max(lengths) - min(lengths)) / 4
        assert lengths != sorted(lengths)  # the batches themselves come in any order


def test_the_order_is_drawn_from_the_seed(world_tokenizer):
    rows = training_rows(60, 1)
    ordered = lessons(rows, world_tokenizer, config_of(), 1)
    assert lessons(rows, world_tokenizer, config_of(), 1) == ordered != lessons(rows, world_tokenizer, config_of(), 2)


def test_no_drill_where_none_is_wanted_or_other_data_is_learnt(world_tokenizer):
    rows = training_rows(20, 1)
    for config in (config_of("tools.drill=0", "tools.replay=0"), config_of("tools.data=mine.jsonl", "tools.replay=0")):
        ordered = lessons(rows, world_tokenizer, config, 1)
        assert len(ordered) == 20 and all("<|im_start|>system" in said(each, world_tokenizer) for each in ordered)
    few = lessons(rows[:3], world_tokenizer, config_of("tools.drill=0", "tools.replay=0"), 1)
    assert len(few) == 3  # less than a batch is still learnt from


def test_half_the_steps_have_half_the_drill(world_tokenizer):
    rows = training_rows(20, 1)
    sizes = [
        len(lessons(rows, world_tokenizer, config_of(f"tools.trainer.max_steps={steps}"), 1)) - 22 // 4 * 4
        for steps in (20, 10)
    ]
    assert sizes == [32, 16]


# --------------------------------------------------------------------------------------------------- noise on values


@pytest.fixture
def embedded(policy):
    """(model, tokenizer, embeddings of a text's tokens as a function of the text)."""
    model, tokenizer = policy()
    embedding = model.get_input_embeddings()

    def embed(text):
        return embedding(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))

    return model, tokenizer, embed


def test_noise_is_on_values_alone_and_only_while_training(embedded):
    model, tokenizer, embed = embedded
    held_out = tiny_world.pool("name", "held_out")[0]
    text = f"Tell me the age of {held_out} in 17 days"
    tokens = [tokenizer.decode([i]).strip() for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    clean = embed(text)
    torch.manual_seed(0)
    with noisy_values(model, tokenizer, 0.5):
        model.train()
        changed = (embed(text) != clean).any(dim=1)
        noisy = {token for token, differs in zip(tokens, changed, strict=True) if differs}
        assert noisy == {held_out, "1", "7"}  # the tokenizer cuts numbers into digits
        assert not torch.equal(embed(text), embed(text))
        model.eval()
        assert torch.equal(embed(text), clean)
    model.train()
    assert torch.equal(embed(text), clean)  # and it is gone afterwards


def test_noise_has_the_size_that_is_asked_for(embedded):
    model, tokenizer, embed = embedded
    usual = model.get_input_embeddings().weight.detach().pow(2).mean().sqrt().item()
    text = " ".join(tiny_world.pool("town", "train") * 20)
    clean = embed(text)
    model.train()
    for scale in (0.1, 0.4):
        torch.manual_seed(0)
        with noisy_values(model, tokenizer, scale):
            noise = (embed(text) - clean).detach()
        assert noise.std().item() == pytest.approx(scale * usual, rel=0.05)
        assert abs(noise.mean().item()) < 0.05 * scale * usual
    with noisy_values(model, tokenizer, 0.0):
        assert torch.equal(embed(text), clean)
    with pytest.raises(RuntimeError), noisy_values(model, tokenizer, 0.4):
        raise RuntimeError
    assert torch.equal(embed(text), clean)  # a run that breaks leaves no noise behind
