"""What the arguments of the phases refuse because it does not fit together. Every message names the way to mend it."""

import math
from typing import Any

from smt_hf.errors import InputError

ON_POLICY_MODES = ("sequential", "parallel", "aggregate")


def refuse(condition: object, message: str) -> None:
    """Raise an `InputError` with `message` if `condition` holds."""
    if condition:
        raise InputError(message)


def words_of(given: list[str] | str) -> list[str]:
    """The words of a list argument, whose entries may be joined by commas or spaces."""
    entries = [given] if isinstance(given, str) else given
    return [word for entry in entries for word in str(entry).replace(",", " ").split()]


def check_own_memories(args: Any) -> None:
    """Of smt and dmt: where own memories come from, and whether there are some to be pulled towards labels."""
    refuse(
        args.on_policy_mode not in ON_POLICY_MODES,
        f"unknown `on_policy_mode` {args.on_policy_mode!r}: choose one of {', '.join(ON_POLICY_MODES)}.",
    )
    refuse(
        args.on_policy_mode == "aggregate" and args.on_policy_fraction < 1,
        "`on_policy_mode=aggregate` keeps own memories of every row: set `on_policy_fraction` to 1.",
    )
    if not args.teacher_forcing:
        return
    refuse(
        not args.on_policy_fraction,
        "`teacher_forcing` pulls own memories, and no chunk starts from one: set `on_policy_fraction` above 0.",
    )
    refuse(
        args.on_policy_mode == "aggregate",
        "`teacher_forcing` does not fit `on_policy_mode=aggregate`, whose kept memories would be pulled again: use "
        "`sequential`.",
    )
    refuse(
        args.teacher_forcing_ratio <= args.on_policy_warmup_ratio,
        f"`teacher_forcing` has fallen to 0 before the first own memories: set `teacher_forcing_ratio` "
        f"({args.teacher_forcing_ratio}) above `on_policy_warmup_ratio` ({args.on_policy_warmup_ratio}).",
    )


def check_curriculum(args: Any) -> None:
    """Of smt and dmt: what gates a curriculum is computed, unless the teacher's loss does."""
    if not args.trains_updater or args.curriculum_threshold is None:
        return
    refuse(
        not (args.on_policy_mode == "sequential" and args.on_policy_fraction > 0 and args.readout_weight > 0),
        "`curriculum_threshold` needs the student's own rollout: set `on_policy_mode` to sequential, and "
        "`on_policy_fraction` and `readout_weight` above 0.",
    )
    refuse(
        args.teacher_forcing and args.teacher_forcing_ratio == 1,
        "`curriculum_threshold` needs the student's own rollout, which is pulled towards labels throughout: set "
        "`teacher_forcing_ratio` below 1.",
    )


def check_distillation(args: Any) -> None:
    """Of smt and dmt: the distribution that the student is distilled from."""
    refuse(
        not (math.isfinite(args.distillation_temperature) and args.distillation_temperature > 0),
        f"`distillation_temperature` must be a finite number above 0, got {args.distillation_temperature}.",
    )
    refuse(args.distillation_top_k < 1, f"`distillation_top_k` must be at least 1, got {args.distillation_top_k}.")
    refuse(
        args.distillation_weight and args.label_cache_dir,
        "`label_cache_dir` keeps memories alone, and `distillation_weight` needs the teacher's distribution as well: "
        "leave it out, or use `teacher_cache_dir` for a language model.",
    )


def check_cache(args: Any) -> None:
    """Of smt and dmt: rows are found again in a cache."""
    if args.teacher_cache_dir is None:
        return
    refuse(
        args.label_cache_dir,
        "`teacher_cache_dir` and `label_cache_dir` keep the same in two ways: leave `label_cache_dir` out.",
    )
    refuse(
        args.on_policy_mode == "aggregate",
        "`teacher_cache_dir` does not fit `on_policy_mode=aggregate`, which exchanges rows.",
    )
    refuse(
        args.carries_teacher_memory,
        "`teacher_cache_dir` keeps what is said of whole rows, and `carries_teacher_memory` reads windows of them: "
        "leave one of the two out.",
    )


def check_transitions(args: Any) -> None:
    """Of smt and dmt: there is an error whose hardest transitions are to count more."""
    weights = (args.dynamics_weight, args.normalized_dynamics_weight, args.readout_match_weight)
    refuse(
        args.hard_transition_fraction and not any(weights),
        "`hard_transition_fraction` shifts the weight of the errors of transitions: set `dynamics_weight`, "
        "`normalized_dynamics_weight` or `readout_match_weight` above 0.",
    )


