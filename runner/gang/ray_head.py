"""A process beside the driver that talks to Ray first: it starts a cluster and holds it, or tries an address out.

Ray may hang, raise from deep inside, or end the whole process from C++. Here that costs one child, which the driver
can give up on; what it found goes to the driver as one JSON line. A cluster ends with its driver however that ends:
its end of the pipe closes, and the holder shuts Ray down and removes the session's folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

LOOPBACK = "127.0.0.1"
LOCK_NAME = "seedsweep.lock"  # held as long as the session's holder lives
ORPHAN_S = 60.0  # for a start to finish after its driver is gone


def main() -> None:
    """Do what the arguments say: 'start FOLDER NUM_CPUS' or 'try ADDRESS'."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints is not an answer
    os.set_inheritable(answers.fileno(), False)
    task, *arguments = sys.argv[1:]
    if task == "try":
        tell(answers, try_out(*arguments))
    else:
        hold(Path(arguments[0]), int(arguments[1]), answers)


def tell(answers: IO[str], answer: dict[str, str]) -> None:
    """Write one answer to the driver."""
    print(json.dumps(answer), file=answers, flush=True)


def try_out(address: str) -> dict[str, str]:
    """Return the address if a driver can connect there, else why not."""
    return connected(address=address)


def hold(folder: Path, num_cpus: int, answers: IO[str]) -> None:
    """Start a cluster with its files in folder, and keep it until the driver's end of standard input closes."""
    is_alone = threading.Event()
    threading.Thread(target=wait_for_driver_end, args=(is_alone,), daemon=True).start()
    with FileLock(folder / LOCK_NAME):
        answer = connected(
            address="local", _node_ip_address=LOOPBACK, include_dashboard=False, num_cpus=num_cpus,
            _temp_dir=str(folder),
        )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):  # the driver was killed meanwhile: all this ends below
            tell(answers, answer)
        if "error" in answer:
            return
        is_alone.wait()
        import ray

        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_driver_end(is_alone: threading.Event) -> None:
    """Note the end of the driver; end this process too if it is still starting Ray a while later."""
    sys.stdin.buffer.read()
    is_alone.set()
    threading.Event().wait(ORPHAN_S)
    os._exit(1)  # Ray's own watchdog ends what was started


def connected(**options: Any) -> dict[str, str]:
    """Return the address of the cluster that Ray joins or starts with options, or why it cannot, in one line."""
    import ray

    try:
        ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
        return {"address": str(ray.get_runtime_context().gcs_address)}
    except Exception as error:  # Ray raises plain Exception too; the driver gets its first line and the log has it all
        logging.basicConfig()
        logging.getLogger(__name__).exception("Ray cannot be reached")
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"error": lines[0] if lines else type(error).__name__}


if __name__ == "__main__":
    main()
