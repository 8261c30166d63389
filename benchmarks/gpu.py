"""What hov2 does on a GPU: its tests there, decoding, one GRPO step beside two other ways of working, memory.

    python benchmarks/gpu.py --out gpu-results         the 7B's sizes, random weights; 80 GB, at most 8 minutes
    python benchmarks/gpu.py --tiny                    all of it at tiny sizes on the CPU, 1 minute

Each part is a process of its own, so that one that fails takes nothing with it, and its figures are written as soon as
it ends: `results.json` and `results.md` in the folder. Weights are made on the device; nothing is downloaded, and PyAV
isn't needed. Rates are by the clock on the wall, after a warm-up. The three ways are those of grpo_step.py.
"""

import argparse
import gc
import json
import platform
import re
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import kit
import torch
from grpo_step import Batched, Released
from thinker import NAMES, random_completions, random_inputs, random_thinker
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from hov2 import distributed
from hov2.config import GRPOConfig, LoRAConfig
from hov2.engine.optim import clip_gradients, make_optimizer
from hov2.grpo import grpo_loss, sampling_kl
from hov2.model.attention import use_own_parts
from hov2.model.encoder import Encoder, Prompt
from hov2.model.lora import LoRALinear, adapters_off, add_lora
from hov2.model.prefix import group_logps
from hov2.model.rollout import Sampling, generate, make_generator
from hov2.model.thinker import Policy, set_training, tower_parameters
from hov2.tools import plan

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    video_tokens: int = 1024
    audio_tokens: int = 500
    text_tokens: int = 472
    decode_prompt: int = 2048  # tokens of a prompt where only decoding is measured
    decode_tokens: int = 512
    few_tokens: int = 64  # for the slow ways of decoding
    generations: int = 8
    completion_tokens: int = 512
    released_run: int = 1  # completions of the released way that are run; its seconds are scaled to all


TINY = Sizes(
    video_tokens=8,
    audio_tokens=5,
    text_tokens=12,
    decode_prompt=24,
    decode_tokens=20,
    few_tokens=6,
    generations=3,
    completion_tokens=12,
)


# ---- A policy with random weights, on the device ---------------------------------------------------------------------


def make_policy(device, tiny, own=True, lora=True):
    """A sharded Policy as `model.load_policy` makes it, its weights drawn at random instead of read.

    own: with hov2's attention and norms; else transformers' as they are. Without LoRA nothing is trained.
    """
    dtype = distributed.compute_dtype("auto", device)
    if tiny:
        config = random_thinker(512, layers=2, hidden=64).config
    else:
        config = plan.published_thinker("Qwen/Qwen2.5-Omni-7B").config
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        thinker = Thinker(config).eval().to(dtype)
    if own:
        use_own_parts(thinker)
    for parameter in thinker.parameters():
        parameter.requires_grad_(False)
    if lora:
        add_lora(thinker, LoRAConfig())
    policy = distributed.shard(Policy(thinker), distributed.make_mesh(device), dtype, tower_parameters(thinker))
    policy.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in thinker.named_parameters():
        local = distributed.local(parameter.detach())
        if parameter.dim() == 1:
            local.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            local.normal_(std=0.02, generator=generator)
    for module in thinker.modules():
        if isinstance(module, LoRALinear):
            module.start(torch.Generator().manual_seed(0))
        elif next(module.buffers(recurse=False), None) is not None:
            thinker._init_weights(module)
    return policy


def vocabulary(policy):
    """The number of text tokens that the model knows, and the ids of its media tokens."""
    config = policy.thinker.config
    media = [config.image_token_id, config.video_token_id, config.audio_token_id]
    return min(*media, config.text_config.vocab_size) - len(NAMES), media


def sampling_of(policy, length, decoding="auto"):
    """Sampling at the training's settings that never stops before `length` tokens."""
    _, media = vocabulary(policy)
    return Sampling(length, [-1], 0, torch.tensor(media), temperature=0.9, top_k=50, decoding=decoding)


