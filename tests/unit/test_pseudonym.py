"""The raw user id ends at the door, and its pseudonym decides shard and hold-out for good."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import polars as pl
import pytest

from raysys.errors import ConfigError
from raysys.ingest.pseudonym import Pseudonymizer, is_held_out, is_pseudonym, user_shard

KEY = b"0123456789abcdef"


def many(num: int = 20_000, key: bytes = KEY) -> pl.DataFrame:
    hasher = Pseudonymizer(key)
    return pl.DataFrame({"user": [hasher.pseudonym(str(i)) for i in range(num)]})


class TestPseudonymizer:
    def test_a_pseudonym_is_a_truncated_hmac_sha256(self) -> None:
        expected = hmac.new(KEY, "zoë".encode(), hashlib.sha256).hexdigest()[:32]
        assert Pseudonymizer(KEY).pseudonym("zoë") == expected

    def test_another_key_gives_another_pseudonym_and_another_key_id(self) -> None:
        one, other = Pseudonymizer(KEY), Pseudonymizer(KEY[::-1])
        assert one.pseudonym("alice") != other.pseudonym("alice")
        assert one.key_id != other.key_id

    def test_neither_repr_nor_key_id_shows_the_key(self) -> None:
        hasher = Pseudonymizer(KEY)
        assert KEY.decode() not in repr(hasher)
        assert hasher.key_id not in (KEY.decode()[:8], KEY.hex()[:8])
        # Not the plain hash either: that would let one test guesses of a weak key elsewhere.
        assert hasher.key_id != hashlib.sha256(KEY).hexdigest()[:8]

    def test_white_space_around_the_key_in_its_file_does_not_count(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_bytes(b" " + KEY + b"\n")
        assert Pseudonymizer.from_file(path) == Pseudonymizer(KEY)

    def test_a_missing_key_file_names_the_file_and_the_remedy(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"key_file: .*/nowhere cannot be read.*openssl rand"):
            Pseudonymizer.from_file(tmp_path / "nowhere")

    @pytest.mark.parametrize("content", [b"", b"short", b"  fifteen bytes!  "])
    def test_a_short_key_is_refused_with_its_length_and_the_bound(
        self, tmp_path: Path, content: bytes
    ) -> None:
        path = tmp_path / "key"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"holds {len(content.strip())} bytes, at least 16"):
            Pseudonymizer.from_file(path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(Pseudonymizer(KEY).pseudonym("alice"), True, id="a pseudonym"),
        pytest.param("alice", False, id="a raw id"),
        pytest.param("f" * 31, False, id="too short"),
        pytest.param("f" * 33, False, id="too long"),
        pytest.param("F" * 32, False, id="upper case"),
        pytest.param("f" * 32 + "\n", False, id="a line break"),
        pytest.param("g" * 32, False, id="no hex digits"),
    ],
)
def test_a_pseudonym_is_told_from_other_text(value: str, expected: bool) -> None:
    frame = pl.DataFrame({"user": [value]})
    assert frame.select(is_pseudonym("user")).item() is expected


class TestShardAndHoldOut:
    @pytest.mark.parametrize("num_shards", [1, 3, 4])
    def test_users_spread_evenly_over_all_shards(self, num_shards: int) -> None:
        frame = many()
        counts = frame.select(shard=user_shard(num_shards)).group_by("shard").len().sort("shard")
        assert counts["shard"].to_list() == list(range(num_shards))
        share = counts["len"] / len(frame)
        assert ((share - 1 / num_shards).abs() < 0.02).all()

    @pytest.mark.parametrize("fraction", [0.05, 0.2, 0.7])
    def test_the_configured_fraction_is_held_out_in_each_shard(self, fraction: float) -> None:
        frame = many().select(shard=user_shard(4), out=is_held_out(fraction))
        shares = frame.group_by("shard").agg(pl.col("out").mean())["out"]
        assert ((shares - fraction).abs() < 0.03).all()

    def test_a_larger_fraction_holds_out_the_same_users_and_more(self) -> None:
        frame = many(2000).select(small=is_held_out(0.1), large=is_held_out(0.3))
        assert frame.filter(pl.col("small") & ~pl.col("large")).is_empty()
        assert frame["large"].sum() > frame["small"].sum()

    def test_shard_and_hold_out_come_from_two_separate_words_of_the_pseudonym(self) -> None:
        frame = many(200)
        words = [(int(name[:8], 16), int(name[8:16], 16)) for name in frame["user"]]
        found = frame.select(shard=user_shard(4), out=is_held_out(0.5)).rows()
        assert found == [(first % 4, second < 2**31) for first, second in words]
