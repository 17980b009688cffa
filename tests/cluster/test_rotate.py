"""A key is rotated between two real updates, on S3; both versions are then served side by side."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from raysys.config import Config, load_config
from raysys.errors import ConfigError
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.shard_state import load_held_out
from raysys.ledger.log import Log
from raysys.registry.store import load_version
from raysys.serve.keys import Keys
from raysys.storage import Root
from raysys.update import run_update
from tests.update_shop import (
    DAYS,
    RAW_ID_MARK,
    find_problems,
    find_raw_ids,
    raw_id,
    write_catalogue,
    write_day,
    write_shop,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")
JOB = Path(__file__).parents[2] / "jobs" / "rotate_key.py"


def test_a_user_has_a_history_in_the_versions_before_and_after(
    s3_root: str, tiny_encoder: str, tmp_path: Path
) -> None:
    root = Root(f"{s3_root}/{uuid.uuid4().hex}")
    file = write_shop(tmp_path, root, tiny_encoder)
    write_catalogue(root)
    write_day(root, DAYS[0])
    first = run_update(load_config(file))

    with (tmp_path / "key").open("a") as key:
        key.write("\nfedcba9876543210\n")
    write_day(root, DAYS[1])
    with pytest.raises(ConfigError, match=r"run jobs/rotate_key.py first"):
        run_update(load_config(file))
    job = subprocess.run(
        [sys.executable, str(JOB), "--config", str(file)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    second = run_update(load_config(file))

    assert find_problems(root) == [] and find_raw_ids(root) == []
    assert RAW_ID_MARK not in job.stdout + job.stderr
    _check_histories(root, load_config(file))
    _check_held_out(root, first.update_id, second.update_id)


def _check_histories(root: Root, config: Config) -> None:
    """Every user of the first version is one of the second, with at least the same items."""
    keys = Keys(lambda: Pseudonymizer.from_config(config.pseudonyms))
    before, after = (load_version(root, commit) for commit in Log(root).refresh().versions.values())
    assert before.user_key_id != after.user_key_id
    num_known = 0
    for user in map(raw_id, range(160)):
        old, new = (
            version.history(keys.of(version.user_key_id).chain.pseudonym(user))
            for version in (before, after)
        )
        assert set(old.items) <= set(new.items)
        num_known += len(old.items) > 0
    assert num_known > 100


def _check_held_out(root: Root, before: str, after: str) -> None:
    chain = Pseudonymizer(b"0123456789abcdef", b"fedcba9876543210")
    old, new = (dict(load_held_out(root, name).iter_rows()) for name in (before, after))
    assert {chain.translate(user, chain.key_ids[0]): out for user, out in old.items()}.items() <= (
        new.items()
    )
