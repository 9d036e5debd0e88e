"""The database it stands on: its letters, its password, files that change, servers that hang (issue 13, 1 to 5)."""
from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request

import pytest
from conftest import leave_out
from lab import (
    ADDRESSES,
    DRIVERS,
    ROOT,
    Cli,
    Listener,
    World,
    add_nodes,
    admin,
    answers,
    at_schema,
    beside,
    eventually,
    free_port,
    new_release,
    sql,
)

import releasectl as rc

# Who asks for /readyz with a token: strangers are not told why.
ANYBODY = rc.Request((), {}, {}, "anna")

LETTERS = "Zürich 磁盘已满 \U0001f5c4"


@pytest.fixture
def errors(monkeypatch):
    """Every record of the log from now on that is an error or worse."""
    listener = Listener()
    monkeypatch.setattr(rc.log, "handlers", [listener])
    monkeypatch.setattr(rc.log, "disabled", False)
    listener.setLevel(logging.ERROR)
    return listener.records


@pytest.fixture
def own_postgres(tmp_path):
    """A server of this test alone: its folder and its URL."""
    if not DRIVERS:
        leave_out("a PostgreSQL driver")
    folder, script = f"{tmp_path}/pg", f"{ROOT}/scripts/postgres.sh"
    started = subprocess.run(["bash", script, "start", folder], capture_output=True, text=True, check=False)
    if started.returncode:
        leave_out("PostgreSQL: " + started.stderr.strip())
    yield folder, started.stdout.strip()
    subprocess.run(["bash", script, "remove", folder], check=True)


class Proxy:
    """A way to a server that can be made to carry nothing any more, and tells nobody."""

    def __init__(self, url: str):
        self._to = urllib.parse.urlsplit(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._moves = threading.Event()
        self._moves.set()
        self._socks: list[socket.socket] = [self._listener]
        self.url = url.replace(f":{self._to.port}/", f":{self._listener.getsockname()[1]}/")
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._moves.clear()

    def thaw(self) -> None:
        self._moves.set()

    def close(self) -> None:
        self.thaw()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self._to.hostname, self._to.port or 5432))
                self._socks += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self._moves.wait()
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(new_postgres_url):
    with contextlib.closing(Proxy(new_postgres_url())) as one:
        yield one


def for_processes(cli: Cli, url: str, driver: str = "") -> Cli:
    """Return a command line over a database, with the drivers that this Python has."""
    cli.settings.update(DATABASE_URL=url, MTLS_ENABLED="0", HTTP_ADDR=f"127.0.0.1:{free_port()}",
                        **({"RELEASECTL_PG_DRIVER": driver} if driver else {}))
    return cli


# -- 1: the letters that were given ------------------------------------------------------------

