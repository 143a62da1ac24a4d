"""Finding a label again that was paid for once, in whatever round or campaign.

A store is a folder with one small JSON file per registered shard, replaced in one step; so any number of
processes read and register without a lock. The labels stay in their shards.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpcft.errors import UserError
from hpcft.labelling.journal import Record
from hpcft.labelling.shard import SHARD_FILE, read_shard
from hpcft.storage.atomic import read_json, write_json

log = logging.getLogger(__name__)


class LabelStore:
    """All finished shards that were registered in a folder, on their own or found below another folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def register(self, shard: Path) -> None:
        """Add a finished shard, or what it gained since; UserError if it was never finished."""
        shard = shard.resolve()
        if not (shard / SHARD_FILE).is_file():
            raise UserError(
                f"{shard} has no {SHARD_FILE}, so it is no finished shard; call finish_shard on it first."
            )
        contents = read_json(shard / SHARD_FILE)
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {
            "path": str(shard),
            "relative_path": os.path.relpath(shard, self.folder.resolve()),
            "keys": sorted({*contents["labels"], *contents["relaxations"]}),
        }
        name = hashlib.sha256(str(shard).encode()).hexdigest()[:32]
        write_json(self.folder / f"shard-{name}.json", entry)

    def register_below(self, folder: Path) -> int:
        """Register every finished shard below a folder; returns how many there are."""
        shards = sorted(path.parent for path in folder.rglob(SHARD_FILE))
        for shard in shards:
            self.register(shard)
        return len(shards)

    def find(self, keys: Iterable[str]) -> dict[str, Record]:
        """The records of those keys that some registered shard holds.

        A shard that has been moved away or damaged is passed over with a warning: its labels count as
        unknown.
        """
        missing = set(keys)
        found: dict[str, Record] = {}
        for entry in self._entries():
            if missing.isdisjoint(entry["keys"]):
                continue
            for record in self._read(entry):
                if record.key in missing:
                    found[record.key] = record
                    missing.discard(record.key)
        return found

    def _entries(self) -> Iterable[Any]:
        for path in sorted(self.folder.glob("shard-*.json")):
            yield read_json(path)

    def _read(self, entry: Any) -> list[Record]:
        # First beside the store, where both were moved or copied together; then where it was registered.
        places = [self.folder.resolve() / entry["relative_path"], Path(entry["path"])]
        place = next((place for place in places if (place / SHARD_FILE).is_file()), None)
        if place is None:
            log.warning(
                "%s, which the label store %s lists, is gone; its labels count as unknown",
                entry["path"],
                self.folder,
            )
            return []
        try:
            return read_shard(place)
        except UserError as error:
            log.warning(
                "a shard of the label store %s cannot be read, so its labels count as unknown: %s",
                self.folder,
                error,
            )
            return []
