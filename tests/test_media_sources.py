"""Downloads and paths: how long, how much, from where, and what is refused; with servers of this machine."""

import io
import os
import socket
import tempfile
import threading
from contextlib import contextmanager

import pytest
from PIL import Image

from minimonkey.image_decoding import load_image
from minimonkey.video_frames import load_frames


# What these two really use: remote code may be there twice.
picture_sources = load_image.__globals__["read_source"].__globals__
download, is_public = picture_sources["download"], picture_sources["is_public"]
Limits = picture_sources["DownloadLimits"]
SHORT = Limits(100_000, 0.3)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def answer(body: bytes, *headers: str, status="200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


@contextmanager
def serving(respond):
    """The address of a server that calls `respond(connection, stopped)` for each request."""
    stopped = threading.Event()

    def serve_one(connection):
        with connection:
            try:
                connection.recv(2**16)
                respond(connection, stopped)
            except OSError:  # the client has gone
                pass

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"
        finally:
            stopped.set()
            listener.shutdown(socket.SHUT_RDWR)


def says(data: bytes):
    return lambda connection, stopped: connection.sendall(data)


def drips(start: bytes):
    """One byte after another, which no time-out of a single read notices."""

    def respond(connection, stopped):
        connection.sendall(start)
        while not stopped.wait(0.02):
            connection.sendall(b"x")

    return respond


def pours(start: bytes):
    def respond(connection, stopped):
        connection.sendall(start)
        while not stopped.is_set():
            connection.sendall(bytes(2**16))

    return respond


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def test_url_gives_the_picture():
    with serving(says(answer(png(), "Content-Type: image/png"))) as url:
        assert load_image(url).getpixel((0, 0)) == (255, 0, 0)
        assert load_image(url.replace("http", "HTTP").replace("picture", "ä b")).size == (8, 8)


@pytest.mark.parametrize(
    "respond",
    [drips(b"HTTP/1.1 200 OK\r\nX: "), drips(answer(b"")), lambda connection, stopped: stopped.wait(10)],
    ids=["headers", "body", "silence"],
)
def test_deadline_is_that_of_the_whole_download(monkeypatch, respond):
    monkeypatch.setitem(picture_sources, "IMAGE_DOWNLOAD", SHORT)
    with serving(respond) as url, pytest.raises(ValueError, match=r"cannot be downloaded: it took longer than 0.3 s"):
        load_image(url)


def test_deadline_holds_while_a_connection_is_encrypted():
    with serving(lambda connection, stopped: stopped.wait(10)) as url, pytest.raises(ValueError, match="took longer"):
        download(url.replace("http:", "https:"), io.BytesIO(), SHORT)


@pytest.mark.parametrize("headers", [[], ["Content-Length: 99999999999"]])
def test_endless_body_is_given_up(monkeypatch, headers):
    monkeypatch.setitem(picture_sources, "IMAGE_DOWNLOAD", SHORT)
    with serving(pours(answer(b"", *headers))) as url, pytest.raises(ValueError, match="bytes, the limit"):
        load_image(url)


@pytest.mark.parametrize("respond", [drips(answer(b"")), pours(answer(b""))])
def test_broken_download_of_a_video_leaves_no_file(monkeypatch, tmp_path, respond):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(load_frames.__globals__, "VIDEO_DOWNLOAD", SHORT)
    with serving(respond) as url, pytest.raises(ValueError, match="cannot be downloaded"):
        load_frames(url)
    assert list(tmp_path.iterdir()) == []


def test_body_that_ends_early_is_refused():
    with serving(says(answer(png()[:30], "Content-Length: 999"))) as url, pytest.raises(ValueError, match="30 of 999"):
        load_image(url)


def test_what_is_no_http_is_refused():
    with serving(says(b"SSH-2.0\r\n")) as url, pytest.raises(ValueError, match="cannot be downloaded"):
        load_image(url)


# --- redirects -------------------------------------------------------------------------------------------------------


def moved(target: str) -> bytes:
    return answer(b"", f"Location: {target}", "Content-Length: 0", status="302 Found")


def test_redirect_is_followed():
    with serving(says(answer(png()))) as target, serving(says(moved(target))) as url:
        assert load_image(url).size == (8, 8)


@pytest.mark.parametrize("scheme", ["file", "ftp", "data", "gopher"])
def test_redirect_to_another_scheme_is_refused(tmp_path, scheme):
    (tmp_path / "secret.png").write_bytes(png())
    target = f"{scheme}://{tmp_path}/secret.png"
    with serving(says(moved(target))) as url, pytest.raises(ValueError, match="neither http nor https"):
        load_image(url)


def test_redirects_in_a_circle_end():
    with serving(says(moved("/again"))) as url, pytest.raises(ValueError, match="redirected more than 10 times"):
        load_image(url)


def test_endless_body_of_a_redirect_is_not_read():
    start = answer(b"", "Location: http://127.0.0.1:1/", status="302 Found")
    with serving(pours(start)) as url, pytest.raises(ValueError, match="refused"):
        load_image(url)


# --- untrusted sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "[::ffff:127.0.0.1]"])
@pytest.mark.parametrize("load", [load_image, load_frames])
def test_untrusted_sources_reach_no_private_address(host, load):
    option = {"untrusted": True} if load is load_image else {"untrusted_sources": True}
    requests = []
    count = lambda connection, stopped: requests.append(1)  # noqa: E731
    with serving(count) as url, pytest.raises(ValueError, match="no public address"):
        load(url.replace("127.0.0.1", host), **option)
    assert requests == []


def test_a_name_that_changes_its_address_meanwhile_is_still_refused(monkeypatch):
    """Whatever a name meant before, the address that is connected to is the one that is looked at."""
    meanings = iter(["93.184.216.34", "127.0.0.1"])

    def look_up(host, port, *args, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(meanings), port))]

    requests = []
    with serving(lambda connection, stopped: requests.append(1)) as url:
        port = int(url.split(":")[2].split("/")[0])
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        monkeypatch.setattr(socket.socket, "connect", lambda self, address: requests.append(address))
        with pytest.raises((ValueError, OSError)):
            load_image(f"http://rebinding.example:{port}/", untrusted=True)
    assert [request[0] for request in requests] == ["93.184.216.34"]


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.1", "127.0.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "192.168.1.1"),
        *("::1", "::", "fd00::1", "fe80::1%eth0", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::"),
    ],
)
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize("write", [str, lambda path: path, lambda path: path.as_uri()], ids=["str", "Path", "file://"])
@pytest.mark.parametrize("name", ["picture.png", "missing.png"])
def test_untrusted_paths_are_refused_whether_they_are_there_or_not(tmp_path, write, name):
    (tmp_path / "picture.png").write_bytes(png())
    with pytest.raises(ValueError, match="is refused: with untrusted_sources=True"):
        load_image(write(tmp_path / name), untrusted=True)
    with pytest.raises(ValueError, match="is refused: with untrusted_sources=True"):
        load_frames(write(tmp_path / name), untrusted_sources=True)


