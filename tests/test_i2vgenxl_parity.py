"""I2VGen-XL in ComfyUI against the published pipeline: same tiny weights, same noise, same pictures."""

import copy

import comfy.samplers
import pytest
import torch
from diffusers import I2VGenXLPipeline
from diffusers.pipelines.deprecated.i2vgen_xl import pipeline_i2vgen_xl as published
from exact import in_float64
from PIL import Image

from consistent_video.loaders import assembly, checkpoint
from consistent_video.loaders.families import I2VGENXL
from consistent_video.models import i2vgenxl_picture
from consistent_video.models.i2vgenxl import IMAGE_EMBEDDING, IMAGE_LATENT, image_latents
from consistent_video.models.i2vgenxl_conditioning import condition_prompts
from consistent_video.samplers import reference, schedules
from consistent_video.samplers.guidance import ImageTextGuider
from native_sampling import conditioning, sample

PROMPT = "a boat on a lake"
NEGATIVE = "blurry"
SCALE = 0.18215


@pytest.fixture(scope="module")
def pipeline(i2vgenxl_folder):
    pipeline = I2VGenXLPipeline.from_pretrained(i2vgenxl_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def loaded(i2vgenxl_folder):
    return (
        *checkpoint.load_folder(I2VGENXL, i2vgenxl_folder, "default"),
        checkpoint.load_folder_vision(i2vgenxl_folder, "default"),
    )


@pytest.fixture(scope="module")
def exact(loaded, i2vgenxl_folder):
    """What `loaded` has, the network in float64."""
    return in_float64(assembly.load_folder_network(I2VGENXL, i2vgenxl_folder, "default")), *loaded[1:]


def noise_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture_of(height, width, channels=3, seed=0):
    """A photograph-like picture: smooth shapes and fine grain, 8-bit values."""
    rows, columns = torch.linspace(0, 1, height).view(-1, 1, 1), torch.linspace(0, 1, width).view(1, -1, 1)
    phases = torch.arange(channels).view(1, 1, -1) + seed
    picture = 0.5 + 0.3 * torch.sin(9 * rows * columns + phases) + 0.2 * torch.cos(17 * rows - 5 * columns + phases)
    picture = picture + 0.05 * torch.rand(height, width, channels, generator=torch.Generator().manual_seed(seed))
    return (picture.clamp(0, 1) * 255).round() / 255


def pillow(picture):
    return Image.fromarray((picture * 255).round().to(torch.uint8).numpy())


def encode_text(pipeline, text):
    tokens = pipeline.tokenizer(
        text, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    states = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    encoder = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    return encoder.final_layer_norm(states)


def run_pipeline(pipeline, picture, noise, cfg=9.0, fps=16, steps=10, seed=5, **kwargs):
    torch.manual_seed(seed)
    height, width = 8 * noise.shape[-2], 8 * noise.shape[-1]
    return pipeline(
        image=pillow(picture),
        prompt_embeds=encode_text(pipeline, PROMPT),
        negative_prompt_embeds=encode_text(pipeline, NEGATIVE),
        latents=noise,
        height=height,
        width=width,
        num_frames=noise.shape[2],
        target_fps=fps,
        guidance_scale=cfg,
        num_inference_steps=steps,
        output_type="latent",
        **kwargs,
    ).frames


def prompts(loaded, pictures, noise, fps=16, seed=5, **kwargs):
    _, clip, vae, vision = loaded
    size = 8 * noise.shape[-1], 8 * noise.shape[-2]
    positive, negative = conditioning(clip, PROMPT), conditioning(clip, NEGATIVE)
    return condition_prompts(positive, negative, vae, vision, pictures, *size, fps, seed=seed, **kwargs)


def run(loaded, pictures, noise, cfg=9.0, steps=10, **kwargs):
    model = loaded[0]
    positive, negative = prompts(loaded, pictures, noise, **kwargs)
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, steps)
    return sample(model, positive, negative, noise, reference.reference_sampler(), sigmas, cfg=cfg) * SCALE


@pytest.mark.parametrize("text", ["", PROMPT])
def test_text_is_the_penultimate_state_after_the_final_norm(pipeline, loaded, text):
    assert (loaded[1].encode(text) - encode_text(pipeline, text)).abs().max() < 1e-5


def test_image_embedding_equals_transformers(pipeline, loaded):
    picture = picture_of(28, 28)
    pixels = pipeline.feature_extractor(
        images=picture.movedim(-1, 0), do_resize=False, do_center_crop=False, do_rescale=False, return_tensors="pt"
    ).pixel_values
    expected = pipeline.image_encoder(pixels).image_embeds
    assert (loaded[3].encode_image(picture.unsqueeze(0))["image_embeds"] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(90, 160), (200, 120), (64, 64), (17, 30), (301, 299)])
