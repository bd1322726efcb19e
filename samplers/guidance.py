"""Guidance by text and by picture, each with a strength of its own."""

import comfy.model_patcher
import comfy.samplers
import torch

from ..models.base import FIRST_SIGMA
from .noise import require_exploding

NO_PICTURE = "no_picture"


class ImageTextGuider(comfy.samplers.CFGGuider):
    """Guidance over three branches: nothing, picture, picture + text (Brooks et al. 2023, arXiv 2211.09800).

    x0 = none + cfg_image * (image - none) + cfg_text * (text - image); all branches are evaluated in one batch where
    the memory allows it. ComfyUI guides by the text, so that whatever a node puts before, in the place of or after that
    guidance acts; the picture's share (cfg_image - 1) * (image - none) is added before the functions that follow the
    guidance, and the rescale comes after them. With cfg_image of at most 1 the branch without the picture is left out,
    and without rescale this is `comfy.samplers.CFGGuider` itself.

    Args:
        model_patcher: a model of this pack that is conditioned on a picture.
        cfg_text: strength of the text; 1 means no guidance, as in CFG Guider.
        cfg_image: strength of the picture; 1 and below mean no guidance.
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

    def set_conds(self, positive: list, negative: list, **options) -> None:
        """Set both prompts; the third branch is the negative one without its picture."""
        super().set_conds(positive, negative, **options)
        if self.cfg_image > 1:
            without = self.model_patcher.model.without_picture
            self.inner_set_conds({NO_PICTURE: [[text, without(extra)] for text, extra in negative]})

    def inner_sample(self, noise, latent_image, device, sampler, sigmas, *args, **kwargs) -> torch.Tensor:
        """ComfyUI's own, but the branch without the picture learns at which noise level the run starts."""
        for cond in self.conds.get(NO_PICTURE, []):
            cond[FIRST_SIGMA] = sigmas[0]
        return super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)

    def predict_noise(self, x, timestep, model_options={}, seed=None, **options) -> torch.Tensor:
        """Guided x0 for the state x at sigma `timestep` (ComfyUI's name)."""
        if self.cfg_image <= 1 and self.rescale == 0:
            return super().predict_noise(x, timestep, model_options, seed, **options)
        branches = _Branches(self.conds.get(NO_PICTURE), self.cfg_image, model_options)
        guided = super().predict_noise(x, timestep, branches.options, seed, **options)
        return guided if self.rescale == 0 else self._rescaled(guided, branches.text, x, timestep)

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


class _Branches:
    """The branches of one prediction, and the model options with which ComfyUI guides by the text and the picture.

    Args:
        no_picture: the third branch, or None.
        cfg_image: strength of the picture.
        model_options: of the run.
    """

    def __init__(self, no_picture: list | None, cfg_image: float, model_options: dict):
        self.no_picture, self.cfg_image = no_picture, cfg_image
        self._evaluate_others = model_options.get("sampler_calc_cond_batch_function")
        self.options = {**model_options, "sampler_calc_cond_batch_function": self._evaluate}
        if no_picture is not None:
            functions = model_options.get("sampler_post_cfg_function", [])
            self.options["sampler_post_cfg_function"] = [self._add_picture, *functions]
            self.options["disable_cfg1_optimization"] = True

    def _evaluate(self, args: dict) -> list[torch.Tensor]:
        """ComfyUI's two branches; in the same batch, but for ourselves, the one without the picture."""
        args = {**args, "conds": [*args["conds"], *([] if self.no_picture is None else [self.no_picture])]}
        if self._evaluate_others is not None:
            found = self._evaluate_others(args)
        else:
            found = comfy.samplers.calc_cond_batch(
                args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
            )
        self.text, self.picture, self.nothing = (*found, None)[:3]
        return [self.text, self.picture]

    def _add_picture(self, args: dict) -> torch.Tensor:
        return args["denoised"] + (self.cfg_image - 1) * (self.picture - self.nothing)


def network_output(
    sampling: torch.nn.Module, sigma: torch.Tensor, clean: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """What the network said when ComfyUI made x0 = `clean` of it: the inverse of `calculate_denoised`."""
    zero = sampling.calculate_denoised(sigma, torch.zeros_like(x), x)
    one = sampling.calculate_denoised(sigma, torch.ones_like(x), x)
    return (clean - zero) / (one - zero)
