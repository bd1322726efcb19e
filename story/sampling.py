"""Draws a story: reference panels together, then every other panel with what they left in the character bank."""

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import latent_preview
import torch

from ..patches.bank_origin import bank_size, origin_of
from ..patches.character_bank import CharacterBank, Tokens
from ..patches.consistent_attention import ConsistentAttention
from ..patches.schedule_place import nearest_step, place_of
from ..patches.token_sharing import Sharing
from ..samplers.rehearsal import rehearse
from ..samplers.step_noise import noise_seed, seeded
from .conditioning import Identity, batch, check_encoder, check_sides, encode_panel, encode_text
from .panel_numbers import select_panels as select_panels
from .plan import Pass, plan
from .script import Story

LATENT_PIXEL = 8
NEGATIVE = "negative"
# Tells the noise of a panel's steps from every other noise of the seed.
PANEL_NOISE = "story panel"


@dataclass(frozen=True)
class Settings:
    """How a story is drawn.

    Args:
        cfg: guidance.
        seed: of the noise; every panel's follows from it and from the number of the panel, in its steps too.
        width, height: of the panels in pixels, multiples of 8.
        id_panels: reference panels per character.
        sharing: what panels share when.
    """

    cfg: float
    seed: int
    width: int
    height: int
    id_panels: int
    sharing: Sharing


