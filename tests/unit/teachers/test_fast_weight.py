"""The linear recurrence of the fast-weight updater by a scan, against the recurrence itself, a token at a time."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from smt_hf import SMTForPreTraining, SMTRecurrentForCausalLM
from smt_hf.student.fast_weight_smt_recurrent import VALUES_AT_BIRTH, FastWeightSizes, SMTRecurrentFastWeightCell
from smt_hf.student.recurrence_smt_recurrent import document_starts
from smt_hf.teachers import SMTFastWeightTeacher
from smt_hf.teachers.fast_weight import BLOCK, ScannedMatrices, gated_sums
from smt_hf.training import SMTPreTrainingConfig
from tests.conftest import VOCAB, student_config

TEACHER = {"model_type": "smt_fast_weight_teacher"}


def make_composite(**fields) -> SMTForPreTraining:
    torch.manual_seed(0)
    student = student_config(updater_type="fast_weight", **fields)
    return SMTForPreTraining(SMTPreTrainingConfig(student=student, teacher=TEACHER)).eval()


def matrices_one_by_one(keys, values, strengths, log_kept, resets=None):
    matrix, found = torch.zeros(*values.shape[:2], values.shape[-1], keys.shape[-1], dtype=keys.dtype), []
    for t in range(keys.shape[2]):
        if resets is not None:
            matrix = torch.where(resets[:, t, None, None, None], 0.0, matrix)
        matrix = log_kept[:, :, t].exp()[..., None, None] * matrix
        error = values[:, :, t] - (matrix @ keys[:, :, t, :, None])[..., 0]
        matrix = matrix + (strengths[:, :, t, None] * error)[..., None] * keys[:, :, t, None]
        found.append(matrix)
    return torch.stack(found, dim=2)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 21])
def test_scan_of_the_delta_rule(length, resets):
    """Values and gradients of matrices and answers, in float64; blocks of 8 tokens, the last one shorter."""
    generator = torch.Generator().manual_seed(length)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    keys, values = F.normalize(draw(2, 3, length, 6), dim=-1), draw(2, 3, length, 4)
    inputs = [keys, values, torch.sigmoid(draw(2, 3, length)), F.logsigmoid(draw(2, 3, length))]
    starts = torch.rand(2, length, generator=generator) < 0.2 if resets else None
    queries = draw(2, 3, length, 6)
    grads = []
    for compute in (ScannedMatrices, matrices_one_by_one):
        own = [part.clone().requires_grad_() for part in inputs]
        if compute is ScannedMatrices:
            scanned = ScannedMatrices(*own, starts, block=8)
            matrices, answers = scanned.matrices(), scanned.answers(queries)
        else:
            matrices = compute(*own, starts)
            answers = (matrices @ queries[..., None])[..., 0]
        weights = torch.linspace(-1, 1, matrices.numel(), dtype=torch.float64).view_as(matrices)
        loss = (matrices * weights).sum() + (answers * answers.detach().cos()).sum()
        grads.append([matrices, answers, *torch.autograd.grad(loss, own)])
    for own, expected in zip(*grads):
        torch.testing.assert_close(own, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("length", [1, 2, 13, 16])
def test_gated_sums(length):
    kept, added = torch.rand(2, 3, length, 5, dtype=torch.float64).unbind(0)
    own, total = gated_sums(kept, added), torch.zeros(3, 5, dtype=torch.float64)
    for t in range(length):
        total = kept[:, t] * total + added[:, t]
        torch.testing.assert_close(own[:, t], total)


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_hidden_layers": 1}, {"num_memory_tokens": 6, "num_matrix_heads": 2}, {"embedding_size": 6}],
)
@pytest.mark.parametrize("extra", ["plain", "mask", "documents", "both"])
def test_the_student_begins_as_this_teacher(extra, fields):
    """Error of the student's dynamics 0 at birth, values and gradients, over rows of more than one block."""
    model = make_composite(**fields)
    length = BLOCK + 9
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(VOCAB, (3, length), generator=generator)
    mask = documents = None
    if extra in ("documents", "both"):
        documents = torch.tensor([[0] * length, [0] * 9 + [1] * (length - 9), [4, 7, *[1] * (length - 2)]])
    if extra in ("mask", "both"):
        mask = torch.ones_like(input_ids)
        mask[0, :4] = mask[1, 5:7] = mask[2, -6:] = 0
    start = model.student.model.start_memory()
    labels = model.teacher(input_ids, torch.arange(length + 1), start, mask, documents)
    resets = None if documents is None else document_starts(documents)
    embeds = model.student.model.embed(input_ids)
    own = model.student.model.unroll(start.expand(3, -1, -1), embeds, mask, resets)
    assert torch.equal(labels[:, 0], start.expand(3, -1, -1))
    torch.testing.assert_close(labels[:, 1:], own, atol=2e-4, rtol=2e-4)
    weights = torch.randn(own.shape, generator=generator) / own.detach().abs().clamp(min=1.0)
    (labels[:, 1:] * weights).sum().backward(retain_graph=True)
    (own * weights).sum().backward()
    cell = dict(model.student.model.updater.cell.named_parameters())
    for name, parameter in model.teacher.cell.named_parameters():
        scale = cell[name].grad.abs().max()
        torch.testing.assert_close(parameter.grad / scale, cell[name].grad / scale, atol=2e-3, rtol=2e-3, msg=name)
    theirs, scale = model.student.model.embed_tokens.weight.grad, model.teacher.embed_tokens.weight.grad.abs().max()
    torch.testing.assert_close(model.teacher.embed_tokens.weight.grad / scale, theirs / scale, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("reads_only", [False, True])
def test_a_row_in_windows_is_the_row(reads_only):
    """Going on from the last memory of the window before makes the same memories, wherever in a block it ends."""
    model = make_composite(num_memory_tokens=6, num_matrix_heads=2)
    cuts = [0, 1, BLOCK + 4, BLOCK + 5, 2 * BLOCK + 9]
    input_ids = torch.randint(VOCAB, (3, cuts[-1]))
    start = model.student.model.start_memory()
    whole = model.teacher(input_ids, torch.arange(cuts[-1] + 1), start, reads_only=reads_only)
    memory = start
    for begin, end in itertools.pairwise(cuts):
        positions = torch.arange(end - begin + 1)
        words = {"reads_only": reads_only, "returns_last": True}
        part, memory = model.teacher(input_ids[:, begin:end], positions, memory, **words)
        torch.testing.assert_close(part, whole[:, begin : end + 1], atol=1e-4, rtol=1e-4)
        assert memory.shape == (3, *start.shape)
        torch.testing.assert_close(part[:, -1, -1], memory[:, -1])


def test_reads_only_is_the_last_token():
    model = make_composite()
    input_ids, start = torch.randint(VOCAB, (2, 40)), model.student.model.start_memory()
    positions = torch.tensor([[0, 40, 7], [3, 0, 39]])
    everything = model.teacher(input_ids, positions, start)
    last = model.teacher(input_ids, positions, start, reads_only=True)
    torch.testing.assert_close(last, everything[:, :, -1:], atol=1e-6, rtol=1e-5)
    logits = model.student.read_logits(everything)
    torch.testing.assert_close(model.student.read_logits(last), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("embedding_size", [None, 6])
def test_hand_over_after_the_teacher_has_learned(embedding_size):
    """A student that has drifted apart begins again as the teacher; the readout is the student's own and stays."""
    model = make_composite(embedding_size=embedding_size)
    for parameter in model.teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.student.model.updater.control_proj.weight)
    readout = {name: tensor.clone() for name, tensor in model.student.model.readout.state_dict().items()}
    model.hand_over()
    input_ids, start = torch.randint(VOCAB, (2, 20)), model.student.model.start_memory()
    own = model.student.model.unroll(start.expand(2, -1, -1), model.student.model.embed(input_ids))
    torch.testing.assert_close(model.teacher(input_ids, torch.arange(1, 21), start), own, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(readout[name], tensor) for name, tensor in model.student.model.readout.state_dict().items())


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        ({"updater_type": "mlp"}, {}, "`updater_type` is mlp: set it to fast_weight"),
        ({}, {"hidden_size": 32}, "hidden_size is 32, the student's hidden_size is 16"),
        ({}, {"num_matrix_heads": 2}, "num_matrix_heads is 2, the student's num_matrix_heads is 1"),
        ({"tie_word_embeddings": True}, {}, "`tie_word_embeddings`"),
    ],
)
def test_refuses_a_student_that_cannot_follow(student, teacher, message):
    student = student_config(**{"updater_type": "fast_weight", **student})
    with pytest.raises(ValueError, match=message):
        SMTPreTrainingConfig(student=student, teacher={**TEACHER, **teacher})


