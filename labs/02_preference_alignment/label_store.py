"""What a labelling session needs of its database: pairs in, one pair at a time out, answers in, and everything out again.

    store = LabelStore("runs/labels.db", create=True)
    store.add_examples([{"prompt": "Hi", "response_a": "Hello!", "response_b": "Yes?"}])
    ana = store.labeler_of(store.add_labeler("ana"))
    task = store.next_task(ana)                                    # sides drawn here; no model's name leaves
    store.submit(ana, task.presentation_id, "a", confidence=4)     # the answer on the left
    store.preferences()                                            # in terms of response_a and response_b

Every change is a transaction that has the writing to itself (label_schema.Database.write), so that "this pair still wants a
label" is still true when the answer is written down, on SQLite as on PostgreSQL.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, case, exists, func, insert, or_, select, update
from sqlalchemy.orm import Session, aliased

from label_schema import CHOICES, Database, Example, Labeler, Preference, Presentation, preferred
from shared import LabsError

LONGEST_REASONING = 5000  # characters
EXAMPLE_FIELDS = ("prompt", "response_a", "response_b", "model_a", "model_b", "gold", "source")
LIVE = Preference.superseded_at.is_(None)
IS_CHECK = Example.gold.is_not(None)


@dataclass(frozen=True)
class Task:
    """All that a labeler may see of a pair, and how far they are: `done` of about `total` answers."""

    presentation_id: str
    prompt: str
    left: str
    right: str
    done: int
    total: int


class Conflict(LabsError):
    """The answer contradicts what is already written down."""


class UnknownPresentation(LabsError):
    """No presentation of this labeler has this identifier."""


def text_problem(text: Any) -> str | None:
    """Why a database could not keep this text, or None."""
    if not isinstance(text, str):
        return f"must be text, not {type(text).__name__}"
    if "\0" in text:
        return "holds a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half a surrogate pair, which is no character"
    return None


class LabelStore:
    """Everything about the database. Threads may share a store, and processes a database.

    `lease_seconds`: how long a shown pair is kept for its labeler. Of the pairs added through this object `overlap_share`
    are given to `overlap_raters` labelers each: decided by a hash with `seed`, so that importing again decides the same.
    About `check_share` of what a labeler gets are attention checks, while there are any left for them. `clock` tells the
    seconds since 1970. Raises LabsError for a database that cannot be reached, is not there (unless `create`) or has
    another schema version, and for settings out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        create: bool = False,
        lease_seconds: float = 600,
        overlap_share: float = 0.2,
        overlap_raters: int = 2,
        check_share: float = 0.1,
        seed: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        for name, share in (("overlap_share", overlap_share), ("check_share", check_share)):
            if not 0 <= share <= 1:
                raise LabsError(f"{name} {share} is no share: choose a number from 0 to 1")
        if overlap_raters < 2:
            raise LabsError(f"overlap_raters {overlap_raters}: an overlap takes at least 2 labelers")
        if not lease_seconds > 0:
            raise LabsError(f"lease_seconds {lease_seconds}: a labeler needs some time, 600 is usual")
        self.lease_seconds, self.clock, self.seed = lease_seconds, clock, seed
        self.overlap_share, self.overlap_raters, self.check_share = overlap_share, overlap_raters, check_share
        self.database = Database(url, create=create)

    def close(self) -> None:
        """Give the connections back."""
        self.database.close()

    # ------------------------------------------------------------------------------------------- labelers and examples
    def add_labeler(self, name: str) -> str:
        """A new token for this labeler, to be shown once: only its SHA-256 is kept. An older token of the name ends."""
        if text_problem(name) or not 1 <= len(name.strip()) <= 100 or not name.isprintable():
            raise LabsError(f"labeler name {name!r}: write a name of 1 to 100 printable characters")
        token = secrets.token_urlsafe(24)
        with self.database.write() as session:
            labeler = session.scalar(select(Labeler).where(Labeler.name == name.strip()))
            if labeler:
                labeler.token_hash = _sha256(token)
            else:
                session.add(Labeler(name=name.strip(), token_hash=_sha256(token), created_at=self.clock()))
        return token

    def labeler_of(self, token: str | None) -> int | None:
        """The labeler with this token. It is found by its hash, so how long that takes tells nothing about the token."""
        if not token or text_problem(token):
            return None
        with self.database.read() as session:
            return session.scalar(select(Labeler.id).where(Labeler.token_hash == _sha256(token)))

    def labelers(self) -> list[str]:
        """The names, in the order they were added."""
        with self.database.read() as session:
            return list(session.scalars(select(Labeler.name).order_by(Labeler.id)))

    def add_examples(self, rows: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
        """(added, already there) of checked rows with EXAMPLE_FIELDS; all of them or, after an error, none."""
        new, known = [], 0
        with self.database.write() as session:
            hashes = set(session.scalars(select(Example.content_hash)))
            for row in rows:
                values = {field: row.get(field) for field in EXAMPLE_FIELDS}
                # `gold` and `source` do not make it another pair.
                digest = _sha256(json.dumps([values[field] for field in EXAMPLE_FIELDS[:5]]))
                if digest in hashes:
                    known += 1
                    continue
                hashes.add(digest)
                overlap = random.Random(f"{self.seed} overlap {digest}").random() < self.overlap_share
                raters = 0 if values["gold"] else self.overlap_raters if overlap else 1
                new.append({**values, "content_hash": digest, "raters": raters, "missing": raters})
            if new:
                session.execute(insert(Example), new)
        return len(new), known

    # ----------------------------------------------------------------------------------------------------------- tasks
    def next_task(self, labeler_id: int) -> Task | None:
        """The pair that this labeler has open, with the same sides as before, or another; None when there is none.

        Pairs come in the order of import, so one that its labelers disagree on comes before those not yet labelled.
        """
        with self.database.write() as session:
            now, free = self.clock(), _free(labeler_id, self.clock())
            answered = exists().where(Preference.presentation_id == Presentation.id, LIVE)
            query = select(Presentation).join(Example).where(Presentation.labeler_id == labeler_id, ~answered)
            shown = session.scalar(
                query.where(or_(Presentation.lease_until > now, IS_CHECK, free))
                .order_by(Presentation.lease_until.is_(None), Presentation.presented_at.desc())
                .limit(1)
            )
            if shown:
                expired = shown.lease_until is None or shown.lease_until <= now
                return self._lease(session, shown, restart=expired)
            example = self._choose(session, labeler_id, free)
            if example is None:
                return None
            side = random.Random(f"{self.seed} sides {labeler_id} {example.content_hash}").choice("ab")
            shown = Presentation(
                id=uuid.uuid4().hex, example_id=example.id, labeler_id=labeler_id, left_is=side, presented_at=now
            )
            session.add(shown)
            return self._lease(session, shown, restart=True)

    def _choose(self, session: Session, labeler_id: int, free: ColumnElement) -> Example | None:
        """An example that this labeler has not seen; a check now and then, by a draw that an order of calls cannot move."""
        seen = select(Presentation.example_id).where(Presentation.labeler_id == labeler_id)
        new = select(Example).where(Example.id.not_in(seen)).order_by(Example.id).limit(1)
        pair = session.scalar(new.where(Example.missing > 0, free))
        number = session.scalar(select(func.count()).select_from(seen.subquery()))
        draw = random.Random(f"{self.seed} check {labeler_id} {number}").random()
        only_checks = not session.scalar(select(exists().where(~IS_CHECK)))  # a file to test labelers with
        if only_checks or (pair and draw < self.check_share):
            return session.scalar(new.where(IS_CHECK)) or pair
        return pair

    def _lease(self, session: Session, shown: Presentation, restart: bool) -> Task:
        """Make this the labeler's open task, and the only one; with `restart` its time is measured from now on."""
        mine = update(Presentation).where(Presentation.labeler_id == shown.labeler_id, Presentation.id != shown.id)
        session.execute(mine.values(lease_until=None))
        now = self.clock()
        shown.lease_until = now + self.lease_seconds
        shown.presented_at = now if restart else shown.presented_at
        session.flush()
        example = session.get_one(Example, shown.example_id)
        answers = (example.response_a, example.response_b)
        sides = answers if shown.left_is == "a" else answers[::-1]
        return Task(shown.id, example.prompt, *sides, *self._progress(session, shown.labeler_id))

    def progress(self, labeler_id: int) -> tuple[int, int]:
        """(answers given, about how many it will be for this labeler: others may take some of them)."""
        with self.database.read() as session:
            return self._progress(session, labeler_id)

    def _progress(self, session: Session, labeler_id: int) -> tuple[int, int]:
        answered = select(Preference.example_id).where(Preference.labeler_id == labeler_id, LIVE)
        leased = and_(Presentation.labeler_id == labeler_id, Presentation.lease_until.is_not(None))
        is_open = Example.id.in_(select(Presentation.example_id).where(leased))
        left = Example.id.not_in(answered)
        conditions = (
            ~left,
            left & ~IS_CHECK & or_(Example.missing > 0, is_open),
            left & IS_CHECK,
            is_open & IS_CHECK,
            ~IS_CHECK,
        )
        sums = (func.coalesce(func.sum(case((condition, 1), else_=0)), 0) for condition in conditions)
        done, pairs, checks, open_checks, all_pairs = map(int, session.execute(select(*sums)).one())
        if all_pairs:  # otherwise every check is shown
            share = min(self.check_share, 0.999)
            checks = min(checks, max(open_checks, round(pairs * share / (1 - share))))
        return done, done + pairs + checks

    # --------------------------------------------------------------------------------------------------------- answers
    def submit(
        self, labeler_id: int, presentation_id: str, choice: str, confidence: int = 3, reasoning: str = ""
    ) -> dict[str, Any]:
        """Write an answer down → {"presentation_id", "choice", "confidence", "seconds", "repeated"}.

        The same answer posted again is not written again (`repeated`). `seconds` runs by the server's clock, from showing to
        posting. Raises Conflict for another answer to an answered pair, and when the time ran out and others have given the
        pair its labels; UnknownPresentation; LabsError for a choice, confidence or reasoning that cannot be one.
        """
        if choice not in CHOICES:
            raise LabsError(f"choice {choice!r}: use one of {', '.join(CHOICES)}")
        if isinstance(confidence, bool) or not isinstance(confidence, int) or not 1 <= confidence <= 5:
            raise LabsError(f"confidence {confidence!r}: use a whole number from 1 (a guess) to 5 (certain)")
        trouble = text_problem(reasoning) or (len(reasoning) > LONGEST_REASONING and "is too long")
        if trouble:
            raise LabsError(f"reasoning {trouble}: write at most {LONGEST_REASONING} characters of text, or nothing")
        answer = {"presentation_id": presentation_id, "choice": choice, "confidence": confidence}
        with self.database.write() as session:
            now = self.clock()
            shown = None if text_problem(presentation_id) else session.get(Presentation, presentation_id)
            if shown is None or shown.labeler_id != labeler_id:
                raise UnknownPresentation(
                    f"no pair {presentation_id!r} was shown to this labeler: ask for the next task"
                )
            given = session.scalar(select(Preference).where(Preference.presentation_id == shown.id, LIVE))
            if given:
                if (given.choice, given.confidence, given.reasoning) != (choice, confidence, reasoning):
                    raise Conflict(
                        f"this pair is already answered ({given.choice}): take that answer back to change it"
                    )
                return {**answer, "seconds": given.seconds, "repeated": True}
            example = session.get_one(Example, shown.example_id)
            if (shown.lease_until is None or shown.lease_until <= now) and example.gold is None and not example.missing:
                raise Conflict("the time for this pair ran out and others have labelled it: ask for the next task")
            seconds = max(0.0, now - shown.presented_at)
            keys = {"example_id": example.id, "labeler_id": labeler_id}
            session.add(Preference(**answer, **keys, reasoning=reasoning, seconds=seconds, created_at=now))
            shown.lease_until = None
            session.flush()
            _count_labels(session, example)
            return {**answer, "seconds": seconds, "repeated": False}

    def undo(self, labeler_id: int) -> Task | None:
        """Take this labeler's last answer back: it is kept as history, and its pair is open again with the same sides."""
        with self.database.write() as session:
            mine = select(Preference).where(Preference.labeler_id == labeler_id, LIVE)
            last = session.scalar(mine.order_by(Preference.id.desc()).limit(1))
            if last is None:
                return None
            last.superseded_at = self.clock()
            session.flush()
            _count_labels(session, session.get_one(Example, last.example_id))
            return self._lease(session, session.get_one(Presentation, last.presentation_id), restart=True)

    # --------------------------------------------------------------------------------------------------------- reading
    def preferences(self) -> list[dict[str, Any]]:
        """Live answers in the order they were given, a row each: EXAMPLE_FIELDS, "example_id", "raters", "labeler" (name),
        "preferred" ("a" = response_a, "b" = response_b, "tie", "both_bad", "skip"), "confidence", "reasoning", "seconds",
        "left_was" ("a" or "b": the response that stood left).
        """
        query = select(Preference, Example, Labeler.name, Presentation.left_is).select_from(Preference).where(LIVE)
        query = query.join(Presentation, Preference.presentation_id == Presentation.id)
        query = query.join(Example, Preference.example_id == Example.id)
        query = query.join(Labeler, Preference.labeler_id == Labeler.id).order_by(Preference.id)
        with self.database.read() as session:
            return [
                {
                    **{field: getattr(example, field) for field in (*EXAMPLE_FIELDS, "raters")},
                    **{field: getattr(answer, field) for field in ("example_id", "confidence", "reasoning", "seconds")},
                    "labeler": name,
                    "preferred": preferred(answer.choice, left_is),
                    "left_was": left_is,
                }
                for answer, example, name, left_is in session.execute(query)
            ]

    def counts(self) -> dict[str, int]:
        """How many: examples (of these checks, overlap, and open: labels wanted), labelers, presentations, live and
        superseded preferences."""
        conditions = {
            "examples": (Example, True),
            "checks": (Example, IS_CHECK),
            "overlap": (Example, Example.raters > 1),
            "open": (Example, Example.missing > 0),
            "labelers": (Labeler, True),
            "presentations": (Presentation, True),
            "live": (Preference, LIVE),
            "superseded": (Preference, ~LIVE),
        }
        with self.database.read() as session:
            return {
                name: session.scalar(select(func.count()).select_from(table).where(condition))
                for name, (table, condition) in conditions.items()
            }


def _free(labeler_id: int, now: float) -> ColumnElement:
    """Whether an example wants more labels than other labelers are busy giving."""
    other = aliased(Presentation)
    busy = select(func.count()).where(
        other.example_id == Example.id, other.labeler_id != labeler_id, other.lease_until > now
    )
    return Example.missing > busy.correlate(Example).scalar_subquery()


def _count_labels(session: Session, example: Example) -> None:
    """Work out how many labels an example still wants: one more than planned when those that it has disagree.

    A skip is no label: the pair goes to somebody else instead.
    """
    given = select(Preference.choice, Presentation.left_is).join(Presentation)
    rows = session.execute(given.where(Preference.example_id == example.id, LIVE, Preference.choice != "skip"))
    labels = [preferred(choice, left_is) for choice, left_is in rows]
    wanted = example.raters
    if len(set(labels)) > 1 and len(labels) >= wanted > 0:
        wanted = max(2, wanted) + 1
    example.missing = max(0, wanted - len(labels))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
