from __future__ import annotations

from dataclasses import replace

import pytest
from recorded_slurm import recorded_cluster

from hpcft.cluster.draft import draft_site, site_name
from hpcft.errors import UserError

CLUSTER = recorded_cluster()


def test_the_first_site_file_chooses_the_default_partition_and_the_one_with_gpus_alone() -> None:
    text = draft_site(CLUSTER, "mine")
    assert "\n  partition: cpu " in text
    assert text.count("{partition: gpu, gpus_per_rank: 1}") == 3
    assert "\n  account: lab " in text
    assert "\n  qos: normal " in text
    assert "# max_array_size: 1001" in text
    assert "controller:" not in text
    chosen = [line for line in text.splitlines() if line.startswith("  ") and not line.startswith("  #")]
    assert all("# guess: " in line for line in chosen)


def test_the_first_site_file_of_a_cluster_without_gpus_and_accounting_leaves_them_out() -> None:
    cluster = recorded_cluster(accounts=None, nodes="cpu|2|64|256000|(null)|(null)|idle\n")
    text = draft_site(cluster, "mine")
    assert "stages:" not in text
    assert "\n  # account: my-project" in text


def test_the_first_site_file_has_a_controller_that_ends_in_the_partition_s_time() -> None:
    short = replace(CLUSTER.partitions["cpu"], max_time_min=20)
    text = draft_site(replace(CLUSTER, partitions={"cpu": short}), "mine")
    assert "\ncontroller: {time_min: 20}" in text


def test_a_cluster_that_takes_no_jobs_of_this_user_gets_no_site_file() -> None:
    shut = {name: replace(p, state="INACTIVE") for name, p in CLUSTER.partitions.items()}
    with pytest.raises(UserError, match="no partition of hpcft takes jobs of root now"):
        draft_site(replace(CLUSTER, partitions=shut), "mine")


def test_a_cluster_s_name_becomes_the_name_of_a_site() -> None:
    assert site_name(CLUSTER) == "hpcft"
    assert site_name(replace(CLUSTER, name="_odd (name)")) == "oddname"
    assert site_name(replace(CLUSTER, name="")) == "my-cluster"
