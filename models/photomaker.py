"""PhotoMaker v1 and v2 (arXiv 2312.04461): pictures of a person -> rows that take the place of the class word's tokens.

Source: TencentARC/PhotoMaker, model.py and model_v2.py (the module names are those of the published weights). The
vision tower is ComfyUI's. Networks are built from `operations`, a namespace of layers.
"""

import comfy.clip_model
import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn

from .photomaker_resampler import FacePerceiver


class FuseMLP(nn.Module):
    """LayerNorm, two linear layers and exact GELU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, operations) -> None:
        super().__init__()
        self.layernorm = operations.LayerNorm(inputs)
        self.fc1 = operations.Linear(inputs, hidden)
        self.fc2 = operations.Linear(hidden, outputs)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.layernorm(rows))))


class FuseModule(nn.Module):
    """Merges text rows with identity rows, one to one; `hidden` are the hidden widths of its two MLPs."""

    def __init__(self, width: int, hidden: tuple[int, int], operations) -> None:
        super().__init__()
        self.mlp1 = FuseMLP(2 * width, hidden[0], width, operations)
        self.mlp2 = FuseMLP(width, hidden[1], width, operations)
        self.layer_norm = operations.LayerNorm(width)

    def forward(self, text: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
        """(R, width) and (R, width) -> (R, width)."""
        rows = text + self.mlp1(torch.cat([text, identity], dim=-1))
        return self.layer_norm(rows + self.mlp2(rows))


class IdEncoder(nn.Module):
    """What both versions share: a vision tower, identity rows per picture, and their fusion with the text.

    Args:
        vision: configuration of a CLIP vision tower, as of `comfy.clip_model.CLIPVision`.
        width: of the text embeddings (2048 for SDXL).
        fuse_hidden: as of `FuseModule`.
    """

    version: str
    tokens_per_picture: int
    face_width: int | None = None

    def __init__(self, vision: dict, width: int, fuse_hidden: tuple[int, int], operations) -> None:
        super().__init__()
        self.width, self.image_size = width, vision["image_size"]
        self.vision_model = comfy.clip_model.CLIPVision(vision, None, None, operations)
        self.fuse_module = FuseModule(width, fuse_hidden, operations)

    def identity_rows(self, pictures: torch.Tensor, faces: torch.Tensor | None) -> torch.Tensor:
        """(N, 3, S, S) and (N, face_width) or None -> (N, tokens_per_picture, width)."""
        raise NotImplementedError

    def row_counts(self, mask: torch.Tensor, rows: int) -> list[int]:
        """How many of the `rows` identity rows each prompt takes: one per class token.

        Raises:
            ValueError: there are fewer rows than class tokens.
        """
        counts = mask.sum(dim=1).tolist()
        if max(counts) > rows:
            raise ValueError(
                f"The prompt has {max(counts)} class tokens, but the pictures give {rows} identity rows. "
                f"PhotoMaker {self.version} needs {self.tokens_per_picture} class tokens per picture."
            )
        return counts

    def forward(
        self,
        id_pixel_values: torch.Tensor,
        prompt_embeds: torch.Tensor,
        class_tokens_mask: torch.Tensor,
        face_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The text embeddings with the class tokens replaced.

        Args:
            id_pixel_values: (B, N, 3, S, S), normalised as `photomaker_picture.normalise` does.
            prompt_embeds: (B, T, width); not modified.
            class_tokens_mask: (B, T), True at the class tokens. Rows are taken in order: token i belongs to picture
                i // tokens_per_picture.
            face_embeds: (B, N, face_width), used by v2.

        Returns:
            (B, T, width), of the type of `prompt_embeds`.

        Raises:
            ValueError: class tokens and pictures do not match, or v2 lacks face embeddings.
        """
        mask = class_tokens_mask.bool()
        faces = None if face_embeds is None else face_embeds.flatten(0, 1)
        rows = self.identity_rows(id_pixel_values.flatten(0, 1), faces)
        rows = rows.unflatten(0, id_pixel_values.shape[:2]).flatten(1, 2)
        counts = self.row_counts(mask, rows.shape[1])
        chosen = torch.cat([prompt[:count] for prompt, count in zip(rows, counts)])
        updated = prompt_embeds.clone()
        updated[mask] = self.fuse_module(prompt_embeds[mask].to(chosen.dtype), chosen).to(updated.dtype)
        return updated


