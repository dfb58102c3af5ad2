"""Bodies come out whole however the network cuts them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.benching.http1 import Address, Chunked, HttpError, Sized
from gptoss_jax.benching.sse import EventStream


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(bounds)]


@given(
    st.lists(st.binary(min_size=1, max_size=40)),
    st.lists(st.integers(0, 10_000)),
    st.sampled_from([b"", b"x: y\r\n"]),
)
def test_a_chunked_body_comes_out_whole(chunks: list[bytes], places: list[int], trailer: bytes) -> None:
    """RFC 9112, section 7.1: chunks with an extension, hexadecimal sizes, and trailers."""
    framed = (
        b"".join(b"%X;name=value\r\n%s\r\n" % (len(one), one) for one in chunks) + b"0\r\n" + trailer + b"\r\n"
    )
    framing, body = Chunked(), b""
    for piece in cut(framed, places):
        assert not framing.ended or not piece
        body += framing.feed(piece)
    assert (body, framing.ended) == (b"".join(chunks), True)


def test_a_body_that_breaks_off_is_an_error() -> None:
    for framing in (Chunked(), Sized(10)):
        framing.feed(b"5\r\nhel")
        with pytest.raises(HttpError, match="closed in the middle"):
            framing.closed()
    with pytest.raises(HttpError, match="size of a chunk, found b'xyz'"):
        Chunked().feed(b"xyz\r\nhello")


@given(st.lists(st.integers(0, 10_000)), st.sampled_from([b"\n", b"\r\n"]))
def test_events_come_out_whole(places: list[int], end: bytes) -> None:
    """The examples of the HTML standard, section 9.2.6, and the space after the colon, which is optional."""
    lines = [
        b": a comment",
        b"",
        b"data: YHOO",
        b"data: +2",
        b"data: 10",
        b"",
        b"event: add",
        b"data:73",
        b"id: 1",
        b"",
    ]
    lines += [b"data", b"", b"retry: 9", b"", b"data:  two spaces", b"", b"data: unfinished"]
    stream, found = EventStream(), []
    for piece in cut(end.join(lines), places):
        found += stream.feed(piece)
    assert found == [b"YHOO\n+2\n10", b"73", b" two spaces"]


@pytest.mark.parametrize(
    ("url", "address", "header"),
    [
        ("http://127.0.0.1:8000", Address(False, "127.0.0.1", 8000, ""), "127.0.0.1:8000"),
        ("https://api.example.org/gpt/", Address(True, "api.example.org", 443, "/gpt"), "api.example.org:443"),
        ("http://[::1]:80", Address(False, "::1", 80, ""), "[::1]:80"),
    ],
)
def test_addresses(url: str, address: Address, header: str) -> None:
    assert Address.parse(url) == address
    assert address.host_header == header


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://x",
        "http://",
        "http://x:99999",
        "http://x:0",
        "http://u:p@x",
        "http://[::1",
        "http://x y",
        "http://x?a=b",
        "",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Address.parse(url)
