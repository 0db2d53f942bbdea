"""Where and with what a program runs on its node: its working folder, its interpreter, its environment, its command.

    WORKDIR/program/attempt=A/work    a fresh copy of its folder, its files read-only, inputs linked: its current folder
    WORKDIR/program/attempt=A/out     what {out} and SEEDSWEEP_OUT name; results.json is looked for here first

Of the driver's environment only what is listed below reaches it: another person's shell must not decide a score.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from runner.errors import PreflightError
from runner.folder.program_files import archive_path, clear_folder, folder_hash, unpack
from runner.folder.program_inputs import combine_inputs, hash_inputs
from runner.folder.storage import LocalStorage, open_storage
from runner.gang.rank import Rank
from runner.life.job import Job
from runner.machine.environments import make_environment
from runner.machine.kept import GANG_VARIABLE
from runner.provenance import SETTING_PREFIXES
from runner.spec.program import Program, fill
from runner.spec.secrets import looks_like_secret

LOOPBACK = "127.0.0.1"
KEPT_NAMES = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CC", "CXX", "CPATH",
    "LIBRARY_PATH", "HF_HOME", "XDG_CACHE_HOME", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
})  # fmt: skip
KEPT_PREFIXES = ("LC_", "SSL_CERT", *(prefix for prefix in SETTING_PREFIXES if not prefix.startswith("PYTHON")))
PROXIES = frozenset({"http_proxy", "https_proxy", "no_proxy", "all_proxy"})
TORCHRUN = "torch.distributed.run"
PYTHONS = ("python", "python3")  # the interpreter of the program's environment, whatever PATH calls so


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What rank 0 has prepared for all processes of an attempt."""

    work: Path
    out: Path
    python: str  # the interpreter that `python` means
    port: int  # where the processes may meet; held for them

    def write(self, storage: LocalStorage, name: str) -> None:
        """Let the other ranks know."""
        plain = {field: str(getattr(self, field)) for field in ("work", "out", "python", "port")}
        storage.write(name, json.dumps(plain).encode())

    @classmethod
    def read(cls, path: Path) -> Place:
        """Return what rank 0 has written."""
        plain = json.loads(path.read_text())
        return cls(
            work=Path(plain["work"]), out=Path(plain["out"]), python=plain["python"], port=int(plain["port"]),
        )  # fmt: skip


def attempt_folder(job: Job) -> Path:
    """Return the folder of an attempt of a program."""
    return Path(job.workdir) / "program" / f"attempt={job.attempt}"


def check_inputs(rank: Rank, program: Program) -> dict[str, str]:
    """Return the sha256 of each input of this node. Raises PreflightError if one is missing, or not the driver's."""
    host, wanted = rank.node, rank.job.record.get("data_hash")
    try:
        hashes = hash_inputs(program.inputs, rank.tick)
    except ValueError as error:
        raise PreflightError(f"node {host}: {error}") from None
    if wanted and combine_inputs(hashes) != wanted:
        raise PreflightError(f"node {host} has other inputs than the driver: {', '.join(hashes)}")
    return hashes


def make_folders(job: Job, program: Program) -> tuple[Path, dict[str, str]]:
    """Unpack the program for this attempt, link its inputs; return its working folder and its files' sha256.

    What earlier attempts left is taken away: a program starts from scratch, and what one of the same number printed is
    not this one's. Raises PreflightError if the sweep's copy is damaged, or an input's link would lie over a file.
    """
    clear_folder(Path(job.workdir) / "program")
    for printed in job.log_path(0).parent.glob(f"attempt={job.attempt}-rank=*.log"):
        if printed.suffixes == [".log"]:  # the runner's own have begun
            printed.unlink()
    place = attempt_folder(job)
    name = str(job.record["code_hash"])
    hashes = unpack(open_storage(job.out).read(archive_path(name)), place / "work")
    if folder_hash(hashes) != name:
        raise PreflightError(f"{job.out}/{archive_path(name)} is damaged; remove it and run the same command again")
    (place / "out").mkdir()
    for link, path in program.inputs.items():
        if link != path:
            target = place / "work" / link
            if target.exists():
                raise PreflightError(f"program.inputs: {link} is a file of the program's folder too; rename the link")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return place / "work", hashes


