"""`make install`, `make uninstall` and pip: what lies where, what is left alone, that the command runs (issue 19)."""
from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import leave_out
from lab import ROOT, Quick, run
from test_completion import bash_says

import releasectl as rc

CONF = "etc/releasectl/releasectl.conf"


def make(target: str, dest: object, **variables: object) -> None:
    """Run make install or uninstall; DESTDIR is always given, as else root would make a user."""
    run("make", "-s", target, f"DESTDIR={dest}", f"PYTHON={sys.executable}",
        *(f"{name}={value}" for name, value in variables.items()), cwd=ROOT, env={"PATH": os.environ["PATH"]})


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A prefix with an installed releasectl that runs from there."""
    folder = tmp_path_factory.mktemp("installed")
    make("install", "/.", PREFIX=folder / "usr", SYSCONFDIR=folder / "etc")
    return folder / "usr"


def installed(prefix: Path, *arguments: object, **environment: str) -> str:
    """Return what the installed command prints in an empty environment."""
    return run(prefix / "bin" / "releasectl", *arguments, cwd=prefix.parent,
               env={"PATH": os.environ["PATH"], **environment})


def test_install_puts_everything_in_its_place_and_uninstall_takes_all_but_the_settings(tmp_path):
    make("install", tmp_path)
    share = "usr/local/share"
    assert {f"{share}/man/man1/releasectl.1", f"{share}/bash-completion/completions/releasectl",
            f"{share}/zsh/site-functions/_releasectl", f"{share}/fish/vendor_completions.d/releasectl.fish",
            f"{share}/doc/releasectl/docs/RUNBOOK.md", "usr/local/lib/systemd/system/releasectl.service",
            "usr/local/lib/releasectl/schema.sql", "usr/local/lib/releasectl/dashboard.html", CONF,
            "usr/local/lib/releasectl/releasectl.py", "usr/local/bin/releasectl"} <= files(tmp_path)
    make("uninstall", tmp_path)
    assert files(tmp_path) == {CONF}
    make("uninstall", tmp_path)


def test_a_second_install_changes_nothing_and_leaves_the_settings_as_they_are(tmp_path):
    make("install", tmp_path)
    (tmp_path / CONF).write_text("LOG_LEVEL=debug\n")

    def installed() -> dict[str, bytes]:
        # Python 3.9 does not compile a module twice to the same bytes: the head has the digest of the source
        return {name: (tmp_path / name).read_bytes()[:16 if name.endswith(".pyc") else None]
                for name in files(tmp_path)}

    before = installed()
    make("install", tmp_path)
    assert installed() == before


def test_prefix_and_sysconfdir_reach_the_units_the_launcher_and_the_settings(tmp_path):
    make("install", tmp_path, PREFIX="/opt/rc", SYSCONFDIR="/opt/rc/etc")
    unit = (tmp_path / "opt/rc/lib/systemd/system/releasectl.service").read_text()
    assert "\nExecStart=/opt/rc/bin/releasectl --config /opt/rc/etc/releasectl/releasectl.conf serve\n" in unit
    assert "/usr/local" not in unit
    assert '"/opt/rc/lib/releasectl"' in (tmp_path / "opt/rc/bin/releasectl").read_text()
    assert '"/opt/rc/etc/releasectl/releasectl.conf"' in (tmp_path / "opt/rc/bin/releasectl").read_text()
    assert "#CONTROL_CERT=/opt/rc/etc/releasectl/control.crt" in (
        tmp_path / "opt/rc/etc/releasectl/releasectl.conf").read_text()


def test_the_first_settings_name_every_setting_and_set_the_database_alone(tmp_path):
    path = tmp_path / "releasectl.conf"
    path.write_text(run(sys.executable, "-I", ROOT / "scripts" / "sample_config.py"))
    assert dict(rc.read_config_file(str(path))) == {"DATABASE_URL": "sqlite:////var/lib/releasectl/releasectl.db"}
    assert re.findall(r"(?m)^#?([A-Z_]+)=", path.read_text()) == [setting.name for setting in rc.SETTINGS]
    commented_in = re.sub(r"(?m)^#([A-Z_]+=.)", r"\1", path.read_text())
    path.write_text(commented_in)
    rc.Settings.load({}, str(path))


def test_the_installed_command_finds_its_settings_schema_and_page(prefix):
    conf = prefix.parent / "etc" / "releasectl" / "releasectl.conf"
    conf.write_text(f"DATABASE_URL=sqlite:///{prefix.parent}/r.db\nMTLS_ENABLED=0\n")
    installed(prefix, "migrate")
    assert f"from {conf}: DATABASE_URL" in installed(prefix, "check")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import releasectl; print(len(releasectl.dashboard().text))"
    assert int(run(sys.executable, "-I", "-c", code, prefix / "lib" / "releasectl")) > 10_000


def test_the_installed_module_is_compiled_and_an_edited_one_is_never_run_as_it_was(prefix, tmp_path):
    copy = Path(shutil.copytree(prefix / "lib" / "releasectl", tmp_path / "lib"))
    seen = subprocess.run([sys.executable, "-I", "-v", "-c", f"import sys; sys.path.insert(0, {str(copy)!r}); "
                           "import releasectl; print(releasectl.__version__)"],
                          capture_output=True, text=True, check=True)
    assert f"matches {copy}/releasectl.py" in seen.stderr
    source = copy / "releasectl.py"
    before = source.stat()
    source.write_text(source.read_text().replace('__version__ = "0', '__version__ = "9'))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    code = f"import sys; sys.path.insert(0, {str(copy)!r}); import releasectl; print(releasectl.__version__)"
    assert run(sys.executable, "-I", "-B", "-c", code).startswith("9")


def test_the_installed_completion_asks_the_command_that_path_finds(prefix, tmp_path):
    script = (prefix / "share/bash-completion/completions/releasectl").read_text()
    assert sys.executable not in script
    offered = bash_says(f"PATH={prefix / 'bin'}:$PATH\n{script}", "releasectl node ", tmp_path)
    assert offered == {"add", "list", "show", "set", "rm", "import", "ping"}
    assert "releasectl __complete zsh" in installed(prefix, "completion", "zsh")


def test_a_copy_that_is_not_installed_completes_by_its_own_path(tmp_path):
    assert str(ROOT) in Quick(tmp_path).ok("completion", "bash").out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_what_root_makes_for_the_service_the_service_can_use(tmp_path):
    cli = Quick(tmp_path / "data")
    for folder in ("data", "etc"):
        (tmp_path / folder).mkdir(mode=0o750)
        os.chown(tmp_path / folder, 1234 if folder == "data" else 0, 5678)
    cli.settings["API_TOKENS_FILE"] = str(tmp_path / "etc" / "tokens")
    cli.ok("token", "add", "deploy", "--role", "operator")
    made = {path.name: path.stat() for path in [*(tmp_path / "data").iterdir(), tmp_path / "etc" / "tokens"]}
    assert {(name, found.st_uid, found.st_gid, oct(stat.S_IMODE(found.st_mode))) for name, found in made.items()} == {
        ("releasectl.db", 1234, 5678, "0o600"), ("tokens", 0, 5678, "0o640")}


# -- pip ---------------------------------------------------------------------------------------

def built(tmp_path: Path, what: str) -> Path:
    """Build a wheel or sdist as pip does; return it."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import pep517; print(pep517.build_{what}('.'))"
    name = run(sys.executable, "-I", "-B", "-c", code, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    return tmp_path / name.strip()


def test_the_wheel_has_schema_and_page_beside_the_module_and_a_record_that_is_true(tmp_path):
    with zipfile.ZipFile(built(tmp_path, "wheel")) as wheel:
        wheel.extractall(tmp_path / "site")
        record = wheel.read(f"releasectl-{rc.__version__}.dist-info/RECORD").decode().splitlines()
        assert {line.split(",")[0] for line in record} == set(wheel.namelist())
        for name, digest, size in (line.split(",") for line in record[:-1]):
            found = wheel.read(name)
            assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(found).digest()).rstrip(b"=").decode()
            assert int(size) == len(found)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "site"), rc.CONFIG_VARIABLE: os.devnull}
    run(sys.executable, "-m", "releasectl", "--db", "sqlite:///r.db", "migrate", cwd=tmp_path, env=environment)
    code = "import releasectl; print(len(releasectl.dashboard().text))"
    assert int(run(sys.executable, "-c", code, env=environment)) > 10_000


def test_the_same_tree_gives_the_same_wheel(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert built(tmp_path / "a", "wheel").read_bytes() == built(tmp_path / "b", "wheel").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "wheel", "sdist"])
def test_pip_install_gives_the_command_and_leaves_nothing_in_the_folder(tmp_path, source):
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        leave_out("pip")
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "dist", "__pycache__", ".*_cache"))
    before = files(tree)
    what = tree if source == "folder" else built(tmp_path, source)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    run(sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-cache-dir", "--disable-pip-version-check",
        "--target", tmp_path / "site", what, env=environment)
    assert files(tree) == before
    command = {**environment, "PYTHONPATH": str(tmp_path / "site"), rc.CONFIG_VARIABLE: os.devnull}
    said = run(tmp_path / "site/bin/releasectl", "--db", "sqlite:///r.db", "migrate", cwd=tmp_path, env=command)
    assert "schema" in said
