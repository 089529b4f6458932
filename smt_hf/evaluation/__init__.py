"""Scores of students, teachers and yardsticks on held-out text and tasks, and what their memories look like."""

from .drift import drift_by_position, geometry_of, gradient_norm_by_distance, memory_geometry, teacher_gradient_norm
from .long_context import bits_by_position, far_needle_accuracy
from .metric_modules import METRICS, metric_path
from .ngram import NGramModel
from .probes import ProbeScores, score_student_probe, score_teacher_probe
from .streams import StreamScores, score_student, score_teacher

__all__ = [
    "METRICS",
    "NGramModel",
    "ProbeScores",
    "StreamScores",
    "bits_by_position",
    "drift_by_position",
    "far_needle_accuracy",
    "geometry_of",
    "gradient_norm_by_distance",
    "memory_geometry",
    "metric_path",
    "score_student",
    "score_student_probe",
    "score_teacher",
    "score_teacher_probe",
    "teacher_gradient_norm",
]
