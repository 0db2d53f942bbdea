"""`seedsweep plan SPEC`: what would run where, and whether it can, without starting anything."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.life.capacity import Node
    from runner.plan import Plan

SHOWN_NAMES = 12


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    parser.add_argument("spec", metavar="SPEC", help="sweep spec, a YAML file")
    parser.add_argument("--out", metavar="DIR", help="run directory or URI, instead of the spec's own")
    parser.add_argument("--address", metavar="A", help="Ray cluster to look at; without it this machine")


def execute(args: argparse.Namespace) -> int:
    """Print the plan; 2 if the gang fits nowhere, and no node is waited for, or data is missing."""
    from runner.plan import make_plan
    from runner.spec.read import load_spec

    spec = load_spec(args.spec, out=args.out)
    plan = make_plan(spec, find_nodes(args.address))
    print_plan(plan)
    sys.stdout.flush()
    for problem in plan.problems:
        print(f"seedsweep: error: {problem}", file=sys.stderr)
    return 2 if plan.problems else 0


def find_nodes(address: str | None) -> tuple[Node, ...]:
    """Return the nodes of the cluster at address, or this machine."""
    from runner.machine.node import this_machine

    if address is None:
        return (this_machine(),)
    from runner.gang.ray_backend import connect, disconnect, living_nodes

    connect(address)
    try:
        return living_nodes()
    finally:
        disconnect()


def print_plan(plan: Plan) -> None:
    """Print config, hashes, gangs, runs and the estimate."""
    import dataclasses

    import yaml

    from runner.plan import slots_lines, slots_per_node
    from runner.spec.sweep import seeds_line
    from runner.view.progress import duration

    spec = plan.spec
    what = f"preset {spec.preset}" if spec.program is None else f"program {spec.program.folder}"
    print(f"sweep {spec.name}: {what}, {len(plan.runs)} run(s) -> {spec.out}")
    print(seeds_line(spec))
    print("config:" if spec.program is None else "program:")
    plain = json.loads(json.dumps(dataclasses.asdict(spec.config) if spec.program is None else spec.program.to_json()))
    print("".join(f"  {line}\n" for line in yaml.safe_dump(plain, sort_keys=False).splitlines()), end="")
    for name, value in plan.hashes.items():
        print(f"{name}: {value}")
    print(f"gang: {spec.gang.describe()}; restart: {spec.limits.restart}; {spec.limits.attempts} attempts")
    if spec.priority or spec.preemptible:
        makes_way = "; its gangs make way for a higher one" if spec.preemptible else ""
        print(f"priority: {spec.priority} among the sweeps of the cluster{makes_way}")
    for line in slots_per_node(plan):
        print(f"node {line}")
    for line in slots_lines(plan):
        print(line)
    for key, left in plan.runs.items():
        print(f"run {key.name}: {left}")
    if plan.stages:
        print_stages(plan)
        return
    each = "" if plan.seed_s is None else f"about {duration(plan.seed_s)} a run, "
    whole = "" if plan.sweep_s is None else f"{duration(plan.sweep_s)} in all, "
    hours = "" if plan.gpu_hours is None else f"{hours_and_cost(plan.gpu_hours, plan)} "
    print(f"estimate: {each}{whole}{hours}({plan.seed_source})")


def hours_and_cost(gpu_hours: float, plan: Plan) -> str:
    """Return GPU-hours, and what they cost where the spec names a price."""
    price = plan.spec.price_per_gpu_hour
    return f"{gpu_hours:.2f} GPU-hours" + ("" if price is None else f" (cost {gpu_hours * price:.2f})")


def print_stages(plan: Plan) -> None:
    """Print which stages of an ablation are shared, and what that saves."""
    from runner.view.progress import duration

    for stage in plan.stages:
        shared = "; ".join(f"shared by {describe_names(names)}" for names in stage.shared_by) or "shared by none"
        print(f"stage {stage.stage}: {stage.num_computed} to compute for {stage.num_wanted} run(s); {shared}")
    if plan.sweep_s is None:
        print(f"estimate: ({plan.seed_source})")
        return
    alone_s = plan.stage_s(is_shared=False)
    assert alone_s is not None, plan.stages
    with_hours, without = plan.hours(is_shared=True), plan.hours(is_shared=False)
    assert with_hours is not None
    assert without is not None
    print(
        f"estimate: {duration(plan.sweep_s)} in all, {hours_and_cost(with_hours, plan)}; without sharing "
        f"{duration(alone_s / plan.at_once)}, {hours_and_cost(without, plan)} ({plan.seed_source})"
    )


def describe_names(names: Sequence[str]) -> str:
    """Return the names of variants, the first dozen of many."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
