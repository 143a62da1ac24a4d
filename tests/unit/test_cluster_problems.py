"""What a recorded cluster would refuse. Its sbatch was tried with requests of nearly every kind that stands here."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from recorded_slurm import (
    CLUSTER,
    PLAIN,
    campaign,
    found,
    recorded,
    recorded_cluster,
    site,
    the_one,
    with_nodes,
)

from hpcft.cluster.problems import Problem
from hpcft.config.site import default_site


def test_a_site_and_a_campaign_that_fit_have_no_problem() -> None:
    gpu = {"partition": "gpu", "gpus_per_rank": 2}
    assert found(site({"explore": gpu, "train": gpu}), campaign(train={"ranks": 2, "batch_size": 2})) == []


def test_a_site_without_slurm_has_none_of_slurm_s_problems() -> None:
    assert found(default_site(), campaign()) == []


def test_a_partition_that_does_not_exist_is_named_with_those_that_take_jobs() -> None:
    problem = the_one(site(partition="cpux"))
    assert (problem.source, problem.key, problem.severity) == ("site", "slurm.partition", "error")
    assert problem.what == "there is no partition cpux"
    assert problem.accepted == "cpu, gpu, preempt, short"  # not closed, not pairs
    assert problem.stages == ()  # all of them


def test_one_of_several_partitions_that_does_not_exist_is_refused_too() -> None:
    assert the_one(site(partition="cpu,cpux")).what == "there is no partition cpux"


def test_a_key_of_one_stage_is_named_where_it_is_written() -> None:
    problem = the_one(site({"train": {"partition": "cpux"}}))
    assert (problem.key, problem.stages) == ("stages.train.partition", ("train",))


def test_a_site_for_another_cluster_is_refused_and_one_for_this_cluster_is_not() -> None:
    problem = the_one(site().model_copy(update={"cluster": "other"}))
    assert (problem.key, problem.what) == (
        "cluster",
        "is other, but Slurm on this machine says ClusterName hpcft",
    )
    assert found(site().model_copy(update={"cluster": "HPCFT"})) == []  # Slurm does not mind capitals


def test_an_array_size_over_slurm_s_is_a_warning_for_the_smaller_one_is_used() -> None:
    problem = the_one(site(max_array_size=1002))
    assert (problem.key, problem.severity) == ("slurm.max_array_size", "warning")
    assert problem.accepted == "at most 1001, which is used instead"
    assert found(site(max_array_size=1001)) == []


@pytest.mark.parametrize(
    ("slurm", "key", "what", "accepted"),
    [
        ({"account": "nope"}, "account", "the user root may not use the account nope", "lab, root"),
        (
            {"account": "guests"},
            "account",
            "the user root may not use the account guests in partition cpu",
            "lab, root",
        ),
        ({"qos": "huge"}, "qos", "there is no QOS huge", "high, normal, tiny"),
        ({"qos": "long"}, "qos", "the account lab may not use the QOS long", "high, normal, tiny"),
        (
            {"qos": "high", "account": "root"},
            "qos",
            "the account root may not use the QOS high",
            "normal",
        ),
    ],
)
def test_an_account_or_qos_that_this_user_may_not_use_is_named_with_those_that_he_may(
    slurm: dict[str, str], key: str, what: str, accepted: str
) -> None:
    problem = the_one(site(**slurm))
    assert (problem.key, problem.what, problem.accepted) == (f"slurm.{key}", what, accepted)
    assert problem.severity == "error"


def test_an_account_of_the_shell_is_checked_and_named_as_such() -> None:
    problem = the_one(site(), SBATCH_ACCOUNT="nope")
    assert problem.what == "the user root may not use the account nope (SBATCH_ACCOUNT, or your default)"


def test_a_user_without_any_account_is_told_whom_to_ask() -> None:
    problem = the_one(site(), cluster=recorded_cluster(accounts="", associations=""))
    assert problem.what == "the user root has no account on hpcft, and jobs need one"


def test_accounts_are_anybody_s_where_accounting_does_not_enforce_them_or_is_not_there() -> None:
    lax = replace(CLUSTER, enforced=frozenset())
    assert found(site(account="nope"), cluster=lax) == []
    assert found(site(account="nope"), cluster=recorded_cluster(accounts=None)) == []


def test_a_qos_that_a_site_s_plugin_may_translate_is_a_warning() -> None:
    config = re.sub(r"(JobSubmitPlugins *= ).*", r"\1lua", recorded("config"))
    problem = the_one(site(qos="regular"), cluster=recorded_cluster(config=config))
    assert problem.severity == "warning"
    assert problem.what == "there is no QOS regular (unless the site's plugin lua makes another of it)"


@pytest.mark.parametrize(
    ("slurm", "what", "severity"),
    [
        ({"partition": "closed"}, "partition closed does not admit the account lab", "error"),
        (
            {"partition": "pairs", "qos": "high"},
            "partition pairs takes no jobs (its state is DRAIN)",
            "error",
        ),
    ],
)
def test_a_partition_that_does_not_take_this_user_s_jobs_says_why(
    slurm: dict[str, str], what: str, severity: str
) -> None:
    problem = the_one(site(**slurm))
    assert (problem.key, problem.what, problem.severity) == ("slurm.partition", what, severity)
    assert "cpu" in problem.accepted


def partition_closed_with(**changes: Any) -> Problem:
    partitions = {**CLUSTER.partitions, "cpu": replace(CLUSTER.partitions["cpu"], **changes)}
    cluster = replace(CLUSTER, partitions=partitions, user="ada", groups=frozenset({"users"}))
    return the_one(site(), cluster=cluster)


def test_every_way_to_be_shut_out_of_a_partition_is_known() -> None:
    """Rules of slurm.conf that this cluster's user, root, does not meet."""
    assert "takes no jobs (its state is INACTIVE)" in partition_closed_with(state="INACTIVE").what
    assert "is for root only" in partition_closed_with(is_for_root=True).what
    assert "does not admit the account lab" in partition_closed_with(deny_accounts=frozenset({"lab"})).what
    assert "does not admit the QOS normal" in partition_closed_with(allow_qos=frozenset({"high"})).what
    assert (
        "for members of the group staff only" in partition_closed_with(allow_groups=frozenset({"staff"})).what
    )
    assert "wants 2 nodes for a job" in partition_closed_with(min_nodes=2).what


def test_a_partition_that_is_down_or_without_nodes_in_service_is_a_warning_for_it_may_come_back() -> None:
    down = partition_closed_with(state="DOWN")
    assert (down.severity, down.what) == (
        "warning",
        "partition cpu is down, and its jobs wait until it is up again",
    )
    drained = the_one(site(), cluster=with_nodes(replace(PLAIN, state="drained")))
    assert (drained.severity, drained.key) == ("warning", "slurm.partition")


def test_one_partition_that_takes_the_job_is_enough_unless_slurm_wants_all_of_them() -> None:
    both = site(partition="closed,cpu")
    assert found(both) == []
    assert the_one(both, cluster=replace(CLUSTER, enforce_part_limits="ALL")).key == "slurm.partition"


def test_a_default_partition_that_nobody_asked_for_can_only_be_warned_about() -> None:
    """The site's plugin may choose another one."""
    problem = the_one(site(partition=None, gpus_per_rank=1))
    assert (problem.key, problem.severity) == ("slurm.gpus_per_rank", "warning")


def test_errors_come_before_warnings() -> None:
    both = found(site(max_array_size=5000, account="nope"))
    assert [problem.severity for problem in both] == ["error", "warning"]
