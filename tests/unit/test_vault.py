"""The vault between trials and the driver: it keeps one result, and none unless all are there."""

from __future__ import annotations

import contextlib
import pickle
import random
from types import SimpleNamespace
from typing import Any

import pytest

from raysys.errors import TrialError
from raysys.train import tune
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


def test_after_a_failure_no_other_trial_starts(vault: Vault) -> None:
    assert vault.draw() is not None
    vault.fail({"train.alpha": 0.3}, "not finite")
    assert vault.draw() is None


def test_what_is_tried_is_drawn_from_entropy_that_no_seed_repeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever could draw again would know how many trials there were, and of which one is told."""

    class Drawn(Exception): ...

    def drawn() -> list[Any]:
        random.seed(0)

        def fill(draws: list[Any]) -> None:
            raise Drawn(draws)

        space = {"train.learning_rate": tuple(range(1000))}
        trials: Any = SimpleNamespace(
            selection=object(), config=SimpleNamespace(tune=SimpleNamespace(space=space)), seed=0
        )
        vault = SimpleNamespace(fill=SimpleNamespace(remote=fill))
        with pytest.raises(Drawn) as told:
            tune._select_privately(trials, vault)
        return list(told.value.args[0])

    numbers: list[float] = []

    def draw_num_trials(selection: Any, rng: random.Random) -> int:
        numbers.append(rng.random())
        return 5

    monkeypatch.setattr(tune, "draw_num_trials", draw_num_trials)
    first, second = drawn(), drawn()
    assert first != second and numbers[0] != numbers[1]


@pytest.mark.parametrize("is_private", [True, False])
def test_what_a_private_trial_failed_of_is_told_to_the_vault_alone(
    is_private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune writes down and prints what reaches it, even that something did."""
    monkeypatch.setattr(tune.ray, "get", lambda answer: answer)
    kept = Vault()
    vault = SimpleNamespace(fail=SimpleNamespace(remote=kept.fail))
    trials: Any = SimpleNamespace(selection=object() if is_private else None)
    reaches_ray = contextlib.nullcontext() if is_private else pytest.raises(ValueError, match="0")
    with reaches_ray, tune._failing_all(trials, {"train.alpha": 0.125}, vault):
        raise ValueError("a loss of 0.625")
    told = "ValueError" if is_private else r"ValueError: a loss of 0\.625"
    with pytest.raises(TrialError, match=rf"train\.alpha=0\.125: {told}; mend"):
        kept.winner()
