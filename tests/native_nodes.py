"""ComfyUI's own nodes in front of every video model of this pack: what each does, as a table.

As a command: `python tests/native_nodes.py` writes the table to docs/native-nodes.md.
"""

import importlib
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from comfy_process import REPOSITORY, enter

enter()

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import tiny_consisid
import torch

import nodes
import tiny_checkpoints
from consistent_video.loaders import checkpoint
from consistent_video.loaders.families import CONSISID, CONSISTI2V, I2VGENXL, MODELSCOPE
from consistent_video.models import consisid_conditioning, consisti2v_conditioning, i2vgenxl_conditioning
from native_sampling import conditioning

PAGE = REPOSITORY / "docs" / "native-nodes.md"
FRAMES, SIDE = 3, 96
COLUMNS = ("ModelScope", "I2VGen-XL", "ConsistI2V", "ConsisID")
HEAD = """# ComfyUI's nodes with the four video models

What happens when a node of ComfyUI stands before the sampler. **works**: the clip changes as the node says.
**refused**: the run stops with a sentence, before its first step where the node can be seen by then. **says so**: the
run goes on, and a line in the log says what has no effect. **nothing to act on**: the network has no such layers. The
numbers lead to the sentences below.

Patches that know pictures see every frame as one, in the layers within a frame; layers over time are not handed to
them. Models of stories are ComfyUI's own and not in this table.

This page is written by `python3 scripts/update_native_nodes.py`, which runs every node with every model; a test runs
them again and compares.
"""


@dataclass(frozen=True)
class Loaded:
    """A tiny model of a family with what a run of it needs."""

    title: str
    model: object
    clip: object
    positive: list
    negative: list
    latent: dict
    other: list


@dataclass(frozen=True)
class Node:
    """A node, its settings, and how it comes into a run.

    Args:
        name: its id.
        module: in comfy_extras, or "nodes".
        settings: its inputs beside those that `apply` gives it.
        apply: (node, loaded) -> (model, positive prompt, negative prompt).
    """

    name: str
    module: str
    settings: dict = field(default_factory=dict)
    apply: Callable = None
    label: str | None = None
    steps: int = 1

    def call(self, **inputs) -> tuple:
        """The node's outputs."""
        module = nodes if self.module == "nodes" else importlib.import_module(f"comfy_extras.{self.module}")
        found = getattr(module, self.name)
        if hasattr(found, "GET_SCHEMA"):
            outputs = found.execute(**inputs, **self.settings)
        else:
            outputs = getattr(found(), found.FUNCTION)(**inputs, **self.settings)
        return outputs.result if hasattr(outputs, "result") else outputs


def _on_model(node: Node, loaded: Loaded):
    return node.call(model=loaded.model)[0], loaded.positive, loaded.negative


def _on_prompt(node: Node, loaded: Loaded):
    return loaded.model, node.call(conditioning=loaded.positive)[0], loaded.negative


def _beside_prompt(node: Node, loaded: Loaded):
    return loaded.model, loaded.positive + node.call(conditioning=loaded.other)[0], loaded.negative


def _perp_neg(node: Node, loaded: Loaded):
    return node.call(model=loaded.model, empty_conditioning=loaded.other)[0], loaded.positive, loaded.negative


def _mask(node: Node, loaded: Loaded):
    mask = torch.zeros(1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    return loaded.model, loaded.positive + node.call(conditioning=loaded.other, mask=mask)[0], loaded.negative


def _control(node: Node, loaded: Loaded):
    prompts = {"positive": loaded.positive, "negative": loaded.negative}
    picture = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(3))
    return loaded.model, *node.call(**prompts, control_net=tiny_control(), image=picture)


def _hypernetwork(node: Node, loaded: Loaded):
    module = importlib.import_module("comfy_extras.nodes_hypernetwork")
    model = loaded.model.clone()
    layers = [{"linear.0.weight": torch.eye(64) * 0.5, "linear.0.bias": torch.zeros(64)}] * 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.pt"
        torch.save({64: layers}, path)
        patch = module.load_hypernetwork_patch(str(path), 1.0)
    model.set_model_attn1_patch(patch)
    model.set_model_attn2_patch(patch)
    return model, loaded.positive, loaded.negative


