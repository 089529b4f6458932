"""Who makes memory labels, one file per teacher; `protocol` says what a teacher is."""

from .causal import SMTTeacherConfig, SMTTeacherEncoder
from .distribution import NextTokens
from .fast_weight import SMTFastWeightTeacher, SMTFastWeightTeacherConfig
from .pretrained import SMTPretrainedTeacher, SMTPretrainedTeacherConfig
from .protocol import (
    DEFAULT_TEACHER,
    TEACHERS,
    make_teacher,
    register_teacher,
    teacher_config,
    teacher_config_class,
    teacher_type,
)
from .windowed import SMTWindowedTeacher, SMTWindowedTeacherConfig

__all__ = [
    "DEFAULT_TEACHER",
    "TEACHERS",
    "NextTokens",
    "SMTFastWeightTeacher",
    "SMTFastWeightTeacherConfig",
    "SMTPretrainedTeacher",
    "SMTPretrainedTeacherConfig",
    "SMTTeacherConfig",
    "SMTTeacherEncoder",
    "SMTWindowedTeacher",
    "SMTWindowedTeacherConfig",
    "make_teacher",
    "register_teacher",
    "teacher_config",
    "teacher_config_class",
    "teacher_type",
]
