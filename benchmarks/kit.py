"""What the benchmarks share: a random thinker, prompts with random media, a clock of CPU seconds, memory, tables."""

import itertools
import os
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # hov2 isn't installed, it is used from where it stands

import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from hov2.data import Inputs, MediaShape
from hov2.model import ATTENTION
from hov2.rollout import Sampling

NAMES = ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos")


# ---- The model and its inputs ----------------------------------------------------------------------------------------


def random_thinker(vocab, layers=6, hidden=256, seed=0):
    """A thinker with random weights, float32, eval mode; towers frozen. The last rows of the vocabulary are special.

    Shaped like the 7B: two query heads to a key-value head, an MLP of four times the width, towers that cost about a
    quarter of a forward pass of the prompt.
    """
    heads, ids = hidden // 64, special_ids(vocab)
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
            "max_window_layers": layers, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2),
            "vocab_size": vocab, "max_position_embeddings": 32768, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        },
        vision_config={"depth": 4, "hidden_size": hidden // 2, "intermediate_size": hidden, "num_heads": 4,
                       "out_hidden_size": hidden, "fullatt_block_indexes": [3]},
        audio_config={"encoder_layers": 4, "d_model": hidden // 2, "encoder_attention_heads": 4,
                      "encoder_ffn_dim": 2 * hidden, "output_dim": hidden},
        image_token_index=ids["image"], audio_token_index=ids["audio"], video_token_index=ids["video"],
        vision_start_token_id=ids["vision_bos"], vision_end_token_id=ids["vision_eos"],
        audio_start_token_id=ids["audio_bos"], audio_end_token_id=ids["audio_eos"], tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    for tower in (thinker.model.visual, thinker.model.audio_tower):
        tower.requires_grad_(False)
    return thinker


def use_hov2_attention(thinker):
    """The thinker with the attention that hov2 gives to a model that it loads."""
    thinker.model.language_model.set_attn_implementation(ATTENTION)
    return thinker


def special_ids(vocab):
    """{name: id}: the last rows of the vocabulary."""
    return dict(zip(NAMES, range(vocab - len(NAMES), vocab)))


def random_inputs(vocab, video_tokens=1024, audio_tokens=375, text_tokens=160, seed=0):
    """A prompt with a random clip, as `data.make_inputs` gives it; its markers add 4 tokens.

    The video has 64 tokens for each pair of frames (`video_tokens` a multiple of 64; fewer than 64 are one pair in a
    single row), the sound 25 tokens a second.
    """
    g, ids = torch.Generator().manual_seed(seed), special_ids(vocab)
    rows, columns = (16, 16) if video_tokens >= 64 else (2, 2 * video_tokens)
    grid = torch.tensor([[max(1, video_tokens // 64), rows, columns]])
    text = torch.randint(0, vocab - len(NAMES), (text_tokens,), generator=g).tolist()
    prompt = [*text[:8], ids["vision_bos"], *[ids["video"]] * video_tokens, ids["vision_eos"],
              ids["audio_bos"], *[ids["audio"]] * audio_tokens, ids["audio_eos"], *text[8:]]
    mel_frames = 4 * audio_tokens
    shape = MediaShape(visual_kind="video", grid_thw=grid, second_per_grid=1.0, mel_frames=mel_frames)
    patches = torch.randn(int(grid.prod()), 1176, generator=g)
    return Inputs(torch.tensor(prompt), shape, (seed,), patches, torch.randn(128, mel_frames, generator=g))


def random_completions(vocab, generations, length, seed=0):
    """(G, T) token ids, none of them special."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab - len(NAMES), (generations, length), generator=g)


def sampling_for(vocab, length, temperature=0.9, top_k=50):
    """Sampling that never stops before `length` tokens, so that every way decodes as many."""
    return Sampling(max_completion_length=length, stop_ids=[-1], pad_id=0, temperature=temperature, top_k=top_k,
                    suppressed_ids=torch.tensor(list(special_ids(vocab).values())))


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Clock:
    """CPU and wall seconds of named phases; an inner phase's time isn't the outer's.

    `with clock("decode"): ...`; results in `clock.cpu` and `clock.wall`, {name: seconds}. CPU seconds are the whole
    process's, all threads.
    """

    def __init__(self):
        self.cpu, self.wall, self.phases = defaultdict(float), defaultdict(float), []

    @contextmanager
    def __call__(self, name):
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name):
        """Begins a phase, within the present one if there is one."""
        self._charge()
        self.phases.append(name)

    def leave(self, *_):
        """Ends the innermost phase."""
        self._charge()
        self.phases.pop()

    def _charge(self):
        now = time.process_time(), time.perf_counter()
        if self.phases:
            self.cpu[self.phases[-1]] += now[0] - self._last[0]
            self.wall[self.phases[-1]] += now[1] - self._last[1]
        self._last = now


class Memory:
    """Resident memory of this process, in MiB; None where the system isn't Linux."""

    def __init__(self):
        self.known = os.path.exists("/proc/self/clear_refs")
        self.start = self._read("VmRSS")

    def reset_peak(self):
        """Forgets the highest value so far."""
        if self.known:
            Path("/proc/self/clear_refs").write_text("5")

    def growth(self):
        """How far the peak since `reset_peak` lies above the memory when this object was made."""
        return self._read("VmHWM") - self.start if self.known else None

    def _read(self, name):
        if not self.known:
            return None
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) / 1024


class Workers:
    """One process for each way, alive for the whole run, so that no way inherits another's memory.

    `setup(*args)` is called once in each; `call(way, function, *args)` runs a function there and waits for it.
    """

    def __init__(self, ways, threads, setup, *args):
        self.pools = {way: ProcessPoolExecutor(1, get_context("spawn"), _start, (threads, setup, way, *args))
                      for way in ways}

    def call(self, way, function, *args):
        """The function's result; its arguments and result are pickled."""
        return self.pools[way].submit(function, *args).result()

    def close(self):
        """Ends the processes."""
        for pool in self.pools.values():
            pool.shutdown()


def _start(threads, setup, *args):
    torch.set_num_threads(threads)
    setup(*args)


def interleaved(ways, repeats):
    """(repetition, way) in an order that spreads a slow minute of the machine over all ways."""
    return itertools.product(range(repeats), ways)


def median(values):
    """The median of the values; None if one is None (not measured)."""
    return None if None in values else statistics.median(values)


# ---- Printing --------------------------------------------------------------------------------------------------------


def print_table(header, rows):
    """A Markdown table; numbers get three significant digits, None a dash."""
    cells = [header, *[[_text(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
             for row in cells]
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    print("\n".join("| " + " | ".join(line) + " |" for line in lines), flush=True)


def _text(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def machine():
    """One line on what the figures were measured on."""
    return (f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} "
            f"(1 min, at the start)")
