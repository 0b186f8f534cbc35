"""Checkpoints of seeded random weights, as a user has them on disk: tiny ones for tests, full-size ones for speed.

With random weights a model's answers mean nothing: what they are good for is export, compilation and latency.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz?",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

REASONER: dict[str, Any] = {  # sizes of a ReasonerConfig
    "image_channels": (16,),
    "image_depths": (1,),
    "width": 32,
    "heads": 4,
    "text_layers": 1,
    "fusion_layers": 2,
}

SCENES: dict[str, Any] = {  # sizes of a ScenesConfig
    "width": 32,
    "heads": 4,
    "text_layers": 1,
    "image_embedding": 16,
    "image_channels": (16,),
    "image_depths": (1,),
    "audio_seconds": 2,
    "audio_channels": (8, 8, 8, 8),
    "audio_layers": 1,
    "levels": (1, 1, 1),
    "slots": 3,
    "caption_layers": 1,
    "embedding": 16,
}


FULL_SCENES: dict[str, Any] = {  # BERT base, ResNet-50 and wav2vec 2.0 base
    "width": 768,
    "heads": 12,
    "ffn_ratio": 4,
    "max_tokens": 512,
    "text_layers": 12,
    "image_size": 224,
    "image_layer": "bottleneck",
    "image_channels": (256, 512, 1024, 2048),
    "image_depths": (3, 4, 6, 3),
    "audio_channels": (512,) * 7,
    "audio_kernels": (10, 3, 3, 3, 3, 2, 2),
    "audio_strides": (5, 2, 2, 2, 2, 2, 2),
    "audio_layers": 12,
    "vocab_size": 30_522,
}


def write_scenes(directory: Path, sizes: dict[str, Any]) -> Path:
    """A scenes reasoner of these sizes, for answers, in `directory`."""
    from edgemm.models import scenes_reasoner
    from edgemm.reasoner.config import ScenesConfig
    from edgemm.reasoner.corpus import build_tokenizer
    from edgemm.reasoner.scenes_model import ScenesReasoner

    torch.manual_seed(0)
    answers = ("no", "yes", "1", "2")
    tokenizer = build_tokenizer(["is there a red circle?", *"abcdefghijklmnopqrstuvwxyz"], answers)
    vocabulary = {"answers": answers, "vocab_size": tokenizer.get_vocab_size()}
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    model = ScenesReasoner(ScenesConfig(**{**vocabulary, **sizes})).eval()
    scenes_reasoner.save(model, directory / "model", directory)
    return directory / "model"


def write(name: str, directory: Path, *, full: bool = False) -> Path:
    """The checkpoint `name` of MODELS in `directory`: config, weights, tokenizer and processors."""
    torch.manual_seed(0)
    model, processors = MODELS[name](full)
    model.eval().save_pretrained(directory)
    for processor in processors:
        processor.save_pretrained(directory)
    return directory


def bert_tokenizer() -> Any:
    return tf.BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)})


def clip(full: bool) -> tuple[Any, list[Any]]:
    """ViT-B/32 when full."""
    letters = [*"abcdefghijklmnopqrstuvwxyz?,."]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    tokenizer = tf.CLIPTokenizer(vocab={w: i for i, w in enumerate(names)}, merges=[])
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if full:
        side, config = 224, tf.CLIPConfig(text_config=ids)
    else:
        side = 32
        text = {**TINY, **ids, "vocab_size": len(names), "max_position_embeddings": 32}
        config = tf.CLIPConfig(
            text_config=text, vision_config={**TINY, "image_size": side, "patch_size": 8}, projection_dim=16
        )
    processor = tf.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return tf.CLIPModel(config), [tokenizer, processor]


def vilt(full: bool) -> tuple[Any, list[Any]]:
    """ViLT-B/32 for VQA v2's 3,129 answers when full."""
    answers = 3129 if full else 7
    labels = {
        "id2label": {i: f"answer {i}" for i in range(answers)},
        "label2id": {f"answer {i}": i for i in range(answers)},
    }
    small = {} if full else {**TINY, "image_size": 64, "patch_size": 16, "vocab_size": len(WORDS)}
    processor = tf.ViltImageProcessorPil(size={"shortest_edge": 384 if full else 64}, size_divisor=32 if full else 16)
    return tf.ViltForQuestionAnswering(tf.ViltConfig(**small, **labels)), [bert_tokenizer(), processor]


