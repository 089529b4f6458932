"""Who makes memory labels. Every teacher speaks one protocol:

`teacher(input_ids, positions, initial_memory, attention_mask=None, document_ids=None) -> (B, S, K, D)`
"""

from .causal import SMTTeacherConfig, SMTTeacherEncoder
from .windowed import SMTWindowedTeacher, SMTWindowedTeacherConfig

__all__ = ["SMTTeacherConfig", "SMTTeacherEncoder", "SMTWindowedTeacher", "SMTWindowedTeacherConfig"]
