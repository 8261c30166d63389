"""Learning rates by hand-computed numbers; the guard before the optimiser's step."""

import copy
import math

import pytest
import torch

from hov2.config import TrainConfig
from hov2.engine.optim import learning_rate, make_optimizer, round_at_random, update


def rates(**kwargs):
    return [learning_rate(u, 4, 1.0, **kwargs) for u in range(4)]


def test_linear_falls_to_zero():
    assert rates() == [1.0, 0.75, 0.5, 0.25] and learning_rate(4, 4, 1.0) == 0


def test_cosine_and_constant():
    assert rates(schedule="cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])
    assert rates(schedule="constant") == [1.0] * 4


def test_warmup_rises_to_the_peak_then_decays():
    assert rates(warmup_steps=2) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])


def setup(**settings):
    policy = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(policy.weight)
    config = TrainConfig(model="", output_dir="", data=[], **settings)
    return policy, make_optimizer(policy, config)


def test_gradients_are_clipped_to_the_norm_and_cleared():
    policy, optimizer = setup()
    policy.weight.grad = torch.tensor([[3.0, 4.0]])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(policy.weight.grad.clone()))
    assert update(policy, optimizer, 0.1, 1.0) == 5.0
    torch.testing.assert_close(seen[0], torch.tensor([[0.6, 0.8]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.weight.data, torch.tensor([[0.9, 0.9]]), atol=1e-5, rtol=0)  # Adam's first
    assert policy.weight.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    policy, optimizer = setup()
    policy.weight.grad = torch.tensor([[3.0, 4.0]])
    update(policy, optimizer, 0.1, 1.0)
    weight, state = policy.weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    policy.weight.grad = torch.tensor([[bad, 1.0]])
    assert not math.isfinite(update(policy, optimizer, 0.2, 1.0))
    assert (policy.weight == weight).all() and policy.weight.grad is None
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert all((after["state"][0][name] == value).all() for name, value in state["state"][0].items())


def weights_after(gradients, **settings):
    """(the weights after an update by each of `gradients`, the optimiser)."""
    policy, optimizer = setup(weight_decay=0.1, learning_rate=0.01, **settings)
    for gradient in gradients:
        policy.weight.grad = gradient.clone()
        optimizer.step()
    return policy.weight.data, optimizer


def test_states_on_the_cpu_give_the_same_numbers():
    gradients = torch.randn(20, 1, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weights_after(gradients)[0], weights_after(gradients, optimizer_states="cpu")[0])


def test_states_in_bfloat16_follow_gradients_that_grow_small():
    # rounded to the nearest, the second moment of the first gradients would stay, and hold all later updates down
    gradients = torch.randn(1500, 1, 2, generator=torch.Generator().manual_seed(0))
    gradients[20:] = 0.01 + 0.001 * gradients[20:]
    exact, _ = weights_after(gradients)
    ours, optimizer = weights_after(gradients, optimizer_states="bfloat16")
    assert {t.dtype for state in optimizer.state.values() for t in state.values()} == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(ours, exact, atol=0, rtol=0.1)


def test_states_come_back_as_they_rest():
    gradients = torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(0))
    policy, optimizer = setup(optimizer_states="bfloat16")
    optimizer.load_state_dict(weights_after(gradients, optimizer_states="bfloat16")[1].state_dict())
    state = optimizer.state[policy.weight]
    assert state["step"] == 3 and state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


def test_rounding_is_right_on_average_and_keeps_what_is_exact():
    values = torch.tensor([1.001, -3e-5, 0.0, 1.5, float("inf")]).repeat(20000, 1)
    rounded = round_at_random(values, torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(rounded[:, :4].mean(0), values[0, :4], rtol=2e-4, atol=0)
    assert len(rounded[:, 0].unique()) == 2 and (rounded[:, 2:] == values[:, 2:]).all()
