"""The composed privacy loss of many updates, to which one more is added at no more cost.

    Composed.nothing() -> .plus(spend) -> .plus(spend) … -> .epsilon(delta)

Users in disjoint groups (`UserGroup`) compose in parallel: each group has its own privacy loss
distribution, and what reads everyone's data has one that is common to all. A user belongs to one
group of every scheme, so for a scheme that is looked at, the worst user of a group has lost what is
common, what groups of *other* schemes were charged (they may all overlap with this one), and what
the group itself was charged. Every scheme gives a bound that holds for all users; the least counts.

Adding an update convolves its distribution with those so far, so it does not matter how many there
were before. Sources: as `privacy.accounting`; parallel composition is McSherry 2009, theorem 4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.common import DifferentialPrivacyParameters
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from raysys.ledger.records import PrivacySpend, UserGroup
from raysys.privacy.charges import Charge, charges

FINE = 1e-4
"""Step of the privacy loss where all is composed at once."""
COARSE = 5e-4
"""Step where updates are added one by one: 365 of them come out 0.05 % higher, in a tenth of the
time and a fifth of the space (benchmarks/accounting.py)."""

Ran = Counter[dp_accounting.DpEvent]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What some users have lost."""

    loss: PrivacyLossDistribution
    ran: Mapping[dp_accounting.DpEvent, int]
    """How often each mechanism ran. A group that ran no more of any than another one lost no more,
    which spares comparing their losses."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Composed:
    """The privacy loss of everything so far. It never changes; `plus` makes a new one."""

    interval: float
    common: Part
    groups: Mapping[UserGroup, Part]

    @classmethod
    def nothing(cls, interval: float = COARSE) -> Composed:
        """Nothing was spent."""
        return cls(interval=interval, common=_no_loss(interval), groups=MappingProxyType({}))

    @classmethod
    def at_once(cls, spends: Iterable[PrivacySpend], interval: float = FINE) -> Composed:
        """Composes all spends together: equal mechanisms are joined first, which is faster."""
        runs: dict[UserGroup | None, Ran] = {}
        for spend in spends:
            for charge in charges(spend):
                runs.setdefault(charge.group, Counter())[charge.event] += charge.num
        joined = [
            Charge(event=event, num=num, group=group)
            for group, ran in runs.items()
            for event, num in ran.items()
        ]
        return cls.nothing(interval)._with(joined)

    def plus(self, spend: PrivacySpend) -> Composed:
        """Returns what is composed with one more update."""
        return self._with(charges(spend))

    def epsilon(self, delta: float) -> float:
        """Returns the epsilon at `delta` of the worst user."""
        schemes = {group.scheme for group in self.groups}
        if not schemes:
            return _epsilon(self.common.loss, delta)
        return min(self._worst(scheme, delta) for scheme in schemes)

    def _worst(self, scheme: str, delta: float) -> float:
        """Returns the epsilon of the group of a scheme that lost the most."""
        everyone, own = self.common.loss, list[Part]()
        for group, part in self.groups.items():
            if group.scheme == scheme:
                own.append(part)
            else:
                everyone = everyone.compose(part.loss)
        return max(_epsilon(everyone.compose(part.loss), delta) for part in _undominated(own))

    def _with(self, further: Iterable[Charge]) -> Composed:
        common, groups = self.common, dict(self.groups)
        for charge in further:
            if charge.group is None:
                common = _add(common, charge, self.interval)
            else:
                before = groups.get(charge.group) or _no_loss(self.interval)
                groups[charge.group] = _add(before, charge, self.interval)
        return dataclasses.replace(self, common=common, groups=MappingProxyType(groups))


def _no_loss(interval: float) -> Part:
    return Part(
        loss=privacy_loss_distribution.identity(value_discretization_interval=interval),
        ran=MappingProxyType({}),
    )


def _add(part: Part, charge: Charge, interval: float) -> Part:
    ran = {**part.ran, charge.event: part.ran.get(charge.event, 0) + charge.num}
    loss = part.loss.compose(_loss_of(charge.event, charge.num, interval))
    return Part(loss=loss, ran=MappingProxyType(ran))


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
        case dp_accounting.EpsilonDeltaDpEvent():
            bound = DifferentialPrivacyParameters(event.epsilon, event.delta)
            return privacy_loss_distribution.from_privacy_parameters(
                bound, value_discretization_interval=interval
            ).self_compose(num)
    raise AssertionError(f"no mechanism of this project makes {event}")


def _undominated(parts: list[Part]) -> list[Part]:
    """Returns those parts of which no other ran at least as much of everything."""
    kept: list[Part] = []
    for part in sorted(parts, key=lambda part: -sum(part.ran.values())):
        if not any(_dominates(other.ran, part.ran) for other in kept):
            kept.append(part)
    return kept


def _dominates(
    more: Mapping[dp_accounting.DpEvent, int], less: Mapping[dp_accounting.DpEvent, int]
) -> bool:
    return all(more.get(event, 0) >= num for event, num in less.items())


def _epsilon(loss: PrivacyLossDistribution, delta: float) -> float:
    return float(loss.get_epsilon_for_delta(delta))
