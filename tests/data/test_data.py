"""Reading samples, slices, prompts as token ids, the global order, and loading with replacements."""

import json
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

from hov2.config import ConfigError, MediaConfig, Source
from hov2.data import inputs as inputs_module
from hov2.data.formats import DataError
from hov2.data.inputs import InputMaker, MediaShape, encode_solution, interleave
from hov2.data.loader import PromptOrder, StepLoader
from hov2.data.media import MediaError
from hov2.data.samples import Sample, SkipSample, read_samples, take_slice
from hov2.model.versions import media_model_of
from hov2.prompts import load_prompts
from tests.support.helpers import synth_clip, tiny_thinker, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECORD = {
    "problem": "What does she intend?",
    "problem_type": "multiple choice",
    "options": ["A. joke", "B. threat"],
    "solution": "<context>c</context><think>t</think><answer>A</answer>",
    "data_type": "video",
    "path": "a.mp4",
}


def write(folder, records, name="train.json"):
    path = folder / name
    if isinstance(records, str):
        path.write_text(records, encoding="utf-8")
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return str(path)


# ---- reading ----


def test_reads_json_and_jsonl(tmp_path):
    records = [RECORD, {**RECORD, "id": 7, "answer": "A", "Type": "Why", "options": ["A. é", "B. 你"]}]
    path = write(tmp_path, records)
    first, second = read_samples([Source(path)])
    assert first == Sample(
        id="train.json:1",
        problem=RECORD["problem"],
        problem_type="multiple choice",
        options=("A. joke", "B. threat"),
        solution=RECORD["solution"],
        data_type="video",
        paths={"video": str(tmp_path / "a.mp4")},
        source=path,
    )
    assert (second.id, second.extra, second.options) == ("7", {"answer": "A", "Type": "Why"}, ("A. é", "B. 你"))
    lines = read_samples([Source(write(tmp_path, records, "train.jsonl"), media_root=str(tmp_path / "media"))])
    assert [sample.id for sample in lines] == ["train.jsonl:1", "7"]  # line 3 of the file has its own id
    assert lines[0].paths == {"video": str(tmp_path / "media/a.mp4")}


def test_media_of_each_data_type(tmp_path):
    free = {**RECORD, "problem_type": "free-form", "options": None}
    both = {"image": "i.png", "audio": "a.wav"}
    cases = [
        ({"data_type": "image", "path": "./i.png"}, "image", ("image",)),
        ({"data_type": "audio"}, "audio", ("audio",)),
        ({"data_type": "image_audio", "path": both}, "image_audio", ("image", "audio")),
        ({"data_type": "image", "path": both}, "image_audio", ("image", "audio")),
        ({"data_type": "text", "path": None}, "text", ()),
    ]
    samples = read_samples([Source(write(tmp_path, [{**free, **fields} for fields, *_ in cases]))])
    assert [(s.data_type, s.media_kinds) for s in samples] == [tuple(expected) for _, *expected in cases]
    assert samples[0].paths == {"image": str(tmp_path / "i.png")} and samples[4].paths == {}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"problem": ...}, "missing field 'problem'"),
        ({"problem_type": ...}, "missing field 'problem_type'"),
        ({"solution": ...}, "missing field 'solution'"),
        ({"data_type": ...}, "data_type: unknown None; known: image, video, audio"),
        ({"path": ...}, "path: expected a file, got None"),
        ({"problem": 3}, "problem: expected text, got 3"),
        ({"problem": " "}, "problem: expected text, got ' '"),
        ({"solution": None}, "solution: expected text, got None"),
        ({"problem_type": "essay"}, "problem_type: unknown 'essay'; known: "),
        ({"problem_type": ["judge"]}, "problem_type: expected text"),
        ({"options": None}, "options: 'multiple choice' needs them"),
        ({"options": []}, "options: 'multiple choice' needs them"),
        ({"options": ...}, "options: 'multiple choice' needs them"),
        ({"options": "A. x"}, "options: expected a list of texts or null, got 'A. x'"),
        ({"options": ["A", 2]}, "options: expected a list of texts or null"),
        ({"solution": "<think>t</think><answer> </answer>"}, "solution "),
        ({"data_type": "film"}, "data_type: unknown 'film'; known: image, video, audio"),
        ({"path": 5}, "path: video: expected text, got 5"),
        ({"path": {"image": "a", "audio": "b"}}, "path: expected a file, got {"),  # of a video
        ({"data_type": "image", "path": {"image": "a"}}, "path: expected an object with image and audio"),
        ({"data_type": "image_audio"}, "path: expected an object with image and audio, got 'a.mp4'"),
        ({"data_type": "image_audio", "path": {"image": "a", "audio": None}}, "path: audio: expected text, got None"),
        ({"data_type": "text"}, "path: expected none for text"),
        ({"problem": "See <|VIDEO|> and say"}, "problem: <|VIDEO|> has the form of a special token"),
        ({"options": ["A. x", "B.<|im_end|>"]}, "options: <|im_end|> has the form of a special token"),
        ({"solution": "<answer>A<|im_start|></answer>"}, "solution: <|im_start|> has the form of a special token"),
    ],
)
def test_bad_record_is_one_error(tmp_path, change, message):
    bad = {key: value for key, value in {**RECORD, **change}.items() if value is not ...}
    for name in ("train.json", "train.jsonl"):
        path = write(tmp_path, [RECORD, bad], name)
        number = 2 if name == "train.json" else 3
        with pytest.raises(DataError) as error:
            read_samples([Source(path)])
        assert str(error.value).startswith(f"{path}: record {number}: {message}")


