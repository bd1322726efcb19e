"""Nodes for faces: finding them, telling who they are, comparing them."""

from comfy_api.latest import io

from ..faces.embeddings import encode_face
from ..faces.key_points import draw_key_points
from ..faces.onnx_session import PROVIDERS
from ..faces.similarity import compare_faces, plot_similarities
from ..loaders.face_model import (
    explain_missing_face_source,
    fingerprint_face_source,
    list_face_sources,
    load_face_model,
)
from .sockets import checked
from .types import FACE_EMBEDS, FACE_MODEL

CATEGORY = "ConsistentVideo/faces"


@checked
class FaceModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoFaceModelLoader",
            display_name="Load Face Model",
            category=CATEGORY,
            description="Loads what there is of the networks that find and recognise faces. Recognition needs "
            "published weights; finding and aligning faces does not.",
            search_aliases=["insightface", "antelopev2", "buffalo_l", "face detection", "face recognition", "arcface"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=list_face_sources(),
                    tooltip="A pack below models/insightface/models, the face_encoder folder of a checkpoint, or a "
                    "detector that comes without identity.",
                ),
                io.Combo.Input(
                    "provider",
                    options=list(PROVIDERS),
                    default="auto",
                    tooltip="Where ONNX networks run. auto: on the accelerator if onnxruntime supports it.",
                ),
            ],
            outputs=[FACE_MODEL.Output(tooltip="For the nodes that take faces.")],
        )

    @classmethod
    def validate_inputs(cls, source: str) -> bool | str:
        return explain_missing_face_source(source)

    @classmethod
    def fingerprint_inputs(cls, source: str, provider: str) -> str:
        return fingerprint_face_source(source)

    @classmethod
    def execute(cls, source: str, provider: str) -> io.NodeOutput:
        return io.NodeOutput(load_face_model(source, provider))


@checked
class FaceEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoFaceEncode",
            display_name="Face Encode",
            category=CATEGORY,
            description="Who is in a picture: the largest face, aligned, with its embeddings and key points.",
            search_aliases=["face embedding", "id embedding", "align face", "face crop", "face key points"],
            inputs=[
                FACE_MODEL.Input("face_model", tooltip="Of Load Face Model."),
                io.Image.Input("image", tooltip="One picture with a face."),
                io.Boolean.Input(
                    "align",
                    default=True,
                    tooltip="Cut out the face, upright and on white. Turn it off for a portrait that stays as it is.",
                ),
            ],
            outputs=[
                FACE_EMBEDS.Output(tooltip="The face, for nodes that draw this person."),
                io.Image.Output(display_name="aligned", tooltip="The aligned face."),
                io.Image.Output(display_name="key_points", tooltip="Eyes, nose and mouth of the aligned face."),
            ],
        )

    @classmethod
    def execute(cls, face_model, image, align: bool) -> io.NodeOutput:
        face = encode_face(face_model, image, align)
        height, width = face.picture.shape[1:3]
        return io.NodeOutput(face, face.picture, draw_key_points(face.aligned_points, width, height))


@checked
class FaceSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoFaceSimilarity",
            display_name="Face Similarity",
            category=CATEGORY,
            description="How much faces in pictures or frames look like one person: the cosine of their embeddings.",
            search_aliases=["identity score", "face compare", "best of n", "arcface similarity"],
            inputs=[
                FACE_MODEL.Input("face_model", tooltip="Of Load Face Model, with a recognition network."),
                io.Image.Input("reference", tooltip="A picture of the person."),
                io.Image.Input("images", tooltip="Pictures or frames to compare."),
            ],
            outputs=[
                io.Float.Output(display_name="mean", tooltip="Mean over the pictures with a face, -1 to 1."),
                io.Float.Output(
                    display_name="similarities", is_output_list=True, tooltip="One value per picture; 0 without a face."
                ),
                io.Image.Output(display_name="plot", tooltip="The values as a diagram."),
            ],
        )

    @classmethod
    def execute(cls, face_model, reference, images) -> io.NodeOutput:
        found = compare_faces(face_model, reference, images)
        return io.NodeOutput(found.mean, list(found.values), plot_similarities(found))


NODES = [FaceModelLoader, FaceEncode, FaceSimilarity]
