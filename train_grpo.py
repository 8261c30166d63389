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
6. Advantages   each reward minus its group's mean, laid on the tokens that this reward's judge has seen
7. Update       `num_iterations` times: clipped policy gradient + KL over one global count of tokens
8. Log          metrics, rollouts with every token's credit, held-out accuracy, checkpoint

Unlike PPO there is no value network: the group's mean is the baseline. Unlike plain GRPO the advantage differs from
token to token, the loss is summed over the tokens of the whole step, and the KL weight falls during training. The math
is in hov2/grpo.py and nowhere else.
"""

import math
from dataclasses import dataclass

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
from hov2.engine.setup import Run, command, print0, report_derived, start
from hov2.evaluation.evaluator import HeldOut
from hov2.grpo import (
    apply_gate,
    full_reward,
    grpo_loss,
    kl_coef,
    masked_mean,
    reward_advantages,
    sampling_kl,
    token_advantages,
    token_terms,
)
from hov2.model.encoder import Prompt
from hov2.model.lora import adapters_off
from hov2.model.prefix import group_logps
from hov2.model.rollout import Rollout, Sampling, generate, make_generator, sampling_for
from hov2.model.thinker import Policy, load_reference, set_training
from hov2.model.weights import export
from hov2.scoring import Score, Scorer
from hov2.spans import completion_texts, completion_tokens, find_block, span_masks, text_offsets


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
    # 4. to 6. filled in the loop
    ref_logps: Tensor | None = None  # (G, C); None without a reference
    scores: dict[str, list[Score]] | None = None  # reward name -> G scores
    credits: dict[str, Tensor] | None = None  # reach ("full", "context", "logic") -> (G, C): the parts of `advantages`
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
    run = start(config, device)
    policy = run.policy
    reference = load_reference(config, device, policy)
    optimizer = optim.make_optimizer(policy, config)
    samples = read_samples(config.data, config.seed)
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
            groups = [
                Group(slot, index, sample, run.encoder(inputs))
                for slot, (index, sample, inputs) in zip(loader.slots, loaded)
            ]
            means.add("media/audio_cut", [inputs.shape.audio_cut for _, _, inputs in loaded])

        # --- 2. Rollout: G completions of each prompt -----------------------------------------------------------------
        with timer("rollout"):
            set_training(policy, False, config.gradient_checkpointing)
            sample_completions(run, groups, sampling, step)
            set_training(policy, True, config.gradient_checkpointing)

        # --- 3. Judge: every score of the step is on its way before the next forward pass -----------------------------
        pending = [
            {name: [scorer.submit(name, text, g.sample) for text in g.texts] for name in config.reward_weights}
            for g in groups
        ]

        # --- 4. Reference: log-probs under the stage's first model, without gradient ----------------------------------
        batches = micro_batches(groups, config)
        with timer("logps"):
            reference_logps(reference, batches, config)

        # --- 5. Rewards: (groups, G) for each name, NaN where missing -------------------------------------------------
        with timer("judge"):
            scorer.wait_for_scores([score for of_group in pending for scores in of_group.values() for score in scores])
            for group, of_group in zip(groups, pending):
                group.scores = {name: [score.result() for score in scores] for name, scores in of_group.items()}
        rewards = {
            name: torch.tensor([[score.number for score in group.scores[name]] for group in groups])
            for name in config.reward_weights
        }
        log_scores(means, groups, rewards)
        if config.gate_threshold is not None:
            rewards = apply_gate(rewards, config.gate_threshold)
        log_rewards(means, full_reward(rewards, config.reward_weights))

        # --- 6. Advantages: which reward reaches which token ----------------------------------------------------------
        advantages = reward_advantages(
            rewards, config.reward_weights, scale_rewards=config.scale_rewards, judged_advantage=config.judged_advantage
        )
        for i, group in enumerate(groups):
            masks = completion_masks(group, config.span)
            of_group = {reach: of_groups[i].to(device) for reach, of_groups in advantages.items()}
            group.credits = {reach: of_group[reach][:, None] * masks[reach] for reach in of_group}
            group.advantages = token_advantages(of_group, masks)

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
                guard.check_update(step, grad_norm, [[group.sample.id for group, _ in batch] for batch in batches])

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
        export(policy, f"{config.output_dir}/model", config.model, distributed.compute_dtype(config.dtype, device))
        print0(f"model: {config.output_dir}/model")
    checkpoints.close()
    loader.close()
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
        kept = ~rollout.truncated if config.mask_truncated_completions else torch.ones_like(rollout.truncated)
        group.mask = rollout.completion_mask & kept[:, None]
        group.logps, group.old_logps, ref_logps = torch.zeros(3, *group.mask.shape, device=run.device)
        group.ref_logps = ref_logps if config.beta else None


def micro_batches(groups: list[Group], config: GRPOConfig) -> list[Batch]:
    """What goes through the model at a time: lists of (group, rows), some or all completions of a few groups."""
    n, g = config.prompts_per_forward, config.num_generations
    k = config.completions_per_forward or g
    return [
        [(group, slice(row, row + k)) for group in groups[i : i + n]]
        for i in range(0, len(groups), n)
        for row in range(0, g, k)
    ]


def forward(policy: Policy, batch: Batch, config: GRPOConfig) -> list[list[Tensor]]:
    """Log-probs and entropies of a batch's completions under `policy`: two lists of (rows, C), zero on padding."""
    lengths = [max(len(tokens) for tokens in group.token_bytes[rows]) for group, rows in batch]
    completions = [group.rollout.completion_ids[rows, :length] for (group, rows), length in zip(batch, lengths)]
    logps, entropies = policy(
        group_logps, [group.prompt for group, _ in batch], completions, config.temperature, config.logprob_chunk
    )
    widths = [group.mask.shape[1] - length for (group, _), length in zip(batch, lengths)]
    return [[F.pad(x, (0, width)) for x, width in zip(xs, widths)] for xs in (logps, entropies)]


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


