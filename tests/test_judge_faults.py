"""The judge on a bad day: every fault of judge_faults.py, servers that are down, several URLs, and a run that waits."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hov2 import judge_server, pace, scoring, toy
from hov2.config import JudgeConfig
from hov2.data.samples import Sample
from hov2.distributed import Means
from hov2.judge import CompletionJudge, Judge
from hov2.judge_server import FAULTS, JudgeError
from hov2.prompts import load_prompts
from hov2.rewards import Completion, logic_reward
from hov2.scoring import Scorer
from tests.support.judge_faults import FAULTY, KIND, FaultyJudge, stats
from tests.support.judge_ranks import GROUP_TIMEOUT

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-very-secret-0123456789"
SECRET_TEXT = "the woman in the green coat hides a letter"
ONE_FAULT = [kind for kind in FAULTY if kind not in ("404", "no score", "outage")]  # those that another try mends


@contextmanager
def judged(*scripts, first_delay=0.001, **config):
    """(judge, server, ...) with a FaultyJudge for each script."""
    with ExitStack() as stack:
        servers = [stack.enter_context(FaultyJudge(script)) for script in scripts]
        where = {"url": servers[0].url} if len(servers) == 1 else {"urls": [server.url for server in servers]}
        judge = Judge(JudgeConfig(**{**where, "timeout": 5.0, **config}), load_prompts(), first_delay=first_delay)
        yield judge, *servers


def think(number=0):
    """A completion whose logic score is 1 by the rules."""
    return f"<context>A smile.</context><think>The smile, a rising voice: thanks. {SECRET_TEXT} {number}</think>"


def ask(judge, number=0):
    """The judge's reply to what the logic reward asks."""
    completion = CompletionJudge(judge)
    logic_reward(Completion(think(number), None, completion))
    return completion.reply


def logic_scores(scorer, count):
    """As a step of training asks for them, all at once."""
    scores = [scorer.submit("logic", think(i), None) for i in range(count)]
    return [score.result().value for score in scores]


def rest_is_over(judge):
    """As if `DOWN_SECONDS` had passed."""
    for server in judge._servers:
        server._left_alone_until = 0.0


@pytest.fixture
def soon_down(monkeypatch):
    """Four requests that find nobody are enough for a server to be left alone, for an hour."""
    monkeypatch.setattr(judge_server, "DOWN_AFTER", 4)
    monkeypatch.setattr(judge_server, "DOWN_SECONDS", 3600.0)


# ---------------------------------------------------------------------------------------------- each fault


