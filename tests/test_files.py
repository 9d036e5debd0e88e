"""Files: modes whatever the umask, links, bytes that are not UTF-8, and what `make dist` packs (issue 13, 7, 16)."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import leave_out
from lab import (
    DRIVERS,
    PROGRAM,
    ROOT,
    TIMEOUT_S,
    Cli,
    copy_pair,
    eventually,
    findings,
    free_port,
    mtls,
    new_release,
    serve_process,
    sha256,
)
from test_service import SERVICES, unit

import releasectl as rc

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def fleet_cli(fleet_cli):
    """The command line of conftest.py, with copies of the certificates."""
    fleet_cli.certs = Path(shutil.copytree(fleet_cli.world.certs, fleet_cli.folder / "certs"))
    fleet_cli.settings.update(mtls(fleet_cli.certs))
    return fleet_cli


@pytest.fixture
def in_reach():
    """A command line in a folder that everybody gets to; pytest's own are closed."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Cli(Path(folder))


def mode_of(path: object) -> int:
    return stat.S_IMODE(os.stat(str(path)).st_mode)


# -- modes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("umask", ["000", "022", "077", "277"])
def test_what_is_made_has_its_mode_whatever_the_umask(cli, umask):
    cli.settings.update(MTLS_ENABLED="0", API_TOKENS_FILE="tokens", HTTP_ADDR=f"127.0.0.1:{free_port()}")
    cli.prefix = ("bash", "-c", f'umask {umask}; exec "$@"', "bash")
    cli.port = int(cli.settings["HTTP_ADDR"].split(":")[1])
    cli.ok("migrate")
    cli.ok("token", "add", "vera", "--role", "viewer")
    with serve_process(cli):
        modes = {end: mode_of(cli.folder / f"releasectl.db{end}") for end in ("", "-wal", "-shm")}
    assert modes == dict.fromkeys(("", "-wal", "-shm"), 0o600)
    cli.ok("backup", "copy.db")
    cli.ok("run-once", "--metrics-file", "metrics.prom")
    assert [mode_of(cli.folder / name) for name in ("copy.db", "tokens", "metrics.prom")] == [0o600, 0o600, 0o644]


@pytest.mark.parametrize("command", [("node", "add", "edge-1", "10.0.0.1"), ("run-once",)])
def test_whoever_makes_the_database_makes_it_closed_to_others(cli, command):
    cli.settings["MTLS_ENABLED"] = "0"
    cli.prefix = ("bash", "-c", 'umask 000; exec "$@"', "bash")
    cli.ok(*command)
    assert mode_of(cli.folder / "releasectl.db") == 0o600


def test_a_database_that_is_made_behind_a_link_is_closed_to_others_too(cli):
    cli.settings["MTLS_ENABLED"] = "0"
    (cli.folder / "releasectl.db").symlink_to("real.db")
    cli.prefix = ("bash", "-c", 'umask 022; exec "$@"', "bash")
    cli.ok("migrate")
    assert mode_of(cli.folder / "real.db") == 0o600


def test_a_database_that_is_there_keeps_its_mode(cli):
    cli.ok("migrate")
    os.chmod(cli.folder / "releasectl.db", 0o640)
    cli.ok("migrate")
    cli.ok("node", "add", "edge-1", "10.0.0.1")
    assert mode_of(cli.folder / "releasectl.db") == 0o640


@pytest.mark.parametrize("mode", [0o604, 0o602])
def test_check_tells_a_database_that_is_open_to_others(in_reach, mode):
    cli = in_reach
    cli.settings["MTLS_ENABLED"] = "0"
    cli.ok("migrate")
    path = cli.folder / "releasectl.db"
    cli.ok("check")
    os.chmod(path, mode)
    result = cli("check")
    assert result.code == rc.EXIT_USAGE
    assert "releasectl.db is open to others: chmod o-rwx it" in result.out
    os.chmod(cli.folder, 0o750)
    cli.ok("check")


