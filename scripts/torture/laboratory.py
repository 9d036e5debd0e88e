"""What every phase works with: databases, workers, certificates, figures, a folder."""

from __future__ import annotations

import json
import os
import py_compile
import random
import shutil
from pathlib import Path
from typing import NamedTuple

from lab import SITES, make_certs

import releasectl as rc

from .databases import Databases, PostgresServer, SqliteFiles
from .figures import Figures
from .workers import Workers


class Laboratory(NamedTuple):
    databases: Databases
    certs: Path | None
    workers: Workers
    figures: Figures
    folder: Path
    random: random.Random

    @property
    def payload_file(self) -> str:
        return str(self.folder / "payload.json")

    def evidence_folder(self, name: str) -> Path:
        """Return a new folder for what is kept because it was wrong."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def close(self) -> None:
        self.workers.close()
        self.databases.close()


def set_up(folder: Path, figures: Figures, database_url: str = "", tls_agents: int = 0) -> Laboratory:
    """Return a laboratory in a folder.

    database_url names a PostgreSQL server, or the folder for SQLite files (sqlite:///FOLDER/ANY);
    without it the databases are our own. tls_agents is the number of agents that get certificates.
    """
    # a copy, so that nobody's editing disturbs a run
    program = folder / "program"
    program.mkdir()
    for name in ("releasectl.py", "schema.sql"):
        shutil.copy(Path(rc.__file__).with_name(name), program)
    py_compile.compile(f"{program}/releasectl.py", doraise=True)  # once, and not at each start
    os.environ["LAB_PROGRAM"] = str(program)
    (folder / "logs").mkdir()
    (folder / "payload.json").write_text(json.dumps(SITES))
    names = ",".join(f"127.0.1.{number}" for number in range(1, tls_agents + 1))
    certs = make_certs(folder / "certs", names) if names else None
    databases: Databases
    if figures.engine == "postgresql":
        databases = PostgresServer(folder, database_url)
    else:
        databases = SqliteFiles(Path(database_url[len("sqlite:///"):]).parent if database_url else folder)
    return Laboratory(databases, certs, Workers(folder / "logs", program), figures, folder,
                      random.Random(figures.seed))
