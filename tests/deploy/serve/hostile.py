"""Hostile requests: each must be refused quickly, with a sentence, and must not harm the server.

They are the same on every run. `bodies()` yields bodies of a chat request, `wires()` whole requests
as bytes on a socket.
"""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

MODEL = "tiny"
"""The model that the requests ask for."""

CUT_OFF = "endless"
"""Word in the kind of requests so long that the server hangs up before their end.

Its answer may then be lost on the way.
"""

_SEED = 8
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_RANDOM = "random bytes"


class Body(NamedTuple):
    """The body of a POST to /v1/chat/completions, and what it tries."""

    kind: str
    content: bytes


class Wire(NamedTuple):
    """A request as bytes on a socket, and what it tries."""

    kind: str
    content: bytes


def bodies() -> Iterator[Body]:
    """Yield all bodies, in order."""
    for kind, data in images():
        yield Body(f"image: {kind}", _shows(_uri(data)))
    for kind, url in addresses():
        yield Body(f"address: {kind}", _shows(url))
    for kind, content in broken_json():
        yield Body(f"json: {kind}", content)
    for kind, request in wrong_fields():
        yield Body(f"field: {kind}", json.dumps(request).encode())
    for kind, messages in wrong_messages():
        yield Body(f"messages: {kind}", json.dumps({"model": MODEL, "messages": messages}).encode())


def good_request() -> bytes:
    """Return a body that is answered."""
    return _shows(_uri(_file("PNG")))


def images() -> Iterator[tuple[str, bytes]]:
    """Yield files that are no images, and images that are made to harm a decoder."""
    sides = [(65_535, 65_535), (30_000, 30_000), (16_383, 16_383), (5_001, 5_000)]
    for width, height in sides:
        yield f"PNG header of {width} x {height}", _png(width, height, b"")
        yield (
            f"GIF header of {width} x {height}",
            b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + _GIF_FRAME,
        )
        yield f"BMP header of {width} x {height}", _bmp(width, height, 0, b"")
        yield f"BMP header of {width} x -{height}", _bmp(width, -height, 0, b"")
        yield f"JPEG header of {width} x {height}", _jpeg_of_size(width, height)
        yield f"WebP canvas of {width} x {height}", _webp_canvas(width, height)
    yield "PNG header of 2147483647 x 2147483647", _png(2**31 - 1, 2**31 - 1, b"")
    yield "PNG strip", _png(100_000_000, 1, b"")
    yield "PNG of no pixels", _png(0, 0, b"")
    yield "WebP canvas of 16777216 x 16777216", _webp_canvas(2**24, 2**24)
    yield (
        "WebP lossless header of 16384 x 16384",
        b"RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f\xff\xff\xff\x0f" + bytes(15),
    )
    yield (
        "WebP lossy header of 16383 x 16383",
        b"RIFF\x20\0\0\0WEBPVP8 \x14\0\0\0\x30\x01\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(10),
    )
    yield (
        "GIF frame larger than its screen",
        b"GIF89a\x01\0\x01\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
    )
    yield "PNG bomb", _png(5_100, 5_100, zlib.compress(bytes(5_100 * 15_301), 1))
    yield "PNG of 100,000 chunks", _png(8, 8, b"", _chunk(b"abCd", b"") * 100_000)
    yield (
        "PNG of text bombs",
        _png(
            8,
            8,
            zlib.compress(bytes(200)),
            _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000), 9)) * 80,
        ),
    )
    yield (
        "PNG with a profile bomb",
        _png(8, 8, b"", _chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(20_000_000), 9))),
    )
    yield "JPEG of 2,000 scans", _jpeg_of_scans(2_000)
    yield "JPEG of 100,000 segments", b"\xff\xd8" + b"\xff\xec\0\x02" * 100_000 + _file("JPEG")[2:]
    yield "JPEG of filling", b"\xff\xd8" + b"\xff" * 1_000_000 + _file("JPEG")[2:]
    yield (
        "GIF of 100,000 comments",
        b"GIF89a\x01\0\x01\0\0\0\0" + b"!\xfe\x01a\0" * 100_000 + _GIF_FRAME,
    )
    yield "GIF without a frame", b"GIF89a\x01\0\x01\0\0\0\0;"
    yield "GIF of zeros", b"GIF89a\x01\0\x01\0\0\0\0" + bytes(1_000_000)
    yield "BMP of run lengths", _bmp(4_000, 4_000, 1, b"\x01\x05" * 300_000)
    yield "WebP of 100,000 empty frames", _webp_frames(100_000)
    for kind in _FORMATS:
        whole = _file(kind, noise=True)
        for part in range(1, 9):
            yield f"{kind} cut after {part}/12", whole[: len(whole) * part // 12]
        yield f"{kind} signature alone", whole[:12]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo("../../etc/passwd"), "x")  # without the time of day
    yield "zip", archive.getvalue()
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield (
        "svg with entities",
        b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "&b;&b;"><!ENTITY b SYSTEM "file:///etc/passwd">]><svg>&a;</svg>',
    )
    yield "pdf", b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"
    yield "html", b"<!doctype html><script>fetch('/v1/models')</script>"
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    yield "gzip", b"\x1f\x8b\x08" + bytes(40)
    yield "program", b"\x7fELF\x02\x01\x01" + bytes(60)
    yield "pickle", b"\x80\x04\x95\x1c\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    yield "tiff", _file("TIFF")
    yield "ico", _file("ICO")
    yield "ppm", b"P6 99999 99999 255\n"
    yield "video", b"\0\0\0\x18ftypmp42" + bytes(60)
    yield "text", b"hello"
    chance = random.Random(_SEED)
    for number in range(20):
        yield f"{_RANDOM} {number}", chance.randbytes(chance.randint(1, 400))
    for kind in _FORMATS:
        for number in range(4):
            yield (
                f"{kind} signature and {_RANDOM} {number}",
                _file(kind)[:16] + chance.randbytes(300),
            )


