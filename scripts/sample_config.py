#!/usr/bin/env python3
"""Print a settings' file to begin with: every setting with its meaning, commented out but for the database."""
from __future__ import annotations

import sys
import textwrap
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import releasectl as rc  # noqa: E402

HEAD = """\
# The settings of releasectl: KEY=VALUE, each on a line of its own. `releasectl check` says what is wrong here, and
# where each setting comes from; docs/OPERATIONS.md, "Configuration", has more words. The environment wins.
# It takes a restart (systemctl restart releasectl), but for renewed certificates and tokens."""
DATABASE = "sqlite:////var/lib/releasectl/releasectl.db"
# Where files lie that people put there, for the settings without a default.
EXAMPLES = {"API_TOKENS_FILE": "tokens", "CONTROL_CERT": "control.crt", "CONTROL_KEY": "control.key",
            "CONTROL_CA": "ca.crt", "HTTP_CERT": "http.crt", "HTTP_KEY": "http.key"}


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else str(Path(rc.DEFAULT_CONFIG).parent)
    print(HEAD)
    for setting in rc.SETTINGS:
        print(*["", *textwrap.wrap(setting.help, 116, initial_indent="# ", subsequent_indent="# ")], sep="\n")
        if setting.name == "DATABASE_URL":
            print(f"{setting.name}={DATABASE}")
        else:
            example = f"{folder}/{EXAMPLES[setting.name]}" if setting.name in EXAMPLES else setting.default
            print(f"#{setting.name}={example}")


if __name__ == "__main__":
    main()
