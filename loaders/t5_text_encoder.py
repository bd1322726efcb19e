"""T5 text encoders of diffusers folders as ComfyUI's CLIP, built from the folder's own configuration."""

import logging
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.t5
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from transformers import T5TokenizerFast

from . import config_fields
from .folders import read_config
from .linked_folders import without_marks
from .network import plain_network, require_fit
from .weights import find_weights, read_weights, transformers_stem

# Name of the encoder inside a CLIP, the one that ComfyUI gives to T5-XXL: its LoRA loaders go by it.
NAME = "t5xxl"
END, PAD = 1, 0
EMBEDDINGS, TIED_EMBEDDINGS = "shared.weight", "encoder.embed_tokens.weight"
REQUIRED = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size")
TANH_GELU = "gelu_pytorch_tanh"
# feed_forward_proj -> activation and whether a second projection gates it; transformers reads "gated-gelu" as tanh.
FEED_FORWARDS = {"relu": ("relu", False), "gated-relu": ("relu", True), "gated-gelu": (TANH_GELU, True)}
# What ComfyUI's T5 is built with, and transformers' configuration when it says nothing.
FIXED = {
    "model_type": "t5",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


class _Target:
    """What `comfy.sd.CLIP` builds."""

    def __init__(self, clip, tokenizer):
        self.clip = clip
        self.tokenizer = tokenizer
        self.params = {}


def load_t5_text_encoder(
    folder: Path, tokens: int, prefer_half: bool = False, disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """Load `<folder>/text_encoder` and `<folder>/tokenizer`.

    Prompts are padded to `tokens` and cut there with a warning; the padding is attended to, as the published pipelines
    of CogVideoX and ConsisID do. ComfyUI computes T5 in float32, whatever the type of its weights.

    Args:
        folder: the checkpoint folder. Without a tokenizer, ComfyUI's own T5 vocabulary is used.
        tokens: length of every encoded prompt.
        prefer_half: take the `.fp16` variant when both precisions are present.
        disable_dynamic: as of `comfy.sd.CLIP`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit the configuration.
    """
    config_file = folder / "text_encoder" / "config.json"
    config = t5_config(read_config(config_file), str(config_file))
    files = find_weights(folder / "text_encoder", transformers_stem(folder / "text_encoder"), prefer_half)
    state = published_keys(read_weights(files))
    require_fit(state, t5_on_meta(config), files, config_file)
    with without_marks(folder / "tokenizer") as readable:
        tokenizer = tokenizer_class(readable, config, tokens)
        clip = comfy.sd.CLIP(
            _Target(_model_class(config, tokens, storage_dtype(comfy.utils.weight_dtype(state))), tokenizer),
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            parameters=comfy.utils.calculate_parameters(state),
            disable_dynamic=disable_dynamic,
        )
    clip.load_sd(state)
    return clip


def load_t5_patcher(folder: Path, tokens: int, prefer_half: bool, disable_dynamic: bool = False):
    """Load the text encoder again for ComfyUI's own use (other devices, other memory modes); returns its patcher."""
    return load_t5_text_encoder(folder, tokens, prefer_half, disable_dynamic).patcher


def t5_config(config: dict, source: str) -> dict:
    """ComfyUI's configuration of the T5 encoder that a published config.json describes; `source` names it in errors.

    Raises:
        ValueError: fields are missing, or ask for something that ComfyUI's T5 does not do.
    """
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise ValueError(
            f"{source} lacks {', '.join(missing)}. Expected the configuration of a T5 encoder; restore the published "
            "file."
        )
    config_fields.T5.check(config, source)
    feed_forward = config.get("feed_forward_proj", "relu")
    found = {key: config.get(key, value) for key, value in FIXED.items()} | {"feed_forward_proj": feed_forward}
    foreign = {key: value for key, value in found.items() if FIXED.get(key, value) != value}
    if feed_forward not in FEED_FORWARDS:
        foreign["feed_forward_proj"] = feed_forward
    if foreign:
        values = ", ".join(f"{key} {value!r}" for key, value in foreign.items())
        raise ValueError(
            f"{source} has {values}, which ComfyUI's T5 cannot do. Expected an encoder of the T5 or T5 v1.1 release; "
            "restore the published file."
        )
    activation, gated = FEED_FORWARDS[feed_forward]
    sizes = {key: config[key] for key in REQUIRED}
    return {**sizes, "model_type": "t5", "dense_act_fn": activation, "is_gated_act": gated}


def published_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys with the embeddings once, under `shared` (some files repeat them, or keep them, inside the encoder)."""
    state = dict(state)
    tied = state.pop(TIED_EMBEDDINGS, None)
    if tied is not None:
        state.setdefault(EMBEDDINGS, tied)
    return state


def storage_dtype(file_dtype: torch.dtype) -> torch.dtype:
    """Type that weights of a file's type are kept in: what ComfyUI's command line names for text encoders.

    Without an option, float32 becomes ComfyUI's float16. A type that is larger than the file's would only take memory,
    since the computation is in float32 either way.
    """
    device = comfy.model_management.text_encoder_device()
    wanted = comfy.model_management.text_encoder_dtype(device)
    asked = args.fp16_text_enc or args.bf16_text_enc
    larger = wanted.itemsize > file_dtype.itemsize or (wanted.itemsize == file_dtype.itemsize and not asked)
    if larger or not comfy.model_management.supports_cast(device, wanted):
        return file_dtype
    return wanted


def t5_on_meta(config: dict) -> torch.nn.Module:
    """ComfyUI's T5 of plain layers, without memory for its weights."""
    return plain_network(lambda layers: comfy.text_encoders.t5.T5(config, torch.float32, None, layers))


def _model_class(config: dict, tokens: int, weight_dtype: torch.dtype) -> type:
    class TextModel(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}, **options):
            super().__init__(
                device=device,
                dtype=dtype,
                max_length=tokens,
                textmodel_json_config=dict(config),
                special_tokens={"end": END, "pad": PAD},
                model_class=comfy.text_encoders.t5.T5,
                model_options=model_options,
                **options,
            )

    class TextEncoder(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}, **options):
            super().__init__(
                device=device,
                dtype=weight_dtype,
                model_options=model_options,
                name=NAME,
                clip_model=TextModel,
                **options,
            )

    return TextEncoder


