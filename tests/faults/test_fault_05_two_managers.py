"""Two managers: one holds the lease and the other refuses, with the holder's name; a dead one's lease is free at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hpcft.campaign import lease as lease_module
from hpcft.campaign.create import open_or_create
from hpcft.campaign.lease import holder, is_mine, lease
from hpcft.config.campaign import load_campaign
from hpcft.errors import LeaseHeld
from hpcft.storage.campaign_folder import CampaignFolder

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import write_campaign

HPCFT = str(Path(sys.executable).with_name("hpcft"))
COMPETITORS = 3

HOLD = """
import sys
from pathlib import Path
from hpcft.campaign.lease import lease
with lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease until its standard input ends, or until it is killed."""
    argv = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.communicate()


def killed_holder(folder: Path) -> dict[str, Any]:
    """The lease of a process that has been killed with it."""
    with held_by_another(folder) as process:
        process.kill()
        process.wait()
    return read_lease(folder)


def read_lease(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(max(folder.glob("*.json")).read_text())
    return content


def write_lease(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "000001.json").write_text(json.dumps(content))


@contextmanager
def processes(program: str, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that run a program with `lease` on a folder, each talking to us line by line."""
    with ExitStack() as stack:
        argv = [sys.executable, "-c", program, str(folder)]
        yield [
            stack.enter_context(
                subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            )
            for _ in range(COMPETITORS)
        ]


def say(process: subprocess.Popen[str], line: object) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


COMPETE = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
from hpcft.campaign.lease import lease
from hpcft.errors import LeaseHeld
print("ready", flush=True)
while line := sys.stdin.readline():
    name, start = line.split()
    with ExitStack() as stack:
        while time.monotonic() < float(start):
            pass
        try:
            stack.enter_context(lease(Path(sys.argv[1]) / name))
            print("won", flush=True)
        except LeaseHeld:
            print("refused", flush=True)
        sys.stdin.readline()
"""


def test_of_several_managers_that_start_at_once_exactly_one_gets_the_lease(tmp_path: Path) -> None:
    dead = killed_holder(tmp_path / "dead")
    with processes(COMPETE, tmp_path) as competitors:
        assert [hear(each) for each in competitors] == ["ready"] * COMPETITORS
        for number in range(90):
            folder = tmp_path / f"{number}"
            if number % 3 == 1:
                write_lease(folder, dead)
            elif number % 3 == 2:
                with lease(folder):
                    pass
            start = time.monotonic() + 0.002
            for each in competitors:
                say(each, f"{folder.name} {start}")
            assert sorted(hear(each) for each in competitors) == ["refused"] * (COMPETITORS - 1) + ["won"]
            for each in competitors:
                say(each, "next")


COME_AND_GO = """
import os, sys
from pathlib import Path
from hpcft.campaign.lease import is_mine, lease
from hpcft.errors import LeaseHeld
folder = Path(sys.argv[1])
for _ in range(int(sys.stdin.readline())):
    held = False
    while not held:
        try:
            with lease(folder / "leases"):
                os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))
                assert is_mine(folder / "leases")
                (folder / "alone").unlink()
                held = True
        except LeaseHeld:
            pass
print("done", flush=True)
"""


def test_managers_that_come_and_go_never_hold_the_lease_together(tmp_path: Path) -> None:
    with processes(COME_AND_GO, tmp_path) as competitors:
        for each in competitors:
            say(each, 25)
        assert [hear(each) for each in competitors] == ["done"] * COMPETITORS
    last = f"{25 * COMPETITORS:06d}"
    assert sorted(path.name for path in (tmp_path / "leases").iterdir()) == [
        f"{last}.json",
        f"{last}.released",
    ]


def test_a_number_that_was_taken_and_tidied_away_since_we_looked_is_not_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interleaving that chance hardly ever finds: two others come, and one goes, between our look and our grasp."""
    create = lease_module.create_json_once
    with ExitStack() as others:

        def create_late(path: Path, content: Any) -> bool:
            monkeypatch.setattr(lease_module, "create_json_once", create)
            with held_by_another(tmp_path):
                pass
            others.enter_context(held_by_another(tmp_path))
            assert not path.exists()
            return create(path, content)

        monkeypatch.setattr(lease_module, "create_json_once", create_late)
        with pytest.raises(LeaseHeld), lease(tmp_path):
            pass
        assert read_lease(tmp_path)["pid"] != os.getpid()
        assert [path.name for path in tmp_path.iterdir()] == ["000002.json"]


def test_a_manager_that_was_killed_leaves_a_lease_that_the_next_one_takes_at_once(tmp_path: Path) -> None:
    killed_holder(tmp_path)
    assert holder(tmp_path) is None
    with lease(tmp_path):
        assert is_mine(tmp_path)
    assert holder(tmp_path) is None


