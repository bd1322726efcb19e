"""Training of the motion predictor: its losses against independent computations, and what it learns."""

import shutil

import moving_discs
import pytest
import tiny_motion_predictor
import torch
from diffusers import AutoencoderKL, DDIMScheduler, I2VGenXLUNet
from safetensors.torch import save_file
from tiny_clips import write_annotations, write_clip
from training_runs import NumberedClips, data_settings, inference, metrics, run_of  # noqa: F401

from consistent_video.loaders.checkpoint import load_folder_clip, load_folder_vision
from consistent_video.loaders.families import I2VGENXL
from consistent_video.loaders.motion_predictor import load_motion_predictor
from consistent_video.models.i2vgenxl import image_latents
from consistent_video.models.i2vgenxl_conditioning import embed_pictures
from consistent_video.models.motion_predictor import linear_interpolation
from consistent_video.models.transition_conditioning import predict_embeddings
from consistent_video.training.frozen_video import load_frozen
from consistent_video.training.motion_predictor import FILE, MotionPredictorTask
from consistent_video.training.randomness import seed_of
from consistent_video.training.settings import MotionPredictorSettings
from consistent_video.training.sources import open_dataset
from native_sampling import conditioning

FRAMES, SIDE = 4, 64
PREDICTOR = {
    "image_tokens": 2,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "max_frames": 8,
}


def settings_of(output, i2vgenxl, **changes) -> MotionPredictorSettings:
    values = {
        "output": output,
        "i2vgenxl": i2vgenxl,
        "data": data_settings(frames=FRAMES, width=SIDE, height=SIDE),
        "predictor": PREDICTOR,
        "steps": 3,
        "batch_size": 2,
        "mixed_precision": "fp32",
        "validate_every": 0,
        "tracker": "none",
    }
    return MotionPredictorSettings(**{**values, **changes})


def samples_of(*numbers):
    clips = NumberedClips(FRAMES, SIDE)
    return [clips[number] for number in numbers]


@pytest.fixture(scope="module")
def trained_file(tmp_path_factory):
    """A motion predictor off its zero initialisation."""
    return tiny_motion_predictor.write_motion_predictor(tmp_path_factory.mktemp("file") / "predictor.safetensors")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Source of three clips of noise."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        write_clip(folder / f"{number}.mp4", NumberedClips(FRAMES + 2, SIDE)[number].frames)
    rows = [{"file": f"{number}.mp4", "text": "noise"} for number in range(3)]
    return {"annotations": write_annotations(folder / "annotations.jsonl", rows), "folder": folder}


def test_frames_are_embedded_as_the_graph_embeds_pictures(tmp_path, i2vgenxl_folder, trained_file):
    data = data_settings(frames=FRAMES, width=72, height=40)
    task = MotionPredictorTask(settings_of(tmp_path, i2vgenxl_folder, pretrained=trained_file, data=data))
    clips = NumberedClips(FRAMES, SIDE)
    samples = [clips[number] for number in (4, 5)]
    embeddings, start_tokens, end_tokens = task.embed(samples)
    vision = load_folder_vision(i2vgenxl_folder, "default")
    for index, sample in enumerate(samples):
        expected = embed_pictures(vision, sample.frames, 72)[:, 0]
        assert (embeddings[index] - expected).abs().max() < 1e-6
    with torch.no_grad():
        predicted = task.network(embeddings[:, 0], embeddings[:, -1], start_tokens, end_tokens, FRAMES)
        model = load_motion_predictor(trained_file)
        starts, ends = (torch.stack([sample.frames[index] for sample in samples]) for index in (0, -1))
        expected = predict_embeddings(vision, model, starts, ends, 72, FRAMES)
    assert (predicted - expected).abs().max() < 1e-5


