"""Advantages, credit, loss and schedule against hand-computed numbers and TRL's recorded ones."""

import json
import math
from pathlib import Path

import pytest
import torch

from hov2.grpo import (
    apply_gate,
    group_advantages,
    grpo_loss,
    kl_coef,
    span_advantages,
    span_rewards,
    token_advantages,
    token_terms,
)
from hov2.model.logps import token_logps

NAN = float("nan")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl_grpo.json").read_text())


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantage_is_reward_minus_group_mean():
    assert group_advantages(tensor([[1, 0, 0, 1], [2, 2, 2, 2]])).tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]]


def test_scaled_advantage_uses_the_unbiased_std():
    # mean 1, deviations (1, -1, 0, 0), unbiased std sqrt(2/3)
    expected = 1 / (math.sqrt(2 / 3) + 1e-4)
    assert group_advantages(tensor([[2, 0, 1, 1]]), True)[0].tolist() == pytest.approx([expected, -expected, 0, 0])


def test_missing_rewards_are_out_of_the_mean_and_get_no_advantage():
    assert group_advantages(tensor([[1, NAN, 0.5, NAN]])).tolist() == [[0.25, 0, -0.25, 0]]
    # std of (1, 0.5) is 0.35355
    scaled = group_advantages(tensor([[1, NAN, 0.5, NAN]]), True)[0].tolist()
    assert scaled == pytest.approx([0.25 / 0.3536534, 0, -0.25 / 0.3536534, 0], rel=1e-5)


@pytest.mark.parametrize("scale", [False, True])
def test_fewer_than_two_present_values_give_no_advantage(scale):
    assert group_advantages(tensor([[NAN, 0.7, NAN], [NAN, NAN, NAN]]), scale).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in GOLDEN["advantage_cases"]
        if c["multi_objective_aggregation"] == "sum_then_normalize" and c["scale_rewards"] in ("none", "group")
    ],
    ids=lambda c: c["name"],
)
def test_advantages_equal_trl(case):
    rewards = tensor([[NAN if r is None else r for r in row] for row in case["rewards_per_func"]])
    weights = tensor(case["reward_weights"] or [1.0] * len(rewards))
    total = (rewards * weights[:, None]).nansum(0)  # TRL sums what is present; hov2's rule is tested below
    total[rewards.isnan().all(0)] = NAN
    ours = group_advantages(total.view(-1, case["num_generations"]), case["scale_rewards"] == "group")
    torch.testing.assert_close(ours.flatten(), tensor(case["expected"]["advantages"]), atol=2e-6, rtol=1e-5)


def test_full_reward_is_missing_when_a_component_is():
    rewards = {"format": tensor([[1, 1, 0]]), "accuracy": tensor([[0.5, NAN, 1]]), "context": tensor([[0, 0, 0]])}
    full = span_rewards(rewards, {"format": 0.5, "accuracy": 2.0, "context": 1.0})["completion"][0]
    assert full[0] == 1.5 and full[1].isnan() and full[2] == 2.0


def test_gate():
    rewards = {
        "accuracy": tensor([[1, 1, 1, 1]]),
        "format": tensor([[1, 1, 1, 1]]),
        "context": tensor([[0.4, 0.6, NAN, 0.6]]),
        "logic": tensor([[1, 0.4, 1, NAN]]),
    }
    gated = apply_gate(rewards, 0.4)
    assert gated["accuracy"].tolist() == [[0, 0, 1, 1]]
    assert gated["logic"][0, :3].tolist() == [0, 0.4, 1] and gated["logic"][0, 3].isnan()
    assert gated["format"].tolist() == [[1, 1, 1, 1]] and rewards["accuracy"].sum() == 4
    assert apply_gate({"accuracy": tensor([[NAN]]), "context": tensor([[0.0]])}, 0.4)["accuracy"].isnan().all()


# --- credit -----------------------------------------------------------------------------------------------------------

MASKS = {
    "completion": tensor([[1, 1, 1, 1]] * 2),
    "context": tensor([[1, 1, 0, 0], [0, 0, 0, 0]]),
    "think": tensor([[1, 1, 1, 0], [0, 0, 0, 0]]),
}


