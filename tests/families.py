"""Tiny random models of every supported family, their tokenizers, and texts, all made in memory."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import nn
from transformers.models.deberta_v2 import modeling_deberta_v2

MAX_TOKENS = 64
_WORDS = """
a about after all also and are as at bank be because been between big boat book but by can city
cold could day deep did do down each early east end even every far fast field fire first fish
for from garden give good great green had has have he her here high him his home house how if in
into is it its just large last late light like line long look made make man many may more most
mountain much music must never new night no north not now of off old on one only open or other
our out over own paper people place quick quiet rain red river road said same sea see she ship
short should show side slow small snow so some song south stone sun table tea than that the
their them then there these they thing this time to town train tree two under up very voice walk
warm was water way we well were west what when where which white who wind window winter with
woman wood word work would year you young""".split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_PUNCTUATION = ".,;:!?'\"()-"
_BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}


@dataclass(frozen=True)
class Family:
    """What tests have to know of a family.

    Attributes:
        overrides: what its config has that differs from the base sizes.
        names: of config fields, where it calls them otherwise than BERT.
        is_like_roberta: its special tokens are RoBERTa's, and positions start after the padding id.
        has_types: its tokenizer gives token types.
        measures_distances: as of `EncoderWeights`: no mask may have gaps.
        walk: the variant that random walks draw; None leaves the family to one it is laid out like.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    is_like_roberta: bool = False
    has_types: bool = False
    measures_distances: bool = False
    walk: str | None = None


# Keyed on `config.model_type`.
FAMILIES: dict[str, Family] = {
    "bert": Family(has_types=True, walk="bert"),
    "roberta": Family(is_like_roberta=True, walk="roberta"),
    "xlm-roberta": Family(is_like_roberta=True),
    "camembert": Family(is_like_roberta=True),
    "distilbert": Family(names=_DISTILBERT_NAMES, walk="distilbert"),
    "albert": Family({"embedding_size": 64, "num_hidden_groups": 2}, has_types=True),
    "electra": Family({"embedding_size": 64}, has_types=True, walk="electra-projection"),
    "mpnet": Family(is_like_roberta=True, measures_distances=True, walk="mpnet"),
    "deberta-v2": Family(
        {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
        measures_distances=True,
    ),
    "modernbert": Family({"local_attention": 16}, measures_distances=True, walk="modernbert"),
    "nomic_bert": Family(has_types=True, walk="nomic_bert"),
    "gte": Family({"type_vocab_size": 0}),
    "jina_embeddings_v3": Family(),
    "eurobert": Family(
        {
            "num_key_value_heads": 2,
            "classifier_pooling": "mean",
            "bos_token_id": 2,
            "eos_token_id": 3,
            "mask_token_id": 4,
        }
    ),
    "gemma3_text": Family(
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "use_bidirectional_attention": True,
            "use_cache": False,
        },
        {"hidden_act": "hidden_activation"},
        measures_distances=True,
    ),
    "qwen3": Family({"num_key_value_heads": 2, "head_dim": 16, "use_cache": False}, walk="qwen3"),
}
# Older versions of transformers compile parts of DeBERTa by TorchScript: it runs in stock there.
_HAS_DEBERTA = isinstance(modeling_deberta_v2.scaled_size_sqrt, FunctionType)
# Of these, what the installed version has.
FAMILIES = {
    name: family
    for name, family in FAMILIES.items()
    if name in transformers.CONFIG_MAPPING and (name != "deberta-v2" or _HAS_DEBERTA)
}
ROBERTA_LIKE = [name for name, family in FAMILIES.items() if family.is_like_roberta]
WITHOUT_DISTANCES = [name for name, family in FAMILIES.items() if not family.measures_distances]


@dataclass(frozen=True)
class Variant:
    """A family, and what its config has that differs from those of the others."""

    family: str
    overrides: dict[str, Any] = field(default_factory=dict)


