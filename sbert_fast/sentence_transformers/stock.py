"""Asking sentence-transformers about a model: what it embeds, what it refuses, what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modality import infer_modality, is_message_dict

from sbert_fast.arguments import as_list, check_keywords, check_positive
from sbert_fast.call import Call
from sbert_fast.errors import InputError
from sbert_fast.inference import Pipeline
from sbert_fast.pooling import is_module
from sbert_fast.static import StaticEncoder
from sbert_fast.tokenization import check_texts
from sbert_fast.values import PRECISIONS, shown

# What the configs of transformers may also ask a forward to return.
_OUTPUTS = ("hidden_states", "attentions")


def stock_class(cls: type) -> Any:  # noqa: ANN401
    """The class of sentence-transformers that a class takes the place of."""
    return CrossEncoder if issubclass(cls, CrossEncoder) else SentenceTransformer


def as_stock(model: Any, **methods: Any) -> Any:  # noqa: ANN401
    """The same model, not a copy of it, as an instance of the class of sentence-transformers.

    Args:
        model: any model.
        **methods: replacements for its methods.
    """
    stock = object.__new__(stock_class(type(model)))
    object.__setattr__(stock, "__dict__", vars(model) | methods if methods else vars(model))
    return stock


@contextmanager
def written_as_stock(model: Any) -> Iterator[Any]:  # noqa: ANN401
    """The model to write a card or commit of `model` with: it names a class that every reader has.

    A class of the caller's own keeps its name, as in sentence-transformers.
    """
    card = model.model_card_data
    if card.model is not model or not type(model).__module__.startswith("sbert_fast."):
        yield model
        return
    card.model = as_stock(model)
    # The texts about losses were written earlier; they name the class of a guide or teacher.
    for loss in (told.get("loss", {}) for told in (*card.train_datasets, *card.eval_datasets)):
        if "config_code" in loss:
            name = type(model).__name__
            stock = stock_class(type(model)).__name__
            loss["config_code"] = loss["config_code"].replace(name, stock)
    try:
        yield card.model
    finally:
        card.model = model


def stock_error(call: Callable[[], object]) -> str | None:
    """How sentence-transformers refuses a call, "" if it breaks; None if it serves the call."""
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    except Exception:  # noqa: BLE001
        return ""
    return None


@contextmanager
def stock_words(call: Callable[[], object]) -> Iterator[None]:
    """Put the sentence that programs look for in front of an error.

    Args:
        call: makes sentence-transformers say it; called only after an error.
    """
    try:
        yield
    except ValueError as error:
        theirs, ours = stock_error(call) or "", str(error)
        error.args = (theirs if ours in theirs else f"{theirs} {ours}".lstrip(),)
        raise


def checked(model: SentenceTransformer, call: Call, prompt_name: str | None) -> Call:
    """A call whose arguments are checked, with what it leaves to the model filled in.

    Raises:
        ValueError: an argument is invalid or unknown; names it.
    """

    def asked_of_stock() -> None:
        # `_inference` would end the training of the model.
        stock = as_stock(model, _inference=lambda inputs, **_: inputs, _distributed_inference=None)
        asked = {"batch_size": call.batch_size, "precision": call.precision, **call.keywords}
        stock.encode([], **asked)

    with stock_words(asked_of_stock):
        check_positive("batch_size", call.batch_size)
        check_keywords(call.keywords, model.get_model_kwargs)
        if call.precision is not None and call.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {shown(call.precision)}")
    distributed = getattr(model, "_distributed_inference", None) is not None and call.device is None
    call = replace(
        call,
        prompt=model._resolve_prompt(call.prompt, prompt_name),
        truncate_dim=model.truncate_dim if call.truncate_dim is None else call.truncate_dim,
        in_workers=call.pool is not None or isinstance(call.device, list) or distributed,
    )
    call.check()
    return call


def reason_of_call(model: SentenceTransformer, call: Call, pipeline: Pipeline) -> str | None:
    """Why sentence-transformers runs a call of a model with a pipeline; None if it does not."""
    if isinstance(pipeline.engine, StaticEncoder) and not call.is_of_sentences:
        return f"output_value={call.output_value!r} of StaticEmbedding"
    if (reason := _other_modalities(model)) is not None:
        return reason
    if call.output_value is None and is_module(model[0], "Router"):
        return "output_value=None of a Router"
    config = getattr(pipeline.engine.model, "config", None)
    if call.output_value is None and any(getattr(config, f"output_{n}", False) for n in _OUTPUTS):
        return "output_value=None of a model that outputs hidden states or attentions"
    # sentence-transformers refuses the names it does not know, whatever their value.
    for name, value in call.keywords.items():
        if name != "task" and (name != "processing_kwargs" or value):
            return f"argument {name!r}"
    if call.is_quantized and not call.is_of_sentences:
        return f"precision={call.precision!r} of {call.output_value}"
    if not call.is_of_sentences and pipeline.first.tokenizer.padding_side != "right":
        return f"output_value={call.output_value!r} where padding comes first"
    return None


def read_inputs(model: SentenceTransformer, inputs: Any) -> tuple[Any, bool, str | None]:
    """The inputs of a call, checked; whether they are a single one; why sentence-transformers runs
    them, or None.

    Raises:
        InputError: an input is not one that a text model embeds. Inputs of other models are not
            checked.
    """
    if (reason := _other_modalities(model)) is not None:
        return inputs, False, reason
    texts, is_single = listed(model, inputs)
    other = check_inputs(model, texts)
    return texts, is_single, None if other is None else f"inputs of type {other.__name__}"


def _other_modalities(model: SentenceTransformer) -> str | None:
    """Why a string may be something else than a text to a model; None if it is a text."""
    # Modules of other packages may not say.
    modalities = getattr(model[0], "modalities", ())
    if "text" in modalities and all(m in ("text", "message") for m in modalities):
        return None
    return f"inputs of {modalities}"


def listed(model: SentenceTransformer, inputs: Any) -> tuple[list[Any], bool]:
    """The inputs of a call to a text model, and whether they are a single one.

    Raises:
        InputError: `inputs` is neither an input nor a list of them.
    """
    is_list = isinstance(inputs, list)
    # The first element tells whether these are texts: sentence-transformers takes longer to ask.
    others = is_list and bool(inputs) and not isinstance(inputs[0], str)
    if isinstance(inputs, (str, dict)) or (others and model.is_singular_input(inputs)):
        return [inputs], True
    with stock_words(lambda: as_stock(model).preprocess([inputs])):
        texts = as_list(inputs)
    if not is_list and texts and is_message_dict(texts[0]):
        # A list of messages would be one conversation.
        texts = [[text] if is_message_dict(text) else text for text in texts]
    return texts, False


def check_inputs(model: SentenceTransformer, inputs: list[Any]) -> type | None:
    """Refuse what the model does not embed, before anything is computed.

    Returns:
        The type of the first input that is not a string; None if all are strings.

    Raises:
        InputError: names the index, what was expected and what came.
    """
    check_texts(inputs, besides=(object,))
    other = None
    for index, element in enumerate(inputs):
        if not isinstance(element, str):
            other = other or type(element)
            _check_other(as_stock(model), index, element)
    return other


def _check_other(model: SentenceTransformer, index: int, element: Any) -> None:
    try:
        if model.supports(infer_modality(element, supported_modalities=model.modalities)):
            return
    except (ValueError, TypeError):
        pass
    theirs = stock_error(lambda: model.preprocess([element]))
    if theirs is not None:
        told = element is None or isinstance(element, (int, float))
        got = type(element).__name__ + (f" ({shown(element)})" if told else "")
        raise InputError(f"{theirs} inputs[{index}] must be a str, got {got}".lstrip())


def check_pairs(model: Any, inputs: list[Any]) -> str | None:  # noqa: ANN401
    """Refuse what a cross-encoder does not score, before anything is computed.

    Returns:
        Why sentence-transformers runs the inputs; None if all are pairs of texts.

    Raises:
        InputError: names the index, what was expected and what came.
    """
    other = None
    for index, element in enumerate(inputs):
        if isinstance(element, (tuple, list)) and len(element) == 2:
            first, second = element
            if isinstance(first, str) and isinstance(second, str):
                if not (first.isascii() and second.isascii()):
                    check_texts(element, f"inputs[{index}]")
                continue
        theirs = stock_error(partial(as_stock(model).preprocess, [element]))
        if theirs is not None:
            raise InputError(f"{theirs} {_no_pair(index, element)}".lstrip())
        other = other or type(element)
    return None if other is None else f"inputs of type {other.__name__}, not pairs of texts"


def _no_pair(index: int, element: Any) -> str:  # noqa: ANN401
    if not isinstance(element, (tuple, list)):
        return f"inputs[{index}] must be a pair of texts, got {type(element).__name__}"
    for place, text in enumerate(element if len(element) == 2 else ()):
        if not isinstance(text, str):
            return f"inputs[{index}][{place}] must be a str, got {type(text).__name__}"
    return f"inputs[{index}] must be a pair of texts, got {len(element)} elements"
