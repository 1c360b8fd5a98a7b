"""FastEncoder: a SentenceTransformer whose `encode` runs packed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import is_message_dict

from sbert_fast.arguments import (
    DEFAULT_BATCH_SIZE,
    Chunk,
    either,
    with_default_batch_size,
)
from sbert_fast.assembly import Unsupported
from sbert_fast.call import Call
from sbert_fast.finite import check_embeddings
from sbert_fast.inference import Pipeline
from sbert_fast.pending import Priority
from sbert_fast.routes import modules_on, route_of
from sbert_fast.sentence_transformers.chunks import embed_ranges, token_ranges
from sbert_fast.sentence_transformers.packed_model import PackedModel, shared_arguments
from sbert_fast.sentence_transformers.stock import checked, read_inputs, reason_of_call
from sbert_fast.values import Precision

# Arguments of a call that may share a batch with equal ones, and their defaults.
_DEFAULTS: dict[str, Any] = {
    "prompt": None,
    "show_progress_bar": None,
    "output_value": "sentence_embedding",
    "normalize_embeddings": False,
    "truncate_dim": None,
    "precision": "float32",
    "convert_to_numpy": True,
    "convert_to_tensor": False,
}


class FastEncoder(PackedModel, SentenceTransformer):
    """A `SentenceTransformer` that embeds text faster, with the same results.

    It takes the same arguments, gives the same vectors and works wherever a `SentenceTransformer`
    is expected. Text runs packed: tokenised once, cut into batches by tokens, never padded. What
    the packed engine does not support runs in sentence-transformers, with one warning.

    The trainers of sentence-transformers train it packed, see :meth:`forward`.

    Args:
        model_name_or_path: name or path of a model, or a loaded `SentenceTransformer`, whose
            modules are shared, not copied.
        modules: modules to build the model from, as in `SentenceTransformer`.
        device: where to run; default as in `SentenceTransformer`.
        dtype: dtype to compute in: "auto", "float32", "bfloat16", "float16", "int8", or the torch
            dtype. "auto" is the dtype of a model that is passed in, or that `model_kwargs` ask for;
            otherwise float32 on a CPU (float16 models compute in it there too) and float16 on a
            GPU. "int8" rounds the weights of linear layers, and what they multiply; it needs
            AVX-VNNI, AVX512-VNNI or AMX and no calibration. It applies to the engine's prepared
            weights, not to the parameters of the modules; embeddings are float32.
        impl: implementation of the ops, see :mod:`sbert_fast.ops`.
        batch_tokens: most tokens of a batch; "auto" picks by model and device.
        low_memory: keep weights that the engine has in another form out of memory, on a CPU: they
            lie in the file of the model, or in one without a name in the folder for temporary
            files, and come back where sentence-transformers reads them. Linux only. Writes are
            seen to the bit.
        **kwargs: further arguments of `SentenceTransformer`.

    Raises:
        ValueError: `device`, `dtype`, `impl` or `batch_tokens` is invalid, or `max_seq_length` is
            beyond the position table or below the number of special tokens.
        InvalidWeightsError: weights hold NaN or infinity; the message names the tensor.
        ImplementationError: `impl` or int8 cannot run the model there.

    Example:
        >>> encoder = FastEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> embeddings = encoder.encode(["The weather is lovely today."])
    """

    mergeable = frozenset({*_DEFAULTS, "prompt_name", "task"})

    @staticmethod
    def _arguments_of(source: SentenceTransformer) -> dict[str, Any]:
        return shared_arguments(source) | {
            "similarity_fn_name": source._similarity_fn_name,
            "truncate_dim": source.truncate_dim,
        }

    def _ready(self, call: Call, reason: str | None) -> Pipeline | Unsupported:
        """What runs a call; `reason` says why its inputs do not run packed, if they do not."""
        found = self._session.ready(self, call.keywords.get("task"), call.moves_to)
        if isinstance(found, Pipeline):
            reason = self._own_method() or reason_of_call(self, call, found) or reason
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
        call, texts, is_single, found = self._read(inputs, call, prompt_name)
        if isinstance(found, Unsupported):
            self._session.count(found)
        if isinstance(found, Unsupported) or call.in_workers:
            dtype = self.dtype if isinstance(found, Unsupported) else None
            return self._encode_elsewhere(texts[0] if is_single else texts, call, dtype)
        result = self._session.run(self, found, texts, call)
        if call.is_of_sentences:
            result = call.convert(result)
        return result[0] if is_single else result

    def _read(
        self, inputs: Any, call: Call, prompt_name: str | None
    ) -> tuple[Call, Any, bool, Pipeline | Unsupported]:
        """The call and its inputs, checked, whether they are a single one, and what runs them."""
        call = checked(self, call, prompt_name)
        texts, is_single, reason = read_inputs(self, inputs)
        return call, texts, is_single, self._ready(call, reason)

    async def aencode(
        self,
        inputs: Any,
        *,
        priority: Priority = "query",
        deadline: float | None = None,
        **options: Any,
    ) -> Any:
        """:meth:`encode`, run by the queue of :meth:`submit` and awaited.

        Concurrent calls with equal options share packed batches. A task that is cancelled drops
        what of its call has not run.

        Raises:
            QueueFullError, DeadlineError, ...: as :meth:`submit` and its future.
        """
        return await self._await(inputs, priority=priority, deadline=deadline, **options)

    def _key(self, options: dict[str, Any]) -> frozenset[tuple[str, Any]] | None:
        # The others quantise by what is in the same call.
        own = options.get("precision") in (None, "float32", "binary", "ubinary")
        return super()._key(options) if own else None

    def _asked(
        self, inputs: Any, options: dict[str, Any]
    ) -> tuple[list[Any], bool, Pipeline | Unsupported, str | None]:
        name = options.pop("prompt_name", None)
        own = {key: options.pop(key) for key in _DEFAULTS.keys() & options.keys()}
        call = Call(**(_DEFAULTS | own), batch_size=DEFAULT_BATCH_SIZE, keywords=options)
        call, texts, is_single, found = self._read(inputs, call, name)
        return texts, is_single, Unsupported("workers") if call.in_workers else found, call.prompt

    @torch.inference_mode()
    def encode_chunks(
        self,
        documents: str | list[str],
        spans: Any,  # noqa: ANN401
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embed parts of documents by late chunking: a document is read once, as a whole, and the
        states of the tokens of each part are pooled as the model pools those of a text.

        Args:
            documents: a document, or a list of them, none longer than the model reads.
            spans: of each document a list of `(start, end)`, in characters; for a single document,
                its list. Parts may overlap. A token that has a character in a span belongs to it.
            prompt_name, prompt: as in :meth:`encode`; a prompt belongs to no part.
            convert_to_tensor: tensors instead of numpy arrays.
            normalize_embeddings: L2-normalise.
            truncate_dim: components to keep.
            **kwargs: further arguments of :meth:`encode`: `batch_size`, `show_progress_bar`,
                `device`, `task`.

        Returns:
            Of each document float32 `[len(spans), dimension]`, for a single document not in a list.

        Raises:
            TypeError, ValueError: a span is not a pair, is not within its document, holds no token,
                or some that are cut off behind `max_seq_length`; names the span.
            InputError: the tokenizer does not tell where its tokens are.

        Source:
            Günther et al., arXiv:2409.04701.
        """
        is_single = isinstance(documents, str)
        texts = [documents] if isinstance(documents, str) else list(documents)
        parts = [spans] if is_single else spans
        prompt = self._resolve_prompt(prompt, prompt_name) or ""
        first, *others = modules_on(self, route_of(self, kwargs.get("task"))).values()
        ranges = token_ranges(first, prompt, texts, parts)
        states = self.encode(texts, prompt=prompt, output_value="token_embeddings", **kwargs)
        results = embed_ranges(
            self, others, states, ranges, normalize=normalize_embeddings, dimension=truncate_dim
        )
        out = results if convert_to_tensor else [result.cpu().numpy() for result in results]
        return out[0] if is_single else out

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
