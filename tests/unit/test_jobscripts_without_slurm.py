"""The scripts that run inside jobs, without Slurm; tests/slurm/test_jobscripts.py runs them in real steps."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

JOBSCRIPTS = Path(__file__).parents[2] / "jobscripts"
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
HOSTILE = ["two words", "$HOME", "a'b\"c", "*", ""]
ARGV = 'for word in "$@"; do printf "<%s>\n" "$word"; done'


def run(
    script: str, *arguments: object, cwd: Path | None = None, **variables: object
) -> subprocess.CompletedProcess[str]:
    """One run of a job script in this environment without any of Slurm's, plus these variables."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") and name not in GPU_VARIABLES
    }
    return subprocess.run(
        [JOBSCRIPTS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=kept | {name: str(value) for name, value in variables.items()},
    )


def shown(*names: str) -> list[str]:
    """A command that prints these variables, each on its line, and - for one that is not set."""
    return ["bash", "-c", "; ".join(f'echo "${{{name}--}}"' for name in names)]


def words(text: str) -> list[str]:
    return [line.removeprefix("<").removesuffix(">") for line in text.splitlines()]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("bind-rank", []), ("node-scratch", []), ("in-container", ["."])],
)
def test_a_script_hands_the_words_of_its_command_on_as_they_are(
    script: str, arguments: list[str], runtime: dict[str, Any]
) -> None:
    done = run(script, *arguments, "bash", "-c", ARGV, "-", *HOSTILE, **runtime)
    assert done.returncode == 0, done.stderr
    assert words(done.stdout)[-len(HOSTILE) :] == HOSTILE


@pytest.mark.parametrize("script", ["bind-rank", "node-scratch", "in-container"])
def test_a_script_ends_with_the_status_of_its_command(script: str, runtime: dict[str, Any]) -> None:
    image = ["."] if script == "in-container" else []
    assert run(script, *image, "bash", "-c", "exit 7", **runtime).returncode == 7


@pytest.mark.parametrize("script", ["bind-rank", "node-scratch", "in-container"])
def test_a_script_without_a_command_says_how_it_is_used(script: str) -> None:
    done = run(script)
    assert (done.returncode, done.stderr.split(":")[0]) == (2, "usage")


# ---- bind-rank ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "ranks", "expected"),
    [
        ("0,1,2,3", 4, ["0", "1", "2", "3"]),
        ("4,5,6,7", 4, ["4", "5", "6", "7"]),  # Slurm has given us the upper half of the node
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("2,5", 4, ["2", "5", "2", "5"]),  # more ranks than GPUs share them
        ("GPU-aa,GPU-bb", 2, ["GPU-aa", "GPU-bb"]),
        ("3", 2, ["3", "3"]),  # srun has bound each rank already
        ("0,1", 1, ["0,1"]),
        ("", 2, ["", ""]),  # Slurm says: none
        ("NoDevFiles", 2, ["NoDevFiles", "NoDevFiles"]),
    ],
)
def test_each_rank_sees_its_share_of_the_visible_gpus(visible: str, ranks: int, expected: list[str]) -> None:
    seen = [
        run(
            "bind-rank",
            *shown("CUDA_VISIBLE_DEVICES"),
            CUDA_VISIBLE_DEVICES=visible,
            SLURM_LOCALID=rank,
            SLURM_STEP_TASKS_PER_NODE=ranks,
        ).stdout.removesuffix("\n")
        for rank in range(ranks)
    ]
    assert seen == expected


def test_amd_gpus_are_chosen_by_rocr_alone_since_hip_counts_within_its_choice() -> None:
    done = run(
        "bind-rank",
        *shown(*GPU_VARIABLES),
        ROCR_VISIBLE_DEVICES="4,5,6,7",
        HIP_VISIBLE_DEVICES="4,5,6,7",
        GPU_DEVICE_ORDINAL="4,5,6,7",
        SLURM_LOCALID=2,
        SLURM_STEP_TASKS_PER_NODE=4,
    )
    assert done.stdout.split() == ["-", "6", "-", "-"]


