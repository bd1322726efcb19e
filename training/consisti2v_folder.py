"""The folder that a ConsistI2V training begins with, and the ones that it writes."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import comfy.model_patcher
import comfy.utils
import torch

from ..loaders.assembly import assemble, build_network
from ..loaders.families import CONSISTI2V
from ..loaders.folders import read_config, read_config_or
from ..loaders.network import WEIGHT_DTYPES, build_on_meta, compare
from ..loaders.vae import scaling_factor
from ..loaders.weights import find_weights, read_weights
from ..models.consisti2v_unet import ConsistI2VUNet
from ..models.latent_format import FrameLatentFormat
from .checkpoints import link_or_copy

IMAGE_NETWORK = "UNet2DConditionModel"

# Fields of a Stable Diffusion 2.x network that ConsistI2V's has too.
IMAGE_FIELDS = ("sample_size", "block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim")

# What ConsistI2V adds to Stable Diffusion's layers.
ADDED = re.compile(r"(^|\.)(conv3ds|tempo_attns)\.|^frame_stride_embedding\.")

# What is the same in every checkpoint of a run. (Without a tokenizer's folder ComfyUI's own is used.)
FROZEN = ("vae", "text_encoder", "tokenizer")
STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class BaseFolder:
    """What a run begins with.

    Args:
        folder: of a ConsistI2V or Stable Diffusion 2.1-base checkpoint.
        config: of the network, content of unet/config.json.
        scheduler: diffusers scheduler configuration.
        scale: of the latents.
        network: float32, on the CPU.
        dead: parameters of the published file that the network does not read, kept for the checkpoints.
        frozen: sub-folders that every checkpoint has, too.
    """

    folder: Path
    config: dict
    scheduler: dict
    scale: float
    network: ConsistI2VUNet
    dead: dict[str, torch.Tensor]
    frozen: tuple[str, ...]

    def save(self, folder: Path, weights: dict[str, torch.Tensor], dtype: str) -> None:
        """Write a folder in the published layout.

        Args:
            folder: exists.
            weights: of the network.
            dtype: of the file, a key of `WEIGHT_DTYPES`.
        """
        (folder / "unet").mkdir()
        state = {key: tensor.to(WEIGHT_DTYPES[dtype]).contiguous() for key, tensor in (self.dead | weights).items()}
        comfy.utils.save_torch_file(state, str(folder / "unet" / f"{STEM}.safetensors"), metadata={"format": "pt"})
        _write(folder / "unet" / "config.json", self.config)
        (folder / "scheduler").mkdir()
        _write(folder / "scheduler" / "scheduler_config.json", self.scheduler)
        _write(folder / "model_index.json", {"_class_name": "ConditionalAnimationPipeline"})
        for name in self.frozen:
            link_or_copy(self.folder / name, folder / name)

    def assemble(self, weights: dict[str, torch.Tensor]) -> comfy.model_patcher.ModelPatcher:
        """Weights of the network as the MODEL that Load ConsistI2V makes of them."""
        network = build_on_meta(CONSISTI2V.network, self.config, "the trained network")
        latent_format, source = FrameLatentFormat(self.scale), "the trained network"
        return assemble(CONSISTI2V, network, dict(weights), "default", self.scheduler, latent_format, source)


def open_base(folder: Path, frames: int, seed: int) -> BaseFolder:
    """Read the folder that a run begins with.

    Args:
        folder: ConsistI2V, or Stable Diffusion 2.1-base as diffusers keeps it, whose layers over time are then new:
            without effect, as in TIGER-AI-Lab/ConsistI2V (`alpha` 1, no stride embedding), otherwise seeded.
        frames: of the clips, for the configuration of what is saved.
        seed: of new layers.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the network is another one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"pretrained: there is no folder {folder}. Name one of ConsistI2V or Stable Diffusion.")
    config = read_config(folder / "unet" / "config.json")
    kind = config.get("_class_name")
    if kind not in (CONSISTI2V.network_class, IMAGE_NETWORK):
        raise ValueError(
            f"{folder / 'unet' / 'config.json'} describes a {kind}, expected a {CONSISTI2V.network_class} (ConsistI2V) "
            f"or a {IMAGE_NETWORK} (Stable Diffusion 2.1-base). Choose such a folder as pretrained."
        )
    state = {key: tensor.float() for key, tensor in read_weights(find_weights(folder / "unet", STEM)).items()}
    if kind == IMAGE_NETWORK:
        config, scheduler, dead = _video_config(config), CONSISTI2V.scheduler, {}
        network = _from_image_network(config, state, folder / "unet", seed)
    else:
        scheduler = read_config_or(folder / "scheduler" / "scheduler_config.json", CONSISTI2V.scheduler)
        network, dead = _from_video_network(state, folder / "unet")
    config = {**config, "n_frames": frames}
    frozen = tuple(name for name in FROZEN if (folder / name).is_dir())
    return BaseFolder(folder, config, scheduler, scaling_factor(folder), network, dead, frozen)


def _from_video_network(state: dict, component: Path) -> tuple[ConsistI2VUNet, dict[str, torch.Tensor]]:
    """The network of a ConsistI2V folder, and what its file holds beside the network's weights."""
    network = build_network(CONSISTI2V, component)
    live = CONSISTI2V.parts.prepare(state)
    difference = compare(live, network)
    if difference:
        raise ValueError(f"{component} does not fit its config.json: {difference.summary()}. Download it again.")
    network.load_state_dict(live, assign=True)
    return network, {key: tensor for key, tensor in state.items() if key not in live}


def _video_config(image_config: dict) -> dict:
    fields = {key: image_config[key] for key in IMAGE_FIELDS if key in image_config}
    return {"_class_name": CONSISTI2V.network_class, **fields}


def _from_image_network(config: dict, state: dict, component: Path, seed: int) -> ConsistI2VUNet:
    """A network with the weights of Stable Diffusion and new layers over time."""
    difference = compare(state, build_on_meta(CONSISTI2V.network, config, str(component / "config.json")))
    foreign = [key for key in difference.missing if not ADDED.search(key)]
    if foreign or difference.unexpected or difference.misshapen:
        raise ValueError(
            f"{component} is not Stable Diffusion 2.1-base: {difference.summary()}. ConsistI2V continues its weights; "
            "choose that folder, or one of ConsistI2V."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ConsistI2VUNet(**{key: value for key, value in config.items() if key != "_class_name"})
    for parameter in network.frame_stride_embedding.linear_2.parameters():
        torch.nn.init.zeros_(parameter)
    network.load_state_dict(state, strict=False)
    return network


def _write(path: Path, config: dict) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