def test_credit_adds_each_advantage_where_its_reward_reaches():
    advantages = {"completion": tensor([0.5, -0.5]), "context": tensor([0.25, -0.25]), "think": tensor([-0.125, 0.125])}
    assert token_advantages(advantages, MASKS).tolist() == [[0.625, 0.625, 0.375, 0.5], [-0.5] * 4]


@pytest.mark.parametrize(
    "name, moved", [("format", [0, 1, 2, 3]), ("accuracy", [0, 1, 2, 3]), ("context", [0, 1]), ("logic", [0, 1, 2])]
)
def test_each_reward_moves_only_the_tokens_it_may(name, moved):
    weights = {"format": 1.0, "accuracy": 1.0, "context": 1.0, "logic": 1.0}
    base = {key: tensor([[0.5, 0.5]]) for key in weights}
    changed = base | {name: tensor([[1.0, 0.5]])}
    before, after = (
        token_advantages({span: a[0] for span, a in span_advantages(span_rewards(r, weights)).items()}, MASKS)
        for r in (base, changed)
    )
    assert (after[0] - before[0]).nonzero().flatten().tolist() == moved
    assert after[0, 0] == 0.25 * 1  # 1 - mean(1, 0.5)


def test_released_credit_never_sees_the_judges_scores():
    weights = {"format": 1.0, "accuracy": 1.0, "context": 1.0}
    rewards = {"format": tensor([[1, 1]]), "accuracy": tensor([[1, 0]]), "context": tensor([[0, 1]])}
    of_spans = span_rewards(rewards, weights)
    advantages = span_advantages(of_spans, judged_advantage="full")
    assert advantages["context"].tolist() == advantages["completion"].tolist() == [[0.5, -0.5]]
    assert span_advantages(of_spans)["context"].tolist() == [[-0.5, 0.5]]


def test_two_rewards_have_no_judged_advantages():
    rewards = {"format": tensor([[1, 0]]), "accuracy": tensor([[1, 0]])}
    assert span_advantages(span_rewards(rewards, {"format": 1.0, "accuracy": 1.0})).keys() == {"completion"}


