"""Model files: hpcft's own (settings and weights, no code) and MACE's pickled ones (loaded only when trusted)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hpcft.errors import UserError
from hpcft.models.protocol import Potential, as_module, dtype_of
from hpcft.models.trust import is_trusted
from hpcft.storage.atomic import write_bytes

FORMAT = "hpcft-model-1"


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_model(path: Path, potential: Potential, provenance: Mapping[str, Any] | None = None) -> str:
    """Write settings and weights, durably and by atomic rename; returns the file's SHA-256.

    The bytes depend on the content alone, so equal models give equal files.
    """
    state = {
        name: tensor.detach().cpu().clone() for name, tensor in as_module(potential).state_dict().items()
    }
    content = {
        "format": FORMAT,
        "architecture": potential.architecture,
        "configuration": dict(potential.configuration()),
        "dtype": str(dtype_of(potential)).removeprefix("torch."),
        "state": state,
        "provenance": dict(provenance or {}),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def load_model(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Potential:
    """Load an hpcft model, or a MACE `.model` file whose SHA-256 the user has trusted.

    Raises UserError for a missing or damaged file, or for a pickled file that was not imported: loading a
    pickle runs whatever code is in it.
    """
    content = _read_without_code(path)
    potential: Potential
    if content is not None:
        potential = _from_content(content, path)
    elif is_trusted(sha256_of(path)):
        potential = _load_pickled(path)
    else:
        raise UserError(
            f"{path} is a pickled model, and loading a pickle can run any code. If you know where it comes from, "
            f"record your trust once with: hpcft model import {path}"
        )
    module = as_module(potential)
    module.to(device=device, dtype=dtype if dtype is not None else dtype_of(potential))
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return potential


def is_whole(path: Path) -> bool:
    """Whether each record of a torch file has the checksum it was written with; `torch.load` does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError):
        return False


def read_header(path: Path) -> dict[str, Any]:
    """Everything in an hpcft model file but the weights; UserError when it is not one."""
    content = _read_without_code(path)
    if content is None:
        raise UserError(f"{path} is not an hpcft model file (it is a pickle)")
    header = {key: value for key, value in content.items() if key != "state"}
    header["num_parameters"] = int(sum(t.numel() for t in content["state"].values()))
    return header


def elements_of_file(path: Path) -> set[int]:
    """Atomic numbers that the model in a file knows; builds the model only where it is a (trusted) pickle."""
    content = _read_without_code(path)
    if content is None:
        return set(load_model(path).elements)
    configuration = content["configuration"]
    return {int(number) for number in configuration.get("atomic_numbers", configuration.get("elements"))}


def _read_without_code(path: Path) -> dict[str, Any] | None:
    """The content of an hpcft model; None when reading it would need to run pickled code."""
    if not path.is_file():
        raise UserError(f"there is no model file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols, of files that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise UserError(
                f"{path} is no model file; name one of hpcft's (.pt) or of MACE's (.model)"
            ) from error
        return None
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a model file, or it is damaged: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path} holds no model: it lacks the mark '{FORMAT}'. Was it written by another program?"
        )
    if not is_whole(path):
        raise UserError(f"{path} is damaged: a checksum in it is wrong. Copy or make it again.")
    return content


def _is_pickle(path: Path) -> bool:
    """Whether torch may have written it: as an archive, or as a bare pickle (protocol 2 or later)."""
    with path.open("rb") as stream:
        begins_as_one = stream.read(1) == pickle.PROTO
    return begins_as_one or zipfile.is_zipfile(path)


def _from_content(content: dict[str, Any], path: Path) -> Potential:
    dtype = getattr(torch, content["dtype"])
    if content["architecture"] == "mace":
        potential: Potential = _mace_that_fits(content, dtype, path)
    elif content["architecture"] == "morse":
        from hpcft.models.morse import MorsePotential

        potential = MorsePotential(**content["configuration"]).to(dtype)
    else:
        raise UserError(
            f"{path} is of architecture '{content['architecture']}', which this hpcft does not know"
        )
    as_module(potential).load_state_dict(content["state"])
    return potential


def _mace_that_fits(content: dict[str, Any], dtype: torch.dtype, path: Path) -> Potential:
    """With the basis of products that the weights are of, whatever this machine has installed."""
    from hpcft.models.mace import build_mace

    shapes = {name: tensor.shape for name, tensor in content["state"].items()}
    for reduced in (False, True):
        potential = build_mace(content["configuration"], dtype, reduced=reduced)
        if {name: tensor.shape for name, tensor in potential.state_dict().items()} == shapes:
            return potential
    raise UserError(
        f"the weights in {path} do not fit the model that its settings describe; if it was made where cuequivariance is "
        "installed, install it here as well (pip install cuequivariance cuequivariance-torch)"
    )


def _load_pickled(path: Path) -> Potential:
    from hpcft.models.mace import MacePotential  # imports mace, which must come before e3nn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Allowed: the user has recorded this very file's SHA-256.
        try:
            model = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:  # a pickle may fail in any way
            raise UserError(f"{path} cannot be loaded as a model: {type(error).__name__}: {error}") from error
    return MacePotential(model)


def export_mace(potential: Potential, path: Path) -> None:
    """Write the ordinary pickled MACE file that MACECalculator and `mace_create_lammps_model` take."""
    model = getattr(potential, "model", None)
    if potential.architecture != "mace" or model is None:
        raise UserError(f"only MACE models export as .model files; this one is '{potential.architecture}'")
    from hpcft.models.fused_convolution import fuse, separate

    buffer = io.BytesIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        separate(model)
        stack.callback(fuse, model)
        torch.save(model, buffer)
    write_bytes(path, buffer.getvalue())