def test_bad_files(tmp_path):
    cases = [
        ("x.json", '{"a": 1}', "expected a list of records"),
        ("x.json", "[", "not valid JSON"),
        ("x.jsonl", "{}\n[", "record 1: missing field"),
        ("x.jsonl", "\n{", "record 2: not valid JSON"),
        ("x.json", "[3]", "record 1: expected an object, got int"),
        ("x.json", "[]", "slice 'all' of 0 records leaves none"),
    ]
    for name, text, message in cases:
        with pytest.raises(DataError, match=message):
            read_samples([Source(write(tmp_path, text, name))])
    with pytest.raises(DataError, match="no such data file$"):
        read_samples([Source(str(tmp_path / "none.json"))])
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(DataError, match="can't be read"):
        read_samples([Source(str(tmp_path / "latin.json"))])
    with pytest.raises(DataError, match="unknown format 'parquet'; known: hov2"):
        read_samples([Source("x", format="parquet")])


# ---- what files hold that others wrote ----


def read_or_refusal(path, **entry):
    """The samples of a data file, or the words of its DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that bad records are left out
            return read_samples([Source(str(path), **entry)])
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"problem": "Why \ud83d"}, "problem"),
        ({"options": ["A. joke \udc00", "B. threat"]}, "options"),
        ({"solution": "<answer>A</answer>\ud83d"}, "solution"),
        ({"path": "a\udce9.mp4"}, "path"),
        ({"data_type": "image_audio", "path": {"image": "a.png", "audio": "\ud83d.wav"}}, "path"),
        ({"id": "\ud83d"}, "id"),
        ({"Type": {"fine": ["\ud83d"]}}, "Type"),
    ],
)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_half_a_surrogate_pair_is_named(tmp_path, change, field, name):
    path = write(tmp_path, [RECORD, {**RECORD, **change}, RECORD], name)
    assert re.match(rf"{path}: record \d: {field}: '\\ud[8c]..' is half of a surrogate pair", read_or_refusal(path))
    assert len(read_or_refusal(path, on_bad_record="skip")) == 2
    whole = write(tmp_path, [{**RECORD, "problem": "Why \U0001f600"}], name)  # a pair is a character
    assert read_or_refusal(whole)[0].problem == "Why \U0001f600"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_files_with_a_byte_order_mark_are_read(tmp_path, encoding, name):
    text = Path(write(tmp_path, [{**RECORD, "problem": "é?"}], name)).read_text(encoding="utf-8")
    (tmp_path / name).write_text(text, encoding=encoding)
    assert [sample.problem for sample in read_or_refusal(tmp_path / name)] == ["é?"]


def test_lists_and_lines_are_read_whatever_the_file_is_called(tmp_path):
    lines = "".join(json.dumps(RECORD) + "\n" for _ in range(3))
    for name, text in [
        ("x.json", lines),
        ("x.json", "\r\n" + lines.replace("\n", "\r\n")),
        ("x.jsonl", json.dumps([RECORD] * 3)),
        ("x.jsonl", json.dumps([RECORD] * 3, indent=2)),
    ]:
        assert len(read_or_refusal(write(tmp_path, text, name))) == 3
    message = read_or_refusal(write(tmp_path, json.dumps({"data": [RECORD]})))
    assert message.endswith("expected a list of records, or one object a line; got dict")


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"problem": "]}\\"", "x": tru}', "not valid JSON"),
        ("[" * 5000 + "]" * 5000, "too deep to be read"),
        (json.dumps(RECORD)[:-1] + ', "x": ' + "[" * 200 + "]" * 200 + "}", "x: more than 100 lists or objects"),
        ('{"problem": "\xff"}', "problem: '.udcff' is .* a byte that is not UTF-8, and can't be read"),
        ("3", "expected an object, got int"),
    ],
)
@pytest.mark.parametrize("layout", ["list", "lines"])
def test_a_record_that_cannot_be_read_costs_no_other(tmp_path, bad, message, layout):
    good = json.dumps(RECORD)
    text = f"[{good},\n{bad},{good} ]\n" if layout == "list" else f"{good}\n{bad}\n{good}\n"
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        assert re.match(f"{tmp_path / name}: record 2: .*{message}", read_or_refusal(tmp_path / name))
        assert len(read_or_refusal(tmp_path / name, on_bad_record="skip")) == 2


def test_a_file_that_was_cut_off_is_one_error_also_where_bad_records_are_skipped(tmp_path):
    path = write(tmp_path, json.dumps([RECORD, RECORD])[:-20])
    assert "x.json: not valid JSON: " in read_or_refusal(path, on_bad_record="skip").replace("train", "x")


def test_a_number_of_5000_digits_is_its_digits(tmp_path):
    path = write(tmp_path, json.dumps({**RECORD, "id": 0, "size": 1}).replace("0", "7" * 5000, 1), "x.jsonl")
    (sample,) = read_or_refusal(path)
    assert sample.id == "7" * 5000 and sample.extra == {"size": 1}


@pytest.mark.parametrize(
    "url", ["https://x.org/a.mp4", "HTTP://x.org/a.mp4", "s3://b/a.mp4", "file:///a.mp4", "data:video/mp4;base64,AA"]
)
def test_a_url_is_no_path(tmp_path, url):
    for record, name in [({**RECORD, "path": url}, "hov2"), ({**RECORD, "path": url, "video": url}, "humanomniv2")]:
        path = write(tmp_path, [record])
        message = read_or_refusal(path, format=name)
        assert message.startswith(f"{path}: record 1: path: {url!r} is a URL; only local files are read")
    both = {**RECORD, "data_type": "image_audio", "path": {"image": "a.png", "audio": url}}
    assert "is a URL" in read_or_refusal(write(tmp_path, [both]))
    colon = {**RECORD, "path": "clips/10:30.mp4"}
    assert read_or_refusal(write(tmp_path, [colon]))[0].paths == {"video": str(tmp_path / "clips/10:30.mp4")}
    for entry in ({"path": url}, {"path": "a.json", "media_root": url}):
        with pytest.raises(ConfigError, match="is a URL; only local files are read"):
            Source(**entry)


# ---- options ----


@pytest.mark.parametrize(
    "options, answer, labelled, right",
    [
        (["joke", "threat"], "B", ["A. joke", "B. threat"], "B"),
        (["Vitamin A", "Vitamin C"], "Vitamin C", ["A. Vitamin A", "B. Vitamin C"], "B"),
        (["A. Vitamin A", "B. Vitamin C"], "vitamin c.", ["A. Vitamin A", "B. Vitamin C"], "B"),
        (["A.joke", "(B) threat"], "b", ["A.joke", "(B) threat"], "b"),
        (["a) joke", "threat"], "A", ["a) joke", "B. threat"], "A"),
        (["A man walks", "A dog"], "A dog", ["A. A man walks", "B. A dog"], "B"),
        (["C", "A", "B"], "A", ["A. C", "B. A", "C. B"], "B"),  # the options' words go before letters,
        (["A. C", "B. A", "C. B"], "A", ["A. C", "B. A", "C. B"], "A"),  # but not before those that are written there
        (["B. threat", "A. joke"], "A", ["B. threat", "A. joke"], "A"),
        (["A. yes", "B. yes"], "B. yes", ["A. yes", "B. yes"], "B"),
        (["2", "3"], "3", ["A. 2", "B. 3"], "B"),
        (["A. joke", "B. threat"], "The answer is B", ["A. joke", "B. threat"], "The answer is B"),
    ],
)
def test_options_get_letters_and_answers_are_letters(tmp_path, options, answer, labelled, right):
    for before, after in (("", ""), ("<think>t</think><answer>", "</answer>")):
        record = {**RECORD, "options": options, "solution": f"{before}{answer}{after}"}
        (sample,) = read_or_refusal(write(tmp_path, [record]))
        assert sample.options == tuple(labelled) and sample.solution == f"{before}{right}{after}"


def test_several_answers_in_the_options_own_words(tmp_path):
    record = {**RECORD, "problem_type": "emer_ov_mc", "options": ["Happy", "Sad, low", "Calm"]}
    for answer, letters in [("Calm, Happy", "A,C"), ("Sad, low", "B"), ("happy and calm", "A,C"), ("A,B", "A,B")]:
        (sample,) = read_or_refusal(write(tmp_path, [{**record, "solution": answer}]))
        assert sample.solution == letters


@pytest.mark.parametrize(
    "options, answer, message",
    [
        (["joke", "threat"], "C", "'C' is none of the 2 in 'options'"),
        (["A. joke", "B. threat"], "A,C", "'A,C' is none of the 2"),
        (["Vitamin A", "Vitamin B", "Vitamin K", "zinc"], "Vitamin D", "'Vitamin D' is none of the 4"),
        (["yes", "yes"], "yes", "'yes' is several of the options"),
        (["A. joke", "B. threat"], "B. joke", "'B. joke' has the letter of one option and the words of another"),
        (["x"] * 27, "A", "27 options, and 26 letters for them"),
    ],
)
def test_an_answer_that_is_none_of_the_options_is_refused(tmp_path, options, answer, message):
    path = write(tmp_path, [{**RECORD, "options": options, "solution": f"<answer>{answer}</answer>"}])
    assert read_or_refusal(path).startswith(f"{path}: record 1: solution: {message}")


# ---- slices ----


def test_slices():
    items = list(range(7))
    cut = take_slice
    assert cut(items, "all") == items
    assert cut(items, "first:50%") == [0, 1, 2] and cut(items, "last:50%") == [4, 5, 6]  # 3.5 rounds down at both ends
    assert cut(items, "first:2") == [0, 1] and cut(items, "last:2") == [5, 6] and cut(items, "last:0") == []
    assert cut(items, "first:70%") == [0, 1, 2, 3] and cut(items, "last:30%") == [5, 6]
    assert cut(items, "first:100%") == items == cut(items, "last:99")
    assert len(cut(range(1000), "last:12.5%")) == 125 and cut(range(1000), "first:0.1%") == [0]
    for size in range(1, 60):
        assert not set(cut(range(size), "first:50%")) & set(cut(range(size), "last:50%"))
    random = cut(items, "random:50%", seed=1)
    assert len(random) == 3 and random == sorted(set(random)) == cut(items, "random:50%", seed=1)
    assert len({tuple(cut(items, "random:3", seed)) for seed in range(20)}) > 5


@pytest.mark.parametrize("text", ["", "half", "first", "first:", "first:-1", "end:50%", "first:101%", "first:1.5"])
def test_bad_slices(text):
    with pytest.raises(DataError, match="slice"):
        take_slice([1], text)


def test_sources_are_cut_one_by_one(tmp_path):
    a, b = (write(tmp_path, [{**RECORD, "id": f"{name}{i}"} for i in range(5)], f"{name}.json") for name in "ab")
    samples = read_samples([Source(a, slice="first:40%"), Source(b, slice="last:1")])
    assert [sample.id for sample in samples] == ["a0", "a1", "b4"]
    with pytest.raises(DataError, match="slice 'first:10%' of 5 records leaves none"):
        read_samples([Source(a, slice="first:10%")])


# ---- model inputs ----

VIDEO, IMAGE, AUDIO, VISION_BOS, VISION_EOS, AUDIO_BOS, AUDIO_EOS, IM_END = (
    tiny_tokenizer().convert_tokens_to_ids(f"<|{name}|>")
    for name in ("VIDEO", "IMAGE", "AUDIO", "vision_bos", "vision_eos", "audio_bos", "audio_eos", "im_end")
)
SMALL = MediaConfig(fps=4, max_frames=8, min_pixels=56 * 56, max_pixels=56 * 56)  # 4 tokens in a pair of frames


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        "video": synth_clip(folder / "sound.mp4", seconds=2),
        "silent": synth_clip(folder / "silent.mp4", sound=False),
        "image": synth_clip(folder / "still.png"),
        "audio": synth_clip(folder / "tone.wav"),
        "blip": synth_clip(folder / "blip.wav", seconds=0.01),
        "webm": synth_clip(folder / "sound.webm"),
    }


def sample_of(paths, **fields):
    fields = {
        "id": "s",
        "problem": "What does she intend?",
        "problem_type": "multiple choice",
        "data_type": "",
        "options": ("A. joke", "B. threat"),
        "solution": "<answer>A</answer>",
        **fields,
    }
    return Sample(paths=paths, **fields)


def inputs_of(sample, media=SMALL, **kwargs):
    return InputMaker(tiny_tokenizer(), load_prompts(None), media, **kwargs)(sample)


def media_runs(ids):
    """The media part of a prompt as (token id, how many in a row) pairs."""
    runs = []
    for i in ids.tolist():
        if i in (VIDEO, IMAGE, AUDIO, VISION_BOS, VISION_EOS, AUDIO_BOS, AUDIO_EOS):
            if runs and runs[-1][0] == i:
                runs[-1][1] += 1
            else:
                runs.append([i, 1])
    return [tuple(run) for run in runs]


def test_video_with_sound_as_its_own_item(clips):
    inputs = inputs_of(sample_of({"video": clips["video"]}))
    assert inputs.shape.grid_thw.tolist() == [[4, 4, 4]] and inputs.pixel_values.shape == (64, 1176)
    frames = inputs.shape.mel_frames
    assert inputs.input_features.shape == (128, frames) and 195 <= frames <= 210  # 2 s and the codec's padding
    assert inputs.shape.audio_tokens == ((frames - 1) // 2 + 1 - 2) // 2 + 1
    assert media_runs(inputs.prompt_ids) == [
        (VISION_BOS, 1),
        (VIDEO, 16),
        (VISION_EOS, 1),
        (AUDIO_BOS, 1),
        (AUDIO, inputs.shape.audio_tokens),
        (AUDIO_EOS, 1),
    ]
    assert inputs.shape.second_per_grid == pytest.approx(0.5) and inputs.shape.visual_kind == "video"
    text = tiny_tokenizer().decode(inputs.prompt_ids)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "What does she intend?" in text and "B. threat" in text


def test_each_medium_alone(clips):
    silent = inputs_of(sample_of({"video": clips["silent"]}))
    assert (
        media_runs(silent.prompt_ids) == [(VISION_BOS, 1), (VIDEO, 8), (VISION_EOS, 1)]
        and silent.input_features is None
    )
    still = inputs_of(sample_of({"image": clips["image"]}))
    assert media_runs(still.prompt_ids) == [(VISION_BOS, 1), (IMAGE, 4), (VISION_EOS, 1)]
    assert still.shape.visual_kind == "image" and still.shape.second_per_grid is None
    tone = inputs_of(sample_of({"audio": clips["audio"]}))
    assert media_runs(tone.prompt_ids) == [(AUDIO_BOS, 1), (AUDIO, 25), (AUDIO_EOS, 1)]
    assert tone.shape.mel_frames == 100 and tone.pixel_values is None and tone.shape.visual_kind is None
    of_video = inputs_of(sample_of({"audio": clips["video"]}))  # the sound of a film
    assert of_video.pixel_values is None and of_video.shape.audio_tokens > 45
    both = inputs_of(sample_of({"image": clips["image"], "audio": clips["audio"]}))
    assert [run for run in media_runs(both.prompt_ids) if run[1] > 1] == [(IMAGE, 4), (AUDIO, 25)]
    text = inputs_of(sample_of({}))
    assert media_runs(text.prompt_ids) == [] and text.media_key == () and text.shape == MediaShape()


def test_wrong_kind_of_file_is_a_media_error(clips):
    cases = [
        ("image", "video", "expected image, found video"),
        ("video", "image", "expected video, found image"),
        ("video", "audio", "expected video, found audio"),
        ("audio", "silent", "expected audio, found video"),
        ("audio", "blip", "shorter than one token"),
        ("video", "none.mp4", "none.mp4"),
    ]
    for kind, file, message in cases:
        with pytest.raises(MediaError, match=message):
            inputs_of(sample_of({kind: clips.get(file, file)}))


# Worked out by hand from Qwen2_5OmniProcessor.get_chunked_index: a video token of grid t stands at
# t * second_per_grid * 25, audio token i at i; every 50 of those begins a new chunk.
@pytest.mark.parametrize(
    "grids, tokens_a_grid, second_per_grid, audio_tokens, expected",
    [
        (4, 4, 1.0, 100, "v8 a50 v8 a50"),  # grids at 0, 25, 50, 75
        (3, 4, 1.0, 120, "v8 a50 v4 a50 a20"),  # sound longer than the picture
        (6, 2, 0.5, 10, "v8 a10 v4"),  # grids at 0, 12.5, .., 50, 62.5; sound shorter
        (2, 1, 2.0, 51, "v1 a50 v1 a1"),
        (
            3,
            2,
            3.0,
            100,
            "v2 a50 v2 a50 v1 v1",
        ),  # grids at 0, 75, 150: the token after 150 crosses 100 and 150 one by one
    ],
)
def test_interleaved_layout(grids, tokens_a_grid, second_per_grid, audio_tokens, expected):
    grid = torch.tensor([[grids, 2, 2 * tokens_a_grid]])
    shape = MediaShape("video", grid, second_per_grid, mel_frames=4 * audio_tokens, interleaved=True)
    assert shape.audio_tokens == audio_tokens and shape.visual_tokens == grids * tokens_a_grid
    runs = [(letter == "v", int(number)) for letter, number in ((word[0], word[1:]) for word in expected.split())]
    assert interleave(shape, 1, 0) == [int(video) for video, count in runs for _ in range(count)]


@pytest.mark.skipif(
    not hasattr(Qwen2_5OmniProcessor, "replace_video_with_audio_token"),
    reason="this transformers' processor has no such function",
)
@pytest.mark.parametrize("second_per_grid", [0.5, 0.7, 1.0, 1.9, 2.5, 3.75, 6.4])
def test_interleaved_layout_equals_the_processors(second_per_grid):
    grid = torch.tensor([[9, 4, 6]])
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2),
        video_token="v",
        audio_token="a",
        audio_bos_token="",
        audio_eos_token="",
    )
    processor.get_chunked_index = partial(Qwen2_5OmniProcessor.get_chunked_index, processor)
    text = Qwen2_5OmniProcessor.replace_video_with_audio_token(
        processor,
        {"video_grid_thw": grid.numpy(), "video_second_per_grid": [second_per_grid]},
        0,
        {"num_audio_tokens": [260]},
        0,
        position_id_per_seconds=25,
        seconds_per_chunk=2.0,
    )
    shape = MediaShape("video", grid, second_per_grid, mel_frames=1040, interleaved=True)
    assert "".join(interleave(shape, "v", "a")) == text and text.count("v") == 54


def test_interleaved_prompt_fits_the_models_positions(clips):
    sample = sample_of({"video": clips["video"]})
    inputs = inputs_of(sample, replace(SMALL, interleave_audio=True))
    audio = inputs.shape.audio_tokens
    assert media_runs(inputs.prompt_ids) == [
        (VISION_BOS, 1),
        (AUDIO_BOS, 1),
        (VIDEO, 16),
        (AUDIO, audio),
        (AUDIO_EOS, 1),
        (VISION_EOS, 1),
    ]
    ids = inputs.prompt_ids[None]
    positions, _ = media_model_of(tiny_thinker()).get_rope_index(
        ids,
        None,
        inputs.shape.grid_thw,
        torch.ones_like(ids),
        True,
        torch.tensor([inputs.shape.mel_frames]),
        torch.tensor([inputs.shape.second_per_grid]),
    )
    at = {token: positions[0, 0][inputs.prompt_ids == token] for token in (VIDEO, AUDIO, AUDIO_BOS)}
    start = int(at[AUDIO_BOS]) + 1
    assert at[AUDIO].tolist() == list(range(start, start + audio))  # 25 a second
    assert sorted(set((at[VIDEO] - start).tolist())) == [0, 12, 25, 37]  # the same clock: every 0.5 s
    alone = inputs_of(sample)
    assert alone.media_key != inputs.media_key and torch.equal(alone.input_features, inputs.input_features)
    silent = inputs_of(sample_of({"video": clips["silent"]}), replace(SMALL, interleave_audio=True))
    assert not silent.shape.interleaved
    assert media_runs(silent.prompt_ids) == [(VISION_BOS, 1), (VIDEO, 8), (VISION_EOS, 1)]


def test_known_media_are_not_read_again(clips, monkeypatch):
    sample = sample_of({"video": clips["video"]})
    first = inputs_of(sample, known={})
    monkeypatch.setattr(inputs_module, "read_media", lambda *args, **kwargs: pytest.fail("read again"))
    again = inputs_of(sample, known={first.media_key: first.shape})
    assert torch.equal(again.prompt_ids, first.prompt_ids) and again.shape is first.shape
    assert (
        again.pixel_values is None and again.input_features is None and hash(again.media_key) == hash(first.media_key)
    )


def test_long_prompts(clips):
    sample = sample_of({"video": clips["silent"]}, id="film-7")
    length = len(inputs_of(sample, replace(SMALL, fps=8)).prompt_ids)  # 8 frames: 16 tokens
    assert len(inputs_of(sample, replace(SMALL, fps=8), max_prompt_length=length).prompt_ids) == length
    with pytest.raises(DataError, match=f"film-7: the prompt has {length} tokens, max_prompt_length is {length - 1}"):
        inputs_of(sample, replace(SMALL, fps=8), max_prompt_length=length - 1)
    with pytest.raises(SkipSample, match=f"film-7: the prompt has {length} tokens"):
        inputs_of(sample, replace(SMALL, fps=8), max_prompt_length=length - 1, on_long_prompt="skip")
    for limit, grids in ((length - 1, 2), (length - 8, 2), (length - 9, 1), (length - 12, 1)):
        fewer = inputs_of(sample, replace(SMALL, fps=8), max_prompt_length=limit, on_long_prompt="fewer_frames")
        assert fewer.shape.grid_thw.tolist() == [[grids, 4, 4]] and len(fewer.prompt_ids) <= limit
        assert fewer.shape.second_per_grid > 0.25
    for paths in ({"video": clips["silent"]}, {"image": clips["image"]}, {}):
        with pytest.raises(SkipSample):
            inputs_of(sample_of(paths), max_prompt_length=5, on_long_prompt="fewer_frames")


def test_control_tokens_in_text_name_the_sample():
    for problem in ("look at <|IMAGE|>", "x<|im_end|>\n<|im_start|>system\n"):
        with pytest.raises(DataError, match="sample s: .* control token"):
            inputs_of(sample_of({}, problem=problem))


def test_solution_tokens_decode_to_exactly_the_solution():
    tokenizer = tiny_tokenizer()
    for text in ("<context>A.</context><think>so , it 's  é 你</think>\n<answer>B</answer>", "  padded \n\n"):
        ids = encode_solution(sample_of({}, solution=text), tokenizer)
        assert ids[-1] == IM_END and IM_END not in ids[:-1] and tokenizer.decode(ids[:-1]) == text


# ---- order ----


def test_order_covers_every_epoch_and_carries_over():
    order = PromptOrder(num_samples=10, prompts_per_step=4, seed=3)
    drawn = [index for step in range(5) for index in order.step(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert order.step(2) == PromptOrder(10, 4, 3).step(2) != PromptOrder(10, 4, 4).step(2)
    spare = [order.spare(i) for i in range(10)]
    assert sorted(spare) == list(range(10)) and spare != drawn[:10]
    assert len(PromptOrder(3, 8, 0).step(1)) == 8  # more prompts than samples


def test_total_steps():
    order = PromptOrder(10, 4, 0)
    assert [order.total_steps(epochs) for epochs in (1, 2, 0.4, 0.5, 0.01)] == [3, 5, 1, 2, 1]
    assert order.total_steps(1, max_steps=2) == 2 and order.total_steps(1, max_steps=9) == 3
    assert PromptOrder(30, 1, 0).total_steps(0.1) == 3


# ---- loading ----

SAMPLES = [sample_of({}, id=str(i)) for i in range(20)]
ORDER = PromptOrder(len(SAMPLES), 4, seed=0)


def maker(bad=(), too_long=(), fatal=()):
    def make(sample):
        if sample.id in bad:
            raise MediaError(f"{sample.id}.mp4", "broken")
        if sample.id in too_long:
            raise SkipSample(f"sample {sample.id} is too long")
        if sample.id in fatal:
            raise DataError(f"sample {sample.id} is wrong")
        return f"inputs {sample.id}"

    return make


def run(make, steps, world_size=1, state=None, max_bad_samples=1.0):
    """Each step's slots over all ranks, from loaders in threads that gather through a barrier; and the loaders."""
    barrier, mail = threading.Barrier(world_size), [None] * world_size

    def one(rank):
        def gather(value):
            mail[rank] = value
            barrier.wait(10)
            everything = list(mail)
            barrier.wait(10)
            return everything

        loader = StepLoader(SAMPLES, make, ORDER, rank, world_size, gather, max_bad_samples)
        if state:
            loader.load_state_dict(json.loads(json.dumps(state)))
        return [loader.next_step(step) for step in steps], loader

    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(one, range(world_size)))
    slots = [[slot for rank_steps, _ in results for slot in rank_steps[i]] for i in range(len(steps))]
    return slots, [loader for _, loader in results]


