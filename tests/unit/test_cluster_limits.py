from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from recorded_slurm import Recorded, recorded, recorded_cluster, site

from hpcft.cluster.limits import Cluster, StageLimits, effective, features_of, read_cluster
from hpcft.cluster.slurm_answers import (
    Association,
    Qos,
    parse_config,
    parse_gpus,
    parse_minutes,
    parse_nodes,
    parse_partitions,
)
from hpcft.config.site import default_site
from hpcft.errors import SchedulerUnavailable

CLUSTER = recorded_cluster()


def test_the_name_version_and_sizes_are_those_that_scontrol_prints() -> None:
    assert (CLUSTER.name, CLUSTER.version, CLUSTER.max_array_size) == ("hpcft", "22.05.8", 1001)
    assert (CLUSTER.max_job_count, CLUSTER.enforce_part_limits) == (10000, "NO")
    assert CLUSTER.enforced == {"associations", "limits", "qos"}
    assert CLUSTER.job_submit_plugins == ""


def test_partitions_have_their_limits_and_whom_they_admit() -> None:
    assert list(CLUSTER.partitions) == ["cpu", "gpu", "preempt", "short", "closed", "pairs"]
    cpu, short, closed, pairs = (CLUSTER.partitions[name] for name in ("cpu", "short", "closed", "pairs"))
    assert (cpu.state, cpu.is_default, cpu.max_time_min, cpu.default_time_min) == ("UP", True, 1440, 5)
    assert (cpu.max_nodes, cpu.total_nodes, cpu.allow_accounts, cpu.allow_qos) == (None, 2, None, None)
    assert (short.max_time_min, short.max_memory_MB, short.max_cpus_per_node, short.qos) == (
        30,
        2000,
        2,
        "tiny",
    )
    assert (closed.state, closed.max_time_min, closed.allow_accounts) == ("DOWN", None, {"guests"})
    assert (closed.deny_qos, closed.allow_groups) == ({"tiny"}, {"staff"})
    assert (pairs.state, pairs.min_nodes, pairs.max_nodes) == ("DRAIN", 2, 2)
    assert (pairs.deny_accounts, pairs.allow_qos) == ({"guests"}, {"high", "tiny"})
    assert CLUSTER.default_partition == "cpu"


def test_nodes_that_are_alike_are_one_group_of_each_partition() -> None:
    cpu = [node for node in CLUSTER.nodes if node.partition == "cpu"]
    assert [(n.num_nodes, n.cpus, n.memory_MB, n.num_gpus, n.state) for n in cpu] == [
        (1, 4, 4000, 0, "drained"),
        (1, 4, 4000, 0, "idle"),
    ]
    assert [n.is_in_service for n in cpu] == [False, True]
    (gpu,) = (node for node in CLUSTER.nodes if node.partition == "gpu")
    assert (gpu.num_nodes, gpu.gpus, gpu.features) == (2, {"": 4}, {"gpu"})


def test_associations_have_the_limits_that_they_inherit_from_their_account() -> None:
    assert CLUSTER.has_accounting
    assert (CLUSTER.user, CLUSTER.default_account) == ("root", "lab")
    assert CLUSTER.associations == (
        Association("guests", "gpu", ("long", "normal"), "long", 60, 7, 720),
        Association("lab", "gpu", ("normal",)),
        Association("lab", None, ("high", "normal", "tiny"), "normal"),
        Association("root", None, ("normal",)),
    )


def test_a_qos_has_the_smallest_of_its_limits_on_submitted_jobs() -> None:
    assert CLUSTER.qos == {
        "normal": Qos("normal"),
        "high": Qos("high"),
        "tiny": Qos("tiny", max_submitted=4, max_running=2),
        "long": Qos("long", frozenset({"OverPartQOS", "PartitionTimeLimit"}), 20, None, 2880),
    }


def test_accounting_is_asked_for_this_user_on_this_cluster_only() -> None:
    run = Recorded()
    read_cluster(run)
    (associations,) = (command for command in run.commands if " assoc " in command)
    assert "user=root cluster=hpcft format=" in associations


