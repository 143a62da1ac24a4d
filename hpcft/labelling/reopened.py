"""A published shard with a journal again, after its own was deleted, so that a later attempt goes on from what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcft.labelling.causes import Failure, Try
from hpcft.labelling.journal import Record, encode_line, journal_path
from hpcft.labelling.shard import FAILURES_FILE, SHARD_FILE, read_frames, read_shard
from hpcft.storage.atomic import read_json, write_bytes


def reopen_shard(folder: Path) -> None:
    """Write labels, relaxations, their frames and failures of a published shard into a journal.

    One that has a journal is left alone, and so is a folder without a shard. Of what a failed calculation printed no more
    comes back than the end that failures.json has.
    """
    if any(folder.glob("journal-*.jsonl")) or not (folder / SHARD_FILE).exists():
        return
    records = [*read_shard(folder), *read_frames(folder), *map(_failure, read_json(folder / FAILURES_FILE))]
    write_bytes(journal_path(folder, 0), b"".join(map(encode_line, records)))


def _failure(entry: Mapping[str, Any]) -> Record:
    return Record(
        result=Failure(entry["cause"], entry["message"], entry["output"]),
        atoms=None,
        tries=tuple(Try(**one) for one in entry["tries"]),
        **{name: entry[name] for name in ("index", "key", "kind", "wall_s", "attempt")},
    )
