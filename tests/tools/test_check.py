"""`python -m hov2.tools.check_data`: what it finds in small data sets with known faults."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hov2.config import ConfigError, EvalConfig, GRPOConfig, SFTConfig
from hov2.config_io import read_config
from hov2.tools import check_data as check
from tests.support.helpers import synth_clip, tiny_tokenizer

ROOT = Path(__file__).parents[2]
FULL = "<context>c</context><think>t</think><answer>A</answer>"
PROBLEMS = ("bad record", "missing", "unreadable", "too long", "no 3 blocks")
ROW = re.compile(r"(\S.*?)\s+(\d+)" + r"\s+(\d+|-)" * len(PROBLEMS))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    synth_clip(folder / "sound.mp4", seconds=2)
    synth_clip(folder / "silent.mp4", sound=False)
    synth_clip(folder / "still.png")
    whole = Path(synth_clip(folder / "long.webm", seconds=8)).read_bytes()
    (folder / "cut.webm").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.mp4").write_bytes(b"no film at all" * 100)
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


def record(path, **fields):
    kind = "image" if str(path).endswith("png") else "video"
    return {
        "problem": "What does she intend?",
        "problem_type": "multiple choice",
        "options": ["A. joke", "B. threat"],
        "solution": FULL,
        "data_type": kind,
        "path": str(path),
        **fields,
    }


def config(folder, name, records, **values):
    """Writes `name`.json with one data file beside it; returns its path."""
    (folder / f"{name}_data.json").write_text(json.dumps(records))
    values = {
        "model": str(folder / "model"),
        "output_dir": str(folder / name),
        "samples_per_step": 4,
        "data": [{"path": str(folder / f"{name}_data.json")}],
        "media": {"max_pixels": 56 * 56},
        **values,
    }
    (folder / f"{name}.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return str(folder / f"{name}.json")


def run(capsys, *arguments):
    """Exit code, what was printed, and {data file's row: {column: cell}}."""
    with pytest.raises(SystemExit) as stop:
        check.main([*map(str, arguments), "--workers", "1"])
    text = capsys.readouterr().out
    rows = {}
    for line in text.split("\n"):
        if match := ROW.fullmatch(line):
            name, samples, *cells = match.groups()
            rows[Path(name.split()[0]).name] = dict(zip(("samples", *PROBLEMS), (samples, *cells)))
    return stop.value.code, text, rows


def row(samples, **cells):
    return {"samples": str(samples), **{name: str(cells.get(name.replace(" ", "_"), 0)) for name in PROBLEMS}}


def test_nothing_wrong(tmp_path, clips, capsys):
    records = [
        record(clips / "sound.mp4"),
        record(clips / "silent.mp4"),
        record(clips / "sound.mp4"),
        record(clips / "still.png", problem_type="judge", solution=FULL.replace("A<", "yes<")),
    ]
    path = config(tmp_path, "sft", records, model=str(clips / "model"), max_prompt_length=2000)
    code, text, rows = run(capsys, path)
    assert code == 0 and rows == {"sft_data.json": row(4)} and "problems: 0" in text
    assert "3 multiple choice\n    1 judge\n    2 video with sound\n    1 video\n    1 image" in text


def test_every_problem_is_found_and_listed(tmp_path, clips, capsys):
    short = record(clips / "sound.mp4", solution="<answer>A</answer>")
    wordy = record(clips / "sound.mp4", problem="Why? " * 900)
    records = [
        record(clips / "sound.mp4"),
        record("gone.mp4"),
        record(clips / "broken.mp4"),
        record(clips / "cut.webm"),
        record(clips / "silent.mp4", data_type="image"),
        short,
        wordy,
        record(clips / "sound.mp4", problem_type="essay"),
    ]
    path = config(tmp_path, "sft", records, model=str(clips / "model"), max_prompt_length=2000)
    bad = tmp_path / "bad.jsonl"
    with pytest.warns(UserWarning, match="cut.webm"):  # used as far as it goes
        code, text, rows = run(capsys, path, "--bad", bad)
    assert code == 1
    assert rows == {"sft_data.json": row(7, bad_record=1, missing=1, unreadable=2, too_long=1, no_3_blocks=1)}
    listed = [json.loads(line) for line in bad.read_text().split("\n") if line]
    assert [(entry["problem"], entry["id"]) for entry in listed] == [
        ("bad record", None),
        *(
            (kind, f"sft_data.json:{number}")
            for kind, number in (
                ("missing", 2),
                ("unreadable", 3),
                ("unreadable", 5),
                ("no 3 blocks", 6),
                ("too long", 7),
            )
        ),
    ]
    assert all(entry["config"] == path and entry["source"].endswith("sft_data.json all") for entry in listed)
    assert listed[0]["reason"].endswith("emer_ov") and "record 8: problem_type: unknown 'essay'" in listed[0]["reason"]
    assert listed[1]["reason"] == f"{tmp_path}/gone.mp4: no such file"
    assert "not a media file" in listed[2]["reason"] and "expected image, found video" in listed[3]["reason"]
    assert "max_prompt_length is 2000" in listed[5]["reason"] and "problems: 6, all in " in text


def test_what_is_not_looked_at_is_not_counted(tmp_path, clips, capsys):
    records = [record(clips / name) for name in ("sound.mp4", "broken.mp4", "cut.webm")] + [record("gone.mp4")]
    path = config(tmp_path, "sft", records, model=str(clips / "model"), max_prompt_length=2000)
    code, _, rows = run(capsys, path, "--media", "none")
    assert code == 1 and rows["sft_data.json"] == row(4, missing=1, unreadable="-", too_long="-")
    code, _, rows = run(capsys, path, "--media", "probe")
    assert code == 1 and rows["sft_data.json"] == row(4, missing=1, unreadable=1, too_long="-")
    records = [
        record(clips / "sound.mp4", data_type="audio"),
        record(clips / "silent.mp4", data_type="audio"),
        record(clips / "cut.webm"),
    ]
    code, text, _ = run(capsys, config(tmp_path, "two", records), "--media", "probe")
    assert code == 1 and "silent.mp4: expected audio, found none" in text and "problems: 1" in text
    path = config(tmp_path, "one", [record(clips / "broken.mp4")])  # no limit of the prompt: no tokenizer is needed
    assert run(capsys, path)[2]["one_data.json"] == row(1, unreadable=1)


def test_without_a_tokenizer(tmp_path, clips, capsys):
    (tmp_path / "empty").mkdir()
    records = [record(clips / "sound.mp4", problem="Why? " * 900), record(clips / "broken.mp4")]
    path = config(tmp_path, "sft", records, model=str(tmp_path / "empty"), max_prompt_length=2000)
    with pytest.raises(SystemExit) as stop:
        check.main([path])
    assert stop.value.code == 2 and "empty: the folder has no model or tokenizer" in capsys.readouterr().err
    assert run(capsys, path, "max_prompt_length=null")[2]["sft_data.json"] == row(2, unreadable=1)
    assert run(capsys, path, "--media", "probe")[2]["sft_data.json"] == row(2, unreadable=1, too_long="-")


def test_the_tokenizer_of_a_model_to_be_made(tmp_path, clips, capsys):
    records = [record(clips / "sound.mp4", problem="Why? " * 900)]
    first = config(tmp_path, "one", records, model=str(clips / "model"))
    second = config(tmp_path, "two", records, model=str(tmp_path / "one/model"), max_prompt_length=2000)
    assert run(capsys, first, second)[2]["two_data.json"] == row(1, too_long=1)


def test_bad_records_inside_and_outside_the_slice(tmp_path, clips, capsys):
    records = [record(clips / "sound.mp4"), record(clips / "sound.mp4", problem=3)]
    path = config(tmp_path, "sft", records)
    entry = {"path": str(tmp_path / "sft_data.json"), "slice": "first:1"}
    for skip, code, count in (("error", 1, 1), ("skip", 0, 0)):
        data = json.dumps([entry | {"on_bad_record": skip}])
        assert run(capsys, path, f"data={data}")[::2] == (code, {"sft_data.json": row(1, bad_record=count)})
    for change, message in (
        ({"slice": "first:10%"}, "leaves none"),
        ({"path": "none.json"}, "no such data file"),
        ({"format": "x"}, "unknown format 'x'"),
    ):
        code, text, rows = run(capsys, path, "data=" + json.dumps([entry | change, entry | {"on_bad_record": "skip"}]))
        assert code == 1 and message in text and rows["sft_data.json"] == row(1)  # the other entry is still looked at
    with pytest.raises(SystemExit, match="2"):
        check.main([str(path), 'data=[{"path": "none.json", "slice": "half"}]'])
    assert "data[0]: slice: expected all, first:N, last:N" in capsys.readouterr().err


# ---- shared clips ----


def shares(text):
    return {
        (Path(one).stem, Path(other).stem): (int(names), contents or None)
        for one, other, names, contents in re.findall(
            r"^(\S+) and (\S+) share clips\n  (\d+) by name:.*\n(?:  (\d+) by content:)?", text, re.MULTILINE
        )
    }


def test_clips_shared_by_name_and_by_content(tmp_path, clips, capsys):
    for folder in ("train", "bench"):
        (tmp_path / folder).mkdir()
    shutil.copy(clips / "sound.mp4", tmp_path / "train/a.mp4")
    shutil.copy(clips / "silent.mp4", tmp_path / "train/b.mp4")
    shutil.copy(clips / "sound.mp4", tmp_path / "bench/renamed.mp4")
    shutil.copy(clips / "still.png", tmp_path / "bench/b.png")
    one = config(tmp_path, "one", [record("train/a.mp4"), record("train/b.mp4")])
    two = config(tmp_path, "two", [record("train/b.mp4")], samples_per_step=None, num_generations=2)
    bench = config(
        tmp_path,
        "bench",
        [record("bench/renamed.mp4"), record("bench/b.png")],
        samples_per_step=None,
        max_completion_length=8,
    )
    code, text, rows = run(capsys, one, two, bench)
    assert shares(text) == {("one", "two"): (1, "1"), ("one", "bench"): (1, "1"), ("two", "bench"): (1, "0")}
    assert f"1 by content: {tmp_path}/train/a.mp4\n" in text and code == 0
    assert [rows[f"{name}_data.json"]["no 3 blocks"] for name in ("one", "two", "bench")] == ["0", "-", "-"]
    assert shares(run(capsys, one, two, bench, "--media", "none")[1])["one", "bench"] == (1, None)
    assert "share clips" not in run(capsys, one)[1]


def test_held_out_questions_and_benchmarks(tmp_path, clips, capsys):
    folder = tmp_path / "Daily-Omni"
    (folder / "Videos/v1").mkdir(parents=True)
    shutil.copy(clips / "sound.mp4", folder / "Videos/v1/v1_video.mp4")
    question = {
        "Question": "What?",
        "Choice": ["A. a", "B. b", "C. c", "D. d"],
        "Answer": "B",
        "Type": "Inference",
        "video_id": "v1",
        "video_category": "Howto & Style",
        "video_duration": "30s",
    }
    (folder / "qa.json").write_text(json.dumps([question, question | {"video_id": "v2"}]))
    (tmp_path / "held.json").write_text(json.dumps([record(clips / "silent.mp4")]))
    train = config(
        tmp_path, "sft", [record(clips / "sound.mp4")], eval_steps=5, eval_data=[{"path": str(tmp_path / "held.json")}]
    )
    bench = config(
        tmp_path, "bench", [], samples_per_step=None, data=None, benchmark="daily-omni", benchmark_root=str(folder)
    )
    code, text, rows = run(capsys, train, bench)
    assert code == 1 and rows["held.json"] == row(1, no_3_blocks="-")
    assert rows["daily-omni"] == row(2, missing=1, no_3_blocks="-")
    assert f"{train} (held out)\n" in text and "v2_video.mp4: no such file" in text
    assert f"{train} and {bench} share clips\n  0 by name: \n  1 by content: {clips}/sound.mp4" in text


def test_an_evaluation_is_checked_as_it_will_ask(tmp_path, clips, capsys):
    records = [
        record(clips / "sound.mp4", id="heard"),
        record(clips / "broken.mp4", id="broken"),
        record(clips / "silent.mp4", id="silent"),
    ]
    (tmp_path / "left_out.txt").write_text("broken\n")
    values = {"samples_per_step": None, "max_completion_length": 8}
    path = config(tmp_path, "bench", records, exclude=str(tmp_path / "left_out.txt"), **values)
    code, text, rows = run(capsys, path)
    assert code == 0 and rows["bench_data.json"] == row(2, no_3_blocks="-")
    assert "1 video with sound\n" in text

    code, text, rows = run(capsys, path, 'senses=["video"]')
    assert code == 0 and "with sound" not in text and "2 video\n" in text

    (tmp_path / "left_out.txt").write_text("borken\n")
    code, text, rows = run(capsys, path)
    assert code == 1 and "1 of its 1 ids are those of no question: borken" in text
    assert rows["bench_data.json"]["bad record"] == "1" and rows["bench_data.json"]["unreadable"] == "1"


# ---- the command ----


def test_kinds_of_config(tmp_path):
    for name, kind in (
        ("stage1", SFTConfig),
        ("stage2", GRPOConfig),
        ("stage3", GRPOConfig),
        ("eval_intentbench", EvalConfig),
        ("toy/stage1", SFTConfig),
        ("toy/stage2", GRPOConfig),
    ):
        assert type(read_config(ROOT / f"configs/{name}.json")) is kind
    for text in ("[", "3", json.dumps({"model": "m", "output_dir": "o", "data": [], "num_generation": 8, "beta": 0})):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ConfigError, match="not valid JSON|expected a JSON object|did you mean 'num_generations'"):
            read_config(tmp_path / "x.json")


def test_unusable_configs_are_exit_code_2(tmp_path, capsys):
    path = config(tmp_path, "sft", [], prompts="none.json")
    for arguments, message in (
        ([tmp_path / "none.json"], "no such config file"),
        (["seed=1"], "expected a config"),
        ([path, "sead=1"], "unknown key 'sead'"),
        ([path], "none.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            check.main(list(map(str, arguments)))
        assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_command_with_several_processes(tmp_path, clips):
    names = ["sound.mp4", "silent.mp4", "still.png", "broken.mp4"]
    path = config(
        tmp_path, "sft", [record(clips / name) for name in names], model=str(clips / "model"), max_prompt_length=2000
    )
    command = [
        sys.executable,
        "-m",
        "hov2.tools.check_data",
        path,
        "--workers",
        "2",
        "--bad",
        str(tmp_path / "bad.jsonl"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "broken.mp4: not a media file" in result.stdout and "1 video with sound" in result.stdout
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1


def test_a_dying_process_is_an_error_that_names_its_task():
    with pytest.raises(check.DataError, match="clips: a process died, most likely on one of these: 3"):
        check.run_all(os._exit, [3, 3], 2)
