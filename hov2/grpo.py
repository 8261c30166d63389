"""GRPO's math: from rewards to advantages, from advantages to tokens, from tokens to the loss.

Pure functions, tensors in and tensors out: no I/O, no distributed calls. NaN in a reward means *missing* (a judge that
could not be asked), which is never the same as 0. Which tokens a reward reaches stands in `rewards.REWARDS`.

Shapes: N groups (prompts), G completions of a group, B = N * G rows, C completion tokens.
"""

import torch
from torch import Tensor

from hov2.rewards import REWARDS

# --- rewards -> advantages --------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale_rewards: bool = False) -> Tensor:
    """A(R) = R - mean of the group's present rewards; 0 where missing or where fewer than two are present.

    rewards: (N, G), NaN = missing. With `scale_rewards`, divided by (unbiased std of the present rewards + 1e-4).
    Returns (N, G). Source: docs/method.md, "2. A baseline"; TRL `_generate_and_score_completions` for the scaled form.
    """
    present = ~rewards.isnan()
    count = present.sum(1, keepdim=True)  # (N, 1)
    filled = rewards.masked_fill(~present, 0.0)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    centered = (filled - mean).masked_fill(~present | (count < 2), 0.0)
    if not scale_rewards:
        return centered
    std = (centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centered / (std + 1e-4)


def apply_gate(rewards: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The gate: a context score up to `threshold` zeroes accuracy and logic, a logic score up to it zeroes accuracy.

    rewards: {name: (N, G)}; the logic score that gates is the judge's, before the context gate zeroes it. Missing
    scores gate nothing and stay missing. Returns a new dict. Source: the released code's option `markov_reward`
    (threshold 0.4), off by default.
    """
    gated = dict(rewards)
    if "context" in rewards:
        low = rewards["context"] <= threshold  # NaN compares False
        for name in {"accuracy", "logic"} & set(gated):
            gated[name] = gated[name].masked_fill(low & ~gated[name].isnan(), 0.0)
    if "logic" in rewards and "accuracy" in gated:
        low = (rewards["logic"] <= threshold) & ~gated["accuracy"].isnan()
        gated["accuracy"] = gated["accuracy"].masked_fill(low, 0.0)
    return gated


def span_rewards(rewards: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """R of each span: the sum of weight * reward over the rewards that reach it.

    rewards: {name: (N, G)}. Returns {"completion": R_full, "context": ..., "think": ...}, all (N, G), without the spans
    that no reward has. A missing component makes the sum of that completion missing as a whole.
    """
    sums = {}
    for name, weight in weights.items():
        span = REWARDS[name].span
        sums[span] = sums.get(span, 0.0) + weight * rewards[name]
    return sums


def span_advantages(
    rewards: dict[str, Tensor], *, scale_rewards: bool = False, judged_advantage: str = "own"
) -> dict[str, Tensor]:
    """An advantage for each span: A(R) of its own R (`span_rewards`), all (N, G).

    `judged_advantage="full"` puts A(R_full) in place of the context's and the think block's own, which is what the
    released code computes: there the judge's score itself never reaches the gradient.
    """
    advantages = {span: group_advantages(values, scale_rewards) for span, values in rewards.items()}
    if judged_advantage == "full":
        advantages = dict.fromkeys(advantages, advantages["completion"])
    return advantages


# --- advantages -> tokens ---------------------------------------------------------------------------------------------


def token_advantages(advantages: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
    """A_t = A(R_full) + [t in the span of context] A(R_context) + [t in the span of think] A(R_think).

    advantages: {span: (G,)}; masks: {span: (G, C)} of 0 and 1 (`spans.span_masks`). Returns (G, C).
    Source: docs/method.md, "5. Which reward".
    """
    return sum(advantage[:, None] * masks[span] for span, advantage in advantages.items())


# --- tokens -> loss ---------------------------------------------------------------------------------------------------


def kl_coef(step: int, total_steps: int, beta: float) -> float:
    """beta_s = beta (1 - 0.75 min(1, s / (S/2))): from beta down to beta / 4 at half time, then constant.

    step s and total_steps S count optimiser updates. Source: docs/method.md, "6. Staying near".
    """
    return beta * (1.0 - 0.75 * min(1.0, step / (total_steps / 2)))


def token_terms(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor | None,
    ref_per_token_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> dict[str, Tensor]:
    """What one token contributes, before weights and sums.

    All tensors (B, C). `old_per_token_logps=None` is on-policy (ratio 1, its gradient that of the log-probs);
    `ref_per_token_logps=None` gives KL 0. Returns {"ratio", "policy_loss", "kl", "clipped_low", "clipped_high"}, all
    (B, C): policy_loss = - min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A), kl = exp(d) - d - 1 (k3) with
    d = ref - logp; clipped_* mark the tokens where the clip takes the gradient away. Padding is masked before exp, so
    it can't overflow.
    """
    keep = completion_mask.bool()
    old = per_token_logps.detach() if old_per_token_logps is None else old_per_token_logps
    ratio = torch.exp((per_token_logps - old).masked_fill(~keep, 0.0))
    low, high = 1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high)
    policy_loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if ref_per_token_logps is None:
        kl = torch.zeros_like(ratio)
    else:
        difference = (ref_per_token_logps - per_token_logps).masked_fill(~keep, 0.0)
        kl = torch.exp(difference) - difference - 1.0
    return {
        "ratio": ratio,
        "policy_loss": policy_loss,
        "kl": kl,
        "clipped_low": (ratio < low) & (advantages < 0) & keep,
        "clipped_high": (ratio > high) & (advantages > 0) & keep,
    }


def grpo_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor | None,
    ref_per_token_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    beta: float = 0.04,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: str = "dapo",
    num_items: Tensor | float | None = None,
    max_completion_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = (1/N) sum over tokens of [ - min(ratio A, clip(ratio) A) + beta KL ], with N by `loss_type`.

    per_token_logps, old, ref, completion_mask: (B, C); advantages: (B,) or (B, C). `old_per_token_logps=None` is
    on-policy; `ref_per_token_logps=None` only with beta 0 (else ValueError).

    | loss_type | each sequence | divided by |
    | --- | --- | --- |
    | dapo          | sum of its tokens  | `num_items`: completion tokens of the whole step (default: the mask's sum) |
    | grpo          | mean of its tokens | `num_items`: completions of the whole step (default: B) |
    | dr_grpo       | sum of its tokens  | `num_items` (default: B) times `max_completion_length` |

    Returns (loss, metrics); metrics are detached means over the mask's tokens: `kl`, `clip_ratio/low_mean`,
    `clip_ratio/high_mean`. Source: docs/method.md, "4. Ratio"; equal to TRL's values and gradients with a plain k3 KL.
    """
    if beta and ref_per_token_logps is None:
        raise ValueError("beta is not 0, so ref_per_token_logps is needed")
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    terms = token_terms(
        per_token_logps,
        old_per_token_logps,
        ref_per_token_logps,
        advantages,
        completion_mask,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
    )
    mask = completion_mask.to(per_token_logps.dtype)
    per_token = (terms["policy_loss"] + beta * terms["kl"]) * mask
    if loss_type == "dapo":
        if num_items is None:
            num_items = mask.sum().clamp(min=1)
        loss = per_token.sum() / num_items
    elif loss_type == "grpo":
        loss = (per_token.sum(1) / mask.sum(1).clamp(min=1)).sum() / (num_items or len(mask))
    elif loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("loss_type dr_grpo needs max_completion_length")
        loss = per_token.sum() / ((num_items or len(mask)) * max_completion_length)
    else:
        raise ValueError(f"unknown loss_type {loss_type!r}; known: dapo, grpo, dr_grpo")
    names = {"kl": "kl", "clip_ratio/low_mean": "clipped_low", "clip_ratio/high_mean": "clipped_high"}
    metrics = {key: masked_mean(terms[name].detach(), mask) for key, name in names.items()}
    return loss, metrics


def sampling_kl(per_token_logps: Tensor, sampling_logps: Tensor, completion_mask: Tensor) -> Tensor:
    """How far what was sampled is from what is trained: KL(sampler || policy), its k3 estimate over the mask's tokens.

    All tensors (B, C). Both are the same model with the same weights, so this is rounding alone, and should stay far
    below the KL that training itself makes. Returns a detached number.
    """
    keep = completion_mask.bool()
    difference = (per_token_logps.detach() - sampling_logps).masked_fill(~keep, 0.0)
    return masked_mean(torch.expm1(difference) - difference, keep)  # expm1: the difference may be 1e-6


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is 1; 0 for an empty mask. Both (B, C)."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
