"""What serving would be without raysys: FastAPI on uvicorn around the same scorer, no more.

    python bare_ranker.py CONFIG PORT

One process, one version, no split, no history lookup by pseudonym but by a plain key, no request
ids, no impressions, no metrics, no checks beyond types. It is the least that a ranking service
costs in Python.
"""

from __future__ import annotations

import sys

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from raysys.config import load_config
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ledger.log import Log
from raysys.registry.loaded import LoadedVersion
from raysys.registry.store import load_version
from raysys.storage import Root


class Request(BaseModel):
    """As a service would take it that trusts its callers."""

    user_id: str
    candidates: list[str]
    query: str | None = None
    ts: float


class Item(BaseModel):
    """A candidate in its place."""

    item_id: str
    score: float
    rank: int


class Ranking(BaseModel):
    """All candidates, best first."""

    version: str
    ranking: list[Item]


def create_app(version: LoadedVersion, pseudonyms: dict[str, str]) -> FastAPI:
    """Returns the service around a version."""
    app = FastAPI()

    @app.post("/v1/rank")
    async def rank(request: Request) -> Ranking:
        history = version.history(pseudonyms.get(request.user_id, ""))
        candidates = version.items.indexes_of(request.candidates)
        scores = version.score(history, candidates, now=request.ts, query=request.query)
        return Ranking(
            version=version.name,
            ranking=[
                Item(item_id=request.candidates[i], score=float(scores[i]), rank=rank)
                for rank, i in enumerate(np.argsort(-scores), 1)
            ],
        )

    return app


def main() -> None:
    """Serves the stable version of a config's shop."""
    config = load_config(sys.argv[1])
    root = Root(config.root)
    state = Log(root).refresh()
    record = next(commit for commit in state.committed if commit.version == state.stable)
    keys = Pseudonymizer.from_config(config.pseudonyms)
    pseudonyms = {str(number): keys.pseudonym(str(number)) for number in range(1, 2501)}
    app = create_app(load_version(root, record), pseudonyms)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")


if __name__ == "__main__":
    main()
