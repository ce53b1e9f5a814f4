"""How far a restoration goes: to the cleaned picture, through the join, or through the generator as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from milo_latent.checks import check_choice, check_range

LastStage = Literal["cleaner", "join", "all"]
LAST_STAGES: tuple[str, ...] = get_args(LastStage)


def choose_stage(
    stage: LastStage | None,
    fidelity: float | None,
    *,
    default: str,
    has_join: bool,
    sampling: Sequence[str] = (),
) -> tuple[LastStage, float]:
    """Fill in the defaults of `stage` and `fidelity`, and refuse what does not fit together.

    Args:
        stage: "cleaner" is the first stage alone; "join" is the join of the cleaned and the degraded image, for which
            nothing is encoded or sampled; "all" is the generator and, if the pipeline has one, the join.
        fidelity: share of the way from the decoded image to the joined one, in [0, 1].
        default: stage of a pipeline for which nothing else is said.
        has_join: whether the pipeline has a join.
        sampling: names of arguments that were given although they act on sampling alone; the default is then "all".

    Returns:
        The stage, and the fidelity: by default 1 with a join, and 0 without one or for "cleaner".

    Raises:
        ValueError: for unknown values, arguments of sampling without sampling, or a fidelity without a join.
    """
    chosen: Any = stage or ("all" if sampling else default)
    check_choice("stage", chosen, LAST_STAGES)
    if sampling and chosen != "all":
        raise ValueError(
            f"Expected stage 'all' with {', '.join(sampling)}, which nothing else heeds, got stage {chosen!r}."
        )
    if fidelity is None:
        fidelity = 1.0 if has_join and chosen != "cleaner" else 0.0
    check_range("fidelity", fidelity, 0.0, 1.0, "It is a share.")
    if not has_join and (fidelity or chosen == "join"):
        raise ValueError(
            f"Expected a model with a `join` for stage {chosen!r} and fidelity {fidelity:g}, got one without. "
            "`python -m milo_latent.training.train_join --model MODEL` trains one for any model."
        )
    if fidelity and chosen == "cleaner":
        raise ValueError(f"Expected stage 'join' or 'all' with fidelity {fidelity:g}, got stage 'cleaner'.")
    return chosen, fidelity
