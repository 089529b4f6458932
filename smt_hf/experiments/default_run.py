"""What `recipes/pretrain.py` takes where nothing else is given: the best on text of the few settings that were measured
within five minutes on two CPU cores with an smt phase in the pipeline (model_cards/evidence).

It is one set, whose parts belong together. A run that names another updater or teacher takes none of it: it has the
defaults of the classes, which are the paper's updater, teacher and optimiser.
"""

from typing import Any

UPDATER_TYPE, TEACHER_TYPE = "fast_weight", "smt_fast_weight_teacher"
STUDENT: dict[str, Any] = {"updater_type": UPDATER_TYPE, "num_memory_tokens": 6, "num_hidden_layers": 1}
TEACHER: dict[str, Any] = {"model_type": TEACHER_TYPE}
PHASES = "smt,dmt"
# Phase -> arguments. The optimiser is Muon where it can run.
SETTINGS: dict[str, dict[str, Any]] = {
    "smt": {
        "max_steps": 3000,
        "context_length": 128,
        "learning_rate": 0.008,
        "per_device_train_batch_size": 16,
    },
    "dmt": {
        "max_steps": 100,
        "context_length": 128,
        "transition_steps": 32,
        "learning_rate": 0.008,
        "per_device_train_batch_size": 16,
        "on_policy_mode": "sequential",
        "on_policy_fraction": 1.0,
        "on_policy_warmup_ratio": 0.0,
        "dynamics_weight": 0.0,
        "normalized_dynamics_weight": 0.03,
    },
    "bptt": {"learning_rate": 0.008, "per_device_train_batch_size": 128, "transition_steps": 16},
}
MATRIX_OPTIMIZER = "muon"
# Arguments of smt that say how its transitions are trained: a phase of the teacher alone has no use for them.
OF_TRANSITIONS = (
    "transition_steps", "readout_weight", "readout_trains_updater", "dynamics_", "normalized_dynamics_",
    "readout_match_", "consistency_", "num_consistency_chunks", "hard_", "on_policy_", "teacher_forcing",
    "num_supervised_transitions", "supervised_chunk_steps",
)  # fmt: skip


def is_taken(student: dict[str, Any], teacher: dict[str, Any]) -> bool:
    """Whether a run with these fields of student and teacher, all that were given, is of this set."""
    updater_type = student.get("updater_type", UPDATER_TYPE)
    # A field of a teacher means a teacher that has it; this one has none of its own.
    return updater_type == UPDATER_TYPE and teacher in ({}, TEACHER)


def settings_of(phase: str, trains_teacher_alone: bool) -> dict[str, Any]:
    """The arguments of a phase; an smt phase may train the teacher alone."""
    alone = {"trains_updater": False} if trains_teacher_alone else {}
    return {**SETTINGS[phase], **alone, "matrix_optimizer": MATRIX_OPTIMIZER}
