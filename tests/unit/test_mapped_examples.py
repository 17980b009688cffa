"""A worker maps its shards: it reads the users that it draws, wherever the shard lies."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pytest

from raysys.errors import RootError
from raysys.ingest.example_set import ExampleSet, map_examples
from raysys.model.encoder import TextEncoder
from raysys.storage import Root
from raysys.train.loop import train_on_shards
from tests import tiny_shop

NUM_EXAMPLES, WIDTH = 10_000, 50
PATH = "staging/u/examples/0000.arrow"
ARRAYS = [field.name for field in dataclasses.fields(ExampleSet) if field.name != "queries"]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder


def large_shard() -> ExampleSet:
    """Examples of some 40 MB."""
    rng = np.random.default_rng(0)
    out = ExampleSet.empty(NUM_EXAMPLES, WIDTH)
    out.user[:] = np.arange(NUM_EXAMPLES) // 2
    out.candidates[:] = rng.integers(100, size=out.candidates.shape)
    out.features[:] = rng.random(out.features.shape)
    return dataclasses.replace(out, queries=[f"query {i}" for i in range(NUM_EXAMPLES)])


def same(one: ExampleSet, other: ExampleSet) -> bool:
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)
    return arrays and one.queries == other.queries


def is_mapped(array: np.ndarray[Any, Any], file: Path) -> bool:
    """Whether an array's memory is this file."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < stop:
            return str(file) in line
    return False


def resident_bytes(file: Path) -> int:
    """How much of a mapped file this process holds in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and len(line.split()) > 4:
            inside = str(file) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_a_mapped_shard_is_the_shard_that_was_written(root: Root, scratch: Path) -> None:
    written = large_shard()
    root.put(PATH, written.to_bytes())
    mapped = map_examples(root, PATH)
    assert same(mapped, written)
    assert same(mapped, ExampleSet.from_bytes(root.read_bytes(PATH)))
    assert not same(mapped, dataclasses.replace(written, gains=written.gains + 1))
    assert hashlib.sha256(mapped.to_bytes()).digest() == hashlib.sha256(written.to_bytes()).digest()


def test_it_outlives_its_file_and_leaves_no_copy(root: Root, scratch: Path) -> None:
    written = large_shard()
    root.put(PATH, written.to_bytes())
    mapped = map_examples(root, PATH)
    assert list(scratch.iterdir()) == []
    root.delete_prefix("staging")
    assert same(mapped, written)


def test_it_cannot_be_written_to(local_root: Root) -> None:
    local_root.put(PATH, large_shard().to_bytes())
    mapped = map_examples(local_root, PATH)
    for name in ARRAYS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(mapped, name)[0] = 1


def test_a_shard_without_examples_maps(root: Root, scratch: Path) -> None:
    root.put(PATH, ExampleSet.empty(0, WIDTH).to_bytes())
    mapped = map_examples(root, PATH)
    assert same(mapped, ExampleSet.empty(0, WIDTH)) and mapped.num_users == 0


def test_an_absent_shard_is_file_not_found(root: Root, scratch: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"0000\.arrow"):
        map_examples(root, PATH)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux' /proc")
def test_drawing_users_reads_their_pages_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "0000.arrow"
    file.write_bytes(large_shard().to_bytes())
    size = file.stat().st_size
    assert size > 30_000_000

    mapped = ExampleSet.map(file)
    assert all(is_mapped(getattr(mapped, name), file) for name in ARRAYS)
    held = ExampleSet.from_bytes(file.read_bytes())
    assert not any(is_mapped(getattr(held, name), file) for name in ARRAYS)

    for name in ARRAYS:
        assert np.array_equal(getattr(mapped, name)[[5000, 5001]], getattr(held, name)[5000:5002])
    assert mapped.queries[5000] == "query 5000"
    # A page that is read may bring up to 2 MB of each array along: the kernel's largest folio.
    assert 0 < resident_bytes(file) < size / 2
    assert mapped.features.sum() > 0 and resident_bytes(file) > size / 2, "reading all is noticed"


def test_training_on_mapped_shards_gives_the_same_weights(
    local_root: Root, tiny_encoder: str, world: None
) -> None:
    events = tiny_shop.outcomes(20, query="w1 w2")
    examples = tiny_shop.shard(events.filter(pl.col("ts") < tiny_shop.WINDOW_START)).examples
    local_root.put(PATH, examples.to_bytes())
    job = tiny_shop.train_job(tiny_encoder, plan=tiny_shop.plan(enabled=False))
    texts = tiny_shop.distinct_texts()
    activations = TextEncoder(tiny_encoder, job.model.max_tokens).activations(texts).select(texts)
    held, mapped = (
        train_on_shards(job, [shard], activations, num_workers=1, on_step=lambda step: None)
        for shard in (examples, map_examples(local_root, PATH))
    )
    assert held.adapted_weights
    for name, weight in held.adapted_weights.items():
        assert np.array_equal(weight, mapped.adapted_weights[name])
    for name, weight in held.head.weights.items():
        assert np.array_equal(weight, mapped.head.weights[name])


def test_a_full_scratch_disk_is_named(
    s3_root: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: BinaryIO, target: BinaryIO, length: int) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    root = Root(f"{s3_root}/full-scratch")
    root.put(PATH, b"some")
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(RootError, match=r"no room in .*; free some space there, or .* TMPDIR"):
        map_examples(root, PATH)
