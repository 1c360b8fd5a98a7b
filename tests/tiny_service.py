"""Services of tiny models, for tests of the server."""

from __future__ import annotations

import threading
from typing import Any

import torch

from families import make_cross_encoder, make_sentence_transformer
from sbert_fast import FastCrossEncoder, FastEncoder
from sbert_fast.server.models import Served
from sbert_fast.server.service import Service
from sbert_fast.server.settings import Settings


def make_service(**settings: Any) -> Service:
    encoder = FastEncoder(make_sentence_transformer(prompts={"query": "find: "}))
    scores = FastCrossEncoder(make_cross_encoder(num_labels=1), activation_fn=torch.nn.Identity())
    classes = FastCrossEncoder(make_cross_encoder(num_labels=3), activation_fn=torch.nn.Identity())
    models = [Served("tiny", encoder), Served("ranks", scores), Served("sorts", classes)]
    return Service(models, Settings(**settings))


def held(service: Service) -> threading.Event:
    """What lets the queue of the first model go on; until then it is in its first batch."""
    gate = threading.Event()
    runner = service.models["tiny"].queue._runner
    run = runner.run

    def waits(inputs: Any, options: dict[str, Any]) -> Any:
        assert gate.wait(30)
        return run(inputs, options)

    runner.run = waits
    return gate
