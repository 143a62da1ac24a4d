"""The table that hpcft md ends with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcft.md import Dynamics

_MOST_ROWS = 40


def show_replicas(console: Any, path: Path, dynamics: Dynamics) -> bool:
    """A row for each replica; whether one was stopped."""
    import numpy as np
    from rich.table import Table

    from hpcft.storage.trajectory import Trajectory

    table = Table(caption="means over the second half of the frames", caption_justify="left")
    for title in ("replica", "steps", "frames", "T / K", "E / eV"):
        table.add_column(title, justify="right")
    under_pressure = dynamics.barostat != "none"
    if under_pressure:
        table.add_column("V / Å³", justify="right")
    table.add_column("stopped by")
    with Trajectory(path) as trajectory:
        states = trajectory.checkpoint()
        for number, state in list(states.items())[:_MOST_ROWS]:
            replica = int(number)
            cells = [number, str(int(state["step"]))]
            if replica in trajectory.replicas:
                half = slice(trajectory.num_frames(replica) // 2, None)
                values = [
                    trajectory.array(replica, name)[half].mean()
                    for name in ("temperature_K", "potential_energy")
                ]
                cells += [str(trajectory.num_frames(replica)), f"{values[0]:.0f}", f"{values[1]:.3f}"]
                if under_pressure:
                    volumes = np.abs(np.linalg.det(trajectory.array(replica, "cell")[half]))
                    cells.append(f"{volumes.mean():.1f}")
            else:
                cells += ["0"] + ["–"] * (2 + under_pressure)
            table.add_row(*cells, str(state["stopped"]))
    console.print(table)
    if len(states) > _MOST_ROWS:
        console.print(f"and {len(states) - _MOST_ROWS} more replicas")
    console.print(f"trajectory: {path}", soft_wrap=True)
    return any(str(state["stopped"]) for state in states.values())
