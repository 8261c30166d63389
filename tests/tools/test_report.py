"""The report's data: what of a run goes into the page, within which bounds, and what is said of what is lacking."""

import base64
import io
import json
import re
import subprocess
import sys
import zlib

import av
import numpy as np
import pytest

from hov2.tools import report
from tests.support.helpers import synth_clip
from tests.support.reportkit import DATA, MEDIA, make_record, write_run


def data_of(page):
    """The data in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def steps_of(rollouts):
    """{step: its records} of packed rollouts."""
    return {step: json.loads(zlib.decompress(base64.b64decode(text))) for step, text in rollouts["steps"].items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder that no test changes."""
    return write_run(tmp_path_factory.mktemp("runs") / "one")


def test_page_is_self_contained_and_holds_no_markup_of_the_model(run):
    page = report.make_report([run])
    assert page.count("<script") == 2 and "onerror" in page  # the completion's <script> is there, but escaped
    assert "</script><script>" not in page.replace("</script>\n<script>", "")
    assert not re.search(r"""(src|href)=["']?(http|//)|@import|url\(|innerHTML""", page)
    assert not re.search("@(title|css|js|data)@", page)


def test_records_are_those_of_the_dump_with_their_blocks(run):
    records = steps_of(data_of(report.make_report([run]))["runs"][0]["rollouts"])["1"]
    expected = [make_record(1, DATA / "bigbuckbunny.mp4", name=f"clip/{n}") for n in range(2)]
    for record, wanted in zip(records, expected, strict=True):
        text = wanted["completions"][0]["text"]
        spans = {tag: text[start:end] for tag, (start, end) in record["completions"][0]["blocks"].items()}
        assert spans == {
            "context": "<context>A man smiles.</context>",
            "think": "<think>He is joking.</think>",
            "answer": "<answer>B</answer>",
        }
        assert record["completions"][3].pop("blocks") == {}
        assert record["completions"][2]["rewards"]["context"] is None  # missing, not 0
        for completion in record["completions"]:
            assert completion.pop("spans") == {
                "format": "completion",
                "accuracy": "completion",
                "context": "context",
                "logic": "think",
            }
            completion.pop("blocks", None)
            total = completion["tokens"].pop("credit/total")
            credits = [values for key, values in completion["tokens"].items() if key.startswith("credit/")]
            assert total == pytest.approx([sum(values) for values in zip(*credits)], abs=1e-5) and any(total)
        assert record == json.loads(json.dumps(wanted))


def test_a_clip_is_what_the_model_saw_and_heard(run):
    clip = report.read_clip(str(DATA / "bigbuckbunny.mp4"), MEDIA)
    pictures = [decode(uri, "image/jpeg") for uri in clip["frames"]]
    media = report_media()
    assert len(pictures) == len(media.frames) == MEDIA["max_frames"]
    for picture, frame in zip(pictures, media.frames):
        assert picture.shape[:2] == (report.THUMBNAIL, 120)  # of what the model saw
        assert abs(picture.mean((0, 1)) - frame.float().mean((1, 2)).numpy()).max() < 3  # the same colours
    sound = decode(clip["sound"], "audio/webm")
    assert clip["seconds"] == pytest.approx(len(media.audio) / 16000)
    assert sound.shape[1] / 48000 == pytest.approx(clip["seconds"], abs=0.1)
    assert np.std(sound) == pytest.approx(media.audio.std().item(), rel=0.15)


def test_sound_alone_and_an_image(tmp_path):
    sound = report.read_clip(str(DATA / "lena.opus"), MEDIA)
    assert sound["frames"] == [] and decode(sound["sound"], "audio/webm").shape[1] / 48000 == pytest.approx(
        12.3, abs=0.2
    )
    image = report.read_clip(synth_clip(tmp_path / "still.png", size=84), MEDIA)
    assert "sound" not in image
    assert [decode(uri, "image/jpeg").shape for uri in image["frames"]] == [(report.THUMBNAIL, report.THUMBNAIL, 3)]


