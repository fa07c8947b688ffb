"""Proposals from a SAAS Gaussian process an objective and noisy expected hypervolume improvement, through Ax.

Every call builds its Ax experiment anew from the observations in the order of their trial index and seeds
it, so that the same observations give the same proposals, in a resumed study too.

Surrogate: Eriksson and Jankowiak 2021 (NUTS), or an ensemble of MAP fits of the same model. Acquisition:
qLogNEHVI, Daulton et al. 2021 and Ament et al. 2023.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.search.front import pareto_front
from milp_ray.search.observations import Observation, standard_errors

if TYPE_CHECKING:
    from ax.api.client import Client
    from ax.generation_strategy.generation_strategy import GenerationStrategy

    from milp_ray.config import SurrogateSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.memory.space import SearchSpace
    from milp_ray.search.acquisition import NewLayouts

# Joint posterior draws of qLogNEHVI, over all members of the ensemble together: quasi-random ones, of which a
# few dozen rank the candidates as hundreds do, and the acquisition's time is proportional to them.
N_DRAWS = 64


def propose(
    space: SearchSpace,
    objectives: Sequence[str],
    section: SurrogateSection,
    observations: Sequence[Observation],
    reference: Sequence[float],
    *,
    pending: Sequence[CanonicalLayout],
    n_proposals: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Raw points to measure next, in the order in which they were chosen: layouts that
    no observation has, all different.

    Args:
        observations: ended trials in the order of their index; failed ones have no values.
        reference: the corner of the hypervolume, in the units of the objectives.
        pending: layouts that are being measured; they are not proposed again.
        seed: of this batch.

    Raises:
        ax.exceptions.core.AxError, botorch.exceptions.BotorchError: no model could be fitted or optimised.
    """
    import torch

    torch.set_num_threads(1)  # the same sums in the same order on every machine, and no oversubscription
    from milp_ray.search.acquisition import NewLayouts

    seen = frozenset(o.key for o in observations) | frozenset(layout.key for layout in pending)
    new_layouts = NewLayouts(space, seen, _front(objectives, observations))
    client = _client(new_layouts, objectives, observations, reference, seed)
    client.set_generation_strategy(_generation_strategy(new_layouts, section))
    with _quiet():
        proposed = client.get_next_trials(max_trials=n_proposals)
    names = _ax_names(space)
    return [new_layouts.decode([float(p[name]) for name in names]) for _, p in sorted(proposed.items())]


def warm_up(section: SurrogateSection) -> None:
    """Import what :func:`propose` needs, so that the first proposal does not wait for it."""
    import ax.api.client  # noqa: F401

    import milp_ray.search.acquisition
    import milp_ray.search.features  # noqa: F401

    if section.inference == "nuts":
        import numpyro  # noqa: F401


def _front(objectives: Sequence[str], observations: Sequence[Observation]) -> tuple[CanonicalLayout, ...]:
    """Canonical layouts of the non-dominated observations."""
    measured = [o for o in observations if o.values is not None]
    values = [[(o.values or {})[name] for name in objectives] for o in measured]
    indices = pareto_front(values, [KNOWN_OBJECTIVES[name].sign for name in objectives])
    return tuple(measured[index].layout for index in indices)


def _client(
    layouts: NewLayouts,
    objectives: Sequence[str],
    observations: Sequence[Observation],
    reference: Sequence[float],
    seed: int,
) -> Client:
    from ax.api.client import Client

    measured = [o for o in observations if o.values is not None]
    signs = [KNOWN_OBJECTIVES[name].sign for name in objectives]
    with _quiet():
        client = Client(random_seed=seed)
        client.configure_experiment(parameters=_ax_parameters(layouts.space))
        client.configure_optimization(
            objective=", ".join(("-" if s > 0 else "") + n for n, s in zip(objectives, signs, strict=True)),
            # On an objective Ax takes a constraint for its threshold: the corner of the hypervolume.
            outcome_constraints=[
                f"{name} {'<=' if sign > 0 else '>='} {bound:.12f}"
                for name, sign, bound in zip(objectives, signs, reference, strict=True)
            ],
        )
        errors = standard_errors(measured, objectives)
        names = _ax_names(layouts.space)
        for observation in observations:
            row = map(int, layouts.encode(observation.raw))
            index = client.attach_trial(dict(zip(names, row, strict=True)))
            if observation.values is None:
                client.mark_trial_failed(index)
                continue
            client.complete_trial(
                index,
                raw_data={
                    name: observation.values[name]
                    if errors is None
                    else (observation.values[name], errors[name])
                    for name in objectives
                },
            )
    return client