@pytest.mark.parametrize("place", ["environment", "database"])
def test_a_client_encoding_from_outside_changes_no_letter(new_postgres_url, open_store, monkeypatch, driver, place):
    url = new_postgres_url()
    if place == "database":
        admin(url, f"ALTER DATABASE {url.rpartition('/')[2]} SET client_encoding = 'LATIN1'")
    else:
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    store = open_store(url)
    add_nodes(store, 1)
    release = new_release(store, reason=LETTERS, payload={"title": LETTERS})
    with store.database.transaction() as tx:
        assert tx.row("SELECT char_length(reason), octet_length(reason), reason FROM release_tasks") \
            == (len(LETTERS), len(LETTERS.encode()), LETTERS)
    assert store.releases.get(release.id).reason == LETTERS


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_is_not_utf_8_is_refused_with_the_mend(postgres_server, cli, quick, driver, encoding):
    name = f"test_{os.getpid()}_{encoding}_{driver}".lower()
    admin(postgres_server, f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    try:
        for_processes(cli, f"{postgres_server.rsplit('/', 1)[0]}/{name}", driver)
        quick.settings.update(cli.settings)
        for runs, command in ((quick, "migrate"), (cli, "serve"), (quick, "run-once")):
            line = runs.refused(rc.EXIT_UNAVAILABLE, command)
            assert f"stores text as {encoding}" in line
            assert "ENCODING 'UTF8' TEMPLATE template0" in line
        assert f"stores text as {encoding}" in quick("check").out
    finally:
        admin(postgres_server, f"DROP DATABASE {name}")


@pytest.mark.parametrize("fields", [{"reason": "a\0b"}, {"reason": "a\ud800b"}, {"version": 2**70}], ids=str)
def test_a_value_that_cant_be_stored_is_refused_and_the_database_is_there(new_postgres_url, open_store, driver, fields):
    store = open_store(new_postgres_url())
    add_nodes(store, 1)
    column, value = next(iter(fields.items()))
    with pytest.raises(rc.AppError) as caught, store.database.transaction(write=True) as tx:
        tx.execute(f"INSERT INTO release_tasks ({'version, ' if column != 'version' else ''}{column}) "
                   f"VALUES ({'7, ' if column != 'version' else ''}?)", value)
    assert not isinstance(caught.value, rc.DatabaseError)
    assert (caught.value.code, caught.value.http_status) == (2003, 400)
    assert new_release(store).version == 1
    assert "releasectl_database_errors_total 0" in store.database.metrics.text({})


@pytest.mark.parametrize("value", ["a\ud800b", 2**70], ids=["surrogate", "number"])
def test_sqlite_refuses_such_a_value_too(sqlite_url, open_store, value):
    store = open_store(sqlite_url)
    with pytest.raises(rc.AppError) as caught, store.database.transaction(write=True) as tx:
        tx.execute("INSERT INTO release_tasks (version, reason) VALUES (7, ?)", value)
    assert caught.value.code == 2003
    assert "releasectl_database_errors_total 0" in store.database.metrics.text({})


def test_an_agents_words_that_cant_be_stored_are_told_once_and_the_release_ends(
        new_postgres_url, open_store, certs, new_fleet, new_executor, errors, driver):
    url = new_postgres_url()
    world = World(open_store(url), url, certs, new_fleet, new_executor).nodes(1)
    # as a database of another encoding would
    admin(url, """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.error_msg ~ '[^[:ascii:]]' THEN RAISE 'no such letter' USING ERRCODE = '22P05'; END IF;
        RETURN NEW; END $$""")
    for table in ("release_tasks", "release_task_nodes"):
        admin(url, f"CREATE TRIGGER refuse BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse()")
    world.agent(1).set(outcome="failed", message="磁盘已满")
    new_release(world.store)
    executor = world.executor()
    with beside(executor.drain):
        eventually(lambda: world.store.releases.get(1).status == "failed", 8)
    assert len([r for r in errors if "no such letter" in r.getMessage()]) == 1
    assert r"\u78c1\u76d8\u5df2\u6ee1" in world.store.releases.with_nodes(1)[1][0].error_msg


# -- 2: the password ---------------------------------------------------------------------------

SECRET = "S3cr3t"
# As they stand in a URL that is taken, and what they are.
TAKEN = [("a[S3cr3t]b", "a[S3cr3t]b"), ("a?S3cr3t#b", "a?S3cr3t#b"), ("a:S3cr3t", "a:S3cr3t"),
         ("a%2FS3cr3t%40%25", "a/S3cr3t@%"), ("%5BS3cr3t", "[S3cr3t")]
REFUSED = ["a/S3cr3t", "a@S3cr3t", "S3cr3t%zz", "S3cr3t%00", "S3cr3t%", "a/b?S3cr3t", "//S3cr3t", "S3cr3t b",
           "%FFS3cr3t", "a\tS3cr3t", "é/S3cr3t"]


@pytest.mark.parametrize(("written", "meant"), TAKEN)
def test_every_driver_reads_the_same_password(new_postgres_url, open_store, driver, written, meant):
    url = new_postgres_url().replace("//releasectl@", f"//releasectl:{written}@")
    assert rc.parse_postgres_url(url).password == meant
    store = open_store(url)
    assert store.nodes.page().total == 0
    assert SECRET not in str(store.database)


@pytest.mark.parametrize("written", [written for written, _ in TAKEN])
def test_the_password_is_in_no_error_and_no_stack_trace_while_the_server_is_away(driver, written):
    database = rc.Database(f"postgresql://app:{written}@127.0.0.1:{free_port()}/d")
    with pytest.raises(rc.DatabaseError) as caught:
        database.schema_version()
    shown = "".join(traceback.format_exception(caught.type, caught.value, caught.tb)) + str(database)
    assert SECRET not in shown
    assert "app:***@127.0.0.1" in caught.value.message


def test_a_server_that_closes_the_connection_is_told_so_by_every_driver(driver):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def close_all() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near, _ = listener.accept()
                    near.recv(65536)  # else it is a reset
                    near.close()

        threading.Thread(target=close_all, daemon=True).start()
        database = rc.Database(f"postgresql://app@127.0.0.1:{listener.getsockname()[1]}/d")
        with pytest.raises(rc.DatabaseError, match="closed the connection"):
            database.schema_version()
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("written", REFUSED)
def test_a_url_that_does_not_read_back_is_refused_without_its_password(driver, written):
    url = f"postgresql://app:{written}@host/name"
    with pytest.raises(rc.ConfigError) as caught:
        rc.Settings.load({"DATABASE_URL": url})
    assert "percent-encode" in caught.value.message
    with pytest.raises(rc.ConfigError) as other:
        rc.Database(url)
    for error in (caught, other):
        assert SECRET not in "".join(traceback.format_exception(error.type, error.value, None))
    assert SECRET not in rc.safe_url(url)


@pytest.mark.parametrize("text", [
    "postgresql://app:S3cr3t", "postgresql://app:S3cr3t/name", "postgresql://a/pp:S3cr3t@host/name",
    "postgresql://app:a@S3cr3t@host", "unknown option --dbb=postgresql://app:S3cr3t[@h/d",
    "host=h PASSWORD = 'a\\'S3cr3t'",
    "postgresql://h/d?password=S3cr3t", "postgresql://h/d?sslpassword=S3cr3t&x=1", "postgresql://[S3cr3t:S3cr3t@h/d",
    "postgresql://app:S3cr3t\n@h/d", "host=h password='S3cr3t", "postgresql//app:S3cr3t@h/d",
    "postgresql://h/d?password=a&S3cr3t", "postgresql://h/d?password=a S3cr3t&sslmode=require",
    "host=h password=a&S3cr3t dbname=d", "host=h password=a S3cr3t"])
def test_a_text_in_which_a_password_may_be_is_masked_whatever_it_is(text):
    assert "S3cr3t@" not in rc.safe_url(text)
    assert SECRET not in rc.safe_url(text).replace("//[S3cr3t", "")


def test_what_a_driver_says_is_masked_before_it_is_cut_to_a_line(driver):
    engine = rc.PostgresEngine("postgresql://app:S3cr3t%20%20Word@h/d")
    assert "S3cr3t" not in engine.explain(Exception("bad password S3cr3t  Word"))
    assert "S3cr3t" not in engine.explain(Exception("x" * (rc.MAX_MESSAGE_CHARS - 10) + "S3cr3t  Word"))


@pytest.mark.parametrize(("password", "said", "masked"), [
    ("a", "no password a for database a at host a.b", "no password *** for database *** at host ***.b"),
    ("on", "connection of a: on", "connection of a: ***"), ("%25", "25 %", "25 ***"),
    ("S3cr3t", "xS3cr3tx", "x***x")])
def test_a_short_password_masks_no_part_of_a_word(driver, password, said, masked):
    engine = rc.PostgresEngine(f"postgresql://app:{password}@h/d")
    assert engine.explain(Exception(said)).endswith(f": {masked}")


def test_a_running_service_tells_nobody_its_password(cli, proxy, driver):
    for_processes(cli, proxy.url.replace("//releasectl@", "//releasectl:a[S3cr3t]W0rd@"), driver)
    port = int(cli.settings["HTTP_ADDR"].rpartition(":")[2])
    serve = cli.start("serve")
    try:
        eventually(lambda: answers(port))
        proxy.close()
        eventually(lambda: not answers(port))
        time.sleep(1)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=60)
        body = refused.value.read().decode()
        assert '"code":5002' in body
        serve.terminate()
    finally:
        threading.Timer(15, serve.kill).start()
        out, err = serve.communicate()
    for text in (out, err, body):
        assert "S3cr3t" not in text
        assert "Traceback" not in text