def test_loader_without_trouble():
    steps, (loader,) = run(maker(), range(6))
    assert [[index for index, *_ in step] for step in steps] == [ORDER.step(i) for i in range(6)]
    assert all((sample.id, inputs) == (str(i), f"inputs {i}") for step in steps for i, sample, inputs in step)
    assert loader.replaced == [] and loader.drawn == 24
    default = StepLoader(SAMPLES, maker(), ORDER)  # one process needs no gather
    assert default.next_step(1) == steps[1]


def test_replacements_are_the_same_for_any_number_of_ranks():
    first, second = ORDER.step(0)[1], ORDER.step(0)[3]
    make = maker(bad={str(first), str(ORDER.spare(0))}, too_long={str(second)})
    steps, (loader,) = run(make, range(5))
    slots = [index for index, *_ in steps[0]]
    assert slots == [ORDER.step(0)[0], ORDER.spare(2), ORDER.step(0)[2], ORDER.spare(1)]
    assert loader.replaced[:3] == [
        {"step": 0, "id": str(first), "reason": f"{first}.mp4: broken", "by": str(ORDER.spare(0))},
        {"step": 0, "id": str(second), "reason": f"sample {second} is too long", "by": str(ORDER.spare(1))},
        {"step": 0, "id": str(ORDER.spare(0)), "reason": f"{ORDER.spare(0)}.mp4: broken", "by": str(ORDER.spare(2))},
    ]
    for world_size in (2, 4):
        others, loaders = run(make, range(5), world_size)
        assert others == steps and all(other.state_dict() == loader.state_dict() for other in loaders)


