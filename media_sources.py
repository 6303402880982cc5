"""Where images and videos come from: paths, URLs, data URIs and base64 text become bytes and files, safely.

    data = read_source("https://example.org/page.png")
    with local_file("https://example.org/clip.mp4", VIDEO_DOWNLOAD) as path:
        ...

One downloader for both: http and https alone (redirects too), within a limit of bytes and of seconds in all,
however slowly a server answers. Paths are those of regular files: a pipe or a device would never end.

`untrusted` is for programs that pass on requests of strangers: paths are refused, and so is every address that is not public,
which is checked for the very address that is connected to. Proxies are not used then, since they would connect instead.

Deals with bytes, not with images or videos. Standard library only.
"""

import base64
import binascii
import contextlib
import io
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from tempfile import TemporaryDirectory
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, urljoin, urlsplit, urlunsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
    url2pathname,
)


class DownloadLimits(NamedTuple):
    """The most that a download may take: bytes, and seconds in all."""

    max_bytes: int
    seconds: float


IMAGE_DOWNLOAD = DownloadLimits(128 * 2**20, 60.0)
VIDEO_DOWNLOAD = DownloadLimits(2**30, 180.0)

SILENCE = 30.0  # seconds without a byte after which we give up on a server
MAX_REDIRECTS = 10
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 2**16  # bytes
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that lead to the IPv4 address in their last 32 bits


def short_name(source: str | os.PathLike) -> str:
    """Return what messages call a source: base64 text is cut, unprintable characters are escaped."""
    text = os.fsdecode(source).encode(errors="backslashreplace").decode()
    return text if len(text) < 200 else text[:60] + "..."


def is_url(text: str) -> bool:
    """Tell whether text is an http or https URL."""
    return text[:8].lower().startswith(("http://", "https://"))


def path_of(source: str | os.PathLike) -> str | None:
    """Return the path that a source means: a path object, a file:// URL, text that names a file; None for other text.

    Raises:
        ValueError: A file:// URL of another machine.
    """
    text = os.fsdecode(source)
    if not isinstance(source, str):
        return text
    if text[:7].lower() == "file://":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(
                f"{short_name(text)} is a file of another machine, {parts.netloc!r}; file:///PATH is one of this."
            )
        return url2pathname(parts.path)
    return text if not is_url(text) and os.path.isfile(text) else None


def check_file(path: str, kind: str = "picture") -> None:
    """Raise `ValueError` unless `path` is a regular file."""
    name = short_name(path)
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder, not a {kind} file.")
    if not os.path.exists(path):
        raise ValueError(f"There is no {kind} file {name}; {name} cannot be read: No such file or directory.")
    if not os.path.isfile(path):
        raise ValueError(f"{name} is no regular file but a pipe, a device or a socket, which may never end.")


def refuse_path(source: str | os.PathLike) -> None:
    """Raise `ValueError` unless a source is a URL, a data URI or base64 text, without a look at this machine's files."""
    if isinstance(source, str) and (is_url(source) or source[:5].lower() == "data:" or _is_base64(source)):
        return
    raise ValueError(
        f"{short_name(source)} is refused: with untrusted_sources=True it must be an http(s) URL, a data URI or base64 text; "
        "paths of this machine are not opened."
    )


def _is_base64(text: str) -> bool:
    text = "".join(text.split())
    return len(text) % 4 == 0 and re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text) is not None


def read_source(source: str | os.PathLike, untrusted: bool = False) -> bytes | str:
    """Return the bytes behind an image's URL, data URI or base64 text; for a file its path, which has been checked.

    Raises:
        ValueError: It cannot be found or downloaded, or is refused.
    """
    text, name = os.fsdecode(source), short_name(source)
    if untrusted:
        refuse_path(source)
    if isinstance(source, str) and text[:5].lower() == "data:":
        return decode_base64(text.partition(",")[2], name)
    if isinstance(source, str) and is_url(text):
        data = io.BytesIO()
        download(text, data, IMAGE_DOWNLOAD, untrusted)
        return data.getvalue()
    path = None if untrusted else path_of(source)
    if path is not None:
        check_file(path)
        return path
    scheme = text[:32].partition("://")
    if scheme[1] and scheme[0].isalnum():
        raise ValueError(f"{name} is not opened: URLs are those of http, https and data, and of file for this machine.")
    return decode_base64(text, name)


