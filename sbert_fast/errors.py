"""The exceptions of sbert_fast. Each is also the built-in type a caller would expect to catch."""

from __future__ import annotations

from collections.abc import Sequence


class SbertFastError(Exception):
    """Base class of every error raised on purpose by this package."""


class InputError(SbertFastError, TypeError, ValueError):
    """An input that has no embedding: the message names its index, its type, what was expected."""


class MissingModelError(SbertFastError, FileNotFoundError, ValueError):
    """A model path that does not exist."""


class ModelFileError(SbertFastError, NotADirectoryError, ValueError):
    """The path is a file; a model is a folder."""


class NoSuchDeviceError(SbertFastError, ValueError, RuntimeError, AssertionError):
    """An invalid device, or one this machine lacks: torch raises one of these, by its build."""


class UnsupportedModelError(SbertFastError, ValueError):
    """A model whose architecture, options or weights the packed engine does not run."""


class ImplementationError(SbertFastError, RuntimeError):
    """An explicitly requested implementation that cannot run here."""


class DeviceLostError(SbertFastError, RuntimeError):
    """A GPU that an earlier error has made useless to this process, until it ends."""


class QueueFullError(SbertFastError, RuntimeError):
    """More waits in the queue of a model than may.

    Attributes:
        seconds: how long what waits will take; 0 where that is not known.
    """

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds

    def __reduce__(self) -> tuple[type[QueueFullError], tuple[str, float]]:
        return type(self), (str(self), self.seconds)


class QueueClosedError(SbertFastError, RuntimeError):
    """The queue of a model was closed before the call ran."""


class DeadlineError(SbertFastError, TimeoutError):
    """A call whose deadline passed before all of it had begun to run."""


class TextsError(SbertFastError, ValueError):
    """Some of the texts of a call have no embedding.

    Attributes:
        indices: positions of the texts in the caller's input, sorted; only those of the first batch
            or slice that has any.
    """

    def __init__(self, message: str, indices: Sequence[int]) -> None:
        super().__init__(message)
        self.indices = list(indices)

    def __reduce__(self) -> tuple[type[TextsError], tuple[str, list[int]]]:
        return type(self), (str(self), self.indices)


class NonFiniteEmbeddingError(TextsError):
    """NaN or infinity in a result."""


class TokenIdError(TextsError):
    """Tokens that have no row in an embedding table of the model."""


class InvalidWeightsError(UnsupportedModelError):
    """Weights that hold NaN or infinity: no engine can give a meaningful vector."""
