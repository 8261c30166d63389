"""SFT, stage 1 of HumanOmniV2: the cold start that teaches <context>, <think>, <answer> before any reinforcement.

    torchrun --standalone --nproc_per_node 8 train_sft.py configs/stage1.json
    torchrun --standalone --nproc_per_node 2 train_sft.py                      the embedded toy, on a laptop's CPU

The loss is the mean negative log-probability of the assistant's tokens over the whole step, all ranks and accumulated
batches together: one global count, so that the result doesn't depend on how the step is split.
"""

import math

import torch
from torch import Tensor

from hov2 import distributed, toy
from hov2.config import SFTConfig
from hov2.data.inputs import encode_solution
from hov2.data.loader import PromptOrder, StepLoader
from hov2.data.samples import read_samples
from hov2.engine import optim
from hov2.engine.checkpoint import Checkpoints
from hov2.engine.guard import Guard
from hov2.engine.log import MetricsLog, Timer, traced
from hov2.engine.setup import Run, command, print0, report_derived, start
from hov2.evaluation.evaluator import HeldOut
from hov2.model.encoder import Prompt
from hov2.model.prefix import conversation_logps, group_logps
from hov2.model.thinker import Policy, set_training
from hov2.model.weights import export


def main(config: SFTConfig) -> None:
    """Trains for the config's steps, then exports the model to `output_dir/model`."""
    device = distributed.setup(config.device)
    with distributed.rank_zero_first():
        toy.prepare(config)  # builds the toy's world for the toy's configs, and nothing for others
    samples = read_samples(config.data, config.seed)  # first: what is wrong here shows before a model is loaded
    run = start(config, device)
    policy = run.policy
    optimizer = optim.make_optimizer(policy, config)
    order = PromptOrder(len(samples), config.samples_per_step, config.seed)
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
    timer, means, guard = Timer(), distributed.Means(), Guard(config, first, log.history)
    report_derived("SFT", config, len(samples), config.samples_per_step, steps)

    for step in traced(range(first, steps), config, distributed.rank()):
        # --- Samples: prompts with their media encoded, and what the assistant should say -----------------------------
        with timer("data_wait"):
            loaded = loader.next_step(step)
        with timer("encode"):
            batch = [
                (run.encoder(inputs), encode_solution(sample, run.tokenizer)[None].to(device))
                for _, sample, inputs in loaded
            ]
            means.add("media/audio_cut", [inputs.shape.audio_cut for _, _, inputs in loaded])

        # --- Update: accumulate over this rank's batches --------------------------------------------------------------
        set_training(policy, True, config.gradient_checkpointing)
        with timer("update"):
            num_items = distributed.global_sum(sum(count_labels(run, *item) for item in batch)).item()
            n = config.prompts_per_forward
            micro_batches = [batch[i : i + n] for i in range(0, len(batch), n)]
            for micro_batch in micro_batches:
                policy.set_requires_gradient_sync(micro_batch is micro_batches[-1])
                logps = label_logps(policy, micro_batch, config)
                loss = -logps.sum() / num_items * distributed.world_size()  # FSDP averages over ranks; ours is a sum
                means.add("loss", loss * len(micro_batches))  # the mean over ranks and batches is then the step's loss
                loss = guard.note_loss(loss)  # one that is not finite shows in the gradient's norm, on all ranks
                loss.backward()
            grad_norm = optim.clip_gradients(policy, config.max_grad_norm).item()  # waits for the device
            rate = optim.learning_rate(step, steps, config.learning_rate, config.lr_scheduler, config.warmup_steps)
            if math.isfinite(grad_norm):  # the same on all ranks; else weights and optimizer stay as they are
                optim.set_learning_rate(optimizer, rate)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ids = [sample.id for _, sample, _ in loaded]
            guard.check_update(step, grad_norm, [ids[i : i + n] for i in range(0, len(ids), n)])
        set_training(policy, False, config.gradient_checkpointing)

        # --- Log: metrics, held-out questions, checkpoint -------------------------------------------------------------
        metrics = means.reduce()
        metrics |= {
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "tokens": num_items,
            "prompts/replaced": len(loader.replaced),
            "guard/bad_steps": guard.bad_steps,
        }
        log.write(step, metrics | held_out.after(step + 1, steps) | timer.pop())
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
    log.close()
    distributed.cleanup()


def label_logps(policy: Policy, micro_batch: list[tuple[Prompt, Tensor]], config: SFTConfig) -> Tensor:
    """Log-probs of all tokens that are trained on in a few samples, one flat tensor."""
    prompts, completions = map(list, zip(*micro_batch))
    if config.train_on_prompt:
        logps = policy(conversation_logps, prompts, completions, config.logprob_chunk)
    else:
        logps, _ = policy(group_logps, prompts, completions, 1.0, config.logprob_chunk)
    return torch.cat([of_sample.flatten() for of_sample in logps])


def count_labels(run: Run, prompt: Prompt, completion: Tensor) -> Tensor:
    """How many tokens of one sample are trained on: the assistant's, or all text but the first (`train_on_prompt`)."""
    count = torch.tensor(completion.numel(), device=completion.device)
    if run.config.train_on_prompt:
        config = run.policy.thinker.config
        media = torch.tensor(
            [config.image_token_id, config.video_token_id, config.audio_token_id], device=completion.device
        )
        count = count + (~torch.isin(prompt.ids[1:], media)).sum()
    return count


if __name__ == "__main__":
    command(main, SFTConfig, default="configs/toy/stage1.json")
