"""Nodes for PhotoMaker: pictures of a person and a text become CONDITIONING."""

from comfy_api.latest import io

from ..faces.photomaker import encode, read_counts
from ..faces.photomaker_faces import faces_for_photomaker
from ..loaders import photomaker as files
from .sockets import checked
from .types import FACE_EMBEDS, FACE_MODEL, PHOTOMAKER

CATEGORY = "ConsistentVideo/photomaker"


@checked
class PhotoMakerLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoPhotoMakerLoader",
            display_name="Load PhotoMaker",
            category=CATEGORY,
            description="Loads PhotoMaker v1 or v2, whichever the file is, and puts its LoRA on the model.",
            search_aliases=["photomaker", "face reference", "identity", "id encoder"],
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion XL model."),
                io.Combo.Input(
                    "file",
                    options=files.FILES.names(),
                    tooltip=f"A file in models/photomaker; published as {files.REPOSITORIES}.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of the LoRA that belongs to the encoder; 0 leaves it out.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with PhotoMaker's LoRA."),
                PHOTOMAKER.Output(tooltip="The encoder, for PhotoMaker Encode and Story Sampler."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return files.FILES.check(file)

    @classmethod
    def fingerprint_inputs(cls, model, file: str, lora_strength: float) -> str:
        return files.FILES.fingerprint(file)

    @classmethod
    def execute(cls, model, file: str, lora_strength: float) -> io.NodeOutput:
        photomaker, lora = files.load_photomaker(files.FILES.find(file))
        return io.NodeOutput(files.apply_lora(model, lora, lora_strength, file), photomaker)


@checked
class PhotoMakerEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoPhotoMakerEncode",
            display_name="PhotoMaker Encode",
            category=CATEGORY,
            description="A text and pictures of a person become conditioning: the word before img becomes the person.",
            search_aliases=["photomaker", "face reference", "identity", "face id"],
            inputs=[
                PHOTOMAKER.Input("photomaker", tooltip="Of Load PhotoMaker, or of ComfyUI's own loader (v1)."),
                io.Clip.Input("clip", tooltip="The CLIP of the SDXL checkpoint."),
                io.Image.Input("images", tooltip="Pictures of the person; 1 to 4 are usual."),
                io.String.Input(
                    "text",
                    default="a photo of a man img reading a book",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Has the trigger word directly after the word for the person: a man img, a woman img.",
                ),
                io.Float.Input(
                    "merge_start",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps after which the person joins; before, the text alone counts. Higher: "
                    "more of the text, less likeness.",
                ),
                FACE_MODEL.Input("face_model", optional=True, tooltip="Finds the faces for PhotoMaker v2."),
                FACE_EMBEDS.Input(
                    "face_embeds",
                    optional=True,
                    tooltip="For PhotoMaker v2 in place of face_model, of one picture.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="The schedule that will be sampled: the person then joins at the very step that is "
                    "published. Without it, at that share of the model's schedule.",
                ),
                io.String.Input(
                    "trigger",
                    default="img",
                    optional=True,
                    advanced=True,
                    tooltip="The trigger word; ComfyUI's own node takes photomaker.",
                ),
                io.String.Input(
                    "pictures_per_person",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="For several people, numbers with commas such as 2, 1: how many of the pictures belong to "
                    "each trigger word, in the order of the text.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="The text alone in the early steps, then with the person."),
                io.Conditioning.Output(display_name="text_only", tooltip="The text without trigger words."),
            ],
        )

    @classmethod
    def execute(
        cls,
        photomaker,
        clip,
        images,
        text: str,
        merge_start: float,
        face_model=None,
        face_embeds=None,
        sigmas=None,
        trigger: str = "img",
        pictures_per_person: str = "",
    ) -> io.NodeOutput:
        embeddings, shown = faces_for_photomaker(photomaker, images, face_model, face_embeds)
        merged, text_only = encode(
            photomaker,
            clip,
            images,
            text,
            face_embeds=embeddings,
            has_face=shown,
            trigger=trigger,
            counts=read_counts(pictures_per_person),
            merge_start=merge_start,
            sigmas=sigmas,
        )
        return io.NodeOutput(merged, text_only)


NODES = [PhotoMakerLoader, PhotoMakerEncode]
