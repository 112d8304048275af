"""How much more host memory this process can get, and whether an error says that there is none left.

The host's free memory counts within the limits of the process's control groups.

The memory limit of a container is that of a control group. Beyond it the kernel kills the process, even if the host has
free memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path("/")


class Files(NamedTuple):
    """The file names and keys in one version of control groups."""

    limit: str
    used: str
    reclaimable: str  # in memory.stat: pages of files, which the kernel drops before an allocation fails


V1 = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Files("memory.max", "memory.current", "inactive_file")


def available_bytes(root: Path = ROOT) -> int:
    """The smallest of what the host and each of the process's control groups have left."""
    with open(root / "proc/meminfo") as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    return max(min([free, *_left_in_groups(root)]), 0)


def _left_in_groups(root: Path) -> Iterator[int]:
    for top, path, files in _hierarchies(root):
        for group in (path, *path.parents):
            left = _left(top / group, files)
            if left is not None:
                yield left


def _hierarchies(root: Path) -> Iterator[tuple[Path, Path, Files]]:
    """Yield where the hierarchies that count memory are mounted, and the path of the process's own group below.

    Inside a container this path may be the host's, although only the container's own group is mounted, at the top.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        below = Path(path.lstrip("/"))
        if "memory" in controllers.split(","):
            yield root / "sys/fs/cgroup/memory", below, V1
        elif number == "0":
            yield root / "sys/fs/cgroup", below, V2


def _left(group: Path, files: Files) -> int | None:
    try:
        limit = (group / files.limit).read_text().strip()
        if limit == "max":
            return None
        used = int((group / files.used).read_text())
        reclaimable = _stat(group, files.reclaimable)
    except (OSError, ValueError):  # there is no such group, or it is the root group, which has no limit
        return None
    return int(limit) - used + reclaimable


def _stat(group: Path, name: str) -> int:
    for line in (group / "memory.stat").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def out_of_memory(error: BaseException) -> bool:
    """Whether the error is CUDA's, Python's or that of torch's CPU allocator, which raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