def _generation_strategy(layouts: NewLayouts, section: SurrogateSection) -> GenerationStrategy:
    """One node: the initial points are ours (candidates.initial_points)."""
    from ax.adapter.registry import Generators
    from ax.generation_strategy.generation_node import GenerationNode
    from ax.generation_strategy.generation_strategy import GenerationStrategy
    from ax.generation_strategy.generator_spec import GeneratorSpec
    from ax.generators.torch.botorch_modular.surrogate import SurrogateSpec
    from ax.generators.torch.botorch_modular.utils import ModelConfig

    from milp_ray.search.acquisition import NewLayoutAcquisition
    from milp_ray.search.features import CanonicalFeatures, feature_options
    from milp_ray.search.nehvi import SweepNEHVI

    features = feature_options(layouts.space, _ax_names(layouts.space))
    spec = GeneratorSpec(
        generator_enum=Generators.BOTORCH_MODULAR,
        generator_kwargs={
            "surrogate_spec": SurrogateSpec(
                model_configs=[
                    ModelConfig(
                        input_transform_classes=[CanonicalFeatures],
                        input_transform_options={"CanonicalFeatures": features},
                        **_model(section),
                    )
                ],
            ),
            "botorch_acqf_class": SweepNEHVI,
            "botorch_acqf_options": {"mc_samples": _draws_per_member(section)},
            "acquisition_class": NewLayoutAcquisition,
            "acquisition_options": {"layouts": layouts},
        },
    )
    return GenerationStrategy(
        name="saas_nehvi",
        nodes=[GenerationNode(name="saas_nehvi", generator_specs=[spec], should_deduplicate=False)],
    )


def _model(section: SurrogateSection) -> dict[str, Any]:
    if section.inference == "nuts":
        from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP

        return {
            "botorch_model_class": SaasFullyBayesianSingleTaskGP,
            "mll_options": {
                "warmup_steps": section.warmup_steps,
                "num_samples": section.num_samples,
                "thinning": section.thinning,
                "disable_progbar": True,
            },
        }
    from botorch.models.map_saas import EnsembleMapSaasSingleTaskGP

    return {
        "botorch_model_class": EnsembleMapSaasSingleTaskGP,
        "model_options": {"num_taus": section.n_ensemble},
    }


def _draws_per_member(section: SurrogateSection) -> int:
    if section.inference == "map":
        members = section.n_ensemble
    else:
        members = -(-section.num_samples // section.thinning)
    return max(8, N_DRAWS // members)


def _ax_parameters(space: SearchSpace) -> list[Any]:
    """Integer ranges: bits as 0/1, the rank as an index into the ranks."""
    from ax.api.configs import RangeParameterConfig

    n_values = {parameter.name: len(parameter.values) for parameter in space.parameters()}
    return [
        RangeParameterConfig(name=name, parameter_type="int", bounds=(0, n_values[name] - 1))
        for name in _ax_names(space)
    ]


def _ax_names(space: SearchSpace) -> list[str]:
    """Ax's parameters in order: the searched ones that have a choice."""
    return [parameter.name for parameter in space.parameters() if len(parameter.values) > 1]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ax's log lines, one a trial, and its warnings about scaling off the terminal."""
    from ax.utils.common.logger import set_ax_logger_levels

    set_ax_logger_levels(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