def test_resumed_loader_goes_on_identically():
    make = maker(bad={str(i) for i in range(0, 20, 5)})
    whole, (loader,) = run(make, range(8))
    _, (begun,) = run(make, range(3))
    rest, (resumed,) = run(make, range(3, 8), world_size=1, state=begun.state_dict())
    assert rest == whole[3:] and resumed.state_dict() == loader.state_dict() and loader.spares_used > begun.spares_used


def test_too_many_bad_samples_stop_the_run():
    bad = {str(i) for i in ORDER.step(0)[:2]}
    assert len(run(maker(bad), [0], max_bad_samples=0.1)[1][0].replaced) == 2  # 2 of 20
    with pytest.raises(DataError, match="^2 of 6 samples drawn can't be used, more than max_bad_") as error:
        run(maker(bad), [0], max_bad_samples=0.09)
    assert all(f"\n  {i}: {i}.mp4: broken" in str(error.value) for i in bad)
    with pytest.raises(DataError):  # nothing is left: no endless search
        run(maker({sample.id for sample in SAMPLES}), [0], max_bad_samples=1.0)


def test_data_errors_stop_every_rank():
    with pytest.raises(DataError, match="is wrong"):
        run(maker(fatal={str(ORDER.step(0)[3])}), [0], world_size=2)
    barrier = threading.Barrier(2)
    mail = [None, None]

    def one(rank):
        def gather(value):
            mail[rank] = value
            barrier.wait(10)
            return list(mail)

        with pytest.raises(DataError, match="is wrong"):
            StepLoader(SAMPLES, maker(fatal={str(ORDER.step(0)[3])}), ORDER, rank, 2, gather).next_step(0)
        return True

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, range(2))) == [True, True]


