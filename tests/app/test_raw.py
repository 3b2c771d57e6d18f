"""What no client library sends: requests written byte by byte, with no proxy in front."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

import pytest

from tests.fixtures.service import Service

pytestmark = pytest.mark.integration

HIDDEN = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
"""A request that stands where a body should: an answer to it is a smuggled one."""

CHUNKED = b"Transfer-Encoding: chunked\r\n"
N = len(HIDDEN)

AMBIGUOUS = {
    "length and chunks": CHUNKED + b"Content-Length: %d\r\n\r\n0\r\n\r\n" % (N + 5) + HIDDEN,
    "chunks and length": b"Content-Length: 4\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
    "two lengths": b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % N + HIDDEN,
    "a list of lengths": b"Content-Length: 0, %d\r\n\r\n" % N + HIDDEN,
    "a negative length": b"Content-Length: -1\r\n\r\n" + HIDDEN,
    "a length with a sign": b"Content-Length: +%d\r\n\r\n" % N + HIDDEN,
    "a chunk of no number": CHUNKED + b"\r\nzz\r\n" + HIDDEN,
    "a space before the colon": b"Content-Length : %d\r\n\r\n" % N + HIDDEN,
    "a bare line feed": b"X: y\nContent-Length: %d\r\n\r\n" % N + HIDDEN[: N // 2],
}


def told(service: Service, sent: bytes) -> bytes:
    """Send bytes and return all that is answered before the server or we have nothing more."""
    at = urlsplit(service.url)
    answer = b""
    with socket.create_connection((at.hostname or "", at.port or 0), 30) as line:
        try:
            line.sendall(sent)
            line.shutdown(socket.SHUT_WR)
            while piece := line.recv(65_536):
                answer += piece
        except TimeoutError:
            raise  # neither answered nor cut off
        except OSError:
            pass  # cut off in the middle of what it did not want to read
    return answer


@pytest.mark.parametrize("how", AMBIGUOUS)
def test_no_request_is_smuggled_in_another(service: Service, how: str) -> None:
    head = b"POST /api/v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = told(service, head + AMBIGUOUS[how])
    statuses = re.findall(rb"HTTP/1\.1 (\d{3})", answer)
    assert b"200" not in statuses, "the hidden request was answered"
    assert all(b"400" <= status < b"500" for status in statuses), statuses
    with service.client() as client:
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("n_bytes", [1 << 20, 8 << 20])
def test_a_head_without_end_is_refused(service: Service, n_bytes: int) -> None:
    sent = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * n_bytes + b"\r\n\r\n"
    answer = told(service, sent)
    assert answer == b"" or re.match(rb"HTTP/1\.1 4\d\d", answer), answer[:100]
    with service.client() as client:
        assert client.get("/healthz").status_code == 200
