"""What people do to a whole model: its list of modules, its dtype and modes, copies of it."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import dill
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    StaticEmbedding,
)
from torch import nn

from families import make_sentence_transformer
from model_operations import Act, operation
from sbert_fast import FastEncoder, accelerate
from walks import WIDTH, NotNow, Subject, Undo

# sentence-transformers' modules


def _appended(make: Callable[[Subject], nn.Module]) -> Act:
    def act(s: Subject) -> Undo:
        s.model.append(make(s).to(next(s.base.parameters()).dtype))
        return lambda s: s.model.pop(len(s.model) - 1)

    return act


def _size(s: Subject) -> int:
    return s.model.get_embedding_dimension()


operation(_appended(lambda s: Dense(_size(s), 16)), name="dense appended")
operation(_appended(lambda s: Normalize()), name="normalize appended", changes=False)
operation(_appended(lambda s: LayerNorm(_size(s))), name="layer norm appended", weight=0.5)
operation(_appended(lambda s: Dropout(0.5)), name="dropout appended", changes=False, weight=0.3)


@operation(weight=0.3)
def convolution_inserted(s: Subject) -> Undo:
    s.model.insert(1, CNN(WIDTH, WIDTH // 2, [1, 3]))
    return lambda s: s.model.pop(1)


@operation
def last_module_removed(s: Subject) -> Undo:
    if len(s.model) < 3:
        raise NotNow
    module = s.model.pop(len(s.model) - 1)
    return lambda s: s.model.append(module)


@operation
def last_modules_swapped(s: Subject) -> Undo:
    if len(s.model) < 4:
        raise NotNow

    def swap(s: Subject) -> None:
        s.model.append(s.model.pop(len(s.model) - 2))

    swap(s)
    return swap


@operation(weight=0.5)
def pooling_removed(s: Subject) -> Undo:
    module = s.model.pop(1)
    return lambda s: s.model.insert(1, module)


@operation(weight=0.5)
def put_behind_a_router(s: Subject) -> Undo:
    if len(s.model) < 3:
        raise NotNow
    dense = nn.Sequential(s.model[2]) if type(s.model[2]) is Dense else None
    if dense is None:
        raise NotNow
    router = Router.for_query_document([s.model[2]], [copy.deepcopy(s.model[2])])
    with torch.no_grad():
        router.sub_modules["query"][0].linear.weight.mul_(-1)
    s.model[2] = router
    return lambda s: s.model.__setitem__(2, dense[0])


@operation(weight=0.3)
def static_embeddings_instead(s: Subject) -> Undo:
    old = list(s.model)
    table = StaticEmbedding(s.backend, embedding_weights=s.base.get_input_embeddings().weight)
    s.model[0] = table
    del s.model[1:]

    def undo(s: Subject) -> None:
        s.model[0] = old[0]
        s.model.extend(old[1:])

    return undo


@operation
def transformer_replaced(s: Subject) -> None:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
    other = make_sentence_transformer("bert", seed=s.rng.randrange(9), overrides=sizes)
    s.model[0] = other[0]


@operation
def base_model_replaced(s: Subject) -> None:
    s.first.model = copy.deepcopy(s.base)
    with torch.no_grad():
        s.base.get_input_embeddings().weight.mul_(1.3)


# Dtypes, modes, gradients


def _cast(act: Callable[[Any], Any], **options: Any) -> None:
    def run(s: Subject) -> Undo:
        act(s)
        return lambda s: s.model.float()

    operation(run, **options)


_cast(lambda s: s.model.half(), name="half", weight=0.5)
_cast(lambda s: s.model.bfloat16(), name="bfloat16", weight=0.5)
_cast(lambda s: s.model.double(), name="double", weight=0.3, changes=False)
_cast(lambda s: s.model.half().float(), name="half and back")
_cast(lambda s: s.base.bfloat16().float(), name="base to bfloat16 and back")
_cast(lambda s: s.layer().double(), name="one layer double", weight=0.2)
operation(lambda s: s.model.float() and None, name="float", changes=False)
operation(lambda s: s.model.to("cpu") and None, name="to cpu", changes=False)
operation(
    lambda s: s.base.to(memory_format=torch.channels_last) and None,
    name="channels last",
    changes=False,
)
operation(
    lambda s: s.model.requires_grad_(False) and None, name="frozen", changes=False, weight=0.3
)
operation(lambda s: s.model.requires_grad_(True) and None, name="not frozen", changes=False)
operation(lambda s: s.model.train() and None, name="train", changes=False)
operation(lambda s: s.model.eval() and None, name="eval", changes=False)
operation(lambda s: s.layer().train() and None, name="one layer in training mode", changes=False)
operation(
    lambda s: s.base.gradient_checkpointing_enable(), name="gradient checkpointing", changes=False
)
operation(
    lambda s: s.base.gradient_checkpointing_disable(),
    name="no gradient checkpointing",
    changes=False,
)


@operation()
def frozen_under_inference_mode(s: Subject) -> None:
    """Whoever moves a model in inference mode leaves parameters that count no writes, and that no
    gradients can be recorded with: stock raises."""
    with torch.inference_mode():
        state = {name: tensor * 1 for name, tensor in s.base.state_dict().items()}
        s.base.load_state_dict(state, assign=True)


# Copies


@operation(changes=False)
def deep_copied(s: Subject) -> None:
    s.model = copy.deepcopy(s.model)


@operation(changes=False)
def pickled(s: Subject) -> None:
    s.model = pickle.loads(pickle.dumps(s.model))


@operation(changes=False)
def saved_by_torch(s: Subject) -> None:
    stream = io.BytesIO()
    torch.save(s.model, stream)
    stream.seek(0)
    s.model = torch.load(stream, weights_only=False)


@operation(changes=False)
def base_model_copied_by_dill(s: Subject) -> None:
    s.first.model = dill.loads(dill.dumps(s.base))
    if not isinstance(s.model, FastEncoder):
        accelerate(s.model)


@operation(changes=False, weight=0.3)
def base_model_saved_and_loaded(s: Subject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        s.base.save_pretrained(folder)
        s.first.model = type(s.base).from_pretrained(folder)
    if not isinstance(s.model, FastEncoder):
        accelerate(s.model)


@operation(changes=False)
def shallow_copied(s: Subject) -> None:
    s.model = copy.copy(s.model)


@operation(changes=False, weight=0.3)
def saved_and_loaded(s: Subject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        s.model.save_pretrained(folder, create_model_card=False)
        s.model = s.kind.wrap(SentenceTransformer(folder, device="cpu"))


@operation(changes=False)
def wrapped_anew(s: Subject) -> None:
    if isinstance(s.model, FastEncoder):
        s.model = FastEncoder(s.model)
    else:
        accelerate(s.model)


@operation(changes=False)
def refreshed(s: Subject) -> None:
    s.model.refresh() if isinstance(s.model, FastEncoder) else accelerate(s.model)
