"""Training of ConsistI2V as a whole: a small network learns two clips by heart and draws them from their first frames.

Video files, settings, steps and validation are those of a run; only the checkpoint that it begins with is made here.
"""

from pathlib import Path
from statistics import mean

import pytest
import torch
from learnt_vae import learn_vae
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clips import write_annotations, write_clip
from training_runs import consisti2v_settings, data_settings, inference, losses, run_of  # noqa: F401

import tiny_checkpoints
from consistent_video.training.checkpoints import folder_name
from consistent_video.training.consisti2v import ConsistI2VTask
from consistent_video.training.settings import ConsistI2VSettings
from consistent_video.training.sources import open_dataset
from consistent_video.training.video_file import VideoFile

pytestmark = pytest.mark.slow

FRAMES, SIDE, STEPS = 4, 48, 400
TEXTS = ("an orange disc goes to the right", "a blue square goes up")
UNET = {
    "block_out_channels": [64, 64],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "attention_head_dim": [2, 2],
    "norm_num_groups": 8,
}


def disc(across: torch.Tensor, down: torch.Tensor, time: float) -> torch.Tensor:
    """A picture (H, W, 3): a disc before a sky, on its way from left to right, turns red."""
    distance = ((across - 0.2 - 0.6 * time).square() + (down - 0.5).square()).sqrt()
    sky = torch.stack((torch.full_like(down, 0.1), 0.2 + 0.3 * down, 0.6 - 0.2 * down), dim=-1)
    return paint(sky, 0.2 - distance, (1.0, 0.8 - 0.4 * time, 0.1))


def square(across: torch.Tensor, down: torch.Tensor, time: float) -> torch.Tensor:
    """A picture (H, W, 3): a square before a wall, on its way up, turns blue."""
    distance = torch.maximum((across - 0.5).abs(), (down - 0.8 + 0.6 * time).abs())
    wall = torch.stack((0.75 - 0.3 * across, 0.7 - 0.3 * across, torch.full_like(across, 0.5)), dim=-1)
    return paint(wall, 0.18 - distance, (0.1, 0.15, 0.2 + 0.6 * time))


def paint(background: torch.Tensor, depth: torch.Tensor, colour: tuple[float, float, float]) -> torch.Tensor:
    """A shape with soft edges; `depth` is how far inside of it a place (H, W) is."""
    return torch.lerp(background, torch.tensor(colour).expand_as(background), (depth * SIDE / 1.5).sigmoid()[..., None])


def clip_of(shape) -> torch.Tensor:
    """Frames (F, H, W, 3)."""
    down, across = torch.meshgrid(*(2 * [(torch.arange(SIDE) + 0.5) / SIDE]), indexing="ij")
    return torch.stack([shape(across, down, frame / (FRAMES - 1)) for frame in range(FRAMES)])


def write_base(folder: Path, clips: list[torch.Tensor]) -> Path:
    """A small ConsistI2V folder whose autoencoder knows the clips' frames, and whose network knows nothing."""
    tiny_checkpoints.write_consisti2v(folder, **UNET)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    # A layer over time that takes no part at first (1, as published training begins) needs more steps to find its own.
    shares = {key: torch.full_like(tensor, 0.5) for key, tensor in state.items() if key.endswith(".alpha")}
    save_file({**state, **shares}, weights)
    learn_vae(torch.cat(clips)).save_pretrained(folder / "vae")
    return folder


def settings_of(folder: Path, base: Path, clips: list[torch.Tensor], **changes) -> ConsistI2VSettings:
    """Settings of a run over clips, which are written into a folder together with pictures of their first frames."""
    rows, wanted = [], []
    for number, (frames, text) in enumerate(zip(clips, TEXTS)):
        write_clip(folder / "videos" / f"{number}.mp4", frames)
        rows.append({"file": f"{number}.mp4", "text": text})
        picture = folder / f"{number}.png"
        Image.fromarray((frames[0] * 255).round().byte().numpy()).save(picture)
        wanted.append({"prompt": text, "first_frame": picture})
    annotations = write_annotations(folder / "annotations.jsonl", rows)
    source = {"annotations": annotations, "folder": folder / "videos"}
    values = {
        "data": data_settings(sources=[source], frames=FRAMES, width=SIDE, height=SIDE, strides=[1, 1], flip=0),
        "steps": STEPS,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "warmup_steps": 30,
        "betas": (0.9, 0.99),
        "weight_decay": 0,
        "max_grad_norm": 1.0,
        "save_every": STEPS,
        "validate_every": STEPS,
        "drop_text": 0,
        "drop_first_frame": 0,
        "gradient_checkpointing": False,
        "validation": {"clips": wanted, "steps": 25, "cfg_text": 1.0, "frame_stride": 1},
    }
    return consisti2v_settings(folder / "run", base, **{**values, **changes})


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Pearson's, over all pixels of the frames after the first."""
    return torch.corrcoef(torch.stack((one[1:].flatten(), other[1:].flatten())))[0, 1].item()


def read_video(path: Path) -> torch.Tensor:
    """Frames (F, H, W, 3) in 0..1."""
    with VideoFile(path) as video:
        return video.read(range(video.frames)) / 255


@pytest.fixture(scope="module")
def one_thread():
    """More threads are no faster with so few channels, and could add numbers up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(one_thread, tmp_path_factory):
    """Settings of a run that is finished."""
    folder, clips = tmp_path_factory.mktemp("overfit"), [clip_of(disc), clip_of(square)]
    settings = settings_of(folder, write_base(folder / "base", clips), clips)
    run_of(ConsistI2VTask(settings), open_dataset(settings.data, settings.seed)).train()
    return settings


def test_the_loss_falls_to_a_tenth(finished):
    values = losses(finished)
    assert mean(values[:20]) > 10 * mean(values[-50:])


@pytest.mark.parametrize("number", [0, 1])
def test_the_trainer_draws_the_clips_it_has_learnt(finished, number):
    truth, other = (read_video(finished.data.sources[0].folder / f"{index}.mp4") for index in (number, 1 - number))
    drawn = read_video(finished.output / "validation" / folder_name(STEPS) / f"clip_{number:02}.mp4")
    still = truth[:1].expand_as(truth)
    assert correlation(drawn, truth) > 0.9
    assert correlation(drawn, truth) > correlation(drawn, other) + 0.5
    assert correlation(drawn, truth) > correlation(still, truth) + 0.3
