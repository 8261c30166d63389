"""The model over 1, 2 and 2 x 2 processes: equal gradients, and never more of it in one place than its share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.helpers import tiny_thinker, tiny_tokenizer

pytestmark = pytest.mark.slow  # 40 s; .ci/run runs them
LORA = {"lora": {"rank": 3, "alpha": 6.0}}  # uneven over two ranks, as the vocabulary
FULL = {"optimizer_states": "float32"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a model in bfloat16, as published ones are, and the runs that the tests compare."""
    lab = tmp_path_factory.mktemp("lab")
    tiny_thinker(layers=4, hidden=128, vocab=403).bfloat16().save_pretrained(lab / "model")
    tiny_tokenizer().save_pretrained(lab / "model")
    launch(lab, 1, {"full-1": FULL, "lora-1": LORA})
    launch(
        lab,
        2,
        {"full-2": FULL, "lora-2": LORA, "cpu-2": {"optimizer_states": "cpu"}, "bfloat16-2": {"dtype": "bfloat16"}},
    )
    launch(lab, 4, {"full-4": {"shard_within_node": True}, "lora-4": LORA | {"shard_within_node": True}}, node=2)
    return lab


def launch(lab, processes, runs, node=None):
    """Runs them under torchrun; `node` is how many processes of those count as one node."""
    (lab / "runs.json").write_text(json.dumps(list(runs.items())))
    script = Path(__file__).parents[1] / "support" / "sharding_runs.py"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            str(script),
            str(lab / "runs.json"),
            str(node or processes),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def found(lab, name, rank=0):
    return json.loads((lab / f"{name}.json").read_text())[rank]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_equal_a_single_process(lab, kind, processes):
    one, many = (load_file(lab / f"{kind}-{n}.safetensors") for n in (1, processes))
    assert one.keys() == many.keys() and len(one) > 10
    largest = max(g.abs().max() for g in one.values())
    assert largest > 1e-3
    for name, gradient in one.items():
        torch.testing.assert_close(many[name], gradient, atol=float(largest) * 1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("processes", [2, 4])
def test_training_and_export_equal_a_single_process(lab, kind, processes):
    one, many = (found(lab, f"{kind}-{n}") for n in (1, processes))
    assert one["tokens"] == many["tokens"]
    for name in ("norms", "before", "after", "off"):
        for a, b in zip(one[name], many[name]):
            assert b == pytest.approx(a, rel=1e-4, abs=1e-4), name
    before = load_file(lab / "model" / "model.safetensors")
    ours, theirs = (load_file(lab / f"{kind}-{n}" / "model.safetensors") for n in (1, processes))
    moved = max((ours[key] - before[key].float()).abs().max() for key in ours)
    assert moved > 1e-3 and max((ours[key] - theirs[key]).abs().max() for key in ours) < 0.05 * moved


@pytest.mark.parametrize("name", ["full-1", "lora-1", "full-2", "lora-2", "cpu-2", "bfloat16-2", "full-4", "lora-4"])
def test_checkpoints_restore_weights_and_states(lab, name):
    assert found(lab, name)["restored"]


def test_states_on_the_cpu_change_nothing(lab):
    ours, theirs = (load_file(lab / name / "model.safetensors") for name in ("full-2", "cpu-2"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def sizes(lab):
    """Numbers of weights: of the decoder (sharded), of the towers (whole on each rank), of the largest tensor."""
    tensors = load_file(lab / "model" / "model.safetensors")
    towers = sum(t.numel() for key, t in tensors.items() if key.startswith(("visual.", "audio_tower.")))
    return sum(t.numel() for t in tensors.values()) - towers, towers, max(t.numel() for t in tensors.values())


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_holds_more_than_its_share_while_loading(lab, rank):
    decoder, towers, largest = sizes(lab)
    for name, size, tower_size in (("full-2", 4, 4), ("bfloat16-2", 4, 2)):  # bytes of a weight: masters, towers
        load, reference = (found(lab, name, rank)[part] for part in ("load", "reference"))
        assert load["held"] <= (size * decoder / 2 + tower_size * towers) * 1.02
        assert load["peak"] <= load["held"] + 4 * load["buffers"]  # which take room while they are computed
        assert 4 * load["buffers"] < 0.6 * size * decoder / 2  # far from the other half
        assert reference["held"] <= tower_size * decoder / 2 * 1.02
        assert reference["peak"] <= reference["held"] + tower_size * largest


@pytest.mark.parametrize("name", ["full-2", "lora-2"])
def test_export_gathers_one_tensor_at_a_time(lab, name):
    assert 6 * sizes(lab)[2] < 0.5 * sizes(lab)[0]  # a few copies of the largest tensor (gloo's, too), not the model
    assert max(found(lab, name, rank)["export"] for rank in (0, 1)) <= 6 * 4 * sizes(lab)[2]


def test_lora_shares_its_reference(lab):
    lora = found(lab, "lora-1")
    assert lora["reference"]["shared"] and lora["reference"]["peak"] < 1000
    assert lora["off"] == lora["before"] and lora["after"] != lora["before"]
    assert not found(lab, "full-1")["reference"]["shared"]


def test_lora_holds_at_most_two_fifths_of_full_fine_tuning(lab):
    full, lora = (found(lab, name)["all"] for name in ("full-1", "lora-1"))
    decoder, towers, _ = sizes(lab)
    assert full >= 4 * (5 * decoder + towers)  # weights, gradients, two moments, the reference
    assert lora <= 0.4 * full
