"""What stands at the switch of a lab: `python -m tests.netlab_servers ADDRESS FOLDER` until standard input closes.

An S3 server on port 5000 with the bucket "sweeps", and on port 5001 a hub that serves the files of FOLDER as a corpus.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tests.fake_hub import FakeHub

S3_PORT, HUB_PORT = 5000, 5001
PREFIX = {".bin": "datasets/datasets/fineweb10B_sp8192/", ".model": "datasets/tokenizers/"}


def main() -> None:
    """Serve."""
    import boto3
    from moto.server import ThreadedMotoServer

    address, folder = sys.argv[1], Path(sys.argv[2])
    files = {f"{PREFIX[path.suffix]}{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub = FakeHub({**files, "datasets/manifest.json": b"{}"}, address=address, port=HUB_PORT)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    store = ThreadedMotoServer(ip_address=address, port=S3_PORT, verbose=False)
    store.start()
    client = boto3.client("s3", endpoint_url=f"http://{address}:{S3_PORT}", region_name="us-east-1")
    client.create_bucket(Bucket="sweeps")
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