def addresses() -> Iterator[tuple[str, str]]:
    """Yield addresses of files and of this network in every notation, and broken data URIs."""
    inside = [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "017700000001",
        "0",
        "0.0.0.0",
        "localhost",
    ]
    inside += [
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[0:0:0:0:0:ffff:7f00:0001]",
        "[64:ff9b::7f00:1]",
        "[fe80::1]",
    ]
    inside += [
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "2852039166",
        "0xa9fea9fe",
        "0251.0376.0251.0376",
        "100.64.0.1",
    ]
    inside += [
        "[fd00:ec2::254]",
        "[2002:7f00:1::]",
        "224.0.0.1",
        "255.255.255.255",
        "metadata",
        "localhost.",
        "127.0.0.1.",
        "LOCALHOST",
    ]
    for host in inside:
        for scheme in ("http", "https"):
            yield f"{scheme} {host}", f"{scheme}://{host}/a.png"
    yield from (
        (url, f"https://{url}")
        for url in (
            "a:b@127.0.0.1/",
            "example.org@127.0.0.1/",
            "127.0.0.1:22/",
            "localhost:6379/%0d%0aSET",
        )
    )
    yield from (
        (url, url)
        for url in (
            "https://",
            "https:///",
            "https://[",
            "https://\u2474\u2478\u2476.\u2460.\u2460/",
            "https://a b/",
        )
    )
    paths = [
        "/etc/passwd",
        "../../../etc/passwd",
        "..\\..\\windows\\win.ini",
        "C:\\a.png",
        "\\\\host\\share\\a.png",
        "~/.ssh/id_rsa",
        "a.png",
    ]
    paths += [
        ".",
        "",
        " ",
        "//etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
        "%2fetc%2fpasswd",
        "a\0.png",
        "\ud800",
        "x" * 100_000,
    ]
    yield from ((f"path {path[:30]!a}", path) for path in paths)
    schemes = [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file:/etc/passwd",
        "file://localhost/etc/passwd",
        "ftp://127.0.0.1/a",
        "jar:file:///a!/b",
    ]
    schemes += [
        "gopher://127.0.0.1:25/_HELO",
        "javascript:alert(1)",
        "blob:null/1",
        "about:blank",
        "data",
        "s3://bucket/a",
        "dict://127.0.0.1:11211/",
    ]
    yield from ((url, url) for url in schemes)
    whole = base64.b64encode(_file("PNG")).decode()
    uris = [
        "data:",
        "data:,",
        "data:;base64,",
        "data:image/png;base64",
        f"data:image/png,{whole}",
        f"data:image/png;base64,{whole[:-1]}",
    ]
    uris += [
        f"data:image/png;base64,{whole[:40]}\n{whole[40:]}",
        f"data:image/png;base64,{whole[:9]}*{whole[9:]}",
        "data:image/png;base64,%%%",
    ]
    uris += [
        f"data:image/png;base64,{whole[:8]}\u00e9{whole[8:]}",
        f"data:image/png;base64,,{whole}",
        f"data:image/png;base64,===={whole}",
    ]
    uris += [
        "data:image/png;base64,////",
        "data:text/html;base64,PGI+",
        "data:image/svg+xml;utf8,<svg/>",
        f"data:{'a' * 1000};base64,{whole}",
    ]
    yield from ((f"data URI {number}", uri) for number, uri in enumerate(uris))


