"""CLIP text encoders of diffusers folders as ComfyUI's CLIP, built from the folder's own configuration."""

import logging
from dataclasses import dataclass
from pathlib import Path

import comfy.clip_model
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import folder_paths
import torch

from .config_fields import ACTIVATIONS, CLIP_TEXT, CLIP_TOKENIZER
from .folders import read_config, read_config_or
from .linked_folders import without_marks
from .network import plain_network, require_fit
from .weights import find_weights, read_weights, transformers_stem

PREFIX, PROJECTION = "text_model.", "text_projection.weight"
REQUIRED = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")
DEFAULTS = {"hidden_act": "quick_gelu", "eos_token_id": 49407}
VOCABULARY = ("vocab.json", "merges.txt")
END_TOKEN = "<|endoftext|>"


class _Target:
    """What `comfy.sd.CLIP` builds."""

    def __init__(self, clip, tokenizer):
        self.clip = clip
        self.tokenizer = tokenizer
        self.params = {}


def load_text_encoder(
    folder: Path,
    layer: str = "last",
    prefer_half: bool = False,
    disable_dynamic: bool = False,
    published_pad: str = END_TOKEN,
) -> comfy.sd.CLIP:
    """Load `<folder>/text_encoder` and `<folder>/tokenizer`.

    Args:
        folder: the checkpoint folder.
        layer: "last" for the final hidden state, "penultimate" for the one before it; the final layer norm follows
            both.
        prefer_half: take the `.fp16` variant when both precisions are present.
        disable_dynamic: as of `comfy.sd.CLIP`.
        published_pad: padding token for a folder whose tokenizer is missing or does not say.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit the configuration.
    """
    config = _text_config(folder / "text_encoder" / "config.json")
    tokenizer = folder / "tokenizer"
    vocabulary = _vocabulary(tokenizer, config["max_position_embeddings"], published_pad)
    files = find_weights(folder / "text_encoder", transformers_stem(folder / "text_encoder"), prefer_half)
    state = _published_keys(read_weights(files))
    # A file without projection pools without it, as transformers does.
    state.setdefault(PROJECTION, torch.eye(config["hidden_size"]).to(comfy.utils.weight_dtype(state)))
    require_fit(state, text_model_on_meta(config), files, folder / "text_encoder" / "config.json")
    with without_marks(tokenizer) as readable:
        words = _tokenizer_class(readable if vocabulary.complete else None, vocabulary.pad_token, config)
        clip = comfy.sd.CLIP(
            _Target(_model_class(config, layer, vocabulary.pad_token), words),
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            parameters=sum(tensor.numel() for tensor in state.values()),
            disable_dynamic=disable_dynamic,
        )
    set_norm_eps(clip.cond_stage_model, config)
    clip.load_sd(state)
    return clip


def load_text_encoder_patcher(
    folder: Path, layer: str, prefer_half: bool, disable_dynamic: bool = False, published_pad: str = END_TOKEN
):
    """Load the text encoder again for ComfyUI's own use (other devices, other memory modes); returns its patcher."""
    return load_text_encoder(folder, layer, prefer_half, disable_dynamic, published_pad).patcher


def set_norm_eps(model: torch.nn.Module, config: dict) -> None:
    """Give the norms of one of ComfyUI's CLIP models the `layer_norm_eps` of a configuration."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = config.get("layer_norm_eps", module.eps)


def _text_config(path: Path) -> dict:
    config = {**DEFAULTS, **read_config(path)}
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}. Expected the configuration of a CLIP text model; restore the "
            "published file."
        )
    CLIP_TEXT.check(config, path)
    return config | {"hidden_act": ACTIVATIONS[config["hidden_act"]]}


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer folder: whether its vocabulary is there, and the padding token, None to pad with the end token."""

    complete: bool
    pad_token: int | None


def _vocabulary(folder: Path, positions: int, published_pad: str) -> _Vocabulary:
    """Read a tokenizer folder; what it does not say is as published.

    Args:
        folder: may be missing.
        positions: of the text encoder.
        published_pad: the padding token that the family is published with.

    Raises:
        ValueError: the padding token is not in the vocabulary.
    """
    config_file = folder / "tokenizer_config.json"
    config = {**read_config_or(folder / "special_tokens_map.json", {}), **read_config_or(config_file, {})}
    config = {key: value.get("content") if _is_token(value) else value for key, value in config.items()}
    length = config.pop("model_max_length", positions)
    CLIP_TOKENIZER.check(config, config_file)
    if isinstance(length, int) and length < positions:
        logging.warning(
            "%s: model_max_length %d has no effect: ComfyUI pads prompts to the text encoder's %d positions.",
            config_file,
            length,
            positions,
        )
    complete = all((folder / name).is_file() for name in VOCABULARY)
    if not complete or "pad_token" not in config:
        logging.warning(
            "%s has no %s: prompts are %spadded with %r, as published.",
            folder,
            "tokenizer_config.json with a pad_token" if complete else " and ".join(VOCABULARY),
            "" if complete else "read with ComfyUI's own CLIP vocabulary and ",
            config.get("pad_token", published_pad),
        )
    token = config.get("pad_token") or published_pad
    vocabulary = read_config(folder / "vocab.json") if complete else {"!": 0}
    if token not in vocabulary and token != END_TOKEN:
        raise ValueError(
            f"{config_file} names the padding token {token!r}, which vocab.json does not hold. Restore both published "
            "files."
        )
    return _Vocabulary(complete, None if token == END_TOKEN else vocabulary[token])


def _is_token(value: object) -> bool:
    return isinstance(value, dict) and "content" in value


def _published_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys with the published prefix (transformers 5 may save them without it); position ids are no weights."""
    keys = {key: key if key.startswith((PREFIX, "text_projection.")) else PREFIX + key for key in state}
    return {keys[key]: value for key, value in state.items() if not key.endswith("position_ids")}


def text_model_on_meta(config: dict) -> torch.nn.Module:
    """ComfyUI's CLIP text model of plain layers, without memory for its weights."""
    return plain_network(lambda layers: comfy.clip_model.CLIPTextModel(config, torch.float32, None, layers))


def _model_class(config: dict, layer: str, pad_token: int | None) -> type:
    end = 49407
    layers = {"last": ("last", None), "penultimate": ("hidden", -2)}

    class TextModel(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}, **options):
            super().__init__(
                device=device,
                dtype=dtype,
                max_length=config["max_position_embeddings"],
                layer=layers[layer][0],
                layer_idx=layers[layer][1],
                textmodel_json_config=config,
                special_tokens={"start": 49406, "end": end, "pad": end if pad_token is None else pad_token},
                layer_norm_hidden_state=True,
                model_options=model_options,
                **options,
            )

    class TextEncoder(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}, **options):
            super().__init__(
                device=device, dtype=dtype, model_options=model_options, clip_name="h", clip_model=TextModel, **options
            )

    return TextEncoder


def _tokenizer_class(folder: Path | None, pad_token: int | None, config: dict) -> type:
    path = None if folder is None else str(folder)

    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}, **options):
            super().__init__(
                tokenizer_path=path,
                max_length=config["max_position_embeddings"],
                pad_with_end=pad_token is None,
                pad_token=pad_token,
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
                embedding_key="clip_h",
                tokenizer_data=tokenizer_data,
                **options,
            )

    class ClipTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}, **options):
            super().__init__(
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data,
                clip_name="h",
                tokenizer=Tokenizer,
                **options,
            )

    return ClipTokenizer
