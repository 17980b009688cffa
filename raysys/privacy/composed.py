"""The composed privacy loss of many updates, to which one more is added at no more cost.

    Composed.nothing() -> .plus(spend) -> .plus(spend) … -> .epsilon(delta)

Users in disjoint groups (`UserGroup`) compose in parallel. A user belongs to one group of every
scheme, so for a scheme that is looked at, the worst user of a group has lost what everyone was
charged, what groups of *other* schemes were charged (they may all overlap with this one), and what
the group itself was charged. Every scheme gives a bound that holds for all users; the least counts.

Adding an update convolves its privacy loss distribution with that of those so far, so it does not
matter how many there were before. Sources: as `privacy.accounting`; parallel composition is of
McSherry 2009, theorem 4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.common import DifferentialPrivacyParameters
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from raysys.ledger.records import PrivacySpend, UserGroup
from raysys.privacy.charges import Charge, EpsilonDelta, charges

FINE = 1e-4
"""Step of the privacy loss where all is composed at once."""
COARSE = 5e-4
"""Step where updates are added one by one: 365 of them come out 0.05 % higher, in a tenth of the
time and a fifth of the space (benchmarks/accounting.py)."""

Runs = Counter[dp_accounting.DpEvent]


class Part:
    """What some users have lost: mechanisms that ran, and the distribution of the privacy loss.

    The distribution is composed when it is first asked for, since few are: of two groups, one that
    ran no more of any mechanism than the other lost no more either.
    """

    __slots__ = ("_before", "_further", "_interval", "_loss", "ran")

    def __init__(self, interval: float) -> None:
        self.ran: Runs = Counter()
        """How often each mechanism ran."""
        self._interval = interval
        self._loss = privacy_loss_distribution.identity(value_discretization_interval=interval)
        self._before: Part | None = None
        self._further: Sequence[Charge] = ()

    @classmethod
    def restored(cls, ran: Runs, loss: PrivacyLossDistribution, interval: float) -> Part:
        """Returns a part whose loss was composed before."""
        part = cls(interval)
        part.ran, part._loss = ran, loss
        return part

    def plus(self, further: Sequence[Charge]) -> Part:
        """Returns the part after further charges."""
        part = Part(self._interval)
        part.ran = self.ran + Counter({charge.event: charge.num for charge in further})
        part._before, part._further, part._loss = self, further, None
        return part

    @property
    def loss(self) -> PrivacyLossDistribution:
        """The distribution of the privacy loss."""
        # A loop, since a group may have been charged hundreds of times before anyone asks.
        pending = [self]
        while pending[-1]._loss is None:
            before = pending[-1]._before
            assert before is not None
            pending.append(before)
        loss = pending.pop()._loss
        for part in reversed(pending):
            for charge in part._further:
                loss = loss.compose(_loss_of(charge.event, charge.num, self._interval))
            part._loss, part._before, part._further = loss, None, ()
        return loss


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Composed:
    """The privacy loss of everything so far. It never changes; `plus` makes a new one."""

    interval: float
    """Step of the privacy loss."""
    everyone: Mapping[str | None, Part]
    """Scheme -> what everyone was charged, and groups of other schemes. None -> everything."""
    groups: Mapping[UserGroup, Part]

    @classmethod
    def nothing(cls, interval: float = COARSE) -> Composed:
        """Nothing was spent."""
        return cls(interval=interval, everyone={None: Part(interval)}, groups={})

    @classmethod
    def at_once(cls, spends: Iterable[PrivacySpend], interval: float = FINE) -> Composed:
        """Composes all spends together."""
        return cls.nothing(interval).plus(*spends)

    def plus(self, *spends: PrivacySpend) -> Composed:
        """Returns what is composed with further updates. Equal mechanisms of them are joined."""
        charged = _joined(spends)
        schemes = {group.scheme for group in (*charged, *self.groups) if group is not None}
        everyone = {
            scheme: self._everyone(scheme).plus(
                [
                    charge
                    for group, further in charged.items()
                    if group is None or group.scheme != scheme
                    for charge in further
                ]
            )
            for scheme in (None, *schemes)
        }
        groups = dict(self.groups)
        for group, further in charged.items():
            if group is not None:
                groups[group] = groups.get(group, Part(self.interval)).plus(further)
        return dataclasses.replace(
            self, everyone=MappingProxyType(everyone), groups=MappingProxyType(groups)
        )

    def epsilon(self, delta: float) -> float:
        """Returns the epsilon at `delta` of the worst user."""
        schemes = {group.scheme for group in self.groups}
        if not schemes:
            return _epsilon(self.everyone[None].loss, delta)
        return min(self._worst(scheme, delta) for scheme in schemes)

    def _everyone(self, scheme: str | None) -> Part:
        # No group of a scheme that is new was charged yet: all was charged to everyone.
        return self.everyone.get(scheme, self.everyone[None])

    def _worst(self, scheme: str, delta: float) -> float:
        """Returns the epsilon of the group of a scheme that lost the most."""
        everyone = self.everyone[scheme].loss
        own = [part for group, part in self.groups.items() if group.scheme == scheme]
        return max(_epsilon(everyone.compose(part.loss), delta) for part in _undominated(own))


def _joined(spends: Iterable[PrivacySpend]) -> dict[UserGroup | None, list[Charge]]:
    runs: dict[UserGroup | None, Runs] = {}
    for spend in spends:
        for charge in charges(spend):
            runs.setdefault(charge.group, Counter())[charge.event] += charge.num
    return {
        group: [Charge(event=event, num=num, group=group) for event, num in ran.items()]
        for group, ran in runs.items()
    }


@functools.lru_cache(maxsize=256)
def _loss_of(event: dp_accounting.DpEvent, num: int, interval: float) -> PrivacyLossDistribution:
    """Returns the privacy loss of a mechanism that runs `num` times."""
    match event:
        case dp_accounting.GaussianDpEvent():
            # Gaussians that are composed are one of less noise.
            return privacy_loss_distribution.from_gaussian_mechanism(
                event.noise_multiplier / num**0.5, value_discretization_interval=interval
            )
        case dp_accounting.PoissonSampledDpEvent(event=dp_accounting.GaussianDpEvent() as step):
            return privacy_loss_distribution.from_gaussian_mechanism(
                step.noise_multiplier,
                value_discretization_interval=interval,
                sampling_prob=event.sampling_probability,
            ).self_compose(num)
        case EpsilonDelta():
            bound = DifferentialPrivacyParameters(event.epsilon, event.delta)
            return privacy_loss_distribution.from_privacy_parameters(
                bound, value_discretization_interval=interval
            ).self_compose(num)
    raise AssertionError(f"no mechanism of this project makes {event}")


def _undominated(parts: list[Part]) -> list[Part]:
    """Returns those parts of which no other ran at least as much of everything."""
    kept: list[Part] = []
    for part in sorted(parts, key=lambda part: -part.ran.total()):
        if not any(part.ran <= other.ran for other in kept):
            kept.append(part)
    return kept


def _epsilon(loss: PrivacyLossDistribution, delta: float) -> float:
    return float(loss.get_epsilon_for_delta(delta))