@pytest.mark.parametrize(("mode", "url", "words"), [
    (0o666, "sqlite:///r.db", "is open to others, who may write it: chmod o-rwx,g-w it"),
    (0o660, "sqlite:///r.db", "is open to others, who may write it: chmod o-rwx,g-w it"),
    (0o644, "postgresql://u:hunter2@127.0.0.1:1/d", "is open to others, and the database's password is in it"),
    (0o644, "sqlite:///r.db\nNOTIFY_URL=https://h.example/hunter2", "is open to others, and NOTIFY_URL is in it"),
    (0o640, "postgresql://u:hunter2@127.0.0.1:1/d", ""), (0o644, "sqlite:///r.db", ""),
])
def test_check_looks_at_the_mode_of_the_settings(in_reach, mode, url, words):
    cli = in_reach
    if url.startswith("postgresql:") and not DRIVERS:
        leave_out("a PostgreSQL driver")
    path = cli.file("releasectl.conf", f"DATABASE_URL={url}\nMTLS_ENABLED=0\n")
    os.chmod(path, mode)
    result = cli("--config", path, "check", "--json")
    assert findings(result)["--config"][0] is not bool(words)
    assert words in findings(result)["--config"][1]
    assert "hunter2" not in result.out + result.err


@pytest.mark.skipif(not DRIVERS, reason="no PostgreSQL driver")
def test_check_looks_for_a_password_in_the_file_of_the_settings_and_nowhere_else(in_reach):
    url = "postgresql://u:hunter2@127.0.0.1:1/d"
    path = in_reach.file("releasectl.conf", f"DATABASE_URL={url}\n")
    os.chmod(path, 0o644)
    in_reach.settings["DATABASE_URL"] = "sqlite:///r.db"  # which wins, and the password stands there all the same
    assert "the database's password is in it" in findings(in_reach("--config", path, "check", "--json"))["--config"][1]
    del in_reach.settings["DATABASE_URL"]
    path = in_reach.file("other.conf", "DATABASE_URL_FILE={}\n".format(in_reach.file("url", url)))
    os.chmod(path, 0o644)
    os.chmod(in_reach.folder / "url", 0o600)
    assert findings(in_reach("--config", path, "check", "--json"))["--config"][0] is True


def test_check_says_that_a_file_without_a_token_lets_nobody_in(in_reach):
    in_reach.settings["API_TOKENS_FILE"] = in_reach.file("tokens", "# none yet\n")
    os.chmod(in_reach.folder / "tokens", 0o600)
    is_ok, text = findings(in_reach("check", "--json"))["API_TOKENS_FILE"]
    assert not is_ok
    assert "holds no token" in text


# -- keys that are open ------------------------------------------------------------------------

@pytest.mark.parametrize("command", [("run-once",), ("node", "ping"), ("serve",)])
def test_an_open_control_key_is_refused_by_every_command_that_uses_it(fleet_cli, command):
    os.chmod(fleet_cli.certs / "control.key", 0o644)
    assert "is open to others: chmod o-rwx,g-w it" in fleet_cli.refused(rc.EXIT_USAGE, *command)


def test_a_key_that_is_opened_under_a_running_serve_begins_nothing_and_is_told(fleet_cli):
    key = fleet_cli.certs / "control.key"
    store = fleet_cli.world.store
    with serve_process(fleet_cli) as serve:
        os.chmod(key, 0o644)
        time.sleep(2.5)  # nothing is to be done: it is told all the same
        release = new_release(store)
        time.sleep(1)
        assert store.releases.get(release.id).status == "pending"
        os.chmod(key, 0o600)
        eventually(lambda: store.releases.get(release.id).status == "success")
        time.sleep(2)
        serve.terminate()
        result = Cli.end(serve)
    assert result.code == 0
    told_once(result.err, "executor", f"CONTROL_KEY {key}")


