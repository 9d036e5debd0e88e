"""What the formats of /openapi.json mean, for schemathesis (see fuzz_api.py)."""
from __future__ import annotations

import ipaddress
from typing import Any

import schemathesis
from hypothesis import strategies as st

LABEL = r"[A-Za-z_]([A-Za-z0-9_-]{0,20}[A-Za-z0-9_])?"
NO_SUCH_ID = 2 ** 53


def is_of_a_host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether a host may have an address: others are refused as a node's."""
    address = getattr(address, "ipv4_mapped", None) or address
    is_odd = address.is_unspecified or address.is_multicast or address.is_link_local
    return not is_odd and (address.version == 6 or address not in ipaddress.ip_network("0.0.0.0/8")
                           and str(address) != "255.255.255.255")


schemathesis.openapi.format("line", st.from_regex(r"[!-~\u00e0-\u00f6]{1,20}( [!-~]{1,20}){0,3}", fullmatch=True))
schemathesis.openapi.format("address", st.one_of(
    st.ip_addresses().filter(is_of_a_host).map(str), st.from_regex(rf"{LABEL}(\.{LABEL}){{0,3}}", fullmatch=True)))


def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:  # noqa: ARG001 - as schemathesis calls it
    """Let a link that leads nowhere (an event's nodeId, a release's retryOf: they may be null) lead to nothing.

    And gives payloads the key without which no release goes to a node of protocol execute.
    """
    if isinstance(case.body, dict) and isinstance(case.body.get("payload"), dict):
        case.body["payload"].setdefault("websites", [])
    for name, value in (case.path_parameters or {}).items():
        if value in (None, "None"):
            case.path_parameters[name] = NO_SUCH_ID


schemathesis.hook(before_call)
