"""The claims of docs/method.md that no other test holds.

Every completion of a small policy is listed, so that expectations are exact sums.
"""

import itertools

import torch

from hov2.grpo import group_advantages, grpo_loss, token_advantages, token_terms

WORDS, LENGTH = 3, 2


def policy():
    """Log-probs of all completions of two tokens over three words, token by token: (parameters, texts, (9, 2))."""
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((WORDS,), (WORDS, WORDS))
    )
    texts = list(itertools.product(range(WORDS), repeat=LENGTH))
    logps = torch.stack([torch.stack([first.log_softmax(0)[a], second.log_softmax(1)[a, b]]) for a, b in texts])
    return (first, second), texts, logps


def gradient(value, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])


def surrogate(logps, advantages, weights):
    """Minus the loss of completions that occur with probability `weights`, before the division by their tokens."""
    return -sum(
        weight * grpo_loss(row[None], None, None, advantage[None], torch.ones(1, LENGTH), beta=0.0, num_items=1)[0]
        for row, advantage, weight in zip(logps, advantages, weights)
    )


REWARDS = torch.tensor([0.0, 1.0, 0.3, 0.9, 0.1, 0.5, 0.2, 0.8, 0.4], dtype=torch.float64)


def test_the_loss_has_the_policy_gradient():
    parameters, _, logps = policy()
    chances = logps.sum(1).exp()
    wanted = gradient((chances * REWARDS).sum(), parameters)
    for baseline in (0.0, 0.7):
        advantages = (REWARDS - baseline)[:, None]
        torch.testing.assert_close(gradient(surrogate(logps, advantages, chances.detach()), parameters), wanted)
    assert wanted.abs().max() > 0.05


def test_the_groups_mean_keeps_the_direction():
    parameters, texts, logps = policy()
    chances = logps.sum(1).exp()
    total = 0.0
    for i, j in itertools.product(range(len(texts)), repeat=2):  # every group of two
        advantages = group_advantages(REWARDS[[i, j]][None])[0][:, None]
        group = surrogate(logps[[i, j]], advantages, [0.5, 0.5])
        total = total + (chances[i] * chances[j]).detach() * group
    wanted = gradient((chances * REWARDS).sum(), parameters)
    torch.testing.assert_close(gradient(total, parameters), wanted / 2)


def test_tokens_after_a_reward_carry_none_of_its_gradient():
    parameters, texts, logps = policy()
    chances = logps.sum(1).exp()
    rewards = torch.tensor([[0.2, 0.9, 0.4][first] for first, _ in texts], dtype=torch.float64)
    seen, full, later = (
        gradient(
            surrogate(logps, token_advantages({"context": rewards}, {"context": reach}), chances.detach()), parameters
        )
        for reach in torch.tensor([[[1, 0]], [[1, 1]], [[0, 1]]])
    )
    torch.testing.assert_close(seen, full)
    torch.testing.assert_close(later, torch.zeros_like(later))
    assert seen.abs().max() > 0.05


def test_k3_is_the_kl_and_its_gradient_that_of_the_other_kl():
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.4, 0.5, 0.0], dtype=torch.float64).log_softmax(0)
    logps = logits.log_softmax(0)
    ones = torch.ones(1, 4)
    k3 = token_terms(logps[None], None, reference[None], ones, ones)["kl"][0]
    chances = logps.exp()
    there, back = (chances * (logps - reference)).sum(), (reference.exp() * (reference - logps)).sum()
    torch.testing.assert_close((chances * k3).sum(), there)
    at_fixed_samples = gradient((chances.detach() * k3).sum(), [logits])
    torch.testing.assert_close(at_fixed_samples, gradient(back, [logits]))
    assert (at_fixed_samples - gradient(there, [logits])).abs().max() > 0.01  # the two directions do differ