@pytest.mark.parametrize("target", [(64, 40), (128, 72), (40, 64)])
def test_preprocessing_is_bit_exact(size, target):
    picture = picture_of(*size)
    expected = published._center_crop_wide(pillow(picture), target)
    found = i2vgenxl_picture.first_frames(picture.unsqueeze(0), *target)[0]
    assert torch.equal(
        (found * 255).round().to(torch.uint8),
        torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8).view(found.shape),
    )
    square = published._resize_bilinear(published._center_crop_wide(pillow(picture), (target[0], target[0])), (28, 28))
    found = i2vgenxl_picture.vision_pictures(picture.unsqueeze(0), target[0], 28)[0]
    assert torch.equal(
        (found * 255).round().to(torch.uint8),
        torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(28, 28, 3),
    )


def test_alpha_is_dropped_and_gray_repeated():
    picture = picture_of(20, 20, 4).unsqueeze(0)
    assert torch.equal(
        i2vgenxl_picture.first_frames(picture, 16, 16), i2vgenxl_picture.first_frames(picture[..., :3], 16, 16)
    )
    gray = picture[..., :1]
    assert torch.equal(
        i2vgenxl_picture.first_frames(gray, 16, 16), i2vgenxl_picture.first_frames(gray.repeat(1, 1, 1, 3), 16, 16)
    )


def test_first_latent_is_the_published_draw_from_the_posterior(pipeline, loaded):
    picture = picture_of(48, 64).unsqueeze(0)
    expected = pipeline.vae.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.sample(torch.Generator().manual_seed(3))
    assert (loaded[2].encode_sample(picture, 3) - expected).abs().max() < 1e-5
    assert (loaded[2].encode_sample(picture, 4) - expected).abs().max() > 1e-2


def test_positions_fill_the_planes_after_the_picture():
    planes = image_latents(torch.full((1, 4, 2, 2), 7.0), 5)
    assert planes[0, 0, :, 0, 0].tolist() == [7.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("shape", [(1, 4, 4, 8, 8), (2, 4, 5, 6, 10)])
def test_one_call_of_the_network_equals_diffusers(pipeline, exact, shape):
    clips, frames = shape[0], shape[2]
    x, text = noise_of(*shape).double(), noise_of(clips, 77, 64, seed=1).double()
    latents, embeddings = noise_of(*shape, seed=2).double(), noise_of(clips, 1, 64, seed=3).double()
    timesteps, fps = torch.tensor([481.0, 20.0][:clips]), torch.tensor([16.0, 8.0][:clips])
    published_network = copy.deepcopy(pipeline.unet).double()
    expected = published_network(x, timesteps, fps, latents, embeddings, text, return_dict=False)[0]
    network = exact[0].model.diffusion_model
    found = network(x, timesteps, text, image_latents=latents, image_embeddings=embeddings, fps=fps)
    assert (found - expected).abs().max() < 1e-10
    condition = network.condition(text, latents, embeddings, fps)
    once = network(
        x, timesteps, keys_values=condition.keys_values, picture=condition.picture, fps_embedding=condition.fps
    )
    assert torch.equal(once, found)
    many = network.condition(text, latents, embeddings.expand(-1, frames, -1), fps)
    assert many.keys_values.shape[1] == frames
    per_frame = network(x, timesteps, keys_values=many.keys_values, picture=many.picture, fps_embedding=many.fps)
    assert (per_frame - found).abs().max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "cfg", "fps", "seed"),
    [
        ((1, 4, 4, 8, 8), 9.0, 16, 0),
        ((1, 4, 4, 8, 8), 1.0, 16, 0),
        ((1, 4, 5, 6, 10), 9.0, 8, 1),
        ((1, 4, 16, 8, 6), 9.0, 30, 2),
    ],
)
def test_ten_steps_equal_the_pipeline(pipeline, loaded, shape, cfg, fps, seed):
    picture, noise = picture_of(90, 120, seed=seed), noise_of(*shape, seed=seed)
    expected = run_pipeline(pipeline, picture, noise, cfg, fps)
    assert (run(loaded, picture.unsqueeze(0), noise, cfg, fps=fps) - expected).abs().max() < 1e-4


