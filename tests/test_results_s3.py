"""results.store.writer on an object store: the same commits and reads at an s3:// address."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

import results
from jobs.cli import main
from tests.fake_runs import commit_failed, fake_sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Return the address of a bucket on a loopback S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="sweeps")
        yield f"s3://sweeps/demo?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    server.stop()


def test_a_sweep_on_s3_reads_like_a_local_one(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (42, 0):
        fake_sweep(bucket, (seed,))
    commit_failed(bucket, 7)
    assert sorted(results.load(bucket)["seed"]) == [0, 7, 42]
    assert (
        len(
            results.documents(
                bucket,
            )
        )
        == 80
    )
    assert main(["table", bucket]) == 1
    assert "2 of 3 runs finished" in capsys.readouterr().out
