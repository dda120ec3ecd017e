"""Images from addresses, against a real TLS server on this machine: names, addresses and times."""

from __future__ import annotations

import asyncio
import ssl
import struct
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mipha.deploy.serve.untrusted_images import (
    Address,
    fetch_image,
    is_public,
    read_untrusted_image,
)

PEM = Path(__file__).with_name("pictures_test.pem")
BODY = bytes(range(256)) * 20


class Site:
    """The requests that the server got, and its port."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.port = 0
        self.answers: dict[str, bytes | None] = {
            "/picture": _answer(BODY),
            "/chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
            "/until-closed": b"HTTP/1.1 200 OK\r\n\r\nabc",
            "/cut": b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
            "/missing": _answer(b"no", "404 Not Found"),
            "/no-http": b"SSH-2.0-OpenSSH\r\n",
            "/header": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000 + b"\r\n\r\n",
            "/loop": _redirect("/loop"),
            "/here": _redirect("picture?a=b#c"),
            "/other": _redirect("https://other.test/picture", "308 Permanent Redirect"),
            "/slow": None,
        }
        for number in range(1, 5):
            self.answers[f"/{number}"] = _redirect(f"/{number - 1}", "307 Temporary Redirect")
        self.answers["/0"] = _answer(BODY)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(head)
        path = head.split()[1]
        if path.startswith("/to/"):
            answer = _redirect(path.removeprefix("/to/"))
        elif path == "/endless":
            await _endless(writer)
            return
        else:
            answer = self.answers[path.partition("?")[0]]
        if answer is None:
            await reader.read()  # until the client leaves
        writer.write(answer or b"")
        writer.close()


async def _endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    try:
        while True:
            writer.write(b"a" * 10_000)
            # After a failed send `drain` returns at once: without this the loop never ends.
            await asyncio.sleep(0)
            await writer.drain()
    except ConnectionError:
        writer.close()


def _answer(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def _redirect(to: str, status: str = "302 Found") -> bytes:
    return f"HTTP/1.1 {status}\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n".encode()


def _trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(PEM))


def fetch(
    url: str,
    *,
    site: Site | None = None,
    resolve: Callable[[str], Awaitable[list[Address]]] | None = None,
    is_allowed: Callable[[str], bool] = lambda _: True,
    **options: Any,
) -> tuple[bytes, Site]:
    site = site or Site()

    async def to_site(host: str) -> list[Address]:
        return [("127.0.0.1", site.port)]

    async def run() -> bytes:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(PEM)
        server = await asyncio.start_server(site.serve, "127.0.0.1", 0, ssl=tls)
        site.port = server.sockets[0].getsockname()[1]
        settings = {"max_bytes": 10_000, "max_seconds": 20.0, "tls": _trusting()} | options
        try:
            return await fetch_image(
                url, resolve=resolve or to_site, is_allowed=is_allowed, **settings
            )
        finally:
            server.close()

    return asyncio.run(run()), site


def refused(url: str, sentence: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        fetch(url, **options)
    assert str(caught.value).isascii() and "\n" not in str(caught.value)


def test_an_image_is_fetched() -> None:
    body, site = fetch("https://pictures.test/picture?size=2#top")
    assert body == BODY
    (request,) = site.requests
    assert request.startswith("GET /picture?size=2 HTTP/1.1\r\n")
    assert "host: pictures.test\r\n" in request.lower()
    assert (
        "accept-encoding: identity\r\n" in request.lower()
    )  # a small compressed body could be endless
    assert "cookie" not in request.lower() and "authorization" not in request.lower()
    assert fetch("https://PICTURES.test:443/chunked")[0] == b"abcde"
    assert fetch("https://pictures.test/until-closed")[0] == b"abc"


def test_a_name_is_looked_up_once_and_its_checked_address_is_asked() -> None:
    site, asked, checked = Site(), [], []

    async def resolve(host: str) -> list[Address]:
        asked.append(host)
        return (
            [("127.0.0.1", site.port)] if len(asked) == 1 else [("127.0.0.2", 1)]
        )  # a name that changes its mind

    def is_allowed(address: str) -> bool:
        checked.append(address)
        return True

    assert (
        fetch("https://pictures.test/picture", site=site, resolve=resolve, is_allowed=is_allowed)[0]
        == BODY
    )
    assert (asked, checked) == (["pictures.test"], ["127.0.0.1"])


def test_an_address_that_is_not_public_is_never_connected_to() -> None:
    site = Site()
    refused("https://pictures.test/picture", "no public address", site=site, is_allowed=is_public)

    async def one_of_two(host: str) -> list[Address]:
        return [("93.184.216.34", 443), ("127.0.0.1", site.port)]

    async def no_such_name(host: str) -> list[Address]:
        raise OSError("no such name")

    async def nothing(host: str) -> list[Address]:
        return []

    refused(
        "https://pictures.test/picture",
        "no public address",
        site=site,
        resolve=one_of_two,
        is_allowed=is_public,
    )
    refused("https://pictures.test/picture", "cannot be reached", site=site, resolve=no_such_name)
    refused("https://pictures.test/picture", "cannot be reached", site=site, resolve=nothing)
    assert site.requests == []


def test_redirects_are_followed_three_times_and_every_one_is_checked() -> None:
    assert fetch("https://pictures.test/here")[0] == BODY
    body, site = fetch("https://pictures.test/other")
    assert body == BODY and "host: other.test" in site.requests[1].lower()
    assert fetch("https://pictures.test/3")[0] == BODY
    refused("https://pictures.test/4", "redirects more than 3 times")
    refused("https://pictures.test/loop", "redirects more than 3 times")
    for target in (
        "http://pictures.test/picture",
        "file:///etc/passwd",
        "https://127.0.0.1/x",
        "https://pictures.test:8443/x",
        "https://a@b.test/",
    ):
        site = Site()
        refused(f"https://pictures.test/to/{target}", "not fetched", site=site)
        assert len(site.requests) == 1
    seen: list[str] = []

    def only_the_first(address: str) -> bool:
        seen.append(address)
        return len(seen) == 1

    refused("https://pictures.test/other", "no public address", is_allowed=only_the_first)


def test_the_certificate_is_checked_against_the_name_and_not_the_address() -> None:
    refused("https://wrong.test/picture", "no valid certificate")
    refused(
        "https://pictures.test/picture", "no valid certificate", tls=ssl.create_default_context()
    )
    refused("https://pictures.test/to/https://wrong.test/picture", "no valid certificate")


def test_size_and_time_have_ends() -> None:
    assert fetch("https://pictures.test/picture", max_bytes=len(BODY))[0] == BODY
    refused("https://pictures.test/picture", "more than 5,119 bytes", max_bytes=len(BODY) - 1)
    refused("https://pictures.test/endless", "more than 10,000 bytes")
    refused("https://pictures.test/slow", "did not answer within 0.2 seconds", max_seconds=0.2)
    refused(
        "https://pictures.test/endless",
        "did not answer within 0.3 seconds",
        max_seconds=0.3,
        max_bytes=10**12,
    )

    async def forever(host: str) -> list[Address]:
        await asyncio.sleep(3600)
        return []

    refused(
        "https://pictures.test/picture",
        "did not answer within 0.1 seconds",
        resolve=forever,
        max_seconds=0.1,
    )


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("missing", "status 404"),
        ("cut", "no proper HTTP"),
        ("no-http", "no proper HTTP"),
        ("header", "no proper HTTP"),
    ],
)
def test_an_answer_that_is_none(path: str, sentence: str) -> None:
    refused(f"https://pictures.test/{path}", sentence)


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.test/a.png",
        "HTTP://pictures.test/a.png",
        "ftp://pictures.test/a.png",
        "//pictures.test/a.png",
        "/etc/passwd",
        "https:/pictures.test/a.png",
        "https://",
        "https:///a.png",
        "https://user@pictures.test/",
        "https://user:word@pictures.test/",
        "https://@pictures.test/",
        "https://pictures.test:444/",
        "https://pictures.test:0/",
        "https://pictures.test:99999/",
        "https://pictures.test:x/",
        "https://localhost/",
        "https://metadata/",
        "https://localhost./",
        "https://pictures.test./",
        "https://-a.test/",
        "https://a..test/",
        "https://a_b.test/",
        "https://b\u00fccher.test/",
        "https://127.0.0.1\uff0e/",
        "https://pictures.test\\@10.0.0.1/",
        "https://pictures.test/a b",
        "https://pictures.test/\r\nX: y",
        "ht\ntps://pictures.test/",
        "https://pictures.test/%s" % ("a" * 2100),
        # this machine and its network, in every notation that a resolver reads
        "https://127.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.0.0.1/",
        "https://0177.0.0.1/",
        "https://017700000001/",
        "https://127.0.0.0x1/",
        "https://10.0.0.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[fe80::1%25eth0]/",
        "https://8.8.8.8/",
    ],
)
def test_addresses_that_are_not_even_looked_up(url: str) -> None:
    async def never(host: str) -> list[Address]:
        raise AssertionError(f"{host} was looked up")

    refused(url, "is no address|not fetched", resolve=never)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        # IPv4: this machine, private, shared, loopback, link-local, protocols, documentation,
        # benchmarking, 6to4 relay, multicast, reserved
        *(
            (address, False)
            for address in [
                "0.0.0.0",
                "10.1.2.3",
                "172.16.0.1",
                "172.31.255.255",
                "192.168.0.1",
                "100.64.0.1",
                "127.0.0.1",
                "127.9.9.9",
            ]
        ),
        *(
            (address, False)
            for address in [
                "169.254.169.254",
                "192.0.0.8",
                "192.0.2.1",
                "198.51.100.7",
                "203.0.113.9",
                "198.18.0.1",
                "192.88.99.1",
            ]
        ),
        *(
            (address, False)
            for address in ["224.0.0.251", "239.255.255.250", "240.0.0.1", "255.255.255.255"]
        ),
        # IPv6: unspecified, loopback, IPv4-mapped (of a public one too), NAT64, discard, 6to4,
        # Teredo, documentation, unique local
        *(
            (address, False)
            for address in [
                "::",
                "::1",
                "::ffff:10.0.0.1",
                "::ffff:93.184.216.34",
                "::ffff:0:127.0.0.1",
                "::127.0.0.1",
            ]
        ),
        *(
            (address, False)
            for address in [
                "64:ff9b::7f00:1",
                "64:ff9b:1::a00:1",
                "100::1",
                "2002:7f00:1::1",
                "2002:5db8:d822::1",
                "2001::1",
            ]
        ),
        *(
            (address, False)
            for address in [
                "2001:db8::1",
                "3fff::1",
                "fc00::1",
                "fd12:3456::1",
                "fe80::1",
                "fe80::1%1",
                "fec0::1",
                "ff02::1",
            ]
        ),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize("colour", [2, 3])
def test_a_refusal_names_no_object_of_ours(colour: int) -> None:
    """Images of no width, and of colours without a palette, in Pillow's words name neither."""
    head = struct.pack(">IIBBBBB", 0 if colour == 2 else 9, 9, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(90))), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    with pytest.raises(ValueError, match=r"is damaged \(it cannot be decoded\)"):
        read_untrusted_image(data, 1_000)
