"""GRPO, stages 2 and 3 of HumanOmniV2: sample groups of completions, score them, reinforce what beats its group's mean.

    torchrun --standalone --nproc_per_node 8 train_grpo.py configs/stage2.json
    torchrun --standalone --nproc_per_node 2 train_grpo.py                     the embedded toy, on a laptop's CPU
    python train_grpo.py configs/stage2.json num_generations=4 max_steps=100   overrides, one process

One step, and the loop in `main` has the same headings:

1. Prompts      every rank takes whole prompts, so that no group's statistics cross ranks; media are encoded once
2. Rollout      G completions of each prompt, sampled from the policy as it is now
3. Judge        all scores are asked for at once over HTTP, while the next point computes
4. Reference    log-probs under the model that this stage began with, for the KL term
5. Rewards      format and accuracy by rule, context and logic by judge; what could not be had is NaN, never 0
6. Advantages   each reward minus its group's mean, laid on the tokens that this reward reaches
7. Update       `num_iterations` times: clipped policy gradient + KL over one global count of tokens
8. Log          metrics, rollouts with every token's credit, held-out accuracy, checkpoint

Unlike PPO there is no value network: the group's mean is the baseline. Unlike plain GRPO the advantage differs from
token to token, the loss is summed over the tokens of the whole step, and the KL weight falls during training. The math
is in hov2/grpo.py and nowhere else.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hov2 import distributed, toy
from hov2.config import GRPOConfig
from hov2.data.loader import PromptOrder, StepLoader
from hov2.data.samples import Sample, read_samples
from hov2.distributed import Means
from hov2.engine import optim
from hov2.engine.checkpoint import Checkpoints
from hov2.engine.guard import Guard, heartbeat
from hov2.engine.log import MetricsLog, RolloutDump, Timer, traced
from hov2.engine.records import dump_record, log_completions, log_rewards, log_update
from hov2.engine.setup import Run, command, print0, report_derived, start
from hov2.evaluation.evaluator import HeldOut
from hov2.grpo import apply_gate, grpo_loss, kl_coef, span_advantages, span_rewards, token_advantages
from hov2.model.encoder import Prompt
from hov2.model.lora import adapters_off
from hov2.model.prefix import group_logps
from hov2.model.rollout import Rollout, Sampling, generate, make_generator, sampling_for
from hov2.model.thinker import Policy, load_reference, set_training
from hov2.model.weights import export
from hov2.scoring import Pending, Score, Scorer
from hov2.spans import completion_texts, completion_tokens, span_masks


@dataclass
class Group:
    """G completions of one prompt, and what the stages of a step find out about them; C completion tokens."""

    # 1. prompts
    slot: int  # place in the step, over all ranks
    index: int  # of the sample in the data
    sample: Sample
    prompt: Prompt
    # 2. filled by `sample_completions`
    rollout: Rollout | None = None
    token_bytes: list[list[bytes]] | None = None  # the tokens of each completion
    texts: list[str] | None = None  # of each completion, without the end-of-turn token
    mask: Tensor | None = None  # (G, C): tokens that count in the loss
    # 3. to 6. filled in the loop
    pending: dict[str, list[Pending]] = field(default_factory=dict)  # reward name -> G scores on their way
    ref_logps: Tensor | None = None  # (G, C); None without a reference
    scores: dict[str, list[Score]] = field(default_factory=dict)  # reward name -> G scores
    span_masks: dict[str, Tensor] | None = None  # "completion", "context", "think" -> (G, C): the tokens of each span
    span_advantages: dict[str, Tensor] | None = None  # of the spans that a reward reaches -> (G,)
    advantages: Tensor | None = None  # (G, C)
    # 7. filled by the updates
    old_logps: Tensor | None = None  # (G, C), of the first update's own forward pass
    logps: Tensor | None = None  # (G, C), of the latest update


Batch = list[tuple[Group, slice]]  # what goes through the model at a time: some rows of a few groups


def main(config: GRPOConfig) -> None:
    """Trains for the config's steps, then exports the model to `output_dir/model`."""
    device = distributed.setup(config.device)
    with distributed.rank_zero_first():
        toy.prepare(config)  # builds the toy's world for the toy's configs, and nothing for others
    samples = read_samples(config.data, config.seed)  # first: what is wrong here shows before a model is loaded
    run = start(config, device)
    policy = run.policy
    reference = load_reference(config, device, policy)
    optimizer = optim.make_optimizer(policy, config)
    order = PromptOrder(len(samples), config.prompts_per_step, config.seed)
    loader = StepLoader(
        samples,
        run.make,
        order,
        distributed.rank(),
        distributed.world_size(),
        max_bad_samples=config.max_bad_samples,
        workers=config.loader_workers,
    )
    held_out = HeldOut(run)
    steps = order.total_steps(config.num_train_epochs, config.max_steps)
    checkpoints = Checkpoints(config, policy, optimizer, loader, held_out)
    first = checkpoints.resume()
    log = MetricsLog(config.output_dir, distributed.rank(), config.report_to, steps, first)
    dump = RolloutDump(config.output_dir, distributed.rank(), first)
    scorer, timer, means = Scorer(run.judge, config.format_rule, heartbeat=heartbeat), Timer(), Means()
    guard = Guard(config, first, log.history)
    print0(scorer.note(samples))
    sampling = sampling_for(
        run.tokenizer,
        policy.thinker.config,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_at_answer=config.stop_at_answer,
        logps=1,
    )
    completions = config.prompts_per_step * config.num_generations
    report_derived(
        "GRPO",
        config,
        len(samples),
        config.prompts_per_step,
        steps,
        {
            "iterations a step": config.num_iterations,
            "completions a step": completions,
            "completion tokens a step": f"at most {completions * config.max_completion_length}",
            "rewards": ", ".join(f"{name} x {weight:g}" for name, weight in config.reward_weights.items()),
        },
    )

    for step in traced(range(first, steps), config, distributed.rank()):
        # --- 1. Prompts: whole prompts of this rank, each clip through the towers once --------------------------------
        with timer("data_wait"):
            loaded = loader.next_step(step)
        with timer("encode"):
            groups = []
            for slot, (index, sample, inputs) in zip(loader.slots, loaded):
                groups.append(Group(slot, index, sample, run.encoder(inputs)))
                means.add("media/audio_cut", inputs.shape.audio_cut)

        # --- 2. Rollout: G completions of each prompt -----------------------------------------------------------------
        with timer("rollout"):
            set_training(policy, False, config.gradient_checkpointing)
            sample_completions(run, groups, sampling, step)
            set_training(policy, True, config.gradient_checkpointing)

        # --- 3. Judge: every score of the step is on its way before the next forward pass -----------------------------
        for group in groups:
            for name in config.reward_weights:
                group.pending[name] = [scorer.submit(name, text, group.sample) for text in group.texts]

        # --- 4. Reference: log-probs under the stage's first model, without gradient ----------------------------------
        batches = micro_batches(groups, config)
        with timer("logps"):
            reference_logps(reference, batches, config)

        # --- 5. Rewards: (groups, G) for each name, NaN where missing -------------------------------------------------
        with timer("judge"):
            rewards = collect_scores(scorer, groups)
        log_completions(means, groups)
        if config.gate_threshold is not None:
            rewards = apply_gate(rewards, config.gate_threshold)
        of_spans = span_rewards(rewards, config.reward_weights)  # "completion": R_full
        log_rewards(means, of_spans["completion"])

        # --- 6. Advantages: which reward reaches which token ----------------------------------------------------------
        advantages = span_advantages(
            of_spans, scale_rewards=config.scale_rewards, judged_advantage=config.judged_advantage
        )
        for i, group in enumerate(groups):
            group.span_masks = completion_masks(group, config.span)
            group.span_advantages = {span: of_groups[i].to(device) for span, of_groups in advantages.items()}
            group.advantages = token_advantages(group.span_advantages, group.span_masks)

        # --- 7. Update: the same rollouts, num_iterations times -------------------------------------------------------
        num_items = items_of_step(groups, config)
        with timer("update"):
            for iteration in range(config.num_iterations):
                update, updates = step * config.num_iterations + iteration, steps * config.num_iterations
                beta = kl_coef(update, updates, config.beta)
                rate = optim.learning_rate(
                    update, updates, config.learning_rate, config.lr_scheduler, config.warmup_steps
                )
                for batch in batches:
                    policy.set_requires_gradient_sync(batch is batches[-1])  # gradients cross ranks once an update
                    logps, entropies = forward(policy, batch, config)
                    losses = []
                    for (group, rows), new_logps, entropy in zip(batch, logps, entropies):
                        group.logps[rows] = new_logps.detach()
                        if iteration == 0:
                            group.old_logps[rows] = new_logps.detach()  # exact, and without a pass of its own
                        loss, metrics = grpo_loss(
                            per_token_logps=new_logps,
                            old_per_token_logps=group.old_logps[rows],
                            ref_per_token_logps=None if group.ref_logps is None else group.ref_logps[rows],
                            advantages=group.advantages[rows],
                            completion_mask=group.mask[rows],
                            beta=beta,
                            epsilon=config.epsilon,
                            epsilon_high=config.epsilon_high,
                            loss_type=config.loss_type,
                            num_items=num_items,
                            max_completion_length=config.max_completion_length,
                        )
                        losses.append(loss)
                        log_update(means, group, rows, metrics, entropy, first=iteration == 0)
                    loss = sum(losses) * distributed.world_size()  # FSDP averages gradients over ranks; ours is a sum
                    means.add("loss", loss * len(batches))  # the mean over ranks and batches is then the step's loss
                    loss = guard.note_loss(loss)  # one that is not finite shows in the gradient's norm, on all ranks
                    loss.backward()
                grad_norm = optim.clip_gradients(policy, config.max_grad_norm).item()  # waits for the device
                if math.isfinite(grad_norm):  # the same on all ranks; else weights and optimizer stay as they are
                    optim.set_learning_rate(optimizer, rate)
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                guard.check_update(step, grad_norm, [sample_ids(batch) for batch in batches])

        # --- 8. Log: metrics, rollouts, held-out questions, checkpoint ------------------------------------------------
        if config.dump_every and step % config.dump_every == 0:
            for records in distributed.gather_objects([dump_record(step, group, config) for group in groups]):
                dump.write(records)
        scorer.log_stats(means)
        metrics = means.reduce() | {
            "beta": beta,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "prompts/replaced": len(loader.replaced),
            "guard/bad_steps": guard.bad_steps,
        }
        log.write(step, metrics | held_out.after(step + 1, steps) | timer.pop())
        guard.look_for_collapse()
        stopping = guard.stop_due(step + 1, steps)
        checkpoints.save_if_due(step + 1, steps, stopping)
        if stopping:
            break
    else:
        dtype = distributed.compute_dtype(config.dtype, device)
        export(policy, f"{config.output_dir}/model", config.model, dtype, config.export, config.media)
        print0(f"model: {config.output_dir}/model")
    checkpoints.close()
    loader.close()
    dump.close()
    log.close()
    distributed.cleanup()


