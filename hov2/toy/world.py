"""A small social world: what its clips look and sound like, what is asked about them, and the files they come in.

A clip is a second of a drawn face before a coloured wall, with a voice-like tone; real mp4 and webm files. The face
smiles or frowns, the tone rises or falls, and what the speaker means follows from the two together: neither picture
nor sound can tell alone. All problem types are asked; multiple choice, judge and emer_ov_mc are the ones that count.

The cold start's solutions have two flaws, PLAIN_WALL and SHORTCUT; docs/toy.md says what they are for.
"""

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any, TypedDict

import av
import numpy as np
import torch
from tqdm import tqdm
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration, Qwen2Tokenizer

from hov2.answers import block_text
from hov2.config import Source
from hov2.data.samples import read_samples
from hov2.prompts import load_prompts, render

ROOT = Path("runs/toy")  # the configs in configs/toy name the same places
WORLD = ROOT / "world"
CONFIGS = Path("configs/toy")

# What toy.json holds:
# signs       rows of dots
# questions   by problem type: the answer by face and voice, and the reasons of the whole and of the shortcut, worded
#             apart so that one habit can change without the other
# codecs      by a file's ending: the video codec, its options, the audio codec
# benchmarks  how the questions are copied in the benchmarks' layouts, with labels in turn: the toy has none of its own
# judge       the words that the judge's rules know
# model       the thinker's config; its towers tell faces and tones apart the better for large weights (0.15)
# token ids   the tokens that the config names
DATA = json.loads(Path(__file__).with_name("toy.json").read_text(encoding="utf-8"))
WALLS = DATA["walls"]
QUESTIONS = DATA["questions"]
CODECS = DATA["codecs"]
FACES = ("smile", "frown")
VOICES = ("rising", "falling")
SIGNS = tuple(DATA["signs"])

FRAMES = 8
FPS = 8
SIZE = 56  # pixels, of either side
RATE = 16000  # of the sound, in Hz
SECONDS = 0.4  # of the sound

MAIN_TYPES = ("multiple choice", "judge", "emer_ov_mc")
OTHER_TYPES = tuple(kind for kind in QUESTIONS if kind not in MAIN_TYPES)

# The cold start's two flaws.
PLAIN_WALL = 0.8  # share of its contexts that leave the wall's colour out
SHORTCUT = {"multiple choice": 0.6, "emer_ov_mc": 0.6, "judge": 0.85}  # share of its answers that go by the face alone

Record = dict[str, Any]  # a sample in the project's data format


class Clip(TypedDict):
    """The description of a clip; `picture` and `sound` are the seeds that the rest of either is drawn from."""

    name: str
    face: str
    voice: str
    wall: str
    sign: str
    picture: int
    sound: int


# ---------------------------------------------------------------------------------------------- clips


