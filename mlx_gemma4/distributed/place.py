"""Which of several processes this one is, as `mlx.launch` says in the environment, and MLX's group of them all.

In: the environment. Out: a `Place`, and the group. Knows nothing of models.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import mlx.core as mx

from ..errors import InputError
from ..execution import execution
from ..shard import collective_stream


class Place(NamedTuple):
    """This process among the ranks."""

    rank: int
    size: int
    backend: str  # "ring", "jaccl" or "nccl"
    address: str  # of rank 0, where all ranks reach it
    port: int  # there, behind MLX's own: for the link (link.py)


def placed() -> Place | None:
    """Return where this process stands; None: it runs alone. Raises InputError."""
    env, rank = os.environ, os.environ.get("MLX_RANK")
    try:
        if rank is None:
            return None
        if coordinator := env.get("MLX_JACCL_COORDINATOR"):
            size = len(json.loads(Path(env["MLX_IBV_DEVICES"]).read_text()))
            place = Place(int(rank), size, "jaccl", *_behind([coordinator]))
        elif "NCCL_HOST_IP" in env:
            address = f"{env['NCCL_HOST_IP']}:{env['NCCL_PORT']}"
            place = Place(int(rank), int(env["MLX_WORLD_SIZE"]), "nccl", *_behind([address]))
        elif "MLX_HOSTFILE" in env:
            nodes = json.loads(Path(env["MLX_HOSTFILE"]).read_text() or "[]") or [[":0"]]
            place = Place(int(rank), len(nodes), "ring", *_behind([a for node in nodes for a in node]))
        else:
            return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"MLX_RANK is set, but not what goes with it ({error}); start with mlx.launch") from error
    return place if place.size > 1 else None


def _behind(addresses: list[str]) -> tuple[str, int]:
    """Return the host of the first address, and the port after the last of all."""
    return addresses[0].rpartition(":")[0].strip("[]"), max(int(a.rpartition(":")[2]) for a in addresses) + 1


@cache
def group_of(backend: str) -> mx.distributed.Group:
    """Return MLX's group of all ranks. Waits for the others; raises RuntimeError where they don't come."""
    return mx.distributed.init(strict=True, backend=backend)


def from_first(group: mx.distributed.Group, numbers: list[int]) -> list[int]:
    """Return rank 0's numbers, of 31 bits, on all ranks; the others give as many."""
    with execution():
        given = mx.array(numbers if group.rank() == 0 else [0] * len(numbers), mx.int32)
        sums = mx.distributed.all_sum(given, group=group, stream=collective_stream())
        mx.eval(sums)
    return cast("list[int]", sums.tolist())