def sample_completions(run: Run, groups: list[Group], sampling: Sampling, step: int) -> None:
    """Fills each group's rollout, texts and tokens. Random numbers come from (seed, step, sample and its slot)."""
    config = run.config
    prompts = [group.prompt for group in groups]
    generators = [make_generator(run.device, config.seed, step, group.index, group.slot) for group in groups]
    with torch.no_grad(), distributed.unsharded(run.policy):  # weights gathered once: decoding talks to no other rank
        # `policy(function, ...)` is `function(thinker, ...)`: FSDP has whole weights only within a call of the policy
        rollouts = run.policy(generate, prompts, config.num_generations, sampling, generators)
    for group, rollout in zip(groups, rollouts):
        group.rollout = rollout
        group.token_bytes = completion_tokens(run.tokenizer, rollout)
        group.texts = completion_texts(group.token_bytes)
        group.mask = rollout.completion_mask
        if config.mask_truncated_completions:
            group.mask = group.mask & ~rollout.truncated[:, None]
        group.logps = torch.zeros(group.mask.shape, device=run.device)
        group.old_logps = torch.zeros_like(group.logps)
        group.ref_logps = torch.zeros_like(group.logps) if config.beta else None


def micro_batches(groups: list[Group], config: GRPOConfig) -> list[Batch]:
    """What goes through the model at a time: lists of (group, rows), some or all completions of a few groups."""
    rows_at_a_time = config.completions_per_forward or config.num_generations
    batches = []
    for first in range(0, len(groups), config.prompts_per_forward):
        for row in range(0, config.num_generations, rows_at_a_time):
            rows = slice(row, row + rows_at_a_time)
            batches.append([(group, rows) for group in groups[first : first + config.prompts_per_forward]])
    return batches


