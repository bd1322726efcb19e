"""ConsisID checkpoints on disk: published layouts load, T5 included, and damage is named."""

import json
import shutil

import comfy.sd
import comfy.text_encoders.cogvideo
import pytest
import sentencepiece
import tiny_consisid
import torch
from safetensors.torch import load_file, save_file

from consistent_video.loaders import audit, checkpoint, families, folders, network, single_file, t5_text_encoder
from consistent_video.loaders.families import CONSISID
from native_sampling import conditioning

pytestmark = pytest.mark.usefixtures("memory_mode")

PUBLISHED_T5 = {
    "_name_or_path": "google/t5-v1_1-xxl",
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32128,
}


@pytest.fixture(scope="module")
def published(models_folder):
    folder = models_folder / "diffusers" / "ConsisID-loading"
    yield tiny_consisid.write_consisid(folder)
    shutil.rmtree(folder)


@pytest.fixture
def copy(published, request):
    """A checkpoint folder of its own, listed by ComfyUI, that a test may damage."""
    folder = published.with_name("consisid-" + request.node.name.replace("[", "-").replace("]", ""))
    shutil.copytree(published, folder)
    yield folder
    shutil.rmtree(folder)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def transformer_state(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_same_weights(patcher, state):
    found = patcher.model.diffusion_model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key].float(), value.float()) for key, value in state.items())


def test_folder_loads_with_its_scale_and_schedule(copy):
    edit(copy / "vae" / "config.json", scaling_factor=0.9)
    model, clip, vae = checkpoint.load_folder(CONSISID, copy, "default")
    assert_same_weights(model, transformer_state(copy))
    assert model.model.scheduler_config["_class_name"] == "CogVideoXDPMScheduler"
    latent, form = torch.ones(1, 16, 3, 2, 2), model.model.latent_format
    assert form.latent_dimensions == 3 and form.latent_channels == 16
    torch.testing.assert_close(model.model.process_latent_in(latent), 0.9 * latent)
    torch.testing.assert_close(model.model.process_latent_out(0.9 * latent), latent)
    torch.testing.assert_close(form.process_picture(latent), 0.9 * latent)
    assert vae.latent_dim == 3 and clip.cond_stage_model.clip_name == "t5xxl"


def test_inverted_scale_is_the_pictures_alone(copy):
    edit(copy / "vae" / "config.json", scaling_factor=0.5, invert_scale_latents=True)
    form = checkpoint.load_folder_network(CONSISID, copy, "default").model.latent_format
    assert (form.scale_factor, form.picture_factor) == (0.5, 2.0)


