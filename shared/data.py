"""Load the labs' data sets: three sources, the same rows whichever they come from; and make an offline mirror.

A set is read from the folder LABS_DATA_DIR names (a mirror, made by `labs data fetch`), else from its pinned source on
the hub where LABS_ALLOW_HUB=1, else from a seeded generator, so that nothing needs a network. Gold rows are never
altered: a row with a missing or wrong field is an error that names file, row and field.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared import LabsError
from shared.data_registry import DATASETS, DatasetSpec, generated_play, spec_of
from shared.training import atomic_write_text, progress

__all__ = [
    "DATASETS",
    "DatasetSpec",
    "fetch",
    "first_rows",
    "generated_play",
    "load_rows",
    "load_text",
    "normalise",
    "spec_of",
]

MANIFEST = "MANIFEST.json"
SOURCES = ("auto", "mirror", "hub", "generated")
GENERATED_ROWS = {"train": 3000}


def load_rows(
    name: str, split: str = "train", source: str = "auto", limit: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """The rows of one split, every row with the registry's columns and no other.

    `source`: "mirror" (LABS_DATA_DIR), "hub", "generated", or "auto": the first that there is. `limit` takes that many
    rows, drawn with `seed`. Raises LabsError naming file, row and field.
    """
    return _some(_rows(spec_of(name, split), split, source, _mirror_folder())[0], limit, seed)


def first_rows(
    name: str, splits: Sequence[str], limit: int | None = None, seed: int = 0
) -> tuple[list[dict[str, Any]], str, str]:
    """(rows, split, source) of the first of `splits` that the mirror has a file of; where it has none, of `splits[0]`.

    For a set of which a mirror may hold one part only: real rows of another split are better than generated ones of the
    right split. The source is "mirror", "hub" or "generated"; `limit` and `seed` as in `load_rows`.
    """
    mirror = _mirror_folder()
    specs = {split: spec_of(name, split) for split in splits}
    there = [split for split in splits if mirror and (mirror / specs[split].files[split]).exists()]
    split = there[0] if there else splits[0]
    rows, used = _rows(specs[split], split, "auto", mirror)
    return _some(rows, limit, seed), split, used


def _some(rows: list[dict], limit: int | None, seed: int) -> list[dict]:
    if limit is None or limit >= len(rows):
        return rows
    import random

    return random.Random(seed).sample(rows, limit)


def load_text(name: str, source: str = "auto") -> tuple[str, str]:
    """The text of a set that is one long text, and the source that it came from ("mirror", "hub" or "generated")."""
    spec = spec_of(name, "train")
    if set(spec.columns) != {"text"}:
        raise LabsError(f"data set {name} is made of rows, not of one text: use load_rows")
    rows, used = _rows(spec, "train", source, _mirror_folder())
    return "".join(row["text"] for row in rows), used


def _mirror_folder() -> Path | None:
    folder = os.environ.get("LABS_DATA_DIR")
    return Path(folder) if folder else None


def _rows(spec: DatasetSpec, split: str, source: str, mirror: Path | None) -> tuple[list[dict], str]:
    if source not in SOURCES:
        raise LabsError(f"source {source!r}: choose one of {', '.join(SOURCES)}")
    path = mirror / spec.files[split] if mirror else None
    if source == "mirror" or (source == "auto" and path is not None and path.exists()):
        if path is None:
            raise LabsError("LABS_DATA_DIR is not set: make a mirror with `labs data fetch FOLDER`, then set it")
        content = _content(path)
        used = _verify(path, content, mirror)
        numbered, where = _parse(content, path.name, str(path)), str(path)
    elif source == "hub" or (source == "auto" and os.environ.get("LABS_ALLOW_HUB") == "1" and spec.revision):
        numbered, where, used = _read_hub(spec, split), spec.hub_id or spec.source, "hub"
    elif spec.fallback is not None:
        numbered = enumerate(spec.fallback(split, GENERATED_ROWS.get(split, 400)), 1)
        where, used = f"generated {spec.name}", "generated"
    else:
        step = "LABS_ALLOW_HUB=1, or " if spec.revision else ""
        raise LabsError(f"no data set {spec.name} here: set {step}LABS_DATA_DIR to a folder with {spec.files[split]}")
    return [normalise(spec, row, f"{where}, row {index}", split) for index, row in numbered], used


def normalise(spec: DatasetSpec, row: Any, where: str, split: str = "train") -> dict[str, Any]:
    """Exactly the registry's columns, each of its type. Raises LabsError naming the place and the field."""
    if not isinstance(row, Mapping):
        raise LabsError(f"{where}: not an object with fields; repair or fetch the file again")
    columns = spec.columns_of(split)
    for column, kind in columns.items():
        if column not in row:
            raise LabsError(f"{where}: field {column!r} is missing; repair or fetch the file again")
        if not isinstance(row[column], kind) or (kind is int and isinstance(row[column], bool)):
            raise LabsError(f"{where}: field {column!r} must be {kind.__name__}, not {type(row[column]).__name__}")
    return {column: row[column] for column in columns}


# ------------------------------------------------------------------------------------------------------------ reading


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise LabsError(f"{path} is not there: fetch it with `labs data fetch FOLDER`") from None
    except OSError as error:
        raise LabsError(f"cannot read {path}: {error.strerror}; check its permissions") from None


