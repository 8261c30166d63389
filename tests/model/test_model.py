"""A thinker comes from every published layout as transformers reads it, and goes back into what it came from; LoRA."""

import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from hov2.config import ConfigError, LoRAConfig, MediaConfig
from hov2.data.sound import _whisper
from hov2.distributed import WriteError
from hov2.model.encoder import Encoder
from hov2.model.lora import LoRALinear, adapters_off, add_lora
from hov2.model.prefix import causal_attention
from hov2.model.thinker import Policy, decode, embed, load_thinker, load_tokenizer
from hov2.model.versions import decoder_of
from hov2.model.weights import ModelError, export
from tests.support.helpers import tiny_thinker, tiny_tokenizer
from tests.support.modelkit import random_inputs, use_hov2_attention


@pytest.fixture
def full_omni(tmp_path):
    """A folder laid out as a full checkpoint: two shards, an index, a talker tensor, the thinker under `thinker.`."""
    folder, thinker = tmp_path / "full", tiny_thinker()
    thinker.save_pretrained(folder)
    tensors = {f"thinker.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": {n: tensors[n] for n in names[:20]},
        "model-00002-of-00002.safetensors": {n: tensors[n] for n in names[20:]} | {"talker.weight": torch.arange(5.0)},
    }
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


def inside_names(folder):
    """The folder's one file with the thinker's own names instead of the published ones."""
    tiny_thinker().save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in tiny_thinker().state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layout", ["published names", "own names", "in several files", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_weights_equal_from_pretrained(tmp_path, layout, dtype):
    thinker = tiny_thinker()
    if layout == "tied":
        thinker.config.tie_word_embeddings = True
        thinker.tie_weights()
    thinker.save_pretrained(tmp_path, max_shard_size="200KB" if layout == "in several files" else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == (6 if layout == "in several files" else 1)
    expected = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    if layout == "own names":
        inside_names(tmp_path)
    loaded = load_thinker(str(tmp_path), dtype)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (layout == "tied")
    for kind in ("named_parameters", "named_buffers"):  # buffers are computed, and don't come from the files
        pairs = list(zip(getattr(expected, kind)(), getattr(loaded, kind)(), strict=True))
        assert len(pairs) >= 5
        for (name, a), (other, b) in pairs:
            assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    inputs = random_inputs()
    prompt = Encoder(loaded, torch.device("cpu"))(inputs)
    logits = loaded.lm_head(
        decode(loaded, embed(loaded, prompt.ids, prompt.visual, prompt.audio)[None], prompt.position_ids[:, None], None)
    )
    features = {
        "pixel_values_videos": inputs.pixel_values.to(dtype),
        "video_grid_thw": inputs.shape.grid_thw,
        "video_second_per_grid": torch.tensor([inputs.shape.second_per_grid]),
        "input_features": inputs.input_features[None].to(dtype),
        "feature_attention_mask": torch.ones(1, inputs.input_features.shape[1], dtype=torch.long),
    }
    plain = expected(
        input_ids=inputs.prompt_ids[None],
        attention_mask=torch.ones(1, len(inputs.prompt_ids)),
        use_audio_in_video=False,
        **features,
    ).logits
    assert torch.equal(logits, plain)


def test_thinker_loads_out_of_a_full_checkpoint(full_omni):
    loaded = load_thinker(str(full_omni), torch.float32).state_dict()
    for name, value in tiny_thinker().state_dict().items():
        assert (loaded[name] == value).all(), name


def test_a_hub_id_is_read_from_where_its_files_were_put(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--thinker"
    tiny_thinker().save_pretrained(repository / "snapshots" / "abc", max_shard_size="200KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert torch.equal(load_thinker("some/thinker", torch.float32).lm_head.weight, tiny_thinker().lm_head.weight)


def test_full_checkpoint_goes_back_into_a_full_one(full_omni, tmp_path):
    policy = changed_policy(full_omni)
    export(policy, tmp_path / "out", str(full_omni), torch.float32)
    before, after = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
        for folder in (full_omni, tmp_path / "out")
    )
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
    small = [{p.name for p in (tmp_path / name).iterdir()} for name in ("model", "out")]
    assert small[0] == small[1]
    assert len(load_tokenizer(str(tmp_path / "out"))) == len(tiny_tokenizer())


def logits_with_media(thinker):
    """Next-token logits after a prompt with a video and its sound."""
    prompt = Encoder(thinker, torch.device("cpu"))(random_inputs())
    embeds = embed(thinker, prompt.ids, prompt.visual, prompt.audio)[None]
    with torch.no_grad():
        return thinker.lm_head(decode(thinker, embeds, prompt.position_ids[:, None], None))


@pytest.mark.parametrize("layout", ["one file", "in several files", "tied"])
def test_a_thinker_is_exported_as_an_omni_that_others_load(tmp_path, layout):
    thinker = tiny_thinker()
    if layout == "tied":
        for config in (thinker.config, thinker.config.text_config):
            config.tie_word_embeddings = True
        thinker.tie_weights()
    thinker.save_pretrained(tmp_path / "model", max_shard_size="200KB" if layout == "in several files" else "1GB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    policy = changed_policy(tmp_path / "model")
    out = tmp_path / "out"
    export(policy, out, str(tmp_path / "model"), torch.float32, "omni", MediaConfig(min_pixels=784, max_pixels=7840))
    full = Qwen2_5OmniForConditionalGeneration.from_pretrained(out)
    assert not full.has_talker and full.dtype == torch.float32
    for (name, ours), theirs in zip(policy.thinker.named_parameters(), full.thinker.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(logits_with_media(load_thinker(str(out), torch.float32)), logits_with_media(policy.thinker))
    preprocessor = json.loads((out / "preprocessor_config.json").read_text())
    assert (preprocessor["min_pixels"], preprocessor["max_pixels"]) == (784, 7840)
    theirs = WhisperFeatureExtractor.from_pretrained(out).to_dict()
    ours = _whisper().to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= {"return_attention_mask"}  # hov2 says it at each call

    export(policy, tmp_path / "back", str(out), torch.float32, "thinker")
    back = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert torch.equal(back.lm_head.weight, policy.thinker.lm_head.weight)
    before, after = (
        {key for file in (tmp_path / name).glob("*.safetensors") for key in load_file(file)}
        for name in ("model", "back")
    )
    assert before == after and not (tmp_path / "back" / "spk_dict.pt").exists()


def test_a_full_checkpoint_is_exported_as_a_thinker(full_omni, tmp_path):
    policy = changed_policy(full_omni)
    export(policy, tmp_path / "out", str(full_omni), torch.bfloat16, "thinker")
    loaded = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, policy.thinker.lm_head.weight.bfloat16())
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(weight_map) == len(list(policy.thinker.parameters())) and "talker.weight" not in weight_map
    assert not (tmp_path / "out" / "spk_dict.pt").exists()


def test_an_export_says_what_a_processor_needs_and_keeps_what_was_said(tmp_path):
    tiny_thinker().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    said = json.loads(file.read_text())
    del said["video_token"]
    file.write_text(json.dumps(said))
    policy = changed_policy(tmp_path / "model")
    export(policy, tmp_path / "out", str(tmp_path / "model"), torch.float32, media=MediaConfig(max_pixels=7840))
    assert load_tokenizer(str(tmp_path / "out")).video_token == "<|VIDEO|>"
    export(policy, tmp_path / "again", str(tmp_path / "out"), torch.float32, media=MediaConfig(max_pixels=15680))
    for name in ("out", "again"):  # the second run's model has a preprocessor, which stays as it is
        assert json.loads((tmp_path / name / "preprocessor_config.json").read_text())["max_pixels"] == 7840


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


def test_tied_weights_go_back_under_every_key_of_theirs(tmp_path):
    thinker = tiny_thinker()
    thinker.config.tie_word_embeddings = True
    thinker.tie_weights()
    thinker.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(both, tmp_path / "model" / "model.safetensors")
    export(changed_policy(tmp_path / "model"), tmp_path / "out", str(tmp_path / "model"), torch.float32)
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], both["lm_head.weight"] + 1)
    assert torch.equal(out["model.embed_tokens.weight"], out["lm_head.weight"])


@pytest.mark.parametrize("head", ["other", "equal", "none", "alone"])
@pytest.mark.parametrize("layout", ["thinker", "full"])
def test_the_files_decide_whether_the_head_is_tied(full_omni, tmp_path, head, layout):
    """The config says that it is; transformers unties what differs, and so does hov2, also in what it exports."""
    folder = tmp_path / "thinker"
    tiny_thinker().save_pretrained(folder)
    if layout == "full":
        folder = full_omni
    prefix = "thinker." if layout == "full" else ""
    config = json.loads((folder / "config.json").read_text())
    config.get("thinker_config", config)["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if f"{prefix}model.embed_tokens.weight" in weights and head == "alone":
            del weights[f"{prefix}model.embed_tokens.weight"]
        if f"{prefix}lm_head.weight" in weights and head in ("equal", "none"):
            del weights[f"{prefix}lm_head.weight"]
        if f"{prefix}model.embed_tokens.weight" in weights and head == "equal":
            weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}model.embed_tokens.weight"].clone()
        save_file(weights, path, metadata={"format": "pt"})
    if layout == "full":
        index = {"metadata": {}, "weight_map": {}}
        for path in folder.glob("*.safetensors"):
            index["weight_map"] |= dict.fromkeys(load_file(path), path.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def untied(thinker):
        return thinker.lm_head.weight is not thinker.get_input_embeddings().weight

    expected = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    loaded = load_thinker(str(folder), torch.float32)
    assert untied(loaded) == untied(expected) == (head == "other")
    assert torch.equal(loaded.lm_head.weight, expected.lm_head.weight)
    policy = changed_policy(folder)
    export(policy, tmp_path / "out", str(folder), torch.float32)
    for again in (
        Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32),
        load_thinker(str(tmp_path / "out"), torch.float32),
    ):
        assert untied(again) == (head == "other")
        assert torch.equal(again.lm_head.weight, policy.thinker.lm_head.weight)
        assert torch.equal(again.get_input_embeddings().weight, policy.thinker.get_input_embeddings().weight)
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported.get("thinker_config", exported)["tie_word_embeddings"] == (head != "other")


def test_an_export_has_what_the_source_has_for_loading_and_nothing_else(full_omni, tmp_path, monkeypatch, capsys):
    kept = [
        "generation_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "assets/voices/chelsie.wav",
        "LICENSE",
    ]
    other = [
        ".cache/lock",
        ".gitattributes",
        "pytorch_model.bin.index.json",
        "model.gguf",
        "original/params.json",
        "original/consolidated.pth",
        "checkpoint-3/state.json",
        "out.unfinished/model.safetensors",
        "metrics.jsonl",
        "clips/a.mp4",
        "clips/b.mp4",
        "archive.zip",
    ]
    for name in kept + other:
        path = full_omni / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (60_000 if path.suffix == ".mp4" else 10))
    (full_omni / "archive.zip").write_bytes(b"x" * 200_000)
    monkeypatch.setattr("hov2.model.weights.LARGEST_COPY", 100_000)
    before = {path.relative_to(full_omni).as_posix() for path in full_omni.rglob("*") if path.is_file()}
    export(changed_policy(full_omni), full_omni / "out", str(full_omni), torch.bfloat16)
    out = full_omni / "out"
    after = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert after == before - set(other) and set(kept) <= after and "spk_dict.pt" in after
    said = capsys.readouterr().out
    assert said.count("not copied") == 2 and f"{full_omni / 'archive.zip'}: not copied" in said
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = [tensor for path in out.glob("*.safetensors") for tensor in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert index["weight_map"] == json.loads((full_omni / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("room", [0, 50_000])
def test_an_export_to_a_full_disk_is_one_error_and_leaves_what_was_there(tmp_path, room):
    tiny_thinker().save_pretrained(tmp_path / "model")
    policy = changed_policy(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier").write_text("as it was")
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # writes fail as on a full disk
    try:
        with pytest.raises(WriteError, match=rf"^{tmp_path / 'out'}: can't be written: File too large$"):
            export(policy, tmp_path / "out", str(tmp_path / "model"), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["earlier"]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def lora_policy(folder, **settings):
    """The folder's thinker with adapters that do something."""
    thinker, g = load_thinker(str(folder), torch.float32), torch.Generator().manual_seed(1)
    add_lora(thinker, LoRAConfig(**settings))
    for module in thinker.modules():
        if isinstance(module, LoRALinear):
            module.start(g)
            nn.init.normal_(module.lora_b, std=0.2, generator=g)
    return Policy(thinker)


def logits_of(thinker, ids):
    return thinker(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_merged_export_equals_the_adapter_on_and_off_is_the_base(tmp_path):
    tiny_thinker().save_pretrained(tmp_path / "model")
    policy, ids = lora_policy(tmp_path / "model", rank=4), torch.arange(20)[None]
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith(("lora_a", "lora_b")) for name in trained)
    export(policy, tmp_path / "out", str(tmp_path / "model"), torch.float32)
    merged = load_thinker(str(tmp_path / "out"), torch.float32)
    with torch.no_grad():
        on, base = logits_of(policy.thinker, ids), logits_of(tiny_thinker(), ids)
        torch.testing.assert_close(logits_of(merged, ids), on, atol=1e-5, rtol=0)
        with adapters_off():
            off = logits_of(policy.thinker, ids)
    torch.testing.assert_close(off, base, atol=1e-6, rtol=0)
    assert (on - base).abs().max() > 0.1
    assert torch.equal(logits_of(policy.thinker, ids), on)  # on again


def test_lora_goes_on_the_layers_that_are_named(tmp_path):
    tiny_thinker().save_pretrained(tmp_path)
    layers = lora_policy(tmp_path, target_modules=["q_proj", "up_proj"]).layers
    names = {name for name, module in layers.named_modules() if isinstance(module, LoRALinear)}
    assert names == {f"{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")}
    with pytest.raises(ConfigError, match=r"expected some of \[.*'q_proj'.*\], got \['query'\]"):
        lora_policy(tmp_path, target_modules=["query"])


@pytest.mark.parametrize(
    "side", [1, 2, 3, 5]
)  # windows of two merged tokens by two: whole ones, and cut ones at the edges
@pytest.mark.parametrize("kind", ["video", "image"])
def test_towers_equal_transformers_own_with_windows_of_any_sizes(side, kind):
    inputs = random_inputs(side=side, mel_frames=230, frames=2 if kind == "image" else 6, kind=kind)
    theirs, ours = (
        Encoder(thinker, torch.device("cpu"))(inputs)
        for thinker in (tiny_thinker(), use_hov2_attention(tiny_thinker()))
    )
    for expected, found in ((theirs.visual, ours.visual), (theirs.audio, ours.audio)):
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_attention_of_our_own_equals_transformers_in_values_and_gradients():
    prompt, results = None, []
    for thinker in (tiny_thinker(), use_hov2_attention(tiny_thinker())):
        prompt = Encoder(thinker, torch.device("cpu"))(random_inputs())
        embeds = embed(thinker, prompt.ids, prompt.visual, prompt.audio)[None]
        positions = prompt.position_ids[:, None]
        if results:
            hidden = decode(thinker, embeds, positions, lambda _, q, k, v, scale: causal_attention(q, k, v, scale))
        else:
            hidden = decoder_of(thinker)(inputs_embeds=embeds, position_ids=positions).last_hidden_state
        hidden.square().sum().backward()
        gradients = {name: p.grad for name, p in decoder_of(thinker).named_parameters()}
        results.append((hidden.detach(), gradients))
    (expected, expected_gradients), (found, gradients) = results
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=float(largest) * 1e-5, rtol=0)
