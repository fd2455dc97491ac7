"""An object store that speaks S3, on this machine (moto's server)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rmmformat as rmm
from rmmformat.errors import RemoteError, RmmError
from rmmformat.pipeline import open_sources


class Bucket:
    """A bucket, and what its server was asked for."""

    def __init__(self, root: str, seen: list[tuple[str, str | None]]) -> None:
        self.root, self.seen = root, seen


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    seen: list[tuple[str, str | None]] = []
    inner = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start: Any) -> Any:
        seen.append((environ["REQUEST_METHOD"], environ.get("HTTP_RANGE")))
        return inner(environ, start)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        s3fs.S3FileSystem().mkdir("skills")
        try:
            yield Bucket("s3://skills", seen)
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.shutdown()
            thread.join()


def test_there_and_back(bucket: Bucket, demo_adapters: Path) -> None:
    url = f"{bucket.root}/a/x.rmm"
    report = rmm.convert([demo_adapters / "bbc", demo_adapters / "imdb"], url, exact=True)
    assert report.path == url
    with pytest.raises(RmmError, match="exists already"):
        rmm.convert([demo_adapters / "bbc"], url, exact=True)
    bucket.seen.clear()
    with rmm.open(url) as collection:
        assert len(bucket.seen) <= 3  # size, header, index
        loaded = collection.load("imdb")
        assert len(bucket.seen) <= 5
    ranges = [text for method, text in bucket.seen if method == "GET"]
    assert all(ranges)
    (task,) = open_sources(demo_adapters / "imdb")
    for name in task.targets:
        assert np.array_equal(loaded[name].A, task.factors(name).A.astype(np.float32))
    assert rmm.validate(url).ok


def test_adapters_in_a_bucket(bucket: Bucket, demo_adapters: Path) -> None:
    import fsspec

    store = fsspec.filesystem("s3")
    store.put(f"{demo_adapters}/bbc", "skills/hub/bbc", recursive=True)
    store.put(f"{demo_adapters}/spam", "skills/hub/spam", recursive=True)
    tasks = open_sources(f"{bucket.root}/hub")
    assert [task.name for task in tasks] == ["bbc", "spam"]
    (local,) = open_sources(demo_adapters / "spam")
    for name in local.targets:
        assert np.array_equal(tasks[1].factors(name).B, local.factors(name).B)


def test_what_is_not_there(bucket: Bucket) -> None:
    with pytest.raises(RemoteError, match="no such file"):
        rmm.open(f"{bucket.root}/none.rmm")
    with pytest.raises(RemoteError):
        rmm.open("s3://nobody/none.rmm")
