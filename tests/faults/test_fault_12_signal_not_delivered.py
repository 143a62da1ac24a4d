"""A job ends with no signal before it: what was committed by our own clock is all that there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dying_jobs import Disturbed, assert_same_data
from slurm_campaign import command

pytestmark = pytest.mark.slurm


def test_md_that_got_no_signal_before_its_end_goes_on_after_the_last_segment_that_it_had_committed(
    disturb: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards that MD commits each segment when it is full (dynamics._run_segments), and runs none of them again."""
    case = disturb("probe", config={"max_attempts": 2})
    with case.managed():
        case.until_stopped_in_md()
        before = case.segments()
        command("scancel", "--signal=KILL", case.job())
        case.until(lambda: len(case.runs()) == 2, "a second attempt has begun")
        after = case.segments()
        assert {name: after[name] for name in before} == before
        case.until_finished()
    assert [ending["cause"] for ending in case.ends()] == ["cancelled"]
    assert [intent["attempt"] for intent in case.intents()] == [1, 2]
    assert_same_data(undisturbed["end"], case.root, "probe")
