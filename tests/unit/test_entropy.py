"""Noise that no seed leads to."""

from __future__ import annotations

import os

import pytest
import torch

from raysys.errors import PrivacyError
from raysys.privacy import entropy
from raysys.privacy.entropy import unguessable_generator
from tests.unit.test_noise import plan

CPU = torch.device("cpu")


def noise(generator: torch.Generator) -> torch.Tensor:
    return torch.normal(0.0, 1.0, (1000,), generator=generator)


def of_seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every generator start from one seed; other entropy stays what it is."""
    real = os.urandom
    monkeypatch.setattr(entropy.os, "urandom", lambda n: b"\7" * n if n == 8 else real(n))


def test_a_seed_of_pytorch_has_32_bits_which_can_all_be_tried() -> None:
    """Why a seed from the operating system is not enough. If this fails, the module may go."""
    assert torch.equal(noise(of_seed(5)), noise(of_seed(5 + 2**32)))


def test_no_seed_leads_to_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    same_seeds(monkeypatch)
    one, other = unguessable_generator(CPU), unguessable_generator(CPU)
    assert one.initial_seed() == other.initial_seed()
    drawn = [noise(one), noise(other), noise(of_seed(one.initial_seed()))]
    assert abs(torch.corrcoef(torch.stack(drawn)) - torch.eye(3)).max() < 0.2
    assert noise(of_seed(1)).equal(noise(of_seed(1))), "the same seed would be seen"


def test_the_whole_state_is_entropy() -> None:
    start, stop = 24, 24 + 8 * 624
    states = [unguessable_generator(CPU).get_state()[start:stop].view(624, 8) for _ in range(2)]
    for state in states:
        assert len(state[:, :4].unique(dim=0)) == 624 and not state[:, 4:].any()
    assert not (states[0][:, :4] == states[1][:, :4]).all(1).any()


def test_on_a_gpu_the_seed_is_64_bits_of_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the state is the seed and a counter; no GPU is needed to see where the seed is from."""
    monkeypatch.setattr(entropy.torch, "Generator", lambda device: torch._C.Generator("cpu"))
    seeds = {unguessable_generator(torch.device("cuda")).initial_seed() for _ in range(64)}
    assert len(seeds) == 64 and max(seeds) > 2**56
    same_seeds(monkeypatch)
    found = [unguessable_generator(torch.device("cuda")).initial_seed() for _ in range(2)]
    assert found == [int.from_bytes(b"\7" * 8, "little")] * 2


def test_a_state_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "_STATE_BYTES", 16)
    with pytest.raises(PrivacyError, match="keeps a generator in 5056 bytes, expected 16"):
        unguessable_generator(CPU)


def test_private_steps_draw_from_such_a_generator(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_seeds(monkeypatch)
    weights = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(2)]
    one, other = (plan().optimizer(torch.optim.SGD([w], lr=1.0), num_workers=1) for w in weights)
    assert one.generator.initial_seed() == other.generator.initial_seed()
    assert not torch.equal(noise(one.generator), noise(other.generator))