def test_a_file_may_hold_the_url(tmp_path):
    path = tmp_path / "url"
    path.write_text("\ufeffpostgresql://app:S3cr3t@h/d\n", encoding="utf-8")
    path.chmod(0o640)
    config = tmp_path / "conf"
    config.write_text("DATABASE_URL=sqlite:///config.db\n")
    settings = rc.Settings.load({"DATABASE_URL_FILE": str(path)}, str(config))
    assert settings.database_url == "postgresql://app:S3cr3t@h/d"
    assert rc.Settings.load({"DATABASE_URL_FILE": str(path)}, "", "sqlite:///x.db").database_url == "sqlite:///x.db"
    config.write_text(f"DATABASE_URL_FILE={path}\n")
    assert rc.Settings.load({"DATABASE_URL": "sqlite:///e.db"}, str(config)).database_url == "sqlite:///e.db"


@pytest.mark.parametrize(("content", "mode", "said"), [
    ("", 0o600, "must hold one line"), ("postgresql://app:S3cr3t@h/d\nmore", 0o600, "must hold one line"),
    ("postgresql://app:S3cr3t@h/d", 0o644, "is open to others"), ("mysql://app:S3cr3t@h/d", 0o600, "can't be used"),
    ("S3cr3t", 0o600, "what it holds can't be used"), ("3f9a:S3cr3t", 0o600, "what it holds can't be used"),
    (b"\xff\xfe", 0o600, "not UTF-8"), (None, 0, "no such file")])
