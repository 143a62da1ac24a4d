"""Process groups for torch DDP, from nothing but a rank, a world size and a shared folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from hpcft.errors import MissingInput
from hpcft.storage.atomic import write_json
from hpcft.training.rank import Rank


def choose_device(rank: Rank, wish: str = "auto") -> torch.device:
    """The GPU of this rank, or the CPU; `wish` is auto, cpu or cuda. UserError for a GPU that is not there.

    Where the launcher shows each rank its own GPU only, that one is number 0. It becomes this thread's current GPU: else pinned
    memory, NCCL and other people's kernels would take number 0, and every rank a part of its memory.
    """
    if wish == "cpu" or (wish == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        # Not for good: a task of a campaign is tried again, and may come to a node whose GPU works.
        raise MissingInput(
            f"the device cuda was asked for, but torch sees no GPU here ({socket.gethostname()}); use the device cpu, or "
            "run where there is one"
        )
    device = torch.device("cuda", rank.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(rank: Rank, folder: Path, device: torch.device, timeout_s: float = 600) -> Iterator[None]:
    """Join the ranks of one task (NCCL on GPUs, gloo on CPUs), and part again at the end.

    Rank 0 opens a store on a free port and writes the address to `folder`, so two tasks on one host never
    collide. The file's name carries the token of this execution: an older one's address is never taken.
    """
    if rank.world_size == 1:
        yield
        return
    single = rank.num_nodes == 1
    if single and device.type == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_s)
    address_file = folder / f"rendezvous-{rank.token}.json"
    host = "127.0.0.1" if single else socket.getfqdn()
    if rank.is_first:
        store = TCPStore(host, 0, rank.world_size, True, timeout, wait_for_workers=False)
        write_json(address_file, {"host": host, "port": store.port})
    else:
        address = _wait_for(address_file, timeout_s)
        store = TCPStore(str(address["host"]), int(str(address["port"])), rank.world_size, False, timeout)
    backend = "nccl" if _each_rank_has_its_own_gpu(store, rank, device) else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timeout,
        # Else NCCL guesses the GPU of a barrier by the rank, and hangs where ranks are placed otherwise.
        device_id=device if backend == "nccl" else None,
    )
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
        if rank.is_first:
            address_file.unlink(missing_ok=True)


def _each_rank_has_its_own_gpu(store: TCPStore, rank: Rank, device: torch.device) -> bool:
    """All ranks agree on the answer. NCCL refuses two ranks on one GPU; gloo does not."""
    mine = "cpu"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        mine = f"{socket.gethostname()} {getattr(properties, 'uuid', device.index)}"
    store.set(f"device-{rank.rank}", mine)
    devices = {store.get(f"device-{other}") for other in range(rank.world_size)}
    return len(devices) == rank.world_size and device.type == "cuda"


def _wait_for(path: Path, timeout_s: float) -> dict[str, object]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists():
            return dict(json.loads(path.read_text()))
        time.sleep(0.05)
    raise TimeoutError(f"rank 0 published no address in {path} within {timeout_s:.0f} s; see its log")
