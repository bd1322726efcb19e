"""Consistent self-attention as a patch of ComfyUI's UNet (Stable Diffusion 1.x, 2.x and XL).

Only the self-attentions of the output blocks are patched, through ComfyUI's attn1 patches: LoRA, ControlNet, samplers,
attention backends and other attn1 patches keep working. What a forward pass needs to know rides in its transformer
options and ends with it.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ..models.attention import attend
from .attention_pass import KEY, Pass, Run
from .bank_memory import BankMemory
from .bank_origin import origin_of
from .bank_reader import BankReader
from .bank_writer import BankWriter
from .character_bank import CharacterBank, Slot, Tokens
from .panel_attention import Added, append_tokens, attend_dealt, attend_panels, deal_tokens, sample_tokens, tile_tokens
from .run_levels import follow_levels
from .schedule_place import place_of
from .shared_layers import shared_layers
from .token_sharing import Layer, Sharing

RUN_KEY = "consistent_self_attention_run"


class ConsistentAttention:
    """The patch: panels of a batch see each other, write what they show into `written`, or read a bank.

    Args:
        sharing: what is shared when.
        written: filled with what a bank keeps of the panels of this batch; None keeps nothing.
        bank: read instead of the other panels of the batch; None for a batch that is complete.
        characters: who of the bank is in the panels.

    Raises:
        ValueError: a character that is not in the bank.
    """

    def __init__(
        self,
        sharing: Sharing,
        written: Tokens | None = None,
        bank: CharacterBank | None = None,
        characters: Sequence[str] = (),
    ):
        self.sharing, self.written, self.bank, self.characters = sharing, written, bank, tuple(characters)
        self.memory = None
        if bank is not None:
            bank.check_names(characters)
            self.memory = BankMemory(bank, self.characters)

    def install(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        """A clone of the model with this patch.

        Raises:
            ValueError: see `shared_layers`; a model that has this patch already.
        """
        layers = shared_layers(model)
        if model.wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).get(KEY):
            raise ValueError(
                "The model has consistent self-attention already. Connect the model from before it, or remove one."
            )
        model = model.clone()
        existing = model.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
        mixing = {layer: self.mix_panels(layer, existing.get(layer, existing.get(layer[:2]))) for layer in layers}
        for layer, replacement in mixing.items():
            model.set_model_attn1_replace(replacement, *layer)
        if self.written is not None or self.characters:
            model.set_model_attn1_patch(self.use_bank(mixing))
        follow_levels(model)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.start_run)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self.start_pass)
        if self.memory is not None:
            self.memory.install(model)
        return model

    def start_run(self, executor: Callable, noise, latent_image, sampler, sigmas, *args, **kwargs) -> torch.Tensor:
        """Wrapper of a sampling run; `executor.class_obj` is the guider, whose options last as long as the run.

        Raises:
            ValueError: a bank of another run.
        """
        guider = executor.class_obj
        if self.bank is not None:
            height, width = noise.shape[-2:]
            self.bank.check_origin(origin_of(guider.model_patcher, self.sharing, sigmas, width, height))
        _check_prompts(guider.conds, len(noise))
        levels, sampling = sigmas.tolist(), guider.model_patcher.get_model_object("model_sampling")
        run = Run(guider.conds, levels, place_of(sampling, levels), len(noise))
        guider.model_options["transformer_options"][RUN_KEY] = run
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def start_pass(self, executor: Callable, x, timesteps, context, y, control, transformer_options, **kwargs):
        """Wrapper of a forward pass of the UNet.

        Raises:
            ValueError: reference panels in context windows.
        """
        if self.written is not None and transformer_options.get("context_window") is not None:
            raise ValueError(
                "A character bank keeps the reference panels of one batch, but context windows divide this one. Remove "
                "them from the model, or draw fewer reference panels."
            )
        run = transformer_options.get(RUN_KEY) or Run({})
        current = Pass(self.sharing, run, transformer_options, len(x))
        if self.written is not None:
            current.writer = BankWriter(self.written)
        predicted = executor(x, timesteps, context, y, control, {**transformer_options, KEY: current}, **kwargs)
        if current.writer is not None:
            current.writer.finish()
        return predicted

    def mix_panels(self, layer: Layer, previous: Callable | None) -> Callable:
        """A replacement of a layer's attention; it computes attention as `previous`, a replacement, does."""

        def replacement(queries, keys, values, options):
            def attention(queries, keys, values):
                if previous is not None:
                    return previous(queries, keys, values, options)
                return attend(
                    queries,
                    keys,
                    values,
                    options["n_heads"],
                    attn_precision=options["attn_precision"],
                    transformer_options=options,
                    skip_reshape=queries.ndim == 4,
                )

            current = options.get(KEY)
            if current is None:
                return attention(queries, keys, values)
            # Other attentions know no layout but (B, T, C).
            heads = None if previous or "optimized_attention_override" in options else options["n_heads"]
            out = None if queries.requires_grad else queries
            added, panels, tiles = current.added.pop(layer, None), len(current.panels), len(queries) // len(keys)
            if added is not None:
                if tiles > 1:
                    keys, values = (tile_tokens(part, added, panels, tiles) for part in (keys, values))
                elif added.dealt:
                    return attend_dealt(queries, keys, values, added.where, added.count, panels, attention, heads, out)
                return attention(queries, keys, values)
            if self.bank is not None or panels < 2 or not current.shares(layer):
                return attention(queries, keys, values)
            keys, values = (part.reshape(len(queries), -1, part.shape[-1]) for part in (keys, values))
            tiles = len(queries) // (panels * len(current.evaluations))
            tokens = min(_grid(options), tiles * keys.shape[1])
            seen, alone = current.shared_positions(tokens, options, queries.device, tiles, keys.shape[1])
            return attend_panels(queries, keys, values, seen, attention, heads, out, alone)

        return replacement

    def use_bank(self, layers: Mapping[Layer, Callable]) -> Callable:
        """An attn1 patch that writes tokens to a bank, or adds tokens of a bank to keys and values.

        Args:
            layers: in the order of execution, with the replacements that `mix_panels` made of their attention. Where
                such a one is in force, panels that read together share the projection of the bank's tokens.
        """

        def patch(tokens, context, values, options):
            current = options.get(KEY)
            layer = Layer(*(options.get("block") or ("", 0)), options.get("block_index", 0))
            if current is None or layer not in layers or not self._needs_bank(current, layer):
                return tokens, context, values
            if self.written is not None:
                self._write(current, layer, context, options)
                return tokens, context, values
            groups, own = self._read(current, layer, context, layers), context.shape[1]
            deal = len(current.panels) > 1 and current.replacements.get(layer) is layers[layer]
            add = deal_tokens if deal else append_tokens
            longer = add(context, groups)
            current.added[layer] = Added(range(own, longer.shape[1]), len(groups[0]), deal)
            return tokens, longer, longer if values is context else add(values, groups)

        return patch

    def _needs_bank(self, current: Pass, layer: Layer) -> bool:
        return current.shares(layer) or (current.warming_up and self.sharing.warm_up == "full_bank")

    def _write(self, current: Pass, layer: Layer, tokens: torch.Tensor, options: dict) -> None:
        """Write tokens (R * P, S, C), of which the first of each row are the panel's own."""
        own = min(_grid(options), tokens.shape[1])
        positions = current.positions(own, options, tokens.device)
        for evaluation, rows in zip(current.evaluations, tokens.split(len(current.panels))):
            kept = rows[:, :own].reshape(-1, rows.shape[2]).clone() if current.warming_up else None
            kept = sample_tokens(rows, positions) if kept is None else kept
            current.writer.keep(Slot(evaluation, layer), kept)

    def _read(self, current: Pass, layer: Layer, tokens: torch.Tensor, layers: Sequence[Layer]) -> list[torch.Tensor]:
        """Tokens (M, C) of the bank for every group of rows."""
        if current.reader is None:
            reading = [layer for layer in layers if self._needs_bank(current, layer)]
            current.reader = BankReader(self.bank, self.characters, current.evaluations, reading)
        return [group[0] for group in current.reader.read(layer, tokens)]


def _check_prompts(conds: Mapping[str, list[dict]], pictures: int) -> None:
    """Say when there are prompts of more pictures than are drawn, as with the default batch size of a latent."""
    texts = [cond["cross_attn"] for entries in conds.values() for cond in entries if "cross_attn" in cond]
    most = max((len(text) for text in texts if isinstance(text, torch.Tensor)), default=1)
    if most > pictures:
        logging.warning(
            "Consistent Self-Attention: there are prompts of %d pictures, but the latent has %d: the others are not "
            "drawn. Set the batch size of the empty latent to %d.",
            most,
            pictures,
            most,
        )


def _grid(options: dict) -> int:
    """Tokens of a picture in the layer at hand, whatever patches have made of them."""
    return math.prod(options["activations_shape"][-2:])


def bank_names(bank: CharacterBank | None, names: str) -> tuple[str, ...]:
    """Characters of a bank by their names with commas between them; all of them for an empty text.

    Raises:
        ValueError: names without a bank.
    """
    chosen = tuple(name.strip(" []") for name in names.split(",") if name.strip(" []"))
    if bank is None and chosen:
        raise ValueError(f"characters is {names!r}, but no character bank is connected. Connect one, or clear it.")
    return chosen or tuple(bank.characters if bank else ())
