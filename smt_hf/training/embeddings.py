"""How a student's embeddings and head begin where its teacher is a language model with the same tokens.

Shapes: V vocabulary, E width of the student's embeddings, X width of the model's.
"""

import torch
from transformers import PreTrainedModel

from smt_hf.errors import InputError
from smt_hf.student import SMTRecurrentForCausalLM
from smt_hf.teachers import SMTPretrainedTeacher
from smt_hf.teachers.loading import load_tables


@torch.no_grad()
def init_embeddings_from_teacher(student: SMTRecurrentForCausalLM, teacher: PreTrainedModel | None) -> None:
    """Embeddings and head of a new student become those of its teacher's model, projected to the student's width.

    The projection is on the directions in which the rows of the model's table vary most, and the result is scaled to
    the variance that the student's own table has. Where the model is narrower than the student, the further
    coordinates stay as they are. A head that is tied to the embeddings, the student's or the model's, has the
    embeddings' projection. Rows of the model behind the student's last token are not used.

    Tables that the teacher does not hold are read from the model's files: its head, if that is a table of its own that
    no phase needs, and both if the teacher holds no model (`teacher_cache_dir`).

    Raises:
        InputError: the teacher is no language model, its model has no folder, or it has fewer tokens than the student.
    """
    if not isinstance(teacher, SMTPretrainedTeacher):
        raise InputError("embeddings begin as those of a language model: give the teacher a `model_name_or_path`.")
    config, model = teacher.config, teacher.model
    held = [] if model is None else [model.get_input_embeddings()]
    if held and config.keeps_head:
        held.append(model.get_output_embeddings())
    if held and (_is_tied(student) or config.base.tie_word_embeddings):
        _begin_tables(student, held[0].weight, held[0].weight)
    elif len(held) == 2 and held[1].weight.is_floating_point():  # bitsandbytes may have packed it
        _begin_tables(student, held[0].weight, held[1].weight)
    elif config.model_name_or_path is None:
        raise InputError("the tables of the teacher's model cannot be read: give `model_name_or_path`.")
    else:
        init_embeddings_from_model(student, config.model_name_or_path, config.revision, config.gguf_file)


@torch.no_grad()
def init_embeddings_from_model(
    student: SMTRecurrentForCausalLM, name: str, revision: str | None = None, gguf_file: str | None = None
) -> None:
    """As `init_embeddings_from_teacher`, for a student without a teacher, as one that is trained by BPTT beside others.

    Args:
        name, revision, gguf_file: the language model, as `load_tables` takes it.

    Raises:
        InputError: the model cannot be loaded, or has fewer tokens than the student.
    """
    _begin_tables(student, *load_tables(name, revision, gguf_file))


def _is_tied(student: SMTRecurrentForCausalLM) -> bool:
    return student.get_output_embeddings().weight is student.get_input_embeddings().weight


def _begin_tables(student: SMTRecurrentForCausalLM, embeddings: torch.Tensor, head: torch.Tensor) -> None:
    _begin_as(student.get_input_embeddings().weight, embeddings)
    if not _is_tied(student):
        _begin_as(student.get_output_embeddings().weight, head)


def _begin_as(weight: torch.Tensor, table: torch.Tensor) -> None:
    """Give `weight`, `(V, E)`, in place, the first V rows of `table`, `(V or more, X)`."""
    if len(table) < len(weight):
        raise InputError(f"the student has {len(weight)} tokens, the teacher's model {len(table)}: lower `vocab_size`.")
    found = principal_coordinates(table[: len(weight)], weight.shape[1]).to(weight)
    own = weight[:, : found.shape[1]]
    own.copy_(found * (own.square().mean() / found.square().mean()).sqrt())


def principal_coordinates(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Coordinates of the rows along the directions of their largest variance: `(V, X)` -> `(V, min(size, X))`, float32.

    The mean of the rows is taken out: it tells no tokens apart, and in a head no softmax sees it.
    """
    centred = rows.float() - rows.float().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors  # the last has the largest variance
    return centred @ directions[:, -size:].flip(1)
