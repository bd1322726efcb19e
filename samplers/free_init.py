"""FreeInit (Wu et al. 2023, arXiv 2312.07537) around any other sampler.

A clip is denoised several times. Each further run starts from noise whose low frequencies are those of the clip before
it, noised to the last training timestep with the noise of the first run: what training leaves in such a state, and
plain noise lacks. Its high frequencies are fresh.
"""

from collections.abc import Callable

import comfy.context_windows
import comfy.k_diffusion.sampling
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch

from . import run_start, schedules
from .filters import LowPass, mix_low_high
from .noise import add_noise, noise_over_signal, require_frames
from .step_noise import RowNoise, row_seeds

Callback = Callable[[int, torch.Tensor, torch.Tensor, int], None]

# Above this sigma the last training timestep keeps less than a thousandth of the clip: nothing to carry over. Such
# models (flow, zero terminal signal-to-noise ratio) take the noise level that FreeInit was published with, the last one
# of Stable Diffusion's betas.
NO_SIGNAL_SIGMA = 1000.0
PUBLISHED_SIGMA = 14.6146

# The sigma below which a run counts as finished: ComfyUI's uni_pc writes 0.001 in place of 0 into the sigmas it gets.
FINISHED_SIGMA = 0.005

# Tells the fresh noise of a seed from every other noise of that seed.
FRESH_NOISE = "FreeInit"
MAX_SEED = 2**64 - 1