def tokenizer_class(folder: Path, config: dict, tokens: int) -> type:
    """ComfyUI's tokenizer over the vocabulary in `folder`, with prompts of exactly `tokens` tokens.

    Raises:
        ValueError: the vocabulary is damaged, or larger than the embeddings.
    """
    fast = folder / "tokenizer.json"
    path = folder if fast.is_file() or (folder / "spiece.model").is_file() else _comfyui_vocabulary()
    if fast.is_file():
        read_config(fast)
    rows = len(T5TokenizerFast.from_pretrained(str(path)).get_vocab())
    if rows > config["vocab_size"]:
        raise ValueError(
            f"{path} has a vocabulary of {rows}, but text_encoder/config.json has embeddings for "
            f"{config['vocab_size']}. Restore the published files."
        )

    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}, **options):
            super().__init__(
                tokenizer_path=str(path),
                max_length=tokens,
                pad_with_end=False,
                pad_token=PAD,
                embedding_directory=embedding_directory,
                embedding_size=config["d_model"],
                embedding_key=NAME,
                tokenizer_class=T5TokenizerFast,
                has_start_token=False,
                tokenizer_data=tokenizer_data,
                **options,
            )

        def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> list:
            chunks = super().tokenize_with_weights(text, return_word_ids, **kwargs)
            if len(chunks) > 1:
                logging.warning("The prompt is longer than %d tokens; what follows is not read.", tokens)
            return chunks[:1]

    class T5Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}, **options):
            super().__init__(
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data,
                clip_name=NAME,
                tokenizer=Tokenizer,
                **options,
            )

    return T5Tokenizer


def _comfyui_vocabulary() -> Path:
    return Path(comfy.text_encoders.t5.__file__).parent / "t5_tokenizer"
