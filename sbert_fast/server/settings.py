"""What a server may be told: where it listens, who may ask, how much it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a server.

    Attributes:
        token: what a client must bear; None asks for nothing.
        auto_truncate: whether texts that are too long are cut where a request does not say.
        max_body: bytes of a request.
        max_texts: texts of a request.
        max_requests: requests at a time.
        queue_tokens: tokens that may wait for a model.
        deadline: seconds from a request's arrival until its last batch must begin.
        read_seconds: how long headers, and then a body, may take to arrive.
        stop_seconds: how long requests may take once the server is told to stop.
    """

    token: str | None = None
    auto_truncate: bool = True
    max_body: int = 2_000_000
    max_texts: int = 2048
    max_requests: int = 512
    queue_tokens: int = 65_536
    deadline: float = 10.0
    read_seconds: float = 10.0
    stop_seconds: float = 30.0