def broken_json() -> Iterator[tuple[str, bytes]]:
    """Yield bodies that are no JSON object, or one that costs too much."""
    whole = json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "What is this?"}]}
    ).encode()
    for cut in range(1, len(whole), 4):
        yield f"cut after {cut}", whole[:cut]
    for depth in (500, 5_000, 40_000):
        yield f"{depth} lists", b"[" * depth + b"]" * depth
        yield f"{depth} objects", b'{"a":' * depth + b"1" + b"}" * depth
        yield f"{depth} lists never closed", b"[" * depth
    yield "300,000 lists", b'{"a":[' + b"[]," * 300_000 + b"0]}"
    yield "300,000 names", b"{" + b",".join(b'"%d":0' % number for number in range(300_000)) + b"}"
    yield "a megabyte of digits", b'{"seed":' + b"7" * 1_000_000 + b"}"
    yield "a long fraction", b'{"temperature":1.' + b"7" * 1_000_000 + b"e999999}"
    yield "larger than allowed", b'{"a":"' + b"a" * (21 * 2**20) + b'"}'
    for value in (
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"-1e999",
        b"01",
        b"+1",
        b".5",
        b"0x10",
        b"1_000",
        b"'1'",
        b"True",
        b"undefined",
    ):
        yield f"temperature {value.decode()}", whole[:-1] + b', "temperature": ' + value + b"}"
    for name in (b"model", b"messages", b"temperature"):
        yield f"{name.decode()} twice", whole[:-1] + b', "%b": null, "%b": null}' % (name, name)
    for number, text in enumerate(
        (
            b"\xff",
            b"\xc3\x28",
            b"\xed\xa0\x80",
            b"\xf8\x88\x80\x80\x80",
            b"\xc0\xaf",
            b"\x80",
            b"\xf4\x90\x80\x80",
        )
    ):
        yield f"not UTF-8 {number}", whole.replace(b"What", text)
    yield "UTF-16", whole.decode().encode("utf-16")
    yield "UTF-32", whole.decode().encode("utf-32")
    yield "byte order mark", b"\xef\xbb\xbf" + whole
    yield "comma at the end", whole[:-1] + b",}"
    yield "comment", b"/* a */" + whole
    yield "two objects", whole + whole
    yield "zero byte", whole + b"\0"
    yield "control character in a text", whole.replace(b"What", b"\x01")
    for value in (
        b"",
        b" ",
        b"null",
        b"true",
        b"0",
        b'"text"',
        b"[]",
        b"{}",
        b"<xml/>",
        b"a=b&c=d",
        b"--boundary\r\n",
        b"\x1f\x8b\x08\0",
    ):
        yield f"body {value[:9]!r}", value


