"""A made-up training program in the challenge's log format: two ranks over gloo at most, no data, a few seconds.

What it should do wrong is said by MISCHIEF, for single seeds by MISCHIEFS: kill, hang, unscored, exit, daemon, flood,
endless, stderr, remove, vanish, alter, seed, deaf, mumble. A rank is killed or hangs once only where ONCE names a
folder.
"""

import hashlib
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from helper import loss_at

SEED, RANK = int(os.environ["SEED"]), int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
STEPS, STEP_S = int(os.environ.get("STEPS", "20")), float(os.environ.get("STEP_S", "0.02"))
MISCHIEF = json.loads(os.environ.get("MISCHIEFS", "{}")).get(str(SEED), os.environ.get("MISCHIEF", ""))
stream = sys.stderr if MISCHIEF == "stderr" else sys.stdout


def say(text):
    if RANK == 0:
        print(text, file=stream, flush=True)


def is_due(name):
    """Return whether this is the moment for a mischief."""
    if name != MISCHIEF:
        return False
    once = Path(os.environ["ONCE"], str(SEED)) if "ONCE" in os.environ and name in ("kill", "hang") else None
    if once is not None and once.exists():
        return False
    if once is not None:
        once.touch()
    return True


def misbehave():
    if MISCHIEF in ("kill", "hang") and RANK == WORLD_SIZE - 1 and is_due(MISCHIEF):
        if MISCHIEF == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)
    if is_due("exit"):
        say("about to give up")
        sys.exit(3)
    if is_due("daemon"):
        code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(3600)"
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        time.sleep(0.3)
    if is_due("flood"):
        sys.stdout.write("".join(f"line {number}\n" for number in range(1_000_000)))
    while is_due("endless"):
        print("on and on " * 1000, flush=True)
    for _ in range(80 if is_due("mumble") else 0):  # longer than it may be silent
        print("hm", flush=True)
        time.sleep(0.1)
    if is_due("remove"):
        shutil.rmtree(os.getcwd())
    if is_due("alter"):
        os.chmod("helper.py", 0o644)
        Path("helper.py").write_text("def loss_at(seed, step):\n    return 1.0\n")


def meet():
    """Sum a figure over the ranks, as a training step does."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([float(RANK)])
    return lambda: dist.all_reduce(total.fill_(RANK)), dist.destroy_process_group


def main():
    if MISCHIEF == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    is_gang = WORLD_SIZE > 1 and MISCHIEF in ("", "kill", "hang")  # the rest need no PyTorch
    together, part = meet() if is_gang else (lambda: None, lambda: None)
    say(f"seed: {SEED}" if MISCHIEF != "seed" else "seed: 7")
    begun = time.monotonic()
    for step in range(1, STEPS + 1):
        time.sleep(STEP_S)
        if step == STEPS // 2:
            misbehave()
        together()
        milliseconds = 1000 * (time.monotonic() - begun)
        say(f"step:{step}/{STEPS} train_loss:{loss_at(SEED, step):.4f} train_time:{milliseconds:.0f}ms")
    part()
    if MISCHIEF == "unscored":
        say("final val_bpb will be ready tomorrow")
        return
    if RANK:
        return
    nats = loss_at(SEED, STEPS)
    say(f"{STEPS}/{STEPS} val_loss:{nats + 0.02:.4f} val_bpb:{(nats + 0.02) / 2.5:.4f}")
    weights = b"".join(hashlib.sha256(f"{SEED} {block}".encode()).digest() for block in range(100))
    Path("final_model.int6.ptz").write_bytes(lzma.compress(weights))
    model, code = Path("final_model.int6.ptz").stat().st_size, Path(__file__).stat().st_size
    say(f"Serialized model int6+lzma: {model} bytes")
    say(f"Total submission size int6+lzma: {model + code} bytes")
    say(f"quantized val_loss:{nats + 0.01:.6f} val_bpb:{(nats + 0.01) / 2.5:.6f} eval_time:10ms")
    say(f"quantized_ttt_lora val_loss:{nats:.6f} val_bpb:{nats / 2.5:.6f} eval_time:20ms")
    if os.environ.get("RESULTS"):
        figures = {"post_ttt_bpb": nats / 2.5, "steps": STEPS, "val_documents_hash": "ab" * 32}
        figures |= json.loads(os.environ["RESULTS"])
        Path(os.environ["SEEDSWEEP_OUT"], "results.json").write_text(json.dumps(figures))
    if MISCHIEF == "vanish":
        shutil.rmtree(os.getcwd())


if __name__ == "__main__":
    main()
