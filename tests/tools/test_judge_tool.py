"""hov2.tools.judge: real questions, each reply with its score or fault, and the figures below them."""

import json

import pytest

from hov2 import judge_server, toy
from hov2.tools import judge as tool
from tests.test_judge import chat, judged

SOLUTION = "<context>A smile, a rising voice.</context><think>The smile and the rising voice: thanks.</think><answer>A</answer>"


@pytest.fixture
def config(tmp_path):
    """A config's path, and a run's rollouts.jsonl beside it."""
    record = {"problem": "Why?", "problem_type": "multiple choice", "options": ["A. thanks", "B. anger"]}
    record |= {"solution": SOLUTION, "data_type": "text"}
    free = record | {"problem_type": "free-form", "options": None, "solution": "<answer>to thank her</answer>"}
    (tmp_path / "data.json").write_text(json.dumps([record, free]))
    rollout = {
        "sample": "s",
        "problem": "Why?",
        "problem_type": "multiple choice",
        "options": None,
        "solution": SOLUTION,
    }
    texts = [SOLUTION, SOLUTION.replace("rising", "falling"), "cut <context>off"]
    rollout |= {"completions": [{"text": text} for text in texts]}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(rollout) + "\n")
    path = tmp_path / "config.json"
    values = {"model": "m", "output_dir": "o", "data": [{"path": str(tmp_path / "data.json")}]}
    values |= {"reward_weights": {"format": 1.0}, "judge": {"url": "http://127.0.0.1:9/v1", "max_retries": 0}}
    values["judge"]["cache"] = str(tmp_path / "cache")
    path.write_text(json.dumps(values))
    return str(path)


def run(capsys, *arguments):
    code = tool.main([*arguments])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_the_toys_judge_gives_every_score(config, capsys):
    with toy.RuleJudge() as server:
        for _ in range(2):  # nothing comes from the cache
            code, lines, _ = run(capsys, config, f"judge.url={server.url}")
            assert code == 0 and lines[0].split() == ["question", "score", "seconds", "reply"]
            assert [line.split()[0] for line in lines[1:-1]] == ["context", "logic", "consistency"]
            assert all(line.endswith('"5"') for line in lines[1:-1])
            assert lines[-1].startswith("3 of 3 state a score (100%); seconds until then: median 0.")


def test_completions_of_a_run(config, capsys):
    rollouts = config.replace("config.json", "rollouts.jsonl")
    with toy.RuleJudge() as server:
        code, lines, _ = run(capsys, config, f"judge.url={server.url}", "--rollouts", rollouts)
        assert code == 0 and len(lines) == 2 + 4  # what is cut off is not asked about
        assert [line.split()[1] for line in lines[1:-1]] == ["1.00", "1.00", "0.50", "1.00"]
        _, lines, _ = run(capsys, config, f"judge.url={server.url}", "--rollouts", rollouts, "-n", "1")
        assert len(lines) == 3


def test_replies_without_a_score_are_shown(config, capsys):
    with judged(chat("Sure, here is\nmy score"), chat("4 it is, " + "so " * 99, "length"), (400, {}, "too long")) as (
        _,
        server,
    ):
        code, lines, _ = run(capsys, config, f"judge.url={server.url}", "judge.concurrency=1")
    assert code == 1 and lines[-1].startswith("0 of 3 state a score (0%)")
    rows = [line.split(maxsplit=3) for line in lines[1:-1]]
    assert [row[1] for row in rows] == ["no_score", "cut_off", "http_other"]
    assert rows[0][3] == '"Sure, here is\\nmy score"' and rows[1][3].endswith("...") and "too long" in rows[2][3]


def test_a_judge_that_is_not_there(config, capsys, monkeypatch):
    monkeypatch.setattr(judge_server, "DOWN_AFTER", 2)
    code, lines, _ = run(capsys, config, "judge.concurrency=1")
    assert code == 1 and lines[-1].startswith("0 of 3 state a score")
    rows = [line.split() for line in lines if "127.0.0.1:9: " in line]
    assert [row[1] for row in rows] == ["refused", "refused", "left"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["judge=null"], "it has no judge"),
        (["--rollouts", "missing.jsonl"], "missing.jsonl: not a run's rollouts.jsonl: FileNotFoundError"),
        (["data=[]"], "data: expected at least one data file"),
        (["judge.url=x"], "judge.url: expected a base like"),
        (["judge.extra_body=4"], "judge: extra_body: expected an object"),
    ],
)
def test_mistakes_are_one_line(config, capsys, arguments, message):
    code, lines, err = run(capsys, config, *arguments)
    assert code == 1 and lines == [] and err.startswith("error: ") and err.count("\n") == 1 and message in err