def check_sparse(args: Any) -> None:
    """Of smt: a few random transitions of each row."""
    refuse(
        args.num_supervised_transitions < 0,
        f"`num_supervised_transitions` must not be negative, got {args.num_supervised_transitions}.",
    )
    if not args.num_supervised_transitions:
        refuse(
            args.supervised_chunk_steps > 1,
            "`supervised_chunk_steps` is for random places of a row: set `num_supervised_transitions` to their number, "
            "or use `transition_steps` for chunks that cover the row.",
        )
        return
    refuse(not args.trains_updater, "`trains_updater` false is for an smt phase without `num_supervised_transitions`.")
    refuse(
        args.teacher_forcing,
        "`num_supervised_transitions` starts from labels alone and has no use for `teacher_forcing`: set it to 0.",
    )
    refuse(
        args.dynamics_starts_below is not None,
        "`dynamics_starts_below` waits for a teacher that is trained on all positions: set "
        "`num_supervised_transitions` to 0.",
    )
    refuse(
        args.curriculum_threshold is not None,
        "`curriculum_threshold` needs whole rollouts: set `num_supervised_transitions` to 0.",
    )


def check_teacher_alone(args: Any) -> None:
    """Of smt: a phase that does not train the updater."""
    refuse(
        not (args.teacher_readout_weight or args.predictive_weight or args.teacher_weight or args.distillation_weight),
        "an smt phase that does not train the updater needs a `teacher_readout_weight`, `predictive_weight`, "
        "`teacher_weight` or `distillation_weight` above 0.",
    )
    for name in (
        "normalized_dynamics_weight",
        "readout_match_weight",
        "consistency_weight",
        "hard_transition_fraction",
        "teacher_forcing",
        "dynamics_starts_below",
    ):
        refuse(
            getattr(args, name),
            f"a phase that does not train the updater has no use for `{name}`: leave it out.",
        )
    refuse(
        args.curriculum_threshold is not None and not args.teacher_readout_weight,
        "`curriculum_threshold` where the updater is not trained goes by the readout of the teacher's memories: "
        "set `teacher_readout_weight` above 0.",
    )


def check_carried(args: Any) -> None:
    """Of smt: rows that are read in windows, the teacher's memory carried on."""
    if not args.carries_teacher_memory:
        return
    refuse(
        args.trains_updater,
        "`carries_teacher_memory` is for a teacher that is trained alone: set `trains_updater` to false.",
    )
    for name in ("predictive_weight", "teacher_weight", "uniformity_weight", "distillation_weight"):
        refuse(
            getattr(args, name),
            f"`carries_teacher_memory` trains the readout of the teacher's memories: set `{name}` to 0.",
        )


def check_strided(args: Any) -> None:
    """Of dmt: labels that are several tokens apart."""
    if args.label_stride == 1:
        return
    only_own = args.on_policy_fraction == 1 and not args.on_policy_warmup_ratio and args.on_policy_mode != "parallel"
    refuse(
        not only_own,
        "`label_stride` above 1 needs `on_policy_fraction` 1, `on_policy_warmup_ratio` 0 and an `on_policy_mode` "
        "other than parallel: chunks then start from own memories alone.",
    )
    refuse(
        args.teacher_forcing,
        "`teacher_forcing` needs a label at the start of every chunk: set `label_stride` to 1.",
    )


def check_windows(args: Any) -> None:
    """Of bptt: rows have places whose future can be decoded, and a curriculum has a loss to go by."""
    if not args.consistency_weight:
        return
    refuse(
        args.carries_memory and args.future_length > args.transition_steps,
        "`consistency_weight` of the bptt phase decodes `future_length` tokens inside a window of `transition_steps`: "
        f"set `future_length` ({args.future_length}) to {args.transition_steps} or less, or `carries_memory` to false.",
    )
    refuse(
        not args.carries_memory and args.transition_steps >= args.context_length,
        "`consistency_weight` of the bptt phase with `carries_memory` false decodes at the ends of windows inside a "
        f"row: set `transition_steps` below `context_length` ({args.context_length}), or `carries_memory` to true.",
    )
    refuse(
        args.curriculum_threshold is not None and not args.readout_weight,
        "`curriculum_threshold` goes by the readout of the student's own rollout: set `readout_weight` above 0.",
    )
