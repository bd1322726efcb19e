"""What this pack makes of each field of a published configuration: it acts, changes nothing as is known, or is named.

A field that is neither used nor known to be harmless is logged with its value, so that nothing in a configuration is
ignored silently. Fields that begin with an underscore are notes of the library that wrote the file; None, False and
what is empty switch nothing on.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ..samplers import schedules

OFF = (None, False, "", [], {}, ())


@dataclass(frozen=True)
class Fields:
    """The fields of one kind of configuration.

    Args:
        title: what the configuration describes, for messages.
        used: fields that act.
        accepted: field -> the values with which it changes nothing. Another value is an error.
        harmless: fields that change nothing here, whatever they are.
        neutral: fields that are not read -> the value that changes nothing.
    """

    title: str
    used: Collection[str] = ()
    accepted: Mapping[str, Collection] = field(default_factory=dict)
    harmless: Collection[str] = ()
    neutral: Mapping[str, object] = field(default_factory=dict)

    def check(self, config: Mapping, source: object) -> None:
        """Log the fields of a configuration that have no effect and should have.

        Args:
            source: the file's path, or what else to call the configuration.

        Raises:
            ValueError: a field asks for something that cannot be done.
        """
        for name, values in self.accepted.items():
            if name in config and _plain(config[name]) not in [_plain(value) for value in values]:
                expected = " or ".join(repr(value) for value in values)
                raise ValueError(
                    f"{source} has {name} {config[name]!r}, which {self.title} cannot do here; expected {expected}. "
                    "Restore the published configuration."
                )
        known = {*self.used, *self.accepted, *self.harmless}
        unknown = {
            name: value
            for name, value in config.items()
            if name not in known and not name.startswith("_") and not self._changes_nothing(name, value)
        }
        if unknown:
            described = ", ".join(f"{name} {_short(value)}" for name, value in sorted(unknown.items()))
            logging.warning("%s: fields of %s without effect in this pack: %s.", source, self.title, described)

    def _changes_nothing(self, name: str, value: object) -> bool:
        if name in self.neutral and _plain(value) == _plain(self.neutral[name]):
            return True
        return any(value is off or (type(value) is type(off) and value == off) for off in OFF)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Fields that transformers writes into every configuration, now or in the past.
_TRANSFORMERS = frozenset(
    "add_cross_attention architectures attn_implementation bad_words_ids begin_suppress_tokens bos_token_id "
    "chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype "
    "early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id "
    "forced_eos_token_id gradient_checkpointing id2label is_decoder is_encoder_decoder label2id length_penalty "
    "max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences "
    "output_attentions output_hidden_states output_past output_scores pad_token_id prefix problem_type pruned_heads "
    "remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens "
    "task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k "
    "top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache".split()
)
# What only training reads.
_TRAINING = frozenset(("attention_dropout", "dropout", "dropout_rate", "initializer_factor", "initializer_range"))
# transformers' name -> ComfyUI's, of the activations that ComfyUI's CLIP has.
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
}

CLIP_TEXT = Fields(
    title="a CLIP text encoder",
    used=(
        *("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
        *("layer_norm_eps", "eos_token_id"),
    ),
    accepted={"hidden_act": tuple(ACTIVATIONS), "vocab_size": (49408,), "model_type": ("clip_text_model",)},
    harmless=_TRANSFORMERS | _TRAINING | {"projection_dim"},
)
CLIP_VISION = Fields(
    title="a CLIP vision tower",
    used=(
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "image_size", "patch_size"),
        *("projection_dim", "layer_norm_eps", "image_mean", "image_std"),
    ),
    accepted={"hidden_act": tuple(ACTIVATIONS), "num_channels": (3,), "model_type": ("clip_vision_model",)},
    harmless=_TRANSFORMERS | _TRAINING,
)
T5 = Fields(
    title="a T5 encoder",
    used=(
        *("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "feed_forward_proj"),
        *("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"),
    ),
    harmless=_TRANSFORMERS
    | _TRAINING
    | {
        *("classifier_dropout", "dense_act_fn", "eos_token_id", "is_gated_act", "n_positions", "num_decoder_layers"),
        "scale_decoder_outputs",
    },
)
# ComfyUI pads to the text encoder's positions, without regard to what the tokenizer says.
CLIP_TOKENIZER = Fields(
    title="a CLIP tokenizer",
    used=("pad_token",),
    harmless={
        *("add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "backend", "errors"),
        *("clean_up_tokenization_spaces", "do_lower_case", "extra_special_tokens", "is_local", "name_or_path"),
        *("processor_class", "special_tokens_map_file", "tokenizer_class", "tokenizer_file", "unk_token", "use_fast"),
        *("max_length", "stride", "truncation_side", "truncation_strategy", "local_files_only"),
    },
    neutral={"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "padding_side": "right"},
)
CLIP_PICTURES = Fields(
    title="the preparation of pictures for CLIP vision",
    used=("image_mean", "image_std"),
    harmless={
        *("feature_extractor_type", "image_processor_type", "processor_class", "do_convert_rgb", "data_format"),
        *("input_data_format", "device", "return_tensors", "offset"),
    },
    neutral={
        **dict.fromkeys(("do_resize", "do_center_crop", "do_normalize", "do_rescale"), True),
        "resample": 3,
        "rescale_factor": 1 / 255,
    },
)
IMAGE_VAE = Fields(
    title="an image VAE",
    used=(
        *("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "scaling_factor"),
        *("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
    ),
    accepted={
        "act_fn": ("silu", "swish"),
        "in_channels": (3,),
        "out_channels": (3,),
        "down_block_types": (["DownEncoderBlock2D"] * 4,),
        "up_block_types": (["UpDecoderBlock2D"] * 4,),
    },
    # ComfyUI chooses the type of the computation itself.
    harmless=("sample_size", "force_upcast"),
)
SCHEDULER = Fields(
    title="a noise schedule",
    used=(*schedules.DEFAULTS, *schedules.RESPACED_SIGMAS, "prediction_type", "snr_shift_scale"),
    # What belongs to the steps of a solver; here they are those of the sampler node.
    harmless=(
        *("algorithm_type", "solver_order", "solver_type", "lower_order_final", "euler_at_final", "variance_type"),
        *("final_sigmas_type", "skip_prk_steps", "predict_x0", "disable_corrector", "solver_p"),
        *("time_shift_type", "dynamic_thresholding"),
    ),
    neutral={"interpolation_type": "linear", "timestep_type": "discrete", "flow_shift": 1.0},
)
# Values at which what UNets of diffusers have, and a network here does not, changes nothing.
NETWORK_NEUTRAL = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
# Fields that networks of diffusers take and neither they nor their pipelines here read.
NETWORK_UNREAD = ("latents_mean", "latents_std", "shift_factor", "time_cond_proj_dim")
