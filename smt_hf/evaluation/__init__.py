"""Scores of students, teachers and yardsticks on held-out text."""

from .ngram import NGramModel
from .streams import StreamScores, score_student, score_teacher

__all__ = ["NGramModel", "StreamScores", "score_student", "score_teacher"]
