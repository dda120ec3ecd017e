"""A picture from an address that a stranger named: https only, public addresses only, small and soon or not at all.

A name is looked up once, what it stands for is checked, and the connection goes to exactly that: a name that means something else a
moment later changes nothing. The certificate is still checked against the name. Every redirect goes through the same door.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cache
from urllib.parse import urljoin, urlsplit

from mipha.deploy.serve.limits import shown

Address = tuple[str, int]
"""A numeric address and a port."""

_MOST_REDIRECTS = 3
_MOST_URL_CHARS = 2_048
_PORT = 443
_READ_BYTES = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
"""Global unicast (RFC 4291). Outside it lie loopback, link-local, multicast, IPv4-mapped and NAT64 (64:ff9b::/96) addresses."""

_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")))
"""IETF protocols, the retired 6to4 relays (RFC 7526), documentation (RFC 9637): what older tables of Python lack."""

# Names only, as a certificate is made for: at least one dot, and a last label that begins with a letter. So no number can hide in
# any of the notations that a resolver reads: 127.1, 2130706433, 0x7f.0.0.1, 0177.0.0.1, [::ffff:127.0.0.1].
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)+(?=[a-z]){_LABEL}", re.I)


async def resolve_host(host: str) -> list[Address]:
    """Every address that the machine's resolver has for a name, with the port of https.

    Raises:
        OSError: It knows none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, _PORT, type=socket.SOCK_STREAM)
    return [address[:2] for *_, address in found]


def is_public(address: str) -> bool:
    """Whether a numeric address belongs to the open internet, and not to this machine, its network, or a way around the two.

    Source: IANA's special-purpose address registries, as `ipaddress` has them; RFC 3056 (6to4) and RFC 4380 (Teredo), which carry an
    IPv4 address inside.
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
    """The bytes behind an https address; whether they are a picture is for its reader to find.

    Args:
        max_bytes: The largest body.
        max_seconds: For all of it: looking up, connecting, redirects, reading.
        resolve: Addresses of a name.
        is_allowed: Whether a numeric address may be connected to; where one of a name's may not, none is.
        tls: Which certificates are trusted; null: the machine's.

    Raises:
        ValueError: The address is not allowed, or does not give a body in time; the sentence tells the sender nothing of this network.
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
            f"the picture's address did not answer within {max_seconds:g} seconds: send the picture itself"
        ) from error
    except ssl.SSLError as error:
        raise ValueError(
            "the picture's address has no valid certificate: send the picture itself"
        ) from error
    except OSError as error:
        raise ValueError(
            "the picture's address cannot be reached: send the picture itself"
        ) from error
    raise ValueError(
        f"the picture's address redirects more than {_MOST_REDIRECTS} times: give the last address"
    )


@cache
def _machine_tls() -> ssl.SSLContext:
    """What this machine trusts; reading it takes a while."""
    return ssl.create_default_context()


def _checked_url(url: str) -> tuple[str, str]:
    """Host and path with query of an address that may be asked."""
    name = shown(url)
    if len(url) > _MOST_URL_CHARS or not re.fullmatch(
        r"[!-\[\]-~]+", url
    ):  # printable ASCII without space and backslash
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
            f"{name} is not fetched: its host must be a full name such as pictures.example.org, not a number"
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
    """One request to one address: where it redirects to, or its body."""
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
                        f"the picture's address answers with status {event.status_code}: give one that answers with 200"
                    )
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > max_bytes:
                    raise ValueError(
                        f"the picture behind the address has more than {max_bytes:,} bytes: make it smaller"
                    )
            elif isinstance(event, h11.EndOfMessage):
                return None, bytes(body)
    except h11.RemoteProtocolError as error:
        raise ValueError(
            "the picture's address answers with no proper HTTP: send the picture itself"
        ) from error
    finally:
        writer.transport.abort()  # nothing more is wanted, and a farewell could be kept waiting
        with suppress(OSError):
            await writer.wait_closed()
