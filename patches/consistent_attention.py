"""Consistent self-attention as a patch of ComfyUI's UNet (Stable Diffusion 1.x, 2.x and XL).

Only the self-attentions of the output blocks are patched, through ComfyUI's attn1 patches: LoRA, ControlNet, samplers,
attention backends and other attn1 patches keep working. What a forward pass needs to know rides in its transformer
options and ends with it.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP

from .bank_memory import BankMemory
from .bank_origin import origin_of
from .bank_reader import BankReader
from .character_bank import CharacterBank, Evaluation, Slot, Tokens
from .panel_attention import append_tokens, attend_dealt, attend_panels, deal_tokens, sample_tokens
from .shared_layers import shared_layers
from .token_sharing import Layer, Sharing

KEY = "consistent_self_attention"
RUN_KEY = "consistent_self_attention_run"


class Run:
    """One sampling run: which conditioning is which, and how often each was evaluated at a step."""

    def __init__(self, conds: dict[str, list[dict]]):
        self.entries = {cond.get("uuid"): index for entries in conds.values() for index, cond in enumerate(entries)}
        self.visits = Counter()

    def evaluations(self, options: dict, step: int) -> list[Evaluation]:
        """The evaluations that a forward pass makes, in the order of its groups of rows."""
        kinds = options["cond_or_uncond"]
        uuids = options.get("uuids", [None] * len(kinds))
        window = tuple(getattr(options.get("context_window"), "index_list", ()))
        found = []
        for kind, uuid in zip(kinds, uuids):
            entry = self.entries.get(uuid, 0)
            visit = self.visits[kind, entry, step, window]
            self.visits[kind, entry, step, window] += 1
            found.append(Evaluation(kind, entry, step, visit))
        return found


class Pass:
    """One forward pass: its step, its groups of rows, and the positions that its layers share."""

    def __init__(self, sharing: Sharing, run: Run, options: dict, rows: int):
        if options.get("sample_sigmas") is None:
            raise ValueError(
                "Consistent self-attention needs to know the step, but the sampler does not say its sigmas. Use a "
                "sampler node of ComfyUI."
            )
        sigmas = options["sample_sigmas"][:-1].float().cpu()
        self.sharing, self.steps = sharing, len(sigmas)
        self.step = int((sigmas - options["sigmas"].flatten()[0].float().cpu()).abs().argmin())
        self.evaluations = run.evaluations(options, self.step)
        self.panels = panel_numbers(options.get("context_window"), rows // len(self.evaluations))
        self.reader: BankReader | None = None
        self.replacements = options.get("patches_replace", {}).get("attn1", {})
        self.dealt: dict[Layer, tuple[range, int]] = {}
        self._positions = {}

    def shares(self, layer: Layer) -> bool:
        """Whether panels see each other in a layer."""
        return self.sharing.shares(self.step, self.steps, layer)

    @property
    def warming_up(self) -> bool:
        """Whether the step belongs to the warm-up."""
        return self.sharing.warming_up(self.step, self.steps)

    def positions(self, tokens: int, options: dict, device: torch.device) -> list[torch.Tensor]:
        """Positions of the tokens that each panel shows to the others in a layer."""
        if tokens not in self._positions:
            # Every halving of a grid rounds up, so that small odd widths fall short of a power of two.
            ratio = options["original_shape"][-1] / options["activations_shape"][-1]
            rate = self.sharing.rate(2 ** math.ceil(math.log2(ratio)))
            drawn = [self.sharing.positions(self.step, panel, tokens, rate) for panel in self.panels]
            self._positions[tokens] = [positions.to(device) for positions in drawn]
        return self._positions[tokens]


def panel_numbers(window: object | None, panels: int) -> list[int]:
    """Which panels of the batch a forward pass holds, of ComfyUI's context windows over the batch too."""
    if window is None or window.dim != 0:
        return list(range(panels))
    anchor = getattr(window, "causal_anchor_index", None)
    numbers = [*([] if anchor is None or anchor < 0 else [anchor]), *window.index_list]
    return numbers if len(numbers) == panels else list(range(panels))


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
        guider.model_options["transformer_options"][RUN_KEY] = Run(guider.conds)
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
        options = {**transformer_options, KEY: Pass(self.sharing, run, transformer_options, len(x))}
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def mix_panels(self, layer: Layer, previous: Callable | None) -> Callable:
        """A replacement of a layer's attention; it computes attention as `previous`, a replacement, does."""

        def replacement(queries, keys, values, options):
            def attention(queries, keys, values):
                if previous is not None:
                    return previous(queries, keys, values, options)
                return optimized_attention(
                    queries,
                    keys,
                    values,
                    options["n_heads"],
                    attn_precision=options["attn_precision"],
                    transformer_options=options,
                    skip_reshape=queries.ndim == 4,
                )

            current = options.get(KEY)
            # Other attentions know no layout but (B, T, C).
            heads = None if previous or "optimized_attention_override" in options else options["n_heads"]
            out = None if queries.requires_grad else queries
            if current is not None and layer in current.dealt:
                panels, dealt = len(current.panels), current.dealt.pop(layer)
                return attend_dealt(queries, keys, values, *dealt, panels, attention, heads, out)
            if current is None or self.bank is not None or len(current.panels) < 2 or not current.shares(layer):
                return attention(queries, keys, values)
            positions = current.positions(queries.shape[1], options, queries.device)
            return attend_panels(queries, keys, values, positions, attention, heads, out)

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
                self._write(current, layer, tokens, options)
                return tokens, context, values
            groups = self._read(current, layer, tokens, layers)
            add = append_tokens
            if len(current.panels) > 1 and current.replacements.get(layer) is layers[layer]:
                add = deal_tokens
            longer = add(context, groups)
            if add is deal_tokens:
                current.dealt[layer] = (range(context.shape[1], longer.shape[1]), len(groups[0]))
            return tokens, longer, longer if values is context else add(values, groups)

        return patch

    def _needs_bank(self, current: Pass, layer: Layer) -> bool:
        return current.shares(layer) or (current.warming_up and self.sharing.warm_up == "full_bank")

    def _write(self, current: Pass, layer: Layer, tokens: torch.Tensor, options: dict) -> None:
        positions = current.positions(tokens.shape[1], options, tokens.device)
        for evaluation, rows in zip(current.evaluations, tokens.split(len(current.panels))):
            kept = rows.flatten(0, 1) if current.warming_up else sample_tokens(rows, positions)
            self.written[Slot(evaluation, layer)] = kept.to(comfy.model_management.intermediate_device(), copy=True)

    def _read(self, current: Pass, layer: Layer, tokens: torch.Tensor, layers: Sequence[Layer]) -> list[torch.Tensor]:
        """Tokens (M, C) of the bank for every group of rows."""
        if current.reader is None:
            reading = [layer for layer in layers if self._needs_bank(current, layer)]
            current.reader = BankReader(self.bank, self.characters, current.evaluations, reading)
        return [group[0] for group in current.reader.read(layer, tokens)]


def bank_names(bank: CharacterBank | None, names: str) -> tuple[str, ...]:
    """Characters of a bank by their names with commas between them; all of them for an empty text.

    Raises:
        ValueError: names without a bank.
    """
    chosen = tuple(name.strip(" []") for name in names.split(",") if name.strip(" []"))
    if bank is None and chosen:
        raise ValueError(f"characters is {names!r}, but no character bank is connected. Connect one, or clear it.")
    return chosen or tuple(bank.characters if bank else ())