@pytest.fixture
def secrets_kept(monkeypatch, caplog, capfd):
    """Fails a test in which anything printed, logged or given to it holds the key or the prompt."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    texts = []
    yield texts
    shown = " ".join([*map(str, texts), caplog.text, *capfd.readouterr()])
    assert KEY not in shown and SECRET_TEXT not in shown


@pytest.mark.parametrize("fault", ONE_FAULT)
def test_a_fault_that_passes_costs_a_try(fault, secrets_kept):
    slow = KIND[fault] == "timeout"
    config = {"timeout": 0.3 if slow else 20.0, "max_retries": 12, "api_key_env": "JUDGE_KEY"}
    with judged([fault, None], **config) as (judge, server):
        reply = ask(judge)
        found = stats(judge)
        assert reply.error is None and reply.score == 0.8  # a voice that the description doesn't have: 4 points of 5
        assert found["failures"] == 0 and found["faults"][KIND[fault]] >= 1
        assert server.injected == {fault: 1}
        secrets_kept += [reply.faults, found, judge]


@pytest.mark.parametrize("fault", [*ONE_FAULT, "404", "no score"])
def test_a_fault_that_stays_is_a_missing_score(fault, secrets_kept, monkeypatch):
    monkeypatch.setattr(pace, "PATIENCE", 0.5)
    slow = KIND[fault] == "timeout"
    config = {"timeout": 0.3 if slow else 20.0, "max_retries": 1, "api_key_env": "JUDGE_KEY"}
    with judged([fault], **config) as (judge, server):
        reply = ask(judge)
        assert reply.score is None and reply.error.startswith(f"127.0.0.1:{server.port}: ")
        assert reply.faults[0].kind == KIND[fault] and len(reply.faults) == stats(judge)["faults"].total()
        if fault in ("404", "no score"):
            assert len(reply.faults) == 1 and not reply.is_down
        else:
            assert reply.is_down
        with pytest.raises(JudgeError) as error:
            judge.check()
        secrets_kept += [error.value, reply.error, reply.words, reply.faults, repr(judge)]


def test_every_kind_of_fault_is_counted_under_a_known_name():
    assert set(KIND.values()) <= set(FAULTS) and KIND.keys() == FAULTY.keys()
    assert {*judge_server._KINDS.values(), *judge_server._NOBODY} <= set(FAULTS)


@pytest.mark.parametrize("where", ["headers", "body"])
def test_a_server_that_drips_is_cut_off_at_the_deadline(where):
    with judged([f"drip in the {where}"], timeout=0.5, max_retries=0) as (judge, _):
        reply = ask(judge)
        assert reply.error.endswith("no reply within 0.5 s") and reply.latency >= 0.5


def test_a_wait_beyond_all_patience_is_not_waited_for(monkeypatch):
    monkeypatch.setitem(FAULTY, "429", lambda h: h.say(429, "", Retry_After="9999"))
    with judged(["429"]) as (judge, server):
        assert [ask(judge, number).error.partition(": ")[2] for number in range(3)] == [
            "HTTP 429", "left alone, it takes no requests", "left alone, it takes no requests"
        ]  # fmt: skip
        assert server.asked == 1


def test_a_restart_in_mid_step_costs_no_score(monkeypatch):
    monkeypatch.setattr(judge_server, "DOWN_AFTER", 1000)
    with judged([*[None] * 10, "restart", None], concurrency=8, max_retries=12) as (judge, server):
        assert logic_scores(Scorer(judge), 40) == [0.8] * 40
        assert server.injected == {"restart": 1} and ask(judge, 99).score == 0.8


# ---------------------------------------------------------------------------------------------- servers that are down, and several


def test_connections_are_kept_and_a_stale_one_costs_no_try():
    with judged([None], max_retries=0) as (judge, server):
        for number in range(5):
            assert ask(judge, number).score == 0.8
            assert len(server.server.open) == 1  # that of the first request
        server.restart()
        assert ask(judge, 5).score == 0.8 and stats(judge)["faults"] == {}


def test_a_server_that_is_down_is_left_alone(capfd, soon_down):
    with judged([None], max_retries=0) as (judge, server):
        server.down()
        errors = [ask(judge, i).error for i in range(20)]
        assert [error.partition(": ")[2] for error in errors] == ["ConnectionRefusedError"] * 4 + [
            "left alone, nobody was there"
        ] * 16
        found = stats(judge)
        assert found["faults"] == {"refused": 4} and found["failures"] == 20
        [line] = capfd.readouterr().out.splitlines()
        assert line == (
            f"judge {server.url}: nobody there 4 times in a row, the last: ConnectionRefusedError; left alone "
            "for 3600 s at a time"
        )
        rest_is_over(judge)
        assert [ask(judge, i).score for i in range(3)] == [None] * 3
        assert stats(judge)["faults"] == {"refused": 1}  # the first found that nothing has changed
        server.up()
        assert ask(judge).score is None and server.asked == 0
        rest_is_over(judge)
        assert [ask(judge, i).score for i in range(3)] == [0.8] * 3
        assert capfd.readouterr().out == ""


def test_the_small_question_ends_the_rest(soon_down):
    with judged([None], max_retries=0) as (judge, server):
        server.down()
        assert [ask(judge, i).score for i in range(5)] == [None] * 5
        server.up()
        assert ask(judge).score is None
        judge.check()
        assert ask(judge).score == 0.8


def test_a_step_with_a_hanging_server_takes_far_less_than_every_timeout(soon_down, monkeypatch):
    monkeypatch.setattr(judge_server, "DOWN_AFTER", 8)
    with judged(["hang"], timeout=0.2, concurrency=8, max_retries=4) as (judge, server):
        started = time.monotonic()
        assert logic_scores(Scorer(judge), 40) == [None] * 40
        assert time.monotonic() - started < 2.0  # every timeout: 40 questions, 5 tries, 8 at a time: 5 s
        assert server.asked <= 16  # of 200: those that were on their way when it was left alone


def test_a_reply_of_any_kind_starts_the_count_anew(capfd, soon_down):
    script = ["hang", "hang", "hang", "no score", "hang", "hang", "hang", "500", None]
    with judged(script, max_retries=0, timeout=0.3) as (judge, _):
        assert [ask(judge, i).score for i in range(10)] == [None] * 8 + [0.8] * 2
    assert capfd.readouterr().out == ""


def test_several_urls_are_asked_in_turn():
    with judged([None], [None], [None]) as (judge, *servers):
        assert [ask(judge, i).score for i in range(9)] == [0.8] * 9
        assert [server.asked for server in servers] == [3, 3, 3]


def test_a_dead_url_costs_no_score_and_is_soon_left_alone(capfd, soon_down):
    with judged([None], [None], max_retries=0) as (judge, dead, alive):
        dead.down()
        judge.check()
        assert [ask(judge, i).score for i in range(20)] == [0.8] * 20
        found = stats(judge)
        assert found["failures"] == 0 and found["faults"] == {"refused": 3}  # the fourth was check's
        [line] = capfd.readouterr().out.splitlines()
        assert line.startswith(f"judge {dead.url}: nobody there 4 times in a row, the last: ConnectionRefusedError")
        alive.down()
        assert ask(judge).score is None
        with pytest.raises(
            JudgeError, match=f"no judge at {dead.url}, {alive.url}: 127.0.0.1:.*ConnectionRefusedError"
        ):
            judge.check()
        dead.up()
        alive.up()


def test_a_refusal_of_one_url_is_left_to_the_others():
    with judged(["404"], [None]) as (judge, wrong, right):
        assert [ask(judge, i).score for i in range(4)] == [0.8] * 4
        assert (wrong.asked, right.asked) == (2, 4)


# ---------------------------------------------------------------------------------------------- a run without its judge


@pytest.fixture(autouse=True)
def quick_heartbeat(monkeypatch):
    monkeypatch.setattr(scoring, "HEARTBEAT", 0.02)


SAMPLE = Sample("s", "why?", "multiple choice", None, "<answer>A</answer>", "text")


def step(scorer, count, first=0):
    """The logic scores of a step that asks for `count`, and for as many by rule."""
    scores = [
        [scorer.submit(name, think(first + i), SAMPLE) for name in ("logic", "format", "accuracy")]
        for i in range(count)
    ]
    scorer.wait_for_scores([score for three in scores for score in three])
    assert all(score.result().value is not None for _, *by_rule in scores for score in by_rule)
    return [three[0].result().value for three in scores]


def scorer_of(judge, **settings):
    """A Scorer whose judge has other settings than at first."""
    vars(judge.config).update(settings)
    return Scorer(judge)


def test_scores_may_be_missing_up_to_a_share_of_the_window():
    script = [None] * 8 + ["404"] * 2 + [None] * 10 + ["404"] * 2 + [None] * 8 + ["404", None]
    with judged(script, concurrency=1) as (judge, server):
        scorer = scorer_of(judge, on_judge_down="stop", max_missing=0.2, missing_window=2)
        assert step(scorer, 10).count(None) == 2  # a fifth: as many as may be
        assert step(scorer, 10).count(None) == 0
        assert step(scorer, 10).count(None) == 2
        with pytest.raises(JudgeError) as error:
            step(scorer, 1)  # 3 of 11; what the rules scored doesn't count
        assert str(error.value) == (
            "3 of 11 judged scores of the last 2 steps are missing, more than "
            f"judge.max_missing 0.2; the last: 127.0.0.1:{server.port}: HTTP 404"
        )


def test_a_step_that_misses_nothing_never_stops_a_run():
    with judged(["404"] * 2 + [None], concurrency=1) as (judge, _):
        scorer = scorer_of(judge, on_judge_down="continue", max_missing=0.1)
        assert step(scorer, 10).count(None) == 2
        judge.config.on_judge_down = "stop"
        assert step(scorer, 2).count(None) == 0  # 2 of 12 in the window, which is more than a tenth


def test_continue_leaves_out_what_is_missing(capfd):
    with judged(["404", None], concurrency=1, on_judge_down="continue", max_missing=0.0) as (judge, _):
        assert step(Scorer(judge), 3) == [None, 0.8, 0.8]
    assert capfd.readouterr().out == ""


def test_waiting_ends_with_every_score(capfd, soon_down):
    with judged([None] * 3 + ["outage", None], concurrency=1, max_retries=1) as (judge, server):
        beats = []
        scorer = Scorer(judge, heartbeat=lambda phase: (beats.append(phase), len(beats) == 20 and server.up()))
        assert step(scorer, 12) == [0.8] * 12
        assert set(beats) == {"judge"}
        faults = stats(judge)["faults"]
        assert faults["refused"] >= 4 and faults.keys() == {"reset", "refused"}
    down, waiting, back = capfd.readouterr().out.splitlines()
    assert down.startswith(f"judge {server.url}: nobody there 4 times in a row")
    assert re.fullmatch(r"waiting for the judge: 9 of 12 judged scores of the last 1 steps are missing, .*", waiting)
    assert back == "the judge is back: asking again for what is missing"


def test_a_judge_that_answers_without_scores_is_not_waited_for():
    with judged(["no score"], max_retries=0) as (judge, server):
        with pytest.raises(
            JudgeError, match="3 of 3 .* states no score: .*I would say 0 or 1.*; the judge answers, so"
        ):
            step(Scorer(judge), 3)
        assert server.asked == 3


def test_one_reply_without_a_score_is_quoted(capfd):
    with judged([None, None, "no score", None], concurrency=1) as (judge, server):
        scorer = scorer_of(judge, max_missing=0.5)
        assert step(scorer, 4).count(None) == 1
        server.script = ["no score", None]
        assert step(scorer, 4, first=4).count(None) == 1
    [line] = capfd.readouterr().out.splitlines()
    assert line == (
        f'a judged score is missing: 127.0.0.1:{server.port}: the reply states no score: "I would say 0 or 1"'
    )


def test_an_outage_is_waited_for_although_some_replies_state_no_score(capfd, soon_down):
    script = ["no score", *[None] * 9, "outage", None]
    with judged(script, concurrency=1, max_retries=0, max_missing=0.1, missing_window=1) as (judge, server):

        def revive(phase):
            with server.changing:  # it is down as a whole
                if server.stopped.is_set():
                    server.up()

        scorer = Scorer(judge, heartbeat=revive)
        assert step(scorer, 16) == [None] + [0.8] * 15
        assert server.asked == 16 + 2  # and whether it is back, and what was cut off by the outage
    assert "the judge is back" in capfd.readouterr().out


def test_counts_of_faults_reach_the_metrics():
    with judged(["500", "html", "html", None], concurrency=1) as (judge, _):
        scorer, means = Scorer(judge), Means()
        step(scorer, 2)
        scorer.log_stats(means)
        metrics = means.reduce()
    assert {name: metrics.pop(f"judge/faults/{name}") for name in FAULTS} == dict.fromkeys(FAULTS, 0.0) | {
        "http_5xx": 1.0,
        "no_completion": 2.0,
    }
    assert metrics["judge/failure_rate"] == 0


@pytest.mark.slow
def test_two_ranks_wait_together_for_longer_than_their_groups_timeout_and_stop_together():
    with FaultyJudge([None] * 15 + ["outage", None]) as server, FaultyJudge([None] * 8 + ["404"]) as failing:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(ROOT / "tests" / "support" / "judge_ranks.py"),
            server.url,
            server.url,
            failing.url,
        ]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("waiting for the judge"):
                threading.Timer(1.5 * GROUP_TIMEOUT, server.up).start()
        process.stdout.close()
        assert process.wait(timeout=120) == 0, "\n".join(lines[-40:])
        found = sorted((json.loads(line) for line in lines if line.startswith("{")), key=lambda one: one["rank"])
    assert [one["wait"]["scores"] for one in found] == [[[0.8] * 4] * 3, [[0.8] * 8] * 3]
    assert sum(line.startswith("waiting for the judge") for line in lines) == 1
    assert min(one["wait"]["beats"] for one in found) > 10
    assert found[0]["times out"]  # a rank that shows no sign of life for as long is given up
    assert [len(one["stop"]["scores"]) for one in found] == [1, 1]
    assert found[0]["stop"]["error"] == found[1]["stop"]["error"]
    assert found[0]["stop"]["error"].startswith(
        "8 of 24 judged scores of the last 2 steps are missing, more than "
        f"judge.max_missing 0.1; the last: 127.0.0.1:{failing.port}: "
    )


# ---------------------------------------------------------------------------------------------- the toy


SLOW = [kind for kind in FAULTY if KIND[kind] in ("timeout", "http_429")]
RATES = {kind: 0.002 if kind in (*SLOW, "restart") else 0.015 for kind in FAULTY if kind != "outage"}


def toy_run(script, config, *overrides, watch=lambda line: None):
    """A script with configs/toy/`config`.json on two processes; its output."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        f"configs/toy/{config}.json",
        *overrides,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JUDGE_KEY": KEY}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        watch(line)
    process.stdout.close()
    assert process.wait(timeout=60) == 0, "\n".join(lines[-40:])
    return lines


