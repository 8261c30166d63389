"""benchmarks/real_lm.py: a grafted decoder computes what the original does; the questions; what can't be grafted."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import real_lm

from hov2.config import Source
from hov2.data.samples import read_samples
from hov2.model.thinker import decode, load_thinker, load_tokenizer
from hov2.rewards import accuracy_reward, format_reward
from tests.support.helpers import tiny_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    "bos_token_id": None,
    "eos_token_id": None,
}


def chatml_tokenizer(added=real_lm.CHATML):
    """The tests' byte-level BPE with ChatML's tokens alone."""
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    content["added_tokens"] = []
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("spare_rows", [0, 30])  # of the original's embedding: Qwen's has more rows than tokens
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_next_token_logits_equal_the_originals(tmp_path, kind, tied, spare_rows):
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    tokenizer = chatml_tokenizer()
    torch.manual_seed(0)
    size = len(tokenizer) + spare_rows
    model = model_class(config_class(**SIZES, vocab_size=size, tie_word_embeddings=tied)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")

    real_lm.graft(tmp_path / "source", tmp_path / "out")
    thinker = load_thinker(str(tmp_path / "out"), torch.float32)
    ids = torch.randint(len(tokenizer), (2, 20))
    positions = torch.arange(20).expand(3, 2, -1)
    with torch.no_grad():
        hidden = decode(thinker, thinker.get_input_embeddings()(ids), positions, None)
        logits = thinker.lm_head(hidden)
        expected = model(ids).logits
    assert (logits[..., : len(tokenizer)] - expected[..., : len(tokenizer)]).abs().max() < 1e-5
    assert expected.std() > 0.05

    grafted = load_tokenizer(str(tmp_path / "out"))
    text = "<|im_start|>user\nWhat is <context>?<|im_end|>"
    assert grafted(text).input_ids == tokenizer(text).input_ids
    assert grafted.video_token == "<|VIDEO|>" and grafted.eos_token == "<|im_end|>"
    rows = thinker.get_input_embeddings().weight
    assert len(rows) % 64 == 0 and len(rows) >= len(grafted) == len(tokenizer) + 7
    mean = model.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(rows[thinker.config.video_token_id], mean)


def test_what_cannot_be_grafted_is_said():
    llama3 = SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4}}
    for config, message in [
        (MistralConfig(), "'mistral'; expected llama or qwen2"),
        (LlamaConfig(**llama3), "rope_type 'linear'; expected default"),
        (LlamaConfig(**SIZES, head_dim=32), "head_dim 32"),
        (LlamaConfig(**SIZES, attention_bias=True), "attention_bias"),
    ]:
        with pytest.raises(real_lm.GraftError, match=message):
            real_lm.check(config)
    with pytest.raises(real_lm.GraftError, match=r"no <\|im_end\|>"):
        real_lm.with_media_tokens(chatml_tokenizer(["<|im_start|>", "<|endoftext|>"]))


def answer_to(problem):
    """The right answer, worked out from the question alone."""
    numbers = [int(number) for number in re.findall(r"\d+", problem)]
    if "+" in problem:
        return sum(numbers)
    first, second, third = numbers
    assert third - second == second - first
    return third + third - second


def test_questions_are_right_and_no_two_are_the_same(tmp_path):
    for folder in ("one", "two"):
        real_lm.write_data(tmp_path / folder)
    asked = set()
    for split, count in real_lm.SPLITS.items():
        path = tmp_path / "one" / f"{split}.jsonl"
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        samples = read_samples([Source(str(path))])
        assert len(samples) == count
        for sample in samples:
            assert format_reward(sample.solution) == 1
            right = f"<answer>{answer_to(sample.problem)}</answer>"
            assert accuracy_reward(sample.solution, right, sample.problem_type) == 1
            asked.add(sample.problem)
    assert len(asked) == sum(real_lm.SPLITS.values())


def test_the_report_compares_two_evaluations(tmp_path, capsys):
    real_lm.write_data(tmp_path / "data")
    questions = real_lm.read_lines(tmp_path / "data" / "held_out.jsonl")
    for folder, wrong in (("eval_sft", 3), ("eval_grpo", 5)):
        answers = []
        for number, question in enumerate(questions):
            right = float(number % wrong > 0)
            answers.append({"id": question["id"], "accuracy": right, "format": float(number < 120)})
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, answers)))
    steps = [
        {"rewards/format/mean": 1.0, "rewards/accuracy/mean": step / 20, "time/rollout": 2.0, "time/update": 1.0}
        for step in range(20)
    ]
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    rollouts = []
    for number, question in enumerate(real_lm.read_lines(tmp_path / "data" / "grpo.jsonl")[:240]):
        step = number % 20  # each kind and level of question comes in both halves, but one
        if step >= 10 and real_lm.group_of(question) == "sum, easier":
            continue
        rewards = [{"format": 1.0, "accuracy": 0.0}, {"format": 0.0, "accuracy": float(step >= 10)}]
        completions = [{"rewards": of_one} for of_one in rewards]
        rollouts.append({"step": step, "sample": question["id"], "completions": completions})
    (tmp_path / "grpo" / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollouts)))
    real_lm.main(["report", str(tmp_path), "--svg", str(tmp_path / "curve.svg")])
    printed = capsys.readouterr().out
    assert "0.667 [" in printed and "0.800 [" in printed and "3 s a step" in printed
    assert "question by question: +0.133 [" in printed and "over 240\n" in printed
    assert "before: +0.133 [" in printed and "over 120\n" in printed
    assert re.search(r"sum, easier +0\.000 +-\n", printed)
    assert re.search(r"next number, harder +0\.000 +0\.500\nformat +0\.500 +0\.500\n", printed)
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