def test_two_pictures_give_the_clips_of_each(loaded):
    pictures = torch.stack([picture_of(64, 64, seed=seed) for seed in (0, 4)])
    noise = noise_of(2, 4, 4, 8, 8)
    both = run(loaded, pictures, noise, steps=3, encoding="mode")
    singles = torch.cat(
        [run(loaded, pictures[i : i + 1], noise[i : i + 1], steps=3, encoding="mode") for i in range(2)]
    )
    assert (both - singles).abs().max() < 1e-4
    assert (singles[0] - singles[1]).abs().max() > 0.1


def predict_once(model, noise, sigmas, extra_args, **options):
    """A sampler function that returns the first x0."""
    return model(noise, sigmas[:1].expand(len(noise)), **extra_args)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_by_text_and_picture(exact, rescale):
    """The guided x0 is that of three separate runs, the first without latent and embedding."""
    noise, pictures = noise_of(1, 4, 3, 8, 8), picture_of(64, 64).unsqueeze(0)
    positive, negative = prompts(exact, pictures, noise)
    blank = {key: torch.zeros_like(negative[0][1][key]) for key in (IMAGE_LATENT, IMAGE_EMBEDDING)}
    nothing = [[negative[0][0], {**negative[0][1], **blank}]]
    sigmas = torch.tensor([9.0, 0.0])
    clean = comfy.samplers.KSAMPLER(predict_once)
    alone = [sample(exact[0], prompt, prompt, noise, clean, sigmas, 1.0) for prompt in (positive, negative, nothing)]
    text, picture, none = (latent * SCALE for latent in alone)
    expected = none + 2.0 * (picture - none) + 7.5 * (text - picture)
    if rescale:
        state = exact[0].get_model_object("model_sampling").noise_scaling(sigmas[:1], noise, torch.zeros_like(noise))
        said = [velocity(state, clean, 9.0) for clean in (text, expected)]
        factor = rescale * said[0].std() / said[1].std() + 1 - rescale
        expected = clean_of(state, factor * said[1], 9.0)
    guider = ImageTextGuider(exact[0], 7.5, 2.0, rescale)
    guider.set_conds(positive, negative)
    guided = guider.sample(noise, torch.zeros_like(noise), clean, sigmas, seed=0, disable_pbar=True) * SCALE
    # x0 is float32, and guidance multiplies its rounding
    rounding = torch.finfo(torch.float32).eps * max(latent.abs().max().item() for latent in (text, picture, none))
    torch.testing.assert_close(guided, expected, rtol=0, atol=2 * (7.5 + 7.5 + 2 + 2) * rounding)
    assert (picture - none).abs().max() > 1e-3 and (text - picture).abs().max() > 1e-3


def clean_of(state, velocity, sigma):
    """x0 of a variance-exploding state and v, the network's output."""
    return state / (1 + sigma**2) - velocity * sigma / (1 + sigma**2) ** 0.5


def velocity(state, clean, sigma):
    return (state / (1 + sigma**2) - clean) * (1 + sigma**2) ** 0.5 / sigma