def own_inputs(policy, sizes):
    """A prompt of a clip, its sound and a question, with the model's own media ids (CPU tensors)."""
    config, (words, _) = policy.thinker.config, vocabulary(policy)
    drawn = random_inputs(words + len(NAMES), sizes.video_tokens, sizes.audio_tokens, sizes.text_tokens)
    ids = dict(
        zip(
            range(words, words + len(NAMES)),
            (
                config.image_token_id,
                config.audio_token_id,
                config.video_token_id,
                config.vision_start_token_id,
                config.vision_end_token_id,
                config.audio_start_token_id,
                config.audio_end_token_id,
            ),
        )
    )
    drawn.prompt_ids = torch.tensor([ids.get(token, token) for token in drawn.prompt_ids.tolist()])
    return drawn


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds and peak memory (GiB, None on the CPU) of named phases; it waits for the device at both ends."""

    def __init__(self, device):
        self.cuda, self.seconds, self.peak = device.type == "cuda", {}, {}

    @contextmanager
    def __call__(self, name):
        self._wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        if self.cuda:
            self.peak[name] = torch.cuda.max_memory_allocated() / plan.GIB

    def _wait(self):
        if self.cuda:
            torch.cuda.synchronize()


def allocated():
    """GiB that tensors on the GPU take now; None without one."""
    return torch.cuda.memory_allocated() / plan.GIB if torch.cuda.is_initialized() else None


def rate(device, work, multiple):
    """`multiple` over the seconds of the middle one of five runs of `work()`, after two that warm up."""
    seconds = []
    for _ in range(7):
        watch = Stopwatch(device)
        with watch("work"):
            work()
        seconds.append(watch.seconds["work"])
    return multiple / kit.median(seconds[2:])


# ---- Parts -----------------------------------------------------------------------------------------------------------


def part_device(asked, device):
    """Versions, the device, and its two ceilings: bytes a second of a copy, FLOP a second of a matrix product."""
    import transformers

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "name": "CPU",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "memory_gib": properties.total_memory / plan.GIB, "cuda": torch.version.cuda}
    count, size = (2**20, 256) if asked.tiny else (2**32, 8192)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["bytes_per_second"] = rate(device, lambda: target.copy_(source), 2 * count)
    factor = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    found["flop_per_second"] = rate(device, lambda: factor @ factor, 2 * size**3)
    return found


def part_tests(asked, device):
    """Runs the tests that are marked `cuda`; without a GPU they are only looked for."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/model/test_cuda.py", "-p", "no:cacheprovider"]
    if device.type != "cuda":
        command.append("--collect-only")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (Path(asked.out) / "pytest.log").write_text(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines()
    return {
        "passed": done.returncode == 0,
        "summary": lines[-1] if lines else done.stderr[-500:],
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def part_decoding(asked, device):
    """Tokens a second of decoding: without a graph, as a graph, by transformers' generate."""
    sizes = TINY if asked.tiny else Sizes()
    found = {}
    for lora in (False, True):
        policy = make_policy(device, asked.tiny, lora=lora)
        for prompts in (1, 8):
            rows = prompts * sizes.generations
            named = f"{prompts} x {sizes.generations}{', LoRA' * lora}"
            figures = {"limit": rate_at_bandwidth(policy, sizes, prompts, asked.bandwidth)}
            for decoding, tokens in (("fixed", sizes.few_tokens), ("graph", sizes.decode_tokens)):
                figures[decoding] = decode_rate(policy, device, sizes, prompts, tokens, decoding)
                print(named, decoding, f"{figures[decoding]:.0f} tokens/s", flush=True)
            if not lora:
                with patch("hov2.model.rollout.stacked_projections", lambda *_: nullcontext()):
                    figures["apart"] = decode_rate(policy, device, sizes, prompts, sizes.decode_tokens, "graph")
            found[named] = figures | {"rows": rows}
        del policy
        release()
    policy = make_policy(device, asked.tiny, own=False, lora=False)
    for prompts in (1, 8):
        named = f"{prompts} x {sizes.generations}"
        try:
            found[named]["transformers"] = transformers_rate(policy, device, sizes, prompts)
        except torch.OutOfMemoryError as error:  # it makes the logits of all prompt tokens
            print(named, "transformers:", error, flush=True)
    return found


def text_prompts(policy, device, sizes, prompts):
    """Prompts of random text, of which the first is the longest."""
    words, _ = vocabulary(policy)
    found = []
    for number in range(prompts):
        length = sizes.decode_prompt - number * (sizes.decode_prompt // 64)
        ids = torch.randint(0, words, (length,), generator=torch.Generator().manual_seed(number)).to(device)
        found.append(Prompt(ids, torch.arange(length, device=device).expand(3, -1), None, None))
    return found


def decode_rate(policy, device, sizes, prompts, tokens, decoding):
    """Tokens a second of all rows after the first token: what a rollout takes beyond its prefill."""
    batch = text_prompts(policy, device, sizes, prompts)

    def rollout(length):
        generators = [make_generator(device, 0, i) for i in range(prompts)]
        watch = Stopwatch(device)
        with watch("rollout"):
            policy(generate, batch, sizes.generations, sampling_of(policy, length, decoding), generators)
        return watch.seconds["rollout"]

    with torch.no_grad(), distributed.unsharded(policy):
        rollout(4)  # warms up
        prefill = kit.median([rollout(1) for _ in range(3)])
        return (tokens - 1) * prompts * sizes.generations / (rollout(tokens) - prefill)


def transformers_rate(policy, device, sizes, prompts):
    """The same of transformers' `generate`, with a copy of its prompt for each row (all of the longest's length)."""
    rows = prompts * sizes.generations
    ids = text_prompts(policy, device, sizes, 1)[0].ids.repeat(rows, 1)

    def generation(thinker, length):
        return thinker.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=0.9,
            top_k=50,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
        )

    def seconds(length):
        watch = Stopwatch(device)
        with watch("generate"):
            policy(generation, length)
        return watch.seconds["generate"]

    with torch.no_grad(), distributed.unsharded(policy):
        seconds(2)
        return (sizes.few_tokens - 1) * rows / (seconds(sizes.few_tokens) - seconds(1))


def rate_at_bandwidth(policy, sizes, prompts, bytes_per_second):
    """Tokens a second if each token's step read weights and cached keys and values once, at the copy's bandwidth."""
    if not bytes_per_second:
        return None
    shapes = plan.shapes_of(policy.thinker)
    width = distributed.compute_dtype("auto", next(policy.parameters()).device).itemsize
    rows = prompts * sizes.generations
    weights = shapes.decoder - shapes.vocab * shapes.hidden  # of the embeddings only a few rows are read
    cached = prompts * sizes.decode_prompt + rows * sizes.decode_tokens // 2
    return rows * bytes_per_second / (width * weights + plan.kv_bytes(shapes, cached, width))


class Hov2:
    """train_grpo.py's calls for one prompt."""

    share = 1  # of the completions that are run

    def __init__(self, policy, inputs, sizes):
        self.policy, self.inputs, self.sizes = policy, inputs, sizes
        device = next(policy.parameters()).device
        self.device, self.encoder = device, Encoder(policy.thinker, device)

    def encode(self):
        """The towers, once for the whole step."""
        self.prompt = self.encoder(self.inputs)

    def sample(self, length):
        """(G, length) completions, and the sampler's own log-probs of them."""
        sampling = replace(sampling_of(self.policy, length), logps=1)
        rollout = self.policy(
            generate, [self.prompt], self.sizes.generations, sampling, [make_generator(self.device, 1)]
        )[0]
        return rollout.completion_ids, rollout.sampling_logps

    def batches(self, completions):
        """What goes through the model at a time."""
        return [completions]

    def logps(self, completions):
        """(G, C) log-probs."""
        return self.policy(group_logps, [self.prompt], [completions], 0.9)[0][0]


class OfTransformers:
    """One of grpo_step.py's two other ways, on a sharded policy."""

    def __init__(self, kind, policy, inputs, sizes):
        self.policy, self.sizes, self.device = policy, sizes, next(policy.parameters()).device
        for name in ("prompt_ids", "pixel_values", "input_features"):
            setattr(inputs, name, getattr(inputs, name).to(self.device))
        inputs.pixel_values, inputs.input_features = (
            x.to(policy.thinker.dtype) for x in (inputs.pixel_values, inputs.input_features)
        )
        inputs.shape.grid_thw = inputs.shape.grid_thw.to(self.device)
        self.way = kind(policy.thinker, None, inputs, None)
        self.single = kind is Released
        self.share = sizes.released_run / sizes.generations if self.single else 1

    def encode(self):
        """Nothing: the towers are part of each forward pass."""

    def sample(self, length):
        """Completions (rows, length): one call for all rows, or a call for each."""
        calls, rows = (self.sizes.released_run, 1) if self.single else (1, self.sizes.generations)
        sampling = sampling_of(self.policy, length)

        def sample(_, seed):
            return self.way.sample(rows, sampling, seed)

        return torch.cat([self.policy(sample, seed) for seed in range(calls)]), None

    def batches(self, completions):
        """What goes through the model at a time."""
        return completions.split(1) if self.single else [completions]

    def logps(self, completions):
        """(rows, C) log-probs."""
        return self.policy(lambda thinker: self.way.logps(thinker, completions))


def step(way, optimizer, completions, watch, length):
    """One GRPO step in its phases; returns what a table is made of."""
    policy, found = way.policy, {}
    with watch("encode"), torch.no_grad():
        way.encode()
    set_training(policy, False, True)
    with watch("rollout"), torch.no_grad(), distributed.unsharded(policy):
        sampled, sampling_logps = way.sample(length)
    if sampling_logps is not None:
        with torch.no_grad():
            again = way.logps(sampled)
        found["sampling_kl"] = float(sampling_kl(again, sampling_logps, torch.ones_like(again)))
    set_training(policy, True, True)
    advantages = torch.linspace(-1, 1, len(completions), device=way.device)
    batches = list(zip(way.batches(completions), way.batches(advantages)))
    for number, (given, advantage) in enumerate(batches):
        with watch("reference"), torch.no_grad(), adapters_off():
            reference = way.logps(given)
        policy.set_requires_gradient_sync(number == len(batches) - 1)
        with watch("forward"):
            logps = way.logps(given)
            loss, _ = grpo_loss(
                logps.float(),
                logps.detach().float(),
                reference.float(),
                advantage,
                torch.ones_like(given),
                num_items=completions.numel(),
            )
        with watch("backward"):
            loss.backward()
    with watch("optimizer"):
        found["grad_norm"] = clip_gradients(policy, 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


def step_part(asked, device, kind):
    """One step of a way: seconds and peak memory by phase."""
    sizes = TINY if asked.tiny else Sizes()
    policy = make_policy(device, asked.tiny, own=kind is Hov2)
    config = GRPOConfig(
        model="",
        output_dir="",
        data=[],
        lora=LoRAConfig(),
        prompts_per_step=1,
        num_generations=sizes.generations,
        max_completion_length=sizes.completion_tokens,
    )
    optimizer, inputs = make_optimizer(policy, config), own_inputs(policy, sizes)
    way = Hov2(policy, inputs, sizes) if kind is Hov2 else OfTransformers(kind, policy, inputs, sizes)
    words, _ = vocabulary(policy)
    rows = sizes.released_run if kind is Released else sizes.generations
    completions = random_completions(words + len(NAMES), rows, sizes.completion_tokens).to(device)
    step(way, optimizer, completions[:, :8], Stopwatch(device), 4)  # warms up
    release()
    held = allocated()
    watch = Stopwatch(device)
    found = step(way, optimizer, completions, watch, sizes.completion_tokens)
    seconds = {name: value / (1 if name == "optimizer" else way.share) for name, value in watch.seconds.items()}
    found |= {
        "seconds": seconds,
        "total": sum(seconds.values()),
        "peak_gib": watch.peak,
        "held_gib": held,
        "prompt_tokens": len(inputs.prompt_ids),
    }
    if kind is Hov2:
        shapes = replace(plan.shapes_of(policy.thinker), lora=True)  # its adapters are there already
        parts = plan.plan(shapes, config, 1, len(inputs.prompt_ids))
        found["plan_gib"] = {name: sum(sizes.values()) / plan.GIB for name, sizes in parts.items()}
    return found


def release():
    """Gives back the memory of what is gone."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


PARTS = {
    "device": part_device,
    "tests": part_tests,
    "decoding": part_decoding,
    "hov2": lambda asked, device: step_part(asked, device, Hov2),
    "batched": lambda asked, device: step_part(asked, device, Batched),
    "released": lambda asked, device: step_part(asked, device, Released),
}


# ---- The table -------------------------------------------------------------------------------------------------------


def tables(results):
    """What is known so far, as Markdown."""
    device, decoding = results.get("device", {}), results.get("decoding", {})
    ways = {way: results[way] for way in ("hov2", "batched", "released") if "total" in results.get(way, {})}
    parts = []
    if "name" in device:
        parts.append(device_line(device))
    if "summary" in results.get("tests", {}):
        parts.append(f"Tests: {results['tests']['summary']}")
    if decoding and "error" not in decoding:
        parts.append(decoding_table(decoding))
    if ways:
        parts.append(step_table(ways))
    if "hov2" in ways:
        parts.append(
            f"hov2: prompt of {ways['hov2']['prompt_tokens']} tokens; sampling/kl {ways['hov2']['sampling_kl']:.1e}"
        )
        if ways["hov2"]["peak_gib"]:
            parts.append(memory_table(ways["hov2"]))
    parts += [f"{part} failed: {found['error']}" for part, found in results.items() if "error" in found]
    return "\n\n".join(parts) + "\n"


def markdown(header, rows):
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def device_line(device):
    """Where and with what."""
    return (
        f"{device['name']}, {device['date']}: Python {device['python']}, torch {device['torch']}, transformers "
        f"{device['transformers']}; a copy moves {device['bytes_per_second'] / 1e12:.2f} TB/s, a bfloat16 product "
        f"makes {device['flop_per_second'] / 1e12:.0f} TFLOP/s"
    )


def decoding_table(decoding):
    """Tokens a second."""
    names = {
        "fixed": "no graph",
        "apart": "graph, q k v apart",
        "graph": "graph",
        "transformers": "transformers",
        "limit": "bandwidth's limit",
    }
    rows = []
    for prompts, found in decoding.items():
        share = f"{found['graph'] / found['limit']:.2f}" if found.get("limit") else "-"
        rows.append([prompts, *[f"{found[key]:.0f}" if found.get(key) else "-" for key in names], share])
    return markdown(["decoding, tokens a second", *names.values(), "graph / limit"], rows)


def step_table(ways):
    """Seconds by phase of each way, all of them beside hov2's, and the peak of memory."""
    phases = {phase: None for found in ways.values() for phase in found["seconds"]}
    rows = [[phase, *[f"{found['seconds'].get(phase, 0):.3f}" for found in ways.values()]] for phase in phases]
    rows.append(["all", *[f"{found['total']:.2f}" for found in ways.values()]])
    if "hov2" in ways:
        rows.append(["all / hov2", *[f"{found['total'] / ways['hov2']['total']:.2f}" for found in ways.values()]])
    if all(found["peak_gib"] for found in ways.values()):
        rows.append(["peak memory, GiB", *[f"{max(found['peak_gib'].values()):.1f}" for found in ways.values()]])
    return markdown(["one step, seconds", *ways], rows)


def memory_table(found):
    """The memory plan beside what was used."""
    planned, peak = found["plan_gib"], found["peak_gib"]
    used = {
        "always": found["held_gib"],
        "rollout": peak["rollout"],
        "update": max(peak["forward"], peak["backward"], peak["optimizer"]),
    }
    rows = []
    for phase, gib in used.items():
        plan_of_phase = planned["always"] + (planned[phase] if phase != "always" else 0)
        rows.append([phase, f"{plan_of_phase:.1f}", f"{gib:.1f}"])
    return markdown(["memory, GiB", "planned", "used"], rows)


# ---- Processes -------------------------------------------------------------------------------------------------------


def run_part(asked):
    """In a process of its own: one part, its result as JSON in the folder."""
    device = distributed.setup("cpu" if asked.tiny else "auto")
    result = PARTS[asked.part](asked, device)
    (Path(asked.out) / f"{asked.part}.json").write_text(json.dumps(result))
    distributed.cleanup()


def main(argv=None):
    """Runs the parts one after the other and writes what came out; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(description="hov2 on a GPU: tests, decoding, one step, memory.")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--out", default="gpu-results", metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="parts that would begin later are left out")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--bandwidth", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    folder = Path(asked.out)
    folder.mkdir(parents=True, exist_ok=True)
    if asked.part:
        return run_part(asked)
    results, deadline = {}, time.monotonic() + 60 * asked.minutes
    for part in asked.parts:
        began = time.monotonic()
        results[part] = in_process(part, asked, results.get("device", {}), deadline - began)
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        (folder / "results.md").write_text(tables(results))
    print(tables(results), flush=True)
    failed = [part for part, of in results.items() if "error" in of or of.get("passed") is False]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def in_process(part, asked, device, seconds):
    """The result of a part; {"error": why} if there is none."""
    command = [sys.executable, __file__, "--part", part, "--out", asked.out]
    command += ["--tiny"] * asked.tiny
    if "bytes_per_second" in device:
        command += ["--bandwidth", str(device["bytes_per_second"])]
    file, log = Path(asked.out) / f"{part}.json", Path(asked.out) / f"{part}.log"
    file.unlink(missing_ok=True)
    if seconds < 5:
        return {"error": "no time was left"}
    with log.open("w") as out:
        try:
            subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {seconds:.0f} s"}
    if file.exists():
        return json.loads(file.read_text())
    reasons = re.findall(r"^\S*(?:Error|Exception)\b.*$", log.read_text(), re.MULTILINE)
    return {"error": reasons[-1][:300] if reasons else "no result; see its log"}


if __name__ == "__main__":
    main()
