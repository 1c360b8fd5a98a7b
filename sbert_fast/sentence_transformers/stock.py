"""sentence-transformers asked about a model: what it embeds, what it refuses, what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import infer_modality, is_message_dict

from sbert_fast.arguments import as_list
from sbert_fast.errors import InputError
from sbert_fast.tokenization import check_texts
from sbert_fast.values import shown


def as_stock(model: SentenceTransformer) -> SentenceTransformer:
    """The same model, not a copy of it, as an instance of `SentenceTransformer` itself."""
    stock = object.__new__(SentenceTransformer)
    object.__setattr__(stock, "__dict__", model.__dict__)
    return stock


@contextmanager
def written_as_stock(model: SentenceTransformer) -> Iterator[SentenceTransformer]:
    """What writes a card or a commit of `model`, and names a class that those who read it have.

    A class of the caller's keeps its name, as in sentence-transformers.
    """
    card = model.model_card_data
    if card.model is not model or not type(model).__module__.startswith("sbert_fast."):
        yield model
        return
    card.model = as_stock(model)
    # The texts about losses are older; they name the class of a guide or teacher.
    for loss in (told.get("loss", {}) for told in (*card.train_datasets, *card.eval_datasets)):
        if "config_code" in loss:
            name = type(model).__name__
            loss["config_code"] = loss["config_code"].replace(name, SentenceTransformer.__name__)
    try:
        yield card.model
    finally:
        card.model = model


def refusal(call: Callable[[], object]) -> str | None:
    """What sentence-transformers says to a call, "" where it breaks; None where it serves it."""
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    except Exception:  # noqa: BLE001
        return ""
    return None


@contextmanager
def stock_words(call: Callable[[], object]) -> Iterator[None]:
    """Put in front of an error the sentence that programs look for.

    Args:
        call: makes sentence-transformers say it; called where there was an error.
    """
    try:
        yield
    except ValueError as error:
        theirs, ours = refusal(call) or "", str(error)
        error.args = (theirs if ours in theirs else f"{theirs} {ours}".lstrip(),)
        raise


def listed(model: SentenceTransformer, inputs: Any) -> tuple[list[Any], bool]:
    """The inputs of a call to a model of texts, and whether they are a single one.

    Raises:
        InputError: `inputs` is neither an input nor a list of them.
    """
    is_list = isinstance(inputs, list)
    # Texts are told by a look at the first: sentence-transformers takes longer.
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
        The type of the first input that is no text; None where all are texts.

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
    theirs = refusal(lambda: model.preprocess([element]))
    if theirs is not None:
        told = element is None or isinstance(element, (int, float))
        got = type(element).__name__ + (f" ({shown(element)})" if told else "")
        raise InputError(f"{theirs} inputs[{index}] must be a str, got {got}".lstrip())
