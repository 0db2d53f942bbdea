"""How many CPUs this process may use: those it is allowed to run on, and no more than its control groups pay for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cpus(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUPS) -> int:
    """Return the number of CPUs, at least 1: affinity (`taskset`, batch systems) and the quota of containers."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min([allowed, *(int(quota) for quota in cpu_quotas(root, own))]))


def cpu_quotas(root: Path, own: Path) -> Iterator[float]:
    """Yield every quota in CPUs that holds for this process, in the files of version 2 and of version 1.

    A group's limit binds all below it, so each folder up to the root counts. Inside a container the path in own may
    not exist: its group then stands at the root itself.
    """
    for folder, is_v2 in cgroup_folders(root, own):
        files = ["cpu.max"] if is_v2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        quota, period = ([word for name in files for word in read_text(folder / name).split()] + ["", ""])[:2]
        if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):  # "max" and -1 mean no limit
            yield int(quota) / int(period)


def cgroup_folders(root: Path, own: Path) -> Iterator[tuple[Path, bool]]:
    """Yield each folder of this process's groups up to the root, with whether it is of version 2."""
    for line in read_text(own).splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        is_v2 = number == "0" and not controllers
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        top = next((top for top in (root / controllers, root / "cpu") if controllers and top.is_dir()), root)
        names = [name for name in path.split("/") if name not in ("", "..")]
        for depth in range(len(names), -1, -1):
            yield top.joinpath(*names[:depth]), is_v2


def read_text(path: Path) -> str:
    """Return the text of a small file, empty where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
