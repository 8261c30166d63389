"""Learning rates by hand-computed numbers; the guard before the optimiser's step."""

import math

import pytest
import torch

from hov2.config import TrainConfig
from hov2.engine.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate


def rates(**kwargs):
    return [learning_rate(u, 4, 1.0, **kwargs) for u in range(4)]


def test_linear_falls_to_zero():
    assert rates() == [1.0, 0.75, 0.5, 0.25] and learning_rate(4, 4, 1.0) == 0


def test_cosine_and_constant():
    assert rates(schedule="cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])
    assert rates(schedule="constant") == [1.0] * 4


def test_warmup_rises_to_the_peak_then_decays():
    assert rates(warmup_steps=2) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])


def config_of(**settings):
    return TrainConfig(model="", output_dir="", data=[], **settings)


def setup(**settings):
    policy = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(policy.weight)
    return policy, make_optimizer(policy, config_of(**settings))


def test_gradients_are_clipped_to_the_norm():
    policy, optimizer = setup()
    policy.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(policy, 1.0) == 5.0
    torch.testing.assert_close(policy.weight.grad, torch.tensor([[0.6, 0.8]]), atol=1e-5, rtol=0)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    torch.testing.assert_close(policy.weight.data, torch.tensor([[0.9, 0.9]]), atol=1e-5, rtol=0)  # Adam's first


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad):
    policy, _ = setup()
    policy.weight.grad = torch.tensor([[bad, 1.0]])
    assert not math.isfinite(clip_gradients(policy, 1.0))


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


def test_states_on_the_cpu_come_back_equal_and_stay_there():
    gradients = torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(0))
    _, saved = weights_after(gradients, optimizer_states="cpu")
    policy = torch.nn.Linear(2, 1, bias=False, device="meta")  # stands for a GPU
    optimizer = make_optimizer(policy, config_of(optimizer_states="cpu"))
    optimizer.load_state_dict(saved.state_dict())
    [before] = saved.state.values()
    state = optimizer.state[policy.weight]
    assert state.keys() == before.keys() and state["step"] == 3
    for name, value in before.items():
        assert state[name].device.type == "cpu" and torch.equal(state[name], value)


def test_a_parameter_without_gradient_stays_as_it_is():
    policy, optimizer = setup(optimizer_states="cpu")
    optimizer.step()
    assert policy.weight.tolist() == [[1.0, 1.0]] and not optimizer.state
