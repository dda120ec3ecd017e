"""An image from an untrusted sender: fetched from an address, and walked before a decoder sees it.

Addresses: https only, public addresses only, within a size and a time. A name is looked up once,
the result is checked, and the connection goes to exactly that address: a name that means something
else a moment later changes nothing. The certificate is still checked against the name. Every
redirect is checked in the same way.

Files: a small file can hold a decoder for minutes, such as 100 KB of JPEG scans, a million empty
PNG chunks, or a GIF of nothing but comments, and 200 KB can take 400 MB of memory. So the steps
that a decoder would take, and the bytes that it would fill, are counted here, besides the pixels.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from PIL import Image

from mipha.data.images import open_image

_SHOWN_CHARS = 60

Address = tuple[str, int]
"""A numeric address and a port."""

_MOST_REDIRECTS = 3
_MOST_URL_CHARS = 2_048
_PORT = 443
_READ_BYTES = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
"""Global unicast (RFC 4291).

Loopback, link-local, multicast, IPv4-mapped and NAT64 (64:ff9b::/96) addresses lie outside it.
"""

_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")))
"""Networks that older tables of Python lack: IETF protocols, the retired 6to4 relays (RFC 7526) and
documentation (RFC 9637)."""

# Only names that a certificate is made for: at least one dot, and a last label that begins with a
# letter. So no number can hide in a notation that a resolver reads: 127.1, 2130706433, 0x7f.0.0.1,
# 0177.0.0.1, [::ffff:127.0.0.1].
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)+(?=[a-z]){_LABEL}", re.I)

_MOST_STEPS = 10_000
"""Chunks, segments or blocks of one file: a PNG of 14 MB in pieces of 8 KB has 1,800."""

_MOST_SCANS = 50
"""Scans of a JPEG; each decodes the whole image again, and a progressive JPEG has about 10."""

_BMP_UNPACKED = (0, 3, 6)
"""BI_RGB, BI_BITFIELDS, BI_ALPHABITFIELDS.

Run lengths are left out, because Pillow unpacks them one by one in Python.
"""


def shown(value: object) -> str:
    """Return an untrusted value as it may stand in a sentence: short, on one line, ASCII."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value[:_SHOWN_CHARS] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


# ---- Fetching from an address ---------------------------------------------------------------