class FreeInit(comfy.samplers.Sampler):
    """Denoises a clip several times, each time from noise that has the low frequencies of the run before.

    Only the noise differs between the runs; a latent image and a mask are handed to each of them. The first run is the
    wrapped sampler's own. Whatever a node put around a run, such as EasyCache, starts afresh with each of them.

    Args:
        sampler: the sampler that does each run.
        iterations: number of runs, at least 1.
        fast_sampling: run i of N takes steps * i // N steps, at least one, and only the last takes all of them.
        low_pass: which frequencies are kept.

    Raises:
        ValueError: less than one iteration.
    """

    def __init__(self, sampler: comfy.samplers.Sampler, iterations: int, fast_sampling: bool, low_pass: LowPass):
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}. Choose 1 (plain sampling) or more; 3 to 5 are usual.")
        self.sampler, self.iterations, self.fast_sampling, self.low_pass = sampler, iterations, fast_sampling, low_pass

    @torch.no_grad()
    def sample(
        self,
        model_wrap: comfy.samplers.CFGGuider,
        sigmas: torch.Tensor,
        extra_args: dict,
        callback: Callback | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
        **options,
    ) -> torch.Tensor:
        """Denoise, as ComfyUI's guiders call it.

        Args:
            model_wrap: a guider that carries the model as `inner_model`.
            sigmas: (n + 1,), ending at 0.
            extra_args: keyword arguments of the model; "seed" also seeds the fresh noise.
            callback: called with (step, x0, state, total), steps and total counted over all runs.
            noise: (B, C, F, H, W), unit variance.
            latent_image: same shape, or None.
            denoise_mask: same shape, 1 where to denoise, or None.
            disable_pbar: hide the progress bar.
            options: what a newer ComfyUI adds; handed to the sampler of each run.

        Returns:
            The latent (B, C, F, H, W) of the last run.

        Raises:
            ValueError: a latent without a frame axis, no noise, sigmas that do not end at 0, or a model that adds no
                noise.
        """
        base_model = model_wrap.inner_model
        last_sigma = carried_sigma(base_model.model_sampling)
        _check_run(noise, sigmas)
        config = getattr(base_model, "scheduler_config", None)
        plans = self.plan_runs(sigmas, config)
        mask = self.low_pass.mask(noise.shape[-3:], noise.device)
        draw = RowNoise(row_seeds(extra_args.get("seed"), noise, FRESH_NOISE))
        initial, result = noise.clone(), None
        with _Progress(plans, callback, disable_pbar) as progress:
            for number, plan in enumerate(plans):
                if number > 0:
                    fresh = _for_windows(draw(noise), extra_args)
                    noise = mix_low_high(add_noise(result, initial, last_sigma), fresh, mask)
                    _forget_run(model_wrap)
                args, report = _run_args(extra_args, plan, number), progress.of_run(number)
                sampler = self._sampler_of(args.get("seed"), initial)
                result = _run(model_wrap, sampler, plan, args, report, noise, latent_image, denoise_mask, options)
        return result

    def _sampler_of(self, seed: int | None, initial: torch.Tensor) -> comfy.samplers.Sampler:
        """The wrapped sampler; if it draws noise for each clip, then by the initial noise of the first run."""
        seeded = getattr(self.sampler, "seeded", None)
        return self.sampler if seeded is None else seeded(row_seeds(seed, initial))

    def plan_runs(self, sigmas: torch.Tensor, config: dict | None) -> list[torch.Tensor]:
        """Return the sigmas of each run; for `config` see `shorten`."""
        return [self._run_sigmas(sigmas, run, config) for run in range(self.iterations)]

    def _run_sigmas(self, sigmas: torch.Tensor, run: int, config: dict | None) -> torch.Tensor:
        """The sigmas of one run, counted from 0; a copy, because there are samplers that change theirs."""
        steps = len(sigmas) - 1
        wanted = max(1, steps * (run + 1) // self.iterations)
        return shorten(sigmas, wanted, config) if self.fast_sampling and wanted < steps else sigmas.clone()


def shorten(sigmas: torch.Tensor, steps: int, config: dict | None = None) -> torch.Tensor:
    """The same schedule in fewer steps.

    Args:
        sigmas: (n + 1,).
        steps: 1..n.
        config: the model's scheduler configuration. When the sigmas are its reference schedule, so are the returned
            ones; otherwise they are read off between the given ones, from the first on.

    Returns:
        (steps + 1,), on the device of `sigmas`, ending as they do.
    """
    count = len(sigmas) - 1
    if config is not None and schedules.follows_reference(config, sigmas):
        return schedules.reference_sigmas(config, steps).to(sigmas)
    given = sigmas.cpu().double()  # some accelerators have no float64
    positions = torch.arange(steps, dtype=torch.float64) * count / steps
    before, after = positions.floor().long(), positions.ceil().long()
    levels = torch.lerp(given[before], given[after], positions - before)
    return torch.cat((levels, given[-1:])).to(sigmas)


class _Progress:
    """One progress bar and one count of steps over all runs."""

    def __init__(self, plans: list[torch.Tensor], callback: Callback | None, hidden: bool):
        self.steps = [len(plan) - 1 for plan in plans]
        self.callback = callback
        self.bar = comfy.k_diffusion.sampling.tqdm(total=sum(self.steps), disable=hidden)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def of_run(self, run: int) -> Callback:
        """The callback of one run, counted from 0. Adaptive samplers count past their total, which is cut off."""
        offset, steps, total = sum(self.steps[:run]), self.steps[run], sum(self.steps)

        def report(step: int, denoised: torch.Tensor, state: torch.Tensor, _: int) -> None:
            done = offset + min(step, steps - 1)
            self.bar.update(done + 1 - self.bar.n)
            if self.callback is not None:
                self.callback(done, denoised, state, total)

        return report


def carried_sigma(model_sampling: torch.nn.Module) -> float:
    """Noise over signal of the state that carries a clip into the next run: the last training timestep's."""
    sigma = noise_over_signal(model_sampling, model_sampling.sigma_max)
    return PUBLISHED_SIGMA if sigma > NO_SIGNAL_SIGMA else sigma


def _check_run(noise: torch.Tensor, sigmas: torch.Tensor) -> None:
    require_frames(noise, "FreeInit")
    if not noise.any():
        raise ValueError(
            "FreeInit replaces the initial noise, but there is none. Connect a noise, such as RandomNoise, and leave "
            "the whole run to one sampler node."
        )
    if sigmas[-1] > FINISHED_SIGMA:
        raise ValueError(
            f"The sigmas end at {float(sigmas[-1]):.4g}; FreeInit needs a finished clip after each run. Give it sigmas "
            "that end at 0."
        )


def _run_args(extra_args: dict, sigmas: torch.Tensor, run: int) -> dict:
    """The model's arguments for one run: its sigmas, and a seed of its own for what the sampler draws."""
    args = {**extra_args, "model_options": _with_sigmas(extra_args.get("model_options", {}), sigmas)}
    if extra_args.get("seed") is not None:
        args["seed"] = (extra_args["seed"] + run) & MAX_SEED
    return args


def _with_sigmas(options: dict, sigmas: torch.Tensor) -> dict:
    return {**options, "transformer_options": {**options.get("transformer_options", {}), "sample_sigmas": sigmas}}


def _run(
    guider: comfy.samplers.CFGGuider,
    sampler: comfy.samplers.Sampler,
    sigmas: torch.Tensor,
    extra_args: dict,
    callback: Callback,
    noise: torch.Tensor,
    latent_image: torch.Tensor | None,
    denoise_mask: torch.Tensor | None,
    options: dict,
) -> torch.Tensor:
    """One run inside all that nodes put around a run, which is where they keep what they remember of it."""
    kept = guider.model_options["transformer_options"].get("wrappers", {})
    kept = kept.get(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, {})
    # This pack's own look at a run prepares the prompts and finishes the clip, once for all runs.
    wrappers = [wrapper for key, found in kept.items() if key != run_start.KEY for wrapper in found]

    def sample(noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *_, **__):
        if wrappers:
            extra_args["model_options"] = _joined(extra_args["model_options"], guider.model_options, sigmas)
        return sampler.sample(
            guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar=True, **options
        )

    executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(sample, guider, wrappers)
    seed, shapes = extra_args.get("seed"), [noise.shape]
    return executor.execute(
        noise, latent_image, sampler, sigmas, denoise_mask, callback, True, seed, latent_shapes=shapes
    )


def _joined(given: dict, current: dict, sigmas: torch.Tensor) -> dict:
    """The options that a sampler was given, with what the wrappers of its run have made of the guider's since."""
    current = comfy.model_patcher.create_model_options_clone(current)
    transformer_options = {**given["transformer_options"], **current.get("transformer_options", {})}
    return _with_sigmas({**given, **current, "transformer_options": transformer_options}, sigmas)


def _for_windows(noise: torch.Tensor, extra_args: dict) -> torch.Tensor:
    """Fresh noise (B, C, F, H, W), shuffled over ComfyUI's context windows as they had the initial noise shuffled."""
    windows = extra_args.get("model_options", {}).get("context_handler")
    if not getattr(windows, "freenoise", False):
        return noise
    lengths = windows.context_length, windows.context_overlap
    return comfy.context_windows.apply_freenoise(noise, windows.dim, *lengths, extra_args["seed"])


def _forget_run(guider: comfy.samplers.CFGGuider) -> None:
    """Put the model, its hooks and its control nets into the state in which a run finds them."""
    guider.model_patcher.cleanup()
    guider.model_patcher.pre_run()
    for conds in guider.conds.values():
        for hooks in filter(None, (cond.get("hooks") for cond in conds)):
            for hook in hooks.hooks:
                hook.initialize_timesteps(guider.inner_model)
        comfy.samplers.pre_run_control(guider.inner_model, conds)
