"""Training of ConsistI2V: the loss, what is trained, the folders it begins with and the ones it writes."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import FRAMES, SIDE, NumberedClips, consisti2v_settings, inference, run_of  # noqa: F401

import tiny_checkpoints
from consistent_video.loaders.checkpoint import load_folder
from consistent_video.loaders.families import CONSISTI2V
from consistent_video.samplers.noise import mix_frames
from consistent_video.training import checkpoints
from consistent_video.training.consisti2v import SHARDED, ConsistI2VTask
from consistent_video.training.consisti2v_validation import read_picture
from consistent_video.training.randomness import seed_of

pytestmark = pytest.mark.slow

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LATENT = SIDE // 8
WRAPPED = "_checkpoint_wrapped_module."  # what torch puts into the names of layers that are computed again


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A tiny ConsistI2V folder."""
    return tiny_checkpoints.write_consisti2v(tmp_path_factory.mktemp("base") / "ConsistI2V")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory, pretrained):
    """A tiny Stable Diffusion 2.1-base folder."""
    folder = tmp_path_factory.mktemp("base") / "stable-diffusion-2-1-base"
    checkpoints.link_or_copy(pretrained, folder)
    for path in (folder / "unet").iterdir():
        path.unlink()
    torch.manual_seed(3)
    network = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(64, 64, 128, 128),
        layers_per_block=1,
        cross_attention_dim=tiny_checkpoints.TEXT_WIDTH,
        attention_head_dim=(1, 1, 2, 2),
        use_linear_projection=True,
    )
    network.save_pretrained(folder / "unet")
    return folder


class Recorder(torch.nn.Module):
    """Takes the place of the network: keeps what it is called with and predicts nothing."""

    def forward(self, noisy, timesteps, text, first_frame_latents, frame_stride):
        self.inputs = noisy, timesteps, text, first_frame_latents, frame_stride
        return torch.zeros_like(noisy)


def samples(count: int) -> list:
    dataset = NumberedClips()
    return [dataset[number] for number in range(count)]


def drawn(settings, number: int) -> tuple[int, torch.Tensor]:
    """Timestep and noise of a sample, drawn again."""
    generator = torch.Generator().manual_seed(seed_of(settings.seed, number, "noise"))
    timestep = int(torch.randint(1000, (1,), generator=generator))
    base, independent = (torch.randn(4, FRAMES, LATENT, LATENT, generator=generator) for _ in range(2))
    return timestep, (base[:, :1] + independent) / 2**0.5


def test_loss_is_the_published_one(tmp_path, pretrained):
    settings = consisti2v_settings(tmp_path, pretrained, drop_text=0, drop_first_frame=0)
    task, recorder, clips = ConsistI2VTask(settings), Recorder(), samples(2)
    loss = task.loss(recorder, clips)
    noisy, timesteps, text, first, strides = recorder.inputs
    clean = torch.cat([task.encoder.latents(clip) for clip in clips])
    expected_timesteps, noise = zip(*(drawn(settings, clip.number) for clip in clips))
    noise = torch.stack(noise)
    assert timesteps.tolist() == list(expected_timesteps)
    assert strides.tolist() == [float(clip.stride) for clip in clips]
    # betas rise linearly from 0.00085 to 0.012
    alphas = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)[timesteps].view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy, alphas.sqrt() * clean + (1 - alphas).sqrt() * noise)
    torch.testing.assert_close(first, clean[:, :, :1])
    assert loss.item() == pytest.approx((noise[:, :, 1:] ** 2).mean().item(), rel=1e-6)
    assert text.shape == (2, 77, tiny_checkpoints.TEXT_WIDTH)


def test_a_schedule_of_v_is_learnt_as_v(tmp_path, pretrained):
    folder = tmp_path / "v"
    checkpoints.link_or_copy(pretrained, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "prediction_type": "v_prediction"}
    path.unlink()
    path.write_text(json.dumps(config), encoding="utf-8")
    settings = consisti2v_settings(tmp_path / "run", folder)
    task, clip = ConsistI2VTask(settings), samples(1)[0]
    timestep, noise = drawn(settings, clip.number)
    alpha = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)[timestep]
    v = alpha.sqrt() * noise - (1 - alpha).sqrt() * task.encoder.latents(clip)[0]
    assert task.loss(Recorder(), [clip]).item() == pytest.approx((v[:, 1:] ** 2).mean().item(), rel=1e-5)


