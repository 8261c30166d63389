"""One GRPO step three ways, on the same random thinker, prompt and completions: CPU seconds, memory, FLOPs.

    python benchmarks/grpo_step.py                     G=8, 1,563 prompt tokens, 128 completion tokens: 6 minutes
    python benchmarks/grpo_step.py --vocab 2048        a head as cheap, beside the layers, as the 7B's; --iterations 2

- released: as HumanOmniV2's published trainer works. Batch size 1: each completion by itself, sampled by transformers'
  `generate`, scored by transformers' forward over prompt and completion, log_softmax over all positions.
- batched: as TRL works. G rows with the prompt and its media repeated in each, through the same `generate` and forward;
  better than TRL on this model in that the head sees the completion's positions only.
- hov2: the functions that train_grpo.py calls.

A step is sampling, reference log-probs (and old ones, in the two other ways with more than one iteration), and for
each iteration forward, loss (the same function for all) and backward with activation checkpointing. All ways score the
same given completions, so their log-probs can be compared; what they sample is timed and dropped. Left out, as it's the
same for all: reading media, rewards, the optimiser.
"""

import argparse
from contextlib import nullcontext

import kit
import torch
from flops import Units, step_flops
from thinker import random_completions, random_inputs, random_thinker, sampling_for, use_hov2_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hov2 import distributed
from hov2.engine.optim import clip_gradients
from hov2.grpo import grpo_loss
from hov2.model.encoder import Encoder
from hov2.model.prefix import group_logps
from hov2.model.rollout import generate, make_generator
from hov2.model.thinker import Policy, tower_parameters
from hov2.model.versions import checkpoint_activations, decoder_of, media_model_of

PHASES = ("towers", "prefill", "decode", "reference", "old", "forward", "backward")
BETA = 0.04


class Transformers:
    """What the two other ways share: transformers' own generate, fed with `copies` of the prompt and its media."""

    separate_old = True  # with several iterations, old log-probs cost a forward pass of their own

    def __init__(self, policy, reference, inputs, job):
        self.policy, self.reference, self.inputs = policy, reference, inputs

    @property
    def device(self):
        """Where the inputs are."""
        return self.inputs.prompt_ids.device

    def media(self, copies):
        """The keyword arguments of transformers' forward for the clip, once a row."""
        shape = self.inputs.shape
        return {
            "pixel_values_videos": self.inputs.pixel_values.repeat(copies, 1),
            "video_grid_thw": shape.grid_thw.repeat(copies, 1),
            "video_second_per_grid": torch.full((copies,), shape.second_per_grid, device=self.device),
            "input_features": self.inputs.input_features.repeat(copies, 1, 1),
            "feature_attention_mask": torch.ones(copies, shape.mel_frames, dtype=torch.long, device=self.device),
        }

    def sample(self, rows, sampling, seed):
        """`rows` completions (rows, T), each row with its own copy of the prompt."""
        torch.manual_seed(seed)
        ids = self.inputs.prompt_ids.repeat(rows, 1)
        how = {"temperature": sampling.temperature, "top_k": sampling.top_k} if sampling.temperature else {}
        output = self.policy.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=bool(how),
            **how,
            **self.media(rows),
            max_new_tokens=sampling.max_completion_length,
            suppress_tokens=sampling.suppressed_ids.tolist(),
            pad_token_id=sampling.pad_id,
        )
        return output[:, ids.shape[1] :]

    def rows(self, completions):
        """The keyword arguments of a forward pass over [prompt | completion], one row each."""
        ids = torch.cat([self.inputs.prompt_ids.repeat(len(completions), 1), completions], 1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "use_cache": False,
            **self.media(len(completions)),
        }


