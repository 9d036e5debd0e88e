"""Heads and bodies from bytes alone, without a socket: what is read, what is refused, however it is cut into pieces."""
from __future__ import annotations

import http.client
import io
import time

import pytest

import releasectl as rc

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MAX_BYTES = 1000
# Each with its status, its body, and whether the connection can be used again.
ANSWERS: dict[str, tuple[bytes, tuple[int, bytes, bool]]] = {
    "with its length": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", (200, b"hi", True)),
    "of nothing": (b"HTTP/1.1 404 Not Found\r\ncontent-length:0\r\n\r\n", (404, b"", True)),
    "without a reason": (b"HTTP/1.1 500\r\nContent-Length: 2 \t\r\n\r\nhi", (500, b"hi", True)),
    "as large as can be": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000,
                           (200, b"x" * 1000, True)),
    "that closes": (b"HTTP/1.1 200 OK\r\nConnection: Keep-Alive, Close\r\nContent-Length: 2\r\n\r\nhi",
                    (200, b"hi", False)),
    "of HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", (200, b"hi", False)),
    "with more behind it": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1", (200, b"hi", True)),
    "to the end": (b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\r\nhi", (200, b"hi", False)),
    "in chunks": (CHUNKED + b"2\r\nhi\r\n00A;x=\"y\"\r\n0123456789\r\n0\r\n\r\n", (200, b"hi0123456789", True)),
    "in chunks with trailers": (CHUNKED + b"2 \r\nhi\r\n0;last\r\nX: y\r\nZ:\r\n\r\n", (200, b"hi", True)),
    "behind interim ones": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n"
                            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", (200, b"hi", True)),
    "without a body": (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"", True)),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", (304, b"", True)),
}
REFUSED: dict[str, bytes] = {
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi",
    "a bare LF at the end of a header": b"HTTP/1.1 200 OK\r\nX: y\nContent-Length: 2\r\n\r\nhi",
    "a bare CR": b"HTTP/1.1 200 OK\r\nX: y\rContent-Length: 2\r\n\r\nhi",
    "NUL": b"HTTP/1.1 200 OK\r\nX: \0\r\nContent-Length: 2\r\n\r\nhi",
    "a folded header": b"HTTP/1.1 200 OK\r\nX: y\r\n z\r\nContent-Length: 2\r\n\r\nhi",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nhi",
    "no colon": b"HTTP/1.1 200 OK\r\nContent-Length\r\n\r\nhi",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi",
    "two lengths in one": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nhi",
    "a length with a sign": b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nhi",
    "length and chunks": CHUNKED[:-2] + b"Content-Length: 2\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "another coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunks twice": CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk without its size": CHUNKED + b"\r\nhi\r\n0\r\n\r\n",
    "a size with a sign": CHUNKED + b"+2\r\nhi\r\n0\r\n\r\n",
    "a size with 0x": CHUNKED + b"0x2\r\nhi\r\n0\r\n\r\n",
    "a size behind a bare LF": CHUNKED + b"2\nhi\r\n0\r\n\r\n",
    "a chunk longer than its size": CHUNKED + b"2\r\nhiya\r\n0\r\n\r\n",
    "a trailer that is no header": CHUNKED + b"0\r\nhi\r\n\r\n",
    "another protocol": b"HTTP/2 200\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "an empty line first": b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
}
CUT = [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi",
       b"HTTP/1.1 100 Continue\r\n\r\n", CHUNKED, CHUNKED + b"2", CHUNKED + b"2\r\nhi", CHUNKED + b"2\r\nhi\r\n",
       CHUNKED + b"2\r\nhi\r\n0\r\n", CHUNKED + b"0\r\nX: y\r\n"]
TOO_BIG = [b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001,
           CHUNKED + b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\n", CHUNKED + b"ffffffff\r\n"]


def answer_in(data: bytes, piece_bytes: int, may_end: bool = True) -> tuple[tuple[int, bytes, bool], bytes]:
    """Return what is read, and the bytes that came and are left."""
    source = io.BytesIO(data)

    async def receive() -> bytes:
        piece = source.read(piece_bytes)
        assert piece or may_end, "more is waited for"
        return piece
    reader = rc.HttpReader(receive, rc.ANSWER_LIMITS)
    return rc.run_coroutine(rc.read_answer(reader, MAX_BYTES)), bytes(reader.buffer)


in_pieces = pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 1 << 16])


@in_pieces
@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_is_read_the_same_however_it_is_cut_into_pieces(case, piece_bytes):
    data, (status, body, is_kept) = ANSWERS[case]
    answer, left = answer_in(data, piece_bytes)
    assert answer == (status, body, is_kept and not left)


@pytest.mark.parametrize("case", [case for case in ANSWERS if case != "behind interim ones"])
def test_a_good_answer_is_what_http_client_reads_too(case):
    class Socket(io.BytesIO):
        def makefile(self, _mode: str) -> io.BytesIO:
            return self
    data, (status, body, _) = ANSWERS[case]
    response = http.client.HTTPResponse(Socket(data))  # type: ignore[arg-type]
    response.begin()
    assert (response.status, response.read()) == (status, body)


@in_pieces
@pytest.mark.parametrize("case", REFUSED)
def test_what_two_programs_could_read_in_two_ways_is_refused(case, piece_bytes):
    with pytest.raises(rc.AppError) as caught:
        answer_in(REFUSED[case], piece_bytes)
    assert caught.value.code == rc.MALFORMED


@in_pieces
@pytest.mark.parametrize("data", CUT)
def test_what_is_cut_off_is_no_answer(data, piece_bytes):
    with pytest.raises(EOFError):
        answer_in(data, piece_bytes)


@in_pieces
@pytest.mark.parametrize("data", TOO_BIG)
def test_a_body_that_is_too_large_is_refused_before_it_is_read(data, piece_bytes):
    with pytest.raises(rc.TooBig):
        answer_in(data, piece_bytes)


@in_pieces
@pytest.mark.parametrize("data", [b"nonsense\r\n", b"HTTP/1.1 200 OK\r\nX: y\n", b"\x16\x03\x01\0", b"x" * (65 << 10),
                                  b"HTTP/1.1 200 OK\r\nX: " + b"y" * (65 << 10),
                                  b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101, CHUNKED + b"1;" + b"x" * (65 << 10)])
def test_nothing_more_is_waited_for_behind_what_is_refused(data, piece_bytes):
    with pytest.raises(rc.AppError):
        answer_in(data, max(piece_bytes, len(data) // 100), may_end=False)


@pytest.mark.parametrize("data", [b"HTTP/1.1 200 OK\r\nX: " + b"y" * (64 << 10),
                                  b"HTTP/1.1 200 OK\r\n" + (b"X: " + b"y" * 650 + b"\r\n") * 99,
                                  CHUNKED + b"1;" + b"x" * (63 << 10)], ids=["a header", "headers", "a chunk"])
def test_what_drips_is_searched_once_and_not_again_for_each_byte(data):
    began = time.thread_time()
    with pytest.raises((EOFError, rc.AppError)):
        answer_in(data, 1)
    assert time.thread_time() - began < 1.5  # 0.1 s; 2 to 19 s where each byte was followed by a search of all