def told_once(log: str, subject: str, file: str) -> None:
    """Assert that all the log has of an opened file is a line, and one when it was closed again."""
    told, mended = [line for line in log.splitlines() if "open to others" in line]
    assert f": {subject}: " in told
    assert f"{file} is open to others: chmod o-rwx,g-w it" in told
    assert f": {subject}: mended: " in mended
    assert f"{file} is open to others" in mended


@pytest.mark.parametrize(("name", "subject"), [("API_TOKENS_FILE", "tokens"), ("HTTP_KEY", "renewed certificate")])
def test_a_file_of_the_api_that_is_opened_is_told_once_though_nobody_asks(cli, certs, name, subject):
    tokens = cli.file("tokens", f"vera:viewer:{sha256('x')}\n")
    os.chmod(tokens, 0o600)
    cli.settings.update(copy_pair(certs, cli.folder), MTLS_ENABLED="0", API_TOKENS_FILE=tokens,
                        RELEASE_EXECUTOR_INTERVAL_SEC="0.1")
    log = cli.folder / "log"
    with open(log, "w", encoding="utf-8") as stream:
        serve = cli.start("serve", stderr=stream)
    try:
        eventually(lambda: "serving https://" in log.read_text())
        os.chmod(cli.settings[name], 0o604)
        eventually(lambda: "is open to others" in log.read_text())
        time.sleep(0.5)  # scans in which nothing changes
        os.chmod(cli.settings[name], 0o600)
        eventually(lambda: f"{subject}: mended: " in log.read_text())
    finally:
        serve.terminate()
        serve.communicate()
    told_once(log.read_text(), subject, f"{name} {cli.settings[name]}")


def test_with_tokens_that_are_opened_under_a_running_serve_nobody_is_let_in(cli):
    token = "t" * 40
    tokens = cli.file("tokens", f"vera:viewer:{sha256(token)}\n")
    os.chmod(tokens, 0o600)
    cli.port = free_port()
    cli.settings.update(MTLS_ENABLED="0", API_TOKENS_FILE=tokens, HTTP_ADDR=f"127.0.0.1:{cli.port}")

    def status() -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{cli.port}/api/v1/nodes",
                                         headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    with serve_process(cli) as serve:
        assert status() == 200
        os.chmod(tokens, 0o604)
        assert [status() for _ in range(3)] == [500] * 3
        os.chmod(tokens, 0o600)
        assert status() == 200
        serve.terminate()
        result = Cli.end(serve)
    assert [line.count("tokens: none is accepted: API_TOKENS_FILE") for line in result.err.splitlines()
            if "open to others" in line and "mended" not in line] == [1]


def test_a_release_under_way_is_followed_to_its_end_with_a_key_that_was_opened(fleet_cli):
    fleet_cli.world.agent(1).set(task_ms=1500)
    store = fleet_cli.world.store
    with serve_process(fleet_cli):
        release = new_release(store)
        eventually(lambda: store.releases.get(release.id).status == "running")
        os.chmod(fleet_cli.certs / "control.key", 0o644)
        eventually(lambda: store.releases.get(release.id).status == "success")


# -- links -------------------------------------------------------------------------------------

def test_a_link_to_the_tokens_is_written_through(cli):
    (cli.folder / "real").mkdir()
    (cli.folder / "tokens").symlink_to("real/tokens")  # it leads nowhere yet
    cli.settings["API_TOKENS_FILE"] = "tokens"
    cli.ok("token", "add", "one", "--role", "viewer")
    cli.ok("token", "add", "two", "--role", "viewer")
    assert (cli.folder / "tokens").is_symlink()
    assert len((cli.folder / "real" / "tokens").read_text().splitlines()) == 2
    assert os.listdir(cli.folder / "real") == ["tokens"]
    assert "one has a token" in cli.refused(rc.EXIT_STATE, "token", "add", "one", "--role", "viewer")


