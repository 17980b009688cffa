"""What a follower does once, when the first version can answer."""

from __future__ import annotations

import asyncio

from raysys.ledger.log import Log
from raysys.serve.follower import Follower
from raysys.storage import Root
from tests.fakes import FakeReplica, FakeVersion
from tests.helpers import committed, started

VERSION = "v0001-aaaaaa"


def test_the_first_version_is_told_of_once_and_before_the_replica_is_ready_to_be_asked(
    local_root: Root,
) -> None:
    replica = FakeReplica(local_root, {VERSION: FakeVersion(VERSION)})
    told: list[bool] = []
    follower = Follower(
        replica.service, Log(local_root), replica.controller, interval_s=0.01,
        on_first_version=lambda: told.append(replica.service.is_ready),
    )  # fmt: skip

    async def scenario() -> None:
        await follower.start()
        assert told == []  # the ledger names no version yet
        await follower.stop()
        begun = started(partitions=())
        replica.append(begun)
        replica.append(committed(begun, version=VERSION))
        for _ in range(2):
            await follower.start()
            await follower.stop()

    asyncio.run(scenario())
    assert told == [True]
