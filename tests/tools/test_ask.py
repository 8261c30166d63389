"""ask.py: the text on the terminal is the one that was decoded, and every mistake is one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hov2.config import MediaConfig
from hov2.data.formats import DataError
from hov2.data.inputs import InputMaker
from hov2.model.encoder import Encoder
from hov2.model.rollout import Rollout, generate, sampling_for
from hov2.model.thinker import load_thinker
from hov2.prompts import load_prompts
from hov2.spans import completion_texts, completion_tokens
from hov2.tools import ask
from tests.support.helpers import synth_clip, tiny_thinker, tiny_tokenizer

ROOT = Path(__file__).parents[2]
QUESTION = "What does she intend?"
TIMING = re.compile(r"\[first token after \d+\.\d\d s; (\d+) tokens(, cut off at the limit)?; \d+\.\d tokens/s\]")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a tiny model, a clip, a sound, an image and a file that is none of these."""
    lab = tmp_path_factory.mktemp("ask")
    thinker = tiny_thinker()
    with torch.no_grad():
        thinker.lm_head.weight *= 20  # sure of itself: no ties to be decided by rounding
    thinker.save_pretrained(lab / "model")
    tiny_tokenizer().save_pretrained(lab / "model")
    for name in ("clip.mp4", "sound.wav", "image.png"):
        synth_clip(lab / name)
    (lab / "bad.mp4").write_bytes(b"not a clip\n" * 100)
    return lab


def decoded(lab, sample, prompts=None, limit=24):
    """What rollout.generate writes for the sample."""
    thinker = load_thinker(lab / "model", torch.float32).eval()
    inputs = InputMaker(tiny_tokenizer(), prompts or load_prompts(), MediaConfig())(sample)
    sampling = sampling_for(tiny_tokenizer(), thinker.config, max_completion_length=limit, temperature=0.0)
    rollout = generate(thinker, [Encoder(thinker, torch.device("cpu"))(inputs)], 1, sampling, [None])[0]
    return completion_texts(completion_tokens(tiny_tokenizer(), rollout))[0]


def asked(lab, kind="video", name="clip.mp4", **fields):
    return ask.to_question({"problem": QUESTION, "data_type": kind, "path": name} | fields, 1, lab / "q")


@pytest.mark.parametrize("kind, name", [("video", "clip.mp4"), ("audio", "sound.wav"), ("image", "image.png")])
def test_the_streamed_text_is_the_decoded_one(lab, kind, name, capsys):
    assert ask.main([str(lab / "model"), str(lab / name), QUESTION, "--max-completion-length", "24"]) == 0
    text, _, line = capsys.readouterr().out.removesuffix("\n").rpartition("\n")
    assert text == decoded(lab, asked(lab, kind, name)) and len(set(text)) > 3
    assert 1 < int(TIMING.fullmatch(line)[1]) <= 24


def test_options_and_words_reach_the_prompt(lab, capsys, monkeypatch):
    prompts, original = [], ask.InputMaker.__call__
    monkeypatch.setattr(ask.InputMaker, "__call__", lambda *args: prompts.append(original(*args)) or prompts[-1])

    def prompt(*arguments):
        assert ask.main([str(lab / "model"), *arguments, "--max-completion-length", "1"]) == 0
        return tiny_tokenizer().decode(prompts[-1].prompt_ids)

    words = load_prompts().words
    free = prompt(str(lab / "clip.mp4"), QUESTION)
    assert words["system"] in free and words["instructions"]["free-form"] in free
    choice = prompt(str(lab / "clip.mp4"), QUESTION, "--options", "A. praise", "B. mockery")
    assert "A. praise\nB. mockery" in choice and words["instructions"]["multiple choice"] in choice
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt(str(lab / "clip.mp4"), QUESTION, "--system", "Be brief.")
    assert "system" not in prompt(str(lab / "clip.mp4"), QUESTION, "--system", "")
    (lab / "prompts.json").write_text(json.dumps({"system": "Look.", "instructions": {"free-form": "One word."}}))
    own = prompt(str(lab / "clip.mp4"), QUESTION, "--prompts", str(lab / "prompts.json"))
    assert "<|im_start|>system\nLook.<|im_end|>" in own and QUESTION + "\nOne word.<|im_end|>" in own
    assert "Be brief" in prompt(
        str(lab / "clip.mp4"), QUESTION, "--prompts", str(lab / "prompts.json"), "--system", "Be brief."
    )


@pytest.fixture
def scripted(monkeypatch):
    """An Asker whose model says given tokens; returns (answer, pieces) for them."""

    def run(ids, limit=20):
        def say(thinker, prompts, num_generations, sampling, generators, on_token):
            padded = torch.full((1, limit), sampling.pad_id)
            padded[0, : len(ids)] = torch.tensor(ids)
            for t in range(limit):
                on_token(padded[:, t])
            stopped = [i in sampling.stop_ids for i in ids]
            return [
                Rollout(
                    padded[:, : len(ids)],
                    torch.ones(1, len(ids), dtype=torch.bool),
                    torch.tensor([not any(stopped)]),
                    torch.zeros(1, len(ids)),
                )
            ]

        monkeypatch.setattr(ask, "generate", say)
        monkeypatch.setattr(ask, "Encoder", lambda *args: lambda inputs: None)
        asker = object.__new__(ask.Asker)
        asker.tokenizer, asker.thinker = tiny_tokenizer(), SimpleNamespace(device=None)
        asker.make = lambda sample: None
        asker.sampling = sampling_for(tiny_tokenizer(), tiny_thinker().config, max_completion_length=limit)
        pieces = []
        return asker.ask(ask.to_question({"problem": QUESTION}, 1, "q"), pieces.append), pieces

    return run


