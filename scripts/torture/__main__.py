"""`python scripts/torture`."""

import sys
from pathlib import Path

# Python puts this folder on the path; the one above it is needed, for modules named torture.NAME.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from torture.command_line import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