def decode_base64(text: str, name: str) -> bytes:
    """Decode base64 text, which may have spaces and line ends in it.

    Raises:
        ValueError: It is not base64.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name!r} is no picture: neither an existing file nor a URL nor base64 data.") from error


@contextlib.contextmanager
def local_file(source: str | os.PathLike, limits: DownloadLimits, untrusted: bool = False) -> Iterator[str]:
    """Yield the path of a video file; what a URL gives lies in a temporary one meanwhile.

    Raises:
        ValueError: There is no such file, it cannot be downloaded, or it is refused.
    """
    text = os.fsdecode(source)
    if isinstance(source, str) and is_url(text):
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = os.path.join(folder, "download")
            with open(path, "wb") as file:
                download(text, file, limits, untrusted)
            yield path
        return
    if untrusted:
        raise ValueError(f"{short_name(text)} is refused: with untrusted_sources=True a video must be an http(s) URL.")
    path = path_of(source) or text
    check_file(path, "video")
    if os.path.getsize(path) == 0:
        raise ValueError(f"The video file {short_name(path)} is empty.")
    yield path


# --- downloads -------------------------------------------------------------------------------------------------------


def download(url: str, file: BinaryIO, limits: DownloadLimits, untrusted: bool = False) -> None:
    """Write what a URL gives to `file`.

    Raises:
        ValueError: It cannot be downloaded, exceeds `limits`, or `untrusted` and at an address that is not public.
    """
    name = short_name(url)
    with _Watch(limits.seconds, untrusted) as watch:
        try:
            with _open(url, watch) as response:
                _copy(response, file, limits.max_bytes)
            watch.check()
        except (OSError, HTTPException, ValueError) as error:
            reason = watch.overdue() if watch.expired else error
            raise ValueError(f"{name} cannot be downloaded: {reason}") from error


def _open(url: str, watch: "_Watch") -> HTTPResponse:
    """Return the response of a URL, behind its redirects; their bodies are left unread."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler({} if watch.untrusted else None),
        UnknownHandler(),
        _HttpHandler(watch),
        HTTPDefaultErrorHandler(),
        HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    for _ in range(MAX_REDIRECTS + 1):
        if not is_url(url):
            raise ValueError(f"it leads to {short_name(url)!r}, which is neither http nor https.")
        request = Request(_ascii_url(url), headers={"User-Agent": "MiniMonkey"})  # some servers refuse Python's own
        try:
            return opener.open(request, timeout=SILENCE)
        except HTTPError as error:
            with error:
                target = error.headers.get("Location") if error.code in REDIRECTS else None
                if target is None:
                    raise
            url = urljoin(url, target)
    raise ValueError(f"it is redirected more than {MAX_REDIRECTS} times.")


def _ascii_url(url: str) -> str:
    """Return a URL as it is sent: other characters are quoted, the host's name in its own way."""
    parts = urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (quote(part, safe="%/:=&?~#+!$,;'@()*[]|") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, host, path, query, ""))


def _copy(response: HTTPResponse, file: BinaryIO, max_bytes: int) -> None:
    announced, size = response.headers.get("Content-Length", ""), 0
    if announced.isdigit() and int(announced) > max_bytes:
        raise ValueError(f"it has {announced} bytes, the limit is {max_bytes}; download it yourself and pass its path.")
    while chunk := response.read1(CHUNK):
        size += len(chunk)
        if size > max_bytes:
            raise ValueError(f"it has more than {max_bytes} bytes, the limit; download it yourself and pass its path.")
        file.write(chunk)
    if announced.isdigit() and size < int(announced):
        raise ValueError(f"it ended after {size} of {announced} bytes.")


class _Watch:
    """What a download may connect to and until when; at its end the connection is shut, whatever is being waited for."""

    def __init__(self, seconds: float, untrusted: bool):
        self.untrusted, self.expired = untrusted, False
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> "_Watch":
        self._timer.start()
        return self

    def __exit__(self, *_) -> None:
        self._timer.cancel()
        self._keep(None)

    def overdue(self) -> str:
        return f"it took longer than {self._seconds:g} s in all; download it yourself and pass its path."

    def check(self) -> None:
        """Raise `TimeoutError` once the time is over."""
        if self.expired:
            raise TimeoutError(self.overdue())

    def connect(self, host: str, port: int) -> socket.socket:
        """Connect to the first address of a host that answers.

        Raises:
            ValueError: `untrusted`, and one of them is not public.
            OSError: None answers.
        """
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if self.untrusted and not all(is_public(address[0]) for *_, address in addresses):
            raise ValueError(f"{host} is no public address, and with untrusted_sources=True others are refused.")
        failure: OSError = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in addresses:
            remaining = self._end - time.monotonic()
            if remaining <= 0:
                self.expired = True
            self.check()
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(min(SILENCE, remaining))
                connection.connect(address)
            except OSError as error:
                connection.close()
                failure = error
                continue
            connection.settimeout(SILENCE)
            self._keep(connection.dup())  # TLS takes over the connection's own handle
            return connection
        raise failure

    def _keep(self, connection: socket.socket | None) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = connection

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            if self._connection is not None:
                with contextlib.suppress(OSError):  # closed meanwhile
                    self._connection.shutdown(socket.SHUT_RDWR)


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet, also if it is written within another."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return ip.is_global and not ip.is_multicast


class _Connection(HTTPConnection):
    """Connects as its `watch` allows, which `_watched` gives it."""

    watch: _Watch

    def connect(self) -> None:
        self.sock = self.watch.connect(self.host, self.port)
        if self._tunnel_host:  # through a proxy
            self._tunnel()


class _TlsConnection(HTTPSConnection, _Connection):
    """HTTPSConnection encrypts what `_Connection` connected."""


def _watched(connection_class: type[_Connection], watch: _Watch, *args, **kwargs) -> _Connection:
    connection = connection_class(*args, **kwargs)
    connection.watch = watch
    return connection


class _HttpHandler(HTTPHandler, HTTPSHandler):
    """Opens both kinds of URL over watched connections."""

    def __init__(self, watch: _Watch):
        HTTPHandler.__init__(self)
        self._watch = watch

    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(partial(_watched, _Connection, self._watch), request)

    def https_open(self, request: Request) -> HTTPResponse:
        connection = partial(_watched, _TlsConnection, self._watch)
        return self.do_open(connection, request, context=ssl.create_default_context())


__all__ = ["DownloadLimits", "download", "is_public", "local_file", "read_source"]