def test_a_link_to_the_metrics_is_written_through(cli):
    cli.settings["MTLS_ENABLED"] = "0"
    (cli.folder / "real").mkdir()
    (cli.folder / "metrics").symlink_to("real/metrics")
    for _ in range(2):
        cli.ok("run-once", "--metrics-file", "metrics")
    assert (cli.folder / "metrics").is_symlink()
    assert "releasectl_build_info" in (cli.folder / "real" / "metrics").read_text()


def test_no_pipe_or_device_is_replaced_by_a_file(cli):
    cli.settings["MTLS_ENABLED"] = "0"
    os.mkfifo(cli.folder / "pipe")
    assert "can't be written: not a regular file" in cli.refused(
        rc.EXIT_USAGE, "run-once", "--metrics-file", "pipe")
    assert stat.S_ISFIFO(os.stat(cli.folder / "pipe").st_mode)


# -- what people's editors leave ---------------------------------------------------------------

def test_every_file_that_people_edit_may_begin_with_a_byte_order_mark(cli):
    tokens = cli.file("tokens", BOM + f"# ours\nvera:viewer:{sha256('x')}\n".encode())
    os.chmod(tokens, 0o600)
    config = cli.file("conf", BOM + b"API_TOKENS_FILE=tokens\nMTLS_ENABLED=0\n")
    assert len(rc.Tokens(tokens).load()) == 1
    cli.ok("--config", config, "token", "add", "two", "--role", "viewer")
    assert [entry[0] for entry in rc.Tokens(tokens).load()] == ["vera", "two"]
    cli.ok("node", "import", cli.file("lines", BOM + b"edge-1 10.0.0.1\n"))
    cli.ok("node", "import", cli.file("nodes.json", BOM + b'[{"name":"edge-2","mainIp":"10.0.0.2"}]'))
    cli.ok("create", "--payload", cli.file("payload", BOM + b'{"a":1}'))
    assert findings(cli("--config", config, "check", "--json"))["API_TOKENS_FILE"] == (True, "2 tokens")


@pytest.mark.parametrize("name", ["CONTROL_CA", "CONTROL_CERT", "CONTROL_KEY"])
def test_a_byte_order_mark_before_a_certificate_is_told(fleet_cli, name):
    path = Path(fleet_cli.settings[name])
    path.write_bytes(BOM + path.read_bytes())
    assert f"{name} {path} begins with a byte order mark" in fleet_cli.refused(rc.EXIT_USAGE, "node", "ping")


@pytest.mark.parametrize("line", ["AGENT_RETRIES=2 # few", "CONTROL_CA=/etc/ca.crt\t# ours", "LOG_FORMAT= # text",
                                  "CONTROL_CA=\"/etc/ca.crt\" # ours"])
def test_a_comment_behind_a_value_is_told_with_its_line_and_how_to_mend_it(cli, line):
    config = cli.file("conf", f"# settings\n{line}\n")
    assert f"{config}:2: {line.split('=')[0]}: put the comment on a line of its own" in cli.refused(
        rc.EXIT_USAGE, "--config", config, "list")


def test_a_value_in_quotes_or_without_a_space_may_hold_what_begins_a_comment(cli):
    config = cli.file("conf", "CONTROL_CA='/etc/a # b'\nCONTROL_CERT=/etc/a#b\n")
    settings = rc.Settings.load({}, config)
    assert (settings.control_ca, settings.control_cert) == ("/etc/a # b", "/etc/a#b")


# -- paths that are no UTF-8 -------------------------------------------------------------------

