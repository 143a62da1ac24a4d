"""Bad input through the real command: one clear message, exit code 2, nothing changed on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import write_campaign

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a campaign file that is right, and its inputs."""
    from ase.build import bulk
    from ase.io import write

    folder = tmp_path_factory.mktemp("inputs")
    write_campaign(folder)
    write(folder / "iron.extxyz", bulk("Fe", cubic=True))
    return folder


def refused(*arguments: object, cwd: Path, path: str | None = None) -> str:
    """The one message of a command that must be refused; AssertionError if it left anything behind."""
    before = sorted(p.relative_to(cwd) for p in cwd.rglob("*"))
    environment = {"PATH": path or "/usr/bin:/bin", "HOME": str(cwd)}
    done = subprocess.run(
        [sys.executable, "-m", "hpcft", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("hpcft: ")
    assert sorted(p.relative_to(cwd) for p in cwd.rglob("*")) == before
    return done.stderr


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "temperature_K: 600",
            "temperatur_K: 600",
            ["explore.temperatur_K", "did you mean 'temperature_K'?"],
        ),
        ("temperature_K: 600", "temperature_K: -600", ["explore.temperature_K", "greater than 0"]),
        ("shards: 2", "shards: 0", ["label.shards", "at least 1"]),
        ("foundation: foundation.pt", "foundation: none.pt", ["foundation", "there is no file", "none.pt"]),
        ("structures: start.extxyz", "structures: none.extxyz", ["structures", "there is no file"]),
    ],
)
def test_a_mistake_in_the_campaign_file_is_named_with_file_line_and_key(
    inputs: Path, tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    text = (inputs / "tiny.yaml").read_text()
    assert old in text
    bad = inputs / "bad.yaml"
    bad.write_text(text.replace(old, new))
    line = next(
        n for n, content in enumerate(bad.read_text().splitlines(), 1) if new.split(":")[0] in content
    )
    message = refused("run", bad, cwd=tmp_path)
    assert f"bad.yaml:{line}: " in message
    for word in words:
        assert word in message


def test_an_element_that_the_model_does_not_know_is_named(inputs: Path, tmp_path: Path) -> None:
    bad = inputs / "iron.yaml"
    bad.write_text((inputs / "tiny.yaml").read_text().replace("start.extxyz", "iron.extxyz"))
    message = refused("run", bad, cwd=tmp_path)
    assert "structures contains Fe, which the foundation model" in message
    assert "knows Cu" in message


def test_an_element_that_the_reference_does_not_know_is_named(inputs: Path, tmp_path: Path) -> None:
    bad = inputs / "reference.yaml"
    text = (inputs / "tiny.yaml").read_text()
    bad.write_text(text.replace("reference:\n", "reference:\n  elements: [Ag]\n"))
    assert "contains Cu, which ase.calculators.emt.EMT does not know" in refused("run", bad, cwd=tmp_path)


def test_a_site_on_slurm_is_refused_where_sbatch_cannot_be_found(inputs: Path, tmp_path: Path) -> None:
    site = ROOT / "site-configs" / "test-cluster.yaml"
    message = refused("run", inputs / "tiny.yaml", "--site", site, cwd=tmp_path, path=str(tmp_path))
    assert "sbatch" in message and "cannot be found" in message


def test_the_folder_of_another_campaign_is_refused_with_what_differs(inputs: Path, tmp_path: Path) -> None:
    from hpcft.campaign.create import open_or_create
    from hpcft.config.campaign import load_campaign

    open_or_create(load_campaign(inputs / "tiny.yaml"), inputs / "tiny.yaml", tmp_path / "campaign")
    other = inputs / "other.yaml"
    other.write_text((inputs / "tiny.yaml").read_text().replace("seed: 7", "seed: 8"))
    message = refused("run", other, "--dir", tmp_path / "campaign", cwd=tmp_path)
    assert "belongs to another campaign" in message and "seed: 7 -> 8" in message


def test_a_folder_that_is_no_campaign_and_a_file_that_is_no_hdf5_are_named(tmp_path: Path) -> None:
    assert "is not a campaign folder" in refused("status", tmp_path, cwd=tmp_path)
    (tmp_path / "damaged.h5").write_bytes(b"\x89HDF\r\n\x1a\nnot really")
    assert "damaged.h5" in refused("inspect", tmp_path / "damaged.h5", cwd=tmp_path)


def test_status_loads_none_of_the_heavy_libraries() -> None:
    program = "import sys, hpcft.cli.main, hpcft.campaign.status, hpcft.report.results; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"torch", "mace", "ase", "h5py", "numpy", "matplotlib", "submitit"}.isdisjoint(loaded)
