"""What diffusion training draws, and what it asks of a network, by a checkpoint's own schedule."""

import torch

from ..samplers import schedules
from ..samplers.noise import mix_frames
from .clips import Sample
from .randomness import seed_of

PREDICTIONS = ("epsilon", "v_prediction")


class Noising:
    """The forward process of Ho et al. 2020 (arXiv 2006.11239, eq. 4) at a random timestep per sample.

    Args:
        scheduler: diffusers scheduler configuration.
        seed: of the run.
        mode, alpha: what the noise of the frames has in common, as of `samplers.noise.mix_frames`.

    Raises:
        ValueError: the network predicts something else than noise or v, or its schedule cannot be computed.
    """

    def __init__(self, scheduler: dict, seed: int, mode: str = "independent", alpha: float = 1.0):
        self.prediction = scheduler.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"The scheduler configuration has prediction_type {self.prediction!r}, expected one of "
                f"{', '.join(PREDICTIONS)}. Restore the published scheduler_config.json."
            )
        self.alphas = schedules.alphas_cumprod(scheduler)
        self.seed, self.mode, self.alpha = seed, mode, alpha

    def draw(self, sample: Sample, shape: torch.Size) -> tuple[torch.Tensor, int]:
        """Noise (4, F, h, w) of a sample and the timestep that it is noised to."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, sample.number, "noise"))
        timestep = torch.randint(len(self.alphas), (1,), generator=generator).item()
        base, independent = (torch.randn(shape, generator=generator) for _ in range(2))
        return mix_frames(self.mode, self.alpha, base, independent), timestep

    def noised(self, samples: list[Sample], latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noised latents (B, 4, F, h, w), their timesteps (B,), and what the network should predict of them.

        v is that of Salimans and Ho 2022 (arXiv 2202.00512), appendix D.
        """
        drawn = [self.draw(sample, latents.shape[1:]) for sample in samples]
        noise = torch.stack([noise for noise, _ in drawn]).to(latents)
        timesteps = torch.tensor([timestep for _, timestep in drawn])
        alphas = self.alphas[timesteps].to(latents).view(-1, 1, 1, 1, 1)
        signal, level = alphas.sqrt(), (1 - alphas).sqrt()
        target = noise if self.prediction == "epsilon" else signal * noise - level * latents
        return signal * latents + level * noise, timesteps.to(latents.device), target