class Released(Transformers):
    """One completion at a time, all positions through the head and log_softmax."""

    def batches(self, generations, repetition, how_many):
        """Which completions share a forward pass: here each is alone, and `how_many` of them stand for all."""
        return [[(repetition * how_many + i) % generations] for i in range(how_many)]

    def logps(self, model, completions):
        """(1, T) log-probs."""
        inputs = self.rows(completions)
        logits = model(**inputs).logits[:, :-1]
        targets = inputs["input_ids"][:, 1:]
        rows = [torch.gather(row.log_softmax(-1), 1, ids[:, None])[:, 0] for row, ids in zip(logits, targets)]
        return torch.stack(rows)[:, len(self.inputs.prompt_ids) - 1 :]


class Batched(Transformers):
    """G rows with the prompt in each; the head on completion positions, log-probs without a log_softmax in memory."""

    def batches(self, generations, repetition, how_many):
        """All completions at once."""
        return [list(range(generations))]

    def logps(self, model, completions):
        """(G, T) log-probs."""
        predictors = slice(len(self.inputs.prompt_ids) - 1, -1)
        only_those = model.lm_head.register_forward_pre_hook(lambda _, hidden: (hidden[0][:, predictors],))
        logits = model(**self.rows(completions)).logits
        only_those.remove()
        chosen = logits.gather(-1, completions[..., None])[..., 0]
        return chosen - torch.stack([row.logsumexp(-1) for row in logits])


class Hov2:
    """train_grpo.py's calls for one prompt."""

    separate_old = False  # the first forward's own log-probs, detached

    def __init__(self, policy, reference, inputs, job):
        self.inputs, self.sharded = inputs, job.sharded
        self.encoder = Encoder(policy, torch.device("cpu"))
        self.policy, self.reference = (self._wrap(use_hov2_attention(thinker)) for thinker in (policy, reference))

    def _wrap(self, thinker):
        if not self.sharded:
            return Policy(thinker)
        if not torch.distributed.is_initialized():
            distributed.setup()
        mesh = distributed.make_mesh(torch.device("cpu"))
        return distributed.shard(Policy(thinker), mesh, torch.float32, tower_parameters(thinker))

    batches = Batched.batches

    def sample(self, rows, sampling, seed):
        """`rows` completions (rows, T) of the prompt, which is encoded here once for the whole step."""
        self.prompt = self.encoder(self.inputs)
        with distributed.unsharded(self.policy) if self.sharded else nullcontext():
            return self.policy(generate, [self.prompt], rows, sampling, [make_generator("cpu", seed)])[0].completion_ids

    def logps(self, model, completions):
        """(G, T) log-probs."""
        logps = model(group_logps, [self.prompt], [completions])[0][0]
        if self.sharded and model is self.reference:
            distributed.reshard(model)
        return logps


WAYS = {"released": Released, "batched": Batched, "hov2": Hov2}


# ---- In the process of one way ---------------------------------------------------------------------------------------


def setup(name, job):
    """Builds the way `name`, and goes once through a step of a tiny prompt so that nothing is done for the first time."""
    global way, memory  # of this process
    policy, reference = (random_thinker(job.vocab, job.layers, job.hidden, seed) for seed in (0, 1))
    for tower in ("visual", "audio_tower"):  # frozen, so the same in both
        getattr(media_model_of(reference), tower).load_state_dict(getattr(media_model_of(policy), tower).state_dict())
    checkpoint_activations(policy, True)
    small = random_inputs(job.vocab, 16, 10, 12)
    way = WAYS[name](policy, reference, small, job)
    step(argparse.Namespace(**vars(job) | {"generations": 2, "completion_tokens": 4, "completions_run": 1}), 0)
    way.inputs = random_inputs(job.vocab, job.video_tokens, job.audio_tokens, job.text_tokens)
    memory = kit.Memory()


