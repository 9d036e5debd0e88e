"""The configuration: every setting's default, what it takes, what it refuses, and who wins (contract section 6)."""
from __future__ import annotations

import pytest

import releasectl as rc

DEFAULTS = {
    "DATABASE_URL": "sqlite:///releasectl.db", "DATABASE_URL_FILE": "",
    "HTTP_ADDR": ("127.0.0.1", 8080), "HTTP_PLAIN": False, "HTTP_CERT": "", "HTTP_KEY": "",
    "HTTP_CLIENT_CA": "", "HTTP_MAX_CONNECTIONS": 128, "HTTP_MAX_CONNECTIONS_PER_ADDRESS": 32,
    "HTTP_MAX_BODY_BYTES": 1 << 20, "API_TOKENS_FILE": "", "RELEASE_EXECUTOR_ENABLED": True,
    "RELEASE_EXECUTOR_INTERVAL_SEC": 2.0, "MTLS_ENABLED": True, "CONTROL_CERT": "", "CONTROL_KEY": "",
    "CONTROL_CA": "", "AGENT_TLS_SERVER_NAME": "", "AGENT_CONCURRENCY": 64, "AGENT_CONNECT_TIMEOUT_SEC": 15.0,
    "AGENT_REQUEST_TIMEOUT_SEC": 60.0, "AGENT_RETRIES": 2, "NODE_DEADLINE_SEC": 600.0, "CLAIM_TTL_SEC": 30.0,
    "APPROVALS": False, "PUBLIC_URL": "", "NOTIFY_COMMAND": (), "NOTIFY_URL": "", "NOTIFY_SECRET_FILE": "",
    "NOTIFY_CA": "", "NOTIFY_ON": ("failed", "partial", "paused", "stuck"), "LOG_FORMAT": "text",
    "LOG_LEVEL": "info",
}
# Taken as they are here; what a file holds is judged where it is used.
TEXTS = ("HTTP_CERT", "HTTP_KEY", "HTTP_CLIENT_CA", "API_TOKENS_FILE", "CONTROL_CERT", "CONTROL_KEY", "CONTROL_CA",
         "AGENT_TLS_SERVER_NAME", "NOTIFY_SECRET_FILE", "NOTIFY_CA")
