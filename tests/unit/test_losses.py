"""The listwise loss: padding and requests without gain count for nothing, and all is finite."""

from __future__ import annotations

import math

import pytest
import torch

from raysys.model.losses import listwise_loss, pointwise_loss

SHAPE = (2, 3, 4)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gains = torch.zeros(SHAPE)
    gains[..., 0], gains[..., 1] = 3.0, 1.0
    return {
        "scores": torch.randn(SHAPE, generator=generator, requires_grad=True),
        "gains": gains,
        "weight": torch.ones(SHAPE),
        "log_q": torch.randn(SHAPE, generator=generator),
        "valid": torch.ones(SHAPE, dtype=torch.bool),
    }


def score_gradient(values: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = listwise_loss(**values)
    assert loss.shape == (2,) and torch.isfinite(loss).all()
    (gradient,) = torch.autograd.grad(loss.sum(), values["scores"])
    assert torch.isfinite(gradient).all()
    return gradient


def test_the_loss_is_the_cross_entropy_of_gains_and_corrected_scores() -> None:
    values = batch()
    expected = torch.zeros(2)
    for user in range(2):
        for request in range(3):
            logits = (values["scores"] - values["log_q"])[user, request]
            probability = logits.exp() / logits.exp().sum()
            expected[user] -= 0.75 * probability[0].log() + 0.25 * probability[1].log()
    torch.testing.assert_close(listwise_loss(**values), expected)


def test_padding_changes_neither_the_loss_nor_a_gradient() -> None:
    values, padded = batch(), batch()
    values["scores"] = padded["scores"].detach().requires_grad_()
    filler = {"scores": 1e4, "gains": 0.0, "weight": 0.0, "log_q": -1e4, "valid": False}
    for name, value in filler.items():
        tail = torch.full((2, 3, 2), value, dtype=padded[name].dtype)
        padded[name] = torch.cat([padded[name].detach(), tail], -1)
    padded["scores"].requires_grad_()
    torch.testing.assert_close(listwise_loss(**padded), listwise_loss(**values))
    gradient = score_gradient(padded)
    assert not gradient[..., 4:].any()
    torch.testing.assert_close(gradient[..., :4], score_gradient(values))


def test_padding_that_is_not_masked_would_change_the_loss() -> None:
    values = batch()
    more = {
        name: torch.cat([value.detach(), torch.zeros(2, 3, 1, dtype=value.dtype)], -1)
        for name, value in values.items()
    }
    more["valid"][..., 4] = True
    assert not torch.allclose(listwise_loss(**more), listwise_loss(**values), atol=1e-2)


@pytest.mark.parametrize("valid", [True, False], ids=["candidates", "padding only"])
def test_a_request_without_gain_has_no_loss_and_no_gradient(valid: bool) -> None:
    values = batch()
    alone = listwise_loss(**{name: value[:1, :2] for name, value in values.items()})
    values["gains"][0, 2] = 0.0
    values["valid"][0, 2] = valid
    gradient = score_gradient(values)
    assert not gradient[0, 2].any() and gradient[0, 1].any()
    torch.testing.assert_close(listwise_loss(**values)[:1], alone)


@pytest.mark.parametrize("size", [1e4, 1e30], ids="scores of {:g}".format)
def test_huge_scores_stay_finite(size: float) -> None:
    values = batch()
    values["scores"] = (values["scores"].detach() * size).requires_grad_()
    assert torch.isfinite(score_gradient(values)).all()


def test_the_scale_of_a_requests_gains_does_not_matter_but_their_ratio_does() -> None:
    values = batch()
    once = listwise_loss(**values)
    torch.testing.assert_close(listwise_loss(**{**values, "gains": values["gains"] * 7}), once)
    even = values["gains"].clone()
    even[..., 1] = 3.0
    assert not torch.allclose(listwise_loss(**{**values, "gains": even}), once, atol=1e-3)


class TestPointwise:
    def test_it_is_the_mean_cross_entropy_of_a_requests_candidates(self) -> None:
        values = batch()
        target = (values["gains"] > 0).float()
        probability = torch.sigmoid(values["scores"] - values["log_q"])
        each = -(target * probability.log() + (1 - target) * (1 - probability).log())
        torch.testing.assert_close(pointwise_loss(**values), each.mean(-1).sum(-1))

    def test_padding_changes_nothing(self) -> None:
        values, padded = batch(), batch()
        filler = {"scores": 7.0, "gains": 0.0, "weight": 5.0, "log_q": -2.0, "valid": False}
        for name, value in filler.items():
            tail = torch.full((2, 3, 2), value, dtype=padded[name].dtype)
            padded[name] = torch.cat([padded[name].detach(), tail], -1)
        torch.testing.assert_close(pointwise_loss(**padded), pointwise_loss(**values))
        padded["valid"][:] = False
        assert not pointwise_loss(**padded).any()

    def test_a_request_without_an_outcome_teaches_it_and_not_the_listwise_loss(self) -> None:
        values = batch()
        values["gains"] = torch.zeros(SHAPE)
        assert bool((pointwise_loss(**values) > 0).all())
        assert not listwise_loss(**values).any()

    @pytest.mark.parametrize("share", [1.0, 0.1])
    def test_log_odds_are_those_among_all_whatever_share_of_negatives_was_kept(
        self, share: float
    ) -> None:
        assert self.fitted_log_odds(share, log_q=math.log(share)) == pytest.approx(
            math.log(0.05 / 0.95), abs=0.05
        )

    def test_a_loss_that_is_not_told_of_the_share_is_off_by_its_log(self) -> None:
        off = self.fitted_log_odds(0.1, log_q=0.0) - math.log(0.05 / 0.95)
        assert off == pytest.approx(-math.log(0.1), abs=0.05)

    def fitted_log_odds(self, share: float, *, log_q: float) -> float:
        """One score for all candidates, fitted to 5 % positives of which all are kept."""
        num_positives, num_negatives = 50, round(950 * share)
        gains = torch.cat([torch.ones(num_positives), torch.zeros(num_negatives)])[None, None]
        score = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS([score], max_iter=50)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = pointwise_loss(
                score.expand(gains.shape), gains, torch.ones_like(gains),
                torch.full_like(gains, log_q), torch.ones_like(gains, dtype=torch.bool),
            ).sum()  # fmt: skip
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        return score.detach().item()


def test_the_weight_of_an_outcome_scales_its_part_of_the_loss() -> None:
    values = batch()
    values["weight"] = torch.full(SHAPE, 2.0)
    for loss in (listwise_loss, pointwise_loss):
        torch.testing.assert_close(loss(**values), 2 * loss(**batch()))