@pytest.mark.parametrize(
    "changes",
    [
        {"config": recorded("config").replace("accounting_storage/slurmdbd", "accounting_storage/none")},
        {"accounts": None},
        {"associations": None},
        {"user": None},
    ],
    ids=["no accounting", "sacctmgr fails", "sacctmgr fails later", "a user without a name"],
)
def test_a_site_without_accounting_is_an_answer_too(changes: dict[str, str | None]) -> None:
    cluster = recorded_cluster(**changes)
    assert (cluster.has_accounting, cluster.associations, cluster.qos) == (False, (), {})
    assert list(cluster.partitions) == list(CLUSTER.partitions)


def test_a_user_whom_accounting_does_not_know_has_no_association() -> None:
    cluster = recorded_cluster(accounts="", associations="")
    assert (cluster.has_accounting, cluster.associations, cluster.default_account) == (True, (), None)


@pytest.mark.parametrize("silent", ["config", "partitions"])
def test_a_controller_that_does_not_answer_is_said_and_nothing_is_assumed(silent: str) -> None:
    with pytest.raises(SchedulerUnavailable):
        recorded_cluster(**{silent: None})


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("UNLIMITED", None),
        ("INFINITE", None),
        ("NONE", None),
        ("", None),
        ("60", 60),
        ("15:00", 15),
        ("00:05:00", 5),
        ("1-00:00:00", 1440),
        ("1-0", 1440),
        ("1-12", 2160),
        ("7-00:30:00", 10110),
        ("Partition_Limit", None),
    ],
)
def test_times_are_read_in_every_form_that_slurm_writes(text: str, minutes: int | None) -> None:
    assert parse_minutes(text) == minutes


# In the forms that public clusters print.
@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu:4", {"": 4}),
        ("gpu", {"": 1}),
        ("gpu:v100:4(S:0-1),nvme:3600", {"v100": 4}),
        ("gpu:a100:4(S:0-1),cpu:72", {"a100": 4}),
        ("gpu:a100:2(S:0),gpu:a100_1g.5gb:7(S:1)", {"a100": 2, "a100_1g.5gb": 7}),
        ("gpu:a100:3(IDX:0,2,3),mps:400", {"a100": 3}),
        ("gpu:a100:no_consume:4", {"a100": 4}),
        ("nvme:3600", {}),
    ],
)
def test_gpus_are_read_by_type(gres: str, gpus: dict[str, int]) -> None:
    assert parse_gpus(gres) == gpus


@pytest.mark.parametrize(
    ("state", "in_service"),
    [
        ("idle", True),
        ("mixed-", True),
        ("idle~", True),
        ("down*", False),
        ("drained", False),
        ("draining$", False),
    ],
)
def test_a_node_s_state_is_read_without_its_marks(state: str, in_service: bool) -> None:
    (node,) = parse_nodes(f"gpu|3|64|512000+|gpu:a100:4|a100,ib|{state}\n")
    assert node.is_in_service is in_service
    assert (node.num_nodes, node.memory_MB, node.features) == (3, 512000, {"a100", "ib"})


def test_a_partition_s_name_may_have_blanks() -> None:
    line = "PartitionName=CPU nodes (amd) AllowGroups=ALL MaxTime=1-0 JobDefaults=DefCpuPerGPU=30 State=UP\n"
    (partition,) = parse_partitions(line).values()
    assert (partition.name, partition.max_time_min, partition.state) == ("CPU nodes (amd)", 1440, "UP")


def test_a_setting_may_have_an_equals_sign_in_its_value() -> None:
    assert parse_config("A = b=c,d\n\nheading\nE       = (null)\n") == {"A": "b=c,d", "E": "(null)"}


@pytest.mark.parametrize(("size", "elements"), [("1001", 1001), ("1", 1), ("0", 1)])
def test_an_array_has_as_many_elements_as_max_array_size_for_they_count_from_0(
    size: str, elements: int
) -> None:
    config = recorded("config").replace("MaxArraySize            = 1001", f"MaxArraySize            = {size}")
    assert recorded_cluster(config=config).max_array_size == elements


def limits(cluster: Cluster | None = CLUSTER, **slurm: Any) -> StageLimits:
    return effective(site(**slurm), "label", cluster, {})