def test_a_file_that_holds_no_url_is_refused_without_a_part_of_it(tmp_path, content, mode, said):
    path = tmp_path / "url"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(mode)
    with pytest.raises(rc.ConfigError, match=said) as caught:
        rc.Settings.load({"DATABASE_URL_FILE": str(path)})
    assert SECRET not in caught.value.message
    with pytest.raises(rc.ConfigError, match="both set"):
        rc.Settings.load({"DATABASE_URL_FILE": str(path), "DATABASE_URL": "sqlite:///x.db"})


# -- 3: files under its feet -------------------------------------------------------------------

def remove_side_files(path: str, replaced: bool) -> None:
    for end in ("-wal", "-shm"):
        os.unlink(path + end)
        if replaced:
            with open(path + end, "wb"):
                pass


@pytest.mark.parametrize("what", ["removed", "replaced", "shm only"])
def test_a_wal_that_is_taken_away_is_noticed_and_nothing_acknowledged_is_lost(
        sqlite_url, open_store, cli, errors, what):
    store, path = open_store(sqlite_url), sqlite_url[len("sqlite:///"):]
    add_nodes(store, 1)
    new_release(store, reason="before")
    if what == "shm only":
        os.unlink(path + "-shm")
    else:
        remove_side_files(path, what == "replaced")
    if what != "replaced":
        # who comes new can't see what is in the files that are gone
        assert "works with it" in for_processes(cli, sqlite_url).refused(rc.EXIT_UNAVAILABLE, "create")
    new_release(store, reason="after")
    assert [r for r in errors if "was removed or replaced while this process worked with it" in r.getMessage()]
    assert [r["reason"] for r in json.loads(for_processes(cli, sqlite_url).ok("list", "--json").out)["items"]] \
        == ["after", "before"]


def test_what_others_wrote_into_a_new_wal_is_kept(sqlite_url, open_store, errors):
    store, path = open_store(sqlite_url), sqlite_url[len("sqlite:///"):]
    add_nodes(store, 1)
    remove_side_files(path, False)
    subprocess.run([sys.executable, "-c", "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
                    "c.execute(\"CREATE TABLE foreign_one (id INTEGER)\"); c.commit(); os._exit(0)", path], check=True)
    assert os.path.getsize(path + "-wal")
    assert store.nodes.page().total == 1
    [said] = [r.getMessage() for r in errors]
    kept = said.partition("is kept as ")[2].partition(";")[0]
    assert os.path.getsize(kept)


def test_the_end_of_a_process_waits_for_a_read_under_way_and_leaves_one_file(sqlite_url, open_store):
    """Whoever copies the database of a service that is stopped has all of it."""
    store, path = open_store(sqlite_url), sqlite_url[len("sqlite:///"):]
    begun, may_end = threading.Event(), threading.Event()

    def read() -> None:
        with store.database.transaction() as tx:
            tx.value("SELECT COUNT(*) FROM nodes")
            begun.set()
            assert may_end.wait(60)

    with beside(read):
        assert begun.wait(60)
        assert os.path.exists(path + "-wal")
        threading.Timer(0.3, may_end.set).start()
        store.database.close()
        assert may_end.is_set()
        assert not os.path.exists(path + "-wal")


def test_a_read_that_outlives_the_wait_tidies_up_when_it_ends_and_the_log_says_so(
        sqlite_url, open_store, monkeypatch, caplog):
    monkeypatch.setattr(rc, "CLOSE_S", 0.01)
    store, path = open_store(sqlite_url), sqlite_url[len("sqlite:///"):]
    with store.database.transaction() as tx:
        tx.value("SELECT COUNT(*) FROM nodes")
        store.database.close()
        assert os.path.exists(path + "-wal")
        assert f"{path} is still in use after 0.01 s: a copy needs the files beside it, too" in caplog.text
    assert not os.path.exists(path + "-wal")


def test_transactions_at_once_all_go_over_to_the_new_files(sqlite_url, open_store, errors):
    store, path = open_store(sqlite_url), sqlite_url[len("sqlite:///"):]
    stop, failures = threading.Event(), []

    def work(number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            try:
                store.nodes.add(f"n-{number}-{count}", f"10.{number}.{count // 250}.{count % 250}")
                store.nodes.page()
            except rc.AppError as error:
                failures.append(error)
            time.sleep(0.01)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: store.nodes.page().total > 10)
    for _ in range(3):
        with contextlib.suppress(FileNotFoundError):
            remove_side_files(path, False)
        seen = store.nodes.page().total
        eventually(lambda seen=seen: store.nodes.page().total > seen + 5)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failures == []
    with store.database.transaction() as tx:
        assert tx.value("PRAGMA integrity_check") == "ok"


