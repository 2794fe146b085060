"""The tables of the labelling app and the way to open them: SQLite in a file, or PostgreSQL by URL, with one schema.

Sides: `response_a` and `response_b` are the two answers as they were imported. A presentation says which of them stood on
the left for one labeler (`left_is`); a preference keeps the key that was pressed ("a" is the left answer as shown). What
was meant is `preferred(choice, left_is)`, and it is worked out in that one place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import ForeignKey, Index, create_engine, event, exc, inspect, make_url, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from shared import LabsError

SCHEMA_VERSION = 1
CHOICES = ("a", "b", "tie", "both_bad", "skip")
LOCK_KEY = 0x6C616273  # "labs": PostgreSQL's advisory locks are numbers


def preferred(choice: str, left_is: str) -> str:
    """The answer in terms of response_a and response_b, from the key pressed and the response that stood left."""
    if choice not in ("a", "b") or left_is == "a":
        return choice
    return "b" if choice == "a" else "a"


class Base(DeclarativeBase):
    pass


class SchemaInfo(Base):
    __tablename__ = "schema_info"
    version: Mapped[int] = mapped_column(primary_key=True)


class Example(Base):
    """A pair to judge. `gold` makes it an attention check. `missing` labels are still wanted: it follows from the live
    preferences, and is kept so that the next example is found without counting all of them."""

    __tablename__ = "examples"
    id: Mapped[int] = mapped_column(primary_key=True)
    content_hash: Mapped[str] = mapped_column(unique=True)
    prompt: Mapped[str]
    response_a: Mapped[str]
    response_b: Mapped[str]
    model_a: Mapped[str | None]
    model_b: Mapped[str | None]
    source: Mapped[str | None]
    gold: Mapped[str | None]
    raters: Mapped[int]
    missing: Mapped[int]
    __table_args__ = tuple(
        Index(f"examples_{name}", "id", sqlite_where=text(rule), postgresql_where=text(rule))
        for name, rule in (("open", "missing > 0"), ("checks", "gold IS NOT NULL"))
    )


class Labeler(Base):
    __tablename__ = "labelers"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    token_hash: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]


class Presentation(Base):
    """An example as one labeler sees it, always with the same sides. Times are seconds of the server's Unix clock.

    While `lease_until` is set, it is the labeler's open task; nobody else gets the example before that moment.
    """

    __tablename__ = "presentations"
    id: Mapped[str] = mapped_column(primary_key=True)
    example_id: Mapped[int] = mapped_column(ForeignKey("examples.id"))
    labeler_id: Mapped[int] = mapped_column(ForeignKey("labelers.id"))
    left_is: Mapped[str]
    presented_at: Mapped[float]
    lease_until: Mapped[float | None]
    __table_args__ = (
        Index("presentations_once", "example_id", "labeler_id", unique=True),
        Index(
            "presentations_one_open",
            "labeler_id",
            unique=True,
            sqlite_where=text("lease_until IS NOT NULL"),
            postgresql_where=text("lease_until IS NOT NULL"),
        ),
    )


class Preference(Base):
    """An answer. An undone one stays, with the moment in `superseded_at`; only live ones (NULL) count."""

    __tablename__ = "preferences"
    id: Mapped[int] = mapped_column(primary_key=True)
    presentation_id: Mapped[str] = mapped_column(ForeignKey("presentations.id"))
    example_id: Mapped[int] = mapped_column(ForeignKey("examples.id"), index=True)
    labeler_id: Mapped[int] = mapped_column(ForeignKey("labelers.id"))
    choice: Mapped[str]
    confidence: Mapped[int]
    reasoning: Mapped[str]
    seconds: Mapped[float]
    created_at: Mapped[float]
    superseded_at: Mapped[float | None]
    __table_args__ = tuple(
        Index(
            name,
            *columns,
            unique=True,
            sqlite_where=text("superseded_at IS NULL"),
            postgresql_where=text("superseded_at IS NULL"),
        )
        for name, columns in (
            ("preferences_one_live", ("labeler_id", "example_id")),
            ("preferences_one_answer", ("presentation_id",)),
        )
    )


class DatabaseUnavailable(LabsError):
    """The database does not answer (any more)."""


class Database:
    """Transactions on an opened database of the right schema version.

    `url` is a path or `sqlite:///path` (SQLite), or `postgresql+psycopg://user@host/name`. With `create` a missing file
    or missing tables are made. Raises LabsError, in one line, for a database that cannot be opened or is of another
    schema version.
    """

    def __init__(self, url: str | Path, *, create: bool = False):
        self.engine = create_engine(**_engine_settings(str(url), create))
        self.name = self.engine.url.render_as_string(hide_password=True)
        self.sqlite = self.engine.dialect.name == "sqlite"
        # SQLite has one writer at a time. Waiting in line here is fair; its own waiting sleeps and tries again.
        self._writer = threading.Lock()
        if self.sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        try:
            with self.write() if create else self.read() as session:
                self._check_schema(session, create)
        except BaseException:
            self.close()
            raise

    def _check_schema(self, session: Session, create: bool) -> None:
        tables = set(inspect(session.connection()).get_table_names())
        wanted = set(Base.metadata.tables)
        if create and not tables & wanted:
            Base.metadata.create_all(session.connection())
            session.add(SchemaInfo(version=SCHEMA_VERSION))
            return
        if not wanted & tables:
            raise LabsError(f"{self.name} holds no labels yet: `labs label import FILE` fills it")
        version = session.get(SchemaInfo, SCHEMA_VERSION) if "schema_info" in tables else None
        if version is None or not wanted <= tables:
            found = session.scalar(text("SELECT max(version) FROM schema_info")) if "schema_info" in tables else None
            raise LabsError(
                f"{self.name} has schema version {found}, this program wants {SCHEMA_VERSION}: export the labels with the "
                "version of the labs that made it, or choose another --database"
            )

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads."""
        with self._errors(), Session(self.engine) as session, session.begin():
            session.connection(execution_options={"read_only": True})
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that has the writing to itself, so that what it counts stays true until it is over.

        People answer every few seconds: one writer at a time is no limit, and it makes both databases behave alike.
        """
        with self._errors(), self._writer, Session(self.engine) as session, session.begin():
            if not self.sqlite:
                session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
            yield session

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (exc.OperationalError, exc.InterfaceError, exc.DatabaseError, exc.TimeoutError) as error:
            if isinstance(error, exc.DBAPIError) and isinstance(error, exc.IntegrityError | exc.ProgrammingError):
                raise  # a defect of this program, not of the database
            reason = " ".join(str(getattr(error, "orig", None) or error).split())
            what = "check the path and its rights" if self.sqlite else "start the server, or check --database"
            raise DatabaseUnavailable(f"cannot use the database {self.name} ({reason}); {what}") from error

    def close(self) -> None:
        self.engine.dispose()


def _engine_settings(url: str, create: bool) -> dict:
    if "://" not in url:
        url = f"sqlite:///{url}"
    for short in ("postgres://", "postgresql://"):
        if url.startswith(short):
            url = "postgresql+psycopg://" + url.removeprefix(short)
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        parsed = None
    backend = parsed and parsed.get_backend_name()
    if backend == "sqlite" and parsed.database not in (None, "", ":memory:"):
        path = Path(parsed.database)
        if not path.exists() and not create:
            raise LabsError(f"there is no database {path}: `labs label import FILE` makes it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabsError(f"cannot make {path.parent}: {error.strerror}; choose another --database") from error
        return {"url": parsed, "connect_args": {"timeout": 60}, "pool_size": 8, "max_overflow": 40}
    if backend == "postgresql" and parsed.drivername == "postgresql+psycopg":
        settings = {"pool_pre_ping": True, "pool_size": 8, "max_overflow": 40}
        return {"url": parsed, "connect_args": {"connect_timeout": 5}, **settings}
    # Unread, the text may hold a password anywhere: only its beginning is repeated.
    shown = parsed.render_as_string(hide_password=True) if parsed else f"{url.split('://')[0]}://…"
    raise LabsError(f"--database {shown}: give a path (SQLite) or postgresql+psycopg://user:password@host/name")


def _prepare_sqlite(connection, _record) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes late; _begin_sqlite sends the right one
    for pragma in ("journal_mode = WAL", "foreign_keys = ON", "busy_timeout = 60000", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection) -> None:
    reading = connection.get_execution_options().get("read_only")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
