"""What a sweep asks of its gangs: the job of each attempt, and the commit of what came of it."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from model.files.plain import read_json_if_any
from model.pipeline.identity import planning_identity
from model.report import STAGES
from runner.folder.commit import PROGRAM_STAGE, commit_run
from runner.folder.directory import SweepDirectory
from runner.folder.mirror import open_mirror
from runner.folder.program_files import find_files, keep_folder, kept_folder
from runner.folder.storage import local_root, open_storage
from runner.life.job import PIPELINE, PROGRAM, PROGRAM_GRACE_S, Job
from runner.life.sharing import Sharing
from runner.life.states import Run, State
from runner.provenance import Git
from runner.spec.sweep import RunKey, SweepSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a sweep is run, apart from its spec."""

    is_local: bool = False  # in this process, without Ray
    address: str | None = None
    allow_code_change: bool = False
    progress: str = "auto"
    git: Git | None = None  # as recorded at submission; None: ask git here
    target: str = PIPELINE
    only: frozenset[RunKey] | None = None  # these runs only


class SweepWork:
    """Makes the jobs of a sweep, and commits what comes of them."""

    def __init__(self, spec: SweepSpec, record: dict[str, Any], options: Options, directory: SweepDirectory) -> None:
        self.spec, self.record, self.options, self.directory = spec, record, options, directory
        self.root = local_root(spec.out) or scratch_root(spec.out)
        self.nodes: list[str] = []
        self.probe = ""
        self.secrets = read_secrets(spec)

    def leave_probe(self) -> None:
        """Leave a file in the sweep's folder that every node must see."""
        if local_root(self.spec.out) is not None:
            probe = secrets.token_hex(8)
            open_storage(self.spec.out).write(f"probes/{probe}", b"")
            self.probe = probe

    def remove_probe(self) -> None:
        """Take the probe away again, and only it: there may be another driver's by now."""
        if self.probe:
            (self.root / "probes" / self.probe).unlink(missing_ok=True)
            with suppress(OSError):
                (self.root / "probes").rmdir()

    def keep_program(self) -> None:
        """Put the folder of the program where every gang can take it from."""
        storage, program = open_storage(self.spec.out), self.spec.program
        if program is not None and kept_folder(storage, program.folder) is None:
            keep_folder(storage, find_files(Path(program.folder)), self.record["code_hash"])

    def workdir(self, key: RunKey) -> Path:
        """Return the run directory of a run on this machine."""
        return self.root / "seeds" / key.name

    def record_of(self, run: Run) -> dict[str, Any]:
        """Return what attempt.json says of a run before its node is known."""
        config = self.spec.config_for(run.key)
        return {
            **self.record,
            "config_hash": self.spec.hash_of(config),
            "variant": run.key.variant_name,
            "seed": run.key.seed,
            "repeat": run.key.repeat,
            "config": self.spec.settings_for(run.key),
            "started_at": time.time() - time.monotonic() + run.placed_at,
        }

    def make_job(self, run: Run) -> Job:
        """Return the job of a placed run."""
        return Job(
            key=run.key,
            attempt=run.attempt,
            config=self.spec.config_for(run.key),
            world_size=self.spec.gang.world_size,
            hosts=self.spec.gang.hosts,
            threads=self.spec.gang.cpus,
            uses_gpus=self.spec.gang.gpus > 0,
            workdir=str(self.workdir(run.key)),
            out=self.spec.out,
            restart=self.spec.limits.restart,
            allow_code_change=self.options.allow_code_change,
            record=self.record_of(run),
            fetch=self.spec.fetch,
            target=PROGRAM
            if self.spec.program is not None and self.options.target == PIPELINE
            else self.options.target,
            probe=self.probe,
            disk_s=self.spec.limits.disk_s,
            log_bytes=self.spec.limits.log_bytes,
            epoch=self.directory.owner.epoch if self.directory.owner is not None else 0,
            program=self.spec.program,
            secrets=self.secrets,
            grace_s=PROGRAM_GRACE_S if self.spec.limits.stop_grace_s is None else self.spec.limits.stop_grace_s,
        )

    def share_stages(self, runs: Iterable[Run]) -> Sharing:
        """Return which stages runs have in common, and which of these earlier drivers' gangs have finished."""
        found = list(runs)
        if not self.spec.ablation:
            return Sharing()  # seeds and repeats never share
        sharing = Sharing(identities(self.spec, self.record["data_hash"], self.record["code_hash"]))
        for run in found:
            if run.attempt:
                sharing.finish(run.key, self.recorded_stages(run.key))
        return sharing

    def recorded_stages(self, key: RunKey) -> list[str]:
        """Return the stages of which a run's directory has a record that was made by the code of this sweep."""
        storage = open_storage(self.spec.out)
        folder = f"seeds/{key.name}/stages"
        names = set(storage.names(folder))
        return [
            stage
            for stage in STAGES
            if f"{stage}.json" in names and self.is_ours(storage.read(f"{folder}/{stage}.json"))
        ]

    def is_ours(self, content: bytes) -> bool:
        """Return whether a stage's record is whole and of this sweep's code, and so for others to take."""
        try:
            record = json.loads(content)
        except ValueError:
            return False
        if not isinstance(record, dict) or record.get("code_hash") != self.record["code_hash"]:
            return False
        return record.get("identity", "") is not None  # of a run whose code changed on the way nobody takes anything

    def commit(self, run: Run) -> None:
        """Write the results of an attempt that ended. Raises OSError or ValueError if that fails."""
        places = (run.node_id, *run.peers)
        self.nodes += [node_id for node_id in places if node_id not in self.nodes]
        label = "+".join(f"node-{self.nodes.index(node_id)}" for node_id in places)
        mirror = open_mirror(self.spec.out, run.key.name, self.workdir(run.key))
        if mirror is not None:
            mirror.fetch_results()
        commit_run(
            self.spec, self.workdir(run.key), run, record=self.record_of(run), node_label=label,
            aside_folder=str(self.directory.place or ""),
        )  # fmt: skip
        if run.state is State.COMMITTING and self.record["data_hash"] is None:
            self.record["data_hash"] = stage_data_hash(self.workdir(run.key))  # later seeds must agree