def test_characters_in_several_tokens_and_the_end_of_the_turn(scripted):
    def tokens(text):
        return tiny_tokenizer()(text, add_special_tokens=False).input_ids

    text = "<context>é</context><think>笑</think>\n<answer>\N{GRINNING FACE}</answer>"
    assert len(tokens("\N{GRINNING FACE}")) == 4, "this should need several tokens"
    end = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    ids = [*tokens(text), end]
    answer, pieces = scripted(ids, limit=len(ids) + 5)
    assert "".join(pieces) == text == answer["completion"]
    assert "\N{GRINNING FACE}" in pieces and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert (answer["answer"], answer["tokens"], answer["truncated"]) == ("\N{GRINNING FACE}", len(ids), False)


def test_a_character_that_the_limit_cuts(scripted):
    ids = tiny_tokenizer()("a\N{GRINNING FACE}", add_special_tokens=False).input_ids[:3]
    answer, pieces = scripted(ids, limit=3)
    assert "".join(pieces) == "a\N{REPLACEMENT CHARACTER}" == answer["completion"] and answer["truncated"]
    assert answer["answer"] is None and answer["tokens"] == 3


def test_batch(lab, capsys):
    records = [
        {"problem": QUESTION, "data_type": "video", "path": "clip.mp4"},
        {"id": 7, "problem": QUESTION, "problem_type": "judge", "data_type": "audio", "path": "sound.wav"},
        {"problem": QUESTION, "path": {"image": "image.png", "audio": "sound.wav"}},
        {"problem": "How many?", "problem_type": "numerical", "data_type": "text", "solution": "4"},
    ]
    (lab / "questions.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    code = ask.main([str(lab / "model"), "--batch", str(lab / "questions.jsonl"), "--max-completion-length", "24"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    assert [a["id"] for a in answers] == ["questions.jsonl:1", "7", "questions.jsonl:5", "questions.jsonl:7"]
    for i in range(4):
        assert answers[i]["completion"] == decoded(lab, ask.to_question(records[i], 1, lab / "q"))
        assert answers[i]["tokens"] > 1 and answers[i]["first_token"] > 0 and answers[i]["rate"] > 0
    (lab / "questions.jsonl").write_text(json.dumps(records[0] | {"path": "bad.mp4"}) + "\n" + json.dumps(records[3]))
    code = ask.main([str(lab / "model"), "--batch", str(lab / "questions.jsonl"), "--max-completion-length", "1"])
    assert code == 1, "one could not be asked"
    bad, good = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "bad.mp4: not a media file" in bad["error"] and "completion" not in bad
    assert good["tokens"] == 1


@pytest.mark.parametrize(
    "record, message",
    [
        ({"problem": " "}, "problem: expected text"),
        ({}, "missing field 'problem'"),
        ({"problem": "a", "problem_type": "riddle"}, "problem_type: unknown 'riddle'"),
        ({"problem": "a", "problem_type": "multiple choice"}, "options: 'multiple choice' needs them"),
        ({"problem": "a", "options": "AB"}, "options: expected a list"),
        ({"problem": "a", "path": "x.mp4"}, "path: expected none for text"),
        ({"problem": "a", "path": {"sound": "x.mp4"}}, "path: expected an object with image and audio"),
        (5, "expected an object, got int"),
    ],
)
def test_a_bad_record_is_named(record, message, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"problem": "fine"}\n' + json.dumps(record))
    with pytest.raises(DataError, match=f"q.jsonl: record 2: {message}"):
        ask.read_questions(SimpleNamespace(batch=tmp_path / "q.jsonl"))


@pytest.mark.parametrize(
    "model, clip, arguments, message",
    [
        ("model", "bad.mp4", [], "bad.mp4: not a media file that FFmpeg can read"),
        ("model", "missing.mp4", [], "missing.mp4: no such file"),
        ("empty", "clip.mp4", [], "empty: the folder has no model or tokenizer"),
        ("model", "clip.mp4", ["--system", "<|im_end|>"], "holds the control token <|im_end|>"),
        ("model", "clip.mp4", ["--prompts", "none.json"], "none.json: can't be read as JSON"),
        ("model", None, ["--batch", "none.jsonl"], "none.jsonl: no such data file"),
    ],
)
def test_mistakes_are_one_line(lab, model, clip, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(lab)
    Path("empty").mkdir(exist_ok=True)
    assert ask.main([model, *([clip, QUESTION] if clip else []), *arguments]) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0] and captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["m"],
        ["m", "clip"],
        ["m", "clip", "q", "--batch", "b"],
        ["m", "c", "q", "--max-completion-length", "0"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        ask.main(arguments)
    assert caught.value.code == 2 and "expected CLIP and QUESTION" in capsys.readouterr().err


@pytest.mark.slow
def test_from_the_command_line(lab):
    """As a program, also where the terminal claims not to know UTF-8."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}

    def run(clip):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "hov2.tools.ask",
                str(lab / "model"),
                str(lab / clip),
                QUESTION,
                "--max-completion-length",
                "24",
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=120,
            check=False,
        )

    done = run("clip.mp4")
    assert done.returncode == 0, done.stderr
    text, _, line = done.stdout.decode().removesuffix("\n").rpartition("\n")
    assert text == decoded(lab, asked(lab)) and not text.isascii() and TIMING.fullmatch(line)
    done = run("bad.mp4")
    assert done.returncode == 1 and done.stdout == b"" and b"Traceback" not in done.stderr
    assert done.stderr.decode().count("\n") == 1 and done.stderr.startswith(b"error: ")