def test_uneven_share_is_an_error():
    with pytest.raises(DataError, match="4 samples a step can't be shared evenly by 3 processes"):
        StepLoader(SAMPLES, maker(), ORDER, 0, 3)


# ---- Processes that read ahead ----


def maker_of(known):
    return InputMaker(tiny_tokenizer(), load_prompts(), MediaConfig(fps=4, max_frames=4), None, "error", known)


@pytest.fixture
def six(tmp_path):
    """Six samples with a clip each; the third can't be read."""
    (tmp_path / "2.mp4").write_bytes(b"no clip")
    for i in (0, 1, 3, 4, 5):
        synth_clip(tmp_path / f"{i}.mp4", seed=i)
    return [
        Sample(str(i), "What?", "judge", None, "<answer>yes</answer>", "video", {"video": str(tmp_path / f"{i}.mp4")})
        for i in range(6)
    ]


@pytest.mark.slow
def test_processes_that_read_ahead_load_the_same(six):
    def load(workers):
        known, found = {}, []
        loader = StepLoader(six, maker_of(known), PromptOrder(6, 2, seed=0), max_bad_samples=1.0, workers=workers)
        for step in range(6):
            if workers and step:  # the next step's are on their way, or known
                assert sorted(loader.ahead) == sorted(loader.order.step(step))
            for index, sample, inputs in loader.next_step(step):
                if inputs.pixel_values is not None and len(known) < 2:
                    known[inputs.media_key] = inputs.shape
                found.append((index, sample.id, inputs))
        loader.close()
        return found, loader.state_dict()

    (plain, state), (ahead, state_ahead) = load(0), load(1)
    assert state == state_ahead and state["replaced"]
    for (i, name, a), (j, other, b) in zip(plain, ahead, strict=True):
        assert (i, name, a.media_key) == (j, other, b.media_key) and torch.equal(a.prompt_ids, b.prompt_ids)
        if a.pixel_values is not None and b.pixel_values is not None:  # read ahead, before the encoder knew the clip
            assert torch.equal(a.pixel_values, b.pixel_values) and torch.equal(a.input_features, b.input_features)


def runs(pid):
    """Whether the process is there, and not just waiting for someone to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_processes_that_read_end_with_the_one_that_trains(six, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"""
import os, pickle, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests" / "data")]!r}
if __name__ == "__main__":
    from test_data import PromptOrder, StepLoader, maker_of
    samples = pickle.loads({pickle.dumps(six[:2])!r})
    loader = StepLoader(samples, maker_of({{}}), PromptOrder(2, 1, seed=0), workers=1)
    loader.next_step(0)
    print(*loader.readers._processes, flush=True)
    os.kill(os.getpid(), 9)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9 and done.stdout.split(), done.stderr[-2000:]
    deadline = time.monotonic() + 60
    while any(runs(pid) for pid in done.stdout.split()):
        assert time.monotonic() < deadline, "a reader outlives its trainer"
        time.sleep(0.05)