def test_clips_are_encoded_as_the_graph_encodes_first_frames(tmp_path, pretrained):
    task = ConsistI2VTask(consisti2v_settings(tmp_path, pretrained))
    clip = samples(1)[0]
    drawn = task.encoder.vae.encode_sample(clip.frames, seed_of(task.settings.seed, clip.number, "posterior"))
    torch.testing.assert_close(task.encoder.latents(clip), 0.18215 * drawn.movedim(0, 1).unsqueeze(0))


def test_noise_may_be_of_its_own_in_every_frame(tmp_path, pretrained):
    settings = consisti2v_settings(tmp_path, pretrained, noise={"mode": "progressive", "alpha": 2.0})
    task, clip = ConsistI2VTask(settings), samples(1)[0]
    generator = torch.Generator().manual_seed(seed_of(settings.seed, clip.number, "noise"))
    torch.randint(1000, (1,), generator=generator)
    base, independent = (torch.randn(4, FRAMES, LATENT, LATENT, generator=generator) for _ in range(2))
    expected = mix_frames("progressive", 2.0, base, independent)
    recorder = Recorder()
    assert task.loss(recorder, [clip]).item() == pytest.approx((expected[:, 1:] ** 2).mean().item(), rel=1e-6)


def test_texts_and_first_frames_are_dropped_as_often_as_told(tmp_path, pretrained):
    settings = consisti2v_settings(tmp_path, pretrained, drop_text=0.3, drop_first_frame=0.2)
    task = ConsistI2VTask(settings)
    clips = NumberedClips(frames=2, side=8)
    texts = sum(task._drops(clips[number], "text", 0.3) for number in range(2000))
    frames = sum(task._drops(clips[number], "first frame", 0.2) for number in range(2000))
    assert texts == pytest.approx(600, abs=60)
    assert frames == pytest.approx(400, abs=55)


def test_what_is_dropped_is_empty_or_noisy(tmp_path, pretrained):
    kept = ConsistI2VTask(consisti2v_settings(tmp_path, pretrained, drop_text=0, drop_first_frame=0))
    dropped = ConsistI2VTask(consisti2v_settings(tmp_path, pretrained, drop_text=1, drop_first_frame=1))
    recorder, clip = Recorder(), samples(1)[0]
    dropped.loss(recorder, [clip])
    noisy, _, text, first, _ = recorder.inputs
    assert torch.equal(first, noisy[:, :, :1])
    tokens = kept.encoder.clip.tokenize("")
    torch.testing.assert_close(text, kept.encoder.clip.encode_from_tokens(tokens))
    kept.loss(recorder, [clip])
    assert (recorder.inputs[2] - text).abs().max() > 1e-3