class IdEncoderV1(IdEncoder):
    """One row per picture: two projections of the tower's pooled output, side by side.

    Args:
        projections: their widths (768 and 1280), which add up to `width`.
    """

    version = "v1"
    tokens_per_picture = 1

    def __init__(
        self,
        vision: dict,
        width: int,
        fuse_hidden: tuple[int, int],
        projections: tuple[int, int],
        operations=torch.nn,
    ) -> None:
        super().__init__(vision, width, fuse_hidden, operations)
        self.visual_projection = operations.Linear(vision["hidden_size"], projections[0], bias=False)
        self.visual_projection_2 = operations.Linear(vision["hidden_size"], projections[1], bias=False)

    def identity_rows(self, pictures: torch.Tensor, faces: torch.Tensor | None) -> torch.Tensor:
        pooled = self.vision_model(pictures)[2]
        return torch.cat([self.visual_projection(pooled), self.visual_projection_2(pooled)], dim=-1).unsqueeze(1)


class IdEncoderV2(IdEncoder):
    """Two rows per picture, from its face recognition embedding and all of the tower's tokens.

    Args:
        perceiver: settings of `FacePerceiver` beside `width` and `picture_width`.
    """

    version = "v2"

    def __init__(
        self, vision: dict, width: int, fuse_hidden: tuple[int, int], perceiver: dict, operations=torch.nn
    ) -> None:
        super().__init__(vision, width, fuse_hidden, operations)
        self.tokens_per_picture, self.face_width = perceiver["tokens"], perceiver["face_width"]
        self.qformer_perceiver = FacePerceiver(
            width, picture_width=vision["hidden_size"], operations=operations, **perceiver
        )

    def identity_rows(self, pictures: torch.Tensor, faces: torch.Tensor | None) -> torch.Tensor:
        if faces is None:
            raise ValueError(
                "PhotoMaker v2 needs a face recognition embedding of every picture, and got none. Connect a face "
                "model (ArcFace), or use a v1 file, which needs pictures only."
            )
        return self.qformer_perceiver(faces.to(pictures.dtype), self.vision_model(pictures)[0])

    def row_counts(self, mask: torch.Tensor, rows: int) -> list[int]:
        """As of v1, but a picture's rows belong together: every row is taken, or ValueError."""
        counts = super().row_counts(mask, rows)
        if set(counts) != {rows}:
            raise ValueError(
                f"The prompt has {counts[0]} class tokens, but the pictures give {rows} identity rows. PhotoMaker v2 "
                f"needs {self.tokens_per_picture} per picture; encode with PhotoMaker Encode of this pack."
            )
        return counts


class PhotoMaker:
    """Value of the PHOTOMAKER socket: a network in ComfyUI's memory management.

    It is called as the object of ComfyUI's own PhotoMaker nodes is, so that those take a v1 object.

    Args:
        patcher: holds an `IdEncoder`.
    """

    def __init__(self, patcher: comfy.model_patcher.ModelPatcher) -> None:
        network = patcher.model
        self.patcher = patcher
        self.load_device = patcher.load_device
        self.version, self.tokens_per_picture = network.version, network.tokens_per_picture
        self.width, self.image_size, self.face_width = network.width, network.image_size, network.face_width

    def __call__(
        self,
        id_pixel_values: torch.Tensor,
        prompt_embeds: torch.Tensor,
        class_tokens_mask: torch.Tensor,
        face_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As of `IdEncoder.forward`, on any device; the result is on that of `prompt_embeds`.

        Raises:
            ValueError: pictures, text embeddings or face embeddings of the wrong size, or as of `IdEncoder.forward`.
        """
        self._check(id_pixel_values, prompt_embeds, class_tokens_mask, face_embeds)
        comfy.model_management.load_models_gpu([self.patcher])
        device = self.load_device
        updated = self.patcher.model(
            id_pixel_values.to(device, torch.float32),
            prompt_embeds.to(device),
            class_tokens_mask.to(device),
            None if face_embeds is None else face_embeds.to(device, torch.float32),
        )
        return updated.to(prompt_embeds.device)

    def _check(
        self, pictures: torch.Tensor, prompt: torch.Tensor, mask: torch.Tensor, faces: torch.Tensor | None
    ) -> None:
        if prompt.shape[-1] != self.width:
            raise ValueError(
                f"The text embeddings are {prompt.shape[-1]} wide, but this PhotoMaker file expects {self.width}. Use "
                "the CLIP of an SDXL checkpoint."
            )
        if mask.shape != prompt.shape[:2]:
            raise ValueError(
                f"The class token mask covers {mask.shape[-1]} tokens, the text has {prompt.shape[-2]}. "
                "Shorten the text to 75 tokens, or encode with PhotoMaker Encode of this pack."
            )
        if pictures.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"The pictures are {pictures.shape[-1]}x{pictures.shape[-2]} pixels, expected "
                f"{self.image_size}x{self.image_size}. Prepare them with normalise() for that size."
            )
        if self.face_width and faces is not None and faces.shape[1:] != (pictures.shape[1], self.face_width):
            raise ValueError(
                f"The face embeddings have the shape {tuple(faces.shape[1:])}, expected {pictures.shape[1]} rows of "
                f"{self.face_width} values, one per picture. Connect the face embeddings of these pictures."
            )
