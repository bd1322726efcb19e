"""The pack's own socket types; the values behind them are described where they are made."""

from comfy_api.latest import io

STORY = io.Custom("STORY")  # story.script.Story
CHARACTER_BANK = io.Custom("CHARACTER_BANK")  # patches.character_bank.CharacterBank
PHOTOMAKER = io.Custom("PHOTOMAKER")  # models.photomaker.PhotoMaker, or the object of ComfyUI's own loader
FACE_MODEL = io.Custom("FACE_MODEL")  # faces.face_model.FaceModel
FACE_EMBEDS = io.Custom("FACE_EMBEDS")  # faces.embeddings.FaceEmbeds
MOTION_PREDICTOR = io.Custom("MOTION_PREDICTOR")  # models.motion_predictor.MotionPredictorModel
