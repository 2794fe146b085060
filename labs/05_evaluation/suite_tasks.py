"""What the suite measures, and on whom: tasks made of the labs' own test rows and scoring functions, and the plan.

A task asks one model and returns an item for every row: {"scores": {metric: number or None}, "prompt", "reply", ...}. A row
that cannot be asked or judged (no answer to compare with, damaged letters, no room for a reply) has an "error" and no scores:
it is named and counted, never a silent zero. An empty reply is asked and judged; "empty" says that it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared import tiny_world

REPLY_TOKENS = 64  # what labs 01 and 02 let a model say
KEPT_CHARACTERS = 400  # of a prompt or a reply: enough to see what happened
TEXT_KINDS = {"lookup": 1.0, "arithmetic": 1.0, "word_problem": 1.0}  # lab 00's held-out texts

Item = dict[str, Any]


@dataclass
class Subject:
    """A model that is measured; `model` is a sequence classifier where the stage is a reward model."""

    stage: str
    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Metric:
    """A number of every item. `better`: +1 the higher the better, -1 the lower, 0 neither. A share's scores are 0 and 1."""

    name: str
    description: str
    unit: str = "share"
    better: int = 1


@dataclass(frozen=True)
class Task:
    """`run(subject, settings)` returns the items; `modules` are those whose code decides the result, for the cache's key.

    `beside`: the other task of the same stage that this is compared with, instead of the parent's. A task that needs no model
    (`asks` is false) gets None for its subject.
    """

    name: str
    run: Callable[[Any, Mapping[str, Any]], list[Item]]
    metrics: tuple[Metric, ...]
    modules: tuple[str, ...]
    beside: str | None = None
    asks: bool = True


# ------------------------------------------------------------------------------------------------------- asking a model


def replies_of(subject: Subject, prompts: Sequence[str], max_new_tokens: int) -> list[str | None]:
    """The greedy reply to each rendered prompt, None where there is no room for one."""
    from rollout_decoders import is_plain_llama
    from rollouts import ROWS_AT_ONCE, greedy_replies

    model, tokenizer = subject.model, subject.tokenizer
    room = getattr(model.config, "max_position_embeddings", None)
    lengths = [len(ids) for ids in tokenizer(list(prompts), add_special_tokens=False)["input_ids"]] if prompts else []
    fits = [index for index, length in enumerate(lengths) if room is None or 0 < length <= room - max_new_tokens]
    fits.sort(key=lambda index: lengths[index])  # like lengths together: less padding
    at_once = ROWS_AT_ONCE if is_plain_llama(model) else 32  # a large model's keys and values take memory
    replies: list[str | None] = [None] * len(prompts)
    for start in range(0, len(fits), at_once):
        chunk = fits[start : start + at_once]
        given = greedy_replies(model, tokenizer, [prompts[index] for index in chunk], max_new_tokens)
        for index, reply in zip(chunk, given, strict=True):
            replies[index] = reply
    return replies


def row_problem(prompt: str, gold: Any) -> str | None:
    """Why a row cannot be asked or judged, or None."""
    from red_team_data import text_problem

    if problem := text_problem(prompt):
        return f"prompt: {problem}"
    if gold is None or gold == "" or gold == {}:
        return "no answer to compare with"
    return None


def ask_rows(
    subject: Subject, rows: Sequence[Mapping[str, Any]], *, prompt: Callable[[Mapping], str],
    rendered: Callable[[Mapping], str], gold: Callable[[Mapping], Any],
    score: Callable[[list[str], list], list[dict[str, float]]], max_new_tokens: int,
) -> list[Item]:  # fmt: skip
    """Ask every row that can be asked, judge all replies at once by `score`, and put the items together in the rows' order."""
    items: list[Item] = [{"scores": {}, "prompt": prompt(row)[:KEPT_CHARACTERS]} for row in rows]
    for item, row in zip(items, rows, strict=True):
        if problem := row_problem(prompt(row), gold(row)):
            item["error"] = problem
    waiting = [index for index, item in enumerate(items) if "error" not in item]
    replies = replies_of(subject, [rendered(rows[index]) for index in waiting], max_new_tokens)
    asked: list[tuple[int, str]] = []
    for index, reply in zip(waiting, replies, strict=True):
        if reply is None:
            items[index]["error"] = "the prompt leaves no room for a reply"
        else:
            asked.append((index, reply))
    for item, row in zip(items, rows, strict=True):
        item["expected"] = str(gold(row))[:KEPT_CHARACTERS]
    scores = score([reply for _, reply in asked], [rows[index] for index, _ in asked]) if asked else []
    for (index, reply), found in zip(asked, scores, strict=True):
        items[index] |= {"scores": found, "reply": reply[:KEPT_CHARACTERS]}
        if not reply.strip():
            items[index]["empty"] = True
        elif "\ufffd" in reply:
            items[index]["damaged"] = True
    return items


