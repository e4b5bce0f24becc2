"""Small models of many families, each with the reason why it is here: random weights, no files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from ird_search.data.targets import shifted_right
from ird_search.samples import SampleSet
from ird_search.task import CausalLM, Classification, Seq2SeqLM
from tests.cases import LENGTHS, Case, Problem, problem, prompts, texts, vectors
from tests.tiny import SMALL_BART, VOCABULARY

SHAPE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 3,
}
"""What most families call their sizes."""

DECODER: dict[str, Any] = SHAPE | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ: dict[str, Any] = SMALL_BART | {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
FRAMES = 20
"""Frames of Whisper's spectrograms: twice its positions."""


def build(name: str, settings: dict[str, Any], attention: str | None = None) -> Any:
    """A transformers model by the name of its class; the weights' scale shows in every layer."""
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings))
    model.config.use_cache = False  # as a model is that is lent to a search
    if attention is not None:
        model.set_attn_implementation(attention)
    return spread(model)


def spread(model: nn.Module) -> nn.Module:
    """Norms away from one, biases away from zero: what a fresh model leaves equal must differ."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def classifier(name: str, settings: dict[str, Any], attention: str | None = None) -> Problem:
    """Texts of three classes."""
    model = build(name, settings, attention)
    return problem(model, Classification(3), texts(torch.arange(6) % 3))


def language_model(name: str, settings: dict[str, Any], attention: str | None = None) -> Problem:
    return problem(build(name, settings, attention), CausalLM(), prompts())


def pairs(samples: SampleSet, start: int) -> SampleSet:
    """Each row with an answer of its own length, which is to be written behind `start`."""
    answers = [torch.randint(5, len(VOCABULARY), (n,)) for n in reversed(LENGTHS)]
    inputs = tuple(
        {**row, "decoder_input_ids": shifted_right(answer, start=start, pad=0)}
        for row, answer in zip(samples.inputs, answers, strict=True)
    )
    return SampleSet(inputs, tuple(answers), samples.ids)


def seq2seq(name: str, settings: dict[str, Any], attention: str | None = None) -> Problem:
    """Padded texts in, padded texts out."""
    samples = pairs(texts(), settings["decoder_start_token_id"])
    return problem(build(name, settings, attention), Seq2SeqLM(), samples)


def images(size: int) -> SampleSet:
    return under("pixel_values", vectors(3, size, size))


def under(key: str, samples: SampleSet) -> SampleSet:
    """The same vectors, passed by name."""
    inputs = tuple({key: row["input"]} for row in samples.inputs)
    return SampleSet(inputs, samples.labels, samples.ids)


# --- families -----------------------------------------------------------------------------------


def distilbert(attention: str) -> Problem:
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    return classifier("DistilBertForSequenceClassification", SHAPE | sizes, attention)


def electra(attention: str) -> Problem:
    settings = SHAPE | {"embedding_size": 8}
    return classifier("ElectraForSequenceClassification", settings, attention)


def modernbert(attention: str) -> Problem:
    sizes = {"local_attention": 4, "global_attn_every_n_layers": 2, "reference_compile": False}
    ids = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 1, "eos_token_id": 4}
    return classifier("ModernBertForSequenceClassification", SHAPE | sizes | ids, attention)


def deberta() -> Problem:
    """Disentangled attention: content and relative positions, with projections they share."""
    relative = {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "pooler_hidden_size": 16,
    }
    return classifier("DebertaV2ForSequenceClassification", SHAPE | relative)


def gpt2(attention: str) -> Problem:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    settings = {k: DECODER[k] for k in ("vocab_size", "pad_token_id", "bos_token_id")} | sizes
    return language_model("GPT2LMHeadModel", settings | {"eos_token_id": 2}, attention)


def opt(attention: str) -> Problem:
    sizes = {"ffn_dim": 24, "word_embed_proj_dim": 8}
    return language_model("OPTForCausalLM", DECODER | sizes, attention)


def gemma3(attention: str) -> Problem:
    """A layer that sees four tokens back, and one that sees all."""
    window = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return language_model("Gemma3ForCausalLM", DECODER | window, attention)


def mixtral(attention: str) -> Problem:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return language_model("MixtralForCausalLM", DECODER | experts, attention)


def qwen3_moe(attention: str) -> Problem:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return language_model("Qwen3MoeForCausalLM", DECODER | experts, attention)


def t5(attention: str) -> Problem:
    settings = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    tokens = {"vocab_size": len(VOCABULARY), "decoder_start_token_id": 0, "pad_token_id": 0}
    return seq2seq("T5ForConditionalGeneration", settings | tokens, attention)


def bart(attention: str) -> Problem:
    limits = {"max_position_embeddings": 32}
    return seq2seq("BartForConditionalGeneration", SEQ2SEQ | limits, attention)


def blenderbot(attention: str) -> Problem:
    limits = {"max_position_embeddings": 32}
    return seq2seq("BlenderbotForConditionalGeneration", SEQ2SEQ | limits, attention)


def vit(attention: str) -> Problem:
    model = build(
        "ViTForImageClassification", SHAPE | {"image_size": 8, "patch_size": 4}, attention
    )
    return problem(model, Classification(3), images(8))


def resnet() -> Problem:
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    model = build("ResNetForImageClassification", settings | {"layer_type": "basic"})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return problem(model, Classification(3), images(16))


WHISPER: dict[str, Any] = SEQ2SEQ | {
    "num_mel_bins": 8,
    "max_source_positions": FRAMES // 2,
    "max_target_positions": 16,
    "classifier_proj_size": 8,
    "num_labels": 3,
}


def whisper_classifier(attention: str) -> Problem:
    model = build("WhisperForAudioClassification", WHISPER, attention)
    return problem(model, Classification(3), under("input_features", vectors(8, FRAMES)))


def whisper(attention: str) -> Problem:
    """Spectrograms in, padded texts out."""
    model = build("WhisperForConditionalGeneration", WHISPER, attention)
    samples = pairs(under("input_features", vectors(8, FRAMES)), WHISPER["decoder_start_token_id"])
    return problem(model, Seq2SeqLM(), samples)


def wav2vec2(attention: str) -> Problem:
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (2, 2)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    head = {"classifier_proj_size": 8, "apply_spec_augment": False}
    model = build(
        "Wav2Vec2ForSequenceClassification", SHAPE | convolutions | positions | head, attention
    )
    return problem(model, Classification(3), under("input_values", vectors(40)))


def mamba() -> Problem:
    return language_model("MambaForCausalLM", DECODER | {"state_size": 4, "time_step_rank": 2})


# --- parts of a model ---------------------------------------------------------------------------


def added(base: Callable[[], Problem], config: Callable[[], peft.PeftConfig]) -> Problem:
    """Only what PEFT adds is a candidate; started away from zero, or half of it has no gradient."""
    plain = base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        model = peft.get_peft_model(plain.model, config())
    _move(model)
    return problem(model, plain.task, plain.samples)


class Bottleneck(nn.Module):
    """A layer with an adapter behind it: y + U tanh(D y)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.out_features, 3), nn.Linear(3, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.up(torch.tanh(self.down(y)))


def bottleneck(base: Callable[[], Problem], last: str) -> Problem:
    """An adapter behind the last linear layer of every block."""
    plain = base()
    plain.model.requires_grad_(False)
    for name, module in list(plain.model.named_modules()):
        if name.endswith(last):
            parent, _, own = name.rpartition(".")
            setattr(plain.model.get_submodule(parent), own, Bottleneck(module))
    _move(plain.model)
    return problem(plain.model, plain.task, plain.samples)


def four_bit(base: Callable[[], Problem]) -> Problem:
    """All linear layers but the last quantised; nothing left to learn."""
    from bitsandbytes.nn import Linear4bit

    plain = base()
    for name, module in list(plain.model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            layer.load_state_dict(module.state_dict())
            # Where the processor has AVX512-BF16, the first pass without gradients would pack the
            # weights into a form that none flows through.
            layer.support_avx512bf16_for_cpu = False
            parent, _, own = name.rpartition(".")
            setattr(plain.model.get_submodule(parent), own, layer.to("cpu"))  # this quantises it
    plain.model.requires_grad_(False)
    return plain


def _move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)


def tied(base: Callable[[], Problem]) -> Problem:
    """One table at the input and at the output."""
    plain = base()
    plain.model.config.tie_word_embeddings = True
    plain.model.tie_weights()
    return problem(plain.model, plain.task, plain.samples)


def frozen(base: Callable[[], Problem], *parts: str) -> Problem:
    """Parameters under these names take no gradient."""
    plain = base()
    for name, p in plain.model.named_parameters():
        p.requires_grad_(not name.startswith(parts))
    return problem(plain.model, plain.task, plain.samples)


bert = partial(classifier, "BertForSequenceClassification", SHAPE)
roberta = partial(
    classifier, "RobertaForSequenceClassification", SHAPE | {"max_position_embeddings": 34}
)
llama = partial(language_model, "LlamaForCausalLM", DECODER)
qwen3 = partial(language_model, "Qwen3ForCausalLM", DECODER)

OF_BERT = {"target_modules": ["query", "value"]}
OF_LLAMA = {"target_modules": ["q_proj", "v_proj"]}


def lora(**options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=2, init_lora_weights=False, **options)


def ia3(keys: list[str], feedforward: list[str]) -> peft.PeftConfig:
    return peft.IA3Config(target_modules=keys + feedforward, feedforward_modules=feedforward)


def both(name: str, reason: str, make: Callable[[str], Problem], path: str = "taps") -> list[Case]:
    """A family with written-out and with fused attention."""
    return [Case(f"{name}-{a}", reason, partial(make, a), path) for a in ("eager", "sdpa")]


MODELS = (
    *both("bert", "broadcast positions, a pooler", bert),
    *both("roberta", "positions counted from the padding", roberta),
    *both("distilbert", "no pooler", distilbert),
    *both("electra", "narrow embeddings, projected", electra),
    *both("modernbert", "rotary, local and global attention", modernbert),
    Case("deberta-v2", "relative positions through shared projections", deberta, "taps+vmap"),
    *both("gpt2", "transposed weights, a tied table", gpt2),
    *both("llama", "RMSNorm, grouped queries", llama),
    *both("qwen3", "norms of queries and keys", qwen3),
    *both("opt", "positions counted from the mask, with an offset", opt),
    *both("gemma3", "a sliding window, scaled embeddings", gemma3),
    *both("mixtral", "a router, experts fused in one tensor", mixtral),
    *both("qwen3-moe", "a router, experts fused in one tensor", qwen3_moe),
    *both("t5", "relative positions in a table, no biases", t5, "taps+vmap"),
    *both("bart", "an encoder and a decoder with one table", bart),
    *both("blenderbot", "positions without an axis of samples", blenderbot),
    *both("vit", "a class token and positions that a module with children holds", vit),
    Case("resnet", "BatchNorm in evaluation mode, convolutions", resnet),
    *both("whisper-audio-class", "Conv1d over frames", whisper_classifier),
    *both("whisper-seq2seq", "frames in, text out, positions by their ids", whisper),
    *both("wav2vec2", "raw audio, a weight-normed convolution", wav2vec2, "taps+vmap"),
    Case("mamba", "a selective scan; weights used without their module", mamba),
    Case("bert-lora", "low rank", lambda: added(partial(bert, "sdpa"), lambda: lora(**OF_BERT))),
    Case(
        "bert-dora",
        "a norm of the merged weight",
        lambda: added(partial(bert, "sdpa"), lambda: lora(use_dora=True, **OF_BERT)),
    ),
    Case(
        "bert-ia3",
        "a factor for every feature",
        lambda: added(partial(bert, "sdpa"), lambda: ia3(["key", "value"], ["output.dense"])),
    ),
    Case(
        "bert-bottleneck", "plain layers", lambda: bottleneck(partial(bert, "sdpa"), "output.dense")
    ),
    Case("llama-lora", "low rank", lambda: added(partial(llama, "sdpa"), lambda: lora(**OF_LLAMA))),
    Case(
        "llama-dora",
        "a norm of the merged weight",
        lambda: added(partial(llama, "sdpa"), lambda: lora(use_dora=True, **OF_LLAMA)),
    ),
    Case(
        "llama-ia3",
        "a factor for every feature",
        lambda: added(partial(llama, "sdpa"), lambda: ia3(["k_proj", "v_proj"], ["down_proj"])),
    ),
    Case(
        "llama-4bit-lora",
        "low rank on a quantised base",
        lambda: added(lambda: four_bit(partial(llama, "sdpa")), lambda: lora(**OF_LLAMA)),
        needs="bitsandbytes",
    ),
    Case(
        "llama-bottleneck", "plain layers", lambda: bottleneck(partial(llama, "sdpa"), "down_proj")
    ),
    Case("llama-tied", "a table at both ends", lambda: tied(partial(llama, "sdpa"))),
    Case(
        "bert-frozen",
        "embeddings and a layer that take no gradient",
        lambda: frozen(partial(bert, "sdpa"), "bert.embeddings", "bert.encoder.layer.0"),
    ),
)
"""Every case is checked against the plain one-sample loop, and is a row of `docs/models.md`."""
