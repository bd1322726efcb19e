"""What a frozen I2VGen-XL thinks of image embeddings: how well it predicts clips when they are its picture context."""

from pathlib import Path

import comfy.model_management
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.functional import mse_loss

from ..loaders.assembly import build_network
from ..loaders.families import I2VGENXL
from ..loaders.folders import check_family, read_config_or
from ..loaders.network import WEIGHT_DTYPES, load_network
from ..loaders.weights import find_weights, read_weights
from ..models.i2vgenxl import image_latents
from ..models.i2vgenxl_unet import I2VGenXLUNet
from ..models.temporal import TemporalConv, TemporalTransformer
from ..models.transformer import SpatialTransformer
from .clip_encoder import ClipEncoder
from .clips import Sample
from .noising import Noising
from .settings import MotionPredictorSettings

# Computed again in the backward pass, so that their activations need not be kept.
CHECKPOINTED = (ResnetBlock2D, TemporalConv, SpatialTransformer, TemporalTransformer)


class FrozenVideoLoss:
    """The loss that I2VGen-XL was trained with, as a function of the frames' image embeddings.

    The rest of its conditioning is as in the graph: the caption, the frame rate, and the latent of the first frame.

    Args:
        settings: of the run; its folder holds the network, the text encoder and the VAE.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, of another family, or the network predicts something
            else than noise or v.
    """

    def __init__(self, settings: MotionPredictorSettings):
        folder, self.settings = settings.i2vgenxl, settings
        self.dtype = WEIGHT_DTYPES[settings.mixed_precision]
        self.device = comfy.model_management.get_torch_device()
        scheduler = read_config_or(folder / "scheduler" / "scheduler_config.json", I2VGENXL.scheduler)
        self.noising = Noising(scheduler, settings.seed)
        self.network = load_frozen(folder, self.dtype).to(self.device)
        self.encoder = ClipEncoder(I2VGENXL, folder, settings.seed)

    def __call__(self, samples: list[Sample], embeddings: torch.Tensor) -> torch.Tensor:
        """Mean squared error of what the network predicts, a scalar with a gradient to `embeddings` (B, F, D)."""
        latents = torch.cat([self.encoder.latents(sample) for sample in samples])
        text = torch.cat([self.encoder.text(sample.text) for sample in samples])
        noisy, timesteps, target = self.noising.noised(samples, latents)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.network(
                noisy,
                timesteps,
                text,
                image_latents=image_latents(latents[:, :, 0], latents.shape[2]),
                image_embeddings=embeddings,
                fps=torch.full((len(samples),), float(self.settings.fps), device=self.device),
            )
        return mse_loss(predicted.float(), target)


def load_frozen(folder: Path, dtype: torch.dtype) -> I2VGenXLUNet:
    """The network of an I2VGen-XL folder in plain torch layers, on the CPU, through which gradients flow and stop.

    Args:
        dtype: of matrices and kernels; the rest is float32, which autocast expects of norms.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, of another family, or does not fit its configuration.
    """
    check_family(folder, I2VGENXL)
    component = folder / I2VGENXL.component
    state = read_weights(find_weights(component, "diffusion_pytorch_model"))
    network = build_network(I2VGENXL, component)
    network = load_network(network, state, torch.float32, torch.nn, I2VGENXL.parts.replacements, str(component))
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)
    apply_activation_checkpointing(network, check_fn=lambda module: isinstance(module, CHECKPOINTED))
    return network