GOOD = [
    ("DATABASE_URL", "sqlite:////var/lib/r.db", "sqlite:////var/lib/r.db"),
    ("DATABASE_URL", "postgresql://u:p@h:5432/d", "postgresql://u:p@h:5432/d"),
    ("DATABASE_URL", "postgres://h/d", "postgres://h/d"),
    ("HTTP_ADDR", "0.0.0.0:443", ("0.0.0.0", 443)),
    ("HTTP_ADDR", "[::1]:0", ("::1", 0)),
    ("HTTP_PLAIN", "1", True),
    ("HTTP_ADDR", "localhost:65535", ("localhost", 65535)),
    ("HTTP_ADDR", ":8080", ("0.0.0.0", 8080)),
    ("HTTP_MAX_CONNECTIONS", "4", 4),
    ("HTTP_MAX_CONNECTIONS_PER_ADDRESS", "1024", 1024),
    ("HTTP_MAX_BODY_BYTES", "16777216", 16 << 20),
    ("RELEASE_EXECUTOR_ENABLED", "0", False),
    ("RELEASE_EXECUTOR_INTERVAL_SEC", "0.1", 0.1),
    ("RELEASE_EXECUTOR_INTERVAL_SEC", "60", 60.0),
    ("MTLS_ENABLED", "0", False),
    ("APPROVALS", "1", True),
    ("AGENT_CONCURRENCY", "1", 1),
    ("AGENT_CONCURRENCY", "1024", 1024),
    ("AGENT_CONNECT_TIMEOUT_SEC", " 1.5 ", 1.5),
    ("AGENT_REQUEST_TIMEOUT_SEC", "300", 300.0),
    ("AGENT_RETRIES", "0", 0),
    ("NODE_DEADLINE_SEC", "86400", 86400.0),
    ("CLAIM_TTL_SEC", "5", 5.0),
    ("PUBLIC_URL", "https://releases.example.com/at/", "https://releases.example.com/at"),
    ("NOTIFY_COMMAND", "/opt/notify 'two words' x", ("/opt/notify", "two words", "x")),
    ("NOTIFY_URL", "https://u:p@h.example:8443/x?k=v", "https://u:p@h.example:8443/x?k=v"),
    ("NOTIFY_ON", "failed, stuck", ("failed", "stuck")),
    ("LOG_FORMAT", "json", "json"),
    ("LOG_LEVEL", "debug", "debug"),
]
BAD = [
    ("DATABASE_URL", ("sqlite://", "sqlite:///", "mysql://h/d", "releasectl.db"), "must be sqlite:///FILE"),
    ("HTTP_ADDR", ("8080", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:65536", "::1", "::1:8080", "[::1:8080"),
     "must be ADDRESS:PORT"),
    ("HTTP_MAX_CONNECTIONS", ("3", "1025", "many"), "must be a whole number from 4 to 1024"),
    ("HTTP_MAX_CONNECTIONS_PER_ADDRESS", ("0", "-1"), "must be a whole number from 1 to 1024"),
    ("HTTP_MAX_BODY_BYTES", ("1023", "16777217", "1M"), "must be a whole number from 1024 to 16777216"),
    ("HTTP_PLAIN", ("yes", "01"), "must be 0 or 1"),
    ("RELEASE_EXECUTOR_ENABLED", ("2", "true", "-1"), "must be 0 or 1"),
    ("MTLS_ENABLED", ("yes", "off"), "must be 0 or 1"),
    ("RELEASE_EXECUTOR_INTERVAL_SEC", ("0", "0.09", "60.1", "-1", "nan", "inf", "2s", "1_0"),
     "must be a number from 0.1 to 60"),
    ("AGENT_CONCURRENCY", ("0", "1025", "1.5", "many", "-1", "9" * 40), "must be a whole number from 1 to 1024"),
    ("AGENT_CONNECT_TIMEOUT_SEC", ("0", "ten", "1e9"), "must be a number from 0.1 to 600"),
    ("AGENT_REQUEST_TIMEOUT_SEC", ("0", "3601"), "must be a number from 0.1 to 3600"),
    ("AGENT_RETRIES", ("-1", "101", "two"), "must be a whole number from 0 to 100"),
    ("NODE_DEADLINE_SEC", ("0", "604801"), "must be a number from 1 to 604800"),
    ("CLAIM_TTL_SEC", ("0.5", "3601"), "must be a number from 1 to 3600"),
    ("APPROVALS", ("2", "on"), "must be 0 or 1"),
    ("NOTIFY_ON", ("all", "failed, all"), "'all' is none of failed, partial, "),
    ("LOG_FORMAT", ("xml", "JSON"), "must be text or json"),
    ("LOG_LEVEL", ("trace", "INFO"), "must be debug or info or warning"),
]
# In test_databases, and in test_notify, as no message may show what is in most of them.
REFUSED_ELSEWHERE = {"DATABASE_URL_FILE", "PUBLIC_URL", "NOTIFY_COMMAND", "NOTIFY_URL"}


def value(settings: rc.Settings, name: str) -> object:
    return getattr(settings, name.lower())


def refusal(values: dict[str, str], config: str = "", db: str = "") -> str:
    """Return the message with which settings are refused."""
    with pytest.raises(rc.ConfigError) as caught:
        rc.Settings.load(values, config, db)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture
def config_file(tmp_path):
    """A function that writes a file for --config and gives its name."""
    def write(content: str | bytes) -> str:
        path = tmp_path / "releasectl.conf"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)
    return write


def test_every_setting_of_the_contract_has_its_default():
    settings = rc.Settings.load({})
    assert {name: value(settings, name) for name in DEFAULTS} == DEFAULTS
    assert [s.name for s in rc.SETTINGS] == list(DEFAULTS)
    assert [*rc.Settings._fields] == [name.lower() for name in DEFAULTS]
    with pytest.raises(TypeError):  # what describes a setting is no value of it
        rc.Settings(database_url="sqlite:///x.db")


@pytest.mark.parametrize(("name", "text", "wanted"), GOOD)
def test_a_good_value_is_taken(name, text, wanted):
    assert value(rc.Settings.load({name: text}), name) == wanted


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_taken_as_it_is(name):
    pair = {"HTTP_CERT": "/c", "HTTP_KEY": "/k"} if name.startswith("HTTP") else {}
    assert value(rc.Settings.load({**pair, name: "/etc/a file.pem"}), name) == "/etc/a file.pem"


@pytest.mark.parametrize(("name", "text", "rule"), [(n, text, rule) for n, texts, rule in BAD for text in texts])
def test_a_value_that_cant_be_used_is_named_with_what_would_do(name, text, rule):
    message = refusal({name: text})
    assert message.startswith(f"{name}={text} can't be used: {rule}")


def test_every_setting_is_refused_where_it_cant_be_used_or_taken_as_it_is():
    assert sorted([*TEXTS, *REFUSED_ELSEWHERE, *{name for name, *_ in BAD}]) == sorted(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_empty_value_means_the_default(name):
    assert value(rc.Settings.load({name: " "}), name) == DEFAULTS[name]


@pytest.mark.parametrize(("values", "message"), [
    ({"HTTP_CERT": "/c"}, "HTTP_CERT and HTTP_KEY go together"),
    ({"HTTP_KEY": "/k"}, "HTTP_CERT and HTTP_KEY go together"),
    ({"HTTP_CLIENT_CA": "/ca"}, "HTTP_CLIENT_CA needs HTTP_CERT and HTTP_KEY"),
])
def test_settings_that_need_one_another_are_set_together(values, message):
    assert message in refusal(values)


def test_a_config_file_holds_the_same_names(config_file):
    path = config_file("# ours\n\nAGENT_RETRIES = 7\nLOG_FORMAT=\"json\"\nCONTROL_CA='/etc/a=b c.pem'\r\n")
    settings = rc.Settings.load({}, path)
    assert (settings.agent_retries, settings.log_format, settings.control_ca) == (7, "json", "/etc/a=b c.pem")


def test_the_environment_wins_over_the_config_file(config_file):
    path = config_file("AGENT_RETRIES=7\nAGENT_CONCURRENCY=8\n")
    settings = rc.Settings.load({"AGENT_RETRIES": "9", "HOME": "/root"}, path)
    assert (settings.agent_retries, settings.agent_concurrency) == (9, 8)


def test_db_wins_over_the_environment_and_the_config_file(config_file):
    path = config_file("DATABASE_URL=sqlite:///file.db\n")
    assert rc.Settings.load({"DATABASE_URL": "sqlite:///env.db"}, path, "sqlite:///db.db").database_url \
        == "sqlite:///db.db"
    assert rc.Settings.load({"DATABASE_URL": "sqlite:///env.db"}, path).database_url == "sqlite:///env.db"
    assert rc.Settings.load({}, path).database_url == "sqlite:///file.db"


@pytest.mark.parametrize(("content", "message"), [
    ("AGENT_RETRIES=1\nAGENT_RETRYS=2\n", ":2: AGENT_RETRYS is not a setting (did you mean AGENT_RETRIES?)"),
    ("zzz=1\n", ":1: zzz is not a setting"),
    ("AGENT_RETRIES\n", ":1: not KEY=VALUE"),
    ("AGENT_RETRIES=1\nAGENT_RETRIES=2\n", ":2: AGENT_RETRIES is set twice"),
    ("AGENT_RETRIES=many\n", "AGENT_RETRIES=many can't be used"),
    (b"CONTROL_CA=\xff\xfe\n", "can't be read: not UTF-8"),
    ("CONTROL_CA=/etc/a\0b\n", ":1: CONTROL_CA holds a control character"),
])
def test_a_config_file_that_cant_be_used_is_refused_with_its_line(config_file, content, message):
    assert message in refusal({}, config_file(content))


def test_a_byte_order_mark_is_not_part_of_the_first_name(config_file):
    assert rc.Settings.load({}, config_file("\ufeffAGENT_RETRIES=7\n")).agent_retries == 7


@pytest.mark.parametrize(("name", "reason"), [("none.conf", "no such file"), ("", "is a directory")])
def test_a_config_file_that_cant_be_read_is_refused_by_name(tmp_path, name, reason):
    assert f"the settings' file {tmp_path / name} can't be read: {reason}" in refusal({}, str(tmp_path / name))


@pytest.mark.parametrize("url", [
    "postgrsql://user:hunter2@host/name",
    "mysql://user:hunter2@host/" + "x" * 200,
    "postgresqk://user:hunter2" + "x" * 200 + "@host/name",
    "mysql://host/name?user=u&password=hunter2",
    "mysql://user:a/b@hunter2@host/name",
    "user:hunter2@host/name",
    "host=h user=u password='hunter2' dbname=d",
    "host=h user=u password = 'hun hunter2' dbname=d",
])
def test_a_url_that_cant_be_used_is_told_without_its_password(url):
    message = refusal({"DATABASE_URL": url})
    assert message.startswith("DATABASE_URL=")
    assert "hunter2" not in message


@pytest.mark.parametrize(("url", "shown"), [
    ("postgresql://user:hunter2@host/name", "postgresql://user:***@host/name"),
    ("postgresql://user@host/name", "postgresql://user@host/name"),
    ("postgresql://:hunter2@host/name", "postgresql://:***@host/name"),
    ("postgresql://host/name?password=hunter2&sslmode=require", "postgresql://host/name?password=***&sslmode=require"),
    ("sqlite:////var/lib/a@b.db", "sqlite:////var/lib/a@b.db"),
])
def test_a_shown_url_keeps_all_but_the_password(url, shown):
    assert rc.safe_url(url) == shown
