"""A real S3 server of this machine (moto's), with one bucket."""

import contextlib
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest

from cafemed import paths

SERVER = paths.PROJECT_DIR / ".bench" / "s3" / "bin" / "moto_server"


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """Yields the bucket's URL; this process, and those it starts, find it by their environment."""
    if not SERVER.exists():
        pytest.skip("no S3 server here: make bench-env")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [SERVER, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        try:
            for _ in range(300):
                try:
                    request = urllib.request.Request(f"{endpoint}/models", method="PUT")
                    urllib.request.urlopen(request, timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield "s3://models"
        finally:
            process.terminate()
            process.wait(30)