def _chat(subject: Subject, key: str = "prompt") -> Callable[[Mapping], str]:
    from shared.models import chat_prompt

    return lambda row: chat_prompt(subject.tokenizer, [{"role": "user", "content": row[key]}])


# ------------------------------------------------------------------------------------------------------------ the tasks


def texts(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """Loss on held-out texts of the tiny world, each read from its beginning; "tokens" weigh it in the perplexity."""
    from reasoning_stage import solution_loss

    stream = tiny_world.documents(random.Random("held-out texts"), TEXT_KINDS, "held_out")
    drawn = [next(stream) for _ in range(settings["n"])]
    losses = solution_loss(subject.model, subject.tokenizer, [("", text) for text in drawn])
    counts = [len(ids) for ids in subject.tokenizer(drawn, add_special_tokens=False)["input_ids"]]
    rows = zip(drawn, losses, counts, strict=True)
    return [{"scores": {"loss": loss}, "tokens": n, "prompt": text[:KEPT_CHARACTERS]} for text, loss, n in rows]


def copying(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """Lab 00's probe: is a value that was just told given back?"""
    from attention_implementation import from_huggingface
    from base_probes import copy_accuracy

    model = from_huggingface(subject.model).to(subject.model.device)
    right = copy_accuracy(model, subject.tokenizer, settings["n"], seed=1)
    return [{"scores": {"right": float(flag)}} for flag in right]


def sums(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """Lab 00's probe as lab 03 asks it: is the result of a held-out sum the next word?"""
    from reasoning_stage import sum_accuracy

    right = sum_accuracy(subject.model, subject.tokenizer, settings["n"])
    return [{"scores": {"right": float(flag)}} for flag in right]


def schema(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """Lab 01's instructions about held-out people; `phrasing` held_out: in words that training never uses."""
    import schema_answers
    import train_sft

    def score(replies: list[str], rows: list) -> list[dict[str, float]]:
        results = schema_answers.score(replies, rows)
        return [{"valid": float(result.valid), "right": float(result.right)} for result in results]

    rows = train_sft.test_rows(settings["n"], settings["phrasing"])
    return ask_rows(
        subject, rows, prompt=lambda row: row["instruction"], rendered=_chat(subject, "instruction"),
        gold=lambda row: row["values"], score=score, max_new_tokens=REPLY_TOKENS,
    )  # fmt: skip


def questions(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """Lab 02's questions in words. The replies are kept whole: the persona is judged between two models."""
    from alignment_scores import facts_right
    from alignment_world import test_questions

    def score(replies: list[str], rows: list) -> list[dict[str, float]]:
        right = facts_right(replies, rows)
        return [
            {"right": float(flag), "words": float(len(reply.split()))}
            for flag, reply in zip(right, replies, strict=True)
        ]

    rows = test_questions(settings["n"])
    items = ask_rows(
        subject, rows, prompt=lambda row: row["prompt"], rendered=_chat(subject), gold=lambda row: row["value"],
        score=score, max_new_tokens=REPLY_TOKENS,
    )  # fmt: skip
    for item, row in zip(items, rows, strict=True):
        item["value"] = row["value"]
    return items


def attacks(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """Lab 02's harmful requests in wrappers never trained on. What complied is kept as a hash and a few letters."""
    from alignment_scores import attack_succeeded
    from alignment_world import test_requests
    from red_team_data import Attack
    from red_team_results import verdict
    from refusals import classify_reply

    traces: dict[str, Item] = {}

    def score(replies: list[str], rows: list) -> list[dict[str, float]]:
        found = []
        for reply, row, success in zip(replies, rows, attack_succeeded(replies), strict=True):
            talk = [{"role": "user", "content": row["prompt"]}]
            kept = verdict(Attack(row["wrapper"], talk, True, row["prompt"], "tiny", answer=row["output"]), reply)
            traces[row["prompt"]] = {name: kept[name] for name in ("served", "sha256", "characters", "opening")}
            found.append({"success": float(success), "degenerate": float(classify_reply(reply) == "degenerate")})
        return found

    rows = test_requests(settings["n"], True)
    items = ask_rows(
        subject, rows, prompt=lambda row: row["prompt"], rendered=_chat(subject), gold=lambda row: row["output"],
        score=score, max_new_tokens=REPLY_TOKENS,
    )  # fmt: skip
    for item, row in zip(items, rows, strict=True):
        item |= {"wrapper": row["wrapper"], **traces.get(row["prompt"], {})}
        for private in ("prompt", "reply", "expected"):
            item.pop(private, None)
    return items


def lookalikes(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """The same words with a harmless purpose, in the same wrappers: answered at all, and answered right?"""
    from alignment_scores import records_right, went_unanswered
    from alignment_world import test_requests

    def score(replies: list[str], rows: list) -> list[dict[str, float]]:
        pairs = zip(went_unanswered(replies), records_right(replies, rows), strict=True)
        return [{"unanswered": float(unanswered), "right": float(right)} for unanswered, right in pairs]

    return ask_rows(
        subject, test_requests(settings["n"], False), prompt=lambda row: row["prompt"], rendered=_chat(subject),
        gold=lambda row: row["output"], score=score, max_new_tokens=REPLY_TOKENS,
    )  # fmt: skip


def _reasoned(replies: Sequence[str], problems: Sequence[Mapping]) -> list[dict[str, float]]:
    from reasoning_stage import judge

    return [
        {
            "flexible": float(row.flexible), "strict": float(row.strict), "format": float(row.formatted),
            "words": float(len(row.reply.split())),
        }
        for row in judge(replies, problems)
    ]  # fmt: skip


def reasoning(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """Lab 03's held-out word problems. `shots` examples: as plain text in front, for a model that knows no conversation."""
    from reasoning_stage import continuations, few_shot_prompt
    from suite_rows import problems, worked_examples

    rows, shots = problems(settings), settings["shots"]
    if shots:
        examples = worked_examples(settings)
        prompts = [few_shot_prompt(row, examples) for row in rows]
        replies = continuations(subject.model, subject.tokenizer, prompts, settings["max_new_tokens"])
        items = []
        for row, reply, scores in zip(rows, replies, _reasoned(replies, rows), strict=True):
            shown = {"prompt": row["question"][:KEPT_CHARACTERS], "reply": reply[:KEPT_CHARACTERS]}
            items.append({"scores": scores, **shown, **({} if reply.strip() else {"empty": True})})
        return items
    from shared.models import chat_prompt

    return ask_rows(
        subject, rows, prompt=lambda row: row["question"],
        rendered=lambda row: chat_prompt(subject.tokenizer, row["prompt"]), gold=lambda row: row["answer"],
        score=_reasoned, max_new_tokens=settings["max_new_tokens"],
    )  # fmt: skip


def sampled_reasoning(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """`k` sampled answers a problem: the share that is right, and the chance that one of k is (flexible scoring)."""
    from reasoning_stage import ask, judge
    from shared.significance import pass_at_k
    from suite_rows import problems

    rows, k = problems(settings), settings["k"]
    repeated = [row for row in rows for _ in range(k)]
    replies = ask(subject.model, subject.tokenizer, repeated, settings["max_new_tokens"], 1.0, settings["seed"])
    right = [found.flexible for found in judge(replies, repeated)]
    items = []
    for index, row in enumerate(rows):
        count = sum(right[index * k : (index + 1) * k])
        scores = {"pass_1": pass_at_k(k, count, 1), "pass_k": pass_at_k(k, count, k)}
        items.append({"scores": scores, "prompt": row["question"][:KEPT_CHARACTERS], "right": count, "samples": k})
    return items


def calls(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """Lab 04's requests: is every call exact by the leaderboard's rules, and none made where none is right?"""
    from shared.models import chat_prompt
    from tool_data import test_rows
    from tool_stage import judge

    return ask_rows(
        subject, test_rows(settings["n"], settings["part"]), prompt=lambda row: row["messages"][-2]["content"],
        rendered=lambda row: chat_prompt(subject.tokenizer, row["messages"][:-1], row["tools"]),
        gold=lambda row: row["messages"][-1],
        score=lambda replies, rows: [{"exact": float(found.ok)} for found in judge(replies, rows)],
        max_new_tokens=settings["max_new_tokens"],
    )  # fmt: skip


def pairs(subject: Subject, settings: Mapping[str, Any]) -> list[Item]:
    """Lab 02's held-out pairs: does the preferred answer get the higher reward? The answers themselves are not kept."""
    from reward_model import pair_margins, test_pairs

    margins = pair_margins(subject.model, subject.tokenizer, test_pairs(settings["n"]))
    return [{"scores": {"right": float(margin > 0)}, "margin": round(margin, 3)} for margin in margins]


def contamination(_: None, settings: Mapping[str, Any]) -> list[Item]:
    """Is a test row a copy of what the stage was trained on: covered to 70 % or more by its runs of 13 words?"""
    from contamination import MOSTLY, overlap_report
    from stage_overlap import SHARED_WORDS, stage_texts

    tests, training, _ = stage_texts(settings["stage"], settings["profile"], settings["seed"])
    covered = overlap_report(tests, training, SHARED_WORDS).coverage
    return [
        {"scores": {}, "error": "nothing to compare"} if part is None else {"scores": {"copy": float(part >= MOSTLY)}}
        for part in covered
    ]
