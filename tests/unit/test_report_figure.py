"""The figure and the table that a campaign ends with, also where something was not measured."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from rich.console import Console

from hpcft.report.figure import write_figure
from hpcft.report.results import DIGITS, METRICS, RoundResult, shown
from hpcft.report.table import label_notes, relaxation_notes, relaxations_table, results_table

NAN = float("nan")
FULL = {
    "energy_bias_meV_per_atom": {"value": -280.3, "low": -300.0, "high": -260.0},
    "force_slope": {"value": 0.19, "low": 0.15, "high": 0.25},
    "force_mae_meV_per_A": {"value": 1401.0, "low": 1300.0, "high": 1500.0},
    "delta_q": {"value": 36.6, "low": NAN, "high": NAN},
}


def result(number: int, metrics: Mapping[str, Mapping[str, float]], exploded: int = 0) -> RoundResult:
    return RoundResult(number, metrics, 32 * number, 16 * (number + 1), 4, 0, exploded, 100)


def without(*names: str) -> dict[str, Any]:
    return {name: metric for name, metric in FULL.items() if name not in names}


CASES: dict[str, list[RoundResult]] = {
    "all measured": [result(0, FULL), result(1, FULL)],
    "no relaxations": [result(0, without("delta_q")), result(1, without("delta_q"))],
    "a round in which every replica exploded": [result(0, without(*FULL)), result(1, FULL)],
    "one round": [result(0, FULL)],
    "nothing yet": [],
    "a value outside of its own interval": [
        result(0, {"force_slope": {"value": 1.0, "low": 1.1, "high": 1.2}})
    ],
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Those that are saved in this test."""
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


@pytest.mark.parametrize("results", CASES.values(), ids=CASES)
def test_the_figure_is_a_png_with_four_panels(
    tmp_path: Path, figures: list[matplotlib.figure.Figure], results: list[RoundResult]
) -> None:
    path = tmp_path / "bias.png"
    write_figure(results, path, "quickstart", 0.95)
    (figure,) = figures
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == [f"{label} ({unit})" if unit else label for _, label, unit in METRICS]
    assert titles[:2] == ["energy bias (meV/atom)", "force slope"]
    assert len(titles) == 4
    for axis, (name, _, _) in zip(figure.axes, METRICS, strict=True):
        # Below the axis, and as the table has them: a label on a curve hides it.
        drawn = [text.get_text().split("\n")[1] for text in axis.get_xticklabels()]
        assert drawn == [shown(row.metrics.get(name), DIGITS[name]).split(" ")[0] for row in results]
        assert not axis.texts
    assert width_and_height(path) == (1350, 960)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bias.png"]