@pytest.mark.parametrize(
    "fields, sizes",
    [
        ({"num_memory_tokens": 3, "hidden_size": 16}, (1, 1, 8, 8)),
        ({"num_memory_tokens": 6, "hidden_size": 64}, (1, 6, 32, 64)),
        ({"num_memory_tokens": 7, "hidden_size": 64}, (1, 8, 32, 64)),
        ({"num_memory_tokens": 7, "hidden_size": 64, "matrix_key_size": 16}, (1, 16, 16, 64)),
        ({"num_memory_tokens": 6, "hidden_size": 64, "num_matrix_heads": 4}, (4, 3, 16, 64)),
        ({"num_memory_tokens": 5, "hidden_size": 24}, (1, 3, 16, 24)),
    ],
)
def test_sizes(fields, sizes):
    assert FastWeightSizes.of(student_config(updater_type="fast_weight", **fields)) == sizes


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_memory_tokens": 2}, "`num_memory_tokens` of at least 3.*got 2"),
        ({"num_matrix_heads": 0}, "`num_matrix_heads` must be from 1"),
        ({"num_matrix_heads": 3}, "`num_matrix_heads` must be from 1 to 4 and divide the 8 numbers"),
        ({"matrix_key_size": 3}, "`matrix_key_size` must be even and divide the 8 numbers"),
    ],
)
def test_sizes_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        student_config(updater_type="fast_weight", **fields)
    SMTRecurrentForCausalLM(student_config(updater_type="mlp", **{**fields, "num_matrix_heads": 1}))  # not its affair