class Progress:
    """One progress bar over panels x steps, with previews."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher, total: int):
        self.bar = comfy.utils.ProgressBar(total)
        self.total, self.done = total, 0
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def of_pass(self, panels: int, steps: int):
        """The sampler callback of some panels; adaptive samplers count past their total, which is cut off."""
        start = self.done
        self.done += panels * steps

        def report(step: int, denoised: torch.Tensor, state: torch.Tensor, _: int) -> None:
            preview = self.previewer and self.previewer.decode_latent_to_preview_image("JPEG", denoised)
            self.bar.update_absolute(start + panels * min(step + 1, steps), self.total, preview)

        return report


class StoryRun:
    """One drawing of a story.

    Args:
        model: UNet of Stable Diffusion 1.x, 2.x or XL.
        clip: of the same checkpoint.
        story: of `parse_story`.
        sampler: SAMPLER.
        sigmas: (steps + 1,).
        settings: see `Settings`.
        identity: pictures for PhotoMaker, or None.

    Raises:
        ValueError: no steps, a size that pictures cannot have, or an identity that does not fit the story.
    """

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        clip: comfy.sd.CLIP,
        story: Story,
        sampler: comfy.samplers.Sampler,
        sigmas: torch.Tensor,
        settings: Settings,
        identity: Identity | None = None,
    ):
        if len(sigmas) < 2:
            raise ValueError(f"The sigmas have {len(sigmas)} values, which is no step. Connect a scheduler.")
        check_sides(settings.width, settings.height)
        if identity is not None:
            identity.check(story)
        self.model, self.clip, self.story, self.identity = model, clip, story, identity
        self.sampler, self.sigmas, self.settings = sampler, sigmas, settings
        size = settings.width // LATENT_PIXEL, settings.height // LATENT_PIXEL
        self.origin = origin_of(model, settings.sharing, sigmas, *size)
        channels = model.get_model_object("latent_format").latent_channels
        self.empty = torch.zeros(len(story.panels), channels, size[1], size[0])
        # every panel's noise depends on its number alone, so that it can be drawn again by itself
        self.noise = comfy.sample.prepare_noise(self.empty, settings.seed, list(range(len(story.panels))))

    def draw(
        self, bank: CharacterBank | None = None, wanted: Collection[int] | None = None
    ) -> tuple[torch.Tensor, CharacterBank]:
        """Draw the story.

        Args:
            bank: characters who need no reference panels any more.
            wanted: indices of the panels to draw; None draws all. Reference panels of those in them are drawn as well.

        Returns:
            Unscaled latents (N, C, h, w) of the wanted panels in their order, and the bank with all characters drawn.

        Raises:
            ValueError: see `plan`; a bank of another run; a bank that does not fit into the memory; a
                CLIP of another model.
        """
        bank = bank or CharacterBank(self.origin, {})
        bank.check_origin(self.origin)
        wanted = range(len(self.story.panels)) if wanted is None else wanted
        passes = needed_passes(plan(self.story, self.settings.id_panels, bank.characters), wanted)
        self._announce_bank(passes)
        steps = len(self.sigmas) - 1
        progress = Progress(self.model, steps * sum(len(step.panels) for step in passes))
        prompts = self._encode(passes)
        check_encoder(self.model, prompts[NEGATIVE])
        drawn = {}
        for step in passes:
            written = {} if step.mode == "write" else None
            latents = self._draw_pass(step, prompts, bank, written, progress.of_pass(len(step.panels), steps))
            drawn |= zip(step.panels, latents)
            if written is not None:
                bank = bank.joined({step.characters[0]: written})
        return torch.stack([drawn[index] for index in sorted(wanted)]), bank

    def _encode(self, passes: list[Pass]) -> dict[int | str, list]:
        """CONDITIONING of every panel, and of the negative prompt; before sampling, so that models load once."""
        size = self.settings.width, self.settings.height
        indices = [index for step in passes for index in step.panels]
        prompts = {
            index: encode_panel(self.clip, self.story, self.story.panels[index], *size, self.identity, self.sigmas)
            for index in indices
        }
        return prompts | {NEGATIVE: encode_text(self.clip, self.story.negative, *size)}

    def _draw_pass(
        self, step: Pass, prompts: dict[int | str, list], bank: CharacterBank, written: Tokens | None, callback
    ) -> torch.Tensor:
        model, rows = self.model, list(step.panels)
        if written is not None:
            model = ConsistentAttention(self.settings.sharing, written).install(model)
        elif step.characters:
            model = ConsistentAttention(self.settings.sharing, None, bank, step.characters).install(model)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(batch([prompts[index] for index in rows]), prompts[NEGATIVE])
        guider.set_cfg(self.settings.cfg)
        noise, empty, sigmas = self.noise[rows], self.empty[rows], self.sigmas.clone()  # uni_pc writes into them
        sampler = seeded(self.sampler, [noise_seed(PANEL_NOISE, self.settings.seed, panel) for panel in rows])
        # For what draws otherwise, from the seed of the run or from the global generator, these panels are the seed.
        seed = noise_seed(PANEL_NOISE, self.settings.seed, rows)
        torch.manual_seed(seed)
        samples = guider.sample(noise, empty, sampler, sigmas, callback=callback, seed=seed)
        return samples.to(comfy.model_management.intermediate_device())

    def _announce_bank(self, passes: list[Pass]) -> None:
        panels = sum(len(step.panels) for step in passes if step.mode == "write")
        if not panels:
            return
        size, known = self._bank_size(panels)
        device = comfy.model_management.intermediate_device()
        free = comfy.model_management.get_free_memory(device)
        logging.info(
            "Character bank of %d reference panels: %.2f GB on %s%s.",
            panels,
            size / 1e9,
            device,
            "" if known else " for each time that the sampler evaluates a step, which it decides as it goes",
        )
        if size > free:
            raise ValueError(
                f"The character bank of {panels} reference panels needs {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB "
                f"are free ({device}). Lower id_panels, the sampling rates, the size or the steps."
            )

    def _bank_size(self, panels: int) -> tuple[int, bool]:
        """Bytes of the bank of some reference panels, and whether the sampler's calls of the model are known."""
        sampling = self.model.get_model_object("model_sampling")
        levels, rehearsal = self.sigmas.tolist(), rehearse(self.sampler, self.sigmas, sampling)
        shortcut = not self.model.model_options.get("disable_cfg1_optimization", False)
        if rehearsal is not None:
            shortcut = shortcut and not rehearsal.without_shortcut
        prompts = 1 if shortcut and math.isclose(self.settings.cfg, 1.0) else 2
        evaluations = rehearsal and [nearest_step(levels, sigma) for sigma in rehearsal.sigmas]
        *_, height, width = self.empty.shape
        size = bank_size(
            self.model,
            self.settings.sharing,
            len(levels) - 1,
            width,
            height,
            panels,
            prompts,
            evaluations,
            place_of(sampling, levels),
        )
        return size, rehearsal is not None


def needed_passes(passes: Collection[Pass], wanted: Collection[int]) -> list[Pass]:
    """The passes that draw the wanted panels, and the references of those in them."""
    reads = [step for step in passes if step.mode == "read" and wanted_in(step, wanted)]
    shown = {name for step in reads for name in step.characters}
    writes = [
        step for step in passes if step.mode == "write" and (wanted_in(step, wanted) or shown & set(step.characters))
    ]
    return [*writes, *reads]


def wanted_in(step: Pass, wanted: Collection[int]) -> bool:
    """Whether a pass draws any of the wanted panels."""
    return any(index in wanted for index in step.panels)