def _parse(content: bytes, name: str, where: str) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a .txt (one row), .csv or JSON-lines file, gzipped or not; `name` tells which."""
    try:
        text = (gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:  # not gzip, cut short, not UTF-8
        raise LabsError(f"cannot read {where}: {error}; fetch the file again") from None
    if name.endswith(".txt"):
        yield 1, {"text": text}
    elif name.endswith(".csv"):
        yield from enumerate(csv.DictReader(io.StringIO(text, newline="")), 1)
    else:
        for index, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 inside a string
            if line.strip():
                try:
                    yield index, json.loads(line)
                except json.JSONDecodeError as error:
                    raise LabsError(f"{where}, row {index}: not JSON ({error.msg}); repair or fetch it again") from None


def _read_hub(spec: DatasetSpec, split: str) -> Iterator[tuple[int, Any]]:
    if spec.revision is None:
        raise LabsError(f"data set {spec.name} has no pinned source: set LABS_DATA_DIR to a folder that holds it")
    if spec.repository_files:
        url = f"https://raw.githubusercontent.com/{spec.source}/{spec.revision}/{spec.repository_files[split]}"
        yield from _parse(_download(url), url, url)
        return
    from datasets import load_dataset

    try:
        rows = load_dataset(
            spec.hub_id,
            spec.hub_config,
            data_dir=spec.hub_folder,
            split=spec.hub_split or split,
            revision=spec.revision,
        )
    except Exception as error:  # the client raises many kinds of error; the user needs one line and a next step
        gated = "gated" in str(error).lower() or "401" in str(error)
        step = "accept its terms on its hub page and log in with `hf auth login`" if gated else "go online"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LabsError(f"cannot load {spec.hub_id} from the hub ({reason}): {step}, or set LABS_DATA_DIR") from None
    column, kept = spec.hub_rows or (None, ())
    for index, row in enumerate(rows, 1):
        if column is None or row.get(column) in kept:
            yield index, {**row, **{ours: row[theirs] for ours, theirs in spec.hub_columns.items() if theirs in row}}


def _download(url: str) -> bytes:
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=60) as answer:
            return answer.read()
    except OSError as error:
        raise LabsError(f"cannot load {url} ({error}): go online, or set LABS_DATA_DIR") from None


# ------------------------------------------------------------------------------------------------------------- mirror


def _manifest(folder: Path) -> dict[str, dict]:
    """The entries of a mirror's MANIFEST.json by file; none where there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        raise LabsError(f"{path} is damaged: delete it and run `labs data fetch {folder}` again") from None
    return files


def _verify(path: Path, content: bytes, folder: Path) -> str:
    """Hold a mirrored file against the manifest, where there is one, and tell "mirror" from "generated" rows."""
    entry = _manifest(folder).get(path.relative_to(folder).as_posix())
    if entry is None:
        return "mirror"
    if entry["sha256"] != hashlib.sha256(content).hexdigest():
        raise LabsError(f"{path} is not as it was fetched (checksum): run `labs data fetch {folder}` again")
    return "generated" if entry["source"] == "generated" else "mirror"


def fetch(destination: str | Path, names: Sequence[str] | None = None, source: str = "auto") -> Path:
    """Write an offline mirror for a classroom: the files of LABS_DATA_DIR's layout and a MANIFEST.json of checksums.

    "auto" copies from LABS_DATA_DIR where that is another folder, else loads the pinned source; it never passes
    generated rows off as the real set: ask for source "generated" to get those. Files that are whole are kept, so an
    interrupted fetch goes on where it stopped. Without `names`, a set that no source has is skipped and said; with
    `names` that is a LabsError. Returns the folder.
    """
    folder = Path(destination)
    chosen = [spec_of(name) for name in names or DATASETS]
    files = _manifest(folder)
    mirror = _mirror_folder()
    if mirror and mirror.resolve() == folder.resolve():
        mirror = None  # a damaged file must not be repaired with itself
    for spec in progress(chosen, "fetching"):
        for split, relative in spec.files.items():
            target, entry = folder / relative, files.get(relative)
            if entry and target.exists() and hashlib.sha256(_content(target)).hexdigest() == entry["sha256"]:
                continue
            copied = source == "auto" and mirror is not None and (mirror / relative).exists()
            try:
                rows, used = _rows(spec, split, "mirror" if copied else "hub" if source == "auto" else source, mirror)
            except LabsError as error:
                if names:
                    raise
                print(f"skipped {spec.name}, {split}: {error}")
                continue
            content = _encode(rows, list(spec.columns_of(split)), target.name)
            _write_bytes(target, content)
            files[relative] = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
                "rows": len(rows),
                "licence": spec.licence,
                "revision": spec.revision if used == "hub" else None,
                "source": "generated" if used == "generated" else spec.source,
            }
            atomic_write_text(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")
    if not files:
        raise LabsError("nothing could be fetched: go online, or set LABS_DATA_DIR to a folder to copy from")
    return folder


def _encode(rows: Sequence[Mapping], columns: Sequence[str], name: str) -> bytes:
    """Rows in the format that the file's name tells; the same rows give the same bytes."""
    if name.endswith(".txt"):
        return "".join(row["text"] for row in rows).encode()
    buffer = io.StringIO(newline="")
    if name.endswith(".csv"):
        writer = csv.DictWriter(buffer, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    else:
        buffer.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = buffer.getvalue().encode()
    return gzip.compress(content, mtime=0) if name.endswith(".gz") else content


def _write_bytes(target: Path, content: bytes) -> None:
    part = target.with_name(f".{target.name}.part")  # renamed when complete, so that a kill leaves no half a file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        reason = error.strerror or error
        raise LabsError(f"cannot write {target}: {reason}; free the space or choose another folder") from None
