"""Generators for noise that nobody can draw again.

    unguessable_generator(device) -> torch.Generator -> PrivacyPlan.optimizer

On the CPU PyTorch's generator is MT19937, of whose seed it takes 32 bits: all 2^32 noises could be
tried against released weights in a day, and the right one taken off. So its whole state is filled
with the operating system's entropy. It is still not a cryptographic generator: who saw 624 of its
raw numbers would know the rest, but what is released are sums, in which nobody sees raw numbers.
"""

from __future__ import annotations

import os

import torch

from raysys.errors import PrivacyError

_NUM_WORDS = 624
_HEADER_BYTES = 24
"""Seed, numbers left, whether it is seeded, place of the next one."""
_STATE_BYTES = 5056


def unguessable_generator(device: torch.device) -> torch.Generator:
    """Returns a generator that no seed leads to; on a GPU one of a seed of 64 bits.

    Raises:
      PrivacyError: This PyTorch keeps the generator's state in another way.
    """
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(os.urandom(8), "little"))
    if device.type != "cpu":
        return generator
    state = generator.get_state()
    if len(state) != _STATE_BYTES:
        raise PrivacyError(
            f"PyTorch {torch.__version__} keeps a generator in {len(state)} bytes, expected "
            f"{_STATE_BYTES}: noise would come from a seed that can be guessed; install the "
            "version of constraints.txt"
        )
    # Each word of 32 bits is kept in 8 bytes.
    words = torch.frombuffer(bytearray(os.urandom(4 * _NUM_WORDS)), dtype=torch.uint8)
    place = state[_HEADER_BYTES : _HEADER_BYTES + 8 * _NUM_WORDS].view(_NUM_WORDS, 8)
    place[:, :4] = words.view(_NUM_WORDS, 4)
    generator.set_state(state)
    return generator