@pytest.mark.slow
def test_a_path_may_be_any_bytes(cli):
    odd = os.fsdecode(b"caf\xe9")
    folder = cli.folder / odd
    folder.mkdir()
    payload, nodes = folder / "payload", folder / "nodes"
    payload.write_text('{"a":1}')
    nodes.write_text("edge-1 10.0.0.1\n")
    config = folder / "conf"
    config.write_text("MTLS_ENABLED=0\n")
    cli.settings.update(DATABASE_URL=f"sqlite:///{folder}/r.db", API_TOKENS_FILE=str(folder / "tokens"))
    common = ("--config", str(config))
    cli.ok(*common, "migrate")
    cli.ok(*common, "node", "import", str(nodes))
    cli.ok(*common, "create", "--payload", str(payload))
    cli.ok(*common, "token", "add", "vera", "--role", "viewer")
    assert cli.ok(*common, "--json", "backup", str(folder / "copy.db")).json["file"] == str(folder / "copy.db")
    cli.ok(*common, "backup", str(folder / "copy-2.db"))
    cli("run-once", "--metrics-file", str(folder / "metrics"), *common)
    cli.ok("--db", f"sqlite:///{folder}/r.db", "list")
    assert cli("check", *common).code in (0, rc.EXIT_UNAVAILABLE)  # nobody is at the node's address
    assert {"r.db", "tokens", "copy.db", "copy-2.db", "metrics"} <= set(os.listdir(folder))


def test_the_api_tells_a_path_that_is_no_utf_8(cli):
    folder = cli.folder / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    cli.port = free_port()
    cli.settings.update(DATABASE_URL=f"sqlite:///{folder}/r.db", MTLS_ENABLED="0", HTTP_ADDR=f"127.0.0.1:{cli.port}")
    with serve_process(cli):
        shutil.rmtree(folder)
        with urllib.request.urlopen(f"http://127.0.0.1:{cli.port}/api/v1/health", timeout=60) as answer:
            assert "caf" in json.load(answer)["data"]["database"]["message"]
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{cli.port}/api/v1/releases", timeout=60)
        with caught.value as answer:
            assert (answer.code, json.load(answer)["code"]) == (503, 5002)


def test_a_path_that_is_no_utf_8_and_not_there_is_told_in_one_line(cli):
    odd = os.fsdecode(b"caf\xe9")
    assert "does not exist" in cli.refused(rc.EXIT_UNAVAILABLE, "--db", f"sqlite:///{odd}/r.db", "list")
    assert "can't be read" in cli.refused(rc.EXIT_USAGE, "--config", odd, "list")
    cli.ok("node", "add", "edge-1", "10.0.0.1")
    assert "can't be read" in cli.refused(rc.EXIT_USAGE, "create", "--payload", odd)


@pytest.mark.parametrize("arguments", [("create", "--reason", "caf\udce9"), ("node", "set", "caf\udce9", "--disable"),
                                       ("create", "--label", "a=caf\udce9")])
def test_what_is_stored_must_be_utf_8(cli, arguments):
    cli.ok("node", "add", "edge-1", "10.0.0.1")
    assert "is not UTF-8" in cli.refused(rc.EXIT_USAGE, *arguments)


@pytest.mark.parametrize("name", ["HTTP_ADDR", "AGENT_TLS_SERVER_NAME", "LOG_FORMAT"])
def test_a_setting_that_is_no_path_must_be_utf_8(cli, name):
    cli.settings[name] = "caf\udce9:80"
    assert f"{name}=caf" in cli.refused(rc.EXIT_USAGE, "serve")


def test_an_address_that_is_no_host_name_is_told(cli):
    cli.settings.update(HTTP_ADDR="a..b:80", MTLS_ENABLED="0")
    assert "HTTP_ADDR a..b:80 can't be listened on: " in cli.refused(rc.EXIT_USAGE, "serve")


# -- what is installed -------------------------------------------------------------------------

@pytest.mark.parametrize("name", SERVICES)
def test_the_units_run_the_installed_command_which_takes_modules_from_its_own_folders_alone(name):
    assert unit(name)["Service"]["ExecStart"].split()[0] == "/usr/local/bin/releasectl"
    assert 'echo "$command -I"' in (ROOT / "scripts" / "install.sh").read_text()


