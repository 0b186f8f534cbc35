"""What a recipe may say of training: a section for each model that is trained here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from edgemm.yaml_files import Strict


class Train(Strict):
    """Two-stage training of the reference model; see edgemm/reasoner/train.py."""

    threads: int = Field(2, ge=1)
    perception_epochs: int = Field(8, ge=0)
    reasoning_epochs: int = Field(8, ge=1)
    images_per_batch: int = Field(16, ge=1)
    questions_per_image: int = Field(8, ge=1)
    validation_images: int = Field(200, ge=1)
    learning_rate: float = Field(4e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    perception_weight: float = Field(0.3, ge=0)
    stop_accuracy: float = Field(1.0, gt=0, le=1, description="end stage 2 when the held-back images reach it")
    bf16: bool = True
    model: dict[str, Any] = Field({})


class TrainScenes(Strict):
    """Two-stage training of the scenes reasoner; see edgemm/reasoner/scenes_train.py.

    scenes, validation_scenes  how many are drawn to learn from, and others to judge by
    *_weight        of a loss beside that of the answers, which is 1
    exit_loss       share of the answers that leaving early may cost
    unfreeze        encoders that go on learning in stage 2; those that don't are run once a scene, not once an epoch
    patience        so many epochs of stage 2 without a better one end it
    """

    threads: int = Field(2, ge=1)
    scenes: int = Field(12_000, ge=16)
    validation_scenes: int = Field(400, ge=8)
    scenes_per_batch: int = Field(64, ge=2)
    questions_per_scene: int = Field(6, ge=1)
    alignment_epochs: int = Field(10, ge=1)
    reasoning_epochs: int = Field(20, ge=1)
    caption_epochs: int = Field(12, ge=0)
    learning_rate: float = Field(6e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    contrastive_weight: float = Field(0.2, ge=0)
    grounding_weight: float = Field(0.5, ge=0)
    triplet_weight: float = Field(0.2, ge=0)
    caption_weight: float = Field(0.2, ge=0)
    exit_weight: float = Field(0.3, ge=0)
    exit_loss: float = Field(0.003, ge=0, lt=1)
    unfreeze: tuple[Literal["text", "image", "audio"], ...] = ("text",)
    patience: int = Field(4, ge=1)
    bf16: bool = True
    model: dict[str, Any] = Field({})


class TrainPainter(Strict):
    """Training of the painter of scenes; see edgemm/reasoner/painter_train.py.

    scenes, validation_scenes  how many are drawn to learn from, and of the test split to judge by
    picture_*, plan_*, code_*  of the autoencoder, of what writes plans, and of what fills in codes
    *_rate          the largest learning rate
    """

    threads: int = Field(1, ge=1)
    scenes: int = Field(16_000, ge=16)
    validation_scenes: int = Field(200, ge=8)
    recogniser_scenes: int = Field(6_000, ge=16, description="that the judge learns from, which is trained apart")
    picture_batch: int = Field(12, ge=2)
    plan_batch: int = Field(16, ge=2)
    code_batch: int = Field(32, ge=2)
    picture_epochs: int = Field(7, ge=1)
    plan_epochs: int = Field(4, ge=1)
    code_epochs: int = Field(2, ge=1)
    picture_rate: float = Field(2e-3, gt=0)
    plan_rate: float = Field(1e-3, gt=0)
    code_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.02, ge=0)
    bf16: bool = True
    model: dict[str, Any] = Field({})


class TrainWatcher(Strict):
    """Training of the watcher of clips; see edgemm/reasoner/watcher_train.py.

    clips, validation_clips  to learn from, and of the test split to judge by
    frame_*, thing_*, clip_* of what sees single frames, of what happens to things, and of answers
    windows                  of the memory, in chunks: one is drawn for each batch; the model's own unless given
    """

    threads: int = Field(1, ge=1)
    clips: int = Field(4_000, ge=8)
    validation_clips: int = Field(200, ge=2)
    frame_batch: int = Field(32, ge=2)
    clip_batch: int = Field(16, ge=2)
    frame_epochs: int = Field(2, ge=1)
    thing_batch: int = Field(32, ge=2)
    thing_epochs: int = Field(8, ge=1)
    clip_epochs: int = Field(16, ge=1)
    windows: tuple[Annotated[int, Field(ge=1)], ...] = ()
    learning_rate: float = Field(1e-3, gt=0)
    bf16: bool = Field(True, description="of the frame encoder in training")
    model: dict[str, Any] = Field({})