def test_a_second_name_of_the_file_is_refused_also_while_running(sqlite_url, open_store):
    store, path = open_store(sqlite_url), sqlite_url[len("sqlite:///"):]
    os.link(path, path + ".second")
    with pytest.raises(rc.DatabaseError, match="second name"):
        store.nodes.page()
    os.unlink(path + ".second")
    assert store.nodes.page().total == 0


@pytest.mark.parametrize("url", ["sqlite:///:memory:", "sqlite:///file::memory:?cache=shared"])
def test_a_database_in_memory_is_refused(url):
    with pytest.raises(rc.ConfigError, match="in memory"):
        rc.Settings.load({"DATABASE_URL": url})


def test_what_an_extension_put_there_is_no_table_of_another_program(new_postgres_url):
    url = new_postgres_url()
    # made members of an extension, as those of pg_stat_statements and PostGIS are; plpgsql is always there
    for statement in ("CREATE VIEW pg_stat_statements AS SELECT 1 AS calls",
                      "CREATE TABLE spatial_ref_sys (srid INTEGER)",
                      "ALTER EXTENSION plpgsql ADD VIEW pg_stat_statements",
                      "ALTER EXTENSION plpgsql ADD TABLE spatial_ref_sys"):
        admin(url, statement)
    database = rc.Database(url)
    assert database.migrate()[0] == 0
    database.close()


@pytest.mark.parametrize("content", ["", "-- nothing\n", "-- step 1: cut\n"])
def test_an_empty_schema_is_refused(tmp_path, monkeypatch, sqlite_url, content):
    (tmp_path / "schema.sql").write_text(content)
    monkeypatch.setattr(rc, "SCHEMA_FILE", tmp_path / "schema.sql")
    rc.schema_steps.cache_clear()
    try:
        with pytest.raises(rc.ConfigError, match="empty or cut off"):
            rc.Database(sqlite_url).migrate()
    finally:
        rc.schema_steps.cache_clear()


# -- 4: a server that hangs --------------------------------------------------------------------

def test_a_transaction_on_a_server_that_hangs_is_cut_off(proxy, open_store, driver):
    store = open_store(proxy.url)
    began = time.monotonic()
    proxy.freeze()
    with pytest.raises(rc.DatabaseError, match="no answer for 1 s, so the connection was cut: the server hangs"), \
            store.database.transaction(limit_s=1.0) as tx:
        tx.value("SELECT 1")
    assert time.monotonic() - began < 30
    proxy.thaw()
    assert store.nodes.page().total == 0