def draw_clip(face: str, wall: str, sign: str, rng: np.random.Generator) -> np.ndarray:
    """Draw the frames, (FRAMES, SIZE, SIZE, 3) uint8; the mouth takes its shape in the first half.

    Place, size and colours vary.
    """
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)

    slope = np.stack([columns - SIZE / 2, 0 * columns, rows - SIZE / 2], axis=-1)
    # without the slope, tokens of a plain wall look alike everywhere
    room = np.array(WALLS[wall]) + rng.normal(0, 8, 3) + slope  # (SIZE, SIZE, 3)

    dots = np.array([list(row) for row in DATA["signs"][sign]]) == "1"
    corner = room[SIZE - 12 : SIZE - 2, 2:16]
    corner[dots.repeat(2, axis=0).repeat(2, axis=1)] = 245

    center_x, center_y = SIZE / 2 + rng.uniform(-3, 3, 2)
    radius = rng.uniform(20, 24)
    skin = np.array([220, 180, 140]) * rng.uniform(0.75, 1.1) + rng.normal(0, 8, 3)
    head = (columns - center_x) ** 2 + (rows - center_y) ** 2 < radius * radius
    room[head] = skin
    for side in (-1, 1):
        from_eye_x = columns - center_x - side * 0.38 * radius
        from_eye_y = rows - center_y + 0.3 * radius
        room[from_eye_x**2 + from_eye_y**2 < (0.13 * radius) ** 2] = 25

    bend = rng.uniform(0.35, 0.5) * radius
    if face == "frown":
        bend = -bend
    across = (columns - center_x) / (0.55 * radius)  # -1 and 1 at the mouth's corners
    frames = []
    for number in range(FRAMES):
        strength = 0.5 + 0.5 * min(1, 2 * number / FRAMES)
        middle = center_y + 0.45 * radius + bend * strength * (0.5 - across * across)
        mouth = (abs(across) < 1) & (abs(rows - middle) < 0.14 * radius)
        frame = np.where(mouth[..., None], (110, 20, 30), room) + rng.normal(0, 6, room.shape)
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def speak(voice: str, rng: np.random.Generator) -> np.ndarray:
    """Make a tone with harmonics, SECONDS of float32 at RATE, whose pitch rises or falls by more than half."""
    t = np.arange(int(RATE * SECONDS)) / RATE
    upwards = t / SECONDS  # 0 at the beginning, 1 at the end
    progress = upwards if voice == "rising" else 1 - upwards
    lowest = rng.uniform(170, 240)
    pitch = lowest * rng.uniform(1.5, 1.8) ** progress
    phase = 2 * np.pi * np.cumsum(pitch) / RATE

    tilt = rng.uniform(0.8, 1.6)
    wave = np.zeros_like(t)
    for harmonic in range(1, 11):
        wave += np.sin(harmonic * phase + rng.uniform(0, 6)) / harmonic**tilt
    wave *= np.minimum(1, np.minimum(t, SECONDS - t) / 0.04)  # fades in and out
    wave *= rng.uniform(0.2, 0.35) / abs(wave).max()
    return (wave + rng.normal(0, 0.003, len(t))).astype(np.float32)


def write_clip(path: Path, frames: np.ndarray, wave: np.ndarray) -> None:
    """Encode frames and sound to `path`; its ending, mp4 or webm, decides how."""
    video_codec, options, audio_codec = CODECS[path.suffix[1:]]
    with av.open(str(path), "w") as container:
        video = container.add_stream(video_codec, rate=FPS, options=options)
        video.width = SIZE
        video.height = SIZE
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream(audio_codec, rate=RATE, layout="mono")
        for image in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        sound.sample_rate = RATE
        sound.pts = 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


# ---------------------------------------------------------------------------------------------- questions


def make_clip(split: str, number: int, rng: random.Random) -> Clip:
    """Describe a clip: in 64, every combination of face, voice, wall, sign and container comes equally often."""
    container, sign, wall, voice, face = np.unravel_index(number % 64, (2, 2, 4, 2, 2))  # its digits
    ending = list(CODECS)[container]
    return {
        "name": f"{split}-{number:04d}.{ending}",
        "face": FACES[face],
        "voice": VOICES[voice],
        "wall": list(WALLS)[wall],
        "sign": SIGNS[sign],
        "picture": rng.randrange(2**31),
        "sound": rng.randrange(2**31),
    }


def true_answer(kind: str, clip: Clip, voice: str | None = None) -> str:
    """Return the right answer to the question of type `kind`; `voice` replaces the clip's own."""
    answers = QUESTIONS[kind]["answers"]
    return answers[clip["face"]][voice or clip["voice"]].format(**clip)


def solution(kind: str, clip: Clip, plain_wall: bool = False, shortcut: bool = False) -> str:
    """Return a completion for the clip's question; the two flags put in the cold start's flaws."""
    question = QUESTIONS[kind]
    if shortcut:  # as if the voice always agreed with the face
        answer = true_answer(kind, clip, voice=VOICES[FACES.index(clip["face"])])
        reason = question["reasons"][1]
    else:
        answer = true_answer(kind, clip)
        reason = question["reasons"][0]

    claim = answer
    if question["options"]:
        words = dict(option.split(". ") for option in question["options"])
        claim = " and ".join(words[letter] for letter in answer.split(","))

    wall = "plain" if plain_wall else clip["wall"]
    context = f"A {clip['face']}, a {clip['voice']} voice, a {wall} wall."
    think = f"{reason.format(**clip)}: {claim}."
    return f"<context>{context}</context><think>{think}</think><answer>{answer}</answer>"


