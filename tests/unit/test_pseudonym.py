"""The raw user id ends at the door, and its pseudonym decides shard and hold-out for good."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import PseudonymConfig
from raysys.errors import ConfigError
from raysys.ingest.pseudonym import (
    HELD_OUT_SCHEMA,
    Pseudonymizer,
    carry_forward,
    check_key,
    draw_held_out,
    is_held_out,
    is_pseudonym,
    replace_inside,
    user_shard,
)

KEY = b"0123456789abcdef"
NEXT, LAST = b"fedcba9876543210", b"a third key that is longer than the others"
ENV = "RAYSYS_TEST_USER_KEY"


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

    def test_a_single_key_gives_the_pseudonyms_that_it_always_gave(self) -> None:
        """Golden: stored by every root that has never rotated its key."""
        hasher = Pseudonymizer(KEY)
        assert (hasher.key_id, hasher.key_ids) == ("7ecd1ca3", ("7ecd1ca3",))
        assert hasher.pseudonym("alice") == "fdbf8b1cacd3d578e062d0e41104357d"

    @pytest.mark.parametrize(
        "key", [b"32 random bytes\nof which one is\xff", b"\x00 line\nbreaks \n count"]
    )
    def test_a_file_of_other_bytes_than_text_is_one_key(self, tmp_path: Path, key: bytes) -> None:
        (tmp_path / "key").write_bytes(key + b"\n")
        assert Pseudonymizer.from_file(tmp_path / "key") == Pseudonymizer(key)

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


class TestSource:
    """The keys come from a file or from an environment variable of the same text."""

    def keys(self, folder: Path, text: str) -> Pseudonymizer:
        (folder / "key").write_text(text)
        return Pseudonymizer.from_file(folder / "key")

    def test_each_line_is_a_key_the_oldest_first(self, tmp_path: Path) -> None:
        text = f"{KEY.decode()}\n\n  {NEXT.decode()}\r\n{LAST.decode()}"
        assert self.keys(tmp_path, text) == Pseudonymizer(KEY, NEXT, LAST)

    def test_the_environment_holds_what_the_file_would(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = f"{KEY.decode()}\n{NEXT.decode()}\n"
        monkeypatch.setenv(ENV, text)
        found = Pseudonymizer.from_config(PseudonymConfig(key_env=ENV))
        assert found == self.keys(tmp_path, text)

    def test_a_variable_that_is_not_set_is_named_in_one_line(self) -> None:
        with pytest.raises(ConfigError, match=f"^pseudonyms.key_env: .* {ENV} is not set") as error:
            Pseudonymizer.from_config(PseudonymConfig(key_env=ENV))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            pytest.param(
                f"{KEY.decode()}\nshort", "line 2, holds 5 bytes, at least 16", id="short"
            ),
            pytest.param(
                f"{KEY.decode()}\n{NEXT.decode()}\n{KEY.decode()}",
                "line 3, holds an earlier key again",
                id="twice",
            ),
            pytest.param("short", "holds 5 bytes, at least 16", id="only-one"),
            pytest.param("  \n ", "holds 0 bytes", id="empty"),
        ],
    )
    def test_a_bad_line_is_told_by_its_number_and_never_shown(
        self, text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(ENV, text)
        messages = []
        for read in (
            lambda: self.keys(tmp_path, text),
            lambda: Pseudonymizer.from_config(PseudonymConfig(key_env=ENV)),
        ):
            with pytest.raises(ConfigError, match=problem) as error:
                read()
            messages.append(str(error.value))
        assert messages[0].startswith(f"pseudonyms.key_file: {tmp_path}/key")
        assert messages[1].startswith(f"pseudonyms.key_env: {ENV}")
        assert not any(key in "".join(messages) for key in ("short", KEY.decode(), NEXT.decode()))


class TestChain:
    CHAIN = Pseudonymizer(KEY, NEXT, LAST)

    def test_a_pseudonym_runs_through_all_keys(self) -> None:
        text = "zoë"
        for key in (KEY, NEXT, LAST):
            text = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:32]
        assert self.CHAIN.pseudonym("zoë") == text

    @given(user=st.text(), num_keys=st.integers(1, 3))
    def test_an_earlier_pseudonym_is_carried_forward_without_the_raw_id(
        self, user: str, num_keys: int
    ) -> None:
        user = user.encode(errors="replace").decode()
        earlier = Pseudonymizer(*self.CHAIN.keys[:num_keys])
        assert self.CHAIN.until(earlier.key_id) == earlier
        carried = self.CHAIN.translate(earlier.pseudonym(user), earlier.key_id)
        assert carried == self.CHAIN.pseudonym(user)

    def test_a_key_id_names_all_keys_up_to_its_own(self) -> None:
        assert self.CHAIN.key_ids[0] == Pseudonymizer(KEY).key_id
        assert self.CHAIN.key_ids[1] == Pseudonymizer(KEY, NEXT).key_id
        assert (
            len({*self.CHAIN.key_ids, Pseudonymizer(NEXT, KEY).key_id, Pseudonymizer(NEXT).key_id})
            == 5
        )

    def test_a_key_alone_does_not_compute_a_later_pseudonym(self) -> None:
        """Neither the old key that leaked nor the new one: both are needed."""
        chain = Pseudonymizer(KEY, NEXT)
        alone = {Pseudonymizer(key).pseudonym("alice") for key in (KEY, NEXT)}
        assert chain.pseudonym("alice") not in alone
        assert not any(chain.pseudonym("alice")[:8] == name[:8] for name in alone)

    def test_an_unknown_key_id_is_refused_with_those_there_are(self) -> None:
        for refused in (
            lambda: self.CHAIN.translate("f" * 32, "00000000"),
            lambda: self.CHAIN.until("00000000"),
        ):
            with pytest.raises(ConfigError, match=f"key 00000000 is not .*{self.CHAIN.key_ids[1]}"):
                refused()

    def test_no_key_is_shown(self) -> None:
        shown = f"{self.CHAIN} {self.CHAIN!r}"
        assert not any(key.decode() in shown for key in self.CHAIN.keys)


class TestCheckKey:
    CHAIN = Pseudonymizer(KEY, NEXT)

    def test_the_newest_key_and_a_new_root_pass(self) -> None:
        check_key(self.CHAIN, None, "file:///shop")
        check_key(self.CHAIN, self.CHAIN.key_id, "file:///shop")

    def test_an_earlier_key_asks_for_a_rotation(self) -> None:
        with pytest.raises(ConfigError, match=r"of key 7ecd1ca3; run jobs/rotate_key.py first"):
            check_key(self.CHAIN, "7ecd1ca3", "file:///shop")

    def test_a_key_that_is_not_there_is_asked_for(self) -> None:
        with pytest.raises(ConfigError, match="made with key 00000000; give the old key back"):
            check_key(self.CHAIN, "00000000", "file:///shop")


class TestCarryForward:
    CHAIN, OLD = Pseudonymizer(KEY, NEXT), Pseudonymizer(KEY)

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1)), max_size=20))
    def test_it_is_one_call_a_row_of_the_chain(self, rows: list[tuple[str, int]]) -> None:
        chains = [self.OLD, self.CHAIN]
        users = pl.Series("u", [chains[n].pseudonym(u) for u, n in rows], pl.String())
        keys = pl.Series([chains[n].key_id for _, n in rows], dtype=pl.String())
        carried = carry_forward(users, keys, self.CHAIN)
        assert carried.to_list() == [self.CHAIN.pseudonym(user) for user, _ in rows]
        assert carried.name == "u"

    def test_what_has_no_key_is_returned_as_it_is(self) -> None:
        users = pl.Series(["alice", self.OLD.pseudonym("bob"), None])
        carried = carry_forward(users, pl.Series([None, self.OLD.key_id, None]), self.CHAIN)
        assert carried.to_list() == ["alice", self.CHAIN.pseudonym("bob"), None]

    def test_one_key_may_stand_for_all(self) -> None:
        users = pl.Series([self.OLD.pseudonym(user) for user in "aba"])
        carried = carry_forward(users, self.OLD.key_id, self.CHAIN)
        assert carried.to_list() == [self.CHAIN.pseudonym(user) for user in "aba"]

    def test_a_pseudonym_inside_of_a_text_is_replaced(self) -> None:
        old, new = self.OLD.pseudonym("alice"), self.CHAIN.pseudonym("alice")
        frame = pl.DataFrame(
            {"old": [old, old, "1"], "new": [new, new, new], "text": [f"n.{old}.mac", None, "101"]}
        )
        found = replace_inside(frame, "text", old="old", new="new")
        # Text that is no pseudonym is not looked for: a raw id may be any.
        assert found["text"].to_list() == [f"n.{new}.mac", None, "101"]


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

    def test_a_draw_outlives_its_pseudonym_and_its_fraction(self) -> None:
        """Someone who was trained on may not be held out later, whatever is configured."""
        chain, frame = Pseudonymizer(KEY, NEXT), many(2000)
        before = draw_held_out(frame["user"], pl.DataFrame(schema=HELD_OUT_SCHEMA), 0.2)
        carried = before.with_columns(
            user=pl.Series([chain.translate(user, chain.key_ids[0]) for user in before["user"]])
        )
        newcomers = many(4000, key=b"another 16 bytes")["user"]
        after = draw_held_out(newcomers, carried, 0.5)
        kept = carried.join(after, on="user", suffix="_after", validate="1:1")
        assert len(kept) == 2000 and (kept["held_out"] == kept["held_out_after"]).all()
        new = after.join(carried, on="user", how="anti")
        assert len(new) == 4000 and abs(new["held_out"].mean() - 0.5) < 0.03
        # Without what was kept, the gate would compare on users who were trained on.
        redrawn = draw_held_out(carried["user"], pl.DataFrame(schema=HELD_OUT_SCHEMA), 0.2)
        both = carried.join(redrawn, on="user", suffix="_anew")
        assert both.filter(~pl.col("held_out") & pl.col("held_out_anew")).height > 200

    def test_shard_and_hold_out_come_from_two_separate_words_of_the_pseudonym(self) -> None:
        frame = many(200)
        words = [(int(name[:8], 16), int(name[8:16], 16)) for name in frame["user"]]
        found = frame.select(shard=user_shard(4), out=is_held_out(0.5)).rows()
        assert found == [(first % 4, second < 2**31) for first, second in words]