def identities(spec: SweepSpec, data_hash: str | None, code_hash: str) -> dict[RunKey, dict[str, str]]:
    """Return what names each stage of every run before work starts: equal names, equal outputs.

    Seed and repeat are put beside a variant's identity instead of into it: a sweep has many of them.
    """
    named = {
        variant.name: {
            stage: planning_identity(
                stage, variant.config, seed=0, repeat=0, world_size=spec.gang.world_size, data_hash=data_hash,
                code_hash=code_hash,
            )
            for stage in STAGES
        }
        for variant in spec.variants
    }  # fmt: skip
    return {
        key: {stage: f"{name}-{key.seed}-{key.repeat}" for stage, name in named[key.variant_name].items()}
        for key in spec.keys
    }


def stage_data_hash(workdir: Path) -> str | None:
    """Return the data hash in the record of a run's first stage, None where there is none."""
    first = "train" if (workdir / "stages" / "train.json").exists() else PROGRAM_STAGE
    return read_json_if_any(workdir / "stages" / f"{first}.json").get("data_hash")


def read_secrets(spec: SweepSpec) -> dict[str, str]:
    """Return the secret variables of a program as this process has them. Raises ValueError naming one not set."""
    named = spec.program.secrets if spec.program is not None else {}
    for name, source in named.items():
        if source not in os.environ:
            raise ValueError(f"program.env.{name}: {source} is not set in the environment of the driver; set it there")
    return {name: os.environ[source] for name, source in named.items()}


def scratch_root(out: str) -> Path:
    """Return the node-local folder where runs of a sweep on an object store do their work."""
    return Path(tempfile.gettempdir()) / f"seedsweep-{os.getuid()}" / sha256(out.encode()).hexdigest()[:16]
