"""What went in comes out: a thinker's folder, or a full Qwen2.5-Omni checkpoint with its other parts untouched."""

import json

import pytest
import torch
from helpers import tiny_thinker, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from hov2.checkpoint import export, hub_key, newest_checkpoint, set_aside
from hov2.model import ModelError, Policy, load_thinker, load_tokenizer


@pytest.fixture
def full_omni(tmp_path):
    """A folder laid out as a full checkpoint: two shards, an index, a talker tensor, the thinker under `thinker.`."""
    folder, thinker = tmp_path / "full", tiny_thinker()
    folder.mkdir()
    tensors = {f"thinker.{hub_key(name)}": value.contiguous() for name, value in thinker.state_dict().items()}
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": {n: tensors[n] for n in names[:20]},
              "model-00002-of-00002.safetensors": {n: tensors[n] for n in names[20:]} |
                                                  {"talker.weight": torch.arange(6.0)}}
    for file, content in shards.items():
        save_file(content, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, content in shards.items() for name in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    thinker_config = json.loads(thinker.config.to_json_string())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", "thinker_config": thinker_config}))
    (folder / "spk_dict.pt").write_bytes(b"left as it is")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def changed_policy(folder):
    """The folder's thinker with one tensor changed."""
    policy = Policy(load_thinker(str(folder), torch.float32))
    with torch.no_grad():
        policy.thinker.lm_head.weight += 1
    return policy


def test_thinker_loads_out_of_a_full_checkpoint(full_omni):
    loaded = load_thinker(str(full_omni), torch.float32).state_dict()
    for name, value in tiny_thinker().state_dict().items():
        assert (loaded[name] == value).all(), name


def test_full_checkpoint_goes_back_into_a_full_one(full_omni, tmp_path):
    policy = changed_policy(full_omni)
    export(policy, tmp_path / "out", str(full_omni), torch.float32)
    before, after = ({k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
                     for folder in (full_omni, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert {k for k in before if (before[k] != after[k]).any()} == {"thinker.lm_head.weight"}
    assert (tmp_path / "out" / "spk_dict.pt").read_bytes() == b"left as it is"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen2_5_omni"
    assert (load_thinker(str(tmp_path / "out"), torch.float32).lm_head.weight == policy.thinker.lm_head.weight).all()


def test_thinker_goes_back_into_a_thinker(tmp_path):
    tiny_thinker().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    policy = changed_policy(tmp_path / "model")
    export(policy, tmp_path / "out", str(tmp_path / "model"), torch.bfloat16)
    loaded = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert (loaded.lm_head.weight == policy.thinker.lm_head.weight.bfloat16()).all()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys()
    assert len(load_tokenizer(str(tmp_path / "out"))) == len(tiny_tokenizer())


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no such folder, and not to be had from the model hub"):
        load_thinker("nobody/nothing", torch.float32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: the folder has no model or tokenizer"):
        load_thinker(str(tmp_path / "empty"), torch.float32)


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    tiny_thinker().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of the thinker's weights are missing.*layers\.1\.mlp\.up_proj"):
        load_thinker(str(tmp_path), torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="that transformers can read"):
        load_thinker(str(tmp_path), torch.float32)


def test_export_may_replace_the_folder_that_the_run_began_with(tmp_path):
    tiny_thinker().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    policy = changed_policy(tmp_path / "model")
    export(policy, tmp_path / "model", str(tmp_path / "model"), torch.float32)
    assert (load_thinker(str(tmp_path / "model"), torch.float32).lm_head.weight == policy.thinker.lm_head.weight).all()
    assert len(load_tokenizer(str(tmp_path / "model"))) == len(tiny_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_earlier_run_is_set_aside(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "metrics.jsonl").write_text("old")
    set_aside(tmp_path)
    assert (tmp_path / "earlier-1" / "metrics.jsonl").read_text() == "old" and newest_checkpoint(tmp_path) is None
    set_aside(tmp_path)
    assert not (tmp_path / "earlier-2").exists()


def test_an_unfinished_checkpoint_is_not_taken(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-20.unfinished"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert newest_checkpoint(tmp_path / "nowhere") is None
