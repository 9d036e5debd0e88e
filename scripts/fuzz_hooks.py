"""What the formats of /openapi.json mean, for schemathesis (see fuzz_api.py)."""
import schemathesis
from hypothesis import strategies as st

LABEL = r"[A-Za-z_]([A-Za-z0-9_-]{0,20}[A-Za-z0-9_])?"
NO_SUCH_ID = 2 ** 53

schemathesis.openapi.format("line", st.from_regex(r"[!-~\u00e0-\u00f6]{1,20}( [!-~]{1,20}){0,3}", fullmatch=True))
schemathesis.openapi.format("address", st.one_of(
    st.ip_addresses().map(str), st.from_regex(rf"{LABEL}(\.{LABEL}){{0,3}}", fullmatch=True)))


@schemathesis.hook
def before_call(context, case, kwargs):  # noqa: ARG001 - as schemathesis calls it
    """Lets a link that leads nowhere (an event's nodeId, a release's retryOf: they may be null) lead to nothing."""
    for name, value in (case.path_parameters or {}).items():
        if value in (None, "None"):
            case.path_parameters[name] = NO_SUCH_ID
