"""The vault between trials and the driver: it keeps one result, and none unless all are there."""

from __future__ import annotations

import pickle

import pytest

from raysys.errors import TrialError
from raysys.train.vault import Result, Vault

DRAWS = [{"train.alpha": 0.1}, {"train.alpha": 0.2}, {"train.alpha": 0.3}]


def result(alpha: float, score: float) -> Result:
    return Result(values={"train.alpha": alpha}, output=f"of {alpha}".encode(), score=score)


@pytest.fixture
def vault() -> Vault:
    vault = Vault()
    vault.fill(DRAWS)
    return vault


def test_each_draw_is_handed_out_once(vault: Vault) -> None:
    given = [vault.draw() for _ in DRAWS]
    assert sorted(given, key=str) == DRAWS


@pytest.mark.parametrize("scores", [(3.0, 1.0, 2.0), (1.0, 3.0, 2.0), (1.0, 2.0, 3.0)])
def test_the_best_one_is_kept_and_no_other(vault: Vault, scores: tuple[float, ...]) -> None:
    for alpha, score in zip((0.1, 0.2, 0.3), scores, strict=True):
        vault.offer(result(alpha, score))
    best = vault.winner()
    assert best.score == 3.0
    held = pickle.dumps(vault.__dict__)
    for alpha in (0.1, 0.2, 0.3):
        kept = f"of {alpha}".encode() in held
        assert kept == (best.values["train.alpha"] == alpha)


def test_nothing_is_chosen_while_one_is_missing(vault: Vault) -> None:
    vault.offer(result(0.1, 1.0))
    vault.offer(result(0.2, 2.0))
    with pytest.raises(TrialError, match="process was lost"):
        vault.winner()


def test_a_failed_trial_is_better_than_any_other(vault: Vault) -> None:
    vault.fail({"train.alpha": 0.2}, "not finite")
    vault.offer(result(0.1, 1.0))
    vault.offer(result(0.3, 9.0))
    with pytest.raises(TrialError, match=r"selection: train\.alpha=0\.2: not finite; mend") as told:
        vault.winner()
    assert "0.1" not in str(told.value) and "0.3" not in str(told.value)
