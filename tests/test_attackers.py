"""What an attacker with a viewer's token, without one, or on another site can't do (docs/SECURITY.md), over real sockets."""
from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ADDRESSES, ROOT, SITES, add_nodes, eventually, make_certs, new_release, settings_for
from test_api import Client, read_answer, serving, sha256, split_answer
from test_api_hostile import (  # noqa: F401 - fixtures
    OPERATOR,
    TOKENS,
    connected,
    copy_pair,
    healthy,
    new_server,
    quick,
    read_all,
    seats,
    trusting,
)

import releasectl as rc

VIEWER = {"Authorization": "Bearer viewer-secret"}


def request(method: str, path: str, token: str = "", *headers: str) -> bytes:
    """Return a request's head."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    lines += [f"Authorization: Bearer {token}"] if token else []
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.fixture
def logged(caplog, monkeypatch):
    """A function that gives what was logged."""
    monkeypatch.setattr(rc.log, "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


# -- names, labels, numbers (item 12) --------------------------------------------------------------

DECEIVING = {"zero width": "edge\u200b1", "bidi": "\u202eedge", "soft hyphen": "ed\u00adge", "Hangul filler": "a\u3164",
             "variation selector": "a\ufe0f", "Cyrillic in Latin": "\u0435dge", "Greek in Latin": "\u03bfpen",
             "decomposed": "e\u0301", "control": "a\x07", "line": "a\u2028b", "no-break space": "a\u00a0b",
             "space before": " a", "blank Braille": "\u2800"}
HONEST = ["edge-1", "\u8fb9\u7f18\u8282\u70b9", "Z\u00fcrich", "\u0441\u0435\u0440\u0432\u0435\u0440-web1", "10\u00b5s",
          "a b", "\u65e5\u672c A"]


@pytest.mark.parametrize("text", DECEIVING.values(), ids=DECEIVING)
def test_names_and_labels_that_look_like_others_are_refused(text):
    for fields in ({"name": text}, {"labels": {text: "x"}}, {"labels": {"x": text}}):
        with pytest.raises(rc.AppError) as refused:
            rc.parse_node_fields(fields)
        assert (refused.value.code, rc.PLAIN_TEXT in refused.value.message) == (2003, True)
        assert len(refused.value.message) <= rc.MAX_MESSAGE_CHARS


@pytest.mark.parametrize("text", HONEST)
def test_names_and_labels_of_any_script_are_taken(text):
    assert rc.parse_node_fields({"name": text, "labels": {text: text}})["name"] == text


@pytest.mark.parametrize(("labels", "words"), [
    ({f"k{n}": "" for n in range(65)}, "at most 64"), ({"k" * 64: ""}, "1 to 63"), ({"": "x"}, "1 to 63"),
    ({"k": "v" * 256}, "at most 255")])
def test_labels_have_limits(new_server, labels, words):  # noqa: F811
    client = new_server()
    client.token = "operator-secret"
    answer = client("POST", "/api/v1/nodes", {"name": "edge-1", "mainIp": "10.0.0.1", "labels": labels})
    assert (answer.code, words in answer.message) == (2003, True)


def test_labels_are_taken_up_to_their_limits(new_server):  # noqa: F811
    client = new_server()
    client.token = "operator-secret"
    labels = {f"{n:063}": "v" * 255 for n in range(64)}
    assert client.ok("POST", "/api/v1/nodes", {"name": "edge-1", "mainIp": "10.0.0.1", "labels": labels},
                     201)["labels"] == labels


def test_long_numbers_are_refused_before_they_are_read_on_every_python():
    """As Python 3.9 does it, which has no limit of its own."""
    code = ("import time, releasectl as rc; started = time.process_time()\n"
            "try: rc.parse_json(b'{\"x\":' + b'9' * (1 << 20) + b'}')\n"
            "except ValueError as error: print(error)\n"
            "print(time.process_time() - started < 1)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONINTMAXSTRDIGITS": "0"})
    assert result.stdout.splitlines()[1:] == ["True"]
    assert f"at most {rc.MAX_INTEGER_DIGITS} digits" in result.stdout
    assert rc.parse_json("9" * rc.MAX_INTEGER_DIGITS) == int("9" * rc.MAX_INTEGER_DIGITS)
