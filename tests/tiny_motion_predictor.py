"""A small motion predictor that fits the vision tower of the tiny I2VGen-XL checkpoint."""

from pathlib import Path

import torch

from consistent_video.loaders.motion_predictor import save_motion_predictor
from consistent_video.models.motion_predictor import MotionPredictor

CONFIG = {
    "embedding_dim": 64,
    "vision_dim": 64,
    "image_tokens": 3,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "feed_forward_multiplier": 2,
    "max_frames": 32,
    "image_token_layers": 1,
}


def network(seed: int = 0, spread: float = 0.05, **settings: int) -> MotionPredictor:
    """A network with torch's layers; `spread` moves all weights off their initial values, the zeros of the last layer
    among them."""
    torch.manual_seed(seed)
    built = MotionPredictor(**{**CONFIG, **settings})
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return built


def write_motion_predictor(path: Path, seed: int = 0, **settings: int) -> Path:
    """A file as a trainer writes it, of a network that changes the embeddings visibly."""
    built = network(seed, **settings)
    save_motion_predictor(built.state_dict(), built.config, path)
    return path
