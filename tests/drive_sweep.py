"""A driver in a process of its own: `python -m tests.drive_sweep JSON` with out, address, gang and faults."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from runner import sweep, work
from runner.folder import lease
from runner.gang.ray_start import LOOPBACK_VARIABLE
from runner.life import claims
from runner.machine import head_watch
from runner.spec.gang import parse_gang
from tests.stub_work import TARGET
from tests.sweep_tools import QUICK, make_spec


def main() -> int:
    """Run the sweep that the argument describes; data is never read."""
    given = json.loads(sys.argv[1])
    lease.LEASE_TTL_S = given.get("lease_ttl_s", lease.LEASE_TTL_S)
    head_watch.KNOCKS = given.get("knocks", head_watch.KNOCKS)
    head_watch.KNOCK_EVERY_S = head_watch.KNOCK_S = given.get("knock_s", head_watch.KNOCK_S)
    if given.get("on_loopback", True):
        os.environ[LOOPBACK_VARIABLE] = "0"
    sweep.data_hash = lambda _data, **_more: "d" * 64
    sweep.data_problems = lambda _data: []
    limits = replace(QUICK, **given.get("limits", {}))
    is_local = given.get("is_local", False)
    shape = parse_gang(given.get("gang", {"cpus": 1} if is_local else {"gpus": 1, "cpus": 8}))
    claims.SILENT_S = given.get("silent_s", claims.SILENT_S)
    wanted = ("name", "seeds", "variants", "priority", "preemptible")
    changes = {name: given[name] for name in wanted if name in given}
    spec = make_spec(Path(given["out"]), gang=shape, limits=limits, **changes)
    options = work.Options(
        is_local=is_local, address=given.get("address"), target=given.get("target", TARGET), progress="plain"
    )
    return sweep.run_sweep(spec, options)


if __name__ == "__main__":
    sys.exit(main())
