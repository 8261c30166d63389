"""What train_grpo.py writes down of a step: metrics of its completions, and a record of each group for rollouts.jsonl.

A `group` is a `Group` of train_grpo.py.
"""

from typing import Any

from torch import Tensor

from hov2.config import GRPOConfig
from hov2.distributed import Means
from hov2.grpo import masked_mean, sampling_kl, token_terms
from hov2.spans import find_block, text_offsets


def log_completions(means: Means, groups: list[Any]) -> None:
    """Add the metrics of the completions and of each reward as it was scored."""
    for group in groups:
        for name, scores in group.scores.items():
            means.add(f"rewards/{name}/mean", [score.number for score in scores])
            means.add(f"rewards/{name}/missing", [score.missing for score in scores])
        means.add("completions/mean_length", group.rollout.completion_mask.sum(1))
        means.add("completions/clipped_ratio", group.rollout.truncated)
        for tag in ("context", "think"):
            means.add(f"spans/{tag}_found", [find_block(text, tag) is not None for text in group.texts])


def log_rewards(means: Means, full: Tensor) -> None:
    """Add the metrics of R_full (groups, G), as it is trained on."""
    means.add("reward", full)
    for row in full:
        present = row[~row.isnan()]
        if len(present) > 1:
            means.add("reward_std", present.std())
            means.add("frac_reward_zero_std", float(present.max() == present.min()))


def log_update(means: Means, group: Any, rows: slice, metrics: dict[str, Tensor], entropy: Tensor, first: bool) -> None:
    """Add the metrics of one forward pass over a group's `rows`; each token counts the same."""
    mask = group.mask[rows]
    metrics = metrics | {"entropy": masked_mean(entropy, mask)}
    if first and group.rollout.sampling_logps is not None:
        metrics["sampling/kl"] = sampling_kl(group.logps[rows], group.rollout.sampling_logps[rows], mask)
    for name, value in metrics.items():
        means.add(name, value, weight=mask.sum())


def dump_record(step: int, group: Any, config: GRPOConfig) -> dict:
    """Return one line of rollouts.jsonl: the prompt's sample, and all that happened to each completion's tokens."""
    per_token = _per_token(group, config)
    completions = []
    for row, tokens in enumerate(group.token_bytes):
        text, ends = text_offsets(tokens)
        scores = {name: of_group[row] for name, of_group in group.scores.items()}
        completions.append(
            {
                "text": text,
                "token_ends": ends,
                "token_ids": group.rollout.completion_ids[row, : len(tokens)].tolist(),
                "rewards": {name: score.value for name, score in scores.items()},
                "judge_replies": {name: score.raw for name, score in scores.items() if score.raw is not None},
                "truncated": bool(group.rollout.truncated[row]),
                "tokens": {name: _rounded(values[row, : len(tokens)]) for name, values in per_token.items()},
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


def _per_token(group: Any, config: GRPOConfig) -> dict[str, Tensor]:
    """Return what rollouts.jsonl says of each token: {name: (G, C)}."""
    terms = token_terms(
        group.logps,
        group.old_logps,
        group.ref_logps,
        group.advantages,
        group.mask,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
    )
    values = {"logp": group.logps, "old_logp": group.old_logps}
    if group.ref_logps is not None:
        values["ref_logp"] = group.ref_logps
    values["ratio"] = terms["ratio"]
    values["kl"] = terms["kl"]
    values["clipped"] = terms["clipped_low"] | terms["clipped_high"]
    for span, advantages in group.span_advantages.items():
        values[f"credit/{span}"] = advantages[:, None] * group.span_masks[span]
    return values


def _rounded(values: Tensor) -> list:
    """Return a tensor's values as plain numbers, floats to 5 places."""
    return [round(value, 5) if isinstance(value, float) else value for value in values.tolist()]