@lru_cache
def tiny_control(context: int = 64, width: int = 64) -> comfy.controlnet.ControlNet:
    """A ControlNet of Stable Diffusion's kind with random weights, as wide as the tiny UNets."""
    generator = torch.Generator().manual_seed(1)
    network = comfy.cldm.cldm.ControlNet(
        image_size=32,
        in_channels=4,
        model_channels=width,
        hint_channels=3,
        num_res_blocks=[1, 1, 1, 1],
        channel_mult=(1, 1, 2, 2),
        transformer_depth=[1, 1, 1, 0],
        transformer_depth_middle=1,
        use_spatial_transformer=True,
        use_linear_in_transformer=True,
        context_dim=context,
        num_head_channels=64,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return comfy.controlnet.ControlNet(network.eval(), load_device=torch.device("cpu"))


DOWNSCALE = dict(
    block_number=2,
    downscale_factor=2.0,
    start_percent=0.0,
    end_percent=1.0,
    downscale_after_skip=True,
    downscale_method="bicubic",
    upscale_method="bicubic",
)
LAYERS = dict(double_layers="1", single_layers="", start_percent=0.0, end_percent=1.0)
WINDOWS = dict(
    context_length=2,
    context_overlap=1,
    context_schedule="standard_static",
    context_stride=1,
    closed_loop=False,
    fuse_method="pyramid",
    dim=2,
    freenoise=False,
    causal_window_fix=False,
)
CACHE = dict(reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
FREE_U = dict(b1=1.3, b2=1.4, s1=0.5, s2=0.2)
HALF = dict(width=SIDE // 2, height=SIDE, x=0, y=0, strength=1.0)
SHARES = dict(width=0.5, height=1.0, x=0.0, y=0.0, strength=1.0)
IN_TIME = dict(width=1.0, height=1.0, temporal=0.4, x=0.0, y=0.0, z=0.6, strength=1.0)
MULTIPLY = dict(q=1.5, k=1.0, v=1.2, out=1.0)
EDM = dict(sigma_max=120.0, sigma_min=0.002)
CONTROL = dict(strength=1.0, start_percent=0.0, end_percent=1.0)

PATCHES = (
    Node("FreeU", "nodes_freelunch", FREE_U),
    Node("FreeU_V2", "nodes_freelunch", FREE_U),
    Node("PerturbedAttentionGuidance", "nodes_pag", dict(scale=3.0)),
    Node("SelfAttentionGuidance", "nodes_sag", dict(scale=0.5, blur_sigma=2.0)),
    Node("NAGuidance", "nodes_nag", dict(nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)),
    Node("SkipLayerGuidanceDiT", "nodes_slg", LAYERS | dict(scale=3.0, rescaling_scale=0.0)),
    Node("SkipLayerGuidanceDiTSimple", "nodes_slg", LAYERS),
    Node("HyperTile", "nodes_hypertile", dict(tile_size=32, swap_size=2, max_depth=1, scale_depth=False)),
    Node("TomePatchModel", "nodes_tomesd", dict(ratio=0.5)),
    Node("PatchModelAddDownscale", "nodes_model_downscale", DOWNSCALE),
    Node("HypernetworkLoader", "nodes_hypernetwork", apply=_hypernetwork),
    Node("UNetSelfAttentionMultiply", "nodes_attention_multiply", MULTIPLY),
    Node("UNetCrossAttentionMultiply", "nodes_attention_multiply", MULTIPLY),
    Node(
        "UNetTemporalAttentionMultiply",
        "nodes_attention_multiply",
        dict(self_structural=1.0, self_temporal=1.5, cross_structural=1.0, cross_temporal=1.5),
    ),
    Node("ScaleROPE", "nodes_rope", dict(scale_x=2.0, shift_x=0.0, scale_y=2.0, shift_y=0.0, scale_t=1.0, shift_t=0.0)),
    Node("EasyCacheNode", "nodes_easycache", CACHE, label="EasyCache", steps=4),
    Node("LazyCacheNode", "nodes_easycache", CACHE, label="LazyCache", steps=4),
    Node("ContextWindowsManualNode", "nodes_context_windows", WINDOWS, label="ContextWindowsManual (frames)"),
    Node(
        "ContextWindowsManualNode",
        "nodes_context_windows",
        WINDOWS | dict(dim=4, context_length=8),
        label="ContextWindowsManual (width)",
    ),
)
GUIDANCE = (
    Node("RescaleCFG", "nodes_model_advanced", dict(multiplier=0.7)),
    Node("RenormCFG", "nodes_lumina2", dict(cfg_trunc=100.0, renorm_cfg=1.0)),
    Node("CFGNorm", "nodes_cfg", dict(strength=1.0)),
    Node("CFGZeroStar", "nodes_cfg"),
    Node("APG", "nodes_apg", dict(eta=1.0, norm_threshold=5.0, momentum=0.0)),
    Node("TCFG", "nodes_tcfg"),
    Node("FreSca", "nodes_fresca", dict(scale_low=1.0, scale_high=1.25, freq_cutoff=2)),
    Node("Mahiro", "nodes_mahiro"),
    Node("EpsilonScaling", "nodes_eps", dict(scaling_factor=1.01)),
    Node("TemporalScoreRescaling", "nodes_eps", dict(tsr_k=0.9, tsr_sigma=1.0), steps=4),
    Node("VideoLinearCFGGuidance", "nodes_video_model", dict(min_cfg=1.0)),
    Node("VideoTriangleCFGGuidance", "nodes_video_model", dict(min_cfg=1.0)),
    Node("PerpNeg", "nodes_perpneg", dict(neg_scale=1.0), _perp_neg),
)
SAMPLING = (
    Node("ModelSamplingDiscrete", "nodes_model_advanced", dict(sampling="lcm", zsnr=False), label="... (lcm)"),
    Node("ModelSamplingDiscrete", "nodes_model_advanced", dict(sampling="x0", zsnr=False), label="... (x0)"),
    Node("ModelSamplingDiscrete", "nodes_model_advanced", dict(sampling="img_to_img", zsnr=False), label="... (img)"),
    Node("ModelSamplingContinuousEDM", "nodes_model_advanced", dict(sampling="v_prediction") | EDM),
    Node("ModelSamplingContinuousV", "nodes_model_advanced", dict(sampling="v_prediction") | EDM),
    Node("ModelSamplingSD3", "nodes_model_advanced", dict(shift=3.0)),
    Node("ModelSamplingAuraFlow", "nodes_model_advanced", dict(shift=1.73)),
    Node("ModelSamplingFlux", "nodes_model_advanced", dict(max_shift=1.15, base_shift=0.5, width=SIDE, height=SIDE)),
    Node("ModelSamplingStableCascade", "nodes_model_advanced", dict(shift=2.0)),
)
PROMPTS = (
    Node("ConditioningSetArea", "nodes", HALF, _beside_prompt),
    Node("ConditioningSetAreaPercentage", "nodes", SHARES, _beside_prompt),
    Node("ConditioningSetAreaPercentageVideo", "nodes_video_model", IN_TIME, _beside_prompt),
    Node("ConditioningSetMask", "nodes", dict(set_cond_area="default", strength=1.0), _mask),
    Node(
        "ConditioningSetMask",
        "nodes",
        dict(set_cond_area="mask bounds", strength=1.0),
        _mask,
        "ConditioningSetMask (mask bounds)",
    ),
    Node("ConditioningSetTimestepRange", "nodes", dict(start=0.0, end=0.5), _beside_prompt),
    Node("ConditioningZeroOut", "nodes", {}, _on_prompt),
    Node("ControlNetApplyAdvanced", "nodes", CONTROL, _control, "ControlNetApplyAdvanced (Stable Diffusion 2.1)"),
    Node("FluxGuidance", "nodes_flux", dict(guidance=3.5), _on_prompt),
)
SECTIONS = {
    "Patches of the model": PATCHES,
    "Guidance": GUIDANCE,
    "Sampling spaces": SAMPLING,
    "Prompts": PROMPTS,
}


def load(models: Path) -> list[Loaded]:
    """The four families with a prompt, a picture or a face, and an empty clip."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, SIDE, SIDE, 3, generator=generator)
    found = []
    folders = models / "diffusers"
    for family, name in (
        (MODELSCOPE, tiny_checkpoints.MODELSCOPE_NAME),
        (I2VGENXL, tiny_checkpoints.I2VGENXL_NAME),
        (CONSISTI2V, tiny_checkpoints.CONSISTI2V_NAME),
        (CONSISID, tiny_consisid.CONSISID_NAME),
    ):
        model, clip, vae = checkpoint.load_folder(family, folders / name, "default")
        texts = [conditioning(clip, text) for text in ("a cat", "a dog in the rain", "blur")]
        shape = [1, model.model.latent_format.latent_channels, FRAMES, SIDE // 8, SIDE // 8]
        if family is I2VGENXL:
            vision = checkpoint.load_folder_vision(folders / name, "default")

            def prepare(prompt, negative, vae=vae, vision=vision):
                return i2vgenxl_conditioning.condition_prompts(prompt, negative, vae, vision, picture, SIDE, SIDE, 8.0)
        elif family is CONSISTI2V:
            video = consisti2v_conditioning.static_video_of_picture(vae, picture, "none", FRAMES, SIDE, SIDE)

            def prepare(prompt, negative, video=video):
                return consisti2v_conditioning.condition_prompts(prompt, negative, video, 3)
        elif family is CONSISID:
            config = model.model.diffusion_model.config
            identity = torch.randn(1, config.LFE_id_dim, generator=generator)
            vision = [torch.randn(1, 17, config.LFE_vit_dim, generator=generator) for _ in range(config.LFE_num_scale)]

            def prepare(prompt, negative, vae=vae, face=(picture, picture, identity, vision)):
                return consisid_conditioning.condition_prompts(prompt, negative, vae, *face, SIDE, SIDE)
        else:

            def prepare(prompt, negative):
                return prompt, negative

        (positive, negative), (other, _) = prepare(texts[0], texts[2]), prepare(texts[1], texts[2])
        found.append(Loaded(family.title, model, clip, positive, negative, {"samples": torch.zeros(shape)}, other))
    return found


def draw(loaded: Loaded, steps: int, model, positive: list, negative: list) -> torch.Tensor:
    """A clip as KSampler makes it."""
    torch.manual_seed(0)
    return nodes.common_ksampler(model, 1, steps, 4.0, "euler", "simple", positive, negative, loaded.latent, 1.0)[0][
        "samples"
    ]


class _Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def outcome(node: Node, loaded: Loaded, plain: torch.Tensor) -> tuple[str, str]:
    """What a node does: a word, and the sentence that goes with it; `plain` is the clip without it."""
    heard = _Warnings()
    logging.getLogger().addHandler(heard)
    try:
        clip = draw(loaded, node.steps, *(node.apply or _on_model)(node, loaded))
    except ValueError as error:
        return "refused", str(error)
    finally:
        logging.getLogger().removeHandler(heard)
    said = " ".join(dict.fromkeys(heard.lines))
    assert clip.isfinite().all(), f"{node.name} with {loaded.title} gives a clip that is not finite"
    if torch.equal(clip, plain):
        return ("says so", said) if said else ("nothing to act on", "")
    return "works", said


def page(models: Path) -> str:
    """The table of every node with every family."""
    families = load(models)

    @lru_cache
    def plain(number: int, steps: int) -> torch.Tensor:
        loaded = families[number]
        return draw(loaded, steps, loaded.model, loaded.positive, loaded.negative)

    sentences: dict[str, int] = {}
    lines = [HEAD]
    for section, listed in SECTIONS.items():
        lines += [f"## {section}", "", f"| Node | {' | '.join(COLUMNS)} |", "|---" * 5 + "|"]
        for node in listed:
            cells = []
            for number, loaded in enumerate(families):
                word, sentence = outcome(node, loaded, plain(number, node.steps))
                sentence = sentence.replace(loaded.title, "the model")
                sentence = re.sub(rf"(^|(?<=\. )){node.name}\b", "The node", sentence)
                note = sentences.setdefault(sentence, len(sentences) + 1) if sentence else None
                cells.append(f"{word} ({note})" if note else word)
            label = (node.label or node.name).replace("...", node.name)
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## The sentences", ""]
    lines += [f"{number}. {sentence}" for sentence, number in sentences.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        tiny_checkpoints.build_all(Path(folder))
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(Path(folder)), encoding="utf-8")