def test_loss_is_the_mean_squared_error_of_the_embeddings(tmp_path, i2vgenxl_folder, trained_file):
    settings = settings_of(tmp_path, i2vgenxl_folder, pretrained=trained_file, embedding_loss=0.5)
    task, samples = MotionPredictorTask(settings), samples_of(0, 7)
    vision, model = load_folder_vision(i2vgenxl_folder, "default"), load_motion_predictor(trained_file)
    with torch.no_grad():
        found = task.loss(task.network, samples)
        squares = []
        for sample in samples:
            truth = embed_pictures(vision, sample.frames, SIDE)[:, 0]
            guess = predict_embeddings(vision, model, sample.frames[:1], sample.frames[-1:], SIDE, FRAMES)[0]
            squares.append((guess - truth).square().mean())
    assert found.item() == pytest.approx(0.5 * torch.stack(squares).mean().item(), rel=1e-5)
    assert found > 1e-3


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_video_loss_is_the_published_network_s(tmp_path, i2vgenxl_folder, prediction):
    folder = shutil.copytree(i2vgenxl_folder, tmp_path / "folder")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("v_prediction", prediction), encoding="utf-8")
    settings = settings_of(tmp_path, folder, video_loss=1.0, fps=12, seed=3)
    video_loss, samples = MotionPredictorTask(settings).video_loss, samples_of(2, 3)
    width = video_loss.network.config.cross_attention_dim
    embeddings = torch.randn(2, 1, width, generator=torch.Generator().manual_seed(0))
    found = video_loss(samples, embeddings.expand(-1, FRAMES, -1))

    network = I2VGenXLUNet.from_pretrained(folder / "unet")
    vae, scheduler = AutoencoderKL.from_pretrained(folder / "vae"), DDIMScheduler.from_pretrained(folder / "scheduler")
    clip, errors = load_folder_clip(I2VGENXL, folder), []
    for sample, embedding in zip(samples, embeddings):
        posterior = vae.encode(2 * sample.frames.movedim(-1, 1) - 1).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(seed_of(3, sample.number, "posterior")))
        latents = (0.18215 * latents).transpose(0, 1).unsqueeze(0)
        noise, timestep = video_loss.noising.draw(sample, latents.shape[1:])
        noise, timesteps = noise.unsqueeze(0), torch.tensor([timestep])
        predicted = network(
            scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            torch.tensor([12.0]),
            image_latents(latents[:, :, 0], FRAMES),
            embedding,
            conditioning(clip, sample.text)[0][0],
        ).sample
        target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        errors.append((predicted - target).square().mean())
    assert found.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_noise_follows_from_the_sample_and_timesteps_reach_the_ends(tmp_path, i2vgenxl_folder):
    video_loss = MotionPredictorTask(settings_of(tmp_path, i2vgenxl_folder, video_loss=1.0)).video_loss
    sample, other = samples_of(2, 3)
    shape = torch.Size((4, FRAMES, 8, 8))
    first, again, different = (video_loss.noising.draw(drawn, shape) for drawn in (sample, sample, other))
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert not torch.equal(first[0], different[0])
    clip = NumberedClips(2, 8)
    timesteps = [video_loss.noising.draw(clip[number], torch.Size((1,)))[1] for number in range(600)]
    assert 0 <= min(timesteps) < 20 and 980 < max(timesteps) <= 999
    assert video_loss.noising.alphas[-1] == 0


def test_gradient_through_the_frozen_network_is_that_of_finite_differences(i2vgenxl_folder):
    generator = torch.Generator().manual_seed(0)

    def values(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    network = load_frozen(i2vgenxl_folder, torch.float32).double()
    width = network.config.cross_attention_dim
    clip, planes, weights = (values(1, 4, 3, 8, 8) for _ in range(3))
    text = values(1, 7, width)
    embeddings, direction = values(1, 3, width).requires_grad_(), values(1, 3, width)

    def answer(embeddings):
        inputs = {"image_latents": planes, "image_embeddings": embeddings, "fps": torch.tensor([8.0])}
        return (network(clip, torch.tensor([400]), text, **inputs) * weights).sum()

    answer(embeddings).backward()
    step = 1e-4
    with torch.no_grad():
        moved = (answer(embeddings + step * direction) - answer(embeddings - step * direction)) / (2 * step)
    slope = (embeddings.grad * direction).sum()
    assert slope.item() == pytest.approx(moved.item(), rel=1e-5)
    assert embeddings.grad.abs().amax(dim=(0, 2)).min() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())


def test_video_loss_trains_the_predictor_alone(tmp_path, i2vgenxl_folder, trained_file):
    settings = settings_of(
        tmp_path, i2vgenxl_folder, pretrained=trained_file, embedding_loss=0.0, video_loss=1.0, batch_size=1, steps=2
    )
    task = MotionPredictorTask(settings)
    frozen = {name: tensor.clone() for name, tensor in task.video_loss.network.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}

    sample, name = samples_of(1), "embedding_out.bias"
    task.loss(task.network, sample).backward()
    bias = task.network.get_parameter(name)
    gradient, step, slopes = bias.grad.clone(), 0.05, []
    direction = gradient / gradient.norm()
    with torch.no_grad():
        for sign in (1, -1):
            bias.copy_(before[name] + sign * step * direction)
            slopes.append(task.loss(task.network, sample).item() * sign / (2 * step))
        bias.copy_(before[name])
    assert sum(slopes) == pytest.approx(gradient.norm().item(), rel=2e-2)
    task.network.zero_grad()

    run_of(task, NumberedClips(FRAMES, SIDE), "motion_predictor").train()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in task.video_loss.network.state_dict().items())
    after = task.network.state_dict()
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in after)


