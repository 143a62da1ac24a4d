"""How the tests are spread over processes (pytest-xdist, see tests/run)."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together, for what they share is dear; and all that use the one Slurm cluster follow each other."""
    if not items or not items[0].config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        on_slurm = item.get_closest_marker("slurm") is not None or "slurm_cluster" in getattr(
            item, "fixturenames", ()
        )
        item.add_marker(pytest.mark.xdist_group("slurm" if on_slurm else item.path.name))
