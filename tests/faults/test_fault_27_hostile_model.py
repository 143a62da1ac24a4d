"""Fault 27, hostile-model: a pickled model runs no code unless its hash is trusted."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcft.errors import UserError
from hpcft.models.files import elements_of_file, load_model, read_header, sha256_of
from hpcft.models.trust import trust


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def trusted_models_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCFT_TRUST_FILE", str(tmp_path / "trusted.json"))


def as_torch_file(hostile: Touch, path: Path) -> None:
    torch.save(hostile, path)


def as_old_torch_file(hostile: Touch, path: Path) -> None:
    torch.save(hostile, path, _use_new_zipfile_serialization=False)


def as_plain_pickle(hostile: Touch, path: Path) -> None:
    path.write_bytes(pickle.dumps(hostile))


def inside_our_own_format(hostile: Touch, path: Path) -> None:
    torch.save({"format": "hpcft-model-1", "architecture": "morse", "state": {}, "provenance": hostile}, path)


@pytest.mark.parametrize("write", [as_torch_file, as_old_torch_file, as_plain_pickle, inside_our_own_format])
@pytest.mark.parametrize("read", [load_model, read_header, elements_of_file])
@pytest.mark.parametrize("variable", ["", "1"])
def test_code_in_a_model_file_is_not_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Touch, Path], None],
    read: Callable[[Path], object],
    variable: str,
) -> None:
    # Importing mace sets this for the whole process.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", variable)
    touched, path = tmp_path / "touched", tmp_path / "hostile.model"
    write(Touch(touched), path)
    with pytest.raises(UserError):
        read(path)
    assert not touched.exists()


def test_the_refusal_says_how_to_trust_the_file_and_trust_in_another_file_does_not_count(
    tmp_path: Path,
) -> None:
    touched, path = tmp_path / "touched", tmp_path / "hostile.model"
    as_torch_file(Touch(touched), path)
    other = tmp_path / "other.model"
    other.write_bytes(b"something else")
    trust(sha256_of(other), path)  # the name is not what is trusted
    with pytest.raises(
        UserError, match=r"loading a pickle can run any code.*hpcft model import .*hostile\.model"
    ):
        load_model(path)
    assert not touched.exists()


def test_the_trap_of_these_tests_does_snap(tmp_path: Path) -> None:
    touched, path = tmp_path / "touched", tmp_path / "hostile.model"
    as_torch_file(Touch(touched), path)
    torch.load(path, weights_only=False)
    assert touched.exists()


def test_a_file_that_was_changed_after_it_was_trusted_is_refused(tmp_path: Path) -> None:
    touched, path = tmp_path / "touched", tmp_path / "model.model"
    path.write_bytes(b"harmless")
    trust(sha256_of(path), path)
    as_torch_file(Touch(touched), path)
    with pytest.raises(UserError, match="loading a pickle can run any code"):
        load_model(path)
    assert not touched.exists()