def test_sharded_bf16_folder_loads_in_its_type(tmp_path):
    folder = tiny_consisid.write_consisid(tmp_path / "half", half=True)
    index = json.loads(
        (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text(encoding="utf-8")
    )
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    state = {}
    for shard in shards:
        state |= load_file(folder / "transformer" / shard)
    model, clip, _ = checkpoint.load_folder(CONSISID, folder, "bf16")
    assert_same_weights(model, state)
    types = {key: value.dtype for key, value in model.model.diffusion_model.state_dict().items()}
    assert {key for key, dtype in types.items() if dtype == torch.float32} == {
        "patch_embed.pos_embedding",
        "local_facial_extractor.latents",
        "local_facial_extractor.proj_out",
    }
    assert set(types.values()) == {torch.float32, torch.bfloat16}
    assert {weight.dtype for weight in clip.cond_stage_model.t5xxl.transformer.parameters()} == {torch.bfloat16}


def test_family_is_found_by_the_networks_own_configuration(copy):
    index = json.loads((copy / "model_index.json").read_text(encoding="utf-8"))
    del index["transformer"]
    (copy / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    assert copy.name in folders.list_checkpoints(CONSISID)
    assert copy.name not in folders.list_checkpoints(families.MODELSCOPE)
    assert checkpoint.load_folder_network(CONSISID, copy, "default").model.diffusion_model.config.num_layers == 4


def test_early_field_names_and_unknown_fields_do_not_matter(copy):
    config = json.loads((copy / "transformer" / "config.json").read_text(encoding="utf-8"))
    edit(copy / "transformer" / "config.json", unknown_field=1, _name_or_path="elsewhere")
    model = checkpoint.load_folder_network(CONSISID, copy, "default")
    assert_same_weights(model, transformer_state(copy))
    # An early configuration describes the published extractor, whatever its fields say.
    (copy / "transformer" / "config.json").write_text(
        json.dumps({**config, "LFE_heads": 12, "LFE_num_tokens": 32}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="another shape .*local_facial_extractor"):
        checkpoint.load_folder_network(CONSISID, copy, "default")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
def test_single_file_loads_by_its_shapes(models_folder, prefix):
    state = tiny_consisid.transformer(use_learned_positional_embeddings=False).state_dict()
    path = models_folder / "diffusion_models" / "consisid.safetensors"
    save_file({prefix + key: value for key, value in state.items()}, path)
    model = single_file.load_file(path, "auto", "default")
    assert_same_weights(model, state)
    assert type(model.model).__name__ == "ConsisIDModel"
    assert model.model.latent_format.scale_factor == 0.7
    assert "Family: ConsisID" in audit.report("diffusion_models/consisid.safetensors")
    with pytest.raises(ValueError, match="not a network of I2VGen-XL: found ConsisID"):
        single_file.load_file(path, families.I2VGENXL.name, "default")
    path.unlink()


def test_published_single_file_is_accounted_for_key_by_key():
    settings = {
        "num_attention_heads": 48,
        "in_channels": 32,
        "num_layers": 42,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
        "is_train_face": True,
    }
    published = network.build_on_meta(CONSISID.network, settings, "published")
    state = published.state_dict()
    assert single_file.detect_family(state) is CONSISID
    found = single_file.network_config(CONSISID, state)
    assert {key: published.config[key] for key in found} == found
    assert not network.compare(state, network.build_on_meta(CONSISID.network, found, ""))


def test_published_t5_is_accounted_for_key_by_key():
    config = t5_text_encoder.t5_config(PUBLISHED_T5, "published")
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        theirs = T5EncoderModel(T5Config(**PUBLISHED_T5)).state_dict()
    difference = network.compare(t5_text_encoder.published_keys(theirs), t5_text_encoder.t5_on_meta(config))
    assert not difference
    assert sum(value.numel() for value in t5_text_encoder.published_keys(theirs).values()) == 4_762_310_656
    assert config["dense_act_fn"] == "gelu_pytorch_tanh" and config["is_gated_act"]


@pytest.mark.parametrize("keys", ["encoder.embed_tokens.weight", "both"])
def test_embeddings_under_either_name_load(copy, published, keys):
    path = copy / "text_encoder" / "model.safetensors"
    state = load_file(path)
    embeddings = state["shared.weight"] if keys == "both" else state.pop("shared.weight")
    save_file({**state, "encoder.embed_tokens.weight": embeddings.clone()}, path)
    expected = conditioning(checkpoint.load_folder_clip(CONSISID, published), "a cat")[0][0]
    assert torch.equal(conditioning(checkpoint.load_folder_clip(CONSISID, copy), "a cat")[0][0], expected)


def test_native_t5_gives_the_same_prompt(published):
    """Load CLIP with type cogvideox, whose T5 is only told apart at its full size."""
    folder = published / "text_encoder"
    config = t5_text_encoder.t5_config(folders.read_config(folder / "config.json"), "")

    class Target:
        params: dict = {}
        clip = comfy.text_encoders.cogvideo.cogvideo_te()
        tokenizer = comfy.text_encoders.cogvideo.CogVideoXTokenizer

    native = comfy.sd.CLIP(Target(), model_options={"t5xxl_model_config": config})
    native.load_sd(load_file(folder / "model.safetensors"))
    ours = checkpoint.load_folder_clip(CONSISID, published)
    for text in ("a (red:1.3) fox jumps", "", "smile, 8k"):
        assert torch.equal(conditioning(native, text)[0][0], conditioning(ours, text)[0][0])


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "spiece.model", "none"])
def test_vocabulary_of_the_folder_is_used(copy, vocabulary, tmp_path):
    """Of the folder's own vocabulary in either published form; ComfyUI's where it has none."""
    if vocabulary != "tokenizer.json":
        shutil.rmtree(copy / "tokenizer")
    if vocabulary == "spiece.model":
        (copy / "tokenizer").mkdir()
        text = tmp_path / "text.txt"
        text.write_text("the fox jumps over the lazy dog\n" * 50, encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(copy / "tokenizer" / "spiece"), vocab_size=40, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    tokens = checkpoint.load_folder_clip(CONSISID, copy).tokenize("the fox")["t5xxl"]
    ids = [token for token, _ in tokens[0]]
    assert len(tokens) == 1 and len(ids) == tiny_consisid.TEXT_TOKENS
    end = ids.index(1)
    assert set(ids[end + 1 :]) == {0}
    if vocabulary == "spiece.model":
        own = sentencepiece.SentencePieceProcessor(model_file=str(copy / "tokenizer" / "spiece.model"))
        assert ids[:end] == own.encode("the fox")
    else:
        assert ids[:end] == [8, 3, 20400]


def test_long_prompt_is_cut_with_a_warning(published, caplog):
    clip = checkpoint.load_folder_clip(CONSISID, published)
    tokens = clip.tokenize("fox " * 500)["t5xxl"]
    assert [len(chunk) for chunk in tokens] == [tiny_consisid.TEXT_TOKENS] and tokens[0][-1][0] == 1
    assert "longer than 226 tokens" in caplog.text


def test_length_of_prompts_is_the_networks(copy):
    edit(copy / "transformer" / "config.json", max_text_seq_length=40)
    assert len(checkpoint.load_folder_clip(CONSISID, copy).tokenize("fox")["t5xxl"][0]) == 40


def damage_class(folder):
    edit(folder / "transformer" / "config.json", _class_name="CogVideoXTransformer3DModel")


def damage_vae(folder):
    edit(folder / "vae" / "config.json", _class_name="AutoencoderKL")


def damage_text_keys(folder):
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["encoder.extra"] = state.pop("encoder.final_layer_norm.weight")
    save_file(state, path)


def cut_embeddings(folder):
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    embeddings = state["shared.weight"][:100].clone()
    save_file(
        {
            name: embeddings.clone() if "embed_tokens" in name or name == "shared.weight" else tensor
            for name, tensor in state.items()
        },
        path,
    )
    edit(folder / "text_encoder" / "config.json", vocab_size=100)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (damage_class, ["transformer/config.json", "CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"]),
        (damage_vae, ["vae/config.json", "AutoencoderKLCogVideoX"]),
        (damage_text_keys, ["text_encoder", "1 missing keys (encoder.final_layer_norm.weight)", "Restore"]),
        (lambda folder: edit(folder / "text_encoder" / "config.json", feed_forward_proj="gated-silu"), ["gated-silu"]),
        (lambda folder: edit(folder / "text_encoder" / "config.json", relative_attention_max_distance=64), ["64"]),
        (
            lambda folder: edit(folder / "text_encoder" / "config.json", vocab_size=100),
            ["text_encoder", "shared.weight is (32128, 64), expected (100, 64)", "Restore"],
        ),
        (cut_embeddings, ["vocabulary of 32100", "embeddings for 100"]),
        (
            lambda folder: (folder / "text_encoder" / "config.json").write_text("{}", encoding="utf-8"),
            ["lacks d_model"],
        ),
        (
            lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{", encoding="utf-8"),
            ["tokenizer.json", "valid JSON"],
        ),
        (
            lambda folder: edit(folder / "transformer" / "config.json", num_layers=6),
            ["transformer", "missing keys (perceiver_cross_attention.2.norm1.bias"],
        ),
    ],
)
def test_damage_is_named(copy, how, words):
    how(copy)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        checkpoint.load_folder(CONSISID, copy, "default")
    message = str(caught.value).replace("\\", "/")
    assert str(copy).replace("\\", "/") in message
    assert [word for word in words if word not in message] == []


def test_audit_reports_every_component(published):
    report = audit.report(published.name)
    assert "Family: ConsisID" in report and "To load it: use Load ConsisID." in report
    assert "Missing keys: none\nUnexpected keys: none\nMisshapen keys: none" in report
    assert "text_encoder: " in report and "vae: " in report and "cannot be loaded" not in report


def test_network_and_text_encoder_can_be_loaded_again(published):
    model, clip, _ = checkpoint.load_folder(CONSISID, published, "default")
    for patcher in (model, clip.patcher):
        load, arguments = patcher.cached_patcher_init
        again = load(*arguments, disable_dynamic=True)
        first, second = patcher.model.state_dict(), again.model.state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
