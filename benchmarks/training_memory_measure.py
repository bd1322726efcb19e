"""Counts what the trainers' networks keep for the backward pass; started by training_memory.py.

The tensors have shapes and types and no content (torch's fake tensors), and say that they are on a CUDA device, so that
autocast treats norms as it does there. Attention is the fused one that PyTorch chooses on a card: flash in 16 bits,
memory-efficient in 32; without a card it would choose the one that keeps every attention matrix. Counted is the storage
that is alive after the forward pass and not the weights', each one once: kept activations, inputs, and the copies of
weights in 16 bits. Where layers are computed again, the largest of them is counted on its own: it comes on top while
its turn lasts. What kernels work with, the allocator's gaps, and what the optimizer needs for a moment are not counted.
"""

import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from comfy_process import enter

enter()

import comfy.ops
import torch
from activation_memory import ActivationPeak
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from consistent_video.models.consisti2v_unet import ConsistI2VUNet
from consistent_video.models.motion_predictor import MotionPredictor
from consistent_video.training.consisti2v import CHECKPOINTED, choose_trainable, keep_angles
from consistent_video.training.settings import ConsistI2VSettings, DataSettings

DEVICE, HALF = "cuda", torch.bfloat16
PRECISIONS = {"fp32": False, "bf16": True}
CHOICES = (["all"], ["conv3ds.", "tempo_attns."])
FRAMES, HEIGHT, WIDTH = (DataSettings.model_fields[name].default for name in ("frames", "height", "width"))
LATENT_CHANNELS, PIXELS_PER_LATENT = 4, 8
TEXT_TOKENS, TEXT_WIDTH, IMAGE_TOKENS = 77, 1024, 257
BATCHES = {"consisti2v": (1, ConsistI2VSettings.model_fields["batch_size"].default), "motion_predictor": (1, 8)}
TRAINED_BYTES, FROZEN_BYTES = 16, 4  # float32: weight, gradient and both moments of AdamW; weight
GB = 1e9


class Alive(ActivationPeak):
    """Bytes of tensors that come into being inside the block, without views of the weights."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.weights:
            super()._track(storage)

    @property
    def now(self) -> int:
        return sum(self.alive.values())


def fused_attention(queries, keys, values, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """The attention of a card, by the type of the computation; takes the place of ComfyUI's call of PyTorch's."""
    if torch.is_autocast_enabled(DEVICE):
        parts = (part.to(HALF) for part in (queries, keys, values))
        return torch.ops.aten._scaled_dot_product_flash_attention(*parts)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(queries, keys, values, attn_mask, True)[0]


@contextmanager
def autocast(enabled: bool) -> Iterator[None]:
    """torch.autocast of a CUDA device, which refuses where there is none."""
    torch.set_autocast_enabled(DEVICE, enabled)
    torch.set_autocast_dtype(DEVICE, HALF)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(DEVICE, False)


def largest_of(modules: list[torch.nn.Module], alive: Alive) -> dict[str, int]:
    """Let modules note what each call of theirs keeps; the most is under "bytes" when they have run."""
    largest, before = {"bytes": 0}, []

    def enters(module, inputs) -> None:
        before.append(alive.now)

    def leaves(module, inputs, output) -> None:
        largest["bytes"] = max(largest["bytes"], alive.now - before.pop())

    for module in modules:
        module.register_forward_pre_hook(enters)
        module.register_forward_hook(leaves)
    return largest


def kept(build: Callable[[], torch.nn.Module], call: Callable, clips: int, half: bool, again: tuple = ()) -> dict:
    """Bytes kept by one call of a network, and the most that one of the layers in `again` keeps."""
    with FakeTensorMode(), mock.patch.object(comfy.ops, "scaled_dot_product_attention", fused_attention):
        with torch.device(DEVICE):
            network = build()
        alive = Alive(network)
        largest = largest_of([module for module in network.modules() if isinstance(module, again)], alive)
        with alive:
            with autocast(half):
                predicted = call(network, clips)
            if not predicted.requires_grad:
                raise RuntimeError("Nothing is kept: the prediction has no gradient.")
            return {"kept": alive.now, "largest_layer": largest["bytes"]}


def parameters(network: torch.nn.Module) -> dict[str, int]:
    """How many there are, how many are trained, and the bytes of weights, gradients and AdamW's moments."""
    total = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    state = TRAINED_BYTES * trained + FROZEN_BYTES * (total - trained)
    return {"parameters": total, "trained": trained, "state": state}


