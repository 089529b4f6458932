"""What is learned: text, a synthetic task, images, or documents with questions.

Each is there as rows to train on, and as scores of what was learned.

Add a subject here: a class with the methods of [`Subject`] in a module of its own.
"""

from .documents import DOCUMENTS, DocumentSubject, check_rows
from .levelled import LevelledSubject
from .pixels import PixelSubject
from .subject import HELDOUT_SEED, Subject, refuse_curriculum
from .task import TaskSubject
from .text import TextSubject

__all__ = [
    "DOCUMENTS",
    "HELDOUT_SEED",
    "DocumentSubject",
    "LevelledSubject",
    "PixelSubject",
    "Subject",
    "TaskSubject",
    "TextSubject",
    "check_rows",
    "refuse_curriculum",
]