@pytest.mark.parametrize("case", GOLDEN["logits_cases"]["cases"], ids=lambda c: str(c.get("temperature")))
def test_logps_of_logits_equal_trl(case):
    logits = tensor(GOLDEN["logits_cases"]["logits"]).float().flatten(0, 1)
    index = torch.tensor(GOLDEN["logits_cases"]["index"]).flatten()
    # hidden states that are the logits themselves, under an identity for a head
    logps, entropy = token_logps(logits, torch.eye(logits.shape[1]), index, case["temperature"])
    torch.testing.assert_close(logps, tensor(case["logps"]).float().flatten(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, tensor(case["entropy"]).float().flatten(), atol=1e-5, rtol=1e-5)


# --- loss -------------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    logps, old = tensor([[math.log(0.5), math.log(0.4)]]), tensor([[math.log(0.25), math.log(0.5)]])
    # ratios 2 and 0.8; A = 1: min(2, 1.2) = 1.2 (clipped), min(0.8, 0.8) = 0.8;
    # k3 with ref = old: 0.5 - 1 + log 2, 1.25 - 1 - log 1.25
    kl = (0.5 + math.log(2) - 1, 1.25 - math.log(1.25) - 1)
    loss, metrics = grpo_loss(logps, old, old, tensor([1.0]), torch.ones(1, 2), beta=0.1)
    assert loss.item() == pytest.approx((-1.2 - 0.8 + 0.1 * sum(kl)) / 2)
    assert metrics["kl"].item() == pytest.approx(sum(kl) / 2)
    assert (metrics["clip_ratio/low_mean"].item(), metrics["clip_ratio/high_mean"].item()) == (0, 0.5)


def test_clip_metrics_mark_tokens_without_gradient():
    logps = tensor([[0.0, 0.5, -0.5, 0.5, -0.5]]).requires_grad_()  # ratios 1, 1.65, 0.61, 1.65, 0.61
    advantages = tensor([[1.0, 1.0, 1.0, -1.0, -1.0]])
    loss, metrics = grpo_loss(logps, torch.zeros(1, 5, dtype=torch.float64), None, advantages, torch.ones(1, 5), beta=0)
    loss.backward()
    assert (logps.grad[0] == 0).tolist() == [False, True, False, False, True]
    assert (metrics["clip_ratio/low_mean"].item(), metrics["clip_ratio/high_mean"].item()) == (0.2, 0.2)


def test_epsilon_high_raises_the_upper_bound_only():
    terms = token_terms(
        tensor([[0.25, -0.25]]),
        tensor([[0, 0]]),
        None,
        tensor([[1, -1]]),
        torch.ones(1, 2),
        epsilon=0.2,
        epsilon_high=0.3,
    )
    assert terms["clipped_high"].tolist() == [[False, False]] and terms["clipped_low"].tolist() == [[False, True]]


@pytest.mark.parametrize("loss_type, divisor", [("dapo", 5), ("dr_grpo", 2 * 8)])
def test_normalisers(loss_type, divisor):
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    loss, _ = grpo_loss(
        torch.zeros(2, 4),
        None,
        None,
        torch.tensor([1.0, 3.0]),
        mask,
        beta=0,
        loss_type=loss_type,
        max_completion_length=8,
    )
    assert loss.item() == pytest.approx(-(4 * 1 + 1 * 3) / divisor)


def test_grpo_normaliser_is_the_mean_of_sequence_means():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    loss, _ = grpo_loss(torch.zeros(3, 4), None, None, torch.tensor([1.0, 3.0, 5.0]), mask, beta=0, loss_type="grpo")
    assert loss.item() == pytest.approx(-(1 + 3 + 0) / 3)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_accumulated_pieces_equal_one_batch(loss_type):
    g = torch.Generator().manual_seed(0)
    logps, old, ref, advantages = (torch.randn(6, 5, generator=g, dtype=torch.float64) for _ in range(4))
    mask = (torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5])[:, None]).double()
    items = mask.sum() if loss_type == "dapo" else 6
    kwargs = {"loss_type": loss_type, "max_completion_length": 7}
    whole, _ = grpo_loss(logps, old, ref, advantages, mask, **kwargs)
    pieces = [
        grpo_loss(*(x[i : i + 2] for x in (logps, old, ref, advantages, mask)), num_items=items, **kwargs)[0]
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(sum(pieces), whole)


def test_padding_never_reaches_the_loss():
    logps = tensor([[0.0, -1e4]]).requires_grad_()
    loss, _ = grpo_loss(logps, tensor([[0.0, 0.0]]), tensor([[0.0, 1e4]]), tensor([1.0]), torch.tensor([[1, 0]]))
    loss.backward()
    assert loss.item() == -1 and logps.grad.tolist() == [[-1, 0]]


def test_beta_without_reference_is_refused():
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        grpo_loss(torch.zeros(1, 1), None, None, torch.zeros(1), torch.ones(1, 1), beta=0.04)


LOSS_CASES = [case for case in GOLDEN["loss_cases"] if case["config"]["loss_type"] != "bnpo"]  # hov2 has no bnpo


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda c: c["name"])
def test_loss_and_gradients_equal_trl(case):
    inputs, config = GOLDEN["inputs"], case["config"]
    logps = tensor(inputs["logps"]).requires_grad_()
    loss_type = config["loss_type"]
    loss, metrics = grpo_loss(
        logps,
        tensor(inputs["old_logps"]) if case["use_old"] else None,
        tensor(inputs["ref_logps"]) if config["beta"] else None,
        tensor(inputs["advantages"]),
        tensor(inputs["mask"]),
        beta=config["beta"],
        epsilon=config["epsilon"],
        loss_type=loss_type,
        max_completion_length=GOLDEN["shapes"]["max_completion_length"],
    )
    loss.backward()
    expected = case["expected"]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6, abs=1e-8)
    torch.testing.assert_close(logps.grad, tensor(expected["grad_logps"]), atol=1e-7, rtol=1e-6)
    recorded = {
        key: value
        for key, value in expected["metrics"].items()
        if key in ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean")
    }
    assert len(recorded) >= 2
    for key, value in recorded.items():
        assert metrics[key].item() == pytest.approx(value, rel=1e-5, abs=1e-7), key


def test_kl_weight_falls_to_a_quarter_at_half_time():
    betas = [kl_coef(s, 8, 0.04) for s in range(9)]
    assert betas == pytest.approx([0.04, 0.0325, 0.025, 0.0175, 0.01, 0.01, 0.01, 0.01, 0.01])
    assert kl_coef(0, 1, 0.04) == 0.04
