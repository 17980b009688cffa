"""Measures the budget of a year: 365 updates, each composed with those before it.

    python benchmarks/accounting.py              # about a minute; the last line is one JSON object
    python benchmarks/accounting.py --scale 0.05 # a twentieth of the updates, to see that it runs

What is timed is what a production update does about its budget: it reads the privacy loss that the
update before it kept, adds what that one spent, keeps the sum for the next one, and checks that its
own reservation still fits. The ledger is a real one, on a local folder, and nothing is remembered
from update to update but what lies there; `_cold` and `_distinct` figures also forget the
mechanisms, as every new process does, or have other noise in each update. Mechanisms are the
reference ones: noise multiplier 1, a user in a step with probability 1024 / 200000, 195 steps,
delta 1e-6.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shop_ledger import day_partition

from raysys.config import PrivacyConfig
from raysys.ingest.groups import cohort_group
from raysys.ledger.log import Log
from raysys.ledger.records import (
    KEPT_LOSSES,
    PrivacySpend,
    StepsPermitted,
    UpdateCommitted,
    UpdateStarted,
)
from raysys.privacy.accounting import epsilon
from raysys.privacy.budget import check_reservation, report_budget
from raysys.privacy.composed import forget_mechanisms
from raysys.privacy.kept import forget, keep
from raysys.storage import Root

NUM_UPDATES = 365
CONFIG = PrivacyConfig(epsilon_total=100.0, delta=1e-6)
DAY = PrivacySpend(
    num_steps=195,
    sampling_prob=1024 / 200_000,
    noise_multiplier=1.0,
    num_count_releases=0,
    count_noise_multiplier=12.0,
)


def main() -> None:
    """Runs all, prints each figure as it comes and all of them as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="Share of the updates.")
    num = max(int(NUM_UPDATES * parser.parse_args().scale), 2)
    distinct = [dataclasses.replace(DAY, noise_multiplier=1 + i / 1000) for i in range(num)]
    cohorts = [dataclasses.replace(DAY, group=cohort_group(46, "key", i)) for i in range(num)]
    figures: dict[str, float] = {}
    lives: list[tuple[str, Sequence[PrivacySpend], Callable[[], None]]] = [
        ("", [DAY] * num, lambda: None),
        ("_cold", [DAY] * num, forget_mechanisms),
        ("_distinct", distinct, forget_mechanisms),
        ("_cohorts_46", cohorts, lambda: None),
    ]
    with tempfile.TemporaryDirectory() as name:
        for suffix, spends, before_each in lives:
            forget_mechanisms()
            root = Root((Path(name) / f"life{suffix}").as_uri())
            _report(figures, suffix, live(root, spends, before_each))
            if suffix in ("", "_distinct"):
                state = Log(root).refresh()
                began = time.perf_counter()
                report_budget(state, CONFIG)
                _report(figures, suffix, {"raysys_budget_s": time.perf_counter() - began})
            began = time.perf_counter()
            recomputed = {"epsilon_365_recomputed": epsilon(spends, CONFIG.delta)}
            recomputed["recompute_365_s"] = time.perf_counter() - began
            _report(figures, suffix, recomputed)
    print(json.dumps(figures))


def live(
    root: Root, spends: Sequence[PrivacySpend], before_each: Callable[[], None]
) -> dict[str, float]:
    """Writes the ledger of a life; returns the seconds that its accounting took, and epsilon."""
    log, seconds, spent, cpu_s = Log(root), list[float](), 0.0, 0.0
    for number, spend in enumerate(spends):
        forget()
        before_each()
        state = log.refresh()
        began, cpu = time.perf_counter(), time.process_time()
        kept = keep(root, state)
        spent = check_reservation(state, [spend], CONFIG, root)
        seconds.append(time.perf_counter() - began)
        cpu_s += time.process_time() - cpu
        start = _started(number, spend)
        _update(log, dataclasses.replace(start, kept_loss=kept))
    tenth = max(len(seconds) // 10, 1)
    return {
        "compose_365_s": sum(seconds),
        "compose_365_cpu_s": cpu_s,
        "first_tenth_ms": 1000 * sum(seconds[:tenth]) / tenth,
        "last_tenth_ms": 1000 * sum(seconds[-tenth:]) / tenth,
        "kept_bytes": float(max(info.size_bytes for info in root.list(KEPT_LOSSES))),
        "epsilon_365": spent,
    }


def _started(number: int, spend: PrivacySpend) -> UpdateStarted:
    return UpdateStarted(
        update_id=f"u{number + 1:04d}-000000",
        owner="bench:1",
        lease_expires_at=0.0,
        partitions=(day_partition(number),),
        item_files=(),
        base_version=None,
        base_state=None,
        config_hash="0" * 64,
        user_key_id="key",
        seed=0,
        private=True,
        reserved=spend,
        permits_steps=True,
    )


def _update(log: Log, start: UpdateStarted) -> None:
    assert start.reserved is not None
    permit = StepsPermitted(update_id=start.update_id, num_steps=start.reserved.num_steps)
    commit = UpdateCommitted(
        update_id=start.update_id, owner=start.owner, version=None, verdict="held", reason="bench",
        base_version=None, partitions=start.partitions, item_files=(), watermark="2017-01-01",
        num_rows=1, num_users=1, row_counts={}, quarantined_files={}, artifacts={}, metrics={},
        config_hash=start.config_hash, seed=0, private=True, spent=start.reserved, seconds=1.0,
        user_key_id="key",
    )  # fmt: skip
    for record in (start, permit, commit):
        log.transact(lambda state, record=record: record)  # type: ignore[misc]


def _report(figures: dict[str, float], suffix: str, found: dict[str, float]) -> None:
    for name, value in found.items():
        figures[f"{name}{suffix}"] = round(value, 4)
        print(f"{name}{suffix} {value:.4g}", flush=True)


if __name__ == "__main__":
    main()