def stage2(folder, name, server, *overrides, watch=lambda line: None):
    """Stage 2 with the judge `server`, then an evaluation with one that fails nobody: (accuracy, stage 2's output)."""
    data = [{"path": str(folder / "world" / "train_rl.json"), "slice": "first:50%"}]
    lines = toy_run(
        "train_grpo.py",
        "stage2",
        f"model={folder / 'stage1' / 'model'}",
        f"data={json.dumps(data)}",
        f"output_dir={folder / name}",
        f"judge.url={server.url}",
        "judge.api_key_env=JUDGE_KEY",
        *overrides,
        watch=watch,
    )
    data = [{"path": str(folder / "world" / "eval.json")}]
    with toy.RuleJudge() as judge:
        toy_run(
            "evaluate.py",
            "eval",
            f"model={folder / name / 'model'}",
            f"data={json.dumps(data)}",
            f"output_dir={folder / name / 'eval'}",
            f"judge.url={judge.url}",
        )
    predictions = toy.read_predictions(folder / name / "eval" / "predictions.jsonl")["eval"]
    return toy.scores_of(predictions)["accuracy"], lines


@pytest.fixture(scope="module")
def toy_stage1(tmp_path_factory):
    """A folder with the toy's world and the model that its stage 1 ends with."""
    folder = tmp_path_factory.mktemp("toy")
    toy.build_world(folder / "world")
    toy_run(
        "train_sft.py",
        "stage1",
        f"model={folder / 'world' / 'model'}",
        f"output_dir={folder / 'stage1'}",
        f"data={json.dumps([{'path': str(folder / 'world' / 'train_sft.json')}])}",
    )
    return folder