def consisti2v(parts: list[str], checkpointing: bool) -> ConsistI2VUNet:
    """The network as its trainer prepares it, at the published width."""
    network = ConsistI2VUNet()
    keep_angles(network)
    choose_trainable(network, parts)
    if checkpointing:
        apply_activation_checkpointing(network, check_fn=lambda module: isinstance(module, CHECKPOINTED))
    return network


def call_consisti2v(network: ConsistI2VUNet, clips: int) -> torch.Tensor:
    """One prediction at the default size."""
    size = (HEIGHT // PIXELS_PER_LATENT, WIDTH // PIXELS_PER_LATENT)
    noisy = torch.randn(clips, LATENT_CHANNELS, FRAMES, *size, device=DEVICE)
    return network(
        noisy,
        torch.zeros(clips, dtype=torch.int64, device=DEVICE),
        torch.randn(clips, TEXT_TOKENS, TEXT_WIDTH, device=DEVICE),
        first_frame_latents=noisy[:, :, :1].clone(),
        frame_stride=torch.ones(clips, device=DEVICE),
    )


def call_motion_predictor(network: MotionPredictor, clips: int) -> torch.Tensor:
    """One prediction for clips of the default length."""
    embeddings = torch.randn(2, clips, network.config["embedding_dim"], device=DEVICE)
    tokens = torch.randn(2, clips, IMAGE_TOKENS, network.config["vision_dim"], device=DEVICE)
    return network(*embeddings, *tokens, FRAMES)


def count_consisti2v() -> dict:
    """Everything about the trainer `consisti2v`."""
    found = {"cases": {}}
    for parts in CHOICES:
        with torch.device("meta"):
            found[" ".join(parts)] = parameters(consisti2v(parts, False))
        for clips in BATCHES["consisti2v"]:
            for precision, half in PRECISIONS.items():
                plain = kept(partial(consisti2v, parts, False), call_consisti2v, clips, half, CHECKPOINTED)
                less = kept(partial(consisti2v, parts, True), call_consisti2v, clips, half)
                found["cases"][f"{' '.join(parts)}, {clips} clips, {precision}"] = {
                    "kept": plain["kept"],
                    "kept_with_checkpointing": less["kept"],
                    "largest_layer": plain["largest_layer"],
                }
    return found


def count_motion_predictor() -> dict:
    """Everything about the trainer `motion_predictor`, without the frozen networks."""
    with torch.device("meta"):
        found = {"all": parameters(MotionPredictor()), "cases": {}}
    for clips in BATCHES["motion_predictor"]:
        for precision, half in PRECISIONS.items():
            case = kept(MotionPredictor, call_motion_predictor, clips, half)
            found["cases"][f"all, {clips} clips, {precision}"] = {"kept": case["kept"]}
    return found


def show(name: str, found: dict) -> None:
    """Print one trainer's numbers."""
    print(f"\n{name}")
    for parts, numbers in found.items():
        if parts != "cases":
            millions = ", ".join(f"{numbers[key] / 1e6:.1f} M {key}" for key in ("parameters", "trained"))
            print(f"  {parts:24} {millions}, state {numbers['state'] / GB:.1f} GB")
    for case, numbers in found["cases"].items():
        print(f"  {case:40} " + ", ".join(f"{key} {value / GB:.2f} GB" for key, value in numbers.items()))


def main(path: Path) -> None:
    networks = {"consisti2v": count_consisti2v(), "motion_predictor": count_motion_predictor()}
    for name, found in networks.items():
        show(name, found)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions, "bytes": networks}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
