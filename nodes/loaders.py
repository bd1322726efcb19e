"""Nodes that turn checkpoints on disk into MODEL, CLIP and VAE."""

from comfy_api.latest import io

from ..loaders import audit, folders, single_file
from ..loaders.checkpoint import load_folder, load_folder_vision
from ..loaders.families import CONSISTI2V, FAMILIES, I2VGENXL, MODELSCOPE
from ..models.frame_vae import over_frames
from ..samplers import frames_in_batch
from .loader_inputs import CATEGORY, checkpoint_input, weight_dtype_input
from .reports import show_text
from .sockets import checked


@checked
class ModelScopeLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoModelScopeLoader",
            display_name="Load ModelScope",
            category=CATEGORY,
            description="Loads a ModelScope text-to-video checkpoint folder (also zeroscope, potat1, animov) for "
            "native samplers, LoRA loaders and VAE nodes.",
            search_aliases=["modelscope", "text to video", "t2v", "videofusion", "zeroscope", "potat1", "animov"],
            inputs=[
                checkpoint_input(MODELSCOPE, "unet, vae, text_encoder, tokenizer"),
                weight_dtype_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The 3-D UNet; takes 5-D latents (batch, 4, frames, height / 8, width / 8)."),
                io.Clip.Output(tooltip="The OpenCLIP text encoder of the checkpoint."),
                io.Vae.Output(tooltip="The image VAE of the checkpoint; decodes and encodes clips frame by frame."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return folders.explain_missing(MODELSCOPE, checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, weight_dtype: str) -> str:
        return folders.fingerprint_checkpoint(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(*load_folder(MODELSCOPE, folders.find_checkpoint(checkpoint), weight_dtype))


@checked
class I2VGenXLLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoI2VGenXLLoader",
            display_name="Load I2VGen-XL",
            category=CATEGORY,
            description="Loads an I2VGen-XL checkpoint folder: picture and text to video with native samplers, LoRA "
            "loaders and VAE nodes.",
            search_aliases=["i2vgenxl", "i2vgen", "image to video", "i2v"],
            inputs=[
                checkpoint_input(I2VGENXL, "unet, vae, text_encoder, tokenizer, image_encoder"),
                weight_dtype_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The 3-D UNet; takes what I2VGen-XL Conditioning makes."),
                io.Clip.Output(tooltip="The OpenCLIP text encoder of the checkpoint."),
                io.Vae.Output(tooltip="The image VAE of the checkpoint; decodes and encodes clips frame by frame."),
                io.ClipVision.Output(tooltip="The OpenCLIP vision tower of the checkpoint."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return folders.explain_missing(I2VGENXL, checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, weight_dtype: str) -> str:
        return folders.fingerprint_checkpoint(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, weight_dtype: str) -> io.NodeOutput:
        folder = folders.find_checkpoint(checkpoint)
        parts = load_folder(I2VGENXL, folder, weight_dtype)
        return io.NodeOutput(*parts, load_folder_vision(folder, weight_dtype))


@checked
class ConsistI2VLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoConsistI2VLoader",
            display_name="Load ConsistI2V",
            category=CATEGORY,
            description="Loads a ConsistI2V checkpoint folder: a first frame and a text to a clip that keeps the "
            "frame's look.",
            search_aliases=["consisti2v", "image to video", "i2v", "first frame", "frameinit"],
            inputs=[checkpoint_input(CONSISTI2V, "unet, vae, text_encoder, tokenizer"), weight_dtype_input()],
            outputs=[
                io.Model.Output(tooltip="The UNet with layers over time; takes what ConsistI2V Conditioning makes."),
                io.Clip.Output(tooltip="The OpenCLIP text encoder of the checkpoint."),
                io.Vae.Output(tooltip="The image VAE of the checkpoint; decodes and encodes clips frame by frame."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return folders.explain_missing(CONSISTI2V, checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, weight_dtype: str) -> str:
        return folders.fingerprint_checkpoint(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(*load_folder(CONSISTI2V, folders.find_checkpoint(checkpoint), weight_dtype))


@checked
class DiffusionModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoDiffusionModelLoader",
            display_name="Load Video Diffusion Model",
            category=CATEGORY,
            description="Loads the network alone from a single file: diffusers keys or the original ModelScope "
            "text2video_pytorch_model.pth layout.",
            search_aliases=["unet loader", "text2video_pytorch_model", "single file", "modelscope", "t2v"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=single_file.list_files(),
                    tooltip="A .safetensors, .pth, .pt, .ckpt or .bin file under models/diffusion_models or "
                    "models/text2video.",
                ),
                io.Combo.Input(
                    "family",
                    options=["auto", *FAMILIES],
                    default="auto",
                    tooltip="The published system that the weights belong to; auto recognises it by its keys.",
                ),
                weight_dtype_input(),
                io.Combo.Input(
                    "latent_batch",
                    options=list(frames_in_batch.MEANINGS),
                    default="clips",
                    optional=True,
                    advanced=True,
                    tooltip="What the batch of an image latent is. clips: clips of one frame, which sampling refuses. "
                    "frames: the frames of one clip, for graphs with Empty Latent Image, as of AnimateDiff.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The network, with the published scheduler and latent scale of its family.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, family: str, weight_dtype: str, latent_batch: str = "clips") -> str:
        return single_file.fingerprint_file(file)

    @classmethod
    def execute(cls, file: str, family: str, weight_dtype: str, latent_batch: str = "clips") -> io.NodeOutput:
        model = single_file.load_file(single_file.find_file(file), family, weight_dtype)
        return io.NodeOutput(frames_in_batch.mark(model) if latent_batch == "frames" else model)


@checked
class FrameVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoFrameVAE",
            display_name="Frame-by-Frame VAE",
            category=CATEGORY,
            description="Makes an image VAE (Load VAE) decode and encode clips frame by frame. Needed beside Load "
            "Video Diffusion Model; checkpoint loaders of this pack include it.",
            search_aliases=["vae for video", "decode clip", "decode frames", "image vae"],
            inputs=[
                io.Vae.Input("vae", tooltip="An image VAE with 4-D latents, such as the Stable Diffusion 1.x VAE.")
            ],
            outputs=[
                io.Vae.Output(
                    tooltip="The same weights; native VAE Decode, VAE Decode (Tiled) and VAE Encode handle clips "
                    "with it."
                )
            ],
        )

    @classmethod
    def execute(cls, vae) -> io.NodeOutput:
        return io.NodeOutput(over_frames(vae))


@checked
class CheckpointAudit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoCheckpointAudit",
            display_name="Audit Checkpoint",
            category=CATEGORY,
            description="Reports what a checkpoint is: family, parameters, types, missing, unexpected or misshapen "
            "keys, and what it would take to load it.",
            search_aliases=["checkpoint info", "inspect model", "missing keys", "diagnose"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=audit.list_sources(),
                    tooltip="A folder under models/diffusers, or a file under models/diffusion_models.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The report as text.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str) -> str:
        return audit.fingerprint_source(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        report = audit.report(checkpoint)
        return io.NodeOutput(report, ui=show_text(cls, report))


NODES = [ModelScopeLoader, I2VGenXLLoader, ConsistI2VLoader, DiffusionModelLoader, FrameVAE, CheckpointAudit]