VARIANTS: dict[str, Variant] = {name: Variant(name) for name in FAMILIES} | {
    "bert-gelu-new": Variant("bert", {"hidden_act": "gelu_new"}),
    "bert-gelu-pytorch-tanh": Variant("bert", {"hidden_act": "gelu_pytorch_tanh"}),
    "bert-head-dim-26": Variant("bert", {"hidden_size": 52, "num_attention_heads": 2}),
    "bert-odd-eps": Variant("bert", {"layer_norm_eps": 3e-3}),
    "roberta-one-type": Variant("roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "distilbert-gelu-new": Variant("distilbert", {"hidden_act": "gelu_new"}),
    "albert-one-group": Variant("albert", {"num_hidden_groups": 1}),
    "albert-pairs-of-layers": Variant("albert", {"inner_group_num": 2, "embedding_size": 40}),
    "electra-projection": Variant("electra", {"embedding_size": 40}),
    "deberta-v2-projection": Variant("deberta-v2", {"embedding_size": 40, "type_vocab_size": 2}),
    "qwen3-head-dim-24": Variant("qwen3", {"head_dim": 24}),
    "qwen3-one-head-of-keys": Variant("qwen3", {"num_key_value_heads": 1, "attention_bias": True}),
}
VARIANTS = {name: each for name, each in VARIANTS.items() if each.family in FAMILIES}


def _vocabulary(family: str) -> dict[str, int]:
    specials = _ROBERTA_SPECIALS if FAMILIES[family].is_like_roberta else _BERT_SPECIALS
    letters = [*_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    pieces = dict.fromkeys([*specials, *_PUNCTUATION, *letters, "##s", "##ing", "##ed", *_WORDS])
    return {piece: index for index, piece in enumerate(pieces)}


def make_config(name: str, **overrides: Any) -> Any:
    """The config of a variant; room for `MAX_TOKENS` tokens.

    Args:
        name: a key of `VARIANTS`.
        **overrides: BERT's names of config fields, translated for families with names of their own.
    """
    variant = VARIANTS[name]
    family = FAMILIES[variant.family]
    roberta = family.is_like_roberta
    values = _SIZES | {
        "model_type": variant.family,
        "vocab_size": len(_vocabulary(variant.family)),
        "pad_token_id": 1 if roberta else 0,
        "max_position_embeddings": MAX_TOKENS + (2 if roberta else 0),
    }
    values |= family.overrides | variant.overrides | overrides
    values = {family.names.get(key, key): value for key, value in values.items()}
    return transformers.AutoConfig.for_model(**values)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with values no initialisation leaves: no zero biases, no unit norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "position_embeddings" in name or "token_type_embeddings" in name:
                noise *= 0.3
            elif parameter.dim() == 2 and "embeddings." not in name:
                noise /= parameter.shape[1] ** 0.5
            elif parameter.dim() == 1:
                noise *= 0.2
                if "norm" in name.lower() and name.endswith("weight"):
                    noise += 1
            parameter.copy_(noise)
    return model.eval()


def make_model(name: str, *, seed: int = 0, head: str | None = None, **overrides: Any) -> Any:
    """A random fp32 model in eval mode.

    Args:
        name: a key of `VARIANTS`.
        seed: of the weights.
        head: auto class of `transformers`, such as "AutoModelForSequenceClassification"; None for
            the base model.
        **overrides: config fields, see :func:`make_config`.
    """
    auto = getattr(transformers, head or "AutoModel")
    return randomize(auto.from_config(make_config(name, **overrides)), seed)


def with_setting(path: str, value: object, family: str = "bert") -> Callable[[], nn.Module]:
    """Makes a model with a setting, at `path`, that its own constructor may refuse."""

    def make() -> nn.Module:
        model = make_model(family)
        owner, _, name = path.rpartition(".")
        # Newer configs check what is assigned.
        vars(model.config if owner == "config" else model.get_submodule(owner))[name] = value
        return model

    return make


def make_tokenizer(name: str) -> transformers.PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with the special tokens and inputs of the family."""
    family = VARIANTS[name].family
    vocabulary = _vocabulary(family)
    roberta = FAMILIES[family].is_like_roberta
    if roberta:
        start, pad, end, unknown, mask = _ROBERTA_SPECIALS
        pair = f"{start} $A {end} {end} $B {end}"
    else:
        pad, unknown, start, end, mask = _BERT_SPECIALS
        pair = f"{start} $A {end} $B:1 {end}:1"
    backend = Tokenizer(WordPiece(vocabulary, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=pair,
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    inputs = ["input_ids", "attention_mask"]
    if FAMILIES[family].has_types:
        inputs.insert(1, "token_type_ids")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=inputs,
        model_max_length=MAX_TOKENS,
        pad_token=pad,
        unk_token=unknown,
        cls_token=start,
        sep_token=end,
        mask_token=mask,
    )


def save_model(name: str, directory: str, **arguments: Any) -> None:
    """Save a model and its tokenizer as `from_pretrained` wants them; see :func:`make_model`."""
    make_model(name, **arguments).save_pretrained(directory)
    make_tokenizer(name).save_pretrained(directory)


def make_sentence_transformer(
    name: str = "bert",
    *,
    pooling: str | tuple[str, ...] = "mean",
    normalize: bool = True,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    **arguments: Any,
) -> SentenceTransformer:
    """A random SentenceTransformer on the CPU.

    Args:
        name: a key of `VARIANTS`.
        pooling: mode, or several, of sentence-transformers' Pooling.
        normalize: end with a Normalize module.
        seed: of the weights.
        overrides: config fields, see :func:`make_config`.
        **arguments: of SentenceTransformer.
    """
    with tempfile.TemporaryDirectory() as directory:
        save_model(name, directory, seed=seed, **(overrides or {}))
        transformer = Transformer(directory)
    hidden_size = transformer.get_embedding_dimension()
    modules: list[nn.Module] = [transformer, Pooling(hidden_size, pooling)]
    if normalize:
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device="cpu", **arguments).eval()


def make_xlnet() -> SentenceTransformer:
    """A model that the packed engine does not run."""
    sizes = {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}
    config = transformers.XLNetConfig(vocab_size=len(_vocabulary("roberta")), **sizes)
    with tempfile.TemporaryDirectory() as folder:
        randomize(transformers.XLNetModel(config)).save_pretrained(folder)
        make_tokenizer("roberta").save_pretrained(folder)
        modules = [Transformer(folder), Pooling(config.hidden_size)]
    return SentenceTransformer(modules=modules, device="cpu").eval()


def make_cross_encoder(
    name: str = "bert", *, num_labels: int = 1, seed: int = 0, **overrides: Any
) -> CrossEncoder:
    """A random CrossEncoder on the CPU."""
    with tempfile.TemporaryDirectory() as directory:
        head = "AutoModelForSequenceClassification"
        save_model(name, directory, seed=seed, head=head, num_labels=num_labels, **overrides)
        return CrossEncoder(directory, device="cpu")


def make_texts(count: int, *, max_words: int = 50, seed: int = 0) -> list[str]:
    """Texts of 1 to `max_words` words, lengths skewed towards short ones."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        words = rng.choices(_WORDS, k=1 + int(max_words * rng.random() ** 2))
        texts.append(" ".join(words) + rng.choice(_PUNCTUATION))
    return texts


def make_batch(
    name: str, lengths: list[int], *, seed: int = 0, padded_to: int | None = None
) -> dict[str, torch.Tensor]:
    """Random ids right-padded to a rectangle: `input_ids` and `attention_mask`, int64 `[B, S]`."""
    vocabulary = _vocabulary(VARIANTS[name].family)
    generator = torch.Generator().manual_seed(seed)
    width = padded_to or max(lengths)
    pad = 1 if FAMILIES[VARIANTS[name].family].is_like_roberta else 0
    ids = torch.full((len(lengths), width), pad)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, len(vocabulary), (length,), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}
