"""Training of the motion predictor: two key frames -> the image embeddings of the frames between them.

The paper (Zhou et al. 2024, arXiv 2405.01434) trains it through a video network that learns at the same time, and
published no code. Here it learns the embeddings themselves, and, where `video_loss` is above 0, through a frozen
I2VGen-XL.
"""

from pathlib import Path

import comfy.clip_vision
import comfy.model_management
import torch
from torch.nn.functional import mse_loss

from ..loaders.checkpoint import load_folder_vision
from ..loaders.families import I2VGENXL
from ..loaders.folders import check_family
from ..loaders.motion_predictor import build_network, read_config, save_motion_predictor
from ..loaders.network import WEIGHT_DTYPES, load_network
from ..loaders.weights import read_weights
from ..models.i2vgenxl_picture import vision_pictures
from ..models.motion_predictor import MotionPredictor, linear_interpolation
from .clips import Sample
from .frozen_video import FrozenVideoLoss
from .settings import MotionPredictorSettings
from .sources import clip_dataset
from .task import Validation

FILE = "motion_predictor.safetensors"

# What FSDP may gather on its own.
SHARDED = ("PredictorBlock", "IPAdapterPlusImageProjectionBlock")


class MotionPredictorTask:
    """See `task.Task`.

    Args:
        settings: of the run.

    Raises:
        FileNotFoundError, ValueError: a folder or file is not usable, the motion predictor to go on from does not fit
            the vision tower, clips have a number of frames that it does not make, or no held-out clip can be used.
    """

    def __init__(self, settings: MotionPredictorSettings):
        if not settings.i2vgenxl.is_dir():
            raise FileNotFoundError(f"i2vgenxl: there is no folder {settings.i2vgenxl}. Name the folder of I2VGen-XL.")
        check_family(settings.i2vgenxl, I2VGENXL)
        self.settings = settings
        self.vision = load_folder_vision(settings.i2vgenxl, "default")
        self.network = open_network(settings, self.vision)
        present = {type(module).__name__ for module in self.network.modules()}
        self.network._no_split_modules = [name for name in SHARDED if name in present]
        self.config = self.network.config
        self.held_out = None
        if settings.held_out:
            self.held_out = clip_dataset(settings.held_out, settings.data, settings.seed, flip=0.0)
        self.video_loss = FrozenVideoLoss(settings) if settings.video_loss else None
        self.device = comfy.model_management.get_torch_device()

    def loss(self, network: torch.nn.Module, samples: list[Sample]) -> torch.Tensor:
        """Mean squared error of the embeddings of all frames, plus that of the frozen video network, as weighted."""
        embeddings, *tokens = self.embed(samples)
        predicted = network(embeddings[:, 0], embeddings[:, -1], *tokens, embeddings.shape[1])
        loss = self.settings.embedding_loss * mse_loss(predicted.float(), embeddings)
        if self.video_loss is not None:
            loss = loss + self.settings.video_loss * self.video_loss(samples, predicted.float())
        return loss

    @torch.no_grad()
    def embed(self, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the vision tower makes of clips, whose frames it sees as Transition Conditioning shows it pictures.

        Returns:
            Image embeddings of all frames (B, F, D); tokens of the first and of the last frame, each (B, S, W).
        """
        frames = torch.cat([sample.frames for sample in samples])
        pictures = vision_pictures(frames, self.settings.data.width, self.vision.image_size)
        encoded = self.vision.encode_image(pictures)
        embeddings, tokens = (
            encoded[name].unflatten(0, (len(samples), -1)) for name in ("image_embeds", "penultimate_hidden_states")
        )
        return tuple(part.to(self.device, torch.float32) for part in (embeddings, tokens[:, 0], tokens[:, -1]))

    def after_step(self, network: torch.nn.Module) -> None:
        """Nothing: the weights may have any value."""

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write a file that Load Motion Predictor loads."""
        dtype = WEIGHT_DTYPES[self.settings.save_dtype]
        save_motion_predictor({name: tensor.to(dtype) for name, tensor in weights.items()}, self.config, folder / FILE)

    @torch.no_grad()
    def validate(self, weights: dict[str, torch.Tensor], folder: Path) -> Validation:
        """Mean squared errors of the held-out clips' embeddings, of all frames but the first and the last.

        Returns:
            Numbers `error` (of the weights), `linear_error` (of linear interpolation) and `ratio` (of the two, left out
            where nothing moves in any clip); none without held-out clips.
        """
        if self.held_out is None:
            return Validation()
        network = _with_weights(self.config, dict(weights), "the trained network").to(self.device)
        errors = torch.zeros(2)
        for number in range(self.settings.held_out_clips):
            embeddings, *tokens = self.embed([self.held_out[number]])
            ends, frames = (embeddings[:, 0], embeddings[:, -1]), embeddings.shape[1]
            for index, guess in enumerate((network(*ends, *tokens, frames), linear_interpolation(*ends, frames))):
                errors[index] += mse_loss(guess[:, 1:-1], embeddings[:, 1:-1]).item()
        error, linear_error = (errors / self.settings.held_out_clips).tolist()
        ratio = {"ratio": error / linear_error} if linear_error else {}
        return Validation(numbers={"error": error, "linear_error": linear_error, **ratio})


def open_network(settings: MotionPredictorSettings, vision: comfy.clip_vision.ClipVisionModel) -> MotionPredictor:
    """The network that a run begins with, float32 in plain torch layers on the CPU: of a file, or new and seeded.

    Raises:
        FileNotFoundError, ValueError: see `MotionPredictorTask`.
    """
    widths = {"embedding_dim": vision.config["projection_dim"], "vision_dim": vision.config["hidden_size"]}
    if settings.pretrained is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = MotionPredictor(**widths, **settings.predictor.model_dump())
    else:
        network = _read_network(settings.pretrained, widths)
    longest, frames = network.config["max_frames"], settings.data.frames
    if not 3 <= frames <= longest:
        raise ValueError(
            f"data.frames is {frames}, but this motion predictor learns from clips of 3 to {longest} frames: the first "
            "and the last are given. Change data.frames, or predictor.max_frames of a new one."
        )
    return network


def _read_network(path: Path, widths: dict[str, int]) -> MotionPredictor:
    """The network of a file, for a vision tower of some widths."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} was not found. Give the motion predictor to go on from as pretrained.")
    config = read_config(path)
    network = _with_weights(config, read_weights([path]), str(path))
    found = {name: network.config[name] for name in widths}
    if found != widths:
        raise ValueError(
            f"{path} has {found}, but the vision tower needs {widths}. Choose a motion predictor that was trained with "
            "this tower."
        )
    return network.requires_grad_(True)


def _with_weights(config: dict, state: dict[str, torch.Tensor], source: str) -> MotionPredictor:
    """A network with copies of some weights; they do not require gradients."""
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    return load_network(build_network(config, source), copies, torch.float32, torch.nn, {}, source)