def sample_ids(batch: Batch) -> list[str]:
    """The ids of a batch's samples."""
    return [group.sample.id for group, _ in batch]


def forward(policy: Policy, batch: Batch, config: GRPOConfig) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and entropies of a batch's completions under `policy`: two lists of (rows, C), zero on padding."""
    prompts, completions, paddings = [], [], []
    for group, rows in batch:
        length = max(len(tokens) for tokens in group.token_bytes[rows])
        prompts.append(group.prompt)
        completions.append(group.rollout.completion_ids[rows, :length])
        paddings.append(group.mask.shape[1] - length)
    logps, entropies = policy(group_logps, prompts, completions, config.temperature, config.logprob_chunk)
    logps = [F.pad(values, (0, padding)) for values, padding in zip(logps, paddings)]
    entropies = [F.pad(values, (0, padding)) for values, padding in zip(entropies, paddings)]
    return logps, entropies


@torch.no_grad()
def reference_logps(reference: Policy | None, batches: list[Batch], config: GRPOConfig) -> None:
    """Fills each group's reference log-probs; nothing to do without a reference (beta 0)."""
    if reference is None:
        return
    with adapters_off():
        for batch in batches:
            logps, _ = forward(reference, batch, config)
            for (group, rows), new in zip(batch, logps):
                group.ref_logps[rows] = new
    distributed.reshard(reference)


