"""The server that people write first: FastAPI and SentenceTransformer, with the route it needs.

python -m benchmarks.serve.plain MODEL PORT DTYPE
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer


class Request(BaseModel):
    """The body of `/embed`."""

    inputs: str | list[str]


def make_app(model: SentenceTransformer) -> FastAPI:
    app = FastAPI()

    # Not async: FastAPI runs it in a pool of threads, so that requests do not wait for each other.
    @app.post("/embed")
    def embed(request: Request) -> Any:
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        return model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()

    @app.get("/health")
    def health() -> None:
        return None

    return app


if __name__ == "__main__":
    path, port, dtype = sys.argv[1:]
    loaded = SentenceTransformer(path, device="cpu", model_kwargs={"dtype": dtype})
    uvicorn.run(make_app(loaded), port=int(port), log_level="warning")
