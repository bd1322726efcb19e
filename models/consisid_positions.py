"""Where a token of ConsisID's clips is: rotary angles."""

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed


def centred_crop(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The part of the base grid that a grid of another shape covers: scaled to fit into it, in its middle.

    Both ends of the rotary positions. Source: diffusers, pipelines/consisid/pipeline_consisid.py,
    get_resize_crop_region_for_grid.

    Args:
        grid: rows and columns of the clip's tokens.
        base: rows and columns that the network was trained on.

    Returns:
        (top, left) and (bottom, right).
    """
    (rows, columns), (base_rows, base_columns) = grid, base
    tall = rows / columns > base_rows / base_columns
    height = base_rows if tall else round(base_columns / columns * rows)
    width = round(base_rows / rows * columns) if tall else base_columns
    top, left = round((base_rows - height) / 2.0), round((base_columns - width) / 2.0)
    return (top, left), (top + height, left + width)


def rotary_table(
    head_dim: int, text_length: int, grid: tuple[int, int, int], base: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Rotations of queries and keys for `apply_rope1`, (1, 1, T + N, head_dim / 2, 2, 2) float32.

    Text tokens are not rotated.

    Args:
        head_dim: width of an attention head.
        text_length: T, tokens of text before the clip's.
        grid: frames, rows and columns of the clip's N tokens.
        base: rows and columns that the network was trained on.
    """
    frames, *size = grid
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=head_dim,
        crops_coords=centred_crop(tuple(size), base),
        grid_size=tuple(size),
        temporal_size=frames,
        device=device,
    )
    # Both neighbours of a rotated pair have the same angle.
    cos, sin = cos[:, ::2].float(), sin[:, ::2].float()
    table = torch.eye(2, device=device).repeat(text_length + cos.shape[0], cos.shape[1], 1, 1)
    table[text_length:] = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
    return table[None, None]