def test_errors_that_cannot_be_negative_begin_at_zero_and_have_no_line_of_no_bias(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    write_figure(CASES["all measured"], tmp_path / "bias.png", "quickstart", 0.95)
    energy, slope, force, delta_q = figures[0].axes

    def dashed(axis: Any) -> list[float]:
        return [line.get_ydata()[0] for line in axis.get_lines() if line.get_linestyle() == "--"]

    assert (dashed(energy), dashed(slope)) == ([0.0], [1.0])
    for axis in (force, delta_q):
        assert dashed(axis) == [] and axis.get_ylim()[0] == 0.0 < axis.get_ylim()[1]
    assert "over replicas (ΔQ: over structures)" in str(figures[0].get_supxlabel())


def test_the_names_of_many_rounds_do_not_overlap(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    write_figure([result(number, FULL) for number in range(20)], tmp_path / "bias.png", "long", 0.95)
    figures[0].draw_without_rendering()
    for axis in figures[0].axes:
        boxes = sorted(
            (label.get_window_extent() for label in axis.get_xticklabels()), key=lambda box: box.x0
        )
        assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def width_and_height(path: Path) -> tuple[int, int]:
    """Of a PNG whose chunks all have the checksums they should have."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    position, names = 8, []
    while position < len(content):
        length, name = struct.unpack(">I4s", content[position : position + 8])
        body = content[position + 4 : position + 8 + length]
        (checksum,) = struct.unpack(">I", content[position + 8 + length : position + 12 + length])
        assert zlib.crc32(body) == checksum
        names.append(name)
        position += 12 + length
    assert names[0] == b"IHDR" and names[-1] == b"IEND"
    return struct.unpack(">II", content[16:24])  # type: ignore[return-value]


def test_an_interval_without_ends_shows_its_value_alone_and_no_metric_shows_a_dash() -> None:
    assert shown(FULL["force_slope"], 2) == "0.19 [0.15, 0.25]"
    assert shown(FULL["delta_q"], 2) == "36.60"
    assert shown(None, 2) == "–"


def test_the_table_has_a_row_for_each_round_and_counts_labels_and_explosions() -> None:
    stream = StringIO()
    table = results_table([result(0, FULL, exploded=7), result(1, without("delta_q"))], 0.95, "quickstart")
    Console(file=stream, width=200).print(table)
    text = stream.getvalue()
    (foundation,) = [line for line in text.splitlines() if "foundation" in line]
    (first,) = [line for line in text.splitlines() if "round 1" in line]
    assert all(
        cell in foundation
        for cell in ("-280.3 [-300.0, -260.0]", "0.19 [0.15, 0.25]", "36.60", " 7 ", "0 + 16")
    )
    assert all(cell in first for cell in ("–", " 0 ", "32 + 32"))
    assert "95% confidence interval" in text


@pytest.mark.parametrize("width", [200, 120, 80, 40])
def test_at_any_width_nothing_is_cut_and_no_interval_is_broken(width: int) -> None:
    metrics = FULL | {"delta_q_steps": FULL["force_slope"], "cell_distance": FULL["force_slope"]}
    rows = [result(0, metrics), result(1, metrics)]
    relaxations = relaxations_table(rows, 0.95)
    assert relaxations is not None
    stream = StringIO()
    Console(file=stream, width=width).print(results_table(rows, 0.95, "quickstart"), relaxations)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    cells = ["[-300.0, -260.0]", "[0.15, 0.25]", "[1300, 1500]", "36.60", "32 + 32", "foundation", "round 1"]
    for cell in (*cells, "training + judging", "energy bias"):
        assert any(cell in line for line in lines), cell
    assert ("-280.3 [-300.0, -260.0]" in stream.getvalue()) == (width == 200)


def test_the_table_of_relaxations_shows_structures_beside_forces_and_is_left_out_without_any() -> None:
    extra = {
        "delta_q_steps": {"value": 40.0, "low": 39.0, "high": 41.0},
        "cell_distance": {"value": 0.25, "low": 0.2, "high": 0.3},
    }
    table = relaxations_table([result(0, {**FULL, **extra}), result(1, without("delta_q"))], 0.95)
    assert table is not None
    stream = StringIO()
    Console(file=stream, width=200).print(table)
    (foundation,) = [line for line in stream.getvalue().splitlines() if "foundation" in line]
    assert all(cell in foundation for cell in ("40.00 [39.00, 41.00]", "36.60", "0.25 [0.20, 0.30]"))
    assert "replay" not in stream.getvalue()  # nothing was replayed
    assert relaxations_table([result(0, FULL)], 0.95) is None


def test_relaxations_that_did_not_converge_and_refused_targets_are_told() -> None:
    rows = [
        replace(result(0, FULL), relaxations_unconverged=3),
        result(1, FULL),
        replace(result(2, FULL), relaxations_refused=("relaxation 4: ambiguous", "relaxation 5: ambiguous")),
    ]
    first, last = relaxation_notes(rows)
    assert first.startswith("the foundation: 3 of its relaxations did not converge")
    assert last == "round 2: 2 without a target: relaxation 4: ambiguous"


def test_the_number_of_labels_that_look_wrong_is_said_with_the_place_of_their_list() -> None:
    rows = [result(0, {}, 0), replace(result(1, {}, 0), suspect_labels=3)]
    [note] = label_notes(rows, Path("runs/x"))
    assert note.startswith("3 labels so far look wrong")
    assert "runs/x/round-*/label" in note
    assert label_notes(rows[:1], Path("runs/x")) == []
