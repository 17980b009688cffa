"""Ray Tune's schedulers and searches, as the config names them. Only without privacy.

    TuneConfig -> space_of(), scheduler_of(), search_of() -> ray.tune.Tuner -> values_of()

Ray Tune sees each value as its place in the list: lists of layers are no number, and what stands
beside a value in the list is what is near to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from safetensors.torch import load_file, save_file

from raysys.config import TuneConfig
from raysys.errors import ConfigError
from raysys.train.checkpoint import Checkpoint

NUM_LOOKS = 4
"""How often a scheduler looks at a trial's score, its end included."""


def space_of(space: Mapping[str, Sequence[object]]) -> dict[str, Any]:
    """Returns Ray Tune's search space."""
    return {key: tune.choice(list(range(len(values)))) for key, values in space.items()}


def values_of(
    places: Mapping[str, int], space: Mapping[str, Sequence[object]]
) -> dict[str, object]:
    """Returns the values of which Ray Tune chose the places."""
    return {key: values[places[key]] for key, values in space.items()}


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> tune.Checkpoint:
    """Writes what a trial goes on from, perhaps another one: PBT lets a bad trial copy a good."""
    save_file(dict(checkpoint.tensors), folder / f"{checkpoint.num_steps}.safetensors")
    return tune.Checkpoint.from_directory(folder)  # type: ignore[return-value]


def read_checkpoint(written: tune.Checkpoint) -> Checkpoint:
    """Reads what `write_checkpoint` wrote."""
    with written.as_directory() as folder:
        (file,) = Path(folder).glob("*.safetensors")
        return Checkpoint(num_steps=int(file.stem), tensors=load_file(file))


def look_every(num_steps: int) -> int:
    """Returns the steps between two looks at a trial's score."""
    return max(num_steps // NUM_LOOKS, 1)


def scheduler_of(config: TuneConfig, num_steps: int) -> TrialScheduler | None:
    """Returns the scheduler; None for Ray Tune's own, first in first out."""
    interval = look_every(num_steps)
    if config.scheduler == "asha":
        return ASHAScheduler(
            time_attr="step", max_t=num_steps, grace_period=interval, reduction_factor=2
        )
    if config.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=interval,
            hyperparam_mutations={k: list(range(len(v))) for k, v in config.space.items()},
        )
    return None


def search_of(config: TuneConfig, seed: int) -> Any:
    """Returns the search algorithm, which draws the same for the same seed.

    Raises:
      ConfigError: It needs a package that is not installed.
    """
    seed %= 2**32
    if config.search == "random":
        return BasicVariantGenerator(random_state=seed, max_concurrent=config.max_concurrent)
    try:
        from ray.tune.search.optuna import OptunaSearch

        search: Searcher = OptunaSearch(metric="score", mode="max", seed=seed)
    except (ImportError, AssertionError) as error:
        raise ConfigError(
            "tune.search: expected 'random', or Optuna beside 'bayesian': install "
            "'raysys[bayesian]', got 'bayesian'"
        ) from error
    return ConcurrencyLimiter(search, max_concurrent=config.max_concurrent)
