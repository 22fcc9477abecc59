"""Addresses of shards are data: no index file starts a command, a shell or another protocol."""

import contextlib
import http.server
import io
import json
import shlex
import subprocess
import sys
import threading
import urllib.request

import pytest
from helpers.files import write_shard
from PIL import Image

from flextok.cli import main
from flextok.data import openers
from flextok.data.shards import expand_shards, stated_counts, write_index
from flextok.data.web import WebDatasetStream


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Of fetched shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path) -> str:
    members = {f"{i}.png": picture() for i in range(3)}
    return write_shard(tmp_path / "a.tar", members)


@pytest.fixture
def started(monkeypatch) -> list[object]:
    """What was started or asked of the network; nothing really is."""
    calls: list[object] = []

    def refuse(*arguments, **options):
        calls.append(arguments[-1] if arguments else options)
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    return calls


def write(path, *urls, count=3):
    content = {"shardlist": [{"url": url, "nsamples": count} for url in urls]}
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "url",
    [
        *("pipe:touch hit", " pipe:touch hit", "PIPE:touch hit", "pipe :touch hit"),
        *("pipe:touch${IFS}hit", "\tpipe:touch hit", "file:pipe:touch hit"),
        *("gs://bucket/$(touch hit).tar", "hf://datasets/a/b/c.tar", "s3://b/';touch hit;'.tar"),
        *("htgs://a/b.tar", "ais://a/b.tar", "sftp://127.0.0.1/a.tar", "ftp://127.0.0.1/a.tar"),
        *("file:///etc/passwd", "data:,x", "a\0b.tar", "", None, 7, ["a.tar"]),
    ],
)
def test_an_index_names_files_and_http_only(tmp_path, monkeypatch, started, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"index\.json lists"):
        WebDatasetStream(write(tmp_path / "index.json", url), label_key=None)
    # a command of the user's own reads addresses, and none that a shell would read as more
    if not str(url).startswith(("htgs", "ais", "sftp", "ftp", "hf")):
        words = [sys.executable, "-c", "0", "{url}"]
        with pytest.raises(ValueError, match=r"index\.json lists"):
            WebDatasetStream(str(tmp_path / "index.json"), label_key=None, fetch=words)
    assert not started
    assert not (tmp_path / "hit").exists()


def test_paths_in_an_index_are_names_beside_it(tmp_path, shard, monkeypatch, started):
    """Braces, stars, quotes and variables mean nothing there, and no other index is read."""
    monkeypatch.setenv("WDS_HOME", str(tmp_path))
    names = ["a.tar", "it's {0..2} $(touch hit);*.tar", "~/${WDS_HOME}::x.tar", "sub/../a.tar"]
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "${WDS_HOME}::x.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    (tmp_path / "sub").mkdir()
    (tmp_path / names[1]).write_bytes((tmp_path / "a.tar").read_bytes())
    index = write(tmp_path / "index.json", *names)
    monkeypatch.chdir("/")
    data = WebDatasetStream(index, label_key=None)
    assert [data[i]["image"].getpixel((0, 0)) for i in range(12)] == [(255, 0, 0)] * 12
    nested = WebDatasetStream(write(tmp_path / "outer.json", "index.json"), label_key=None)
    with pytest.raises(ValueError, match="damaged after 0 of 3"):
        nested[0]
    assert not started


def test_the_users_own_addresses_name_no_command_either(tmp_path, started):
    for url in ("pipe:cat a.tar", " PIPE:cat a.tar", "gs://b/a.tar", "s3://b/{0..3}.tar"):
        with pytest.raises(ValueError, match="name the command that reads it as fetch"):
            WebDatasetStream(url, samples=3, label_key=None)
    assert not started


def test_a_command_is_run_without_a_shell(tmp_path, shard, capsys):
    """The address is one word of it, whatever it holds."""
    odd = tmp_path / "it's; touch hit $(touch hit).tar"
    odd.write_bytes((tmp_path / "a.tar").read_bytes())
    fetch = "cat {url}"
    for urls in (str(odd), f"{tmp_path}/it*.tar"):
        data = WebDatasetStream(urls, label_key=None, fetch=fetch)
        assert len(data) == 3
        assert data[2]["key"].endswith(".tar: 2")
    # an address that only the command understands
    read = f"import sys,shutil; shutil.copyfileobj(open({shard!r}, 'rb'), sys.stdout.buffer)"
    words = [sys.executable, "-c", read, "{url}"]
    data = WebDatasetStream("s3://bucket/a.tar", samples=3, label_key=None, fetch=words)
    assert data[2]["image"].size == (8, 8)
    index = tmp_path / "index.json"
    command = ["index", "s3://bucket/{0..1}.tar", str(index), "--fetch", shlex.join(words)]
    assert main(command) == 0
    assert "6 samples in 2 shards" in capsys.readouterr().out
    data = WebDatasetStream(str(index), label_key=None, fetch=words)
    assert data[5]["key"] == "s3://bucket/1.tar: 2"
    assert not list(tmp_path.rglob("hit"))