def test_captions_are_read_as_they_stand(tmp_path, pretrained):
    task = ConsistI2VTask(consisti2v_settings(tmp_path, pretrained, drop_text=0))
    clip = samples(1)[0]
    object.__setattr__(clip, "text", "a (red:1.9) bird " * 60)
    recorder = Recorder()
    task.loss(recorder, [clip])
    tokens = task.encoder.clip.tokenize(clip.text, disable_weights=True)
    assert len(tokens["h"]) > 1
    assert {weight for _, weight in tokens["h"][0]} == {1.0}
    torch.testing.assert_close(recorder.inputs[2], task.encoder.clip.encode_from_tokens({"h": tokens["h"][:1]}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_learns(tmp_path, pretrained, checkpointing):
    task = ConsistI2VTask(consisti2v_settings(tmp_path, pretrained, gradient_checkpointing=checkpointing))
    with torch.no_grad():
        for name, parameter in task.network.named_parameters():
            if name.endswith(".alpha"):
                parameter.fill_(0.5)  # at 1 what it leaves out has no gradient
    task.loss(task.network, samples(1)).backward()
    without = []
    for name, parameter in task.network.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            without.append(name)
    assert without == []


def test_checkpointing_changes_no_gradient(tmp_path, pretrained):
    gradients = []
    for checkpointing in (False, True):
        task = ConsistI2VTask(consisti2v_settings(tmp_path, pretrained, gradient_checkpointing=checkpointing))
        task.loss(task.network, samples(2)).backward()
        named = ((name.replace(WRAPPED, ""), parameter.grad) for name, parameter in task.network.named_parameters())
        gradients.append({name: gradient for name, gradient in named if gradient is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_gradient_is_the_slope_of_the_loss(tmp_path, pretrained):
    task, clips = ConsistI2VTask(consisti2v_settings(tmp_path, pretrained)), samples(1)
    name = "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    weight = task.network.get_parameter(name.replace("attentions.0.", f"attentions.0.{WRAPPED}"))
    task.loss(task.network, clips).backward()
    direction = weight.grad / weight.grad.norm()
    found = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            weight.add_(step * direction)
            found.append(task.loss(task.network, clips).item())
            weight.sub_(step * direction)
    assert (found[0] - found[1]) / 2e-2 == pytest.approx(weight.grad.norm().item(), rel=0.03)


def test_only_the_named_parts_are_trained(tmp_path, pretrained):
    settings = consisti2v_settings(tmp_path, pretrained, steps=2, trainable_modules=["conv3ds.", "tempo_attns."])
    run_of(ConsistI2VTask(settings)).train()
    before = load_file(pretrained / WEIGHTS)
    after = load_file(tmp_path / "checkpoints" / checkpoints.folder_name(2) / WEIGHTS)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("conv3ds." in key or "tempo_attns." in key for key in changed)


def test_a_part_that_names_nothing_is_an_error(tmp_path, pretrained):
    settings = consisti2v_settings(tmp_path, pretrained, trainable_modules=["temporal_layers"])
    with pytest.raises(ValueError, match="trainable_modules: 'temporal_layers' is in no parameter's name. Use all"):
        ConsistI2VTask(settings)


def test_shares_stay_in_their_range(tmp_path, pretrained):
    task = ConsistI2VTask(consisti2v_settings(tmp_path, pretrained))
    shares = [parameter for name, parameter in task.network.named_parameters() if name.endswith(".alpha")]
    with torch.no_grad():
        for share, value in zip(shares, (1.5, -0.5, 0.25)):
            share.fill_(value)
    task.after_step(task.network)
    assert [share.item() for share in shares[:3]] == [1.0, 0.0, 0.25]


def test_the_loader_loads_what_is_saved(tmp_path, pretrained):
    settings = consisti2v_settings(tmp_path, pretrained, steps=1, save_dtype="fp16")
    run = run_of(ConsistI2VTask(settings))
    run.train()
    folder = tmp_path / "checkpoints" / checkpoints.folder_name(1)
    model, clip, vae = load_folder(CONSISTI2V, folder, "fp32")
    trained = run.network.state_dict()
    loaded = model.model.diffusion_model.state_dict()
    assert loaded.keys() == trained.keys()
    for key, tensor in trained.items():
        torch.testing.assert_close(loaded[key], tensor.half().float(), msg=key)
    # what only the file had is still there
    dead = "down_blocks.0.conv3ds.0.time_emb_proj.weight"
    assert load_file(folder / WEIGHTS)[dead].shape == (64, 512)
    assert json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))["n_frames"] == FRAMES
    assert (folder / "vae" / "config.json").samefile(pretrained / "vae" / "config.json")


def test_stable_diffusion_is_the_beginning(tmp_path, image_folder):
    settings = consisti2v_settings(tmp_path, image_folder, steps=1)
    task = ConsistI2VTask(settings)
    state, image = task.network.state_dict(), load_file(image_folder / WEIGHTS)
    assert all(torch.equal(state[key], image[key]) for key in image)
    added = state.keys() - image.keys()
    assert all("conv3ds." in key or "tempo_attns." in key or key.startswith("frame_stride_") for key in added)
    # new layers are without effect: what a frame becomes does not depend on the layers over time
    x, text = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 7, tiny_checkpoints.TEXT_WIDTH)
    with torch.no_grad():
        before = task.network(x, torch.tensor([500]), text, frame_stride=1)
        for name, parameter in task.network.named_parameters():
            if "conv3ds." in name and "alpha" not in name:
                parameter.mul_(2)
        after = task.network(x, torch.tensor([500]), text, frame_stride=5)
    assert torch.equal(before, after)
    run_of(ConsistI2VTask(settings)).train()
    folder = tmp_path / "checkpoints" / checkpoints.folder_name(1)
    model, _, _ = load_folder(CONSISTI2V, folder, "fp32")
    assert model.model.scheduler_config == CONSISTI2V.scheduler


def test_stable_diffusion_1_is_refused(tmp_path, image_folder):
    folder = tmp_path / "other"
    checkpoints.link_or_copy(image_folder, folder)
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    state = load_file(folder / WEIGHTS)
    for name in ("unet/config.json", WEIGHTS):
        (folder / name).unlink()
    (folder / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    projections = [key for key in state if key.endswith("proj_in.weight")]
    save_file({**state, **{key: state[key][..., None, None] for key in projections}}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="is not Stable Diffusion 2.1-base: .* tensors of another shape"):
        ConsistI2VTask(consisti2v_settings(tmp_path / "run", folder))


def test_another_network_is_refused(tmp_path, models_folder):
    other = models_folder / "diffusers" / tiny_checkpoints.MODELSCOPE_NAME
    with pytest.raises(ValueError, match="describes a UNet3DConditionModel, expected a VideoLDMUNet3DConditionModel"):
        ConsistI2VTask(consisti2v_settings(tmp_path, other))


def test_validation_draws_clips_with_the_trained_weights(tmp_path, pretrained):
    picture = tmp_path / "first.png"
    Image.new("RGB", (40, 30), (200, 40, 90)).save(picture)
    clips = [{"prompt": "a bird", "first_frame": picture}, {"prompt": "a fish", "first_frame": picture}]
    validation = {"clips": clips, "steps": 2, "cfg_image": 1.0}
    settings = consisti2v_settings(
        tmp_path / "run", pretrained, steps=2, validate_every=1, validation=validation, tracker="tensorboard"
    )
    run = run_of(ConsistI2VTask(settings))
    run.train()
    folder = tmp_path / "run" / "validation" / checkpoints.folder_name(2)
    assert sorted(path.name for path in folder.iterdir()) == ["clip_00.mp4", "clip_01.mp4"]
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "consistent_video")).Reload()
    assert [event.step for event in events.Images("validation/clip_01")] == [1, 2]
    trained = run.task.validate(run._weights(), tmp_path).pictures
    assert {name: tuple(clip.shape) for name, clip in trained.items()} == {
        "clip_00": (FRAMES, SIDE, SIDE, 3),
        "clip_01": (FRAMES, SIDE, SIDE, 3),
    }
    assert (trained["clip_00"] - trained["clip_01"]).abs().max() > 1e-3
    start = ConsistI2VTask(settings)
    untrained = start.validate(start.network.state_dict(), tmp_path).pictures
    assert (trained["clip_00"] - untrained["clip_00"])[1:].abs().max() > 1e-3
    torch.testing.assert_close(trained["clip_00"][0], untrained["clip_00"][0])


