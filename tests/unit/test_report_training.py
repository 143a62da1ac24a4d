"""What a training shows: its figures, its line on a terminal and elsewhere, and what TensorBoard gets."""

from __future__ import annotations

import importlib.util
import math
import struct
import zlib
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from rich.console import Console

from hpcft.report.parity import Parity, write_parity
from hpcft.report.training import write_learning_curves
from hpcft.report.training_line import ProgressLine, scalars, tensorboard_writer

NAN = float("nan")
SETBACK = {
    "setback": 1,
    "in_epoch": 4,
    "back_to_epoch": 2,
    "learning_rate_factor": 0.5,
    "why": "the loss is nan at step 7 on structures [3]",
}
PANELS = [
    "loss, and its parts unweighted (eV, Å)",
    "energy, training: RMSE (meV/atom)",
    "energy, validation: MAE (meV/atom)",
    "forces, training: RMSE (meV/Å)",
    "forces, validation: MAE (meV/Å)",
    "stress, training: RMSE (meV/Å³)",
    "stress, validation: MAE (meV/Å³)",
    "ΔQ after relaxations (√amu Å)",
    "learning rate",
    "gradient norm",
]


def epoch(number: int, **changed: Any) -> dict[str, Any]:
    """An epoch that knows of everything; `changed` keys have _ for /."""
    row = {
        "epoch": float(number),
        "learning_rate": 1e-3 / number,
        "loss": 0.5 / number,
        "labels/energy": 4e-4 / number,
        "labels/forces": 0.04 / number,
        "labels/stress": 1e-6 / number,
        "replay/energy": 1e-4,
        "replay/forces": 0.01,
        "replay/stress": 1e-6,
        "relaxation/delta_q": 2.0 / number,
        "relaxation/dropped": 0.25,
        "valid/energy_mae_meV_per_atom": 10.0 / number,
        "valid/force_mae_meV_per_A": 100.0 / number,
        "valid/stress_mae_meV_per_A3": 1.0 / number,
        "valid/loss": abs(number - 3) + 0.125,
        "structures_per_s": 40.0,
        "atoms_per_s": 3840.0,
        "gradient_norm": 3.0 / number,
        "memory_MiB": 1000.0 + number,
    }
    return row | {key.replace("__", "/"): value for key, value in changed.items()}


def without(row: dict[str, Any], *starts: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(starts)}