def test_a_command_gets_no_address_from_an_index_that_a_shell_would_read(tmp_path, shard):
    """A user's `ssh host cat {url}` has a shell on the other side."""
    fetch = [sys.executable, "-c", "0", "{url}"]
    index = tmp_path / "index.json"
    for url in (
        "http://h/a.tar;touch hit",
        "http://h/$(hit)",
        "s3://b/a b",
        "/x;hit",
        "-rf",
        "`x`",
    ):
        with pytest.raises(ValueError, match=r"index\.json lists"):
            WebDatasetStream(write(index, url), label_key=None, fetch=fetch)
    plain = ["http://h/a.tar", "s3://b/x-0.tar", shard]
    assert WebDatasetStream(write(index, *plain), label_key=None, fetch=fetch).shards == plain


def test_a_command_that_fails_is_damage_and_is_not_left_running(tmp_path, shard, caplog):
    failing = [sys.executable, "-c", "import sys; sys.exit(3)", "{url}"]
    data = WebDatasetStream("s3://b/a.tar", samples=2, label_key=None, fetch=failing)
    with pytest.raises(ValueError, match="damaged after 0 of 2"):
        data[0]
    assert "s3://b/a.tar is damaged" in caplog.text
    tail = f"import sys; sys.stdout.buffer.write(open({shard!r}, 'rb').read()); sys.exit(3)"
    with (
        pytest.raises(OSError, match="ended with 3"),
        openers.open_shard("x", [sys.executable, "-c", tail]) as stream,
    ):
        assert stream.read()
    endless = [sys.executable, "-c", "while True: print('x' * 9999)"]
    with contextlib.suppress(KeyError), openers.open_shard("x", endless) as stream:
        assert stream.read(10)
        raise KeyError  # left before its end: this would wait for it forever
    for fetch, message in (
        ("aws s3 cp", "must say where the address goes"),
        ("no-such-program {url}", "there is no program 'no-such-program'"),
    ):
        with pytest.raises(ValueError, match=message):
            WebDatasetStream(shard, label_key=None, fetch=fetch)


@pytest.fixture
def server(tmp_path, shard):
    """Serves the shard, redirections, an answer cut short, and an index."""
    asked: list[str] = []
    content = (tmp_path / "a.tar").read_bytes()
    listed = [{"url": url, "nsamples": 3} for url in ("a.tar", "/a.tar", "/http.tar")]

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            asked.append(self.path)
            places = {
                "/http.tar": "/a.tar",
                "/file.tar": f"file://{shard}",
                "/ftp.tar": "ftp://127.0.0.1:9/a.tar",
                "/data.tar": "data:,x",
            }
            if self.path in places:
                self.send_response(302)
                self.send_header("Location", places[self.path])
                self.end_headers()
            elif self.path == "/busy.tar" and asked.count(self.path) == 1:
                self.send_error(503)
            elif self.path in ("/a.tar", "/busy.tar", "/cut.tar", "/index.json"):
                whole = json.dumps({"shardlist": listed}).encode()
                body = whole if self.path == "/index.json" else content
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:2048] if self.path == "/cut.tar" else body)
            else:
                self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_redirections_leave_http_for_nothing(server, monkeypatch):
    place, asked = server
    monkeypatch.setattr(openers, "WAITS", (0,))
    assert write_index(f"{place}/http.tar")["shardlist"][0]["nsamples"] == 3
    for name in ("file", "ftp", "data"):
        data = WebDatasetStream(f"{place}/{name}.tar", samples=3, label_key=None)
        with pytest.raises(ValueError, match="damaged after 0 of 3"):
            data[0]
    assert write_index(f"{place}/busy.tar")["shardlist"][0]["nsamples"] == 3  # asked twice
    asked.clear()
    with pytest.raises(OSError, match="404"), openers.open_shard(f"{place}/none.tar"):
        pass
    assert asked == ["/none.tar"]  # an answer for good is not asked for again


def test_an_answer_that_breaks_off_between_two_samples_is_damage(server, caplog):
    place, _ = server
    assert write_index(f"{place}/cut.tar")["shardlist"][0]["nsamples"] == 2
    assert "cut.tar broke off 8192 bytes before its end" in caplog.text


def test_an_index_from_a_server_names_nothing_on_this_machine(server):
    place, asked = server
    data = WebDatasetStream(f"{place}/index.json", label_key=None)
    assert data.shards == [f"{place}/a.tar", f"{place}/a.tar", f"{place}/http.tar"]
    assert data[8]["image"].size == (8, 8)
    assert asked == ["/index.json", "/http.tar", "/a.tar"]


def test_damaged_indices_are_told_in_one_line(tmp_path, shard):
    path = tmp_path / "index.json"
    for content, message in (
        ("", "no readable index"),
        ("[1]", "no readable index"),
        ('{"shardlist": null}', "no readable index"),
        ('{"shardlist": []}', "lists no shard"),
        ("[" * 100_000, "no readable index"),
        ('{"shardlist": [{"url": "a.tar"}]}', "no readable index"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": -1}]}', "states -1 samples"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": true}]}', "states True samples"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": 1e18}]}', "states 1e[+]18 samples"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            stated_counts(str(path), None)
    with pytest.raises(ValueError, match="no readable index"):
        stated_counts(f"{tmp_path}/no.json", None)
    for urls, message in (("a{b.tar", "urls='a.b.tar'"), ([7], "urls holds 7"), ("", "no file")):
        with pytest.raises(ValueError, match=message):
            expand_shards(urls)
    signed = "https://host/a.tar?signature=" + "x" * 5000  # longer than any file's name
    assert expand_shards(signed) == [signed]
    path.write_text(json.dumps({"shardlist": [{"url": signed, "nsamples": 1}]}))
    assert stated_counts(str(path), None) == ([signed], [1])
