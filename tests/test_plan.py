"""What a release will do, pure: batches, addresses, payloads; and the helpers below them."""
from __future__ import annotations

import json

import pytest

import releasectl as rc


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (2, [1, 1]), (3, [1, 2]), (100, [1, 99])])
def test_rule_1_default_batches_are_the_first_node_then_all_others(count, sizes):
    batches = rc.plan_batches(list(range(1, count + 1)))
    assert [len(batch) for batch in batches] == sizes
    assert sum(batches, []) == list(range(1, count + 1))


@pytest.mark.parametrize(("text", "plain"), [
    ("10.0.0.7", "10.0.0.7"), ("::1", "::1"), ("2001:DB8::0001", "2001:db8::1"),
    ("edge-1.Example.com", "edge-1.example.com"), ("localhost", "localhost")])
def test_an_address_is_an_ip_address_or_a_host_name(text, plain):
    assert rc.parse_address(text) == plain


@pytest.mark.parametrize("text", [
    "300.1.1.1", "10.0.0", "10.0.0.7:8443", "http://x", "a b", "-x", "x-.y", "a..b", "fe80::1%eth0", "x/y", "a@b",
    "10.0.0.7\n", "x" * 64, 7, None, "\u0661.1.1.1"])
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(rc.AppError, match="neither an IP address nor a host name"):
        rc.parse_address(text)


def test_an_empty_address_is_said_to_be_empty():
    with pytest.raises(rc.AppError, match="mainIp is empty: an IP address or a host name"):
        rc.parse_address("")


@pytest.mark.parametrize("value", [0, 65536, -1, "80", 1.5, True, None])
def test_a_port_out_of_range_is_an_error_never_another_value(value):
    with pytest.raises(rc.AppError, match="whole number from 1 to 65535"):
        rc.parse_node_fields({"agentPort": value})


@pytest.mark.parametrize("payload", [{"version": 41}, {"version": "42"}, {"version": True}, {"version": None},
                                     {"version": 42.0}])
def test_a_payload_that_names_another_version_is_refused(payload):
    with pytest.raises(rc.AppError, match="the release is version 42: leave the version out"):
        rc.check_payload_version(payload, 42)


@pytest.mark.parametrize("payload", [{}, {"version": 42}])
def test_a_payload_may_name_the_releases_own_version(payload):
    rc.check_payload_version(payload, 42)


def test_rule_10_an_old_payload_is_given_the_new_version_where_it_named_one():
    assert rc.payload_for_version({"version": 1, "a": 2}, 9) == {"version": 9, "a": 2}
    assert rc.payload_for_version({"a": 2}, 9) == {"a": 2}


def test_section_7_an_unknown_strategy_key_is_refused_by_name():
    with pytest.raises(rc.AppError, match="strategy: bachtes is not a known key"):
        rc.parse_strategy({"bachtes": [1]})


# -- texts, times, JSON --------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["a\nb", "a\x00b", "a\x1b[31mb", "a\u202eb", "a\u2028b", "a\ud800b", "a\x85b",
                                  "a \t b"])
def test_a_message_is_one_line_without_control_characters(text):
    line = rc.one_line(text)
    assert line.replace(" [31m", " ") == "a b"
    line.encode()


@pytest.mark.parametrize("size", [254, 255, 256, 100_000])
def test_a_message_has_at_most_255_characters(size):
    line = rc.one_line("x" * size)
    assert len(line) == min(size, 255)
    assert line.endswith("...") == (size > 255)


def test_a_detail_keeps_its_lines_and_is_at_most_4_kib():
    assert rc.detail_text("a\nb\x00") == "a\nb"
    assert len(rc.detail_text("\u00e9" * 9000).encode()) <= 4096


@pytest.mark.parametrize("epoch_s", [0.0, 1.5, 1_790_000_000.1234, 1_790_000_000.9996])
def test_times_are_rfc_3339_with_milliseconds_and_come_back(epoch_s):
    text = rc.utc_text(epoch_s)
    assert len(text) == 24
    assert text.endswith("Z")
    assert rc.epoch_of(text) == pytest.approx(epoch_s, abs=0.001)


@pytest.mark.parametrize("text", ['{"a":1,"a":2}', "NaN", "[Infinity]", "{", "", "[" * 100 + "]" * 100,
                                  "[" * 100_000, '"\\ud800"', '"\ud800"', b"\xff", "1" * 5000])
def test_json_is_read_strictly(text):
    with pytest.raises(ValueError, match="."):
        rc.parse_json(text)


def test_json_goes_out_and_comes_back():
    value = {"a": [1, 2.5, None, True, "\u4f60\u597d"], "b": {"c": {}}}
    assert rc.parse_json(rc.to_json(value)) == value == json.loads(rc.to_json(value))


@pytest.mark.parametrize("numbers", [rc.Range(1, 64), rc.Range(0.5, 60, float)])
def test_a_range_means_the_same_in_a_text_in_json_and_in_its_schema(numbers):
    assert (numbers.schema["minimum"], numbers.schema["maximum"]) == numbers[:2]
    for end in numbers[:2]:
        assert numbers.from_text(str(end)) == numbers.from_json(end) == end
    for text, value in (("0", 0), ("-1", -1), ("65", 65), ("", ""), ("1e1", "1e1"), ("true", True)):
        for parse, given in ((numbers.from_text, text), (numbers.from_json, value)):
            with pytest.raises(ValueError, match=f"number from {numbers.low} to {numbers.high}"):
                parse(given)