@pytest.mark.parametrize("num_memory_tokens", [3, 4, 5, 8])
@pytest.mark.parametrize("hidden_size", [8, 24, 64])
def test_any_width_and_number_of_memory_tokens(num_memory_tokens, hidden_size):
    config = student_config(
        updater_type="fast_weight", num_memory_tokens=num_memory_tokens, hidden_size=hidden_size, num_attention_heads=1
    )
    heads, values, keys, traces = FastWeightSizes.of(config)
    assert heads * values * keys + traces == (num_memory_tokens - 2) * hidden_size
    student = SMTRecurrentForCausalLM(config)
    assert student(torch.randint(VOCAB, (2, 5))).logits.isfinite().all()


def test_own_parameters_are_initialised():
    """Of a student alone, of both in a composite, and of one that is built anew; none is left as memory was found."""
    config = student_config(updater_type="fast_weight")
    models = [SMTRecurrentForCausalLM(config), make_composite().student, make_composite().teacher]
    for model in models:
        (cell,) = [module for module in model.modules() if isinstance(module, SMTRecurrentFastWeightCell)]
        assert (cell.mean_bias[0], cell.mean_bias[-1]) == (-2.0, 5.0)
        assert not cell.pointer_proj.weight.any()


LOOK_UP = {"num_memory_tokens": 6, "num_matrix_heads": 2}  # the second head's pointer rests