@pytest.mark.slow
def test_a_commit_that_waits_for_a_standby_is_cut_off_and_told_to_who_waits(
        own_postgres, open_store, monkeypatch, driver):
    url = own_postgres[1]
    store = open_store(url)
    admin(url, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    admin(url, "SELECT pg_reload_conf()")
    eventually(lambda: setting_of(url, "synchronous_standby_names") == "nobody")
    waits = threading.Thread(target=lambda: pytest.raises(rc.DatabaseError, write_slowly, store, 8.0))
    waits.start()
    eventually(lambda: waits_for_standby(url))
    monkeypatch.setattr(rc.PostgresEngine, "begin_write",
                        rc.PostgresEngine.begin_write.replace("lock_timeout = '10s'", "lock_timeout = '200ms'"))
    with pytest.raises(rc.DatabaseError) as caught:
        store.state.check_write()
    assert re.search(r"releasectl \(pid .*\) holds the lock, whose commit waits for a synchronous standby",
                     caught.value.message)
    waits.join(60)
    assert not waits.is_alive()


def write_slowly(store: rc.Store, limit_s: float) -> None:
    with store.database.transaction(write=True, limit_s=limit_s) as tx:
        tx.execute("UPDATE health_probe SET at = 'x'")


def setting_of(url: str, name: str) -> str:
    with contextlib.closing(rc.PostgresEngine(url).connect(False)) as connection:
        cursor = connection.cursor()
        cursor.execute(f"SHOW {name}")
        return cursor.fetchone()[0]


def waits_for_standby(url: str) -> bool:
    with contextlib.closing(rc.PostgresEngine(url).connect(False)) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        return cursor.fetchone()[0] > 0


@pytest.mark.slow
def test_sigterm_ends_a_service_whose_server_hangs(cli, proxy, driver):
    for_processes(cli, proxy.url, driver)
    port = int(cli.settings["HTTP_ADDR"].rpartition(":")[2])
    serve = cli.start("serve")
    try:
        eventually(lambda: answers(port))
        proxy.freeze()
        time.sleep(1)  # it looks five times a second, and so hangs by now
        began = time.monotonic()
        serve.terminate()
        serve.communicate(timeout=60)
        assert time.monotonic() - began < rc.MAX_TRANSACTION_S  # when its last transaction would be cut off anyway
    finally:
        serve.kill()
        serve.communicate()


def api_whose_server_hangs(proxy, open_store, monkeypatch) -> rc.Api:
    """Return an API that was ready, and looks again when it is asked."""
    monkeypatch.setattr(rc, "MAX_READY_CHECK_S", 0.5)
    api = rc.Api(open_store(proxy.url), rc.Metrics())
    assert api.ready(ANYBODY).status == 200
    time.sleep(rc.READY_CHECK_EVERY_S + 0.1)
    proxy.freeze()
    return api


def test_readyz_says_when_the_look_under_way_is_old(proxy, open_store, monkeypatch, driver):
    api = api_whose_server_hangs(proxy, open_store, monkeypatch)
    first = threading.Thread(target=is_ready, args=(api,), daemon=True)
    first.start()
    time.sleep(0.8)
    with pytest.raises(rc.DatabaseError, match="has not answered for"):
        api.ready(ANYBODY)
    proxy.thaw()
    first.join(60)
    eventually(lambda: is_ready(api))


def test_readyz_is_answered_in_time_to_who_asks_first_too(proxy, open_store, monkeypatch, driver):
    api = api_whose_server_hangs(proxy, open_store, monkeypatch)
    since = time.monotonic()
    with pytest.raises(rc.DatabaseError, match="has not answered for"):
        api.ready(ANYBODY)
    assert time.monotonic() - since < 3
    proxy.thaw()
    eventually(lambda: is_ready(api))


def is_ready(api: rc.Api) -> bool:
    try:
        return api.ready(ANYBODY).status == 200
    except rc.DatabaseError:
        return False


def test_readyz_says_when_a_thread_hangs(sqlite_url, open_store):
    api = rc.Api(open_store(sqlite_url), rc.Metrics(), hung=lambda: "the lease thread hangs")
    with pytest.raises(rc.DatabaseError, match="the lease thread hangs"):
        api.ready(ANYBODY)


# -- 5: poolers, standbys, others --------------------------------------------------------------

HOSTILE = ("SET default_transaction_read_only = on", "SET synchronous_commit = off", "SET statement_timeout = 0",
           "SET lock_timeout = 0", "SET idle_in_transaction_session_timeout = 0",
           "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE")
NEEDED = {"transaction_read_only": "off", "synchronous_commit": "on", "statement_timeout": "30s", "lock_timeout": "10s",
          "idle_in_transaction_session_timeout": "5s", "transaction_isolation": "read committed"}


def test_what_another_program_set_on_a_pooled_connection_is_not_ours_and_ours_not_its(
        new_postgres_url, open_store, driver):
    store = open_store(new_postgres_url())
    store.nodes.page()
    [connection] = store.database._idle
    cursor = connection.cursor()
    cursor.execute("SHOW statement_timeout")
    assert cursor.fetchone()[0] == "0"  # nothing of ours is left
    for statement in HOSTILE:
        cursor.execute(statement)
    with store.database.transaction(write=True) as tx:
        assert {name: tx.value(f"SHOW {name}") for name in NEEDED} == NEEDED
    with store.database.transaction() as tx:
        assert tx.value("SHOW transaction_isolation") == "repeatable read"
        assert tx.value("SHOW transaction_read_only") == "on"
    store.state.check_write()
    assert [connection] == store.database._idle


def test_no_statement_is_prepared_under_a_name(new_postgres_url, open_store, driver):
    store = open_store(new_postgres_url())
    for _ in range(20):
        store.state.check_write()
        store.nodes.page()
    with store.database.transaction() as tx:
        assert tx.value("SELECT COUNT(*) FROM pg_prepared_statements") == 0


def test_a_connection_says_whose_it_is(new_postgres_url, open_store, driver):
    with open_store(new_postgres_url()).database.transaction() as tx:
        assert tx.value("SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()") == "releasectl"


def test_a_process_has_at_most_16_connections_and_the_rest_waits_in_turn(new_postgres_url, open_store, driver):
    store, most, done = open_store(new_postgres_url()), [], []

    def read(number: int) -> None:
        with store.database.transaction() as tx:
            most.append(tx.value("SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() "
                                 "AND backend_type = 'client backend'"))
            tx.rows("SELECT pg_sleep(0.1)")
        done.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == list(range(40))
    assert max(most) <= rc.MAX_DB_CONNECTIONS


def test_who_waits_for_a_connection_gets_it_in_turn_or_is_told():
    places, order = rc.FairSemaphore(1), []
    assert places.acquire(0)
    assert not places.acquire(0.01)
    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=lambda number=number: places.acquire(5) and order.append(number)))
        threads[-1].start()
        eventually(lambda: len(places._queue) == len(threads))
    for number in range(5):
        places.release()
        eventually(lambda number=number: len(order) == number + 1)
    assert order == list(range(5))