def test_a_machine_without_gpus_is_left_without_a_list_of_them() -> None:
    if list(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists():
        pytest.skip("this machine has GPUs")
    done = run("bind-rank", *shown(*GPU_VARIABLES), SLURM_LOCALID=1, SLURM_STEP_TASKS_PER_NODE=4)
    assert done.stdout.split() == ["-"] * 4


def cores_of_rank(rank: int, ranks: int, share: int) -> set[int]:
    done = run(
        "bind-rank",
        "python3",
        "-c",
        "import os; print(*sorted(os.sched_getaffinity(0)))",
        SLURM_LOCALID=rank,
        SLURM_STEP_TASKS_PER_NODE=ranks,
        SLURM_CPUS_PER_TASK=share,
    )
    return {int(core) for core in done.stdout.split()}


def test_ranks_that_all_see_the_same_cores_get_disjoint_ones() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("two cores are needed")
    first, second = cores_of_rank(0, ranks=2, share=1), cores_of_rank(1, ranks=2, share=1)
    assert len(first) == len(second) == 1
    assert first.isdisjoint(second)
    assert first | second <= allowed


def test_a_rank_with_fewer_cores_than_all_ranks_were_promised_keeps_them() -> None:
    allowed = os.sched_getaffinity(0)
    assert cores_of_rank(1, ranks=len(allowed) + 1, share=1) == allowed
    assert cores_of_rank(0, ranks=1, share=1) == allowed


def test_a_rank_that_is_no_number_is_told() -> None:
    done = run("bind-rank", "true", SLURM_LOCALID="x")
    assert done.returncode == 2
    assert "SLURM_LOCALID is 'x' of '1' ranks" in done.stderr


# ---- node-scratch ------------------------------------------------------------


def test_a_command_has_a_private_tmpdir_that_is_gone_when_it_ends(tmp_path: Path) -> None:
    command = ["bash", "-c", 'stat -c %a "$TMPDIR"; touch "$TMPDIR/left over"; echo "$TMPDIR"; exit 3']
    done = run("node-scratch", "--in", tmp_path, *command)
    mode, folder = done.stdout.split()
    assert (done.returncode, mode, Path(folder).parent) == (3, "700", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tmpdir_is_made_where_slurm_or_the_environment_says_unless_told_otherwise(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("slurm", "environment", "told")]
    for place in places:
        place.mkdir()
    slurm, environment, told = places
    command = ["bash", "-c", 'dirname "$TMPDIR"']
    assert run("node-scratch", *command, TMPDIR=environment).stdout.strip() == str(environment)
    variables = {"TMPDIR": environment, "SLURM_TMPDIR": slurm}
    assert run("node-scratch", *command, **variables).stdout.strip() == str(slurm)
    assert run("node-scratch", "--in", told, *command, **variables).stdout.strip() == str(told)


def test_a_missing_node_folder_is_told(tmp_path: Path) -> None:
    done = run("node-scratch", "--in", tmp_path / "none", "true")
    assert done.returncode == 1
    assert f"{tmp_path}/none" in done.stderr
    assert "--in FOLDER" in done.stderr


@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_reaches_the_command_once_and_the_folder_is_removed(
    tmp_path: Path, number: signal.Signals, to_group: bool
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # The command outlives the signal: it must not be left behind with its folder gone.
    log = tmp_path / "log"
    code = (
        f"trap 'echo heard >>{log}' {number.name.removeprefix('SIG')}; echo ready >>{log}; "
        f'for i in $(seq 60); do [ "$(wc -l <{log})" -lt 2 ] || break; sleep 0.05; done; '
        f'sleep 0.2; [ -d "$TMPDIR" ] && echo kept >>{log}; exit 9'
    )
    process = subprocess.Popen(
        [JOBSCRIPTS / "node-scratch", "--in", scratch, "bash", "-c", code], start_new_session=True
    )
    deadline = time.monotonic() + 20
    while not log.exists() or not log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.wait(timeout=20) == 9
    assert log.read_text().split() == ["ready", "heard", "kept"]
    assert list(scratch.iterdir()) == []


# ---- in-container ------------------------------------------------------------


@pytest.fixture
def runtime(tmp_path: Path) -> dict[str, Any]:
    """Variables that lead to a stand-in for apptainer.

    Debian 12 has neither Apptainer nor Singularity: this program records its options, one a line, in `options` and
    runs the command that follows the image.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "apptainer"
    program.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$1" >{tmp_path}/options; shift\n'
        f'while [[ $1 == -* ]]; do echo "$1" >>{tmp_path}/options; '
        f'case $1 in --bind|--pwd) echo "$2" >>{tmp_path}/options; shift ;; esac; shift; done\n'
        f'echo "image $1" >>{tmp_path}/options; shift\n'
        'exec "$@"\n'
    )
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": ""}


def options_of(tmp_path: Path) -> list[str]:
    return (tmp_path / "options").read_text().splitlines()


def test_a_container_sees_the_current_folder_the_listed_paths_and_tmpdir(
    tmp_path: Path, runtime: dict[str, Any]
) -> None:
    here, data, scratch = (tmp_path / name for name in ("my campaigns", "data", "scratch"))
    for folder in (here, data, scratch):
        folder.mkdir()
    image = tmp_path / "image.sif"
    image.touch()
    arguments = ["--bind", data, "--bind", f"{scratch}:/mnt", image, "pwd"]
    done = run("in-container", *arguments, cwd=here, **runtime | {"TMPDIR": scratch})
    assert done.returncode == 0, done.stderr
    options = options_of(tmp_path)
    assert options[:3] == ["exec", "--pwd", str(here)]
    binds = [options[n + 1] for n, option in enumerate(options) if option == "--bind"]
    assert binds == [str(here), str(data), f"{scratch}:/mnt", str(scratch)]
    assert options[-1] == f"image {image}"


def test_a_container_keeps_the_jobs_variables_and_loses_the_hosts_python_packages(
    runtime: dict[str, Any],
) -> None:
    kept = {
        "SLURM_PROCID": "3",
        "SUBMITIT_EXECUTOR": "slurm",
        "OMP_NUM_THREADS": "7",
        "ASE_CONFIG_PATH": "/x",
    }
    lost = {"PYTHONPATH": "/host", "PYTHONHOME": "/host", "VIRTUAL_ENV": "/host", "APPTAINER_CLEANENV": "1"}
    done = run("in-container", ".", *shown(*kept, *lost), **runtime | kept | lost)
    assert done.stdout.split() == [*kept.values(), *["-"] * len(lost)]


@pytest.mark.parametrize(
    ("devices", "expected"),
    [([], []), (["nvidiactl", "nvidia0"], ["--nv"]), (["kfd"], ["--rocm"])],
)
def test_a_container_is_given_the_gpus_that_the_node_has(
    devices: list[str], expected: list[str], tmp_path: Path, runtime: dict[str, Any]
) -> None:
    """In a mount namespace of its own, whose /dev has these files."""
    prefix = ["unshare", "--map-root-user", "--mount", "bash", "-euc"]
    prefix += [
        'mount -t tmpfs tmpfs /dev; cd "$1"; for d in $2; do : >"/dev/$d"; done; : >/dev/null; shift 2; "$@"'
    ]
    prefix += ["-", str(tmp_path), " ".join(devices)]
    environment = os.environ | {name: str(value) for name, value in runtime.items()}
    if subprocess.run([*prefix, "true"], check=False, capture_output=True, env=environment).returncode != 0:
        pytest.skip("mount namespaces are not allowed here")
    command = [*prefix, str(JOBSCRIPTS / "in-container"), ".", "true"]
    subprocess.run(command, check=True, env=environment)
    assert [option for option in options_of(tmp_path) if option in ("--nv", "--rocm")] == expected


def test_what_a_container_lacks_is_told(tmp_path: Path, runtime: dict[str, Any]) -> None:
    for arguments, words_ in (
        (["no.sif", "true"], "there is no image no.sif"),
        (["--bind", "/no/where", ".", "true"], "there is no /no/where"),
    ):
        done = run("in-container", *arguments, **runtime)
        assert done.returncode == 1
        assert words_ in done.stderr
    with_comma = tmp_path / "a,b"
    with_comma.mkdir()
    assert "has a comma" in run("in-container", ".", "true", cwd=with_comma, **runtime).stderr
    done = run("in-container", ".", "true", PATH="/usr/bin:/bin")
    assert done.returncode == 127
    assert "neither apptainer nor singularity is on PATH" in done.stderr
