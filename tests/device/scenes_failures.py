"""Runs that end early: out of memory in a step or in a VAE, or interrupted. The next run is as if nothing happened."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import torch

from consistent_video.samplers import reference, schedules
from native_sampling import sample

from .scenes import STEPS, Stage, noise_of, pictures_of, scene
from .scenes_video import consisid_texts

OutOfMemory = torch.OutOfMemoryError


@scene
def out_of_memory_in_a_step(stage: Stage) -> None:
    """In a feed-forward of the second step, while weights are held."""
    for family, shape in (("modelscope", (1, 4, 4, 8, 8)), ("consisid", (1, 16, 3, 8, 12))):
        model = stage.load(family)[0]
        texts = consisid_texts(stage) if family == "consisid" else stage.texts(family, "a boat", "")
        sampler = reference.reference_sampler("cogvideox_ddim" if family == "consisid" else "ddim")
        layer = next(module for name, module in model.model.diffusion_model.named_modules() if name.endswith(".ff"))
        with failing(layer, "forward", after=1, error=OutOfMemory("simulated")):
            try:
                stage.sample("failed", model, texts, noise_of(*shape), sampler)
                raise AssertionError("the run ended without an error")
            except OutOfMemory:
                pass
        stage.sample(f"after_out_of_memory.{family}", model, texts, noise_of(*shape), sampler)


@scene
def interrupt(stage: Stage) -> None:
    model, texts = stage.load("modelscope")[0], stage.texts("modelscope", "a boat", "")
    start = noise_of(1, 4, 4, 8, 8)
    try:
        sigmas = schedules.reference_sigmas(model.model.scheduler_config, STEPS)
        stop = lambda *_: comfy.model_management.interrupt_current_processing()  # noqa: E731
        sample(model, *texts, start, reference.reference_sampler(), sigmas, callback=stop)
        raise AssertionError("the run ended without an interrupt")
    except comfy.model_management.InterruptProcessingException:
        pass
    stage.sample("after_interrupt", model, texts, start)


@scene
def out_of_memory_in_a_vae(stage: Stage) -> None:
    """ComfyUI tries again in tiles."""
    for family, latents, clip, encoder in (
        ("modelscope", noise_of(1, 4, 1, 8, 40, seed=2), pictures_of(1, 64, 576, 3), "encoder"),
        ("consisid", noise_of(1, 16, 2, 8, 40, seed=2), pictures_of(5, 64, 320, 3), "moments"),
    ):
        vae = stage.load(family)[2]
        network = vae.first_stage_model
        with failing(network, "decode"):
            stage.keep(f"tiles_after.{family}.decode", vae.decode(latents))
        with failing(network, "encode"):
            stage.keep(f"tiles_after.{family}.encode", vae.encode(clip))
        picture = clip[:1] if family == "modelscope" else clip[:1].unsqueeze(1)
        with failing(*((network.encoder, "forward") if encoder == "encoder" else (network, encoder))):
            stage.keep(f"tiles_after.{family}.sample", vae.encode_sample(picture, 3))


@contextmanager
def failing(owner: object, name: str, after: int = 0, error: Exception | None = None) -> Iterator[None]:
    """Inside, a method of an object raises once, out of memory unless told otherwise, `after` calls that go well."""
    method: Callable = getattr(owner, name)
    calls = []

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == after + 1:
            raise error or OutOfMemory("simulated")
        return method(*args, **kwargs)

    vars(owner)[name] = once
    try:
        yield
    finally:
        del vars(owner)[name]
    assert len(calls) > after, f"{name} was called {len(calls)} times"