def test_both_losses_add_up_in_half_precision_too(tmp_path, i2vgenxl_folder, trained_file):
    changes = {"pretrained": trained_file, "embedding_loss": 0.5, "video_loss": 0.25}
    sample, losses = samples_of(1), {}
    for precision in ("fp32", "bf16"):
        task = MotionPredictorTask(settings_of(tmp_path, i2vgenxl_folder, mixed_precision=precision, **changes))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses[precision] = task.loss(task.network, sample)
    kernels = [parameter for parameter in task.video_loss.network.parameters() if parameter.ndim > 1]
    assert {kernel.dtype for kernel in kernels} == {torch.bfloat16}
    with torch.no_grad():
        embeddings, *tokens = task.embed(sample)
        predicted = task.network(embeddings[:, 0], embeddings[:, -1], *tokens, FRAMES)
        video = MotionPredictorTask(settings_of(tmp_path, i2vgenxl_folder, **changes)).video_loss(sample, predicted)
    expected = 0.5 * (predicted - embeddings).square().mean() + 0.25 * video
    assert losses["fp32"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["bf16"].item() == pytest.approx(expected.item(), rel=2e-2)
    losses["bf16"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.network.parameters())


def test_untrained_error_is_that_of_linear_interpolation(tmp_path, i2vgenxl_folder, videos):
    task = MotionPredictorTask(settings_of(tmp_path, i2vgenxl_folder, held_out=[videos], held_out_clips=4))
    numbers = task.validate(task.network.state_dict(), tmp_path).numbers
    assert numbers["ratio"] == 1 and numbers["error"] == numbers["linear_error"] > 1e-5


def test_validation_measures_the_inner_frames_of_held_out_clips(tmp_path, i2vgenxl_folder, videos, trained_file):
    data = data_settings(frames=FRAMES, width=SIDE, height=SIDE, flip=1.0)
    changes = {"held_out": [videos], "held_out_clips": 4, "pretrained": trained_file, "data": data}
    task = MotionPredictorTask(settings_of(tmp_path, i2vgenxl_folder, **changes))
    numbers = task.validate(task.network.state_dict(), tmp_path).numbers
    straight = task.settings.data.model_copy(update={"sources": task.settings.held_out, "flip": 0.0})
    clips, errors = open_dataset(straight, task.settings.seed), []
    for number in range(4):
        with torch.no_grad():
            embeddings, *tokens = task.embed([clips[number]])
            ends = embeddings[:, 0], embeddings[:, -1]
            guesses = task.network(*ends, *tokens, FRAMES), linear_interpolation(*ends, FRAMES)
        errors.append([(guess - embeddings)[:, 1:-1].square().mean() for guess in guesses])
    error, linear = torch.tensor(errors).mean(dim=0).tolist()
    assert numbers == pytest.approx({"error": error, "linear_error": linear, "ratio": error / linear}, rel=1e-5)
    assert error != pytest.approx(linear, rel=1e-3)
    assert MotionPredictorTask(settings_of(tmp_path, i2vgenxl_folder)).validate({}, tmp_path).numbers == {}


def test_still_clips_have_no_ratio(tmp_path, i2vgenxl_folder):
    write_clip(tmp_path / "still.mp4", torch.full((FRAMES, SIDE, SIDE, 3), 0.4))
    annotations = write_annotations(tmp_path / "still.jsonl", [{"file": "still.mp4", "text": "still"}])
    source = {"annotations": annotations, "folder": tmp_path}
    task = MotionPredictorTask(settings_of(tmp_path, i2vgenxl_folder, held_out=[source], held_out_clips=2))
    assert task.validate(task.network.state_dict(), tmp_path).numbers == {"error": 0, "linear_error": 0}


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_what_is_saved_predicts_the_same_in_the_graph(tmp_path, i2vgenxl_folder, trained_file, dtype, stored):
    settings = settings_of(tmp_path, i2vgenxl_folder, pretrained=trained_file, save_dtype=dtype)
    task = MotionPredictorTask(settings)
    run_of(task, NumberedClips(FRAMES, SIDE), "motion_predictor").train()
    path = tmp_path / "checkpoints" / "step-00000003" / FILE
    model = load_motion_predictor(path, stored)
    assert {parameter.dtype for parameter in model.patcher.model.parameters()} == {stored}
    with torch.no_grad():
        embeddings, *tokens = task.embed(samples_of(9))
        ends = embeddings[:, 0], embeddings[:, -1]
        expected, found = task.network(*ends, *tokens, FRAMES), model.predict(*ends, *tokens, FRAMES)
    assert (found - expected).abs().max() < (1e-5 if dtype == "fp32" else 1e-2)
    start = load_motion_predictor(trained_file).predict(*ends, *tokens, FRAMES)
    assert (found - start).abs().max() > 1e-4


def test_new_networks_follow_from_the_seed_and_leave_the_global_one_alone(tmp_path, i2vgenxl_folder):
    state = torch.random.get_rng_state()
    networks = [MotionPredictorTask(settings_of(tmp_path, i2vgenxl_folder, seed=seed)).network for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, same, other = (network.state_dict()["embedding_in.weight"] for network in networks)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert networks[0]._no_split_modules == ["PredictorBlock", "IPAdapterPlusImageProjectionBlock"]
    assert networks[0].config | PREDICTOR == networks[0].config
    assert (networks[0].config["embedding_dim"], networks[0].config["vision_dim"]) == (64, 64)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in networks[0].parameters())


def test_a_network_without_picture_tokens_trains_too(tmp_path, i2vgenxl_folder):
    settings = settings_of(
        tmp_path, i2vgenxl_folder, predictor={**PREDICTOR, "image_tokens": 0}, mixed_precision="bf16"
    )
    task = MotionPredictorTask(settings)
    assert task.network._no_split_modules == ["PredictorBlock"]
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    run_of(task, NumberedClips(FRAMES, SIDE), "motion_predictor").train()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in task.network.state_dict().items())


