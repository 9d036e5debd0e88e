"""Sentences in Chinese (issue 18, point 8): by their form, and for whom they are."""
from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import simulation
from lab import ROOT, add_nodes, new_release

import releasectl as rc

SENTENCES = {
    "3 nodes succeeded": "3 个节点成功",
    "batch 2 of 4: waiting for 7 of 24 nodes, slowest edge-25 for 4 s of 600 s":
        "批次 2/4：24 个节点中尚未完成 7 个，最慢的是 edge-25，已 4 秒（时限 600 秒）",
    "batch 1 of 2: waiting for 1 of 2 nodes; trying again: edge-1: connection refused, try 6 of 21, next in 8 s":
        "批次 1/2：2 个节点中尚未完成 1 个；正在重试 edge-1：connection refused，第 6/21 次，8 秒后再试",
    "waiting for release 4, which is running; no executor is running (none was seen for a day): start `serve`":
        "等待发布 4（进行中）；没有执行器在运行（一天之内未见过任何执行器）：请启动 serve",
    "paused by anna after batch 2: resume to go on": "由 anna 暂停（批次 2）：可继续",
    "stopped by node edge-1 in batch 1: no space": "因批次 1 的节点 edge-1 而停止：no space",
    "frozen: the match; waiting for edge-1 to end": "已冻结：the match；等待 edge-1 结束",
    "cdn is frozen until 2026-01-02T03:04:05.000Z, by anna: the match":
        "cdn 由 anna 冻结，至 2026-01-02T03:04:05.000Z：the match",
    "release 1 (v1) of cdn ended failed: stopped by node edge-1 in batch 1: no":
        "cdn 的发布 1（v1）失败：因批次 1 的节点 edge-1 而停止：no",
    "2 nodes run an older payload than they should: edge-1 and 1 more":
        "2 个节点运行的 payload 比应有的旧：edge-1 等 2 个",
    "database /var/lib/r.db: schema 13, takes writes": "数据库 /var/lib/r.db：schema 13，可写",
    "database /var/lib/r.db does not exist: bring it back, or make a new one with `releasectl migrate`":
        "数据库 /var/lib/r.db 不存在：请恢复它，或用 `releasectl migrate` 新建",
    "4 tokens": "4 个令牌",
    "1 node runs an older payload than it should: edge-1": "1 个节点运行的 payload 比应有的旧：edge-1",
    "release 4 (v4) brought this payload: it ended failed, 7 of 40 nodes failed":
        "发布 4（v4）用过此 payload：结果为失败，40 个节点中有 7 个失败",
    "release 4 (v4) brought this payload: it ended partial, 1 of 1 node failed, and was rolled back by release 5":
        "发布 4（v4）用过此 payload：结果为部分成功，1 个节点中有 1 个失败，已由发布 5 回滚",
    "2 nodes run release 4 and should run release 3: edge-1 and 1 more":
        "2 个节点运行的是发布 4，应运行发布 3：edge-1 等 2 个",
    "1 node runs release 4, which it should not: edge-1; it is not online":
        "1 个节点运行的是发布 4，这不是应有的：edge-1；该节点未上线",
    "2 nodes run what they should not: edge-1 and 1 more": "2 个节点运行的不是应有的内容：edge-1 等 2 个",
    "release 4 (v4) brought this payload: it ended cancelled, 0 of 3 nodes failed, and was rolled back in part by "
    "release 5":
        "发布 4（v4）用过此 payload：结果为已取消，3 个节点中有 0 个失败，已由发布 5 部分回滚",
    "it is not known what 2 nodes run, as a later try may have changed it: edge-1 and 1 more":
        "2 个节点运行的内容不明（之后的发布可能已改动）：edge-1 等 2 个",
    "no executor is running (none was seen for a day): start `serve`; nobody works on 1 release":
        "没有执行器在运行（一天之内未见过任何执行器）：请启动 serve；1 个发布无人处理",
    "in maintenance": "维护中",
    "it starts at 23:00, in 19 min": "开始时间：23:00",
    "frozen until 2026-11-29 06:00, in 9 h, by anna: the match": "由 anna 冻结，至 2026-11-29 06:00：the match",
    "waiting for approval by somebody else than anna: releasectl approve 4":
        "等待 anna 以外的人批准：releasectl approve 4",
    "edge-3 may still be busy with release 19 until 06:26, in 4 min": "edge-3 可能仍在处理发布 19，至 06:26",
    "mend: releasectl freeze off": "解决办法：releasectl freeze off",
    "valid; from the environment: DATABASE_URL; all others have their defaults":
        "有效；来自环境变量：DATABASE_URL；其余均为默认值",
    "/etc/r/control.crt is good until 2029-03-02 05:48, 825 days":
        "/etc/r/control.crt 有效期至 2029-03-02 05:48，还有 825 天",
    "2 of 45 checks failed": "45 项检查中有 2 项未通过",
    "finished with 3 failures (limit 50% in a batch): 3 agent_failed":
        "结束时有 3 个失败（上限 每批 50%）：3 个 agent 执行失败",
    "release 3 (v3) succeeded later on edge-1: rollback of release 1 would replace its payload":
        "发布 3（v3）之后已在 edge-1 上成功：回滚发布 1 会覆盖其内容",
    "release 3 (v3) succeeded later on edge-1: replaces what release 3 brought":
        "发布 3（v3）之后已在 edge-1 上成功：将覆盖发布 3 带来的内容",
    "1 change against release 2 (v2, 2 of 4 nodes); 2 nodes had no release yet: edge-4, Frankfurt edge 3; what 1 node "
    "runs is not known: edge-1; 1 other release has not ended yet":
        "与发布 2（v2，4 个节点中的 2 个）相比：1 处改动；2 个节点尚无发布：edge-4, Frankfurt edge 3；"
        "1 个节点运行的内容未知：edge-1；另有 1 个发布尚未结束",
    "overNewer (--over-newer) if that is meant": "如确需执行，请用 overNewer (--over-newer)",
    "nothing to roll back to: before release 4 its nodes had nothing of target cdn but release 3 (v3, rolled back) and "
    "release 1 (v1, the same payload); create a release that is good, or name one: toRelease "
    "(releasectl rollback 4 --to ID)":
        "无可回滚：发布 4 之前，其节点上目标 cdn 只有发布 3（v3，已回滚）和发布 1（v1，payload 相同）；"
        "请新建一个正确的发布，或指定一个：toRelease (releasectl rollback 4 --to ID)",
    "strategy: maxFailed \"5x\" must be a whole number from 0 to 1000000, or \"0%\" to \"100%\"":
        "策略：maxFailed \"5x\" 须为 0 到 1000000 的整数，或 \"0%\" 到 \"100%\"",
    "strategy: foo is not a known key": "策略：foo 不是已知的键",
    "hotfix 4711; batches of 1, 20, 9; at most 0, 1, 1 failed, 2 in all; left out: edge-3 is offline":
        "hotfix 4711；批次大小 1、20、9；每批最多失败 0、1、1，共 2；未包含：edge-3（下线）",
    "stopped, 2 nodes failed: 2 http; first node a in batch 2: no; such; release 18 rolls it back":
        "已停止，2 个节点失败：2 个 HTTP 错误；首个是批次 2 的节点 a：no; such；由发布 18 回滚",
    "changes nothing: all its nodes run this payload already (release 4); 1 other release has not ended yet":
        "没有任何更改：所涉节点都已在运行此 payload（发布 4）；另有 1 个发布尚未结束",
    "release 3 (v3) of cdn ended failed: stopped, 9 nodes of batch 3 failed, at most 3 may: 6 agent_failed (nginx: "
    "bind to <address>:8443, 98: in use), 2 unreachable, 1 deadline; such as node gru-3 in batch 3; all 9 in pop=gru; "
    "rolled back by release 4":
        "cdn 的发布 3（v3）失败：已停止，批次 3 有 9 个节点失败，最多允许 3 个：6 个 agent 执行失败（nginx: bind to "
        "<地址>:8443, 98: in use）、2 个无法连接、1 个超过时限；例如批次 3 的节点 gru-3；全部 9 个都在 pop=gru；"
        "已由发布 4 回滚",
    "stopped, 4 nodes failed: 3 unreachable (2 of them: agent <address>:8443 can't be reached: connection refused "
    "(tried 3 times)), 1 other; such as node gru-3 in batch 3: agent 10.0.0.3:8443 did not answer within 5 s":
        "已停止，4 个节点失败：3 个无法连接（其中 2 个：agent <地址>:8443 无法连接：连接被拒绝（已尝试 3 次））、"
        "1 个其他原因；"
        "例如批次 3 的节点 gru-3：agent 10.0.0.3:8443 在 5 秒内未应答",
    "stopped, 7 nodes of batch 2 failed, at most 5 may; 8 in all: 8 agent_failed (6 of them: nginx: bad port, 2: "
    "nginx: no space); such as node gru-1 in batch 1":
        "已停止，批次 2 有 7 个节点失败，最多允许 5 个；共 8 个失败：8 个 agent 执行失败（其中 6 个：nginx: bad port，"
        "2 个：nginx: no space）；例如批次 1 的节点 gru-1",
    "stopped, 4 nodes failed: 4 agent_failed (3 of them: nginx: bad port, 1 for other reasons), 1 timeout; such as "
    "node a in batch 1":
        "已停止，4 个节点失败：4 个 agent 执行失败（其中 3 个：nginx: bad port，1 个另有原因）、1 个超时；"
        "例如批次 1 的节点 a",
    "a, b, c and 17 more": "a、b、c 等 20 个",
    "weekly; batches of 1, 2, 3 and 17 more; at most 0, 1, 1 and 17 more failed, 9 in all":
        "weekly；批次大小 1、2、3，另有 17 批；每批最多失败 0、1、1，另有 17 批，共 9",
    "weekly; batches of 20, 18 x 100, 80; at most 0 failed in each, 20 in all":
        "weekly；批次大小 20、18 x 100、80；每批最多失败 0，共 20",
    "stopped, 8 nodes of batch 1 failed, at most 5 may; 9 in all: 8 agent_failed (6 of them: no, 2 for other reasons), "
    "1 timeout; 6 of 9 in pop=gru":
        "已停止，批次 1 有 8 个节点失败，最多允许 5 个；共 9 个失败：8 个 agent 执行失败（其中 6 个：no，"
        "2 个另有原因）、1 个超时；9 个中有 6 个在 pop=gru",
    "all is well: all 40 nodes run what they should, 2 payloads among them":
        "一切正常：全部 40 个节点都运行应有的内容，其中有 2 种 payload",
    "all is well: all 40 nodes run what they should; 1 node in maintenance, 2 disabled":
        "一切正常：全部 40 个节点都运行应有的内容；1 个节点维护中，2 个已停用",
    "all is well: running release 1 (v1), a rollback of release 2, paused release 3 (v3), 1 waiting; 1 node disabled":
        "一切正常：发布 1（v1）（用于回滚发布 2）进行中、发布 3（v3）已暂停，1 个在等待；1 个节点已停用",
    "unknown: it may run release 2 or 3: how what release 3 sent it ended is not known; the next release to it tells":
        "未知：可能运行发布 2 或 3：发布 3 下发的任务结果未知；下一次发布即可得知",
    "gru-5 may run release 3, or nothing of ours yet: how what release 3 sent it ended is not known":
        "gru-5 可能运行发布 3，也可能尚无发布：发布 3 下发的任务结果未知",
    "strategy: batchBy: no node has the label nosuch; labels: pop, rack":
        "策略：batchBy：没有节点有标签 nosuch；标签：pop, rack",
    "release 4 succeeded and waits for no approval: bob approved it at 2026-01-02T03:04:05.000Z":
        "发布 4 成功，不需要批准：bob 已于 2026-01-02T03:04:05.000Z 批准",
    "release 4 succeeded; only partial, failed or cancelled releases can be retried":
        "发布 4 成功：只有部分成功、失败或已取消的发布可以重试",
    "what no form fits": "what no form fits",
    "batch 2 of 4: waiting for 7 of 24 nodes; about 25 s left": "批次 2/4：24 个节点中尚未完成 7 个；约剩 25 秒",
    "batch 2 of 4: waiting for 7 of 24 nodes; about 3 h 20 min left, then a pause":
        "批次 2/4：24 个节点中尚未完成 7 个；约剩 3 小时 20 分钟，之后暂停",
    "soaking after batch 1 until 2026-01-02T03:04:05.000Z; about 2 days left":
        "批次 1 之后观察，至 2026-01-02T03:04:05.000Z；约剩 2 天",
    "about 6 min left": "约剩 6 分钟",
    "frozen: 3 days; no; about 6 min left": "已冻结：3 days; no；约剩 6 分钟",
    # names with spaces and brackets
    "left out: Frankfurt edge 3 is offline; left out: a (old) is excluded":
        "未包含：Frankfurt edge 3（下线）；未包含：a (old)（已排除）",
    "batch 1 of 2: waiting for 3 of 3 nodes, slowest Frankfurt edge 3, which is verified for 4 s of 600 s; edge (4) "
    "busy with an earlier request; trying again: edge 5: no; such, try 1 of 3, next in 8 s; and 3 more":
        "批次 1/2：3 个节点中尚未完成 3 个，最慢的是 Frankfurt edge 3，已 4 秒（时限 600 秒）；"
        "edge (4) 仍在处理之前的请求；正在重试 edge 5：no; such，第 1/3 次，8 秒后再试；另外还有 3 个",
    "stopping, node Frankfurt edge 3 failed: waiting for edge 4 to end, then it is rolled back":
        "正在停止，节点 Frankfurt edge 3 失败：等待 edge 4 结束，然后回滚",
    "edge 3 is at work for release 3, edge 4 may still be busy with release 5 until 06:26:40Z, in 19 s, edge 6 is at "
    "work for release 3 and 2 more":
        "edge 3 正在处理发布 3，edge 4 可能仍在处理发布 5，至 06:26:40Z，edge 6 正在处理发布 3，另有 2 个",
    "waiting for a free slot (pop=a has 1 of 1 (edge 3, which failed and may be busy until 06:26:40Z, in 4 min), for "
    "which 3 nodes wait; rack=b has 2 of 2 (edge 4, edge 5), for which 1 node waits: maxParallelPer)":
        "等待空闲名额（pop=a 已有 1/1 个（edge 3（已失败，可能忙至 06:26:40Z）），3 个节点在等待；rack=b 已有 2/2 个"
        "（edge 4, edge 5），1 个节点在等待：maxParallelPer）",
    "edge 1 may still be busy with release 5 until 06:26:40Z, in 19 s; edge 2 busy with an earlier request":
        "edge 1 可能仍在处理发布 5，至 06:26:40Z；edge 2 仍在处理之前的请求",
    "scheduled for 06:26:40Z, in 3 h; frozen by anna: because": "计划开始时间：06:26:40Z；由 anna 冻结：because",
    "soaking after batch 1 until 06:26:40Z, in 19 s; edge 2 busy with an earlier request":
        "批次 1 之后观察，至 06:26:40Z；edge 2 仍在处理之前的请求",
    "waiting for a free slot (pop=New York has 1 of 1 (edge 3, edge 4, which failed and may be busy until 06:26:40Z, "
    "in 4 min, edge 5), for which 3 nodes wait: maxParallelPer)":
        "等待空闲名额（pop=New York 已有 1/1 个（edge 3、edge 4（已失败，可能忙至 06:26:40Z）、edge 5），"
        "3 个节点在等待：maxParallelPer）",
    "Frankfurt edge 3 may run release 2 or 3: how what release 3 sent it ended is not known":
        "Frankfurt edge 3 可能运行发布 2 或 3：发布 3 下发的任务结果未知",
    "batch 1 of 1: 0 of 2 nodes done, 2 in flight: edge (3) (deadline 06:26:40Z, in 19 s), edge 4 (past its deadline)":
        "批次 1/1：2 个节点中已完成 0 个，2 个进行中：edge (3)（期限 06:26:40Z）、edge 4（已超过时限）",
    "3 nodes run an older payload than they should: edge (3) and 2 more":
        "3 个节点运行的 payload 比应有的旧：edge (3) 等 3 个",
    "node Frankfurt edge 3: it was never sent": "节点 Frankfurt edge 3：从未下发",
    "no node has the label New York": "没有节点有标签 New York",
    "paused by cli:root (sudo: anna) after batch 2: waiting for edge 3 to end; resume to go on":
        "由 cli:root (sudo: anna) 暂停（批次 2）：等待 edge 3 结束；可继续",
    "paused by Bob Smith in batch 2: edge 3 is tried again after that; resume to go on":
        "由 Bob Smith 暂停（批次 2）：edge 3 将在此后重试；可继续",
    "resumed by Bob Smith: queued for an executor": "由 Bob Smith 继续：等待执行器",
    # the reason of a freeze, whatever it is
    "frozen by cli:root (sudo: anna): 3 days; 2 nodes failed; bob lifts it, or any two others":
        "由 cli:root (sudo: anna) 冻结：3 days; 2 nodes failed；由 bob 解除，或由另外任意两人解除",
    "frozen until 2026-01-02T03:04:05.000Z, by anna: 3 days: no; cdn is frozen by Bob Smith: 2 nodes failed; 3 days":
        "由 anna 冻结，至 2026-01-02T03:04:05.000Z：3 days: no；cdn 由 Bob Smith 冻结：2 nodes failed; 3 days",
    "frozen: 3 days; 2 nodes failed; waiting for edge 3 to end; edge 4 is tried again after that: no; such":
        "已冻结：3 days; 2 nodes failed；等待 edge 3 结束；edge 4 将在此后重试：no; such",
    "frozen until 2026-01-02T03:04:05.000Z: release 2 rolls it back; no executor is running (none was seen for a day): "
    "start `serve`":
        "已冻结，至 2026-01-02T03:04:05.000Z：release 2 rolls it back；没有执行器在运行（一天之内未见过任何执行器）："
        "请启动 serve",
    "frozen by anna at 2026-01-02T03:04:05.000Z: 3 days; `freeze off` lifts it":
        "由 anna 于 2026-01-02T03:04:05.000Z 冻结：3 days；用 `freeze off` 解除",
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_is_in_chinese_where_its_form_is_known(sentence):
    assert rc.in_chinese(sentence) == SENTENCES[sentence]


@pytest.mark.parametrize(("languages", "expected"), [
    ("zh-CN,zh;q=0.9,en;q=0.8", True), ("zh_CN.UTF-8", True), ("en-GB,zh;q=0.5", False), ("", False),
    ("en;q=0.1, zh;q=0.9", True), ("zh;q=0, en", False), ("zh;q=0", False), ("zh;q=x,en", True)])
def test_chinese_is_for_whom_it_comes_first(languages, expected):
    assert rc.is_chinese(languages) is expected


# How the page finds the time that a release still takes at the end of its statusReason, and the seconds of each unit.
_PAGE = (ROOT / "dashboard.html").read_text(encoding="utf-8")
TIME_LEFT = re.compile(re.search(r"/\^(.*)\$/\.exec\(r\.statusReason\)", _PAGE)[1])
UNITS = dict(re.findall(r"(\S+): (\d+)", re.search(r"amount \* \{(s: .*?)\}\[unit\]", _PAGE)[1]))


@pytest.mark.parametrize(("seconds", "amount", "unit", "minutes"), [
    (25.0, 25, "秒", None), (360.0, 6, "分钟", None), (7200.0, 2, "小时", None), (12000.0, 3, "小时", 20),
    (172800.0, 2, "天", None)])
@pytest.mark.parametrize("pause", ["", ", then a pause"])
@pytest.mark.parametrize("text", ["", "batch 2 of 4: waiting for 7 of 24 nodes; "])
def test_the_time_left_is_found_in_both_languages(seconds, amount, unit, minutes, pause, text):
    english = f"{text}about {rc.rough_time(seconds)} left{pause}"
    found, chinese = (TIME_LEFT.fullmatch(said) for said in (english, rc.in_chinese(english)))
    assert found
    assert chinese
    for one in (found, chinese):
        assert (int(one[3]), one[5] and int(one[5]), bool(one[6])) == (amount, minutes, bool(pause))
    assert chinese[4] == unit
    assert UNITS[unit] == UNITS[found[4]]
    assert chinese[2] == ("；" if text else None)


def test_what_the_daemon_says_of_a_release_is_known_in_chinese(store):
    add_nodes(store, 3)
    new_release(store)
    new_release(store)
    store.releases.act("pause", 1, "anna")
    store.releases.set_freeze(True, "anna", "the match")
    found = rc.translated({
        "release": rc.release_json(store.releases.get(2)), "steps": rc.why_json(store.claims.why(1, 600.0)),
        "overview": rc.overview_json(store.overview.read([]))})
    why = found["steps"]
    said = [found["release"]["statusReason"], why["text"], *(step["text"] for step in why["steps"]),
            *(problem["text"] for problem in found["overview"]["problems"])]
    assert [text for text in said if not any("\u4e00" <= letter <= "\u9fff" for letter in text)] == []
    assert json.dumps(found["release"]["strategy"]) == "{}"


def test_of_a_ping_what_we_say_is_chinese_and_what_the_agent_said_is_not():
    good = {"name": "edge-1", "ok": True, "errorKind": "", "message": "answers as a tasks agent in 12 ms"}
    assert rc.translated(good) == {**good, "message": "以 tasks agent 应答，12 毫秒"}
    bad = {"name": "edge-1", "ok": False, "errorKind": "rejected", "message": "offline"}
    assert rc.translated(bad) == bad


def test_what_people_wrote_is_data_in_any_language():
    data = {"labels": {"text": "offline"}, "before": {"message": "offline"}, "after": {"why": "offline"}}
    assert rc.translated({**data, "text": "offline"}) == {**data, "text": "下线"}
    for key in ("rollbackOf", "retryOf", "catchUpOf"):
        for reason in REASONS:
            assert rc.translated({"reason": reason, key: 1}) == {"reason": reason, key: 1}
    freeze = {"frozen": True, "reason": "3 days; 2 nodes failed", "actor": "offline"}
    assert rc.translated(freeze) == freeze


# What people give as a reason, and what would be something else in Chinese if the program had written it.
REASONS = (
    "offline", "3 days", "2 nodes failed", "3 days; 2 nodes failed", "nothing was sent; it answers", "batches of 5",
    "at most 2 failed", "until noon: 3 days", "frozen by anna: 3 days; 2 min",
    "stopped by node a in batch 1: no; release 2 rolls it back", "release 3 (v3) failed; 3 min", "it was never sent",
    "because; left out: the kitchen sink")
AN_EXECUTOR = "host-a:77:0123abcd"
# By event: what the program writes before and behind a reason, in both languages.
AROUND = {
    "created": [("", "", "", ""), (
        "", "; batches of 1, 2; at most 0, 1 failed, 2 in all; all agents are asked first, at most 1 may be silent; "
        "changes nothing: all its nodes run this payload already; left out: Frankfurt edge 3 is offline; goes out in a "
        "freeze too",
        "", "；批次大小 1、2；每批最多失败 0、1，共 2；先询问所有 agent，最多 1 个可不应答；"
        "没有任何更改：所涉节点都已在运行此 payload；未包含：Frankfurt edge 3（下线）；冻结期间也执行")],
    "approval": [("waiting for approval by somebody else than Bob Smith: releasectl approve 4; ", "",
                  "等待 Bob Smith 以外的人批准：releasectl approve 4；", "")],
    "approved": [("", "", "", "")],
    "emergency": [("without approval, by cli:root (sudo: anna); ", "", "未经批准，由 cli:root (sudo: anna)；", "")],
    "paused": [("", "", "", "")],
    "resumed": [("", "", "", ""), ("", "; failures accepted: 3", "", "；已接受 3 个失败"), (
        "", "; goes on though agents did not answer the preflight", "", "；尽管有 agent 未应答预检，仍继续")],
    "cancelling": [("", "", "", "")],
    "cancelled": [("", "", "", ""), ("", "; not rolled back, as it was cancelled: releasectl rollback 4", "",
                                     "；因已取消而未回滚：releasectl rollback 4")],
    "frozen": [("", "", "", ""), ("until 2026-01-02T03:04:05.000Z: ", "", "至 2026-01-02T03:04:05.000Z：", "")],
    "unfrozen": [("", "", "", ""), (
        "emergency: lifted without a second person; ", "", "紧急：未经第二人而解除；", ""), (
        "wanted by Bob Smith since 2026-01-02T03:04:05.000Z; ", "",
        "由 Bob Smith 自 2026-01-02T03:04:05.000Z 起提出；", ""), (
        "its end has come: frozen by anna: ", "", "期限已到：由 anna 冻结：", "")],
}
# By event: what it says where the program alone writes it.
TOLD = {
    "created": [("retry of release 3; changes nothing: all its nodes run this payload already",
                 "重试发布 3；没有任何更改：所涉节点都已在运行此 payload"),
                ("; ".join(f"left out: edge {number} is offline" for number in range(20)),
                 "；".join(f"未包含：edge {number}（下线）" for number in range(20)))],
    "started": [], "approval": [("waiting for approval: releasectl approve 4", "等待批准：releasectl approve 4")],
    "finished": [("3 nodes succeeded", "3 个节点成功"), ("node edge 3: it was never sent", "节点 edge 3：从未下发"),
                 ("stopped, 3 nodes failed: 2 agent_failed (no disk space), 1 unreachable; such as node edge 2 in "
                  "batch 1; release 5 rolls it back",
                  "已停止，3 个节点失败：2 个 agent 执行失败（no disk space）、1 个无法连接；例如批次 1 的节点 edge 2；"
                  "由发布 5 回滚")],
    "paused": [("paused after batch 1: resume to go on", "已暂停（批次 1）：可继续")],
    "cancelling": [("superseded by release 5 (v5)", "被发布 5（v5）取代")],
    "cancelled": [("superseded by release 5 (v5)", "被发布 5（v5）取代"),
                  ("0 of 3 nodes updated", "3 个节点中已更新 0 个"),
                  ("node edge 1: it was never sent; not rolled back, as it was cancelled: releasectl rollback 4",
                   "节点 edge 1：从未下发；因已取消而未回滚：releasectl rollback 4")],
    "frozen": [], "unfrozen": [], "resumed": [("failures accepted: 3", "已接受 3 个失败")], "approved": [],
    "emergency": [],
    "taken_over": [(f"taken over by {AN_EXECUTOR} from b:1:0123abcd, whose claim had run out",
                    f"由 {AN_EXECUTOR} 从 b:1:0123abcd 接管（其占用已过期）")],
    "renumbered": [("version 3 became 5: release 4 (v4) went out before it", "版本 3 改为 5：发布 4（v4）先于它下发")],
    "stuck": [("no executor is running (none was seen for a day): start `serve`",
               "没有执行器在运行（一天之内未见过任何执行器）：请启动 serve")],
    "notify.given_up": [("failed of 2026-01-02T03:04:05.000Z, after 9 tries: HTTP 500",
                         "2026-01-02T03:04:05.000Z 的通知（failed）尝试 9 次后放弃：HTTP 500")],
}


def detail_in_chinese(event: str, actor: str, detail: str) -> str:
    return rc.translated([{"nodeId": None, "event": event, "actor": actor, "detail": detail}])[0]["detail"]


@pytest.mark.parametrize("actor", ["anna", "cli:root (sudo: anna)", "cert:a:1:0123abcd", "program"])
@pytest.mark.parametrize("event", AROUND)
def test_the_reason_that_a_person_gave_stays_in_the_history_as_it_is(event, actor):
    for before, behind, chinese_before, chinese_behind in AROUND[event]:
        for reason in REASONS:
            said = detail_in_chinese(event, actor, f"{before}{reason}{behind}")
            assert said == f"{chinese_before}{reason}{chinese_behind}"


@pytest.mark.parametrize("event", TOLD)
def test_what_the_program_says_in_the_history_is_in_chinese(event):
    for detail, chinese in TOLD[event]:
        for actor in (AN_EXECUTOR, *(["anna"] if event != "paused" else [])):
            assert detail_in_chinese(event, actor, detail) == chinese
    assert detail_in_chinese("by hand", "anna", "offline") == "offline"


@functools.lru_cache(maxsize=1)
def calls() -> list[tuple[str, ast.Call]]:
    """Return the calls of plain names in the program, with the name."""
    return [(node.func.id, node) for node in ast.walk(ast.parse(Path(rc.__file__).read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]


def test_every_event_of_a_release_is_among_these():
    named = {*rc.RELEASE_EVENTS.values(), *rc.APPROVAL_EVENTS.values(),
             *(verb.event for verb in rc.VERBS.values())} - {""}
    for function, call in calls():
        if function == "NewEvent":
            event = call.args[1]
            if isinstance(event, ast.Constant):
                named.add(str(event.value))
            elif isinstance(event, (ast.Name, ast.IfExp)) and ast.unparse(event) != "event":
                named |= {getattr(rc, name.id) for name in ast.walk(event)
                          if isinstance(name, ast.Name) and name.id.isupper()}
    assert named == TOLD.keys()
    assert AROUND.keys() <= named


def test_the_reasons_of_real_acts_stay_as_they_are(store):
    why = "3 days; 2 nodes failed"
    add_nodes(store, 2)
    for target in ("cdn", "dns"):
        store.releases.create(rc.ReleaseRequest(target, why, strategy={"batches": [1]}), "anna")
    store.releases.set_freeze(True, "anna", why)
    store.releases.set_freeze(False, "bob", why)
    for verb in ("pause", "resume", "cancel"):
        store.releases.act(verb, 1, "anna", why)
    events = [event for event in store.releases.events(1) if event.node_id is None]
    assert [event.event for event in events] == [
        "created", "frozen", "unfrozen", "paused", "resumed", "cancelling", "cancelled"]
    said = [event["detail"] for event in rc.translated([rc.event_json(event) for event in events])]
    assert said == [f"{why}；批次大小 1、1；每批最多失败 0", *[why] * 5, "2 个节点中已更新 0 个"]


@pytest.mark.parametrize("strategy", [
    {"batches": 0}, {"batches": ["x"]}, {"maxFailed": -1}, {"onExceed": "stop"}, {"soakSec": -1}, {"foo": 1},
    {"pauseAfter": "x"}, {"maxParallelPer": {"a": 0}}, {"verify": {}}, {"verify": {"url": "x"}}, {"startAt": "x"},
    {"preflight": 1}, {"batchez": 1}])
def test_what_is_wrong_with_a_strategy_is_known_in_chinese(strategy):
    with pytest.raises(rc.AppError) as refused:
        rc.parse_strategy(strategy)
    said = rc.in_chinese(refused.value.message)
    assert any(words in said for words in ("须为", "缺少", "不是已知")), said


# What stays in the alphabet of English in a Chinese sentence: what a person types, and these words.
TYPED = re.compile(r"`[^`]*`|releasectl [a-z][^；：，（）]*|--[a-z-]+( [A-Z]+)?|https?://\S+|[A-Z][A-Z_]+(?![a-z])|"
                   r"\b[a-z]+[A-Z]\w*|\"[^\"]*\"|\b[a-z]=[a-z]\b")
WORDS = frozenset((
    "Authorization", "Bearer", "Content", "Idempotency", "Key", "Type", "agent", "application", "approval", "catch",
    "code", "emergency", "enabled", "eu", "exclude", "execute", "false", "first", "frozen", "id", "json", "kinds",
    "labels", "migrate", "once", "openapi", "operator", "pauseAfter", "payload", "reason", "region", "releasectl",
    "retries", "run", "schema", "serve", "status", "strategy", "summary", "supersede", "target", "total", "true",
    "until", "up", "url", "us", "verify", "version", "view", "websites"))


def english_in(text: str) -> list[str]:
    """Return the English words that a sentence has though it is in Chinese."""
    return [word for word in re.findall(r"[A-Za-z]{2,}", TYPED.sub("", text)) if word not in WORDS]


# What stands in the place of an expression in a sentence of the code, by a part of that; 7 for any other.
SAMPLES = {
    "did_you_mean": "", "within": "", "_is_now(": "release 7 is running", "states": "partial, failed or cancelled",
    "VERBS[verb].past": "rolled back",
    "how": "in an emergency it goes without: emergency and reason (--emergency --reason TEXT)",
    "freeze.target or": "everything", "lifted_by": "7 lifts it, or any two others",
    "exceeded": "2 nodes failed in all, at most 1 may", "there_is": "kinds: 2 tls", "names_of(": "7 and 3 more",
    "in_words(": "7, 8 and 3 more",
    "in_runs(": "7, 3 x 8", "values_text(": "values of 7: 7", "why_none(": "no node matches 7", "newer_id": "7",
    "newer": "release 7 (v7) succeeded later on 7", "verb": "rollback", "waiting.line()": "frozen by 7: 7",
    "os_reason(": "permission denied", "PLAIN_TEXT": rc.PLAIN_TEXT, "WEBSITES": "websites", "EACH": "each",
    "same": "--now", "condition": "offline", "now": "until somebody lifts it", "mend": "releasectl freeze off",
    "fault": "is a multicast address", "count_of_nodes": "3 nodes",
    "error": "maxFailed 7 must be a whole number from 1 to 9",
    "why": "no release of target 7 before 7 succeeded on any of its nodes"}
# The same in one section.
SAMPLES_OF = {"Plan": {"what": "the payload", "field": "batchBy"}, "Releases": {"now": "7"},
              "Retry and rollback": {"what": "touched by it"}, "Helpers": {"error": "7"}}
# Nobody reads an error of these parts in a page: of HTTP itself, and of the command line.
ENGLISH_PARTS = frozenset((
    "HTTP wire", "Engines", "Notifier", "Commands", "Upkeep commands", "Node commands", "Service", "Arguments",
    "Command line"))


def written(node: ast.expr, more: dict[str, str]) -> str:
    """Return the text that an expression of the code makes, with SAMPLES in it; "" for one that is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(written(value, more) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        code = ast.unparse(node.value)
        return next((text for part, text in [*more.items(), *SAMPLES.items()] if re.search(
            rf"(?<!\w){re.escape(part)}" + (r"\b" if part[-1].isalnum() else ""), code)), "7")
    if isinstance(node, ast.BinOp):
        return written(node.left, more) + written(node.right, more)
    return written(node.body, more) if isinstance(node, ast.IfExp) else ""


def refusals() -> Iterator[str]:
    """Yield every sentence with which the program refuses something."""
    code = Path(rc.__file__).read_text(encoding="utf-8")
    sections = [""]
    for line in code.splitlines():
        sections.append(line[9:] if line.startswith("# region ") else sections[-1])
    for function, call in calls():
        section = sections[call.lineno]
        if section not in ENGLISH_PARTS and function in ("AppError", "NotAgain"):
            texts = call.args[1:] if function == "AppError" else call.args
            yield from filter(None, (written(text, SAMPLES_OF.get(section, {})) for text in texts))


def test_no_refusal_that_a_page_may_show_has_english_words_in_chinese():
    found = [text for text in refusals() if "waits for no approval: 7" not in text]  # that is in SENTENCES
    assert len(found) > 100
    assert [(text, rc.in_chinese(text)) for text in found if english_in(rc.in_chinese(text))] == []


@pytest.mark.parametrize("unit", [
    "x; ", "frozen by a; ", "frozen by a: b; frozen until ", "node a: stopped; ", "1 tls (, 1 tls ",
    "release 1, which x, then ", "a is at work for release 1, ", "; all 1 in a=b", "(a (offline), ", "1 node failed: ",
    "waiting for release 1 and 1 more ",
    "batch 1 of 1: waiting for 1 of 1 node; trying again: ", "a: b, try 1 of 2, ", "paused; resume to go on",
    "problem: ", "z (deadline z), ", "a, which failed and may be busy until 1, in ", "left out: a is ", " is is ",
    "frozen: a; b lifts it, or any two others; ", "a may still be busy with release 1 until 2, in 3, ",
    "a and 1 more; "])
def test_what_somebody_wrote_to_be_a_burden_is_none(unit):
    text = "1 problem: " + unit * (rc.MAX_DETAIL_BYTES // len(unit))
    began = time.thread_time()
    for said in (text, text[11:], text[:500], text[11:500], f"it can't be reached: {text[11:]}"):
        assert rc.in_chinese(said)
        for event in rc._WRITTEN.keys() | {"paused", "finished"}:
            assert rc.translated({"event": event, "nodeId": None, "actor": AN_EXECUTOR, "detail": said})["detail"]
        assert rc.translated({"event": "failed", "nodeId": 1, "actor": AN_EXECUTOR, "detail": said})["detail"]
    assert time.thread_time() - began < 2.0


# What people, agents and hosts are called and say in the simulation.
SIMULATED = frozenset((
    "Frankfurt", "anna", "cut", "edge", "holidays", "host", "pid", "refused", "test", "no", "answer", "in", "hurry",
    "cdn", "dns", "rack", "twin", "why"))


@pytest.mark.parametrize("world", [simulation.PLAIN, simulation.SHARED])
def test_no_sentence_that_a_release_comes_to_has_english_words_in_chinese(world, monkeypatch):
    """Schedules of the simulation: status texts, what `why` says, and the details of all events."""
    said: set[tuple[Any, str]] = set()

    def hears(name: str, texts: Callable[..., Iterable[tuple[Any, str]]]) -> None:
        real = getattr(rc, name)

        def heard(*args: Any) -> Any:
            found = real(*args)
            said.update(texts(found, *args))
            return found
        monkeypatch.setattr(rc, name, heard)

    hears("describe", lambda text, *_: [("status", text)])
    hears("waiting_reasons", lambda reasons, *_: [("status", text) for text in reasons.values()])
    hears("explain", lambda why, *_: [("why", text) for text in (why.text, *(step.text for step in why.steps))])
    hears("add_events", lambda _, *args: [(("node" if event.node_id else event.event, str(args[2])), event.detail)
                                          for event in args[3]])
    monkeypatch.setattr(rc.log, "disabled", True)
    for seed in range(6):
        simulation.run_seed(seed, world)
    chinese = {(what, text): rc.in_chinese(text) if isinstance(what, str) else rc.translated(
        {"event": what[0], "actor": what[1], "detail": text, "nodeId": 1 if what[0] == "node" else None})["detail"]
               for what, text in said}
    assert len(chinese) > 200
    assert any("Frankfurt edge " in text for _, text in said)
    assert [(*key, text) for key, text in chinese.items() if {*english_in(text)} - SIMULATED] == []


def without_its_options(form: str) -> str:
    """Return a text that has a form, with as little in it as the form lets: an optional part is left out."""
    def least(parts: Any) -> str:
        return "".join(one(str(kind), value) for kind, value in parts)

    def one(kind: str, value: Any) -> str:
        if kind == "LITERAL":
            return chr(value)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, parts = value
            return "" if (low, high) == (0, 1) else least(parts) * max(low, 1)
        if kind == "SUBPATTERN":
            return least(value[3])
        if kind == "BRANCH":
            return least(value[1][0])
        if kind == "IN":
            choices = [(str(choice), of) for choice, of in value]
            return next((chr(of if choice == "LITERAL" else of[0]) for choice, of in choices
                         if choice in ("LITERAL", "RANGE")), "7") if choices[0][0] != "NEGATE" else "x"
        return "x" if kind in ("ANY", "NOT_LITERAL") else ""

    parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
    return least(parser.parse(form))


def test_no_sentence_ends_in_a_colon_where_a_part_of_it_is_missing():
    forms = [form for form, _ in (*rc.CHINESE_FORMS, *rc.CHINESE_REFUSALS, *rc.CHINESE_ERRORS)]
    said = {form: rc._error(text) if form in dict(rc.CHINESE_ERRORS) else rc.in_chinese(text)
            for form in forms for text in [without_its_options(form)]
            if re.fullmatch(form, text) and not text.endswith(": ")}
    assert len(said) > 0.9 * len(forms), set(forms) - set(said)
    assert [(form, text) for form, text in said.items() if re.search("[：，；（]($|[；）])", text)] == []


# -- the command line --------------------------------------------------------------------------------

def test_nobody_but_who_reads_chinese_waits_for_its_patterns(tmp_path):
    code = """if True:
        import contextlib, re, sys
        compiled, real = [], re.compile
        re.compile = lambda pattern, *more: compiled.append(pattern) or real(pattern, *more)
        import releasectl as rc
        for words in (["list"], ["why"], ["check"], ["--help"]):
            with contextlib.suppress(SystemExit):
                rc.main([*words, "--db", "sqlite:///" + sys.argv[1]] if words[0] != "--help" else words)
        chinese = {form for form, _ in (*rc.CHINESE_FORMS, *rc.CHINESE_REFUSALS, *rc.CHINESE_ERRORS)}
        before = [rc._forms.cache_info().currsize, len(chinese.intersection(compiled))]
        rc.in_chinese("no form")
        print("compiled:", *before, len(chinese.intersection(compiled)) > 500, file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.db")], capture_output=True, text=True,
                          cwd=Path(rc.__file__).parent, env={"LANG": "en_US.UTF-8", "PATH": os.environ["PATH"]},
                          timeout=60, check=True)
    assert done.stderr.splitlines()[-1] == "compiled: 0 0 True", done.stderr


@pytest.mark.parametrize(("environment", "expected"), [
    ({"LANG": "zh_CN.UTF-8"}, True), ({"LANG": "zh_TW"}, True), ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, False),
    ({"LC_ALL": "", "LC_MESSAGES": "zh_CN.UTF-8", "LANG": "C"}, True), ({"LANG": "en_US.UTF-8"}, False), ({}, False)])
def test_the_command_line_speaks_as_posix_finds_the_language_of_messages(environment, expected):
    assert rc.is_chinese(rc.language_of(environment)) == expected


def test_why_and_check_are_in_chinese_for_people_and_not_in_json(sqlite_world, quick):
    store = sqlite_world.store
    quick.settings.update(DATABASE_URL=sqlite_world.url, MTLS_ENABLED="0", LC_ALL="zh_CN.UTF-8")
    add_nodes(store, 1)
    new_release(store)
    store.releases.set_freeze(True, "anna", "holidays")
    lines = [" ".join(line.split()) for line in quick("why").out.splitlines()]
    assert lines == [
        "发布 1（v1）已停住：由 anna 冻结：holidays", "状态 步骤 说明", "正常 数据库 有应答",
        "=> 停住 冻结 由 anna 冻结：holidays",
        "停住 执行器 没有执行器在运行（一天之内未见过任何执行器）：请启动 serve",
        "正常 节点 批次 1/1：1 个节点中已完成 0 个",
        "解决办法：releasectl freeze off"]
    assert quick("why", "--json").json["text"] == "frozen by anna: holidays"
    shown = quick("check").out
    for words in ("有误 执行器", "解决办法：releasectl serve", "项检查中有"):
        assert words in " ".join(shown.split())
    assert quick("list").out.startswith("ID ")


def test_the_screen_of_help_is_in_chinese_and_fits_as_the_english_one(monkeypatch):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    lines = rc._parser(()).format_help().splitlines()
    assert len(lines) <= 24
    assert max(map(rc.columns_of, lines)) <= 80
    assert lines[2].split() == ["查看", "list,", "status,", "watch", "发布列表；单个发布或所有问题；实时跟踪"]
    said = [text for group, rows in rc.HELP_GROUPS for text in (group, *(text for _, text in rows))]
    assert {*said, *rc.HELP_FOOT.split("\n")} <= rc.CHINESE_WORDS.keys()
