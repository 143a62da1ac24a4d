"""More tasks than an array may have: the limit is Slurm's own, and the submission is split."""

from __future__ import annotations

from typing import Any

import pytest
from slurm_campaign import MakeCampaign, command, reconfigured

pytestmark = pytest.mark.slurm


def test_a_stage_of_more_tasks_than_max_array_size_is_submitted_in_several_arrays_that_slurm_takes(
    campaign_on: MakeCampaign, slurm_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if MaxArraySize is not asked for, or is taken for the largest index (which is one less)."""
    campaign = campaign_on(tasks=4)
    campaign.shim(monkeypatch, "sbatch", '"$real" "$@"; code=$?; echo $code >> "$base/codes"; exit $code')
    with reconfigured(slurm_cluster, "MaxArraySize=3"):
        with pytest.raises(AssertionError, match="Invalid job array specification"):
            command("sbatch", "--array=0-3", "--wrap=true")
        (campaign.base / "codes").unlink()
        campaign.finish_stage()
        assert sorted(campaign.jobs("r0-reference-1")) == [
            f"{a}_{i}" for a in _first(campaign) for i in range(3)
        ]
    assert (campaign.base / "codes").read_text().split() == ["0", "0"]
    assert [intent["tasks"] for intent in campaign.records("-intent.json")] == [[0, 1, 2], [3]]
    campaign.assert_undisturbed()


def _first(campaign: Any) -> list[str]:
    return [array for array, name in campaign.arrays().items() if name.endswith("-reference-1")]
