"""Areas and masks of prompts, which ComfyUI describes for pictures, in the axes of a clip.

ComfyUI reads the shares of an area in the order of the latent's axes, cuts every axis of a mask, and looks for a mask's
bounds in two axes: with clips each of these ends in an error from inside. Here every area gets six numbers (frames,
height, width, first frame, top, left), and every mask the frames of the clip.
"""

import comfy.utils
import torch

# Smallest side of the area around a mask, in latent pixels, as ComfyUI has it.
SMALLEST_BOUNDS = 8


def place(cond: dict, shape: tuple[int, ...], patch: int = 1) -> None:
    """Bring the area and the mask of a prompt to a clip, in place.

    Args:
        cond: a prompt as ComfyUI's guiders hold it.
        shape: of the latent, (B, C, F, h, w).
        patch: sides and places of areas are widened to multiples of it.

    Raises:
        ValueError: an area outside of the clip, or a mask of another number of pictures than the clip has.
    """
    clip = tuple(shape[2:])
    if "mask" in cond:
        cond["mask"] = fit_mask(cond["mask"], shape)
        if cond.pop("set_area_to_bounds", False):
            cond["area"] = _bounds(cond["mask"], clip)
    if "area" in cond:
        cond["area"] = fit_area(cond["area"], clip, patch)
        if "mask" in cond:
            cond["mask"] = cond["mask"].expand(-1, clip[0], -1, -1)


def fit_area(area: tuple, clip: tuple[int, int, int], patch: int = 1) -> tuple[int, ...]:
    """An area of ComfyUI's as (frames, height, width, first frame, top, left) in latent pixels.

    Args:
        area: sizes, then places, of height and width, or of frames, height and width; behind the word "percentage",
            shares of the clip's.
        clip: frames, height and width of the latent.

    Raises:
        ValueError: it lies outside of the clip.
    """
    shares = area[0] == "percentage"
    numbers = list(area[1:] if shares else area)
    count = len(numbers) // 2
    sizes, starts = numbers[:count], numbers[count:]
    if count == 2:
        sizes, starts = [1.0 if shares else clip[0], *sizes], [0, *starts]
    if shares:
        sizes = [max(1, round(size * side)) for size, side in zip(sizes, clip)]
        starts = [round(start * side) for start, side in zip(starts, clip)]
    fitted = []
    for name, size, start, side, step in zip(("frame", "row", "column"), sizes, starts, clip, (1, patch, patch)):
        if start >= side or size < 1:
            raise ValueError(
                f"An area of the prompt begins at {name} {start} of the latent, but the clip has {side}. Move it into "
                "the clip."
            )
        begin, end = start // step * step, min(-(-(start + size) // step) * step, side)
        fitted.append((end - begin, begin))
    return (*(size for size, _ in fitted), *(start for _, start in fitted))


def fit_mask(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Masks (1, H, W) of the clip, (F, H, W) of its frames or (B, H, W) of the clips: (1 or B, 1 or F, h, w).

    Where the clip's frames are compressed in time, masks of its uncompressed frames are averaged.

    Raises:
        ValueError: another number of masks.
    """
    clips, _, frames, height, width = shape
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    if mask.ndim == 3:
        count, uncompressed = mask.shape[0], 4 * (frames - 1) + 1
        if count == uncompressed and count != frames and frames > 1:
            later = mask[1:].unflatten(0, (frames - 1, 4)).mean(dim=1)
            mask = torch.cat((mask[:1], later)).unsqueeze(0)
        elif count in (1, frames):
            mask = mask.unsqueeze(0)
        elif count == clips:
            mask = mask.unsqueeze(1)
        else:
            raise ValueError(
                f"A prompt has {count} masks, but there are {clips} clips of {frames} latent frames. Give one mask, or "
                "one for each frame."
            )
    return comfy.utils.common_upscale(mask.float(), width, height, "bilinear", "none")


def _bounds(mask: torch.Tensor, clip: tuple[int, int, int]) -> tuple[int, ...]:
    """The smallest area, all frames long, that holds what a mask (1 or B, 1 or F, h, w) covers."""
    covered = mask.abs().amax(dim=(0, 1)) > 0
    places = []
    for axis, side in ((1, clip[1]), (0, clip[2])):
        found = covered.any(dim=axis).nonzero().flatten().tolist() or [0]
        size = min(max(found[-1] + 1 - found[0], SMALLEST_BOUNDS), side)
        places.append((size, min(found[0], side - size)))
    (height, top), (width, left) = places
    return (clip[0], height, width, 0, top, left)
