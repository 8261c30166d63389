"""Log-probabilities of chosen tokens from hidden states, without ever holding all logits.

Full logits of a group are (G * C, V): 8 x 1024 x 152k floats are 5 GB. Here they exist for `chunk` tokens at a time,
forward and backward (each chunk's are computed again in the backward pass), so memory is O(chunk * V). The backward
pass is written out, so that the weight's gradient is summed in one (V, D) buffer instead of made anew for each chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def token_logps(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return log_softmax(hidden @ weight.T / temperature) at `tokens`, and the entropy of that distribution; float32.

    hidden (N, D), weight (V, D), tokens (N,). Returns (logps (N,), entropy (N,)); the entropy carries no gradient.
    """
    return chunked_token_logps(hidden, weight, tokens, temperature, chunk=max(1, len(tokens)))


def chunked_token_logps(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, chunk: int = 128
) -> tuple[Tensor, Tensor]:
    """Return `token_logps` in chunks of tokens: equal values and gradients, logits of `chunk` tokens in memory."""
    return _TokenLogps.apply(hidden, weight, tokens, temperature, chunk)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Return the float32 logits (N, V), over the temperature."""
    logits = F.linear(hidden, weight).float()
    return logits if temperature == 1 else logits.div_(temperature)


class _TokenLogps(torch.autograd.Function):
    """`chunked_token_logps` with a backward pass written out."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        """Return what chunked_token_logps does; keep the normalisers (N,) for the backward pass, and no logits."""
        logps, entropies, normalisers = [], [], []
        for some_hidden, some_tokens in zip(hidden.split(chunk), tokens.split(chunk)):
            logits = _logits(some_hidden, weight, temperature)
            top = logits.amax(-1, keepdim=True)
            powers = (logits - top).exp_()
            total = powers.sum(-1)
            normaliser = top[:, 0] + total.log()
            chosen = logits.gather(-1, some_tokens[:, None])[:, 0]
            logps.append(chosen - normaliser)
            # H = normaliser - sum p * logit
            entropies.append(normaliser - torch.einsum("nv,nv->n", powers, logits) / total)
            normalisers.append(normaliser)
        entropy = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, tokens, torch.cat(normalisers))
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_logps: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """With slope = grad / temperature: d logits = slope (one-hot(token) - p), a chunk at a time."""
        hidden, weight, tokens, normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # frozen with LoRA
        slope = (grad_logps / ctx.temperature)[:, None]  # (N, 1)
        for start in range(0, len(tokens), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            chances = _logits(hidden[part], weight, ctx.temperature).sub_(normaliser[part, None]).exp_()
            grad_logits = chances.mul_(-slope[part])
            grad_logits.scatter_add_(-1, tokens[part, None], slope[part])
            grad_logits = grad_logits.to(weight.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), hidden[part])
        return grad_hidden, grad_weight, None, None, None
