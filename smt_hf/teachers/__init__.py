"""Who makes memory labels, one file per teacher; `protocol` says what a teacher is."""

from .causal import SMTTeacherConfig, SMTTeacherEncoder
from .protocol import DEFAULT_TEACHER, TEACHERS, make_teacher, register_teacher, teacher_config, teacher_config_class
from .windowed import SMTWindowedTeacher, SMTWindowedTeacherConfig

__all__ = [
    "DEFAULT_TEACHER",
    "TEACHERS",
    "SMTTeacherConfig",
    "SMTTeacherEncoder",
    "SMTWindowedTeacher",
    "SMTWindowedTeacherConfig",
    "make_teacher",
    "register_teacher",
    "teacher_config",
    "teacher_config_class",
]
