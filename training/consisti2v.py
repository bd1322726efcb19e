"""Training of ConsistI2V (Ren et al. 2024, arXiv 2402.04324): predict the noise of the frames after the first.

What is random about a sample follows from its number. The draws and their order are our own; their distributions are
those of TIGER-AI-Lab/ConsistI2V, train.py.
"""

import random
from pathlib import Path

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.functional import mse_loss

from ..loaders.families import CONSISTI2V
from ..models.consisti2v_attention import RotaryEmbedding
from ..models.consisti2v_layers import SpatialTransformer, TemporalResnet, TemporalTransformer
from .clip_encoder import ClipEncoder
from .clips import Sample
from .consisti2v_folder import open_base
from .consisti2v_validation import draw_clips, read_picture
from .noising import Noising
from .randomness import seed_of
from .settings import ConsistI2VSettings
from .task import Validation

# Computed again in the backward pass when activations are not kept.
CHECKPOINTED = (ResnetBlock2D, TemporalResnet, SpatialTransformer, TemporalTransformer)

# What FSDP may gather on its own. The attentions to the text are not among them: their keys and values are computed
# before the first layer runs.
SHARDED = ("ResnetBlock2D", "TemporalResnet", "FirstFrameAttention", "TemporalAttention", "ChunkedFeedForward")


class ConsistI2VTask:
    """See `task.Task`.

    Args:
        settings: of the run.

    Raises:
        FileNotFoundError, ValueError: the folder to begin with is not usable, or a name part to train is in no name.
    """

    def __init__(self, settings: ConsistI2VSettings):
        _check_apart(settings.pretrained, settings.output)
        self.pictures = [read_picture(wanted.first_frame) for wanted in settings.validation.clips]
        self.settings, self.base = settings, open_base(settings.pretrained, settings.data.frames, settings.seed)
        self.network = self.base.network
        self.network._no_split_modules = list(SHARDED)
        keep_angles(self.network)
        choose_trainable(self.network, settings.trainable_modules)
        if settings.gradient_checkpointing:
            apply_activation_checkpointing(self.network, check_fn=lambda module: isinstance(module, CHECKPOINTED))
        self.encoder = ClipEncoder(CONSISTI2V, settings.pretrained, settings.seed)
        self.noising = Noising(self.base.scheduler, settings.seed, settings.noise.mode, settings.noise.alpha)

    def loss(self, network: torch.nn.Module, samples: list[Sample]) -> torch.Tensor:
        """Mean squared error of the noise, or of v where the schedule says so, of frames 2..F."""
        latents = torch.cat([self.encoder.latents(sample) for sample in samples])
        text = torch.cat([self.encoder.text(self._caption(sample)) for sample in samples])
        noisy, timesteps, target = self.noising.noised(samples, latents)
        first = [
            (mixed if self._drops(sample, "first frame", self.settings.drop_first_frame) else clean)[:, :1]
            for sample, clean, mixed in zip(samples, latents, noisy)
        ]
        strides = torch.tensor([float(sample.stride) for sample in samples], device=latents.device)
        predicted = network(noisy, timesteps, text, first_frame_latents=torch.stack(first), frame_stride=strides)
        return mse_loss(predicted[:, :, 1:].float(), target[:, :, 1:])

    def _caption(self, sample: Sample) -> str:
        return "" if self._drops(sample, "text", self.settings.drop_text) else sample.text

    def _drops(self, sample: Sample, what: str, share: float) -> bool:
        return random.Random(seed_of(self.settings.seed, sample.number, f"drop {what}")).random() < share

    def after_step(self, network: torch.nn.Module) -> None:
        """Keep the shares of the layers over time in 0..1, where they have a gradient to come back by."""
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith(".alpha") and parameter.requires_grad:
                    parameter.clamp_(0, 1)

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write a folder that Load ConsistI2V loads."""
        self.base.save(folder, weights, self.settings.save_dtype)

    def validate(self, weights: dict[str, torch.Tensor], folder: Path) -> Validation:
        """Draw the clips of the settings."""
        patcher = self.base.assemble(weights)
        return Validation(pictures=draw_clips(patcher, self.encoder, self.settings, self.pictures, folder))


def keep_angles(network: torch.nn.Module) -> None:
    """Make the frequencies of the rotary embeddings buffers: they are computed, not learned, and FSDP would round them
    to the type of the computation."""
    for module in network.modules():
        if isinstance(module, RotaryEmbedding):
            frequencies = module.freqs.data
            del module.freqs
            module.register_buffer("freqs", frequencies)


def choose_trainable(network: torch.nn.Module, parts: list[str]) -> None:
    """Let the parameters whose names have one of the parts require gradients, all of them for "all".

    Raises:
        ValueError: a part that is in no name.
    """
    names = [name for name, _ in network.named_parameters()]
    for part in parts:
        if part != "all" and not any(part in name for name in names):
            raise ValueError(
                f"trainable_modules: {part!r} is in no parameter's name. Use all, or parts such as conv3ds. and "
                f"tempo_attns.; a whole name is {names[0]}."
            )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(part == "all" or part in name for part in parts))


def _check_apart(pretrained: Path, output: Path) -> None:
    checkpoints = (output / "checkpoints").resolve()
    if pretrained.resolve().is_relative_to(checkpoints):
        raise ValueError(
            f"pretrained is {pretrained}, in the folder whose old checkpoints this run deletes. Move it elsewhere, or "
            "leave pretrained as it was: a run continues from its newest checkpoint by itself."
        )