def test_isolated_it_takes_no_module_from_its_folder_or_the_environment(tmp_path):
    for name in ("releasectl.py", "schema.sql", "dashboard.html"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "codecs.py").write_text("raise SystemExit('taken from the folder')")
    (tmp_path / "json.py").write_text("raise SystemExit('taken from the folder')")
    done = subprocess.run([sys.executable, "-I", str(tmp_path / "releasectl.py"), "version"], capture_output=True,
                          text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False,
                          timeout=TIMEOUT_S)
    assert (done.returncode, "releasectl" in done.stdout) == (0, True), done.stderr


@pytest.fixture
def clone(tmp_path):
    """A repository of what lies here, committed."""
    if not shutil.which("git"):
        leave_out("git")
    tree = tmp_path / "clone"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "dist", "__pycache__", ".*_cache"))
    for words in (("init", "-q"), ("add", "-A"),
                  ("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "all")):
        subprocess.run(["git", *words], cwd=tree, check=True, env={**os.environ, "HOME": str(tmp_path)})
    return tree


def dist(tree: Path, **environment: str) -> str:
    """Make the archive; return what was said on standard error."""
    done = subprocess.run(["bash", "scripts/dist.sh"], cwd=tree, capture_output=True, text=True, check=True,
                          env={"PATH": os.environ["PATH"], "HOME": str(tree), **environment}, timeout=TIMEOUT_S)
    return done.stderr


def test_dist_packs_what_is_committed_and_lists_it(clone, tmp_path):
    (clone / "releasectl.py").write_text("not this")
    (clone / "docs" / "mine.md").write_text("nor this")
    said = dist(clone)
    assert "not committed, so not as it lies here:  M releasectl.py" in said
    assert "?? docs/mine.md" in said
    archive = clone / "dist" / f"releasectl-{rc.__version__}.tar.gz"
    subprocess.run(["tar", "-xzf", archive, "-C", tmp_path], check=True)
    folder = tmp_path / f"releasectl-{rc.__version__}"
    assert (folder / "releasectl.py").read_bytes() == Path(PROGRAM).read_bytes()
    assert not (folder / "docs" / "mine.md").exists()

    listed = json.loads((folder / "sbom.cdx.json").read_text())
    assert (listed["bomFormat"], listed["metadata"]["component"]["version"]) == ("CycloneDX", rc.__version__)
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in folder.rglob("*") if path.is_file()}
    assert {one["name"]: one["hashes"][0]["content"] for one in listed["components"]} == {
        name: digest for name, digest in found.items() if name not in ("SHA256SUMS", "sbom.cdx.json")}
    assert {one["licenses"][0]["license"]["id"] for one in listed["components"]} == {"MIT"}
    assert (clone / "dist" / f"releasectl-{rc.__version__}.cdx.json").read_bytes() == \
        (folder / "sbom.cdx.json").read_bytes()
    before = archive.read_bytes()
    dist(clone)
    assert archive.read_bytes() == before


def test_dist_is_signed_with_a_key_as_operations_checks_it(clone):
    if not shutil.which("openssl"):
        leave_out("openssl")
    commands = [line.strip().split("    ")[0] for line in (ROOT / "docs" / "OPERATIONS.md").read_text().splitlines()
                if line.startswith("    openssl ")]
    assert [line.split()[1] for line in commands] == ["genpkey", "pkey", "dgst"]
    make, publish, verify = commands
    folder = clone / "dist"
    folder.mkdir()
    for command in (make, publish):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    dist(clone, SIGN_KEY=str(folder / "releasectl.key"))
    assert subprocess.run(verify.split(), cwd=folder, check=True, capture_output=True).stdout == b"Verified OK\n"
    with open(folder / "SHA256SUMS", "a") as file:
        file.write("\n")
    assert subprocess.run(verify.split(), cwd=folder, check=False, capture_output=True).returncode != 0
    dist(clone)
    assert not (folder / "SHA256SUMS.sig").exists()
