"""What all figures of a training look like."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hpcft.storage.atomic import write_bytes

# Okabe and Ito's colours, which the colour-blind tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
QUIET = "#6f6f6f"


def tidy(axis: Any, x: str, y: str = "") -> None:
    """Label the axes, and leave out the lines that frame them."""
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, title: str, notes: Sequence[str]) -> None:
    """Write the PNG, with the notes below."""
    width = figure.get_figwidth()
    # A campaign's name may hold a $, which is no formula.
    figure.suptitle(textwrap.fill(title, int(10 * width)), fontsize=12, parse_math=False)
    figure.supxlabel(textwrap.fill(" · ".join(notes), int(16 * width)), fontsize=8, color=QUIET)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())
