"""The arithmetic of consistent self-attention: panels that see their own tokens and sampled tokens of each other.

StoryDiffusion (Zhou et al. 2024, arXiv 2405.01434), section 3.1, as its code computes it: without a window, and every
panel's own tokens once. Keys and values are projected once per token and gathered, so there is no mask. The order of
keys does not matter, so what all panels of a group see stays in place, and only what one panel sees alone is exchanged.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Added(NamedTuple):
    """Tokens of a bank among the tokens of a layer.

    Args:
        where: the token numbers.
        count: how many all panels of a group see together.
        dealt: whether they are dealt out to the panels; otherwise each panel has all of them.
    """

    where: range
    count: int
    dealt: bool


def attend_panels(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: Sequence[torch.Tensor],
    attention: Attention,
    heads: int | None = None,
    out: torch.Tensor | None = None,
    alone: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of every panel over all of its own tokens and the sampled tokens of the others.

    Args:
        queries: (R * P, T, C), R groups of P panels that do not see each other's groups.
        keys, values: (R * P, S, C); the first T of the S tokens are the panel's own, any more belong to it as well.
        positions: different token numbers (k,), in 0..S-1, of each of the P panels.
        attention: of (1, T, C) over (1, S', C) and (1, S', C), giving (1, T, C).
        heads: if given, attention gets (1, heads, T, C / heads) and (1, heads, S', C / heads) instead, which spares it
            a change of layout.
        out: where the result goes; may be `queries`, which then need no second tensor beside them.
        alone: `unseen_positions` of each of the positions, for a caller who knows them.

    Returns:
        (R * P, T, C).
    """
    alone = [unseen_positions(seen, keys.shape[1]) for seen in positions] if alone is None else alone
    return _attend(queries, keys, values, positions, alone, attention, heads, out)


def append_tokens(tokens: torch.Tensor, shared: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tokens with those that all panels of a group see behind each panel's own.

    Args:
        tokens: (R * P, T, C), R groups of P panels.
        shared: (M, C) for each of the R groups.

    Returns:
        (R * P, T + M, C).
    """
    panels = len(tokens) // len(shared)
    longer = tokens.new_empty(len(tokens), tokens.shape[1] + len(shared[0]), tokens.shape[2])
    for group, own, found in zip(longer.split(panels), tokens.split(panels), shared):
        group[:, : tokens.shape[1]] = own
        group[:, tokens.shape[1] :] = found
    return longer


def deal_tokens(tokens: torch.Tensor, shared: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tokens with those that all panels of a group see dealt out to its panels, for a projection of each only once.

    Args:
        tokens: (R * P, T, C), R groups of P panels.
        shared: (M, C) for each of the R groups, on any device.

    Returns:
        (R * P, T + ceil(M / P), C); the last panels of a group may end in zeros.
    """
    (rows, own, channels), panels = tokens.shape, len(tokens) // len(shared)
    share = -(-len(shared[0]) // panels)
    dealt = tokens.new_empty(rows, own + share, channels)
    dealt[:, :own], dealt[:, own:] = tokens, 0
    for group, found in zip(dealt.split(panels), shared):
        for row, part in zip(group, found.split(share)):
            row[own : own + len(part)] = part
    return dealt


def attend_dealt(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    dealt: range,
    count: int,
    panels: int,
    attention: Attention,
    heads: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every panel over its own tokens and what `deal_tokens` dealt out to the panels of its group.

    Args:
        queries: (R * P, T, C), R groups of P panels.
        keys, values: (R * P, S, C).
        dealt: the token numbers that were dealt; all others are the panel's own.
        count: how many tokens M a group shares.
        panels: P.
        attention, heads, out: see `attend_panels`.

    Returns:
        (R * P, T, C).
    """
    numbers = torch.arange(keys.shape[1], device=keys.device)
    own = torch.cat((numbers[: dealt.start], numbers[dealt.stop :]))
    shares = [min(max(count - panel * len(dealt), 0), len(dealt)) for panel in range(panels)]
    shared = [numbers[dealt.start : dealt.start + share] for share in shares]
    return _attend(queries, keys, values, shared, [own] * panels, attention, heads, out)


def tile_tokens(tokens: torch.Tensor, added: Added, panels: int, tiles: int) -> torch.Tensor:
    """Tokens in as many rows as tiled queries have, each with a part of its panel's own and all that were added.

    ComfyUI's HyperTile divides the queries only, and its attention then divides keys and values in their order.

    Args:
        tokens: (R * P, S, C), R groups of P panels.
        added: which of them came from a bank.
        panels: P.
        tiles: how many rows N of queries there are for each panel.

    Returns:
        (R * P * N, T / N + M, C) for T tokens of a panel's own and M that were added.
    """
    own = torch.cat((tokens[:, : added.where.start], tokens[:, added.where.stop :]), dim=1)
    shared = tokens[:, added.where.start : added.where.stop].unflatten(0, (-1, panels))  # (R, P, M or less, C)
    shared = shared.flatten(1, 2)[:, : added.count] if added.dealt else shared[:, 0]
    own = own.reshape(len(tokens) * tiles, -1, tokens.shape[2])
    return torch.cat((own, shared.repeat_interleave(panels * tiles, dim=0)), dim=1)


def sample_tokens(tokens: torch.Tensor, positions: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sampled tokens of P panels (P, T, C) one after the other: (sum of k, C)."""
    return torch.cat([panel.index_select(0, seen) for panel, seen in zip(tokens, positions)])


def unseen_positions(positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """The ascending token numbers of 0..tokens - 1 that are not in positions (k,), without waiting for the device."""
    seen = torch.zeros(tokens, device=positions.device).index_fill_(0, positions, 1)
    return seen.argsort(stable=True)[: tokens - len(positions)]


def _attend(queries, keys, values, shared, alone, attention, heads, out):
    """Attention of panels over the `shared` tokens of all panels of their group and those they see `alone`."""
    panels, common = len(shared), sum(map(len, shared))
    room = common + max(map(len, alone))
    attended = torch.empty_like(queries) if out is None else out
    queries, keys, values = (part.unflatten(-1, (heads or 1, -1)).transpose(1, 2) for part in (queries, keys, values))
    buffers = [part.new_empty(1, part.shape[1], room, part.shape[3]) for part in (keys, values)]
    for start in range(0, len(queries), panels):
        for part, buffer in zip((keys, values), buffers):
            places = buffer[0, :, :common].split(list(map(len, shared)), dim=1)
            for tokens, seen, place in zip(part[start:], shared, places):
                place.copy_(tokens.index_select(1, seen))
        for row, unseen in enumerate(alone, start):
            seen = common + len(unseen)
            for part, buffer in zip((keys, values), buffers):
                buffer[0, :, common:seen] = part[row].index_select(1, unseen)
            parts = (queries[row : row + 1], *(buffer[:, :, :seen] for buffer in buffers))
            attended[row] = attention(*(parts if heads else (part[:, 0] for part in parts)))[0]
    return attended
