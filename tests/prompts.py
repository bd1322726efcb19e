"""Graphs in the API's prompt format."""

from tiny_checkpoints import I2VGENXL_NAME, MODELSCOPE_NAME


def text_to_video(
    checkpoint=MODELSCOPE_NAME, steps=4, seed=0, width=64, height=64, frames=5, text="a panda", prefix="clip"
):
    """Text to clip as the example workflow has it; node ids are names."""
    return {
        "loader": node("ConsistentVideoModelScopeLoader", checkpoint=checkpoint, weight_dtype="default"),
        "positive": node("CLIPTextEncode", clip=["loader", 1], text=text),
        "negative": node("CLIPTextEncode", clip=["loader", 1], text="blurry"),
        "latent": node(
            "ConsistentVideoEmptyLatent", vae=["loader", 2], width=width, height=height, frames=frames, batch_size=1
        ),
        "noise": node("RandomNoise", noise_seed=seed),
        "guider": node("CFGGuider", model=["loader", 0], positive=["positive", 0], negative=["negative", 0], cfg=9.0),
        "sampler": node("ConsistentVideoReferenceSampler", algorithm="auto", eta=0.0),
        "sigmas": node("ConsistentVideoReferenceScheduler", model=["loader", 0], steps=steps, denoise=1.0),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["loader", 2]),
        "video": node("CreateVideo", images=["decode", 0], fps=8.0),
        "save": node("SaveVideo", video=["video", 0], filename_prefix=prefix, format="auto", codec="auto"),
    }


def picture_to_video(image, steps=4, seed=0, width=64, height=64, frames=5, fps=16, text="a boat", prefix="clip"):
    """Picture and text to clip as the example workflow has it, over the graph of `text_to_video`."""
    prompt = text_to_video(I2VGENXL_NAME, steps, seed, text=text, prefix=prefix)
    prompt["loader"] = node("ConsistentVideoI2VGenXLLoader", checkpoint=I2VGENXL_NAME, weight_dtype="default")
    prompt["image"] = node("LoadImage", image=image)
    prompt["latent"] = node(
        "ConsistentVideoI2VGenXLConditioning",
        positive=["positive", 0],
        negative=["negative", 0],
        vae=["loader", 2],
        clip_vision=["loader", 3],
        image=["image", 0],
        width=width,
        height=height,
        frames=frames,
        fps=fps,
        batch_size=1,
    )
    prompt["guider"]["inputs"] |= {"positive": ["latent", 0], "negative": ["latent", 1]}
    prompt["sample"]["inputs"]["latent_image"] = ["latent", 2]
    return prompt


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}
