"""The list of pickled models that the user trusts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.errors import UserError
from hpcft.models.trust import is_trusted, trust, trust_file, trusted_models


def test_the_list_is_in_the_users_configuration_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HPCFT_TRUST_FILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert trust_file() == tmp_path / "xdg" / "hpcft" / "trusted-models.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trust_file() == tmp_path / ".config" / "hpcft" / "trusted-models.json"
    monkeypatch.setenv("HPCFT_TRUST_FILE", str(tmp_path / "mine.json"))
    assert trust_file() == tmp_path / "mine.json"


def test_trust_is_in_a_hash_and_is_added_to_what_was_trusted_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HPCFT_TRUST_FILE", str(tmp_path / "new" / "folder" / "trusted.json"))
    assert trusted_models() == {}
    assert not is_trusted("a" * 64)
    trust("a" * 64, tmp_path / "one.model")
    trust("b" * 64, tmp_path / "two.model")
    assert is_trusted("a" * 64) and is_trusted("b" * 64)
    assert not is_trusted("c" * 64)
    assert trusted_models()["a" * 64]["file"] == str(tmp_path / "one.model")


def test_a_damaged_list_is_an_error_and_not_an_empty_list(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "trusted.json"
    path.write_text('{"aaaa": {"fi')
    monkeypatch.setenv("HPCFT_TRUST_FILE", str(path))
    with pytest.raises(UserError, match="not valid JSON"):
        trust("b" * 64, tmp_path / "two.model")
    assert path.read_text() == '{"aaaa": {"fi'