def completion_masks(group: Group, span: str) -> dict[str, Tensor]:
    """For each reach, which tokens it covers: {"full", "context", "logic"} of (G, C), zero on padding."""
    rows = [span_masks(tokens, span) for tokens in group.token_bytes]
    width, device = group.mask.shape[1], group.mask.device
    return {
        name: torch.stack([F.pad(row[name], (0, width - len(row[name]))) for row in rows]).to(device)
        for name in rows[0]
    }


def items_of_step(groups: list[Group], config: GRPOConfig) -> Tensor | int:
    """What the loss is divided by: the whole step's completion tokens (`dapo`), or its completions."""
    if config.loss_type != "dapo":
        return config.prompts_per_step * config.num_generations
    return distributed.global_sum(sum(group.mask.sum() for group in groups)).clamp(min=1)


def log_scores(means: Means, groups: list[Group], rewards: dict[str, Tensor]) -> None:
    """The metrics of the completions and of each reward as it was scored."""
    for name, values in rewards.items():
        means.add(f"rewards/{name}/mean", values)
        means.add(f"rewards/{name}/missing", [[score.missing for score in group.scores[name]] for group in groups])
    for group in groups:
        means.add("completions/mean_length", group.rollout.completion_mask.sum(1))
        means.add("completions/clipped_ratio", group.rollout.truncated)
        for tag in ("context", "think"):
            means.add(f"spans/{tag}_found", [find_block(text, tag) is not None for text in group.texts])


def log_update(
    means: Means, group: Group, rows: slice, metrics: dict[str, Tensor], entropy: Tensor, first: bool
) -> None:
    """The metrics of one forward pass over a group's `rows`; each token counts the same."""
    mask = group.mask[rows]
    metrics = metrics | {"entropy": masked_mean(entropy, mask)}
    if first and group.rollout.sampling_logps is not None:
        metrics["sampling/kl"] = sampling_kl(group.logps[rows], group.rollout.sampling_logps[rows], mask)
    for name, value in metrics.items():
        means.add(name, value, weight=mask.sum())


def log_rewards(means: Means, full: Tensor) -> None:
    """The metrics of R_full (groups, G), as it is trained on."""
    means.add("reward", full)
    for row in full:
        present = row[~row.isnan()]
        if len(present) > 1:
            means.add("reward_std", present.std())
            means.add("frac_reward_zero_std", float(present.max() == present.min()))


def dump_record(step: int, group: Group, config: GRPOConfig) -> dict:
    """One line of rollouts.jsonl: the prompt's sample, and each completion with all that happened to its tokens."""
    terms = token_terms(
        group.logps,
        group.old_logps,
        group.ref_logps,
        group.advantages,
        group.mask,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
    )
    per_token = {
        "logp": group.logps,
        "old_logp": group.old_logps,
        "ref_logp": group.ref_logps,
        "ratio": terms["ratio"],
        "kl": terms["kl"],
        "clipped": terms["clipped_low"] | terms["clipped_high"],
    }
    per_token |= {f"credit/{name}": values for name, values in group.credits.items()}
    completions = []
    for g, tokens in enumerate(group.token_bytes):
        text, ends = text_offsets(tokens)
        completions.append(
            {
                "text": text,
                "token_ends": ends,
                "token_ids": group.rollout.completion_ids[g, : len(tokens)].tolist(),
                "rewards": {name: scores[g].value for name, scores in group.scores.items()},
                "judge_replies": {
                    name: scores[g].raw for name, scores in group.scores.items() if scores[g].raw is not None
                },
                "truncated": bool(group.rollout.truncated[g]),
                "tokens": {
                    name: rounded(values[g, : len(tokens)]) for name, values in per_token.items() if values is not None
                },
            }
        )
    sample = group.sample
    return {
        "step": step,
        "sample": sample.id,
        "index": group.index,
        "problem": sample.problem,
        "options": sample.options,
        "problem_type": sample.problem_type,
        "solution": sample.solution,
        "media": sample.paths,
        "prompt_tokens": len(group.prompt.ids),
        "completions": completions,
    }


def rounded(values: Tensor) -> list:
    """A tensor's values as plain numbers, floats to 5 places."""
    return [round(value, 5) if isinstance(value, float) else value for value in values.tolist()]


if __name__ == "__main__":
    command(main, GRPOConfig, default="configs/toy/stage2.json")
