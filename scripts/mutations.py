"""Faults that somebody could make in this pack, each with the test file that has to notice it; see `mutate.py`."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A fault: `found`, which stands exactly once in `file`, becomes `changed`; `tests` is a file of tests/."""

    file: str
    found: str
    changed: str
    tests: str


MUTATIONS = (
    # Noise
    Mutation("samplers/noise.py", "alpha / math.sqrt(1 + alpha**2)", "alpha / (1 + alpha)", "test_noise.py"),
    Mutation(
        "samplers/noise.py",
        "frames.append(common * frames[-1] + frame)",
        "frames.append(common * first + frame)",
        "test_noise.py",
    ),
    Mutation(
        "samplers/noise.py", "for index in range(max(wanted) + 1):", "for index in sorted(wanted):", "test_noise.py"
    ),
    Mutation(
        "samplers/noise.py",
        "return math.cos(angle) * clean + math.sin(angle) * noise",
        "return clean + math.tan(angle) * noise",
        "test_noise.py",
    ),
    Mutation("samplers/noise.py", "(level + 1) * len(table)", "level * len(table)", "test_noise.py"),
    Mutation("samplers/noise.py", "return noise / signal if signal > 0 else math.inf", "return noise", "test_noise.py"),
    # Filters
    Mutation(
        "samplers/filters.py",
        "torch.exp(-1 / (2 * self.spatial_stop**2) * squares)",
        "torch.exp(-1 / self.spatial_stop**2 * squares)",
        "test_filters.py",
    ),
    Mutation(
        "samplers/filters.py",
        "mask = squares <= 2 * self.spatial_stop",
        "mask = squares <= self.spatial_stop**2",
        "test_filters.py",
    ),
    Mutation(
        "samplers/filters.py",
        "time = self.spatial_stop / self.temporal_stop * time",
        "time = self.temporal_stop / self.spatial_stop * time",
        "test_filters.py",
    ),
    Mutation(
        "samplers/filters.py",
        "torch.fft.ifftshift(mask.to(base), dim=AXES)",
        "mask.to(base)",
        "test_filters.py",
    ),
    # Schedules
    Mutation(
        "samplers/schedules.py",
        '* (values["num_train_timesteps"] // steps) + values["steps_offset"]',
        '* (values["num_train_timesteps"] // steps)',
        "test_schedules.py",
    ),
    Mutation(
        "samplers/schedules.py",
        "return torch.linspace(first**0.5, last**0.5, total, dtype=precision).square()",
        "return torch.linspace(first, last, total, dtype=precision)",
        "test_schedules.py",
    ),
    Mutation(
        "samplers/schedules.py",
        "alphas = alphas / (scale + (1 - scale) * alphas)",
        "alphas = alphas / scale",
        "test_cogvideox_sampling.py",
    ),
    Mutation(
        "samplers/schedules.py",
        "count = min(int(steps * denoise), steps)",
        "count = min(int(steps * denoise) + 1, steps)",
        "test_schedules.py",
    ),
    # Reference samplers and FreeInit
    Mutation(
        "samplers/reference.py",
        "* (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)",
        "* (1 - alpha / next_alpha)",
        "test_reference_sampler.py",
    ),
    Mutation(
        "samplers/reference.py",
        "alphas[-1] = schedules.final_alpha(config)",
        "alphas[-1] = 1.0",
        "test_modelscope_parity.py",
    ),
    Mutation(
        "samplers/reference.py",
        "return clean.clamp(-bounds, bounds) / bounds",
        "return clean.clamp(-bounds, bounds)",
        "test_reference_sampler.py",
    ),
    Mutation(
        "samplers/cogvideox.py",
        "weight = gap / (2 * before)",
        "weight = before / (2 * gap)",
        "test_cogvideox_sampling.py",
    ),
    Mutation("samplers/cogvideox.py", "if number > 0 and not final:", "if number > 0:", "test_cogvideox_sampling.py"),
    Mutation(
        "samplers/free_init.py",
        "wanted = max(1, steps * (run + 1) // self.iterations)",
        "wanted = max(1, steps * run // self.iterations)",
        "test_free_init.py",
    ),
    Mutation(
        "samplers/free_init.py",
        "add_noise(result, initial, last_sigma)",
        "add_noise(result, draw(noise), last_sigma)",
        "test_free_init.py",
    ),
    # Guidance
    Mutation(
        "patches/dynamic_cfg.py",
        "(1 - math.cos(math.pi * position**5.0)) / 2",
        "(1 - math.cos(math.pi * position)) / 2",
        "test_dynamic_cfg.py",
    ),
    # Networks
    Mutation(
        "models/frame_vae.py",
        "mean + noise * (0.5 * log_variance",
        "mean + noise * (log_variance",
        "test_i2vgenxl_parity.py",
    ),
    Mutation("models/i2vgenxl.py", "planes[:, :, 0] = first", "planes[:, :, -1] = first", "test_i2vgenxl_parity.py"),
    Mutation("models/i2vgenxl.py", "/ max(frames - 1, 1)", "/ frames", "test_i2vgenxl_parity.py"),
    Mutation("models/consisti2v.py", "clean[:, :, place : place + 1] = first", "pass", "test_consisti2v_model.py"),
    Mutation(
        "models/consisti2v.py",
        "float(kwargs[FRAME_STRIDE])",
        "float(kwargs[FRAME_STRIDE] - 1)",
        "test_consisti2v_model.py",
    ),
    Mutation(
        "models/consisti2v_picture.py",
        "shares = [index / frames for index in range(frames)]",
        "shares = [index / (frames - 1) for index in range(frames)]",
        "test_consisti2v_picture.py",
    ),
    Mutation(
        "models/consisti2v_picture.py",
        'share if motion == "pan_right" else 1 - share',
        'share if motion == "pan_left" else 1 - share',
        "test_consisti2v_picture.py",
    ),
    Mutation(
        "models/consisid_positions.py",
        "round((base_rows - height) / 2.0)",
        "round(base_rows - height)",
        "test_consisid_network.py",
    ),
    Mutation(
        "models/consisid_positions.py",
        "torch.stack((cos, -sin, sin, cos), dim=-1)",
        "torch.stack((cos, sin, -sin, cos), dim=-1)",
        "test_consisid_network.py",
    ),
    Mutation(
        "models/consisid_identity.py",
        "torch.cat((keys, values * strength), dim=-1)",
        "torch.cat((keys * strength, values), dim=-1)",
        "test_consisid_network.py",
    ),
    Mutation(
        "models/consisid_blocks.py",
        "normed[:, text_length:].mul_(1 + scale).add_(shift)",
        "normed[:, text_length:].mul_(scale).add_(shift)",
        "test_consisid_network.py",
    ),
    Mutation(
        "models/consisid_latents.py",
        "return latent * self.picture_factor",
        "return latent * self.scale_factor",
        "test_consisid_parity.py",
    ),
    # Attention of stories
    Mutation(
        "patches/token_sharing.py",
        "return step < self._number(self.start_step, steps)",
        "return step <= self._number(self.start_step, steps)",
        "test_token_sharing.py",
    ),
    Mutation(
        "patches/token_sharing.py",
        "self.plain_early if step < self._number(self.late_step, steps) else self.plain_late",
        "self.plain_late if step < self._number(self.late_step, steps) else self.plain_early",
        "test_token_sharing.py",
    ),
    Mutation(
        "patches/token_sharing.py",
        "return self.rate_32 if tokens_apart >= COARSE else self.rate_64",
        "return self.rate_64 if tokens_apart >= COARSE else self.rate_32",
        "test_consistent_attention.py",
    ),
    Mutation(
        "patches/character_bank.py",
        "for earlier in range(visit, -1, -1):",
        "for earlier in range(visit + 1):",
        "test_character_bank.py",
    ),
    Mutation("patches/free_u.py", "half = features.shape[1] // 2", "half = features.shape[1]", "test_free_u.py"),
    Mutation(
        "patches/free_u.py", "alpha=(factor - 1) / waves.shape[1]", "alpha=factor / waves.shape[1]", "test_free_u.py"
    ),
    # Stories
    Mutation(
        "story/plan.py",
        "if panel.characters == (character.name,)",
        "if character.name in panel.characters",
        "test_story_script.py",
    ),
    Mutation("story/plan.py", "if not appears or character.name in known:", "if not appears:", "test_story_script.py"),
    Mutation(
        "story/script.py",
        "filter(None, (self.style.negative, self.user_negative))",
        "filter(None, (self.user_negative, self.style.negative))",
        "test_story_script.py",
    ),
    Mutation(
        "story/page_rows.py",
        "between = gutter * (len(shape) - 1)",
        "between = gutter * len(shape)",
        "test_comic_pages.py",
    ),
    Mutation(
        "story/page_rows.py", "return 1 / sum(1 / aspect for aspect in cell)", "return sum(cell)", "test_comic_pages.py"
    ),
    Mutation(
        "story/transitions.py",
        "*(clip[:-1].to(first) for clip in clips[:-1])",
        "*(clip[1:].to(first) for clip in clips[:-1])",
        "test_transition_nodes.py",
    ),
    Mutation(
        "story/conditioning.py",
        "length = math.lcm(*(entry[0].shape[1] for entry in entries))",
        "length = max(entry[0].shape[1] for entry in entries)",
        "test_story_conditioning.py",
    ),
    # PhotoMaker
    Mutation(
        "models/photomaker_picture.py",
        "picture.resize((width, height), Image.Resampling.BICUBIC)",
        "picture.resize((width, height), Image.Resampling.BILINEAR)",
        "test_photomaker_network.py",
    ),
    Mutation(
        "models/photomaker.py",
        "rows = text + self.mlp1(torch.cat([text, identity], dim=-1))",
        "rows = text + self.mlp1(torch.cat([identity, text], dim=-1))",
        "test_photomaker_network.py",
    ),
    Mutation(
        "faces/delayed_merge.py",
        "last = steps[min(int(merge_start * len(steps)), len(steps) - 1)]",
        "last = steps[min(int(merge_start * len(steps)) + 1, len(steps) - 1)]",
        "test_photomaker_encode.py",
    ),
    # Motion predictor
    Mutation(
        "models/motion_predictor.py",
        "return interpolated + nn.functional.pad(change, (0, 0, 1, 1))",
        "return interpolated + nn.functional.pad(change, (0, 0, 2, 0))",
        "test_motion_predictor.py",
    ),
    # Video autoencoder
    Mutation(
        "models/cogvideox_vae_chunks.py",
        "frames.add_(interpolate(shift[:, :, index], size)[:, :, None])",
        "pass",
        "test_cogvideox_vae.py",
    ),
    Mutation(
        "models/cogvideox_vae_chunks.py",
        "chunk.past[self] = window(frames, frames).clone()",
        "chunk.past[self] = window(frames - 1, frames - 1).clone()",
        "test_cogvideox_vae.py",
    ),
    # Faces
    Mutation(
        "faces/alignment.py",
        "scale = (singular * signs).sum() / variance",
        "scale = singular.sum() / variance",
        "test_face_alignment.py",
    ),
    Mutation(
        "faces/alignment.py",
        "return np.asarray(points) @ matrix[:, :2].T + matrix[:, 2]",
        "return np.asarray(points) @ matrix[:, :2] + matrix[:, 2]",
        "test_face_alignment.py",
    ),
    Mutation("faces/scrfd.py", "corners + distances[:, 2:]", "corners - distances[:, 2:]", "test_face_detection.py"),
    Mutation(
        "faces/scrfd.py",
        "return square, new_height / height",
        "return square, height / new_height",
        "test_face_detection.py",
    ),
    Mutation(
        "faces/similarity.py",
        "sum(known) / len(known) if known else 0.0",
        "sum(values) / len(values)",
        "test_face_similarity.py",
    ),
    Mutation(
        "faces/embeddings.py",
        'largest_first(faces)[0] if select == "largest" else faces[0]',
        "largest_first(faces)[0]",
        "test_face_embeddings.py",
    ),
    Mutation(
        "faces/embeddings.py",
        "vision = pooled / pooled.norm(dim=1, keepdim=True)",
        "vision = pooled",
        "test_face_embeddings.py",
    ),
    # Files
    Mutation(
        "loaders/fingerprint.py", "{stat.st_size}:{stat.st_mtime_ns}", "{stat.st_size}", "test_clips_of_a_batch.py"
    ),
    # Training
    Mutation(
        "training/clips.py",
        "start = self.first + (batch * self.processes + self.rank) * self.batch_size",
        "start = self.first + batch * self.batch_size",
        "test_training_data.py",
    ),
    Mutation("training/clips.py", "pixels = pixels.flip(2)", "pixels = pixels.flip(1)", "test_training_data.py"),
    Mutation("training/engine.py", "self.ema.to(self.accelerator.device)", "pass", "test_training_engine.py"),
    Mutation(
        "training/engine.py",
        "total += loss.detach() / settings.accumulation",
        "total += loss.detach()",
        "test_training_engine.py",
    ),
    Mutation(
        "training/consisti2v.py",
        "mse_loss(predicted[:, :, 1:].float(), target[:, :, 1:])",
        "mse_loss(predicted.float(), target)",
        "test_consisti2v_training.py",
    ),
    Mutation(
        "training/noising.py",
        "signal * noise - level * latents",
        "signal * noise + level * latents",
        "test_consisti2v_training.py",
    ),
    Mutation(
        "training/noising.py", 'seed_of(self.seed, sample.number, "noise")', "self.seed", "test_consisti2v_training.py"
    ),
    Mutation(
        "training/consisti2v.py", "parameter.clamp_(0, 1)", "parameter.clamp_(0, 2)", "test_consisti2v_training.py"
    ),
)
