"""A session: what serves the calls of one model, and what is known about it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from tqdm.autonotebook import tqdm

from sbert_fast import bypass, forking, ops, results
from sbert_fast.arguments import DEFAULT_BATCH_SIZE, Chunk, DefaultBatchSize
from sbert_fast.assembly import DEVICES, Assembly, How, Unsupported, Where
from sbert_fast.call import Call
from sbert_fast.errors import DeviceLostError, SbertFastError, UnsupportedModelError
from sbert_fast.few import embed_few
from sbert_fast.inference import Pipeline, Request
from sbert_fast.packed_forward import PACKED, PackedForward
from sbert_fast.queueing import BatchQueue
from sbert_fast.routes import route_of, routes
from sbert_fast.stats import Counters
from sbert_fast.transfer import device_error

logger = logging.getLogger("sbert_fast")

# How often a model is read if another thread keeps changing it.
_TRIES = 8


class Session:
    """What serves the calls of one model, which is passed to every method.

    Copies and pickles keep the settings, count from zero and leave derived state behind.

    Args:
        dtype: dtype to compute in; None leaves it to the model.
        keeps_dtype: whether a float32 model computes in float32 on a GPU too.
        impl: implementation of the ops.
        batch_tokens: most tokens of a batch; "auto" picks by model and device.
        low_memory: as :class:`PackedEncoder` takes it.

    Attributes:
        counters: what has been done.
        assemblies: what was derived from the model, by route (see :mod:`sbert_fast.routes`).
        forwards: what stands in for the forwards of base models while they train, by name.
        lost: what made the device useless to this process; None if it works.
        queue: where calls of `submit` wait; None before the first.
    """

    def __init__(
        self,
        dtype: torch.dtype | None,
        *,
        keeps_dtype: bool,
        impl: str,
        batch_tokens: int | Literal["auto"],
        low_memory: bool = False,
    ) -> None:
        self._dtype, self._keeps_dtype, self.impl = dtype, keeps_dtype, impl
        self.batch_tokens, self._low_memory = batch_tokens, low_memory
        self.counters = Counters()
        self.assemblies: dict[str | None, Assembly] = {}
        self.forwards: dict[str, PackedForward] = {}
        self.lost: str | None = None
        self.queue: BatchQueue | None = None

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"counters": Counters(), "assemblies": {}, "forwards": {}}
        return vars(self) | fresh | {"lost": None, "queue": None}

    def pipeline(self, model: SentenceTransformer, route: str | None) -> Pipeline | Unsupported:
        """What runs a route of the model as it is now."""
        # To ask a model where it is takes longer.
        if not any(map(torch.is_autocast_enabled, DEVICES)):
            return self._pipeline(model, route)
        with _without_autocast(model.device.type):
            return self._pipeline(model, route)

    def _pipeline(self, model: SentenceTransformer, route: str | None) -> Pipeline | Unsupported:
        where, assembly = partial(self._where, model), self.assemblies.get(route)
        found = None if assembly is None else assembly.prepare(model, where)
        for _ in range(_TRIES):
            if found is not None:
                return found
            assembly = self._assembled(model, route, where())
            # What was derived for routes that are gone is dropped.
            kept = {name: each for name, each in self.assemblies.items() if name in routes(model)}
            self.assemblies = kept | {route: assembly}
            found = assembly.prepare(model, where)
        return found or Unsupported("the model kept changing while it was being read")

    def _assembled(self, model: SentenceTransformer, route: str | None, where: Where) -> Assembly:
        how = How(impl=self.impl, low_memory=self._low_memory)
        return Assembly(model, route, where, how, self.assemblies.values())

    def ready(
        self, model: SentenceTransformer, task: Any, device: str | torch.device | None
    ) -> Pipeline | Unsupported:
        """What runs a call; the check is made once for the call.

        Args:
            model: the model, which is moved and put into eval mode; not where it is refused.
            task: chooses the route, see :func:`sbert_fast.routes.route_of`.
            device: where to run it; None for where it is.

        Raises:
            ValueError, ImplementationError, InvalidWeightsError: the model cannot run there.
            DeviceLostError: the device failed, now or earlier.
        """
        with self._on_device(model):
            # It may be an alias of the present one: "cpu:0" is "cpu".
            place = None if device is None else torch.empty(0, device=device).device
            if bypass.is_transformed():
                if place is not None:
                    _move(model, place)
                return Unsupported("a mode or transform of torch is on", counts=False)
            forking.settle()
            try:
                route = route_of(model, task)
            except UnsupportedModelError as error:
                return Unsupported(str(error))
            found = self._placed(model, route, place)
        if isinstance(found, Unsupported):
            return found
        reason = found.engine.admitted.bypassed
        return found if reason is None else Unsupported(reason)

    def _placed(
        self, model: SentenceTransformer, route: str | None, place: torch.device | None
    ) -> Pipeline | Unsupported:
        """What runs the model on `place`, where it is moved; errors as for :meth:`ready`."""
        if place is None or place == model.device:
            return self._in_eval_mode(model, route)
        # It raises every error that does not depend on prepared weights.
        self._assembled(model, route, self._where(model, place))
        with _undone_if_refused(model):
            _move(model, place)
            return self._in_eval_mode(model, route)

    def _in_eval_mode(
        self, model: SentenceTransformer, route: str | None
    ) -> Pipeline | Unsupported:
        found = self.pipeline(model, route)
        if isinstance(found, Pipeline) and (
            model.training or found.engine.admitted.drops or found.head.is_training
        ):
            with _undone_if_refused(model):
                model.eval()
                return self.pipeline(model, route)
        return found

    def run(
        self,
        model: SentenceTransformer,
        pipeline: Pipeline,
        texts: list[str],
        call: Call,
        counters: Counters | None = None,
    ) -> Any:
        """What :mod:`sbert_fast.results` has for `call.output_value` of checked texts, counted in
        `counters`; None is those of the session.

        Raises:
            DeviceLostError: the device failed, now or earlier.
        """
        first, checks, counters = getattr(texts, "offset", 0), True, counters or self.counters
        if isinstance(texts, Chunk):
            checks, texts = texts.checks, list(texts)
        head, prompt = pipeline.head, call.prompt
        asks_prompt = call.output_value is None or not head.include_prompt
        request = Request(
            prompt=prompt or "",
            prompt_tokens=_prompt_tokens(pipeline, prompt) if prompt and asks_prompt else 0,
            batch_tokens=self.token_budget(pipeline, call.batch_size),
            normalize=call.normalize_embeddings and call.is_of_sentences,
            dimension=min(call.truncate_dim or head.dimension, head.dimension),
            offset=first,
            checks=checks,
        )
        shows = call.show_progress_bar
        if shows is None:
            level = logging.getLogger("sentence_transformers").getEffectiveLevel()
            shows = level in (logging.INFO, logging.DEBUG)
        if call.is_of_sentences and not shows:
            with _without_autocast("cpu"):
                found = embed_few(texts, pipeline, request, counters)
            if found is not None:
                return found
        bar = tqdm(total=len(texts), unit="text", desc="Encoding", disable=not shows)
        with self._on_device(model), bar, _without_autocast(pipeline.engine.device.type):
            arguments = (texts, pipeline, request, counters, bar.update)
            if call.is_of_sentences:
                return results.sentence_embeddings(*arguments, on_host=call.on_host)
            compute = results.features if call.output_value is None else results.token_embeddings
            return compute(*arguments)

    def announce(self, model: SentenceTransformer) -> None:
        """Tell the caller of a constructor how the model will run."""
        for route in routes(model):
            self._announce(model, route)

    def _announce(self, model: SentenceTransformer, route: str | None) -> None:
        found = self.pipeline(model, route)
        if isinstance(found, Unsupported):
            self.counters.expect_fallback(found.reason)
            what = "this model" if route is None else f"route {route!r} of this model"
            warnings.warn(
                f"{type(model).__name__} runs {what} in sentence-transformers, unaccelerated: "
                f"{found.reason}",
                stacklevel=4,
            )
            return
        engine = found.engine
        if engine.implementation == "reference" and ops.requested(self.impl) == "auto":
            logger.warning(
                "no kernels run on %s, only plain torch: `sbert-fast doctor` says why",
                engine.device,
            )
        logger.info(
            "packed %s in %s on %s, ops: %s, at most %d tokens a batch",
            engine.architecture.family,
            engine.compute_dtype,
            engine.device,
            engine.implementation,
            self.token_budget(found),
        )

    def count(self, unsupported: Unsupported) -> None:
        """Count a call that sentence-transformers runs, and log the reason if it is new."""
        reason = unsupported.reason
        if unsupported.counts and self.counters.add_fallback(reason):
            logger.warning("running in sentence-transformers, unaccelerated: %s", reason)

    def count_forward(self, outcome: str) -> None:
        """Count a call of a base model's forward by how it ran, see :class:`PackedForward`."""
        if outcome == PACKED:
            self.counters.add(forwards=1)
        else:
            self.counters.add_fallback(outcome)

    def _where(self, model: SentenceTransformer, device: torch.device | None = None) -> Where:
        """Where the model runs once it is on `device`; None for where it is."""
        dtype, device = self._dtype, model.device if device is None else device
        if dtype is None and not self._keeps_dtype and device.type == "cuda":
            first = next(model.parameters(), None)
            dtype = torch.float16 if first is not None and first.dtype == torch.float32 else None
        return dtype, device

    def token_budget(self, pipeline: Pipeline, batch_size: int = DEFAULT_BATCH_SIZE) -> int:
        """Most tokens of a batch."""
        budget = self.batch_tokens
        budget = pipeline.default_batch_tokens() if budget == "auto" else budget
        if not isinstance(batch_size, DefaultBatchSize):
            budget = min(budget, batch_size * pipeline.tokenizer.max_length)
        return int(budget)

    @contextmanager
    def _on_device(self, model: SentenceTransformer) -> Iterator[None]:
        """Raise DeviceLostError for a CUDA error that no later call survives, now and later."""
        cause = None
        if self.lost is None:
            try:
                yield
                return
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                lost = device_error(model.device)
                if lost is None:
                    raise
                self.lost, cause = lost, error
        told = f"{model.device} is unusable in this process; restart the process: {self.lost}"
        raise DeviceLostError(told) from cause


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast off: what is prepared and computed has the dtype of the encoder, not another."""
    if device in DEVICES and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@torch.inference_mode(False)
def _move(model: SentenceTransformer, device: torch.device) -> None:
    if device != model.device:
        model.to(device)


@contextmanager
def _undone_if_refused(model: nn.Module) -> Iterator[None]:
    """Give the model its tensors and modes of before again if an error of ours, or a lack of
    memory, ends the block."""
    with torch.inference_mode(False):
        modules = [
            (module, module.training, dict(module._parameters), dict(module._buffers))
            for module in model.modules()
        ]
        parameters = list(model.parameters())
        grads = [parameter.grad for parameter in parameters]
        tensors = [tensor for tensor in (*grads, *parameters) if tensor is not None]
        contents = [(tensor, tensor.data) for tensor in tensors]
    try:
        yield
    except (SbertFastError, ValueError, torch.OutOfMemoryError) as error:
        for module, training, own_parameters, own_buffers in modules:
            module.training = training
            module._parameters.update(own_parameters)
            module._buffers.update(own_buffers)
        try:
            with torch.inference_mode(False):
                # What holds a gradient, or is one, cannot be swapped.
                for parameter in parameters:
                    parameter.grad = None
                for tensor, data in contents:
                    _give_back(tensor, data)
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad
        except RuntimeError as failure:
            error.add_note(f"the model could not be given its tensors of before: {failure}")
        raise


def _give_back(tensor: Tensor, data: Tensor) -> None:
    """Let `tensor` hold `data` again, which was its own."""
    try:
        tensor.data = data
    except RuntimeError:
        # Moved by torch.__future__.set_swap_module_params_on_conversion, it is of another kind.
        fresh = data.detach()
        if isinstance(tensor, nn.Parameter):
            fresh = nn.Parameter(fresh, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, fresh)


def _prompt_tokens(pipeline: Pipeline, prompt: str) -> int:
    """Tokens of the prompt without a trailing special token; the first module remembers them.

    They are counted by our copy of its tokenizer, which threads may share.
    """
    kept = pipeline.first._prompt_length_mapping
    if (prompt,) not in kept:
        ids = pipeline.tokenizer([prompt]).ids
        kept[prompt,] = len(ids) - int(ids[-1] in pipeline.first.tokenizer.all_special_ids)
    return int(kept[prompt,])
