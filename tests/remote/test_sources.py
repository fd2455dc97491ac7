"""Sources and results of conversions behind URLs, and the verbs that take URLs."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner, Result

import rmmformat as rmm
from rmmformat.cli.main import main
from rmmformat.errors import RemoteError, RmmError, SourceError, UnsupportedError
from rmmformat.pipeline import open_sources
from rmmformat.remote import is_url, shown

from .server import Handler, Request, Server


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary files of the product, to see that none is left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(folder))
    return folder


@pytest.fixture
def adapters(server: Server, demo_adapters: Path) -> str:
    for path in demo_adapters.rglob("*"):
        if path.is_file():
            name = path.relative_to(demo_adapters).as_posix()
            server.files[f"hub/adapters/{name}"] = path.read_bytes()
    server.files["hub/adapters/imdb/README.md"] = b"# read me"
    server.files["hub/adapters/imdb/optimizer.bin"] = b"x" * 1000
    return server.url("hub/adapters")


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output
    return result


def converted(sources: Any, out: Path, **options: Any) -> bytes:
    rmm.convert(sources, out, components=1, **options)
    return out.read_bytes()


def test_what_is_a_url() -> None:
    for text in ("https://a/b", "s3://b/k", "simplecache::s3://b/k", "HTTP://x", "memory://x"):
        assert is_url(text)
    for text in ("a/b", "C:\\x", "name=https://a", "://x", Path("https://a"), "a:b//c", b"s3://x"):
        assert not is_url(text)


def test_what_is_shown_of_a_url() -> None:
    assert shown("https://u:p@h:1/a/b?sig=1#x") == "https://h:1/a/b"
    assert shown("s3://bucket/key") == "s3://bucket/key"
    assert shown("simplecache::https://u:p@h/a?b=c") == "simplecache::https://h/a"


def test_a_folder_of_adapters(
    adapters: str, server: Server, demo_adapters: Path, tmp_path: Path, temporary: Path
) -> None:
    remote = converted([f"{adapters}/"], tmp_path / "remote.rmm")
    assert remote == converted([demo_adapters], tmp_path / "local.rmm")
    fetched = {r.path.rpartition("/")[2] for r in server.requests if r.n_sent}
    assert not {"README.md", "optimizer.bin"} & fetched
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_one_adapter_named_and_unnamed(adapters: str, tmp_path: Path) -> None:
    converted([f"{adapters}/imdb", f"other={adapters}/bbc/"], tmp_path / "x.rmm")
    with rmm.open(tmp_path / "x.rmm") as collection:
        assert collection.tasks == ("imdb", "other")


def test_a_server_without_listings(adapters: str, server: Server, tmp_path: Path) -> None:
    server.listings = False
    converted({"mine": f"{adapters}/imdb/"}, tmp_path / "x.rmm")
    with rmm.open(tmp_path / "x.rmm") as collection:
        assert collection.tasks == ("mine",)
    with pytest.raises(SourceError, match="no adapter here"):
        open_sources(f"{adapters}/")


def test_a_file_of_an_adapter_stands_for_it(adapters: str) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (task,) = open_sources(f"{adapters}/imdb/{name}")
        assert task.name == "imdb"


def test_the_task_names_its_url_and_what_was_left(adapters: str) -> None:
    (task,) = open_sources(f"{adapters}/imdb/")
    assert task.path == f"{adapters}/imdb"
    lines = {line.item: line for line in task.ledger}
    assert lines["file README.md"].detail.startswith("not fetched")
    assert lines["file optimizer.bin"].detail.startswith("not fetched")
    assert lines["file adapter_config.json"].action.value == "used"


def test_errors_name_the_url(adapters: str, server: Server) -> None:
    server.files["hub/adapters/imdb/adapter_model.safetensors"] = b"\x08" + bytes(40)
    with pytest.raises(SourceError) as caught:
        open_sources(f"{adapters}/imdb/")
    assert caught.value.path == f"{adapters}/imdb/adapter_model.safetensors"


def test_sources_of_a_store(demo_adapters: Path, tmp_path: Path) -> None:
    store, root = fsspec.filesystem("memory"), f"/{uuid.uuid4()}/adapters"
    store.put(os.fspath(demo_adapters), root, recursive=True)
    remote = converted([f"memory:/{root}"], tmp_path / "remote.rmm")
    assert remote == converted([demo_adapters], tmp_path / "local.rmm")


def test_mixed_sources_may_not_collide(adapters: str, demo_adapters: Path) -> None:
    assert len(open_sources([f"{adapters}/imdb/", demo_adapters / "bbc"])) == 2
    with pytest.raises(RmmError, match="imdb"):
        open_sources([f"{adapters}/imdb/", demo_adapters / "imdb"])


@pytest.mark.parametrize(
    "link", ["../../escape.json", "%2e%2e/adapter_config.json", "a%2Fb.json", "a%5Cb.json"]
)
def test_links_stay_within_the_folder(server: Server, link: str, temporary: Path) -> None:
    def page(handler: Handler, request: Request) -> bool:
        if not request.path.endswith("hub"):
            return False
        body = f'<a href="{link}">x</a>'.encode()
        handler.send(request, 200, body, {"Content-Type": "text/html"})
        return True

    server.trick = page
    with pytest.raises(RmmError):
        open_sources(server.url("hub"))
    gc.collect()
    assert list(temporary.iterdir()) == []
    assert not (temporary.parent / "escape.json").exists()


def test_a_listing_that_does_not_end(server: Server) -> None:
    def endless(handler: Handler, request: Request) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.end_headers()
        handler.close_connection = True
        while request.n_sent < 1 << 30:
            handler.wfile.write(b"<a href=x>" * 100_000)
            request.n_sent += 1_000_000
        return True

    server.trick = endless
    with pytest.raises(RemoteError, match="a page that lists a folder"):
        open_sources(server.url("hub"))
    assert server.n_bytes < 64 << 20


def test_folders_without_end(server: Server) -> None:
    """Every folder lists more folders: it ends at the depth that adapters may have."""

    def deeper(handler: Handler, request: Request) -> bool:
        if not request.path.startswith("hub"):
            return False
        body = b'<a href="a/">a</a><a href="b/">b</a><a href="../">up</a><a href="/hub/">top</a>'
        handler.send(request, 200, body, {"Content-Type": "text/html"})
        return True

    server.trick = deeper
    with pytest.raises(RmmError):
        open_sources(server.url("hub"))
    assert len(server.requests) < 20


def test_names_that_need_escapes(server: Server, demo_adapters: Path) -> None:
    for path in (demo_adapters / "bbc").iterdir():
        server.files[f"hub/my adapter #1/{path.name}"] = path.read_bytes()

    def page(handler: Handler, request: Request) -> bool:
        if request.path not in ("hub/", "hub/my adapter #1/"):
            return False
        names = (
            ["my%20adapter%20%231/"]
            if request.path == "hub/"
            else sorted(name.rpartition("/")[2] for name in server.files)
        )
        body = "".join(f'<a href="{name}">x</a>' for name in names).encode()
        handler.send(request, 200, body, {"Content-Type": "text/html"})
        return True

    server.trick = page
    (task,) = open_sources(server.url("hub/"))
    assert task.name == "my adapter #1"
    assert task.factors(next(iter(task.targets))).rank == 16


def test_a_source_that_does_not_end(
    adapters: str, server: Server, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    from rmmformat.remote import download as remote_download

    usage = type("Usage", (), {"free": 4 << 20})
    monkeypatch.setattr(remote_download.shutil, "disk_usage", lambda _path: usage)

    def endless(handler: Handler, request: Request) -> bool:
        if not request.path.endswith(".safetensors"):
            return False
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        while request.n_sent < 1 << 30:
            handler.wfile.write(bytes(1 << 20))
            request.n_sent += 1 << 20
        return True

    server.trick = endless
    with pytest.raises(RemoteError, match="more than half of the space"):
        open_sources(f"{adapters}/imdb/")
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_a_result_in_a_store(demo_adapters: Path, tmp_path: Path, temporary: Path) -> None:
    url = f"memory://{uuid.uuid4()}/out.rmm"
    report = rmm.convert([demo_adapters], url, components=1)
    assert report.path == url
    local = converted([demo_adapters], tmp_path / "local.rmm")
    assert fsspec.filesystem("memory").cat_file(url) == local
    with pytest.raises(RmmError, match="exists already"):
        rmm.convert([demo_adapters], url, components=1)
    rmm.convert([demo_adapters / "imdb"], url, exact=True, overwrite=True)
    with rmm.open(url) as collection:
        assert collection.tasks == ("imdb",)
    assert list(temporary.iterdir()) == []


def test_a_result_gets_its_name_at_the_end(
    demo_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a store shows files that are still being written, a temporary name comes first."""
    folder = tmp_path / "new" / "out"
    url = f"file://{folder}/x.rmm"
    kind = type(fsspec.filesystem("file"))
    seen: list[tuple[str, ...]] = []
    move = kind.mv

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(tuple(entry.name for entry in folder.iterdir()))
        return move(self, *arguments, **options)

    monkeypatch.setattr(kind, "mv", watched)
    rmm.convert([demo_adapters / "imdb"], url, exact=True)
    assert [entry.name for entry in folder.iterdir()] == ["x.rmm"]
    assert len(seen) == 1
    assert seen[0][0].startswith(".x.rmm.")

    def broken(self: Any, *_arguments: Any, **_options: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(kind, "mv", broken)
    before = (folder / "x.rmm").read_bytes()
    with pytest.raises(RemoteError):
        rmm.convert([demo_adapters / "bbc"], url, exact=True, overwrite=True)
    assert [entry.name for entry in folder.iterdir()] == ["x.rmm"]
    assert (folder / "x.rmm").read_bytes() == before


def test_nothing_is_uploaded_after_an_error(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4()}/out.rmm"
    with pytest.raises(RmmError):
        rmm.convert([tmp_path / "nothing"], url, exact=True)
    assert not fsspec.filesystem("memory").exists(url)


def test_web_servers_take_no_results(demo_adapters: Path, server: Server) -> None:
    with pytest.raises(UnsupportedError, match="web server"):
        rmm.convert([demo_adapters], server.url("x.rmm"), exact=True)
    assert server.requests == []


def test_verbs_take_urls(adapters: str, server: Server, shared_file: Path, tmp_path: Path) -> None:
    server.files["x.rmm"] = shared_file.read_bytes()
    url = server.url("x.rmm")
    found = json.loads(run("info", url, "--json").stdout)
    assert len(found["tasks"]) == 12
    assert found["path"] == url
    assert len(server.requests) == 2
    assert "valid" in run("validate", url).stdout
    run("export", url, "task3", "--to", "safetensors", "-o", os.fspath(tmp_path / "t.safetensors"))
    assert (tmp_path / "t.safetensors").stat().st_size > 10_000
    bad = bytearray(server.files["x.rmm"])
    bad[700] ^= 1
    server.files["x.rmm"] = bytes(bad)
    assert "RMM-081" in run("validate", url, code=3).stdout
    assert "404" in run("info", server.url("none.rmm"), code=1).output
    out = f"memory://{uuid.uuid4()}/o.rmm"
    run("convert", f"{adapters}/imdb/", f"new={adapters}/bbc/", "-o", out, "--exact")
    assert json.loads(run("info", out, "--json").stdout)["tasks"][1]["name"] == "new"


def test_a_dump_shows_real_bytes(server: Server, shared_file: Path) -> None:
    server.files["x.rmm"] = shared_file.read_bytes()
    remote = run("dump", server.url("x.rmm")).stdout
    assert remote == run("dump", os.fspath(shared_file)).stdout


def test_files_elsewhere_do_not_change_in_place(server: Server, demo_adapters: Path) -> None:
    url = server.url("x.rmm")
    for arguments in (["add", url, os.fspath(demo_adapters / "bbc")], ["remove", url, "a"],
                      ["compact", url]):  # fmt: skip
        assert "only a file on this machine" in run(*arguments, code=4).output
    assert server.requests == []
