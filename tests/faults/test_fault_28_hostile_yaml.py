"""Fault 28: a campaign file that would run code, blow up or say two things is refused before anything is made.

What the reader itself refuses is in tests/unit/test_config_yaml_file.py; this is the command that a user types.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

HPCFT = str(Path(sys.executable).with_name("hpcft"))
BOMB = "\n".join(["a0: &a0 lol", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))])
HOSTILE = {
    "a tag that runs code": ("name: !!python/object/apply:os.system ['touch {here}/executed']\n", 1, "tag"),
    "an alias bomb": (BOMB, 1, "anchors and aliases"),
    "a key that stands twice": ("name: one\nrounds: 1\nname: two\n", 3, "already on line 1"),
    "a megabyte": ("name: x # " + "x" * 1_000_000, None, "larger than 1000000 bytes"),
    "nesting without end": ("name: " + "[" * 100_000, 1, "nested more than 20 levels deep"),
}


def with_little_memory() -> None:
    """A bomb that goes off ends the command, not the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_campaign_file_ends_in_one_line_that_names_its_place_and_leaves_no_trace(
    what: str, tmp_path: Path
) -> None:
    """Guards that `run` reads with our reader alone: fails if a file goes to a loader that builds objects or aliases."""
    content, line, words = HOSTILE[what]
    file = tmp_path / "campaign.yaml"
    file.write_text(content.replace("{here}", str(tmp_path)))
    argv = [HPCFT, "run", str(file), "--dir", str(tmp_path / "campaign")]
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, check=False, preexec_fn=with_little_memory
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"hpcft: {file}:{line}: " if line else f"hpcft: {file}: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["campaign.yaml"]
