"""Jobs that are larger or longer than a recorded cluster allows."""

from __future__ import annotations

import pytest
from recorded_slurm import A100, H100, PLAIN, campaign, found, site, the_one, with_nodes

from hpcft.cluster.slurm_answers import NodeGroup
from hpcft.config.site import Site


def test_a_time_limit_over_the_partition_s_is_named_with_the_most_that_is_possible() -> None:
    asked = campaign(select={"resources": {"time_min": 31}}, label={"resources": {"time_min": 1440}})
    two = site({"select": {"partition": "short"}})
    problem = the_one(two, asked)
    assert (problem.source, problem.key) == ("campaign", "select.resources.time_min")
    assert problem.what == "is 31, but jobs in partition short with QOS normal end after 30 min"
    assert problem.accepted == "at most 30"


def test_label_and_reference_share_their_resources_and_their_problem() -> None:
    problem = the_one(site(), campaign(label={"resources": {"time_min": 1441}}))
    assert (problem.key, problem.stages) == ("label.resources.time_min", ("label", "reference"))


def test_the_controller_s_own_keys_stand_in_the_site() -> None:
    large = Site.model_validate({**site().model_dump(), "controller": {"memory_GB": 4.0, "time_min": 1441}})
    found_there = found(large)
    assert {problem.source for problem in found_there} == {"site"}
    assert [(problem.key, problem.accepted) for problem in found_there] == [
        ("controller.time_min", "at most 1440"),
        ("controller.memory_GB", "at most 3.9"),
    ]
    assert found_there[1].what == "is 4, but a node in partition cpu has 3.906 GB for a job"


@pytest.mark.parametrize(
    ("ranks", "gpus_per_rank", "what"),
    [
        (1, 5, "asks for 5 GPUs on a node, but a node in partition gpu has 4"),
        (4, 2, "asks for 8 GPUs on a node for 4 ranks, but a node in partition gpu has 4"),
    ],
)
def test_more_gpus_than_a_node_has_are_named_with_how_many_there_are(
    ranks: int, gpus_per_rank: int, what: str
) -> None:
    asked = site({"train": {"partition": "gpu", "gpus_per_rank": gpus_per_rank}})
    problem = the_one(asked, campaign(train={"ranks": ranks, "batch_size": 4}))
    assert (problem.key, problem.what) == ("stages.train.gpus_per_rank", what)
    assert problem.accepted == "at most 4 GPUs on a node"


def test_gpus_in_a_partition_without_any_are_named_with_the_partitions_that_have_them() -> None:
    problem = the_one(site({"train": {"gpus_per_rank": 1}}))
    assert problem.what == "is 1, but no node in partition cpu has GPUs"
    assert problem.accepted == "a partition with GPUs (gpu, pairs, preempt), or 0"


def test_a_gpu_type_that_is_not_there_is_named_with_those_that_are() -> None:
    asked = site({"train": {"partition": "gpu", "gpus_per_rank": 1, "gpu_type": "v100"}})
    problem = the_one(asked, cluster=with_nodes(PLAIN, A100, H100))
    assert (problem.key, problem.accepted) == ("stages.train.gpu_type", "a100, h100")
    assert the_one(asked).accepted == "no gpu_type: Slurm does not name the types here"


def test_the_gpus_of_the_type_that_is_asked_for_are_counted() -> None:
    def asking(gpu_type: str | None) -> Site:
        train = {"partition": "gpu", "gpus_per_rank": 8, "gpu_type": gpu_type}
        return site({"train": train})

    cluster = with_nodes(PLAIN, A100, H100)
    assert found(asking("h100"), cluster=cluster) == []
    assert found(asking(None), cluster=cluster) == []
    assert the_one(asking("A100"), cluster=cluster).accepted == "at most 4 GPUs on a node"


def test_more_cores_or_memory_than_a_node_has_are_named_with_how_much_there_is() -> None:
    cores = the_one(site(), campaign(select={"resources": {"cpus_per_rank": 5}}))
    assert (cores.key, cores.accepted) == ("select.resources.cpus_per_rank", "at most 4 cores on a node")
    memory = the_one(site(), campaign(select={"resources": {"memory_GB": 5.0}}))
    assert (memory.key, memory.accepted) == ("select.resources.memory_GB", "at most 3.9")
    small = site({"select": {"partition": "short"}})
    in_short = found(
        small, campaign(select={"resources": {"memory_GB": 3.0, "cpus_per_rank": 3, "time_min": 10}})
    )
    assert [p.accepted for p in in_short] == ["at most 2 cores on a node", "at most 1.95"]


def test_tasks_that_share_a_job_need_its_cores_and_gpus_together() -> None:
    packed = site({"label": {"tasks_per_job": 8}})
    assert found(packed, campaign(label={"shards": 4})) == []
    problem = the_one(packed, campaign(label={"shards": 8}))
    assert (problem.key, problem.stages) == ("stages.label.tasks_per_job", ("label",))
    assert problem.what.startswith("asks for 8 cores on a node for 8 tasks of tasks_per_job")
    train = site({"train": {"tasks_per_job": 8}})
    assert (
        found(train, campaign(train={"ranks": 2, "batch_size": 2})) == []
    )  # such a task has its job for itself


def test_things_that_no_single_node_has_together_are_a_problem_though_each_is_there() -> None:
    asked = site({"train": {"partition": "gpu", "gpus_per_rank": 8}})
    problem = the_one(
        asked, campaign(train={"resources": {"cpus_per_rank": 64}}), with_nodes(PLAIN, A100, H100)
    )
    assert problem.what == "no single node has the 64 cores, 8 GPUs and 0 MB that a job wants"


@pytest.mark.parametrize(
    ("constraint", "missing"), [("big", "big"), ("big|huge", "big, huge"), ("ib&big", "big")]
)
def test_features_that_no_node_has_are_named_with_those_that_there_are(constraint: str, missing: str) -> None:
    asked = site({"train": {"partition": "gpu", "constraint": constraint}})
    problem = the_one(asked, cluster=with_nodes(PLAIN, A100))
    assert (problem.key, problem.accepted) == ("stages.train.constraint", "gpu, ib")
    assert problem.what == f"no node in partition gpu has the feature {missing}"


def test_features_that_no_node_has_together_are_named_with_those_that_go_together() -> None:
    sata = NodeGroup("gpu", 1, 64, 512_000, {}, frozenset({"gpu", "sata"}))
    asked = site({"train": {"partition": "gpu", "constraint": "ib&sata"}})
    problem = the_one(asked, cluster=with_nodes(PLAIN, A100, sata))
    assert problem.what == "no node in partition gpu has all features of ib&sata"
    assert problem.accepted == "what one node has together: gpu, ib; gpu, sata"


def test_constraints_that_some_node_meets_are_no_problem() -> None:
    for constraint in ("ib", "ib&gpu", "ib|big", "[ib*2|big*2]", "!big", "(gpu&ib)"):
        asked = site({"train": {"partition": "gpu", "constraint": constraint}})
        assert found(asked, cluster=with_nodes(PLAIN, A100)) == [], constraint