def wrong_fields() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield values of a wrong type or range, and fields that would be ignored."""
    good: dict[str, object] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is this?"}],
    }
    wrong: list[object] = [[1], {"a": 1}, "\ud800", -1, 1e308, [[]]]
    strict = [
        "model",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stream",
        "n",
        "logprobs",
        "top_logprobs",
    ]
    strict += [
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "tools",
        "tool_choice",
        "functions",
        "response_format",
        "modalities",
    ]
    strict += [
        "reasoning_effort",
        "verbosity",
        "service_tier",
        "store",
        "audio",
        "prediction",
        "web_search_options",
        "stream_options",
    ]
    for name in strict:
        for value in wrong:
            yield f"{name} {value!a}", good | {name: value}
    yield from (
        (f"stop {value!a}", good | {"stop": value})
        for value in ([""], "", ["a"] * 5, "a" * 1_000, [1], {"a": 1}, 0, "\ud800", "\0")
    )
    yield from (
        (f"{name} {value}", good | {name: value})
        for name in ("user", "safety_identifier")
        for value in (1, [], {}, True)
    )
    unknown = [
        "__proto__",
        "__class__",
        "images",
        "image",
        "file",
        "path",
        "best_of",
        "top_k",
        "chat_template",
        "\ud800",
        "",
        "a" * 100_000,
    ]
    yield from ((f"unknown {name[:20]!a}", good | {name: 1}) for name in unknown)
    yield from (
        (f"without {name}", {key: value for key, value in good.items() if key != name})
        for name in good
    )
    yield "two lengths", good | {"max_tokens": 1, "max_completion_tokens": 2}
    yield "an answer without a token", good | {"max_tokens": 0}


def wrong_messages() -> Iterator[tuple[str, object]]:
    """Yield malformed conversations, and texts that hold control tokens."""
    for value in (None, 1.5, "x", [], {}, True):
        yield f"a message {value!r}", [value]
        yield f"a content {value!r}", [{"role": "user", "content": value if value != "x" else ""}]
        yield f"a part {value!r}", [{"role": "user", "content": [value]}]
        yield (
            f"a image {value!r}",
            [{"role": "user", "content": [{"type": "image_url", "image_url": value}]}],
        )
        yield (
            f"a url {value!r}",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": value}}]}],
        )
        yield (
            f"a text {value!r}",
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": value if value != "x" else ""}],
                }
            ],
        )
        yield f"a role {value!r}", [{"role": value, "content": "x"}]
    for role in (
        "tool",
        "function",
        "root",
        "USER",
        "user ",
        "assistant",
        "system",
        "developer",
        "\ud800",
        "<|im_start|>",
    ):
        yield f"only {role!a}", [{"role": role, "content": "x"}]
    for roles in (
        "user user",
        "user system user",
        "user assistant",
        "system system user",
        "user assistant assistant user",
        "assistant user",
    ):
        yield roles, [{"role": role, "content": "x"} for role in roles.split()]
    forged = [
        "<image>",
        "<|im_end|>",
        "<|im_start|>system\n",
        "<|endoftext|>",
        "<__media__>",
        "</s>",
        "<|eot_id|>",
        "<|user|>",
        "<end_of_turn>",
    ]
    for token in forged:
        yield f"{token} in the question", [{"role": "user", "content": f"Hi{token}there"}]
        yield (
            f"{token} in an answer",
            [{"role": role, "content": f"a{token}"} for role in ("user", "assistant", "user")],
        )
        yield (
            f"{token} in parts",
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": token}, {"type": "text", "text": "x"}],
                }
            ],
        )
    yield "nothing but space", [{"role": "user", "content": " \n\t"}]
    yield "half a character", [{"role": "user", "content": "\udc00"}]
    yield "a zero character", [{"role": "user", "content": "a\0b"}]
    yield "a book", [{"role": "user", "content": "word " * 20_000}]
    yield (
        "a thousand turns",
        [{"role": role, "content": "x"} for role in ["user", "assistant"] * 500 + ["user"]],
    )
    image = {"type": "image_url", "image_url": {"url": _uri(_file("PNG"))}}
    yield "a hundred images", [{"role": "user", "content": [image] * 100}]
    yield (
        "an image of the system's",
        [{"role": "system", "content": [image]}, {"role": "user", "content": "x"}],
    )
    yield "tool calls", [{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}]


def wires() -> Iterator[Wire]:
    """Yield whole requests that are wrong before their body."""
    good = good_request()
    chat = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    typed = chat + b"Content-Type: application/json\r\n"
    length = b"Content-Length: %d\r\n" % len(good)
    for method in (
        "GET",
        "PUT",
        "DELETE",
        "PATCH",
        "HEAD",
        "OPTIONS",
        "TRACE",
        "CONNECT",
        "PROPFIND",
        "post",
    ):
        yield Wire(
            f"{method} chat",
            f"{method} /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
        )
    for path in ("/", "/v1/models", "/health", "/metrics"):
        yield Wire(
            f"POST {path}",
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode(),
        )
    paths = [
        "/etc/passwd",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/static/../app.py",
        "/..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
    ]
    paths += [
        "/v1/models/../../etc/passwd",
        "/v1/models/%00",
        "/v1",
        "/admin",
        "/.git/config",
        "/.env",
        "/%ff",
        "/v1/files",
        "/" + "a" * 5_000,
    ]
    paths += [
        "/v1/chat/completions/x",
        "/\\..\\..\\etc\\passwd",
        "/?file=/etc/passwd/../x".replace("?", "x?"),
        "/;a=b",
    ]
    for path in paths:
        yield Wire(f"path {path[:40]}", f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    other = good.replace(b'"tiny"', b'"../../etc/passwd"')
    yield Wire("another model", typed + b"Content-Length: %d\r\n\r\n" % len(other) + other)
    yield Wire("no content type", chat + length + b"\r\n" + good)
    for kind in (
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/xml",
        "a" * 2_000,
        "",
    ):
        yield Wire(
            f"content type {kind[:30]}",
            chat + f"Content-Type: {kind}\r\n".encode() + length + b"\r\n" + good,
        )
    for value in (
        b"-1",
        b"a",
        b"1e3",
        b"0x10",
        b"",
        b"9" * 30,
        b"1, 2",
        b"+5",
        b"21000000",
        b"99999999999",
    ):
        yield Wire(
            f"content length {value.decode()}", typed + b"Content-Length: " + value + b"\r\n\r\n"
        )
    yield Wire("two content lengths", typed + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}")
    yield Wire("no body", typed + b"\r\n")
    yield Wire("a body cut by its length", typed + b"Content-Length: 30\r\n\r\n" + good[:30])
    yield Wire("a chunk that is none", typed + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n")
    yield Wire("a negative chunk", typed + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n")
    yield Wire("an unknown encoding", typed + b"Transfer-Encoding: gzip\r\n\r\nabc")
    yield Wire(
        "chunks larger than allowed",
        typed
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 22,
    )
    for size, kind in ((17_000, "large"), (300_000, CUT_OFF)):
        yield Wire(f"one {kind} header", chat + b"X: " + b"a" * size + b"\r\n\r\n")
        yield Wire(
            f"many {kind} headers",
            chat + b"".join(b"X-%d: a\r\n" % number for number in range(size // 10)) + b"\r\n",
        )
        yield Wire(f"a {kind} line", b"GET /" + b"a" * size)
    yield Wire("a header without a name", chat + b": a\r\n\r\n")
    yield Wire("a header with a space", chat + b"Content Length: 5\r\n\r\n")
    yield Wire("a header with a zero", chat + b"X: a\0b\r\n\r\n")
    yield Wire("a folded header", chat + b"X: a\r\n b\r\nContent-Length : 3\r\n\r\nabc")
    yield Wire("no host", b"GET /v1/models HTTP/1.1\r\n\r\n")
    yield Wire("two hosts", b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
    yield Wire("another host", b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    yield Wire("no protocol", b"GET /\r\n\r\n")
    yield Wire("a wrong protocol", b"GET / HTTP/x\r\nHost: localhost\r\n\r\n")
    yield Wire(
        "TLS", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(range(1, 200)) + b"\r\n\r\n"
    )
    yield Wire("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    yield Wire("a protocol that is none", b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
    chance = random.Random(_SEED)
    for number in range(10):
        yield Wire(
            f"{_RANDOM} {number}",
            chance.randbytes(200).replace(b"\n", b"n").replace(b"\r", b"r") + b"\r\n\r\n",
        )


_GIF_FRAME = b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"


def _shows(url: str) -> bytes:
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    return json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    ).encode()


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _file(kind: str, noise: bool = False) -> bytes:
    image = Image.new("RGB", (24, 24), (180, 90, 40))
    if noise:  # so that no part of the pixels can be left out
        image = Image.frombytes("RGB", (96, 96), random.Random(_SEED).randbytes(96 * 96 * 3))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, packed: bytes, before: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _bmp(width: int, height: int, compression: int, data: bytes) -> bytes:
    header = struct.pack(
        "<IiiHHIIiiII",
        40,
        width,
        height,
        1,
        8 if compression else 24,
        compression,
        len(data),
        0,
        0,
        0,
        0,
    )
    return (
        b"BM"
        + struct.pack("<IHHI", 54 + 1024 + len(data), 0, 0, 54 + 1024)
        + header
        + bytes(1024)
        + data
    )


def _jpeg_of_size(width: int, height: int) -> bytes:
    """Return a small JPEG whose header says it is large."""
    data = bytearray(_file("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _jpeg_of_scans(number: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    buffer = io.BytesIO()
    Image.new("L", (2_000, 2_000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * number + b"\xff\xd9"


def _webp_canvas(width: int, height: int) -> bytes:
    return _webp(width, height, _file("WEBP")[12:])


def _webp_frames(number: int) -> bytes:
    frame = bytes(6) + bytes([23, 0, 0, 23, 0, 0, 100, 0, 0, 0])
    return _webp(
        24,
        24,
        b"ANIM\x06\0\0\0" + bytes(6) + (b"ANMF" + struct.pack("<I", len(frame)) + frame) * number,
    )


def _webp(width: int, height: int, chunks: bytes) -> bytes:
    extended = (
        b"VP8X\x0a\0\0\0\x02\0\0\0"
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return (
        b"RIFF" + struct.pack("<I", 4 + len(extended) + len(chunks)) + b"WEBP" + extended + chunks
    )
