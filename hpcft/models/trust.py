"""Which pickled model files the user trusts, by SHA-256 (a pickle can run any code when it is loaded)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hpcft.storage.atomic import read_json, write_json


def trust_file() -> Path:
    """`$HPCFT_TRUST_FILE`, or trusted-models.json in the user's configuration folder."""
    override = os.environ.get("HPCFT_TRUST_FILE")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "hpcft" / "trusted-models.json"


def trusted_models() -> dict[str, Any]:
    path = trust_file()
    return dict(read_json(path)) if path.exists() else {}


def is_trusted(sha256: str) -> bool:
    return sha256 in trusted_models()


def trust(sha256: str, file: Path) -> None:
    """Record that the file with this hash may be unpickled."""
    models = trusted_models()
    models[sha256] = {"file": str(file.resolve())}
    trust_file().parent.mkdir(parents=True, exist_ok=True)
    write_json(trust_file(), models)


def distrust(sha256: str) -> None:
    """Forget a hash."""
    models = trusted_models()
    if models.pop(sha256, None) is not None:
        write_json(trust_file(), models)
