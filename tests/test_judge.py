"""The judge's client against a server on the loopback that is slow, down, wrong and rude."""

import json
import logging
import math
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from hov2 import judge as judge_module
from hov2.config import JudgeConfig
from hov2.distributed import Means, WriteError
from hov2.judge import CompletionJudge, Judge, JudgeError, JudgeReply, parse_score
from hov2.prompts import load_prompts
from hov2.rewards import Completion, context_reward, logic_reward
from hov2.scoring import Scorer
from tests.support.judge_faults import stats

KEY = "sk-very-secret-0123456789"
SECRET_TEXT = "the woman in the green coat hides a letter"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("4", 4), ("0", 0), ("5", 5), ("4.5", 4.5), ("4.0", 4), (" 4\n", 4), ("4.", 4), ("**4**", 4), ("`4`", 4),
        ("Score: 4", 4),
        ("score is 4 out of 5", 4), ("**Score:** 4", 4), ("4/5", 4), ("4 / 5", 4), ("4 out of 5", 4),
        ("Score: 4 (out of 5)", 4),
        ("The score is 3.", 3), ("5/5", 5), ('{"score": 4}', 4), ("[4]", 4), ("4 points", 4),
        ("Rating: 2.5/5.0", 2.5), ("I'd say 4/5", 4),
        ("4\n\nThe candidate misses the dog.", 4), ("Score: 4. It does not mention the dog.", 4),
        ("Score: 4\nFinal score: 4", 4),
        ("", None), ("  ", None), ("6", None), ("5.1", None), ("-1", None), ("−1", None), ("- 1", None),
        ("10/10", None), ("4/10", None),
        ("8/10", None), ("4 or 5", None), ("4-5", None), ("4–5", None), ("3 to 4", None), ("3\n4", None),
        ("4,5", None), ("4.5.6", None),
        ("nan", None), ("inf", None), ("four", None), ("None", None), ("True", None), ("80%", None), ("4%", None),
        ("4th", None), ("v4", None),
        ("<html><body>4</body></html>", None), ("<p>4", None), ("Score: 4, but 3 clues are missing", None),
        ("1. yes\n2. no", None),
        ("not 4", None), ("less than 4 points", None), ("I can't give a score of 4", None),
        ("Error: score service code 3", None),
        ("The candidate names 4 of the clues", None), ("retry in 2 seconds", None), ("４", None), ("1e0", None),
        ("0x4", None),
        ("4" * 5000, None),
        # the score first, or last, and other numbers beside it
        ("The score is 4.\n\nMia has 7 pens", 4), ("The score is 4. Mia has 7 pens.", 4),
        ("Score: 3/5\n\nThe candidate names 3 of the 4 clues.", 3), ("4\nThe 4-year-old boy holds 2 toys.", 4),
        ("Score: 4. The man in his 20s smiles for the 2nd time.", 4), ("It names 2 people.\nScore: 4", 4),
        ("The candidate misses the dog. The score is 4.", 4), ("1. Yes\n2. Yes\n3. No\n\nScore: 2", 2),
        ("Question 1: Yes\nQuestion 2: No\nScore: 1", 1), ("Score: 4. Or rather 3.", None),
        ("Score: 4. Actually, make that three.", None), ("The score is not 4. It is 3.", None),
        ("Score: 4\nScore: 3", None), ("The candidate scores points for 3 details", None), ("I give 4 reasons", None),
        # the rubric's own lines
        ("4: nearly all; small details are missing or off", 4), ("4 - nearly all", 4), ("4 – nearly all", 4),
        ("4 (nearly all; small details are off)", 4), ("0: nothing, or a different scene", 0),
        ("5: all that matters, and nothing that contradicts it", 5), ("5: all that matters\n4: nearly all", None),
        ("1: yes", None), ("1: yes\n2: no", None), ("4-year-old boy", None), ("4 - 5", None),
        # sums
        ("1 + 1 + 1 + 0 + 1 = 4", 4), ("**1 + 1 + 1 + 0 + 1 = 4**", 4), ("Total: 1 + 1 + 0 + 0 + 1 = 3/5", 3),
        ("The sum of the points is 1 + 1 + 1 + 0 + 1 = 4.", 4), ("4 (1 + 1 + 1 + 0 + 1)", 4),
        ("1 + 1 + 1 + 0 + 1 = 5", None), ("1 + 1 + 1 + 0 + 1", None), ("Score: 1 + 1 + 1", None), ("4+", None),
        ("1. Yes (1 point)\n2. No (0 points)\n3. Yes (1 point)\n\nTotal: 2", 2),
        ("1. 1\n2. 0\n3. 1\n4. 1\n5. 1\nTotal: 4", 4), ("Question 1: 1\nQuestion 2: 0\nScore: 1", 1),
        ("1. 1\n2. 0\n3. 1\nTotal: 3", None), ("1. 1\n2. 0\n3. 1", None), ("1. 4", None),
        ("1. Yes (1 point)\n2. No (0 points)\n3. Yes (1 point)\n\nTotal: 3", None), ("heard? Yes (1 point)", None),
        # other ways to say it
        ("**Score: 4**", 4), ("I'd give it a 4.", 4), ("Rating: 4 (good)", 4), ("Final answer: 4", 4), ("- Score: 4", 4),
        ("$\\boxed{4}$", 4), ("Score = 4", 4), ("4/5 stars", 4), ("My rating is 4 because the dog is missing.", 4),
        # not what is stated
        ("The maximum score is 5.", None), ("The score would be 4 if it named the dog.", None), ("Is the score 4?", None),
        ("The score is at least 4.", None), ("The score is between 3 and 4.", None), ("Score: 3-4", None),
        ("Reply with the score, a number from 0 to 5.", None), ("I'm sorry for your loss", None),
        ("Give one point for each question that you answer with yes:\n1. Does the reasoning use clues", None),
        # reasoning ahead of it
        ("<think>3 or 4? 4.</think>\n\n4", 4), ("3 is low.</think>\n4", 4), ("[THINK]3[/THINK]4", 4),
        ("<think></think>4", 4), ("<think>4", None), ("<think>3</think>", None), ("4<think>3</think>", None),
    ],
)  # fmt: skip
def test_parse_score(reply, score):
    assert parse_score(reply) == score