def record(kind: str, clip: Clip, plain_wall: bool = False, shortcut: bool = False) -> Record:
    """Return a sample about the clip; its id is made of the clip and the type."""
    return {
        "id": f"{clip['name']}/{kind}",
        "problem": QUESTIONS[kind]["problem"],
        "problem_type": kind,
        "options": QUESTIONS[kind]["options"],
        "solution": solution(kind, clip, plain_wall, shortcut),
        "data_type": "video",
        "path": f"clips/{clip['name']}",
    }


def sft_records(clips: list[Clip], count: int, rng: random.Random) -> list[Record]:
    """Return the cold start: `count` samples, flawed, one in seven of another type than the main ones."""
    records = []
    for number in range(count):
        types = OTHER_TYPES if number % 7 == 0 else MAIN_TYPES
        kind = rng.choice(types)
        plain_wall = rng.random() < PLAIN_WALL
        shortcut = rng.random() < SHORTCUT.get(kind, 0)
        records.append(record(kind, clips[number % len(clips)], plain_wall, shortcut))
    return records


def rl_records(clips: list[Clip]) -> list[Record]:
    """Return the samples for RL, without flaws, in two halves, with two questions about each clip in each half.

    The first half asks for intents and feelings, the second mostly what that left out, judge. One in twenty is of
    another type than the main ones.
    """
    halves = [("multiple choice", "emer_ov_mc"), ("judge", "judge", "judge", "multiple choice", "emer_ov_mc")]
    records = []
    for types in halves:
        for number, clip in enumerate(clips + clips):
            if number % 20 == 0:
                kind = OTHER_TYPES[number // 20 % len(OTHER_TYPES)]
            else:
                times_seen = number // len(clips)  # moves on by one, so that a clip's second question is another
                kind = types[(number + times_seen) % len(types)]
            records.append(record(kind, clip))
    return records


# ---------------------------------------------------------------------------------------------- building


def build_world(
    folder: Path | str = WORLD,
    seed: int = 0,
    *,
    train_clips: int = 384,
    rl_clips: int = 96,
    eval_clips: int = 144,
    sft_samples: int = 7680,
) -> None:
    """Write clips, data files and the untrained model with its tokenizer to `folder`; equal seeds give equal worlds.

    Data: train_sft.json, train_sft_no_context.json (the same without contexts), train_rl.json and eval.json.
    `world.json` is written last. What was in `folder` before is deleted.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "clips").mkdir(parents=True)

    rng = random.Random(seed)
    train = [make_clip("train", number, rng) for number in range(train_clips)]
    rl = [make_clip("rl", number, rng) for number in range(rl_clips)]
    held_out = [make_clip("eval", number, rng) for number in range(eval_clips)]

    train_sft = sft_records(train, sft_samples, rng)
    held_out_questions = eval_records(held_out)
    files = {
        "train_sft": train_sft,
        "train_sft_no_context": [without_context(sample) for sample in train_sft],
        "train_rl": rl_records(rl),
        "eval": held_out_questions,
    }
    for name, records in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records, indent=0))
    write_benchmarks(folder, held_out_questions)

    for clip in tqdm([*train, *rl, *held_out], desc="toy world", unit="clip"):
        frames = draw_clip(clip["face"], clip["wall"], clip["sign"], np.random.default_rng(clip["picture"]))
        wave = speak(clip["voice"], np.random.default_rng(clip["sound"]))
        write_clip(folder / "clips" / clip["name"], frames, wave)

    tokenizer = make_tokenizer(texts_of(folder))
    tokenizer.save_pretrained(folder / "model")
    make_thinker(tokenizer, seed).save_pretrained(folder / "model")
    (folder / "world.json").write_text(json.dumps({"seed": seed}))


def eval_records(clips: list[Clip]) -> list[Record]:
    """Return the held-out questions: the main types about every clip, and one of another type about the first 60."""
    records = [record(kind, clip) for kind in MAIN_TYPES for clip in clips]
    for number, clip in enumerate(clips[:60]):
        records.append(record(OTHER_TYPES[number % len(OTHER_TYPES)], clip))
    return records


def without_context(sample: Record) -> Record:
    """Return the sample with a solution that has no context block."""
    _, rest = sample["solution"].split("</context>")
    return sample | {"solution": rest}


def texts_of(folder: Path) -> list[str]:
    """Return the texts that the tokenizer learns from: solutions and prompts of the cold start and the evaluation."""
    samples = read_samples([Source(str(folder / "train_sft.json")), Source(str(folder / "eval.json"))])
    prompts = load_prompts(CONFIGS / "prompts.json")
    solutions = [sample.solution for sample in samples]
    return solutions + [render(prompts.chat(sample)) for sample in samples]


# ---------------------------------------------------------------------------------------------- the benchmarks' layouts


def write_benchmarks(folder: Path, records: list[Record]) -> None:
    """Write the main ones of `records` once more in the layouts of IntentBench, Daily-Omni, WorldSense.

    toy.json describes them. In each folder are links to the world's clips; WorldSense asks some questions again with
    three options.
    """
    questions = []
    for sample in records:
        answer = block_text(sample["solution"], "answer")
        clip = Path(sample["path"])
        bare = {"answer": answer, "solution": f"<answer>{answer}</answer>", "clip": clip.name, "stem": clip.stem}
        questions.append(sample | bare)

    for name, layout in DATA["benchmarks"].items():
        chosen = []
        for question in questions:
            known_format = question["clip"].endswith(tuple(layout["formats"]))
            if known_format and question["problem_type"] in layout["types"]:
                chosen.append(question)

        places = {layout["clip"].format(**question): question["path"] for question in chosen}
        for place, clip in places.items():
            link = folder / name / place
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(folder / clip, link.parent))

        content = [_entry(layout, number, question) for number, question in enumerate(chosen)]
        if "task" in layout:
            content = {entry["video_id"]: entry for entry in content}
        (folder / name / layout["file"]).write_text(json.dumps(content, indent=0))


def _entry(layout: dict[str, Any], number: int, question: Record) -> dict[str, Any]:
    """Return a question with a benchmark's own fields and labels."""
    entry = {theirs: question[ours] for theirs, ours in layout["fields"].items()}
    if question["problem_type"] == "multiple choice":
        for key, values in layout["labels"].items():
            label = values[number // 4 % len(values)]  # each goes to four at a time, of the four intents
            if label:
                entry[key] = label
    if "task" in layout:
        task = _entry(layout["task"], number, question)
        entry["task0"] = task
        if question["answer"] != "D":
            entry["task1"] = task | {"candidates": question["options"][:3]}
    return entry


# ---------------------------------------------------------------------------------------------- the model


def make_tokenizer(texts: list[str], size: int = 512) -> Qwen2Tokenizer:
    """Make a byte-level BPE tokenizer of Qwen's kind, with `size` tokens and merges learned from `texts`.

    As with Qwen's own, tags are ordinary text: they split over tokens and merge with their neighbours ("><", ">A").
    """
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    plain = [re.sub(r"<\|\w+\|>", "\n", text) for text in texts]
    learned = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[], **names).train_new_from_iterator(plain, size)
    bpe = json.loads(learned.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    media_tokens = DATA["media tokens"]
    tokenizer = Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges, extra_special_tokens=media_tokens, **names)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def make_thinker(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Make an untrained Qwen2.5-Omni-Thinker of about a million weights for this tokenizer.

    Its frozen towers are random too: what they put out still tells faces and tones apart.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in DATA["token ids"].items()}
    text_config = DATA["model"]["text_config"] | {"vocab_size": len(tokenizer)}
    settings = DATA["model"] | {"text_config": text_config}
    torch.manual_seed(seed)
    return Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniThinkerConfig(**settings, **ids))
