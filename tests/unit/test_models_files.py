"""Model files: bit for bit, reproducible, and refused where they are damaged or not ours."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpcft.errors import UserError
from hpcft.models.files import elements_of_file, export_mace, load_model, read_header, save_model, sha256_of
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, as_module, device_of, dtype_of


def morse(dtype: torch.dtype = torch.float64) -> MorsePotential:
    torch.manual_seed(3)
    potential = MorsePotential([13, 29], cutoff=4.5, depth=0.35)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(torch.randn_like(parameter))
    return potential.to(dtype)


def weights(potential: Potential) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in as_module(potential).named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_comes_back_from_its_file_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    original = morse(dtype)
    digest = save_model(tmp_path / "model.pt", original, {"round": 3})
    assert digest == sha256_of(tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert isinstance(loaded, MorsePotential) and isinstance(loaded, Potential)
    assert dtype_of(loaded) == dtype
    assert weights(loaded) == weights(original)
    assert (loaded.cutoff, loaded.elements) == (4.5, (13, 29))
    assert loaded.configuration() == original.configuration()


def test_a_frozen_model_can_be_trained_again_after_loading(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", morse().requires_grad_(False))
    assert all(p.requires_grad for p in as_module(load_model(tmp_path / "model.pt")).parameters())


def test_a_model_is_loaded_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", morse())
    loaded = load_model(tmp_path / "model.pt", dtype=torch.float32)
    assert (dtype_of(loaded), device_of(loaded).type) == (torch.float32, "cpu")
    assert weights(loaded) == weights(morse(torch.float32))


def test_equal_models_give_equal_bytes_also_after_a_round_trip_and_in_another_process(tmp_path: Path) -> None:
    first = save_model(tmp_path / "a.pt", morse(), {"labels": 5, "kind": "x"})
    assert save_model(tmp_path / "b.pt", load_model(tmp_path / "a.pt"), {"labels": 5, "kind": "x"}) == first
    assert save_model(tmp_path / "c.pt", morse(), {"labels": 6, "kind": "x"}) != first
    command = [sys.executable, __file__, str(tmp_path / "d.pt")]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (tmp_path / "d.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


def test_the_header_tells_what_the_file_holds_without_its_weights(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", morse(), {"campaign": "quickstart", "round": 2})
    header = read_header(tmp_path / "model.pt")
    assert header["architecture"] == "morse"
    assert header["dtype"] == "float64"
    assert header["provenance"] == {"campaign": "quickstart", "round": 2}
    assert header["num_parameters"] == 8
    assert "state" not in header
    assert elements_of_file(tmp_path / "model.pt") == {13, 29}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit_of_the_weights(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (record,) = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
    offset = record.header_offset
    name_length, extra_length = (
        content[offset + 26],
        int.from_bytes(content[offset + 28 : offset + 30], "little"),
    )
    content[offset + 30 + name_length + extra_length] ^= 1
    path.write_bytes(content)


def other_content(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


def unknown_architecture(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "architecture": "nequip"}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "damaged"),
        (empty, "damaged"),
        (flip_a_bit_of_the_weights, "a checksum in it is wrong"),
        (other_content, "lacks the mark 'hpcft-model-1'"),
        (unknown_architecture, "'nequip', which this hpcft does not know"),
        (Path.unlink, "there is no model file"),
    ],
)
def test_a_file_that_is_no_sound_model_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "model.pt"
    save_model(path, morse())
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_only_mace_models_export_as_mace_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only MACE models export"):
        export_mace(morse(), tmp_path / "morse.model")
    assert not (tmp_path / "morse.model").exists()


def test_a_failed_save_leaves_the_old_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    save_model(path, morse())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_model(path, morse(torch.float32))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


if __name__ == "__main__":
    save_model(Path(sys.argv[1]), morse(), {"labels": 5, "kind": "x"})


HIDE = "import sys; sys.modules['cuequivariance'] = sys.modules['cuequivariance_torch'] = None\n"
SAVE = """
import sys; sys.path.insert(0, {physics!r})
from pathlib import Path
from small_models import small_mace
from hpcft.models.files import save_model
model = small_mace()
save_model(Path({path!r}), model)
"""


def test_a_mace_has_the_same_bytes_whether_or_not_cuequivariance_is_installed(tmp_path: Path) -> None:
    """mace itself takes another basis where it is, and neither side could read the other's files."""
    physics = str(Path(__file__).parents[1] / "physics")
    found = []
    for name, prelude in (("with.pt", ""), ("without.pt", HIDE)):
        code = prelude + SAVE.format(physics=physics, path=str(tmp_path / name))
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
        found.append((tmp_path / name).read_bytes())
    assert found[0] == found[1]


def test_a_mace_in_the_reduced_basis_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcft.models.mace import build_mace

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "physics"))
    from small_models import small_mace

    configuration = small_mace().configuration()
    model = build_mace(configuration, reduced=True)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes != {n: t.shape for n, t in build_mace(configuration).state_dict().items()}
    save_model(tmp_path / "reduced.pt", model)
    again = as_module(load_model(tmp_path / "reduced.pt")).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
