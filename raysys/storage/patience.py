"""How long to wait for a store that does not answer, and when to ask it again.

Source: exponential backoff with jitter, Brooker (2015), "Exponential Backoff And Jitter", AWS
Architecture Blog. Half of each delay is drawn, so that clients that failed together spread out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Bounds of one operation: it ends within `give_up_after_s` and one request's timeouts."""

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    """Longest silence of the store within one request."""
    first_delay_s: float = 0.2
    """Before the second attempt; doubled before each later one."""
    max_delay_s: float = 5.0
    give_up_after_s: float = 60.0
    """No attempt starts later than this after the first one."""

    def delay_s(self, num_failures: int, jitter: float) -> float:
        """Returns the wait after so many failures in a row, for a `jitter` in [0, 1).

        >>> [Patience().delay_s(failures, 0.0) for failures in (1, 2, 3, 9)]
        [0.1, 0.2, 0.4, 2.5]
        """
        doubled = self.first_delay_s * 2.0 ** min(num_failures - 1, 30)
        return min(doubled, self.max_delay_s) * (1.0 + jitter) / 2.0
