"""Tiny models and tokenizers, made on the spot: real classes of real libraries, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>")
WORDS = """a the this that film book play plot is was seems and but not very
good bad fine dull great poor bright slow one two three four . ,"""
VOCABULARY = {word: i for i, word in enumerate((*SPECIAL, *WORDS.split()))}

TEXT_ROWS: list[dict[str, Any]] = [
    {"text": "a good film", "label": 1},
    {"text": "a bad book and a dull plot", "label": 0},
    {"text": "this play was great .", "label": 1},
    {"text": "that is not good", "label": 0},
    {"text": "very bright , very fine", "label": 1},
    {"text": "poor", "label": 0},
]
"""Six rows, two classes, lengths that differ."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """[CLS] A [SEP], or [CLS] A [SEP] B [SEP]; one token a word, lower case only."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, VOCABULARY[t]) for t in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_lm_tokenizer() -> PreTrainedTokenizerFast:
    """Words only, an end of text, and no padding token, as GPT-2's."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>", bos_token="<eos>"
    )


def tiny_seq2seq_tokenizer() -> PreTrainedTokenizerFast:
    """A <eos>, as T5's; no token types."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", VOCABULARY["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_bert(
    num_labels: int = 2, *, seed: int = 0, **config: Any
) -> BertForSequenceClassification:
    """Two layers, hidden 16, 32 positions."""
    settings: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "num_labels": num_labels,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(**{**settings, **config}))


def tiny_gpt2(*, seed: int = 0, model: type[nn.Module] = GPT2LMHeadModel, **config: Any) -> Any:
    """Two layers, hidden 16, 32 positions, no padding token; `model` may be another GPT-2 class."""
    settings: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": VOCABULARY["<eos>"],
        "eos_token_id": VOCABULARY["<eos>"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(GPT2Config(**{**settings, **config}))


def tiny_t5(*, seed: int = 0, **config: Any) -> T5ForConditionalGeneration:
    """One layer on each side, hidden 16, relative positions."""
    settings: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "pad_token_id": VOCABULARY["[PAD]"],
        "decoder_start_token_id": VOCABULARY["[PAD]"],
        "eos_token_id": VOCABULARY["<eos>"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(T5Config(**{**settings, **config}))


SMALL_BART: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
"""Sizes of BART and its kin."""


def tiny_bart(*, seed: int = 0, **config: Any) -> BartForConditionalGeneration:
    """One layer on each side, hidden 16, 12 positions."""
    settings: dict[str, Any] = {
        **SMALL_BART,
        "max_position_embeddings": 12,
        "pad_token_id": VOCABULARY["[PAD]"],
        "bos_token_id": VOCABULARY["[CLS]"],
        "eos_token_id": VOCABULARY["<eos>"],
        "decoder_start_token_id": VOCABULARY["<eos>"],
        "forced_eos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BartForConditionalGeneration(BartConfig(**{**settings, **config}))


def tiny_vit(num_labels: int = 2, *, seed: int = 0) -> ViTForImageClassification:
    """Two layers, hidden 16, images [3, 8, 8], patches of 4 × 4."""
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": num_labels,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(**settings))


def save_tiny_bert(
    directory: Path, num_labels: int = 2, *, head: bool = True, **config: Any
) -> Path:
    """A saved tiny BERT with its tokenizer; without `head`, as a pretrained encoder comes."""
    model = tiny_bert(num_labels, **config)
    (model if head else model.bert).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