def test_what_cannot_be_trained_is_told_before_training(tmp_path, i2vgenxl_folder, modelscope_folder, trained_file):
    other_tower = tiny_motion_predictor.write_motion_predictor(tmp_path / "other.safetensors", vision_dim=48)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    no_tower = shutil.copytree(i2vgenxl_folder, tmp_path / "no_tower", ignore=shutil.ignore_patterns("image_encoder"))
    other_target = shutil.copytree(i2vgenxl_folder, tmp_path / "other_target")
    scheduler = other_target / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text(encoding="utf-8").replace("v_prediction", "sample"), encoding="utf-8")
    empty = write_annotations(tmp_path / "none.jsonl", [{"file": "none.mp4", "text": ""}])

    def frames(number):
        return {"data": data_settings(frames=number, width=SIDE, height=SIDE)}

    cases = [
        (modelscope_folder, {}, ValueError, "describes a UNet3DConditionModel, but I2VGen-XL needs"),
        (tmp_path / "nowhere", {}, FileNotFoundError, "nowhere"),
        (no_tower, {}, FileNotFoundError, "image_encoder"),
        (other_target, {"video_loss": 1.0}, ValueError, "prediction_type 'sample', expected one of epsilon"),
        (i2vgenxl_folder, {"pretrained": tmp_path / "gone"}, FileNotFoundError, "gone was not found"),
        (i2vgenxl_folder, {"pretrained": foreign}, ValueError, "is no motion predictor"),
        (i2vgenxl_folder, {"pretrained": other_tower}, ValueError, "'vision_dim': 48.*vision tower needs.*64"),
        (i2vgenxl_folder, frames(9), ValueError, "data.frames is 9, but .* 3 to 8 frames"),
        (i2vgenxl_folder, frames(2), ValueError, "data.frames is 2, but"),
        (i2vgenxl_folder, {"pretrained": trained_file, **frames(33)}, ValueError, "is 33, but .* 3 to 32 frames"),
        (
            i2vgenxl_folder,
            {"held_out": [{"annotations": empty, "folder": tmp_path}]},
            ValueError,
            "None of the 1 clips can be used",
        ),
    ]
    for folder, changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            MotionPredictorTask(settings_of(tmp_path, folder, **changes))


@pytest.mark.slow
def test_trained_on_moving_discs_it_beats_linear_interpolation(tmp_path, i2vgenxl_folder):
    folder = shutil.copytree(i2vgenxl_folder, tmp_path / "i2vgen-xl")
    moving_discs.sharpen_tower(folder)
    frames, side = moving_discs.FRAMES, moving_discs.SIDE
    source = moving_discs.write_discs(tmp_path / "videos", range(1000, 1256))
    settings = settings_of(
        tmp_path / "run",
        folder,
        data=data_settings(sources=[source], frames=frames, width=side, height=side, strides=(1, 1)),
        predictor={**PREDICTOR, "hidden_size": 128, "attention_head_dim": 32},
        held_out=[moving_discs.write_discs(tmp_path / "held_out", range(64))],
        steps=150,
        batch_size=32,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=30,
        validate_every=150,
    )
    task = MotionPredictorTask(settings)
    assert task.validate(task.network.state_dict(), tmp_path).numbers["ratio"] == 1
    run_of(task, open_dataset(settings.data, settings.seed), "motion_predictor").train()
    measured = metrics(settings)[-1]
    assert measured["step"] == 150
    assert measured["validation/ratio"] <= 0.5
