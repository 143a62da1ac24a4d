"""What labelling costs beside the calculations themselves: python benchmarks/labelling.py [--json FILE] [--quick]

A measurement is a function of a scratch folder and of whether it is to be quick, which gives figures by their name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from timing import Found

from hpcft.labelling.shard import SHARD_FILE
from hpcft.labelling.store import LabelStore
from hpcft.storage.atomic import write_json

Measurement = Callable[[Path, bool], Found]

REPEATS = 5


def index_look_up(base: Path, quick: bool) -> Found:
    """Many keys in an index of as many, half of them in it; and a hundred keys, as one task asks for. No label is read."""
    count = 20_000 if quick else 1_000_000
    shards = count // 10_000
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
    for number in range(shards):
        shard = base / f"shard-{number}"
        shard.mkdir(parents=True)
        write_json(shard / SHARD_FILE, {"labels": keys[number::shards], "relaxations": []})
    store = LabelStore(base / "store")
    start = time.perf_counter()
    store.register_below(base)
    registered = time.perf_counter() - start
    unknown = [hashlib.sha256(f"new {number}".encode()).hexdigest() for number in range(count // 2)]
    many, few = [*keys[: count - len(unknown)], *unknown], [*keys[:50], *unknown[:50]]
    assert len(store.locate(many)) == count - len(unknown)
    assert len(store.locate(few)) == 50
    return {
        "index_lookup_million_s": _seconds(lambda: store.locate(many)) * 1e6 / count,
        "index_lookup_hundred_ms": _seconds(lambda: store.locate(few)) * 1e3,
        "index_register_million_s": registered * 1e6 / count,
    }


def _seconds(action: Callable[[], object]) -> float:
    """The least of several tries: other work on the machine only adds."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return min(taken)


MEASUREMENTS: tuple[Measurement, ...] = (index_look_up,)

AIMS = {"index_lookup_million_s": "1"}


def measure(measurements: Sequence[Measurement], quick: bool) -> Found:
    """All figures, each measurement in a scratch folder of its own."""
    found: Found = {"quick": quick, "cores": os.cpu_count()}
    for measurement in measurements:
        with tempfile.TemporaryDirectory(prefix="hpcft-labelling-") as base:
            found |= measurement(Path(base), quick)
    return found


def table_of(found: Found) -> Table:
    """A row per figure, beside what it is to stay below."""
    table = Table("what", "figure", "at most")
    for name, value in found.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value), AIMS.get(name, ""))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, as one object")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    options = parser.parse_args()
    found = measure(MEASUREMENTS, options.quick)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    Console().print(table_of(found))


if __name__ == "__main__":
    main()