@pytest.mark.parametrize("make", [SMTRecurrentForCausalLM, None], ids=["student", "teacher"])
def test_heads_whose_pointer_rests_look_up_at_birth(make):
    """After `a b c a` the query of the second head is nearest to the key of `b`, that of the first is not."""
    torch.manual_seed(0)
    fields = {**LOOK_UP, "hidden_size": 64}
    model = make(student_config(updater_type="fast_weight", **fields)) if make else make_composite(**fields).teacher
    (cell,) = [module for module in model.modules() if isinstance(module, SMTRecurrentFastWeightCell)]
    heads, _, keys, traces = cell.sizes
    angles, found = torch.zeros(heads, keys // 2), torch.zeros(heads)
    with torch.no_grad():
        for _ in range(40):
            a, b, c = torch.randn(3, cell.width)
            last, means, at = torch.zeros_like(a), torch.zeros(traces - heads), []
            for token in map(cell.normed, (a, b, c, a)):
                pair = torch.cat([last, token])
                kept, added = cell.mean_inputs(cell.mean_proj(pair))
                means, last = kept * means + added, token
                features = cell.features(pair, means)
                at.append(cell.write_inputs(cell.matrix_proj(features), angles)[0])
            asked = cell.heads_of(cell.query_projs["query_proj_0"](features), angles)
            nearest = (torch.stack(at[:-1]) * asked).sum(-1).argmax(0)  # of earlier keys
            found += nearest == 1
    assert found[1] > 30 > 20 > found[0]


def test_values_of_heads_that_look_up_are_larger_at_birth():
    cell = make_composite(num_memory_tokens=6, num_matrix_heads=2, hidden_size=64).teacher.cell
    heads, values, keys, _ = cell.sizes
    weights = cell.matrix_proj.weight[heads * keys : heads * (keys + values)].view(heads, values, -1)
    token = weights[:, :, cell.width : 2 * cell.width].std((1, 2))
    assert (token[1] / token[0]).item() == pytest.approx(VALUES_AT_BIRTH, rel=0.2)
    assert weights[0].all() and not weights[1, :, : cell.width].any() and not weights[1, :, 2 * cell.width :].any()


@pytest.mark.parametrize("left_out", [None, "mean_bias"])
def test_weights_that_are_loaded_are_not_born_again(tmp_path, left_out):
    model = SMTRecurrentForCausalLM(student_config(updater_type="fast_weight", **LOOK_UP))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    model.save_pretrained(tmp_path)
    if left_out:
        kept = {name: weight for name, weight in model.state_dict().items() if not name.endswith(left_out)}
        assert len(kept) == len(model.state_dict()) - 1
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = SMTRecurrentForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        is_left_out = left_out is not None and name.endswith(left_out)
        assert torch.equal(weight, loaded[name]) != is_left_out, name


def test_every_other_pointer_rests_at_birth():
    config = student_config(updater_type="fast_weight", num_matrix_heads=4)
    student = SMTRecurrentForCausalLM(config)
    memory = student.model.final_memory(torch.randint(VOCAB, (1, 7)))
    width = config.hidden_size
    pointers = memory.flatten()[width : width + 4]
    # What one token adds, of which 99.8 % are kept per token.
    assert pointers[0] == pointers[2] > 6.9 and pointers[0] < 7 and not pointers[1::2].any()


def test_next_token_logits_are_refused():
    model = make_composite()
    with pytest.raises(ValueError, match="no next-token head"):
        model.teacher(torch.randint(VOCAB, (1, 4)), torch.arange(5), model.student.model.start_memory(),
                      return_logits=True)  # fmt: skip
    assert not SMTFastWeightTeacher.has_next_token_head


@pytest.mark.parametrize("at", [0, 11])
def test_gradients_reach_back_over_the_whole_row(at):
    """From the last memory to any token of a row of several blocks."""
    model = make_composite()
    embeds = model.teacher.embed_tokens(torch.randint(VOCAB, (1, 3 * BLOCK))).detach().requires_grad_()
    start = model.student.model.start_memory()
    (*_, matrices, _), _ = model.teacher.cell(embeds, start[None])
    matrices[0, -1].square().sum().backward()
    assert embeds.grad[0, at].abs().max() > 0


def test_a_half_precision_teacher_keeps_its_state_in_float32():
    """As its student does: in bfloat16 a pointer would stop at 256."""
    model = make_composite()
    ids = torch.randint(VOCAB, (1, 400))
    with torch.no_grad():
        expected = model.teacher(ids, torch.tensor([400]), model.student.model.start_memory())
        model = model.bfloat16()
        start = model.student.model.start_memory()
        own = model.teacher(ids, torch.tensor([400]), start)
        last = model.teacher(ids, torch.tensor([400]), start, reads_only=True)
    assert own.dtype == last.dtype == torch.float32 and torch.equal(last, own[:, :, -1:])
    pointer = expected.flatten()[16]
    assert pointer > 200 and own.flatten()[16] == pytest.approx(pointer.item(), rel=0.02)