def test_pg8000_with_several_hosts_is_a_wrong_setting(cli):
    if "pg8000" not in DRIVERS:
        leave_out("pg8000")
    for_processes(cli, "postgresql://app:S3cr3t@127.0.0.1:1,127.0.0.1:2/d", "pg8000")
    line = cli.refused(rc.EXIT_USAGE, "list")
    assert "pg8000 takes one host only: install psycopg" in line


@pytest.mark.parametrize(("version", "name"), [
    ("CockroachDB CCL v23.1.11 (x86_64-pc-linux-gnu)", "CockroachDB"),
    ("PostgreSQL 11.2-YB-2.18.1.0-b0 on x86_64-pc-linux-gnu", "YugabyteDB"),
    ("PostgreSQL 8.0.2 on i686, Redshift 1.0.59", "Redshift"),
    ("PostgreSQL 13.14.0-RisingWave-2.0.1", "RisingWave"),
    ("CrateDB 5.5.1", "CrateDB"), ("H2 2.2", "H2 2.2")])
def test_a_server_whose_locks_are_none_is_refused_by_name(driver, version, name):
    with pytest.raises(rc.DatabaseError, match=f"is {name}, whose advisory locks are not those of PostgreSQL"):
        rc.PostgresEngine("postgresql://h/d").refuse_server(version, "UTF8")


def test_an_old_server_is_refused_and_a_vendors_build_is_not(driver):
    engine = rc.PostgresEngine("postgresql://h/d")
    engine.refuse_server("PostgreSQL 13.4 (EnterpriseDB Advanced Server 13.4.8) on x86_64", "UTF8")
    engine.refuse_server("PostgreSQL 17beta1 on x86_64", "UTF8")
    with pytest.raises(rc.DatabaseError, match="PostgreSQL 12 is too old"):
        engine.refuse_server("PostgreSQL 12.20 (Debian) on x86_64", "UTF8")


@pytest.mark.slow
def test_a_standby_is_told_as_one_by_serve_run_once_and_check_and_may_be_read(own_postgres, cli, tmp_path):
    folder, url = own_postgres
    for_processes(cli, url).ok("migrate")
    script = f"{ROOT}/scripts/postgres.sh"
    subprocess.run(["bash", script, "stop", folder], check=True)
    with open(f"{folder}/cluster") as file:
        open(f"{file.read().strip()}/data/standby.signal", "w").close()
    subprocess.run(["bash", script, "start", folder], check=True, stdout=subprocess.DEVNULL)
    for name in DRIVERS:
        cli.settings["RELEASECTL_PG_DRIVER"] = name
        for command in ("serve", "run-once", "migrate"):
            line = cli.refused(rc.EXIT_UNAVAILABLE, command)
            assert "is a standby" in line
            assert "put all hosts into DATABASE_URL and add target_session_attrs=read-write" in line
        assert "is a standby" in cli("check").out
        cli.ok("list")


@pytest.mark.parametrize(("option", "libpq", "pg8000"), [
    ("", "TLS if the server offers it, whoever answers", "plain text"),
    ("?sslmode=disable", "plain text", "plain text"),
    ("?sslmode=require", "TLS, whoever answers", "TLS, whoever answers"),
    ("?sslmode=verify-full", "TLS, verified", "TLS, verified")])
def test_check_says_what_a_driver_does_about_tls(driver, option, libpq, pg8000):
    said = rc.PostgresEngine(f"postgresql://h/d{option}").tls_text()
    assert (pg8000 if driver == "pg8000" else libpq) in said
    assert driver in said


def test_check_shows_it(new_postgres_url, cli, driver):
    said = for_processes(cli, new_postgres_url(), driver)
    said.ok("migrate")
    assert ("plain text" if driver == "pg8000" else "TLS if the server offers it") in said("check").out


# -- texts that are not UTF-8: SQLite takes them by hand --------------------------------------------------------

NOT_UTF8 = "CAST(x'7b2261223a22ff227d' AS TEXT)"  # {"a":"\xff"}


@pytest.mark.parametrize("column", [
    "release_tasks.payload", "release_tasks.strategy", "release_tasks.reason", "release_tasks.target", "nodes.labels",
    "nodes.main_ip", "release_task_nodes.node_name", "release_events.at"])
