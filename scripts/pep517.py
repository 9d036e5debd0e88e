"""Builds the wheel and the source archive for pip (PEP 517), with the standard library alone: no index is needed.

In the wheel the module is the package `releasectl`, as schema.sql and dashboard.html must lie beside it and would be
strangers in a folder of all packages.
"""
from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import tarfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("releasectl.py", "schema.sql", "dashboard.html", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml",
           "scripts/pep517.py")
MAIN = "import releasectl\n\nreleasectl.run_process()\n"
ENTRY_POINTS = "[console_scripts]\nreleasectl = releasectl:run_process\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: releasectl\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project(field: str) -> str:
    """Return a field of pyproject.toml, which Python reads by itself from 3.11 on only."""
    found = re.search(rf'(?m)^{field} = "(.*)"$', text_of("pyproject.toml"))
    if not found:
        raise SystemExit(f"pyproject.toml has no {field}")
    return found[1]


def version() -> str:
    found = re.search(r'(?m)^__version__ = "(.*)"$', text_of("releasectl.py"))
    if not found:
        raise SystemExit("releasectl.py has no __version__")
    return found[1]


def metadata() -> str:
    return (f"Metadata-Version: 2.1\nName: {project('name')}\nVersion: {version()}\nSummary: {project('description')}\n"
            f"License: MIT\nRequires-Python: {project('requires-python')}\n"
            f"Description-Content-Type: text/markdown\n\n{text_of('README.md')}")


def built_at() -> int:
    """Return the time that files get: the same tree gives the same bytes."""
    return int(os.environ.get("SOURCE_DATE_EPOCH", "315532800"))  # 1980: a zip file knows no earlier one


def record_line(name: str, text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(text.encode())}\n"


def build_wheel(wheel_directory: str, config_settings: Mapping[str, str] | None = None,  # noqa: ARG001 - PEP 517
                metadata_directory: str | None = None) -> str:  # noqa: ARG001
    """Write the wheel into a folder; return its name."""
    info = f"releasectl-{version()}.dist-info"
    files = {"releasectl/__init__.py": text_of("releasectl.py"), "releasectl/__main__.py": MAIN,
             "releasectl/schema.sql": text_of("schema.sql"), "releasectl/dashboard.html": text_of("dashboard.html"),
             f"{info}/LICENSE": text_of("LICENSE"), f"{info}/METADATA": metadata(), f"{info}/WHEEL": WHEEL,
             f"{info}/entry_points.txt": ENTRY_POINTS}
    files[f"{info}/RECORD"] = "".join(record_line(*file) for file in files.items()) + f"{info}/RECORD,,\n"
    name = f"releasectl-{version()}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, text in files.items():
            entry = zipfile.ZipInfo(path, time.gmtime(max(built_at(), 315532800))[:6])
            entry.external_attr = 0o100644 << 16
            wheel.writestr(entry, text, zipfile.ZIP_DEFLATED)
    return name


def build_sdist(sdist_directory: str, config_settings: Mapping[str, str] | None = None) -> str:  # noqa: ARG001
    """Write the source archive, which holds what the wheel is built from, into a folder; return its name."""
    folder = f"releasectl-{version()}"
    with tarfile.open(Path(sdist_directory) / f"{folder}.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for path, text in [(name, text_of(name)) for name in SOURCES] + [("PKG-INFO", metadata())]:
            member = tarfile.TarInfo(f"{folder}/{path}")
            member.size, member.mtime, member.mode = len(text.encode()), built_at(), 0o644
            archive.addfile(member, io.BytesIO(text.encode()))
    return f"{folder}.tar.gz"