async def resolve_host(host: str) -> list[Address]:
    """Return every address that the machine's resolver has for a name, with the port of https.

    Raises:
        OSError: The resolver knows none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, _PORT, type=socket.SOCK_STREAM)
    return [address[:2] for *_, address in found]


def is_public(address: str) -> bool:
    """Return whether a numeric address belongs to the open internet.

    Addresses of this machine, of its network, and those that lead around the two do not.

    Source: IANA's special-purpose address registries, as `ipaddress` has them; RFC 3056 (6to4) and
    RFC 4380 (Teredo), which carry an IPv4 address inside.
    """
    ip = ipaddress.ip_address(address)
    if (
        ip.is_multicast
        or ip.is_reserved
        or not ip.is_global
        or any(ip in network for network in _NOT_PUBLIC)
    ):
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return True
    return ip in _PUBLIC_IPV6 and ip.sixtofour is None and ip.teredo is None


async def fetch_image(
    url: str,
    *,
    max_bytes: int,
    max_seconds: float,
    resolve: Callable[[str], Awaitable[Sequence[Address]]] = resolve_host,
    is_allowed: Callable[[str], bool] = is_public,
    tls: ssl.SSLContext | None = None,
) -> bytes:
    """Return the bytes behind an https address; its reader finds out whether they are an image.

    Args:
        url: The address.
        max_bytes: Size of the largest body.
        max_seconds: Time for everything: looking up, connecting, redirects, reading.
        resolve: Function that returns the addresses of a name.
        is_allowed: Function that returns whether a numeric address may be connected to; where one
            of a name's addresses may not, none is.
        tls: Certificates that are trusted; None: the machine's.

    Raises:
        ValueError: The address is not allowed, or gives no body in time; the sentence tells the
            sender nothing of this network.
    """
    try:
        async with asyncio.timeout(max_seconds):
            for _ in range(_MOST_REDIRECTS + 1):
                host, target = _checked_url(url)
                address = await _checked_address(host, resolve, is_allowed)
                location, body = await _get(host, target, address, tls or _machine_tls(), max_bytes)
                if location is None:
                    return body
                url = urljoin(f"https://{host}{target}", location)
    except TimeoutError as error:
        raise ValueError(
            f"the image's address did not answer within {max_seconds:g} seconds: "
            "send the image itself"
        ) from error
    except ssl.SSLError as error:
        raise ValueError(
            "the image's address has no valid certificate: send the image itself"
        ) from error
    except OSError as error:
        raise ValueError("the image's address cannot be reached: send the image itself") from error
    raise ValueError(
        f"the image's address redirects more than {_MOST_REDIRECTS} times: give the last address"
    )


@cache
def _machine_tls() -> ssl.SSLContext:
    """Return the certificates that this machine trusts; reading them takes a while."""
    return ssl.create_default_context()


def _checked_url(url: str) -> tuple[str, str]:
    """Return host, and path with query, of an address that may be asked."""
    name = shown(url)
    is_printable = re.fullmatch(r"[!-\[\]-~]+", url)  # ASCII without space and backslash
    if len(url) > _MOST_URL_CHARS or not is_printable:
        raise ValueError(
            f"{name} is no address: write up to {_MOST_URL_CHARS:,} ASCII characters without spaces"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{name} is no address: write https://, a name and a path") from error

    if parts.scheme != "https":
        raise ValueError(f"{name} is not fetched: only https addresses are")
    if "@" in parts.netloc:
        raise ValueError(
            "an address with a user name in it is not fetched: leave the name and the password out"
        )
    if port not in (None, _PORT):
        raise ValueError(f"{name} is not fetched: only port {_PORT} is asked")
    if not _HOST.fullmatch(parts.hostname or ""):
        raise ValueError(
            f"{name} is not fetched: its host must be a full name such as images.example.org, "
            "not a number"
        )
    assert parts.hostname
    return parts.hostname, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


async def _checked_address(
    host: str,
    resolve: Callable[[str], Awaitable[Sequence[Address]]],
    is_allowed: Callable[[str], bool],
) -> Address:
    addresses = await resolve(host)
    if not addresses:
        raise OSError(f"no address for {host}")
    if not all(is_allowed(address) for address, _ in addresses):
        raise ValueError(f"{shown(host)} is not fetched: it is no public address")
    return addresses[0]


async def _get(
    host: str, target: str, address: Address, tls: ssl.SSLContext, max_bytes: int
) -> tuple[str | None, bytes]:
    """Send one request to one address and return where it redirects to, or its body."""
    import h11

    headers = [
        ("Host", host),
        ("Accept", "image/*"),
        ("Accept-Encoding", "identity"),
        ("User-Agent", "mipha"),
        ("Connection", "close"),
    ]
    reader, writer = await asyncio.open_connection(
        *address, ssl=tls, server_hostname=host, limit=_READ_BYTES
    )
    try:
        connection = h11.Connection(h11.CLIENT)
        writer.write(
            connection.send(h11.Request(method="GET", target=target, headers=headers)) or b""
        )
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()

        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response):
                found = {name: value.decode("latin-1") for name, value in event.headers}
                if event.status_code in _REDIRECTS and b"location" in found:
                    return found[b"location"], b""
                if event.status_code != 200:
                    raise ValueError(
                        f"the image's address answers with status {event.status_code}: "
                        "give one that answers with 200"
                    )
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > max_bytes:
                    raise ValueError(
                        f"the image behind the address has more than {max_bytes:,} bytes: "
                        "make it smaller"
                    )
            elif isinstance(event, h11.EndOfMessage):
                return None, bytes(body)
    except h11.RemoteProtocolError as error:
        raise ValueError(
            "the image's address answers with no proper HTTP: send the image itself"
        ) from error
    finally:
        writer.transport.abort()  # closing politely could be kept waiting by the other side
        with suppress(OSError):
            await writer.wait_closed()


# ---- Reading a file --------------------------------------------------------------------------


class _Header(NamedTuple):
    """The facts of an image's header.

    Args:
        width: Width in pixels.
        height: Height in pixels.
        pixel_bytes: Bytes that a decoder holds for each pixel.
    """

    width: int
    height: int
    pixel_bytes: int


def decoded_bytes(data: bytes, max_pixels: int) -> int:
    """Return how many bytes an image takes while it is decoded, by its header.

    Args:
        data: A whole file.
        max_pixels: Largest width x height.

    Raises:
        ValueError: The header is none of PNG, JPEG, WebP, GIF and BMP, is damaged, says more
            pixels, or is made to keep a decoder busy.
    """
    read_header = _header_reader(data)
    if read_header is None:
        raise ValueError(
            "the image is none of PNG, JPEG, WebP, GIF and BMP: convert it to one of them"
        )
    try:
        width, height, pixel_bytes = read_header(data)
    except (IndexError, struct.error) as error:
        raise ValueError(
            "the image's header is cut short or damaged: send the whole file"
        ) from error
    if width * height > max_pixels:
        raise ValueError(
            f"the image has {width:,} x {height:,} pixels and {max_pixels:,} are read at most: "
            "make it smaller"
        )
    return width * height * pixel_bytes


def read_untrusted_image(data: bytes, max_pixels: int) -> Image.Image:
    """Return a PNG, JPEG, WebP, GIF (its first frame) or BMP as an upright RGB image.

    The content decides what it is, and not its label.

    Args:
        data: A whole file.
        max_pixels: Largest width x height; the header says it, and nothing larger is decoded.

    Raises:
        ValueError: The file has none of these formats, is too large or damaged, or is made to keep
            a decoder busy.
    """
    decoded_bytes(data, max_pixels)
    try:
        return open_image(data, max_pixels=max_pixels)
    except ValueError as error:
        reason = str(error.__cause__ or error)
        if not reason or "BytesIO" in reason:  # it names an object of ours, or nothing
            reason = "it cannot be decoded"
        raise ValueError(f"the image is damaged ({reason}): send the whole file") from error


def _header_reader(data: bytes) -> Callable[[bytes], _Header] | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_header
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_header
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif_header
    if data.startswith(b"BM"):
        return _bmp_header
    return _webp_header if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _png_header(data: bytes) -> _Header:
    """Count the chunks. Source: PNG specification (W3C), sections 5.3, 11.2.2 and 8.2.

    An interlaced image is held twice: its passes are put together at the end.
    """
    position = 8
    for _ in range(_MOST_STEPS):
        if position >= len(data):
            break
        position += 12 + struct.unpack_from(">I", data, position)[0]
    else:
        raise ValueError(f"the image has more than {_MOST_STEPS:,} chunks: save it again")

    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    channels = {0: 1, 2: 3, 3: 3, 4: 2}.get(colour, 4)
    return _Header(width, height, channels * max(1, depth // 8) * (2 if interlaced else 1))


def _jpeg_header(data: bytes) -> _Header:
    """Read the segments up to the first scan.

    Source: ITU-T T.81, annex B; 0xC0 to 0xCF begin a frame, but for DHT, JPG and DAC. The frames
    0xC2, 0xC6, 0xCA and 0xCE are progressive: a decoder holds all coefficients, in 16 bits.
    """
    if data.count(b"\xff\xda") > _MOST_SCANS:  # coded data never holds these two bytes
        raise ValueError(
            f"the image has more than {_MOST_SCANS} scans: save it again, not progressive"
        )

    position, found = 2, None
    for _ in range(_MOST_STEPS):
        if data[position] != 0xFF:
            raise ValueError("the image is a damaged JPEG: save it again")
        marker = data[position + 1]
        if marker == 0xDA:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if found:
                raise ValueError("the image says twice how large it is: save it again")
            height, width, components = struct.unpack_from(">HHB", data, position + 5)
            found = _Header(width, height, components * (2 if marker & 3 == 2 else 1))
        position += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, position + 2)[0]

    if not found:
        raise ValueError("the image's pixels do not begin where they should: save it again")
    return found


def _gif_header(data: bytes) -> _Header:
    """Read the extensions up to the first frame, which may be larger than the screen.

    Source: GIF89a specification, sections 18 to 26.
    """
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _palette_bytes(flags)
    for _ in range(_MOST_STEPS):
        if data[position] == 0x2C:
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
            return _Header(max(width, left + frame_width), max(height, top + frame_height), 4)
        if data[position] != 0x21:
            break
        position += 2
        while length := data[position]:
            position += 1 + length
        position += 1
    raise ValueError("the image's first frame is not where it should be: save it again")


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _bmp_header(data: bytes) -> _Header:
    """Read either header; the rows of a negative height stand upside down.

    Source: Microsoft, BITMAPCOREHEADER (12 bytes) and BITMAPINFOHEADER (40 and more).
    """
    if struct.unpack_from("<I", data, 14)[0] == 12:
        return _Header(*struct.unpack_from("<HH", data, 18), 4)
    width, height = struct.unpack_from("<ii", data, 18)
    if struct.unpack_from("<I", data, 30)[0] not in _BMP_UNPACKED:
        raise ValueError("the image is a compressed BMP: save it as PNG")
    return _Header(abs(width), abs(height), 4)


def _webp_header(data: bytes) -> _Header:
    """Read the first chunk.

    Source: WebP container specification (VP8X), RFC 6386 section 9.1 (VP8), WebP lossless
    specification section 3 (VP8L).
    """
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return _Header(width, height, 4)
