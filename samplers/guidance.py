"""Guidance by text and by picture, each with a strength of its own."""

import comfy.model_patcher
import comfy.samplers
import torch

from .noise import require_exploding


class ImageTextGuider(comfy.samplers.CFGGuider):
    """Guidance over three branches: nothing, picture, picture + text (Brooks et al. 2023, arXiv 2211.09800).

    x0 = none + cfg_image * (image - none) + cfg_text * (text - image); all branches are evaluated in one batch where
    the memory allows it. With cfg_image of at most 1 the branch without the picture is left out, and without rescale
    this is `comfy.samplers.CFGGuider` itself.

    Args:
        model_patcher: a model of this pack that is conditioned on a picture.
        cfg_text, cfg_image: strengths; 1 and below mean no guidance.
        rescale: share, 0..1, of the guided prediction whose deviation is brought back to that of the text branch
            (Lin et al. 2023, arXiv 2305.08891, section 3.4).

    Raises:
        ValueError: rescale outside 0..1, or a model that has no branch without the picture.
    """

    def __init__(
        self,
        model_patcher: comfy.model_patcher.ModelPatcher,
        cfg_text: float = 7.5,
        cfg_image: float = 1.0,
        rescale: float = 0.0,
    ):
        super().__init__(model_patcher)
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale is {rescale}. Choose a share from 0 (none) to 1 (all of it).")
        if rescale > 0:
            require_exploding(model_patcher.get_model_object("model_sampling"), "Guidance rescale")
        if cfg_image > 1 and not hasattr(model_patcher.model, "without_picture"):
            raise ValueError(
                f"{type(model_patcher.model).__name__} takes no picture to guide by. Set cfg_image to 1, or use a "
                "model of Load ConsistI2V or Load I2VGen-XL."
            )
        self.set_cfg(cfg_text)
        self.cfg_image, self.rescale = cfg_image, rescale

    def set_conds(self, positive: list, negative: list) -> None:
        """Set both prompts; the third branch is the negative one without its picture."""
        conds = {"positive": positive, "negative": negative}
        if self.cfg_image > 1:
            without = self.model_patcher.model.without_picture
            conds["no_picture"] = [[text, without(extra)] for text, extra in negative]
        self.inner_set_conds(conds)

    def predict_noise(self, x, timestep, model_options={}, seed=None) -> torch.Tensor:
        """Guided x0 for the state x at sigma `timestep` (ComfyUI's name)."""
        if self.cfg_image <= 1 and self.rescale == 0:
            return super().predict_noise(x, timestep, model_options, seed)
        names = ["positive", "negative"] + (["no_picture"] if self.cfg_image > 1 else [])
        if self.cfg_image <= 1 and self.cfg <= 1:
            names = names[:1]
        conds = [self.conds.get(name) for name in names]
        branches = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return self._combine(branches, x, timestep)

    def _combine(self, branches: list[torch.Tensor], x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        text = branches[0]
        if len(branches) == 1:
            return text
        picture = branches[1]
        start = branches[2] if len(branches) == 3 else picture
        guided = start + self.cfg_image * (picture - start) + self.cfg * (text - picture)
        return guided if self.rescale == 0 else self._rescaled(guided, text, x, sigma)

    def _rescaled(self, guided, text, x, sigma) -> torch.Tensor:
        """Rescale what the network would have had to say, as published: the prediction of noise or v, not x0."""
        sampling = self.inner_model.model_sampling
        first = getattr(self.inner_model, "first_predicted_frame", 0)
        guided_output, text_output = (network_output(sampling, sigma, clean, x) for clean in (guided, text))
        deviations = [output[:, :, first:].flatten(1).std(dim=1) for output in (text_output, guided_output)]
        factor = self.rescale * deviations[0] / deviations[1] + (1 - self.rescale)
        scaled = guided_output * factor.view(-1, *[1] * (x.ndim - 1))
        clean = sampling.calculate_denoised(sigma, scaled, x)
        return torch.cat((guided[:, :, :first], clean[:, :, first:]), dim=2)


def network_output(
    sampling: torch.nn.Module, sigma: torch.Tensor, clean: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """What the network said when ComfyUI made x0 = `clean` of it: the inverse of `calculate_denoised`."""
    zero = sampling.calculate_denoised(sigma, torch.zeros_like(x), x)
    one = sampling.calculate_denoised(sigma, torch.ones_like(x), x)
    return (clean - zero) / (one - zero)