def test_untrusted_redirect_to_a_path_or_a_private_address_is_refused():
    with serving(says(moved("http://127.0.0.1/"))) as url, pytest.raises(ValueError, match="no public address"):
        load_image(url, untrusted=True)


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("load", [load_image, load_frames])
def test_pipes_and_devices_are_not_waited_for(tmp_path, load):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for source in (pipe, pipe.as_uri()):
        with pytest.raises(ValueError, match="no regular file"):
            load(source)
    with pytest.raises(ValueError):
        load(str(pipe))
    with pytest.raises(ValueError):
        load("/dev/zero")


def test_file_url_of_another_machine_is_refused():
    with pytest.raises(ValueError, match="another machine, 'server'"):
        load_image("file://server/picture.png")


@pytest.mark.parametrize("load", [load_image, load_frames])
@pytest.mark.parametrize("source", ["\ud800.png", "\0", "", "file://", "http://", "data:", "http://[x/y.png"])
def test_messages_about_strange_names_can_be_printed(load, source):
    with pytest.raises(ValueError) as raised:
        load(source)
    assert str(raised.value).encode()


def test_other_schemes_are_named():
    with pytest.raises(ValueError, match="URLs are those of http, https and data"):
        load_image("ftp://example.org/picture.png")


@pytest.mark.parametrize(
    "text", ["#EXTM3U\nfile:///etc/passwd\n", "ffconcat version 1.0\nfile /etc/passwd\n", "<?xml?><MPD/>"]
)
def test_lists_of_other_files_are_no_videos(tmp_path, text):
    path = tmp_path / "clip.mp4"
    path.write_text(text)
    with pytest.raises(ValueError, match="a list of other files"):
        load_frames(path)
