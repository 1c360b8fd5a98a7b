"""FastEncoder: a SentenceTransformer whose `encode` runs packed."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import is_message_dict
from torch import nn

from sbert_fast import ops
from sbert_fast.arguments import (
    DEFAULT_BATCH_SIZE,
    Chunk,
    check_device,
    check_positive,
    either,
    parse_dtype,
    with_default_batch_size,
)
from sbert_fast.assembly import Unsupported
from sbert_fast.call import Call
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import SbertFastError
from sbert_fast.finite import check_embeddings
from sbert_fast.inference import Pipeline
from sbert_fast.sentence_transformers.stock import (
    checked,
    read_inputs,
    reason_of_call,
    stock_words,
    written_as_stock,
)
from sbert_fast.session import Session
from sbert_fast.stats import EncoderStats
from sbert_fast.values import Precision, check_model


def _arguments_of(model: SentenceTransformer) -> dict[str, Any]:
    return {
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
        "similarity_fn_name": model._similarity_fn_name,
        "truncate_dim": model.truncate_dim,
        "trust_remote_code": model.trust_remote_code,
        # The constructor registers the new model in it.
        "model_card_data": copy.copy(model.model_card_data),
        "backend": model.backend,
    }


def _check_source(model: object, modules: object) -> None:
    if not isinstance(model, (str, SentenceTransformer, type(None))):
        raise TypeError(
            "model_name_or_path must be a name, a path or a SentenceTransformer, got "
            f"{type(model).__name__}"
        )
    if model is None and modules is None:
        raise ValueError("model_name_or_path or modules must be given, got neither")
    if isinstance(model, SentenceTransformer) and modules is not None:
        raise ValueError("modules must be None when a SentenceTransformer is given")


class FastEncoder(SentenceTransformer):
    """A `SentenceTransformer` that embeds text faster, with the same results.

    It takes the same arguments, gives the same vectors and works wherever a `SentenceTransformer`
    is expected. Text runs packed: tokenised once, cut into batches by tokens, never padded. What
    the packed engine does not support runs in sentence-transformers, with one warning.

    Args:
        model_name_or_path: name or path of a model, or a loaded `SentenceTransformer`, whose
            modules are shared, not copied.
        modules: modules to build the model from, as in `SentenceTransformer`.
        device: where to run; default as in `SentenceTransformer`.
        dtype: dtype to compute in: "auto", "float32", "bfloat16", "float16", or the torch dtype.
            "auto" is the dtype of a model that is passed in, or that `model_kwargs` ask for;
            otherwise float32 on a CPU (float16 models compute in it there too) and float16 on a
            GPU. It applies to the engine's prepared weights, not to the parameters of the modules;
            embeddings are float32.
        impl: implementation of the ops, see :mod:`sbert_fast.ops`.
        batch_tokens: most tokens of a batch; "auto" picks by model and device.
        **kwargs: further arguments of `SentenceTransformer`.

    Raises:
        ValueError: `device`, `dtype`, `impl` or `batch_tokens` is invalid, or `max_seq_length` is
            beyond the position table or below the number of special tokens.
        InvalidWeightsError: weights hold NaN or infinity; the message names the tensor.

    Example:
        >>> encoder = FastEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> embeddings = encoder.encode(["The weather is lovely today."])
    """

    def __init__(
        self,
        model_name_or_path: str | SentenceTransformer | None = None,
        *,
        modules: Iterable[nn.Module] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        impl: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None:
        requested_dtype = parse_dtype(dtype)
        check_positive("batch_tokens", batch_tokens, "auto")
        if impl != "auto" and impl not in ops.IMPLEMENTATIONS:
            expected = ", ".join(("auto", *ops.IMPLEMENTATIONS))
            raise ValueError(f"impl must be one of {expected}, got {impl!r}")
        if device is not None:
            check_device("device", device)
        if isinstance(model_name_or_path, os.PathLike):
            model_name_or_path = os.fspath(model_name_or_path)
        _check_source(model_name_or_path, modules)
        source = None
        if isinstance(model_name_or_path, SentenceTransformer):
            source, model_name_or_path = model_name_or_path, None
            modules = OrderedDict(source._modules)
            kwargs = _arguments_of(source) | kwargs
            device = source.device if device is None else device
        if isinstance(model_name_or_path, str) and modules is None:
            path = model_name_or_path
            with stock_words(lambda: SentenceTransformer(path, local_files_only=True)):
                check_model("model_name_or_path", path)
        super().__init__(model_name_or_path, modules=modules, device=device, **kwargs)
        if source is not None:
            self.module_kwargs = source.module_kwargs
            self._model_card_text = source._model_card_text
        named = {"dtype", "torch_dtype"} & set(kwargs.get("model_kwargs") or {})
        self._session = Session(
            requested_dtype,
            keeps_dtype=modules is not None or bool(named),
            impl=impl,
            batch_tokens=batch_tokens,
        )
        self._session.announce(self)

    def __copy__(self) -> FastEncoder:
        """It has the modules of this encoder, but attributes and a session of its own."""
        copied = object.__new__(type(self))
        copied.__setstate__(dict(vars(self)))
        copied._session = copy.copy(self._session)
        return copied

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

        If `encode` raises an error because of the model, this is the message of that error.
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

    def refresh(self) -> None:
        """Forget what was derived from the model.

        Needed after a write through `.data` or numpy to less than a row of a matrix.
        """
        self._session.assembly = None

    def _pipeline(self) -> Pipeline | Unsupported:
        return self._session.pipeline(self)

    def _ready(self, call: Call, reason: str | None) -> Pipeline | Unsupported:
        """What runs a call; `reason` says why its inputs do not run packed, if they do not."""
        found = self._session.ready(self, call.moves_to)
        if isinstance(found, Pipeline):
            reason = reason_of_call(self, call) or reason
            found = found if reason is None else Unsupported(reason)
        return found

    @torch.inference_mode()
    def encode(  # type: ignore[override]
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"]
        | None = "sentence_embedding",
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | list[str | torch.device] | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: dict[Literal["input", "output", "processes"], Any] | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embed texts; arguments and results are those of `SentenceTransformer.encode`.

        Args:
            inputs: a text, or a list, tuple, generator, numpy or pyarrow array or pandas column of
                texts. Lists with other inputs that the model embeds, pairs of texts and dicts that
                hold a text, run in sentence-transformers.
            prompt_name: name of a prompt in `self.prompts` to prepend.
            prompt: text to prepend.
            batch_size: limits memory, not rows: a batch holds at most `batch_size * max_seq_length`
                tokens, and never more than `batch_tokens`. The default limits nothing.
            show_progress_bar: default: shown if the logger of sentence-transformers is at INFO.
            output_value: "sentence_embedding", "token_embeddings" (for each text `[L, E]`), or
                None for one dict per text. Both are unpadded: `L` counts the tokens of the text
                itself, including special tokens. In sentence-transformers the dicts hold tensors
                that are padded to the longest text of their batch.
            precision: "float32", "int8", "uint8", "binary" or "ubinary".
            convert_to_numpy: a numpy array instead of a list of tensors.
            convert_to_tensor: one tensor; overrides `convert_to_numpy`.
            device: where to run; a list runs one worker process on each device.
            normalize_embeddings: L2-normalise.
            truncate_dim: components to keep.
            pool: worker processes of :meth:`start_multi_process_pool`.
            chunk_size: texts sent to a worker at once.
            **kwargs: further arguments of `SentenceTransformer.encode`.

        Returns:
            float32 `[N, dimension]` in the order of `inputs` by default, `[dimension]` for a single
            text, an empty array for no text. Tensors are on the device of the model, except those
            of worker processes and those of a `precision` other than "float32".

        Raises:
            InputError: the model does not embed an input of this kind; names its index.
            ValueError: an argument is invalid or unknown; names it.
            TokenIdError: the tokenizer gives an id for which the model has no embedding.
            NonFiniteEmbeddingError: an embedding holds NaN or infinity; names the texts.
            torch.OutOfMemoryError: a text, or the smallest batch, does not fit; names it.
            DeviceLostError: the GPU failed, now or in an earlier call, and no longer serves this
                process.
        """
        inputs = either(inputs, kwargs.pop("sentences", None))
        call = Call(
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            output_value=output_value,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            precision=precision,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
            device=device,
            pool=pool,
            chunk_size=chunk_size,
            keywords=kwargs,
        )
        call = checked(self, call, prompt_name)
        texts, is_single, reason = read_inputs(self, inputs)
        found = self._ready(call, reason)
        if isinstance(found, Unsupported):
            self._session.count(found)
        if isinstance(found, Unsupported) or call.in_workers:
            dtype = self.dtype if isinstance(found, Unsupported) else None
            return self._encode_elsewhere(texts[0] if is_single else texts, call, dtype)
        result = self._session.run(self, found, texts, call)
        if call.is_of_sentences:
            result = call.convert(result)
        return result[0] if is_single else result

    encode_query = with_default_batch_size(SentenceTransformer.encode_query)
    encode_document = with_default_batch_size(SentenceTransformer.encode_document)
    encode_multi_process = with_default_batch_size(SentenceTransformer.encode_multi_process)

    def _encode_elsewhere(self, inputs: Any, call: Call, dtype: torch.dtype | None) -> Any:
        """`encode` of sentence-transformers, which runs worker processes and the models that the
        engine does not. Results are checked before they are quantised, with the caller's indices.

        `dtype` is what it computes in, None if workers run packed.
        """
        in_worker = isinstance(inputs, Chunk)
        is_boxed = (
            call.in_workers and isinstance(inputs, (str, dict)) and not is_message_dict(inputs)
        )
        inputs = [inputs] if is_boxed else inputs
        if call.in_workers and isinstance(inputs, list) and not self.is_singular_input(inputs):
            # Token embeddings come back quantised: too late to check what they were.
            inputs = Chunk(inputs, checks=call.is_quantized and not call.is_of_sentences)
        quantizes = call.is_of_sentences and call.is_quantized
        asked = call.unquantized() if quantizes else call
        result = super().encode(inputs, **asked.arguments())
        if not in_worker:
            # A single input gives a tensor of token embeddings, or a dict.
            alone = not call.is_of_sentences and not isinstance(result, list)
            check_embeddings([result] if alone else result, dtype)
        if quantizes:
            result = call.convert_rows(result)
        return result[0] if is_boxed else result

    @torch.inference_mode()
    def _inference(self, inputs: list[str], **arguments: Any) -> Any:
        """Run checked texts in this process; workers of sentence-transformers start here."""
        call = Call.of_inference(**arguments)
        others = any(not isinstance(text, str) for text in inputs)
        found = self._ready(call, "inputs that are not texts" if others else None)
        if isinstance(found, Unsupported):
            return super()._inference(inputs, **arguments)
        return self._session.run(self, found, inputs, call)

    def _create_model_card(self, *args: Any, **kwargs: Any) -> None:
        with written_as_stock(self) as model:
            SentenceTransformer._create_model_card(model, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        with written_as_stock(self) as model:
            return SentenceTransformer.push_to_hub(model, *args, **kwargs)