def find_python(rank: Rank, program: Program, work: Path) -> str:
    """Return the interpreter that the program is run by: of its requirements, or this process's own."""
    if not program.requirements:
        return sys.executable
    path = work / program.requirements
    if not path.is_file():
        raise PreflightError(f"program.requirements={program.requirements} is not in program.folder")
    return str(make_environment(path, rank.tick))


def hold_port() -> tuple[socket.socket, int]:
    """Return a port of loopback for the program's processes to meet at, and the socket that holds it for them.

    The socket is bound and does not listen: nobody else is given the port, and a server that allows the reuse of its
    address, as PyTorch's does, can listen there.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    for option in ("SO_REUSEADDR", "SO_REUSEPORT"):
        if hasattr(socket, option):
            holder.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
    holder.bind((LOOPBACK, 0))
    return holder, int(holder.getsockname()[1])


def placeholders(job: Job, place: Place) -> dict[str, str]:
    """Return what the placeholders of a command mean for one run."""
    return {
        "seed": str(job.key.seed), "run_id": f"{job.record.get('sweep', 'sweep')}-{job.key.name}".replace("=", ""),
        "world_size": str(job.world_size), "workdir": str(place.work), "out": str(place.out),
    }  # fmt: skip


def make_environment_of(rank: Rank, program: Program, place: Place) -> dict[str, str]:
    """Return the whole environment of this rank's process."""
    job, threads = rank.job, str(rank.job.threads)
    values = placeholders(job, place)
    env = kept_environment(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(place.python).parent), env.get("PATH", os.defpath)])
    env |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}  # lines as they come; stacks when it is aborted
    env |= {name: fill(value, values) for name, value in program.env.items()} | dict(job.secrets)
    if program.seed_env:
        env[program.seed_env] = str(job.key.seed)
    env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_of(rank))
    env |= {"SEEDSWEEP_OUT": str(place.out), GANG_VARIABLE: job.token}
    if program.launcher == "torchrun":
        return env
    return env | {
        "RANK": str(rank.rank), "LOCAL_RANK": str(rank.rank), "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(job.world_size), "GROUP_RANK": "0", "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(place.port),
    }  # fmt: skip


def kept_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this process that a program may see: none of Ray's, no setting, nothing secret."""
    return {
        name: value
        for name, value in environment.items()
        if (name in KEPT_NAMES or name.startswith(KEPT_PREFIXES) or name.lower() in PROXIES)
        and not looks_like_secret(name, value)
    }


def gpus_of(rank: Rank) -> tuple[str, ...]:
    """Return the GPUs of the gang as CUDA_VISIBLE_DEVICES names them: those that Ray gave, else the first ones."""
    if not rank.job.uses_gpus:
        return ()
    if rank.visible_gpus:
        return rank.visible_gpus
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (
        [name.strip() for name in shown.split(",")] if shown else [str(index) for index in range(rank.job.world_size)]
    )
    return tuple(names[: rank.job.world_size])


def make_command(job: Job, program: Program, place: Place) -> list[str]:
    """Return the command of each process; with torchrun the one that starts all of them."""
    values = placeholders(job, place)
    words = [fill(word, values) for word in program.command]
    first = PurePath(words[0]).name
    if program.launcher == "none":
        return [place.python, *words[1:]] if words[0] in PYTHONS else words
    if first == "torchrun":
        return [place.python, "-m", TORCHRUN, *words[1:]]
    script = words[1:] if words[0] in PYTHONS else ["--no-python", *words]
    start = ["-m", TORCHRUN, "--standalone", f"--nproc_per_node={job.world_size}"]
    return [place.python, *start, *script]


def find_command(words: list[str], env: Mapping[str, str], work: Path, node: str) -> list[str]:
    """Return a command with its first word as a path. Raises PreflightError if there is no such program."""
    if os.sep in words[0]:
        path = str(work / words[0])
        found = path if os.access(path, os.X_OK) else None
    else:
        found = shutil.which(words[0], path=env["PATH"])
    if found is None:
        raise PreflightError(f"node {node}: program.command starts with {words[0]!r}, which cannot be run there")
    return [found, *words[1:]]