def step(job, repetition):
    """One step: {"cpu", "wall": {phase: seconds}, "logps", "reference": {completion: (T,)}, "norm", "growth"}.

    Where only some of the completions are run (released), seconds are scaled to all.
    """
    completions = random_completions(job.vocab, job.generations, job.completion_tokens)
    sampling = sampling_for(job.vocab, job.completion_tokens)
    advantages = torch.randn(job.generations, generator=torch.Generator().manual_seed(0))
    clock, found = kit.Clock(), {"logps": {}, "reference": {}}
    handles = watch(clock)
    batches = way.batches(job.generations, repetition, job.completions_run)
    if "memory" in globals():
        memory.reset_peak()
    for batch in batches:
        given = completions[batch]
        way.policy.eval()  # in train mode, checkpointing would drop transformers' key-value cache
        with clock("decode"), torch.no_grad():
            way.sample(len(batch), sampling, repetition)
        way.policy.train()
        with clock("reference"), torch.no_grad():
            reference = way.logps(way.reference, given)
        old = None
        if job.iterations > 1 and way.separate_old:
            with clock("old"), torch.no_grad():
                old = way.logps(way.policy, given)
        for _ in range(job.iterations):
            with clock("forward"):
                logps = way.logps(way.policy, given)
                old = logps.detach() if old is None else old
                loss, _ = grpo_loss(
                    logps,
                    old,
                    reference,
                    advantages[batch],
                    torch.ones_like(logps),
                    beta=BETA,
                    num_items=completions.numel(),
                )
            with clock("backward"):
                loss.backward()
        found["logps"] |= dict(zip(batch, logps.detach().clone()))
        found["reference"] |= dict(zip(batch, reference))
    found["growth"] = memory.growth() if "memory" in globals() else None
    found["norm"] = float(clip_gradients(way.policy, float("inf")))
    way.policy.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    scale = job.generations / sum(map(len, batches))
    return found | {
        kind: {phase: seconds * scale for phase, seconds in getattr(clock, kind).items()} for kind in ("cpu", "wall")
    }


def watch(clock):
    """Hooks that take the towers and the prompt's pass through the decoder out of the phase that they happen in."""
    handles = []
    for model in (way.policy, way.reference):
        thinker = getattr(model, "thinker", model)
        media_model = media_model_of(thinker)
        for tower in (media_model.visual, media_model.audio_tower):
            handles += [
                tower.register_forward_pre_hook(lambda *_: clock.enter("towers")),
                tower.register_forward_hook(clock.leave),
            ]
        decoder = decoder_of(thinker)

        def begin(_, arguments, keywords):
            whole = clock.phases[-1] == "decode" and keywords["inputs_embeds"].shape[1] > 1
            clock.enter("prefill" if whole else clock.phases[-1])

        handles += [
            decoder.register_forward_pre_hook(begin, with_kwargs=True),
            decoder.register_forward_hook(clock.leave),
        ]
    return handles


def tower_flops():
    """FLOPs of one pass of both towers over the clip; run in hov2's process."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        way.encoder(way.inputs)
    return counter.get_total_flops()


# ---- Counting --------------------------------------------------------------------------------------------------------


def flops_of(job, prompt, towers):
    """FLOPs that each way's step takes, {way: FLOPs}: benchmarks/flops.py counts them."""
    counts = step_flops(units_of(job, towers), prompt, job.completion_tokens, job.generations, job.iterations)
    return {way: sum(phases.values()) for way, phases in counts.items()}


