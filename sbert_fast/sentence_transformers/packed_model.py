"""What FastEncoder and FastCrossEncoder share: how they are made, and what they tell."""

from __future__ import annotations

import copy
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sbert_fast import bypass, ops, padded_call
from sbert_fast.arguments import DEFAULT_BATCH_SIZE, check_device, check_positive, parse_dtype
from sbert_fast.assembly import Unsupported
from sbert_fast.call import Call
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import NonFiniteEmbeddingError, SbertFastError, UnsupportedModelError
from sbert_fast.finite import check_embeddings
from sbert_fast.inference import Pipeline
from sbert_fast.ops import validation
from sbert_fast.patching import accelerated
from sbert_fast.pooling import is_module
from sbert_fast.routes import route_of, routes
from sbert_fast.sentence_transformers.queued import QueuedModel
from sbert_fast.sentence_transformers.stock import stock_class, stock_words, written_as_stock
from sbert_fast.session import Session
from sbert_fast.stats import Counters, EncoderStats
from sbert_fast.values import check_model

logger = logging.getLogger(__name__)

# What a warm-up computes. One input of each number of words: kernels for a GPU are compiled for a
# range of lengths. Then many of the shortest: large batches run on other kernels.
_WARM_WORDS, _WARM_INPUTS = (8, 120, 300), {"cpu": 16, "cuda": 2048}


# The modules behind a Transformer that take a text for itself, whether it is padded or not.
_OF_SENTENCES = ("Pooling", "Dense", "Normalize")


def _log_non_finite(rows: Tensor | None) -> None:
    """Tell which texts of a step the loss is not finite of, which it will not."""
    try:
        if rows is not None:
            check_embeddings(rows.reshape(len(rows), -1), None)
    except NonFiniteEmbeddingError as error:
        logger.warning("in training, %s", error)


def shared_arguments(source: Any) -> dict[str, Any]:  # noqa: ANN401
    """The arguments that make a model of `source`, which every class of them takes."""
    return {
        "prompts": source.prompts,
        "default_prompt_name": source.default_prompt_name,
        "trust_remote_code": source.trust_remote_code,
        # The constructor registers the new model in it.
        "model_card_data": copy.copy(source.model_card_data),
        "backend": source.backend,
    }


def _check_source(model: object, modules: object, stock: type) -> None:
    if not isinstance(model, (str, stock, type(None))):
        raise TypeError(
            f"model_name_or_path must be a name, a path or a {stock.__name__}, got "
            f"{type(model).__name__}"
        )
    if model is None and modules is None:
        raise ValueError("model_name_or_path or modules must be given, got neither")
    if isinstance(model, stock) and modules is not None:
        raise ValueError(f"modules must be None when a {stock.__name__} is given")