def report_media():
    """The clip as training reads it."""
    from hov2.data.media import read_media

    return read_media(DATA / "bigbuckbunny.mp4", **{k: v for k, v in MEDIA.items() if k != "interleave_audio"})


def decode(uri, kind):
    """The picture (H, W, 3) or the sound (1, N) of a data URI."""
    head, text = uri.split(",")
    assert head == f"data:{kind};base64"
    with av.open(io.BytesIO(base64.b64decode(text))) as container:
        if kind.startswith("image"):
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)


def test_shown_steps_are_spread_evenly_when_not_all_fit(tmp_path):
    write_run(tmp_path / "run", steps=17, video="none.mp4")
    everything = report.pack_rollouts(tmp_path / "run", 1e9)
    size = len(everything["steps"]["0"] if "0" in everything["steps"] else everything["steps"][0])
    assert sorted(everything["steps"]) == list(range(17)) and everything["dumped"] == 17
    some = report.pack_rollouts(tmp_path / "run", 6 * size)
    assert sorted(some["steps"]) == [0, 4, 8, 12, 16]
    assert len(report.pack_rollouts(tmp_path / "run", 1)["steps"]) == 1  # one is always shown


def test_prompts_of_a_step_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_PROMPTS", 2)
    write_run(tmp_path / "run", steps=0)
    (tmp_path / "run/rollouts.jsonl").write_text(
        "".join(json.dumps(make_record(0, "none.mp4", name=f"clip/{n}")) + "\n" for n in range(4))
    )
    packed = report.pack_rollouts(tmp_path / "run", 1e9)
    assert [record["sample"] for record in steps_of(packed)[0]] == ["clip/0", "clip/2"]


def test_the_last_line_of_a_run_that_is_still_writing_is_left_out(tmp_path):
    lines = [json.dumps({"step": n, "reward": n if n != 1 else None}) for n in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "rew']))
    assert report.read_records(tmp_path / "metrics.jsonl") == list(map(json.loads, lines))


def test_every_metric_is_explained_once():
    patterns = [pattern for pattern, _ in report.explanations()]
    for metric in (
        "reward",
        "rewards/context/mean",
        "clip_ratio/high_mean",
        "judge/faults/timeout",
        "time/update",
        "credit/total",
        "credit/think",
        "kl",
    ):
        assert sum(bool(re.fullmatch(pattern, metric)) for pattern in patterns) == 1, metric


def test_evaluations_and_what_changed_between_two_runs(run, tmp_path):
    other = write_run(tmp_path / "two", accuracy=1.0)
    found = data_of(report.make_report([run, other]))["evaluations"]
    assert [title for title, _ in found] == ["one: eval", "two: eval", "one → two: eval"]
    assert found[0][1] == (run / "eval" / "results.txt").read_text()
    assert "1 are better in B, 0 worse" in found[2][1]
    assert re.search(r"eval/1: .* \(0.000\) -> .* \(1.000\)", found[2][1])


def test_a_run_without_rollouts_and_clips_that_are_not_there(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.5}\n')
    shown = data_of(report.make_report([tmp_path]))["runs"][0]
    assert shown["metrics"] == [{"step": 0, "loss": 1.5}] and shown["rollouts"]["dumped"] == 0
    assert report.read_clip("/none.mp4", MEDIA) == {"error": "/none.mp4: no such file"}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("other.txt", "", "no metrics.jsonl, rollouts.jsonl or results.txt"),
        ("metrics.jsonl", "step 1\n", "metrics.jsonl: expected JSON, got b'step 1"),
        ("rollouts.jsonl", '{"answer": 1}\n', "rollouts.jsonl: expected the records that train_grpo.py writes"),
    ],
)
def test_what_is_no_run_gives_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "hov2.tools.report", str(tmp_path), "-o", str(tmp_path / "page.html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}") and message in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "page.html").exists()