def blip(full: bool) -> tuple[Any, list[Any]]:
    """BLIP base for VQA when full."""
    side = 384 if full else 32
    ids = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    spread = {"initializer_range": 0.02}  # its own default is 1e-10: an encoder that answers 0
    if full:
        config = tf.BlipConfig(text_config=ids, vision_config={"image_size": side, **spread})
    else:
        text = {**TINY, **ids, "vocab_size": len(WORDS), "max_position_embeddings": 32, "encoder_hidden_size": 32}
        vision = {**TINY, "image_size": side, "patch_size": 16, **spread}
        config = tf.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = tf.BlipForQuestionAnswering(config)
    model.generation_config = tf.GenerationConfig(bos_token_id=2, eos_token_id=3, pad_token_id=0, max_new_tokens=8)
    processor = tf.BlipImageProcessorPil(size={"height": side, "width": side})
    return model, [bert_tokenizer(), processor]


def wav2vec2(full: bool) -> tuple[Any, list[Any]]:
    """wav2vec 2.0 base with a CTC head when full."""
    small = (
        {}
        if full
        else {**TINY, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    )
    config = tf.Wav2Vec2Config(**small, vocab_size=len(WORDS), pad_token_id=0)
    extractor = tf.Wav2Vec2FeatureExtractor(do_normalize=True)
    return tf.Wav2Vec2ForCTC(config), [bert_tokenizer(), extractor]


def vit(full: bool) -> tuple[Any, list[Any]]:
    """ViT-B/16 for ImageNet's 1,000 classes when full."""
    side = 224 if full else 32
    small = {"num_labels": 1000} if full else {**TINY, "image_size": side, "patch_size": 8, "num_labels": 5}
    processor = tf.ViTImageProcessorPil(size={"height": side, "width": side})
    return tf.ViTForImageClassification(tf.ViTConfig(**small)), [processor]


def resnet(full: bool) -> tuple[Any, list[Any]]:
    """ResNet-50 when full."""
    side = 224 if full else 64
    small = (
        {"num_labels": 1000}
        if full
        else {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
    )
    processor = tf.ConvNextImageProcessorPil(size={"shortest_edge": side}, crop_pct=0.875)
    return tf.ResNetForImageClassification(tf.ResNetConfig(**small)), [processor]


def bert(full: bool) -> tuple[Any, list[Any]]:
    """BERT base without a head when full."""
    small = {} if full else {**TINY, "vocab_size": len(WORDS), "max_position_embeddings": 32}
    return tf.BertModel(tf.BertConfig(**small)), [bert_tokenizer()]


MODELS: dict[str, Callable[[bool], tuple[Any, list[Any]]]] = {
    "bert": bert,
    "blip": blip,
    "clip": clip,
    "resnet": resnet,
    "vilt": vilt,
    "vit": vit,
    "wav2vec2": wav2vec2,
}

# Families of which tests need the weights alone, without what pre-processes: name -> model.
SMALL = {**TINY, "num_hidden_layers": 3}
TRANSCRIBER = {"d_model": 32, "vocab_size": 50, "max_target_positions": 16, "max_source_positions": 20}
LAYERED = {f"{part}_{of}": n for part in ("encoder", "decoder") for of, n in (("layers", 3), ("attention_heads", 4))}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 8}


def written_by(decoder: Any) -> Any:
    return tf.VisionEncoderDecoderModel(encoder=tf.ViTModel(tf.ViTConfig(**SMALL, **IMAGE)), decoder=decoder)


BARE: dict[str, Callable[[], Any]] = {
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**TRANSCRIBER, **LAYERED, **SPECIAL, num_mel_bins=8, encoder_ffn_dim=64, decoder_ffn_dim=64)
    ),
    "trocr": lambda: written_by(
        tf.TrOCRForCausalLM(
            tf.TrOCRConfig(
                d_model=32,
                decoder_layers=3,
                decoder_attention_heads=4,
                decoder_ffn_dim=64,
                vocab_size=50,
                max_position_embeddings=16,
                cross_attention_hidden_size=32,
            )
        )
    ),
    "vit-gpt2": lambda: written_by(
        tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=16, add_cross_attention=True)
        )
    ),
    "layoutlmv3": lambda: tf.LayoutLMv3ForSequenceClassification(
        tf.LayoutLMv3Config(
            **SMALL,
            vocab_size=50,
            input_size=16,
            patch_size=8,
            coordinate_size=6,
            shape_size=4,
            rel_pos_bins=8,
            max_rel_pos=16,
            rel_2d_pos_bins=16,
            max_rel_2d_pos=64,
            max_position_embeddings=26,
            num_labels=4,
        )
    ),
}


@torch.no_grad()
def bare(name: str) -> Any:
    """A model of BARE whose seeded weights all matter."""
    torch.manual_seed(0)
    model = BARE[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
