"""Sentences in Chinese (issue 18, point 8): by their form, and for whom they are."""
from __future__ import annotations

import json

import pytest
from lab import add_nodes, new_release

import releasectl as rc

SENTENCES = {
    "3 nodes succeeded": "3 个节点成功",
    "batch 2 of 4: waiting for 7 of 24 nodes, slowest edge-25 for 4 s of 600 s":
        "批次 2/4：24 个节点中还在等待 7 个，最慢的是 edge-25，已 4 秒（时限 600 秒）",
    "batch 1 of 2: waiting for 1 of 2 nodes; trying again: edge-1: connection refused, try 6 of 21, next in 8 s":
        "批次 1/2：2 个节点中还在等待 1 个；正在重试 edge-1：connection refused，第 6/21 次",
    "waiting for release 4, which is running; no executor is running (none was seen for a day): start `serve`":
        "等待发布 4（进行中）；没有执行器在运行（一天之内未见过任何执行器）：请启动 serve",
    "paused by anna after batch 2: resume to go on": "由 anna 暂停（批次 2）：可继续",
    "stopped by node edge-1 in batch 1: no space": "因批次 1 的节点 edge-1 而停止：no space",
    "frozen: the match; waiting for edge-1 to end": "已冻结：the match；等待 edge-1 结束",
    "cdn is frozen until 2026-01-02T03:04:05.000Z, by anna: the match":
        "cdn 由 anna 冻结，至 2026-01-02T03:04:05.000Z：the match",
    "release 1 (v1) of cdn ended failed: stopped by node edge-1 in batch 1: no":
        "cdn 的发布 1（v1）以 failed 结束：因批次 1 的节点 edge-1 而停止：no",
    "2 nodes run an older payload than they should: edge-1 and 1 more":
        "2 个节点运行的 payload 比应有的旧：edge-1 and 1 more",
    "1 node runs an older payload than it should: edge-1": "1 个节点运行的 payload 比应有的旧：edge-1",
    "1 node runs the payload of a release that failed or was cancelled: edge-1":
        "1 个节点保留着未成功的发布留下的内容：edge-1",
    "it is not known what 2 nodes run, as a later try may have changed it: edge-1 and 1 more":
        "2 个节点运行的内容未知（之后的一次尝试可能已更改）：edge-1 and 1 more",
    "no executor is running (none was seen for a day): start `serve`; nobody works on 1 release":
        "没有执行器在运行（一天之内未见过任何执行器）：请启动 serve；1 个发布无人处理",
    "in maintenance": "维护中",
    "what no form fits": "what no form fits",
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_is_in_chinese_where_its_form_is_known(sentence):
    assert rc.in_chinese(sentence) == SENTENCES[sentence]


@pytest.mark.parametrize(("languages", "expected"), [
    ("zh-CN,zh;q=0.9,en;q=0.8", True), ("zh_CN.UTF-8", True), ("en-GB,zh;q=0.5", False), ("", False)])
def test_chinese_is_for_whom_it_comes_first(languages, expected):
    assert rc.is_chinese(languages) is expected


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