class PackedModel(QueuedModel):
    """A model of sentence-transformers that runs packed; a base of such a class beside the class of
    sentence-transformers."""

    method = "encode"
    # What a model has of the one it is made of, whatever its constructor makes of arguments.
    _kept: tuple[str, ...] = ("module_kwargs", "_model_card_text")

    @staticmethod
    def _arguments_of(source: Any) -> dict[str, Any]:  # noqa: ANN401
        """The arguments that make a model like `source`, but for its modules."""
        raise NotImplementedError

    def __init__(
        self,
        model_name_or_path: str | Any | None = None,
        *,
        modules: Iterable[nn.Module] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        impl: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
        low_memory: bool = False,
        **kwargs: Any,
    ) -> None:
        validation.flag("low_memory", low_memory)
        requested_dtype = parse_dtype(dtype)
        check_positive("batch_tokens", batch_tokens, "auto")
        if impl != "auto" and impl not in ops.IMPLEMENTATIONS:
            expected = ", ".join(("auto", *ops.IMPLEMENTATIONS))
            raise ValueError(f"impl must be one of {expected}, got {impl!r}")
        if device is not None:
            check_device("device", device)
        if isinstance(model_name_or_path, os.PathLike):
            model_name_or_path = os.fspath(model_name_or_path)
        stock = stock_class(type(self))
        _check_source(model_name_or_path, modules, stock)
        kept: dict[str, Any] = {}
        if isinstance(model_name_or_path, stock):
            source, model_name_or_path = model_name_or_path, None
            kept = {name: getattr(source, name) for name in self._kept if name not in kwargs}
            modules = OrderedDict(source._modules)
            kwargs = self._arguments_of(source) | kwargs
            device = source.device if device is None else device
        if isinstance(model_name_or_path, str) and modules is None:
            path = model_name_or_path
            with stock_words(lambda: stock(path, local_files_only=True)):
                check_model("model_name_or_path", path)
        super().__init__(  # type: ignore[call-arg]
            model_name_or_path, modules=modules, device=device, **kwargs
        )
        for name, value in kept.items():
            setattr(self, name, value)
        named = {"dtype", "torch_dtype"} & set(kwargs.get("model_kwargs") or {})
        self._session = Session(
            requested_dtype,
            keeps_dtype=modules is not None or bool(named),
            impl=impl,
            batch_tokens=batch_tokens,
            low_memory=low_memory,
        )
        self._session.announce(self)

    def __copy__(self) -> PackedModel:
        """It has the modules of this model, but attributes and a session of its own."""
        copied: Any = object.__new__(type(self))
        copied.__setstate__(dict(vars(self)))
        copied._session = copy.copy(self._session)
        return copied  # type: ignore[no-any-return]

    def forward(self, input: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Run the modules on features, as trainers do; arguments and results are those of
        sentence-transformers.

        In training mode, and wherever gradients are recorded, base models run packed as
        :func:`sbert_fast.accelerate` has it: in the dtype of the weights, with zeros for the states
        of masked tokens. What it does not serve runs in sentence-transformers. :attr:`stats` counts
        both. Features of a :class:`sbert_fast.PackedCollator` run packed in any mode.

        In training on a CPU, embeddings that hold NaN or infinity are logged, by their rows.
        """
        model: Any = self
        session = self._session
        packed: AbstractContextManager[bool] = nullcontext(False)
        is_flat, is_transformed = padded_call.is_flat(input), bypass.is_transformed()
        if not is_transformed:
            counting = session.forwards, session.impl, session.count_forward
            packed = accelerated(model, *counting, all_of_them=is_flat)
        with packed as is_packed:
            if is_flat and not (is_packed and self._reads_flat()):
                input = padded_call.padded(input, model.tokenizer.pad_token_id or 0)
            features: dict[str, Tensor] = super().forward(input, **kwargs)  # type: ignore[misc]
        trains = model.training and torch.is_grad_enabled() and not is_transformed
        if trains and model.device.type == "cpu":
            for rows in (features.get("sentence_embedding"), features.get("scores")):
                _log_non_finite(rows)
        return features

    def _reads_flat(self) -> bool:
        """Whether no module looks from one text at another where none is padded."""
        model: Any = self
        first, *others = model
        return (
            self.method == "encode"
            and _hands_on(first, padded_call.CU_SEQLENS)
            and all(any(is_module(each, name) for name in _OF_SENTENCES) for each in others)
        )

    def _own_method(self) -> str | None:
        """Why the class does not run as that of sentence-transformers does; None if it does."""
        own, stock = type(self), stock_class(type(self))
        for name in ("forward", "preprocess", "tokenize"):
            method = getattr(own, name, None)
            if method is not getattr(stock, name, None) and method is not _FORWARD:
                return f"{own.__name__} has a {name} of its own"
        return None

    @property
    def batch_tokens(self) -> int | Literal["auto"]:
        """Most tokens of a batch; "auto" picks by model and device."""
        return self._session.batch_tokens

    @batch_tokens.setter
    def batch_tokens(self, value: int | Literal["auto"]) -> None:
        self._session.batch_tokens = value

    @property
    def stats(self) -> EncoderStats:
        """A snapshot of what this encoder has done."""
        return self._session.counters.snapshot()

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype the packed engine computes in; None if the model runs unaccelerated."""
        engine = self.packed_engine
        return None if engine is None else engine.compute_dtype

    @property
    def unsupported_reason(self) -> str | None:
        """Why the packed engine does not run this model; None if it does.

        If calls raise an error because of the model, this is the message of that error. Of a model
        with routes, this and the properties below tell of texts without a task.
        """
        try:
            found = self._pipeline()
        except (SbertFastError, ValueError) as error:
            return str(error)
        return found.reason if isinstance(found, Unsupported) else None

    @property
    def packed_pipeline(self) -> Pipeline | None:
        """Tokenizer, engine and pooling behind `encode`; None if the model runs unaccelerated.

        They belong to the model as it is now: reading this compares it with what was derived from
        it.
        """
        found = self._pipeline()
        return found if isinstance(found, Pipeline) else None

    @property
    def packed_engine(self) -> PackedEncoder | None:
        """The engine behind `encode`; None if the model runs unaccelerated."""
        pipeline = self.packed_pipeline
        return None if pipeline is None else pipeline.engine

    @torch.inference_mode()
    def warmup(self) -> Self:
        """Prepare weights, compile kernels and compute a few lengths, on every route of the model,
        so that the first call takes no longer than those after it.

        What it computes is not counted in :attr:`stats`. A model that sentence-transformers runs is
        left as it is.

        Returns:
            The model itself.

        Raises:
            InvalidWeightsError, NonFiniteEmbeddingError, ValueError, ImplementationError,
                DeviceLostError: as a first call would.
        """
        call = Call(
            prompt=None,
            batch_size=DEFAULT_BATCH_SIZE,
            show_progress_bar=False,
            output_value="sentence_embedding",
            normalize_embeddings=False,
            truncate_dim=None,
        )
        alone = [[self._input_of(words)] for words in _WARM_WORDS]
        for route in routes(self):  # type: ignore[arg-type]
            found = self._session.ready(self, route, None)  # type: ignore[arg-type]
            if isinstance(found, Pipeline):
                many = alone[0] * _WARM_INPUTS[found.engine.device.type]
                for part in (*alone, many):
                    self._session.run(self, found, part, call, Counters())  # type: ignore[arg-type]
        return self

    @staticmethod
    def _input_of(words: int) -> Any:  # noqa: ANN401
        """An input of so many words."""
        return "word " * words

    def refresh(self) -> None:
        """Forget what was derived from the model.

        Needed after a write through `.data` or numpy to less than a row of a matrix.
        """
        self._session.assemblies, self._session.forwards = {}, {}

    def _pipeline(self) -> Pipeline | Unsupported:
        """What runs texts without a task."""
        try:
            route = route_of(self, None)  # type: ignore[arg-type]
        except UnsupportedModelError as error:
            return Unsupported(str(error))
        return self._session.pipeline(self, route)

    def _create_model_card(self, *args: Any, **kwargs: Any) -> None:
        with written_as_stock(self) as model:
            stock_class(type(self))._create_model_card(model, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        with written_as_stock(self) as model:
            return str(stock_class(type(self)).push_to_hub(model, *args, **kwargs))


def _hands_on(module: Any, name: str) -> bool:  # noqa: ANN401
    """Whether a Transformer hands a feature to its model."""
    names = getattr(module, "model_forward_params", ())
    return names is None or name in names


_FORWARD = PackedModel.forward