@pytest.mark.slow
def test_the_toy_learns_as_well_from_a_judge_with_every_fault(toy_stage1):
    with FaultyJudge() as server:
        expected, _ = stage2(toy_stage1, "without", server)
    with FaultyJudge(rates=RATES, outage_at=1500) as server:
        accuracy, lines = stage2(
            toy_stage1,
            "with",
            server,
            "judge.timeout=3",
            "judge.max_retries=1",
            "judge.max_missing=0.15",
            watch=lambda line: line.startswith("waiting for the judge") and server.stopped.is_set() and server.up(),
        )
    print(f"accuracy {expected} without faults, {accuracy} with {server.injected}")
    assert accuracy == pytest.approx(expected, abs=0.1)
    assert_faults_are_counted(toy_stage1 / "with", server)
    assert_missing_is_never_zero(toy_stage1 / "with")
    output = "\n".join(lines)
    assert KEY not in output and "voice" not in output  # a word of every prompt
    assert output.count("waiting for the judge") == output.count("the judge is back") >= 1
    assert len(lines) < 150  # no line a request


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_faults_are_counted(run, server):
    metrics = read(run / "metrics.jsonl")
    counted = {kind: sum(step[f"judge/faults/{kind}"] for step in metrics) for kind in FAULTS}
    assert server.injected.keys() == FAULTY.keys() and all(counted[kind] for kind in KIND.values())
    assert sum(counted.values()) >= server.injected.total()  # a restart also resets what else is in flight


def assert_missing_is_never_zero(run):
    """Each judged score is what a judge without faults gives, or missing; as many are missing as the metrics say."""
    missing, metrics, pending = 0, read(run / "metrics.jsonl"), []
    with toy.RuleJudge() as server:
        scorer = Scorer(Judge(JudgeConfig(url=server.url), load_prompts("configs/toy/prompts.json")))
        for record in read(run / "rollouts.jsonl"):
            sample = Sample("s", "", record["problem_type"], record["options"], record["solution"], "text")
            for completion in record["completions"]:
                for name, value in completion["rewards"].items():
                    missing += value is None
                    text = completion["text"].removesuffix("<|im_end|>")
                    pending.append((value, name, text, scorer.submit(name, text, sample)))
        for value, name, text, score in pending:
            assert value in (None, score.result().value), (name, text)
    said = sum(step[f"rewards/{name}/missing"] for step in metrics for name in ("context", "logic", "accuracy"))
    assert missing == round(64 * said) > 0  # completions a step