def test_a_text_that_is_not_utf_8_fails_no_reading_and_no_executor(filled_quick, column):
    cli, (table, name) = filled_quick, column.split(".")
    sql(cli.store, f"UPDATE {table} SET {name} = {NOT_UTF8}")
    for words in ("status 1", "list", "events 1", "node list", "watch 1", "audit", "payload 1", "diff 2", "prune "
                  "--older-than 1d --dry-run", "create --plan", "status 1 --json", "list --json", "node list --json"):
        done = cli(*words.split())
        assert done.code in (rc.EXIT_DONE, rc.EXIT_NOT_SUCCESS, rc.EXIT_STATE), (words, done)
        assert "Traceback" not in done.err
        assert set("\x1a\udcff").isdisjoint(done.out + done.err)
    cli.settings.update(MTLS_ENABLED="0", AGENT_RETRIES="0", AGENT_CONNECT_TIMEOUT_SEC="1")
    assert cli("run-once", "--drain").code == rc.EXIT_NOT_SUCCESS
    assert cli.store.releases.get(3).status == "failed"


def test_a_payload_or_strategy_that_is_not_utf_8_can_not_be_used(filled_quick):
    for column in ("payload", "strategy"):
        number = new_release(filled_quick.store).id
        sql(filled_quick.store, f"UPDATE release_tasks SET {column} = {NOT_UTF8} WHERE id = ?", number)
    filled_quick.settings.update(MTLS_ENABLED="0", AGENT_RETRIES="0")
    assert filled_quick("run-once", "--drain").code == rc.EXIT_NOT_SUCCESS
    for number in (4, 5):
        release = filled_quick.store.releases.get(number)
        assert (release.status, release.error_msg[:35]) == ("failed", "payload or strategy can't be used: ")
    assert "the payload of release 4 can't be used" in filled_quick.refused(3, "payload", 4)


def test_one_payload_that_is_not_utf_8_stops_no_migration(sqlite_url, open_store):
    with at_schema(sqlite_url, rc.DIGEST_SCHEMA - 1) as old:
        sql(old, f"INSERT INTO release_tasks (version, payload) VALUES (1, {NOT_UTF8}), (2, '{{}}')")
    store = open_store(sqlite_url)
    assert [store.releases.get(number).stored_sha256 for number in (1, 2)] == ["", rc.digest_of({})]


# -- what is done is done, whatever can be read of it then -------------------------------------------

@pytest.mark.parametrize(("words", "said"), [
    (("node", "add", "edge-3", "10.0.0.3"), "node 3: edge-3 at 10.0.0.3:8443"),
    (("node", "set", "edge-*", "--label", "region=eu"), "unknown"),
    (("node", "import", "nodes", "--update"), "nodes added: 1, changed: 1, as they were: 1")])
def test_nodes_that_are_written_are_no_error_where_what_they_run_can_not_be_read(
        store, database_url, quick, words, said):
    quick.settings["DATABASE_URL"] = database_url
    add_nodes(store, 2)
    quick.file("nodes", f"edge-1 {ADDRESSES[0]}\nedge-2 {ADDRESSES[1]} 9000\nedge-4 10.0.0.4\n")
    sql(store, "ALTER TABLE database_state RENAME TO elsewhere")
    before = [node.updated_at for node in store.nodes.page().items]
    result = quick.ok(*words, "-v")
    assert said in result.out
    assert "can't be read" in result.err
    assert [node.updated_at for node in store.nodes.page().items] != before


def test_a_node_that_is_written_is_no_503_where_what_it_runs_can_not_be_read(store, client):
    sql(store, "ALTER TABLE database_state RENAME TO elsewhere")
    made = client.ok("POST", "/api/v1/nodes", {"name": "edge-1", "mainIp": "10.0.0.1"}, status=201)
    assert (made["runs"], made["drift"]) == (None, "unknown")
    changed = client.ok("PATCH", f"/api/v1/nodes/{made['id']}", {"status": "offline"})
    assert (changed["status"], changed["drift"]) == ("offline", "unknown")
    assert client("GET", f"/api/v1/nodes/{made['id']}").status == 503  # nothing was done


def test_a_release_that_is_created_is_no_error_where_what_it_waits_for_can_not_be_read(store, database_url, quick):
    quick.settings["DATABASE_URL"] = database_url
    add_nodes(store, 1)
    sql(store, "ALTER TABLE executors RENAME COLUMN seen_at TO elsewhere")
    assert quick.ok("create").out.splitlines() == [
        "release 1 (v1): created, 1 node in batches of 1", "follow: releasectl watch 1"]


def test_a_release_that_is_created_is_followed_where_the_database_is_out_of_reach_just_then(
        store, database_url, quick, monkeypatch):
    quick.settings["DATABASE_URL"] = database_url
    add_nodes(store, 1)
    is_away = iter([False])

    def look(*_):
        if next(is_away, True):
            raise rc.DatabaseError("out of reach")

    monkeypatch.setattr(rc.Database, "require_schema", look)
    result = quick("create", "--wait", "--timeout", "1")
    assert result.code == 75
    assert "release 1 (v1): created" in result.err