def test_a_manager_that_was_killed_and_is_not_yet_waited_for_is_dead(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        assert holder(tmp_path) is None


def test_a_manager_that_is_stopped_is_alive(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        with pytest.raises(LeaseHeld), lease(tmp_path):
            pass


def test_the_refusal_names_host_and_process_and_leaves_the_lease_alone(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as process:
        before = read_lease(tmp_path)
        with (
            pytest.raises(LeaseHeld, match=f"process {process.pid} on {socket.gethostname()} "),
            lease(tmp_path),
        ):
            pass
        assert read_lease(tmp_path) == before == holder(tmp_path)
        assert (before["pid"], before["host"]) == (process.pid, socket.gethostname())


def test_a_manager_that_fails_gives_its_lease_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lease(tmp_path):
        raise ZeroDivisionError
    with lease(tmp_path):
        pass


def test_a_lease_of_another_host_is_taken_only_when_the_user_says_so(tmp_path: Path) -> None:
    elsewhere = {**killed_holder(tmp_path / "here"), "host": "login2.example"}
    leases = tmp_path / "leases"
    write_lease(leases, elsewhere)
    assert holder(leases) == elsewhere
    with (
        pytest.raises(LeaseHeld, match=f"process {elsewhere['pid']} on login2.example .*--take-over"),
        lease(leases),
    ):
        pass
    with lease(leases, take_over=True):
        assert is_mine(leases)


def test_a_manager_whose_lease_was_taken_over_knows_it(tmp_path: Path) -> None:
    with lease(tmp_path):
        assert is_mine(tmp_path)
        taken = {**read_lease(tmp_path), "host": "login2.example"}
        (tmp_path / "000002.json").write_text(json.dumps(taken))
        assert not is_mine(tmp_path)
        (tmp_path / "000003.json").write_text(json.dumps({**taken, "host": socket.gethostname(), "pid": 1}))
        assert not is_mine(tmp_path)
    assert holder(tmp_path / "nothing") is None
    assert not is_mine(tmp_path / "nothing")


def test_a_process_that_got_the_number_of_a_dead_manager_is_not_taken_for_it(tmp_path: Path) -> None:
    with lease(tmp_path / "own"):
        ours = read_lease(tmp_path / "own")
        assert holder(tmp_path / "own") == ours
    for name, change in {
        "a process that began later": {"process_started": ours["process_started"] - 1},
        "a process of before the reboot": {"boot": "00000000-0000-0000-0000-000000000000"},
    }.items():
        write_lease(tmp_path / name, {**ours, **change})
        assert holder(tmp_path / name) is None, name
        with lease(tmp_path / name):
            assert is_mine(tmp_path / name)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> CampaignFolder:
    """A new campaign."""
    base = tmp_path_factory.mktemp("campaign")
    file = write_campaign(base / "inputs")
    return open_or_create(load_campaign(file), file, base / "tiny")


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_a_second_manager_on_the_command_line_refuses_with_exit_code_3_and_changes_nothing(
    campaign: CampaignFolder,
) -> None:
    with held_by_another(campaign.leases) as process:
        before = snapshot(campaign.root)
        second = subprocess.run([HPCFT, "resume", campaign.root], capture_output=True, text=True, check=False)
        assert second.returncode == 3
        assert second.stderr.startswith(f"hpcft: process {process.pid} on {socket.gethostname()} drives")
        assert second.stderr.count("\n") == 1
        assert snapshot(campaign.root) == before


CREATE = """
import os, sys, time
from pathlib import Path
import hpcft.models.files
from hpcft.campaign.create import open_or_create
from hpcft.config.campaign import load_campaign
from hpcft.errors import LeaseHeld
file, base = map(Path, sys.argv[1:])
campaign = load_campaign(file)
for number in range(20):
    start = time.monotonic() + 0.01
    for child in (1, 2):
        if os.fork() == 0:
            while time.monotonic() < start:
                pass
            try:
                answer = open_or_create(campaign, file, base / str(number)).read_identity()["id"]
            except LeaseHeld:
                answer = "refused"
            print(number, answer, flush=True)
            os._exit(0)
    for child in (1, 2):
        os.wait()
"""


def test_two_managers_that_make_the_same_folder_make_one_campaign(tmp_path: Path) -> None:
    file = write_campaign(tmp_path / "inputs")
    argv = [sys.executable, "-c", CREATE, str(file), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: dict[str, list[str]] = {}
    for number, answer in map(str.split, done.stdout.splitlines()):
        answers.setdefault(number, []).append(answer)
    assert len(answers) == 20
    for number, both in answers.items():
        identity = CampaignFolder(tmp_path / number).read_identity()
        assert len(both) == 2
        assert set(both) - {"refused"} == {identity["id"]}