PLAIN = ("replay", "relaxation", "valid", "structures", "atoms", "gradient", "memory")
HISTORIES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "one epoch": ([epoch(1)], PANELS),
    "five epochs and a setback": ([epoch(1), epoch(2), SETBACK, *map(epoch, range(3, 6))], PANELS),
    "a setback before the first epoch": ([SETBACK | {"back_to_epoch": 0}, epoch(1)], PANELS),
    "five hundred epochs": ([epoch(number) for number in range(1, 501)], PANELS),
    "a validation every third epoch": (
        [epoch(n) if n % 3 == 0 else without(epoch(n), "valid") for n in range(1, 8)],
        PANELS,
    ),
    "numbers that are none": (
        [
            epoch(1, loss=NAN, valid__loss=None),
            epoch(2),
            epoch(3, labels__forces=NAN, gradient_norm=math.inf),
        ],
        PANELS,
    ),
    "nothing but numbers that are none": (
        [without(epoch(1, loss=NAN, labels__forces=NAN, labels__energy=NAN), *PLAIN, "labels/stress")],
        ["learning rate"],
    ),
    "labels alone": (
        [without(epoch(n), *PLAIN) for n in range(1, 4)],
        [name for name in PANELS if not any(part in name for part in ("ΔQ", "gradient", "validation"))],
    ),
    "a stress of weight zero": (
        [without(epoch(n, labels__stress=0.0), *PLAIN) for n in range(1, 4)],
        [
            name
            for name in PANELS
            if not any(part in name for part in ("ΔQ", "gradient", "stress", "validation"))
        ],
    ),
    "setbacks alone": ([SETBACK], []),
    "nothing yet": ([], []),
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Those that are saved in this test."""
    kept: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *arguments: Any, **options: Any) -> None:
        kept.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return kept


def check_png(path: Path, figure: matplotlib.figure.Figure) -> None:
    """It is the one file in its folder, of the figure's size, and every chunk has the checksum it should have."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    position, names = 8, []
    while position < len(content):
        length, name = struct.unpack(">I4s", content[position : position + 8])
        (checksum,) = struct.unpack(">I", content[position + 8 + length : position + 12 + length])
        assert zlib.crc32(content[position + 4 : position + 8 + length]) == checksum
        names.append(name)
        position += 12 + length
    assert names[0] == b"IHDR" and names[-1] == b"IEND"
    inches = figure.get_size_inches()
    assert struct.unpack(">II", content[16:24]) == tuple(int(150 * inch + 1e-9) for inch in inches)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def legend(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def lines(axis: Any, colour: str) -> list[list[float]]:
    """x of the vertical marks of a colour."""
    marks = [line for line in axis.get_lines() if len(line.get_xdata()) == 2 and line.get_color() == colour]
    return [list(line.get_xdata()) for line in marks if list(line.get_ydata()) == [0, 1]]


def note(figure: matplotlib.figure.Figure) -> str:
    return str(figure.get_supxlabel()).replace("\n", " ")


@pytest.mark.parametrize(("rows", "panels"), HISTORIES.values(), ids=HISTORIES)
def test_learning_curves_are_a_png_with_panels_for_what_there_is(
    tmp_path: Path, figures: list[matplotlib.figure.Figure], rows: list[dict[str, Any]], panels: list[str]
) -> None:
    path = tmp_path / "training.png"
    write_learning_curves(rows, path, "a name with $ and _ in it")
    (figure,) = figures
    assert [axis.get_title(loc="left") for axis in figure.axes] == panels
    check_png(path, figure)
    assert ("no epoch was recorded" in note(figure)) == (not panels)


def test_errors_are_roots_of_the_parts_and_the_validation_s_other_measure_has_a_panel_of_its_own(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    write_learning_curves([epoch(1), epoch(2), epoch(4)], tmp_path / "training.png", "errors")
    energy, energy_valid, forces, forces_valid = figures[0].axes[1:5]
    assert legend(energy) == ["training", "replay"]
    training, replay = (line for line in energy.get_lines() if not line.get_label().startswith("_"))
    assert list(training.get_xdata()) == [1.0, 2.0, 4.0]
    assert list(training.get_ydata()) == pytest.approx([20.0, 20.0 / 2**0.5, 10.0])
    assert list(replay.get_ydata()) == pytest.approx([10.0] * 3)
    assert legend(energy_valid) == ["validation"]
    assert list(energy_valid.get_lines()[0].get_ydata()) == [10.0, 5.0, 2.5]
    assert list(forces.get_lines()[0].get_ydata()) == pytest.approx([200.0, 200.0 / 2**0.5, 100.0])
    assert list(forces_valid.get_lines()[0].get_ydata()) == [100.0, 50.0, 25.0]
    assert "RMSE is no MAE" in note(figures[0])


@pytest.mark.parametrize("rates", [(2e-3, 5e-5), (1.02e-4, 9.7e-5), (1e-3, 1e-3, 2e-4), (1e-3, 1e-6)])
def test_ticks_of_an_axis_are_in_one_notation_and_a_logarithmic_axis_says_that_it_is(
    tmp_path: Path, figures: list[matplotlib.figure.Figure], rates: tuple[float, ...]
) -> None:
    rows = [epoch(number, learning_rate=rate) for number, rate in enumerate(rates, start=1)]
    write_learning_curves(rows, tmp_path / "training.png", "rates")
    figures[0].draw_without_rendering()
    (axis,) = (axis for axis in figures[0].axes if axis.get_title(loc="left") == "learning rate")
    ticks = [text.get_text() for text in axis.get_yticklabels() if text.get_text()]
    assert len(ticks) == len(set(ticks)) > 1
    assert len({"e" in tick or "^" in tick for tick in ticks}) == 1
    assert (axis.get_yscale() == "log") == (max(rates) > 5 * min(rates)) == (axis.get_ylabel() == "log scale")


def test_the_epoch_that_is_kept_and_setbacks_are_marked_in_every_panel_and_told(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    write_learning_curves(HISTORIES["five epochs and a setback"][0], tmp_path / "training.png", "marks")
    (figure,) = figures
    for axis in figure.axes:
        assert lines(axis, "black") == [[3, 3]]  # which has the lowest valid/loss
        assert lines(axis, "#D55E00") == [[2.5, 2.5]]
    for told in (
        "epoch 3 is kept, which has the lowest validation loss, 0.125",
        "set back to the end of epoch 2",
        "at most 25.0% of an epoch's",
        "median 40 structures/s · median 3,840 atoms/s · at most 1,005 MiB",
    ):
        assert told in note(figure)


def test_a_number_that_is_none_is_a_gap_and_never_the_best(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    rows = [epoch(1, loss=None), epoch(2), epoch(3, loss=NAN, valid__loss=NAN), epoch(4), epoch(5)]
    write_learning_curves(rows, tmp_path / "training.png", "gaps")
    loss = figures[0].axes[0].get_lines()[0]
    np.testing.assert_array_equal(loss.get_ydata(), [NAN, 0.25, NAN, 0.125, 0.1])
    assert "epoch 2 is kept" in note(figures[0])


def test_of_long_histories_single_epochs_fade_behind_a_mean_and_validation_and_rates_stay(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    rows = [epoch(n, loss=1.0 + n % 2, gradient_norm=NAN if n == 50 else 2.0) for n in range(1, 101)]
    write_learning_curves(rows, tmp_path / "training.png", "long")
    loss, *_, rate, gradient = figures[0].axes
    single, mean, validation = loss.get_lines()[:3]
    assert list(single.get_ydata()[:2]) == [2.0, 1.0]
    assert mean.get_ydata()[49] == pytest.approx((6 * 2 + 5 * 1) / 11)  # epochs 45 to 55
    assert list(validation.get_ydata()) == [row["valid/loss"] for row in rows]
    assert list(rate.get_lines()[0].get_ydata()) == [row["learning_rate"] for row in rows]
    expected = np.full(100, 2.0)
    expected[49] = NAN
    np.testing.assert_allclose(gradient.get_lines()[1].get_ydata(), expected)
    assert "running mean over 11" in note(figures[0])


def test_parity_says_mae_rmse_and_slope_of_each_set(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    energies = np.array([-3.0, -2.0, -1.0])
    forces = np.array([[1.0, -1.0, 2.0], [-2.0, 0.0, 0.0]])
    stress = np.eye(3)[None] / 160.21766208
    groups = {
        "train": {"energy": Parity(energies, 0.5 * energies), "forces": Parity(forces, 0.8 * forces)},
        "replay": {"forces": Parity(forces, forces + 0.003), "stress": Parity(stress, 1.1 * stress)},
    }
    path = tmp_path / "parity.png"
    write_parity(groups, path, "parity")
    (figure,) = figures
    check_png(path, figure)
    energy, force, pressure = figure.axes[::2]
    # Of energies a line with an intercept: 0.5 * (-3, -2, -1) is off by 1.5, 1, 0.5.
    assert legend(energy) == ["train (3): MAE 1,000, RMSE 1,080 meV/atom, slope 0.500"]
    assert legend(force) == [
        "train (6): MAE 200, RMSE 258 meV/Å, slope 0.800",
        "replay (6): MAE 3, RMSE 3 meV/Å, slope 1.000",
    ]
    assert legend(pressure) == ["replay (9): MAE 0.0333, RMSE 0.0577 GPa, slope 1.100"]
    assert [axis.get_xlabel() for axis in figure.axes[::2]] == [
        f"reference {what}" for what in ("energy (eV/atom)", "force (eV/Å)", "stress (GPa)")
    ]
    colours = [handle.get_color() for handle in force.get_legend().legend_handles]
    assert colours == ["#0072B2", "#009E73"] and len(energy.get_lines()) == 2


def test_parity_of_a_single_value_has_no_slope_and_values_that_are_no_number_are_told(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    parity = Parity(np.array([-2.0, NAN, -1.0]), np.array([-2.0, -3.0, math.inf]))
    nothing = Parity(np.full(3, NAN), np.zeros(3))
    groups = {"validation": {"energy": parity, "stress": nothing}, "a set of one's own": {"energy": parity}}
    write_parity(groups, tmp_path / "parity.png", "one")
    (figure,) = figures
    check_png(tmp_path / "parity.png", figure)
    assert legend(figure.axes[0]) == [
        "validation (1): MAE 0, RMSE 0 meV/atom",
        "a set of one's own (1): MAE 0, RMSE 0 meV/atom",
    ]
    assert len(figure.axes) == 2  # no stress
    assert "left out: 7 that" in note(figure)


def test_parity_of_many_values_draws_some_of_them_with_the_worst_always_the_same(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    random = np.random.default_rng(1)
    reference = random.normal(size=(70_000, 3))
    predicted = reference + random.normal(scale=0.01, size=reference.shape)
    predicted[1234, 1] += 7.0
    groups = {"train": {"forces": Parity(reference, predicted)}}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_parity(groups, tmp_path / name / "parity.png", "many")
        check_png(tmp_path / name / "parity.png", figures[-1])
    points = figures[0].axes[0].get_lines()[1].get_xydata()
    assert len(np.unique(points, axis=0)) == 20_000
    assert np.abs(points[:, 1] - points[:, 0]).max() > 6.9
    np.testing.assert_array_equal(points, figures[1].axes[0].get_lines()[1].get_xydata())
    assert legend(figures[0].axes[0])[0].startswith("train (210,000): MAE ")
    assert "at most 20,000 of a set" in note(figures[0])


def test_parity_without_data_says_so_and_mistakes_are_refused(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    write_parity({"train": {}}, tmp_path / "parity.png", "none")
    check_png(tmp_path / "parity.png", figures[0])
    assert note(figures[0]) == "nothing to compare"
    with pytest.raises(ValueError, match="no such quantity: force; there are energy, forces, stress"):
        write_parity({"train": {"force": Parity(np.zeros(3), np.zeros(3))}}, tmp_path / "no.png", "wrong")
    with pytest.raises(ValueError, match="same shape"):
        write_parity({"train": {"forces": Parity(np.zeros(3), np.zeros(6))}}, tmp_path / "no.png", "wrong")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(rows: list[dict[str, Any]], seconds: float, num_epochs: int, **console: Any) -> str:
    """What stands there after these rows, with `seconds` before each."""
    stream, clock = StringIO(), Clock()
    with ProgressLine(num_epochs, Console(file=stream, width=100, **console), clock) as line:
        for row in rows:
            clock.now += seconds
            line.show(row)
    return stream.getvalue()


def test_without_a_terminal_each_slow_epoch_has_a_plain_line_with_what_is_left() -> None:
    text = shown([epoch(1), epoch(2), without(epoch(3), *PLAIN)], 600, 8)
    assert text.splitlines() == [
        "epoch 1/8 · loss 0.5 · validation 100.0 meV/Å · 40 structures/s · gradient 3 · rate 0.001 · left -:--:--",
        "epoch 2/8 · loss 0.25 · validation 50.0 meV/Å · 40 structures/s · gradient 1.5 · rate 0.0005 · left 1:00:00",
        "epoch 3/8 · loss 0.1667 · rate 0.00033 · left 0:50:00",
    ]


def test_without_a_terminal_quick_epochs_have_a_line_now_and_then_and_the_last_one_always() -> None:
    def numbers(rows: list[dict[str, Any]], num_epochs: int) -> list[int]:
        return [int(line.split("/")[0][6:]) for line in shown(rows, 3, num_epochs).splitlines()]

    assert numbers([epoch(n) for n in range(1, 11)], 10) == [1, 5, 9, 10]
    assert numbers([epoch(n) for n in range(1, 8)], 10) == [1, 5, 7]  # it ended early


def test_a_setback_has_a_line_of_its_own_after_the_last_epoch_before_it() -> None:
    rows = [epoch(1), epoch(2), epoch(3), SETBACK, epoch(3), epoch(4)]
    for options in ({}, {"force_terminal": True, "color_system": None}):
        assert "back to the end of epoch 2: the loss is nan at step 7 on structures [3]\n" in shown(
            rows, 3, 4, **options
        )
    starts = [line[:7] for line in shown(rows, 3, 4).splitlines()]
    assert starts == ["epoch 1", "epoch 3", "back to", "epoch 4"]


def test_on_a_terminal_the_line_is_live_and_fits() -> None:
    text = shown([epoch(1), epoch(2, loss=None)], 600, 8, force_terminal=True, color_system=None)
    last = text.replace("\r", "\n").split("\x1b[2K")[-1].splitlines()[0]
    assert last.startswith("epoch 2/8 ") and "left 1:00:00 loss nan · validation 50.0 meV/Å" in last
    assert len(last) <= 100
    assert len(text.splitlines()) == 1 or "epoch 1/8 · " not in text  # no plain lines


def test_a_line_without_any_epoch_prints_nothing() -> None:
    assert shown([], 0, 8) == ""


def test_tensorboard_gets_the_numbers_in_groups() -> None:
    row = {
        "epoch": 3.0,
        "loss": 0.5,
        "labels/forces": 0.1,
        "valid/loss": NAN,
        "gradient_norm": None,
        "memory_MiB": 7,
    }
    assert scalars(row) == {"training/loss": 0.5, "labels/forces": 0.1, "training/memory_MiB": 7.0}


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_there_is_no_tensorboard_writer_without_tensorboard(tmp_path: Path) -> None:
    assert tensorboard_writer(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