@pytest.mark.parametrize(
    "piece", ["1 + ", "a ", "4 of ", "<think>", "9.", "- ", "(", "I give ", "\n", "1. a-", "Score: 4. "]
)
def test_parse_score_takes_no_time_for_a_long_reply(piece):
    started = time.monotonic()
    parse_score(piece * 3000)
    assert time.monotonic() - started < 1.0


def test_parse_score_of_another_range():
    assert parse_score("2/3", maximum=3) == 2
    assert parse_score("7 pairs", maximum=8) == 7
    assert parse_score("4", maximum=3) is None
    assert parse_score("2/5", maximum=3) is None


# ---------------------------------------------------------------------------------------------- a server


def chat(text, finish_reason="stop"):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, {}, json.dumps({"choices": [choice]})


class Server(ThreadingHTTPServer):
    """Answers with `script`, one step a request, then with its last step for ever. A step is (status, headers, body) or
    a function of the handler."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock = list(script), [], threading.Lock()
        self.now, self.most = 0, 0  # requests in flight
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that gave up


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((time.monotonic(), self.path, dict(self.headers), body))
            step = server.script.pop(0) if len(server.script) > 1 else server.script[0]
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            self.answer(*step) if isinstance(step, tuple) else step(self)
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, status, headers, body, length=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@contextmanager
def judged(*script, first_delay=0.001, **config):
    """(judge, server) with a server that follows `script`."""
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    judge = Judge(JudgeConfig(**{"url": server.url, "timeout": 5.0, **config}), load_prompts(), first_delay=first_delay)
    try:
        yield judge, server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(judge, text=SECRET_TEXT):
    return judge.score("consistency", reference="a", answer=text)


def logic_scores(judge, count):
    """As a step of training asks for them, all at once."""
    scorer = Scorer(judge)
    scores = [scorer.submit("logic", f"<context>{i}</context><think>t</think>", None) for i in range(count)]
    return [score.result().value for score in scores]


def reset(handler):
    handler.connection.setsockopt(1, 13, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # SO_LINGER 0: closing sends a reset
    handler.connection.close()


def hang(handler):
    time.sleep(0.6)
    handler.answer(*chat("1"))


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(2000):
        handler.wfile.write(b"x" * 8)
        handler.wfile.flush()
        time.sleep(0.01)


def half(handler):
    status, headers, body = chat("4")
    handler.answer(status, headers, body[: len(body) // 2], length=len(body))


# ---------------------------------------------------------------------------------------------- asking


def test_a_score_and_what_was_asked_for_it():
    with judged(chat("Score: 4/5"), model="grader") as (judge, server):
        reply = ask(judge)
        assert (reply.score, reply.raw, reply.error) == (0.8, "Score: 4/5", None)
        [(_, path, headers, body)] = server.requests
        assert path == "/v1/chat/completions"
        assert (body["model"], body["temperature"]) == ("grader", 0)
        assert body["messages"] == load_prompts().judge_messages("consistency", reference="a", answer=SECRET_TEXT)
        assert "Authorization" not in headers


def test_all_requests_of_a_step_are_in_flight_at_once():
    everyone = threading.Barrier(12)

    def wait_for_everyone(handler):
        everyone.wait(timeout=5)  # passes only if all 12 requests are there
        handler.answer(*chat("3"))

    with judged(wait_for_everyone, concurrency=12) as (judge, server):
        assert logic_scores(judge, 12) == [0.6] * 12
        assert server.most == 12


def test_no_more_than_concurrency_requests_are_in_flight():
    def slow(handler):
        time.sleep(0.02)
        handler.answer(*chat("3"))

    with judged(slow, concurrency=3) as (judge, server):
        assert logic_scores(judge, 9) == [0.6] * 9
        assert server.most <= 3


@pytest.mark.parametrize(
    "failure",
    [
        (500, {}, "oops"), (503, {}, ""), (408, {}, ""), (429, {}, ""), (200, {}, "<html>Bad gateway</html>"),
        (200, {}, ""),
        (200, {}, "[]"), (200, {}, '{"choices": []}'), (200, {}, '{"error": "overloaded"}'),
        (200, {}, '{"choices": [{"message": null}]}'),
        (200, {}, '{"choices": [{"message": {"content": null}}]}'), half, reset,
    ],
    ids=lambda step: step.__name__ if callable(step) else f"{step[0]} {step[2][:40]}",
)  # fmt: skip
def test_failures_that_pass_are_tried_again(failure):
    with judged(failure, failure, chat("4")) as (judge, server):
        assert ask(judge).score == 0.8
        assert len(server.requests) == 3
        assert stats(judge)["failures"] == 0


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ((500, {}, SECRET_TEXT), "HTTP 500"), (half, "IncompleteRead"),
        ((200, {}, "<html>"), "the reply is no chat completion"), (reset, "ConnectionResetError"),
    ],
)  # fmt: skip
def test_failures_that_stay_are_a_missing_score_never_zero(failure, reason):
    with judged(failure, max_retries=2) as (judge, server):
        reply = ask(judge)
        assert reply.score is None
        assert reply.error == f"127.0.0.1:{server.server_address[1]}: {reason}"
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302])
def test_a_refusal_is_not_tried_again(status):
    with judged((status, {"Location": "http://127.0.0.1:9/v1"}, SECRET_TEXT), chat("4")) as (judge, server):
        reply = ask(judge)
        assert reply.score is None and reply.error.endswith(f": HTTP {status}")
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        ("I would say 4 or 5", "stop", "the reply states no score"),
        ("", "stop", "the reply states no score"),
        ("7", None, "the reply states no score"),
        ("<think>Well, 4", "stop", "the reply states no score"),
        (
            "heard? Yes (1 point)",
            "length",
            "the reply was cut off (finish_reason 'length'); judge.max_tokens is its limit",
        ),
        ("4", "length", "the reply was cut off (finish_reason 'length'); judge.max_tokens is its limit"),
        (
            "4",
            "content_filter",
            "the reply was cut off (finish_reason 'content_filter'); judge.max_tokens is its limit",
        ),
    ],
)
def test_a_reply_without_a_score_is_not_asked_for_again(tmp_path, text, finish_reason, reason):
    with judged(chat(text, finish_reason), chat("4"), cache=str(tmp_path)) as (judge, server):
        reply = ask(judge)
        assert reply.score is None and reply.error.endswith(f": {reason}") and not reply.is_down
        assert reply.raw == (text or "(empty)") and text[:20] in reply.words
        assert len(server.requests) == 1 and list(tmp_path.iterdir()) == []


def test_another_server_is_asked_once_where_one_states_no_score():
    with judged(chat("no idea")) as (_, chatty), judged(chat("4")) as (_, good):
        urls = [chatty.url, good.url]
        judge = Judge(JudgeConfig(urls=urls), load_prompts(), first_delay=0.001)
        assert [ask(judge, str(number)).score for number in range(4)] == [0.8] * 4
        assert (len(chatty.requests), len(good.requests)) == (2, 4)


def test_the_rest_of_a_reply_that_drips_is_not_waited_for():
    with judged(drip, timeout=0.2, max_retries=0) as (judge, _):
        before = threading.active_count()
        assert ask(judge).error.endswith("no reply within 0.2 s")
        deadline = time.monotonic() + 5
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert threading.active_count() <= before  # the server's thread, too: its client has gone


# ---------------------------------------------------------------------------------------------- what servers and models need


def message(**fields):
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant"} | fields, "finish_reason": "stop"}]})


def test_a_judge_that_reasons_is_told_from_one_that_replies(monkeypatch):
    thoughts = message(content=None, reasoning_content="The candidate names 3 clues")
    with judged(thoughts) as (judge, server):
        with pytest.raises(JudgeError) as error:
            judge.check()
        assert len(server.requests) == 1
        assert "all reasoning, no content (finish_reason 'stop'); judge.max_tokens" in str(error.value)
        assert '"The candidate names 3 clues"' in str(error.value) and "\n" not in str(error.value)
    with judged(chat("<think>Let me see. The candidate", "length"), max_tokens=32) as (judge, server):
        with pytest.raises(JudgeError) as error:
            judge.check()
        assert server.requests[0][3]["max_tokens"] == 32
        assert "cut off (finish_reason 'length')" in str(error.value) and "Let me see." in str(error.value)
        assert "judge.max_tokens (now 32)" in str(error.value)
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "3"}]}, {"type": "text", "text": "4"}]
    for reply in (chat("<think>3 or 4?</think>\n\n4"), message(content="4", reasoning="3"), message(content=parts)):
        with judged(reply, max_tokens=4096) as (judge, _):
            judge.check()
            assert logic_scores(judge, 128) == [0.8] * 128


def refuses(name, message):
    """A server that refuses a field of the request, in its own words."""

    def answer(handler):
        body = handler.server.requests[-1][3]
        if name in body or any(message["role"] == "system" for message in body["messages"]):
            handler.answer(400, {}, json.dumps({"error": {"message": message, "code": 400}}))
        else:
            handler.answer(*chat("4"))

    return answer


@pytest.mark.parametrize("name", ["max_tokens", "temperature"])
def test_fields_that_a_server_refuses_can_be_left_out(name):
    words = f"Unsupported parameter: '{name}' is not supported with this model."
    with judged(refuses(name, words)) as (judge, _):
        with pytest.raises(JudgeError) as error:
            judge.check()
        assert f'HTTP 400: "{words}"' in str(error.value) and "judge.extra_body" in str(error.value)
    extra = {name: None, "max_completion_tokens": 1024, "chat_template_kwargs": {"enable_thinking": False}}
    with judged(refuses(name, words), extra_body=extra) as (judge, server):
        judge.check()
        body = server.requests[0][3]
        assert body["max_completion_tokens"] == 1024 and body["chat_template_kwargs"] == {"enable_thinking": False}
        assert body.keys() == {"model", "messages", "temperature", "max_tokens", *extra} - {name}


def test_the_first_question_needs_a_score():
    with judged(chat("I'm sorry for your loss")) as (judge, server):
        with pytest.raises(JudgeError, match="the reply states no score: .*I'm sorry for your loss.*from 0 to 5"):
            judge.check()
        [request] = server.requests
        assert load_prompts().words["judge"]["context"].splitlines()[0] in request[3]["messages"][0]["content"]
    with judged((400, {}, '{"message": "This model\'s maximum context length is 2048 tokens."}')) as (judge, _):
        reply = ask(judge)
        assert not reply.is_down and reply.words == '"This model\'s maximum context length is 2048 tokens."'


def test_words_of_a_server_that_repeat_the_prompt_are_not_quoted():
    echo = json.dumps({"message": f"can't score: {SECRET_TEXT}"})
    for step in (chat(f"The answer, '{SECRET_TEXT}', is 3 or 4"), (400, {}, echo), (400, {}, json.dumps(echo))):
        with judged(step) as (judge, _):
            reply = ask(judge)
            assert reply.error and reply.words == ""
    with judged(chat("say 4 or 5\n" + "so " * 500)) as (judge, _):
        assert len(ask(judge).words) < 220


def test_a_hanging_server_is_given_up_in_time():
    with judged(hang, timeout=0.1, max_retries=1) as (judge, server):
        started = time.monotonic()
        reply = ask(judge)
        assert time.monotonic() - started < 0.5
        assert reply.score is None and reply.error.endswith(": no reply within 0.1 s")
        assert len(server.requests) == 2 and 0.2 <= reply.latency < 0.5


def test_retry_after_is_waited_for():
    with judged(
        (429, {"Retry-After": "1"}, ""), (429, {"Retry-After": "soon"}, ""), (429, {"Retry-After": "٣"}, ""), chat("5")
    ) as (judge, server):
        assert ask(judge).score == 1.0
        first, second, third, fourth = (request[0] for request in server.requests)
        assert 1.0 <= second - first < 2.0
        assert third - second < 0.5 and fourth - third < 0.5


def test_the_waits_double_and_are_the_same_every_time(monkeypatch):
    def waits_of_one_run():
        with judged((500, {}, ""), max_retries=4, first_delay=8.0) as (judge, _):
            waits = []
            monkeypatch.setattr(judge_module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))
            ask(judge)
            return waits

    waits = waits_of_one_run()
    assert all(8 * 2**i / 2 <= wait <= 8 * 2**i for i, wait in enumerate(waits[:2]))
    assert len(waits) == 4 and waits[3] == 30.0  # capped
    assert waits_of_one_run() == waits


def test_a_dead_server_is_missing_and_check_names_it():
    with judged(chat("4")) as (_, server):
        url = server.url
    judge = Judge(JudgeConfig(url=url, max_retries=1), load_prompts(), first_delay=0.001)
    assert ask(judge).error == f"127.0.0.1:{server.server_address[1]}: ConnectionRefusedError"
    message = f"no judge at {url}: .*ConnectionRefusedError; judge.url is .*http://localhost:8000/v1"
    with pytest.raises(JudgeError, match=message):
        judge.check()


def test_check():
    with judged((503, {}, "loading"), chat("4")) as (judge, server):
        judge.check()
        assert len(server.requests) == 2
        assert stats(judge)["requests"] == 0
    with judged((404, {}, "")) as (judge, _), pytest.raises(JudgeError, match="HTTP 404; judge.url is what"):
        judge.check()


def test_replies_are_counted_since_the_last_call():
    with judged(chat("4"), (400, {}, ""), chat("5")) as (judge, _):
        replies = [ask(judge, str(i)) for i in range(4)]
        assert [reply.score for reply in replies] == [0.8, None, 1.0, 1.0]
        scorer, means = Scorer(judge), Means()
        scorer.log_stats(means)
        metrics = means.reduce()
        assert metrics["judge/failure_rate"] == 0.25 and metrics["judge/faults/http_other"] == 1
        assert metrics["judge/latency"] == pytest.approx(sum(reply.latency for reply in replies) / 4)
        assert metrics["judge/latency"] > 0 and judge.take_replies() == []
        scorer.log_stats(means)
        metrics = means.reduce()
        assert math.isnan(metrics["judge/failure_rate"]) and metrics["judge/faults/http_other"] == 0


# ---------------------------------------------------------------------------------------------- cache


def test_the_cache_saves_requests_and_holds_scores_only(tmp_path):
    with judged(chat(f"Score: 4. {SECRET_TEXT}"), cache=str(tmp_path / "scores")) as (judge, server):
        assert ask(judge).score == 0.8
        assert ask(judge) == JudgeReply(0.8)
        assert len(server.requests) == 1
        assert stats(judge)["requests"] == 1
        ask(judge, "another answer")
        assert len(server.requests) == 2
        files = list((tmp_path / "scores").iterdir())
        assert [json.loads(file.read_text()) for file in files] == [{"score": 0.8}] * 2
        assert all(len(file.stem) == 64 and file.suffix == ".json" for file in files)


def test_the_cache_outlives_a_judge_and_tells_judges_apart(tmp_path):
    with judged(chat("4")) as (_, server), judged(chat("2")) as (_, other):
        config = {"url": server.url, "cache": str(tmp_path), "model": "a"}
        for change, score, requests in (
            ({}, 0.8, 1), ({}, 0.8, 1), ({"model": "b"}, 0.8, 2), ({"extra_body": {"seed": 1}}, 0.8, 3),
            ({"max_tokens": 999, "timeout": 9.0}, 0.8, 3), ({"url": other.url}, 0.4, 3),
        ):  # fmt: skip
            judge = Judge(JudgeConfig(**config | change), load_prompts())
            assert ask(judge).score == score
            assert len(server.requests) == requests


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"score": 7.0}', '{"score": NaN}', '{"score": "4"}', '{"score": true}', "\x00\xff"]
)
def test_a_broken_cache_file_is_asked_for_again_and_rewritten(tmp_path, content):
    with judged(chat("4"), chat("2"), cache=str(tmp_path)) as (judge, server):
        ask(judge)
        [file] = tmp_path.iterdir()
        file.write_text(content, encoding="latin-1")
        assert ask(judge).score == 0.4
        assert json.loads(file.read_text()) == {"score": 0.4}
        assert len(server.requests) == 2 and list(tmp_path.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_costs_no_score(tmp_path, monkeypatch, capsys):
    def full_disk(path, text):
        raise WriteError(f"{path}: can't be written: No space left on device")

    monkeypatch.setattr("hov2.judge.atomic_write", full_disk)
    with judged(chat("4"), cache=str(tmp_path)) as (judge, server):
        assert ask(judge).score == 0.8
        assert ask(judge).score == 0.8
        assert len(server.requests) == 2
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and "judge.cache" in said and "No space left" in said


def test_a_cache_that_cannot_be_made_is_said_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    config = JudgeConfig(url="http://localhost:1/v1", cache=str(tmp_path / "file"))
    with pytest.raises(WriteError, match="file: can't be written"):
        Judge(config, load_prompts())


def test_failures_are_not_cached(tmp_path):
    with judged((400, {}, ""), chat("4"), cache=str(tmp_path)) as (judge, _):
        assert ask(judge).score is None
        assert list(tmp_path.iterdir()) == []
        assert ask(judge).score == 0.8


# ---------------------------------------------------------------------------------------------- secrets


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)
    script = (chat("4"), (401, {}, KEY), reset, half, (500, {}, KEY), chat(KEY))
    with judged(*script, api_key_env="JUDGE_KEY", max_retries=0, cache=str(tmp_path)) as (judge, server):
        replies = [ask(judge, str(i)) for i in range(5)]
        assert {request[2]["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
        shown = [repr(judge), str(judge), repr(judge.config), caplog.text, *map(repr, replies)]
        assert len([reply for reply in replies if reply.error]) == 4
        assert not any(KEY in text for text in shown)
        with pytest.raises(JudgeError) as error:
            server.script = [(401, {}, KEY)]
            judge.check()
        assert KEY not in str(error.value) and KEY not in "".join(file.read_text() for file in tmp_path.iterdir())


def test_errors_and_logs_hold_no_prompt_text(caplog):
    caplog.set_level(logging.DEBUG)
    with judged((500, {}, SECRET_TEXT), reset, (400, {}, SECRET_TEXT), max_retries=0) as (judge, _):
        assert [SECRET_TEXT in ask(judge).error for _ in range(3)] == [False] * 3
    assert SECRET_TEXT not in caplog.text


def test_a_header_that_is_none_is_not_logged(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    body = chat("4")[2]
    reply = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n: {SECRET_TEXT}\r\n{SECRET_TEXT}\r\n\r\n{body}"
    with judged(lambda handler: handler.wfile.write(reply.encode()), max_retries=0) as (judge, _):
        ask(judge)
    assert SECRET_TEXT not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "JUDGE_KEY isn't set"), ("", "isn't set"), ("a\nb", "no HTTP header"), ("ключ", "no HTTP header")],
)
def test_an_unusable_key_is_an_error_at_once(monkeypatch, value, message):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match=message) as error:
        Judge(JudgeConfig(url="http://localhost/v1", api_key_env="JUDGE_KEY"), load_prompts())
    assert not value or value not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "",
        "ftp://x/v1",
        "http://",
        "http://:80/v1",
        "http://me:hush@x/v1",
        "http://x/v1?key=hush",
        "http://x:y/v1",
        "http://a b/v1",
        "http://x/ü",
    ],
)
def test_an_unusable_url_is_an_error_at_once(url):
    with pytest.raises(JudgeError, match="judge.url: expected a base like http://localhost:8000/v1") as error:
        Judge(JudgeConfig(url=url), load_prompts())
    assert "hush" not in str(error.value)


def test_only_the_config_is_honoured(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with judged(chat("4")) as (judge, _):
        assert ask(judge).score == 0.8


# ---------------------------------------------------------------------------------------------- rewards

FULL = "<context>a man waits</context><think>he is sad</think><answer>B</answer>"
REFERENCE = "<context>a man waits alone</context><think>t</think><answer>B</answer>"


def context_score(judge, text, solution):
    """The context reward; no request of it may have failed."""
    asked = CompletionJudge(judge)
    score = context_reward(Completion(text, SimpleNamespace(solution=solution), asked))
    assert asked.reply.error is None
    return score


def logic_score(judge, text):
    return logic_reward(Completion(text, None, CompletionJudge(judge)))


def test_context_and_logic_ask_with_the_blocks():
    with judged(chat("4"), chat("3")) as (judge, server):
        assert context_score(judge, FULL, REFERENCE) == 0.8
        assert logic_score(judge, FULL) == 0.6
        context, logic = (request[3]["messages"][0]["content"] for request in server.requests)
        assert "[Reference]\na man waits alone\n" in context and "[Candidate]\na man waits\n" in context
        assert "[Description]\na man waits\n" in logic and "[Reasoning]\nhe is sad\n" in logic


def test_missing_blocks_score_zero_without_a_request():
    with judged(chat("5")) as (judge, server):
        no_context, no_think = "<think>t</think>", "<context>c</context><think>cut"
        blank = "<context> </context><think>t</think>"
        assert [context_score(judge, text, REFERENCE) for text in (no_context, blank, "")] == [0.0] * 3
        assert [logic_score(judge, text) for text in (no_context, no_think, blank, "")] == [0.0] * 4
        assert server.requests == [] and stats(judge)["requests"] == 0


def test_a_reference_without_context_does_not_apply():
    with judged(chat("5")) as (judge, server):
        for solution in ("<answer>B</answer>", "B", "<context></context><answer>B</answer>"):
            assert context_score(judge, FULL, solution) is None
        assert server.requests == []


def test_consistency_is_a_share_of_five_or_missing():
    with judged(chat("2"), (400, {}, "")) as (judge, _):
        assert CompletionJudge(judge).consistency("a cat", "the cat") == 0.4
        assert CompletionJudge(judge).consistency("a dog", "the cat") is None


def test_synonyms_count_as_one():
    with judged(chat("1"), chat("3"), max_retries=0) as (judge, server):
        # one word shared, one pair of synonyms: 2 of 3 predicted, 2 of 2 expected: F1 = 4 / 5
        assert CompletionJudge(judge).synonyms({"sad", "joyful", "tired"}, {"sad", "happy"}) == pytest.approx(0.8)
        question = server.requests[0][3]["messages"][0]["content"]
        assert "[First list]\njoyful\ntired\n" in question and "[Second list]\nhappy\n" in question
        assert "from 0 to 1" in question
        assert CompletionJudge(judge).synonyms({"sad", "joyful"}, {"happy"}) is None  # 3 pairs of at most 1: no score
        assert CompletionJudge(judge).synonyms({"sad"}, {"sad", "happy"}) == pytest.approx(2 / 3)  # nothing to pair
        assert len(server.requests) == 2