def units_of(job, towers):
    """The Units of the random thinker."""
    kv = max(1, job.hidden // 128) * 64
    layer = 2 * job.hidden * job.hidden + 2 * job.hidden * kv + 3 * job.hidden * 4 * job.hidden
    return Units(
        token=2 * job.layers * layer, pair=4 * job.hidden * job.layers, head=2 * job.hidden * job.vocab, towers=towers
    )


# ---- The run ---------------------------------------------------------------------------------------------------------


def run(job):
    """Measures the job's ways; {"ways": {way: figures}, "difference": {...}} as it goes into the JSON file."""
    workers = kit.Workers(job.ways, job.threads, setup, job)
    runs = {way: [] for way in job.ways}
    for repetition, way in kit.interleaved(job.ways, job.repeats):
        runs[way].append(workers.call(way, step, job, repetition))
        print(f"repetition {repetition + 1}, {way}: {sum(runs[way][-1]['cpu'].values()):.1f} CPU s", flush=True)
    prompt = job.video_tokens + job.audio_tokens + job.text_tokens + 4
    counts = flops_of(job, prompt, workers.call("hov2", tower_flops))
    workers.close()
    ways = {}
    for way, of_way in runs.items():
        totals = [sum(r["cpu"].values()) for r in of_way]
        cpu = kit.median(totals)
        ways[way] = {
            "phases": {p: kit.median([r["cpu"].get(p) for r in of_way]) for p in PHASES},
            "cpu": cpu,
            "runs": totals,
            "wall": kit.median([sum(r["wall"].values()) for r in of_way]),
            "growth": kit.median([r["growth"] for r in of_way]),
            "gflop": counts[way] / 1e9,
            "gflops": counts[way] / 1e9 / cpu,
        }
    return {
        "job": vars(job),
        "prompt_tokens": prompt,
        "ways": ways,
        "difference": {way: differences(runs[way], runs["hov2"]) for way in job.ways if way != "hov2"},
    }


def differences(runs, ours):
    """The largest difference to hov2's log-probs, over all completions run; of the gradient's norm, relative."""
    result = {
        kind: max(float((row - ours[0][kind][i]).abs().max()) for r in runs for i, row in r[kind].items())
        for kind in ("logps", "reference")
    }
    if len(runs[0]["logps"]) == len(ours[0]["logps"]):  # all of them, so the gradient is the same one
        result["norm"] = abs(runs[0]["norm"] / ours[0]["norm"] - 1)
    return result


def report(result):
    """Prints the tables."""
    ways, others = result["ways"], list(result["difference"])

    def row(name, get):
        values = {way: get(figures) for way, figures in ways.items()}
        ratios = [values[way] / values["hov2"] if values[way] and values["hov2"] else None for way in others]
        return [name, *values.values(), *ratios]

    rows = [
        row(phase, lambda f, p=phase: f["phases"][p])
        for phase in PHASES
        if any(f["phases"][phase] for f in ways.values())
    ]
    rows += [
        row("CPU seconds", lambda f: f["cpu"]),
        row("wall seconds", lambda f: f["wall"]),
        row("growth of memory, MiB", lambda f: f["growth"]),
        row("GFLOP (ideal ratio)", lambda f: f["gflop"]),
        row("GFLOP a CPU second", lambda f: f["gflops"]),
    ]
    print(f"\n{kit.machine()}; P={result['prompt_tokens']}, medians of {result['job']['repeats']}")
    kit.print_table(["", *ways, *(f"{way} / hov2" for way in others)], rows)
    for way, found in result["difference"].items():
        norm = f", gradient norm {found['norm']:.1e} (relative)" if "norm" in found else ""
        print(
            f"log-probs of {way} less hov2's, at most: policy {found['logps']:.1e}, "
            f"reference {found['reference']:.1e}{norm}"
        )


def arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="One GRPO step three ways.")
    sizes = {
        "vocab": 32768,
        "generations": 8,
        "video-tokens": 1024,
        "audio-tokens": 375,
        "text-tokens": 160,
        "completion-tokens": 128,
        "layers": 6,
        "hidden": 256,
        "iterations": 1,
        "repeats": 3,
        "threads": 1,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="with hov2 among them")
    parser.add_argument(
        "--completions-run",
        type=int,
        default=2,
        help="of the released way, in each repetition; they stand for all, being alike",
    )
    parser.add_argument("--sharded", action="store_true", help="hov2 under FSDP with one process, as in training")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs, prints, and writes the JSON file if there is to be one."""
    result = run(arguments(argv))
    report(result)
    kit.write_json(result["job"]["json"], result)


if __name__ == "__main__":
    main()