def test_a_missing_picture_is_an_error_before_training(tmp_path, pretrained):
    clips = [{"prompt": "a bird", "first_frame": tmp_path / "gone.png"}]
    with pytest.raises(FileNotFoundError, match="validation: .*gone.png was not found"):
        ConsistI2VTask(consisti2v_settings(tmp_path, pretrained, validation={"clips": clips}))


def test_a_picture_that_is_none_is_an_error_before_training(tmp_path, pretrained):
    path = tmp_path / "cut.png"
    Image.new("RGB", (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    clips = [{"prompt": "a bird", "first_frame": path}]
    with pytest.raises(ValueError, match="validation: .*cut.png is no picture that can be read"):
        ConsistI2VTask(consisti2v_settings(tmp_path, pretrained, validation={"clips": clips}))


def test_pictures_are_turned_as_their_files_ask(tmp_path):
    upright = torch.arange(6 * 4).view(6, 4, 1).expand(-1, -1, 3).byte()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side
    Image.fromarray(upright.rot90(1).contiguous().numpy()).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_picture(tmp_path / "turned.png"), upright[None].float() / 255)


def test_a_run_does_not_begin_with_what_it_deletes(tmp_path, pretrained):
    folder = tmp_path / "checkpoints" / "step-00000004"
    checkpoints.link_or_copy(pretrained, folder)
    with pytest.raises(ValueError, match="in the folder whose old checkpoints this run deletes. Move it elsewhere"):
        ConsistI2VTask(consisti2v_settings(tmp_path, folder))


def test_angles_are_buffers_under_their_published_names(tmp_path, pretrained):
    task = ConsistI2VTask(consisti2v_settings(tmp_path, pretrained))
    published = load_file(pretrained / WEIGHTS)
    angles = {key for key in published if key.endswith(".freqs")}
    names = {name.replace(WRAPPED, "") for name, _ in task.network.named_buffers()}
    assert angles and names == angles
    assert all(torch.equal(task.network.state_dict()[key], published[key]) for key in angles)


def test_layers_to_shard_are_in_the_network(tmp_path, pretrained):
    task = ConsistI2VTask(consisti2v_settings(tmp_path, pretrained))
    assert set(SHARDED) <= {type(module).__name__ for module in task.network.modules()}