def collect_scores(scorer: Scorer, groups: list[Group]) -> dict[str, Tensor]:
    """Waits for all that is pending, fills each group's `scores`; {reward name: (groups, G)}, NaN where missing."""
    pending = []
    for group in groups:
        for scores in group.pending.values():
            pending.extend(scores)
    scorer.wait_for_scores(pending)
    rewards = {}
    for group in groups:
        for name, scores in group.pending.items():
            group.scores[name] = [score.result() for score in scores]
            rewards.setdefault(name, []).append([score.number for score in group.scores[name]])
    return {name: torch.tensor(of_groups) for name, of_groups in rewards.items()}


def completion_masks(group: Group, span: str) -> dict[str, Tensor]:
    """The tokens of each span: {"completion", "context", "think"} of (G, C), zero on padding."""
    masks = {name: torch.zeros(group.mask.shape) for name in ("completion", "context", "think")}
    for row, tokens in enumerate(group.token_bytes):
        for name, mask in span_masks(tokens, span).items():
            masks[name][row, : len(tokens)] = mask
    return {name: mask.to(group.mask.device) for name, mask in masks.items()}


def items_of_step(groups: list[Group], config: GRPOConfig) -> Tensor | int:
    """What the loss is divided by: the whole step's completion tokens (`dapo`), or its completions."""
    if config.loss_type != "dapo":
        return config.prompts_per_step * config.num_generations
    return distributed.global_sum(sum(group.mask.sum() for group in groups)).clamp(min=1)


if __name__ == "__main__":
    command(main, GRPOConfig, default="configs/toy/stage2.json")