def test_a_stage_is_bounded_by_what_slurm_says_where_the_site_says_nothing() -> None:
    assert limits() == StageLimits(1001, None, 1440, 4000 / 1024)


def test_the_site_s_own_keys_win_where_they_are_smaller_or_slurm_says_nothing() -> None:
    own = {"max_array_size": 50, "max_submitted": 10, "max_time_min": 100, "max_memory_GB": 2.0}
    assert limits(**own) == limits(None, **own) == StageLimits(50, 10, 100, 2.0)
    greater = {"max_array_size": 5000, "max_submitted": 10, "max_time_min": 9999, "max_memory_GB": 99.0}
    assert limits(**greater) == StageLimits(1001, 10, 1440, 4000 / 1024)
    assert limits(None) == StageLimits()


def test_the_local_executor_has_no_limits_of_slurm() -> None:
    assert effective(default_site(), "label", CLUSTER) == StageLimits()


def test_each_stage_has_the_limits_of_its_own_partition() -> None:
    two = site({"train": {"partition": "short"}})
    assert effective(two, "label", CLUSTER, {}).max_time_min == 1440
    assert effective(two, "train", CLUSTER, {}) == StageLimits(1001, 4, 30, 2000 / 1024)


@pytest.mark.parametrize(
    ("slurm", "most"),
    [
        ({"qos": "tiny"}, 4),
        ({"qos": "high"}, None),
        ({"partition": "short"}, 4),  # the partition has a QOS of its own
        ({"partition": "gpu", "account": "guests"}, 20),  # the QOS has 20, the account 60
        ({"partition": "gpu", "account": "guests", "qos": "normal"}, 60),
    ],
)
def test_submitted_jobs_are_bounded_by_the_smallest_limit_of_qos_account_and_partition(
    slurm: dict[str, str], most: int | None
) -> None:
    assert limits(**slurm).max_submitted == most


# Slurm 22.05 was tried: jobs with less time started, with more they stayed PENDING for just this limit.
@pytest.mark.parametrize(
    ("slurm", "minutes"),
    [
        ({"partition": "short"}, 30),
        ({"partition": "cpu,short"}, 1440),  # it starts in the other one
        ({"partition": "gpu", "account": "guests", "qos": "long"}, 2880),  # may go over the partition's
        ({"partition": "gpu", "account": "guests", "qos": "normal"}, 720),  # the account's
    ],
)
def test_time_is_bounded_by_partition_qos_and_account(slurm: dict[str, str], minutes: int) -> None:
    assert limits(**slurm).max_time_min == minutes


def test_where_every_partition_must_fit_the_shortest_limit_holds() -> None:
    assert limits(replace(CLUSTER, enforce_part_limits="ALL"), partition="cpu,short").max_time_min == 30


def test_limits_of_accounting_that_are_not_enforced_bound_nothing() -> None:
    lenient = replace(CLUSTER, enforced=frozenset({"associations"}))
    assert limits(lenient, qos="tiny").max_submitted is None


def test_what_the_site_does_not_ask_for_is_taken_from_the_shell_s_variables_as_sbatch_does() -> None:
    shell = {"SBATCH_QOS": "tiny", "SBATCH_PARTITION": "short"}
    assert effective(site(), "label", CLUSTER, shell).max_submitted == 4
    assert effective(site(partition=None), "label", CLUSTER, shell).max_time_min == 30
    assert (
        effective(site(partition=None), "label", CLUSTER, {}).max_time_min == 1440
    )  # the default partition's


@pytest.mark.parametrize(
    ("constraint", "features"),
    [
        (None, ([], True)),
        ("a100", (["a100"], True)),
        ("a100&ib", (["a100", "ib"], True)),
        ("a100|h100", (["a100", "h100"], False)),
        ("[rack1*2|rack2*2]", (["rack1", "rack2"], False)),
        ("!old&ib", (["ib"], True)),
    ],
)
def test_the_features_of_a_constraint_are_read(
    constraint: str | None, features: tuple[list[str], bool]
) -> None:
    assert features_of(constraint) == features
