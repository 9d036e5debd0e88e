#!/usr/bin/env python3
"""schemathesis against `releasectl.py serve`, from its /openapi.json, with all checks.

    python scripts/fuzz_api.py [--examples N] [--seed N]

Needs tests/requirements-fuzz.txt (Python 3.10 or newer). Exit 0 when no answer was a 5xx, of a status
that is not documented, or of another shape, and the server's log holds no error.
"""
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from flood import SERVER, TOKEN, await_health, serving


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200, help="generated cases for each operation and phase")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    schemathesis = shutil.which("schemathesis", path=os.path.dirname(sys.executable)) or shutil.which("schemathesis")
    if not schemathesis:
        print("schemathesis is not installed: tests/requirements-fuzz.txt", file=sys.stderr)
        return 3
    folder = Path(tempfile.mkdtemp(prefix="releasectl-fuzz."))
    try:
        # the check ignored_auth sends bad tokens by the hundred, and would wait for each answer
        with serving(folder, is_plain=True, before="rc.MAX_DELAY_S = 0.0") as (_, port, ca):
            seed = [] if options.seed is None else ["--seed", str(options.seed)]
            code = subprocess.run(
                [schemathesis, "--config-file", str(Path(__file__).with_name("fuzz_api.toml")), "run", *seed,
                 f"http://{SERVER}:{port}/openapi.json", "--header", f"Authorization: Bearer {TOKEN}",
                 "--checks", "all", "--max-examples", str(options.examples), "--continue-on-failure"],
                check=False, cwd=folder, env={**os.environ, "SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH":
                                              os.path.dirname(os.path.abspath(__file__))}).returncode
            await_health(port, ca)
        bad = [line for line in (folder / "log").read_text().splitlines() if " error: " in line or "Traceback" in line]
    finally:
        shutil.rmtree(folder)
    print("\n".join(bad), file=sys.stderr)
    return code or int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
