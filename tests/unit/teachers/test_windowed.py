"""The teacher as published against plain numpy (tests/reference/make_windowed.py), and what has to hold of it."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smt_hf.teachers import SMTTeacherConfig, SMTWindowedTeacher, SMTWindowedTeacherConfig
from smt_hf.training.losses import dynamics_loss, predictive_loss, uniformity_loss
from tests.conftest import VOCAB
from tests.reference.make_windowed import FILE, FUTURE_LENGTH, RMS_NORM_EPS, SIZES, WEIGHTS, fixtures

EXACT = {"atol": 1e-9, "rtol": 1e-9}
# `uniformity_loss` takes the logarithm of its number of pairs in float32.
NEARLY = {"atol": 1e-7, "rtol": 1e-7}
WINDOW, K, D = 5, 3, 16


def make_teacher(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"context_length": WINDOW, "num_memory_tokens": K, "memory_size": D}
    return SMTWindowedTeacher(SMTWindowedTeacherConfig(**{**sizes, **fields})).double().eval()


def text(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def start():
    return torch.randn(K, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.fixture(scope="module")
def reference():
    with np.load(FILE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def reference_teacher(reference):
    teacher = SMTWindowedTeacher(SMTWindowedTeacherConfig(**SIZES, rms_norm_eps=RMS_NORM_EPS)).double()
    weights = {name.removeprefix("weights/"): w for name, w in reference.items() if name.startswith("weights/")}
    teacher.load_state_dict(weights, strict=True)
    return teacher


def test_fixtures_are_what_the_script_makes(reference):
    made = fixtures()
    assert made.keys() == reference.keys()
    for name, array in made.items():
        torch.testing.assert_close(torch.from_numpy(np.asarray(array)), reference[name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("extra", ["plain", "mask", "documents", "both"])
def test_labels_equal_the_reference(reference, reference_teacher, extra):
    labels = reference_teacher(
        reference["tokens"],
        reference["positions"],
        reference["initial_memory"],
        reference["mask"] if extra in ("mask", "both") else None,
        reference["documents"] if extra in ("documents", "both") else None,
    )
    torch.testing.assert_close(labels, reference[f"labels/{extra}"], **EXACT)


def test_losses_equal_the_reference(reference):
    """Eq. 2 to 4; uniformity is taken inside a sequence (the paper: over the batch), in the reference too."""
    memories, targets = reference["memories"], reference["targets"]
    for name, loss in {
        "predictive": predictive_loss(reference["logits"], reference["future"]),
        "dynamics": dynamics_loss(memories, targets),
        "dynamics_masked": dynamics_loss(memories, targets, reference["counts"]),
        "uniformity": uniformity_loss(memories),
    }.items():
        torch.testing.assert_close(loss, reference[f"losses/{name}"], **(NEARLY if name == "uniformity" else EXACT))


def test_one_transition_of_the_published_step(reference, reference_teacher):
    """The published alignment is that of positions T_c and T_c + 1: the window slides by one token, and the first token
    decoded from `m_t` is the one that the transition reads. The loss and its gradient, through both labels, agree."""
    x, position = reference["x"], SIZES["context_length"]
    labels = reference_teacher(x, torch.tensor([position, position + 1]), reference["initial_memory"])
    memory, next_memory = labels[:, :1], labels[:, 1:]
    torch.testing.assert_close(memory[:, 0], reference["step/memory"], **EXACT)
    torch.testing.assert_close(next_memory[:, 0], reference["step/next_memory"], **EXACT)
    future = x[:, position : position + FUTURE_LENGTH]
    assert torch.equal(future, reference["step/targets"])
    reached = F.rms_norm(memory[:, 0] + reference["change"], memory.shape[-1:], eps=RMS_NORM_EPS)[:, None]
    torch.testing.assert_close(reached[:, 0], reference["step/reached"], **EXACT)
    logits = torch.einsum("fvkd,bskd->bsfv", reference["decoder"], memory)
    terms = {
        "predictive": predictive_loss(logits, future[:, None]).mean(),
        "dynamics": dynamics_loss(reached, next_memory).mean(),
        "uniformity": uniformity_loss(memory).mean(),
    }
    for name, term in terms.items():
        torch.testing.assert_close(term, reference[f"step/{name}"], **(NEARLY if name == "uniformity" else EXACT))
    loss = sum(WEIGHTS[name] * term for name, term in terms.items())
    torch.testing.assert_close(loss, reference["step/loss"], **EXACT)
    loss.backward()
    slopes = []
    for _, weight in sorted(reference_teacher.named_parameters()):
        slopes.append((weight.grad.flatten() * torch.arange(weight.numel(), dtype=torch.float64).cos()).sum())
    torch.testing.assert_close(torch.stack(slopes), reference["step/slopes"], atol=1e-8, rtol=1e-8)


def test_label_depends_on_its_window_alone(start):
    """Each of its tokens counts, the first and the last alike; none before or after it does."""
    teacher, tokens, position = make_teacher(), text(1, 12), 8
    label = teacher(tokens, torch.tensor([position]), start)
    for place in range(12):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % VOCAB
        distance = (teacher(changed, torch.tensor([position]), start) - label).abs().amax()
        if position - WINDOW <= place < position:
            assert distance > 1e-4, place
        else:
            assert distance == 0, place


def test_everything_sees_everything():
    """After one block every place of a window, the first as well, has changed with any token and with any register."""
    teacher, tokens = make_teacher(), text(1, WINDOW)
    seen = []
    teacher.layers[0].register_forward_hook(lambda module, args, output: seen.append(output[0].detach()))

    def states(changed):
        teacher(changed, torch.tensor([WINDOW]), torch.zeros(K, D))
        return seen[-1]

    before = states(tokens)
    assert before.shape == (WINDOW + K, 24)
    for place in range(WINDOW):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % VOCAB
        assert ((states(changed) - before).abs().amax(1) > 1e-5).all(), place
    for register in range(K):
        with torch.no_grad():
            teacher.registers[register] += torch.randn(24, dtype=torch.float64)
        assert ((states(tokens) - before).abs().amax(1) > 1e-5).all(), register
        before = states(tokens)


def test_order_inside_the_window_counts(start):
    teacher, tokens = make_teacher(), torch.arange(WINDOW)[None]
    position = torch.tensor([WINDOW])
    assert (teacher(tokens.flip(1), position, start) - teacher(tokens, position, start)).abs().amax() > 1e-3


def test_labels_mean_the_same_at_any_position(start):
    teacher, tail = make_teacher(), text(1, WINDOW, seed=1)
    labels = [
        teacher(torch.cat([text(1, before), tail], 1), torch.tensor([before + WINDOW]), start) for before in (0, 3, 20)
    ]
    torch.testing.assert_close(labels[1], labels[0], **EXACT)
    torch.testing.assert_close(labels[2], labels[0], **EXACT)


@pytest.mark.parametrize("length", [0, 1, 2, WINDOW - 1, WINDOW, WINDOW + 1])
def test_short_rows(length, start):
    """A row of any length gives the labels that the same text has at the front of a long row."""
    teacher, tokens = make_teacher(), text(2, 20)
    positions = torch.arange(length + 1)
    short = teacher(tokens[:, :length], positions, start)
    assert short.shape == (2, length + 1, K, D)
    torch.testing.assert_close(short, teacher(tokens, positions, start), **EXACT)


def test_empty_prefix_is_the_initial_memory(start):
    teacher = make_teacher()
    own = start.clone().requires_grad_()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :4] = 0
    labels = teacher(text(2, 6), torch.tensor([0, 3]), own, mask)
    assert torch.equal(labels[0, 0], start) and torch.equal(labels[1, 0], start)
    assert torch.equal(labels[1, 1], start)  # nothing but padding was read
    labels[1].sum().backward()
    torch.testing.assert_close(own.grad, torch.full_like(start, 2.0))
    assert not any(weight.grad.any() or weight.grad.isnan().any() for weight in teacher.parameters())


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_is_as_if_it_were_not_there(side, start):
    teacher, tokens = make_teacher(), text(2, 9)
    places = {"left": range(4, 13), "right": range(9), "inside": [0, 1, 2, 5, 6, 7, 9, 11, 12]}[side]
    padded, mask = text(2, 13, seed=2), torch.zeros(2, 13, dtype=torch.bool)
    padded[:, places], mask[:, places] = tokens, True
    expected = teacher(tokens, torch.arange(10), start)
    labels = teacher(padded, torch.arange(14), start, mask)
    torch.testing.assert_close(labels, expected[:, F.pad(mask[0].long().cumsum(0), (1, 0))], **EXACT)


def test_windows_stay_in_their_document(start):
    teacher, tokens = make_teacher(), text(1, 14)
    documents = torch.tensor([[3] * 4 + [0] * 7 + [1] * 3])
    labels = teacher(tokens, torch.arange(15), start, document_ids=documents)
    begin = 0
    for part in tokens.split([4, 7, 3], dim=1):
        size = part.shape[1]
        alone = teacher(part, torch.arange(1, size + 1), start)
        torch.testing.assert_close(labels[:, begin + 1 : begin + size + 1], alone, **EXACT)
        begin += size


def test_positions_pick_windows(start):
    teacher, tokens = make_teacher(), text(2, 11)
    everything = teacher(tokens, torch.arange(12), start)
    chosen = torch.tensor([[0, 11, 4], [7, 0, 1]])
    picked = teacher(tokens, chosen, start)
    for row in range(2):
        torch.testing.assert_close(picked[row], everything[row, chosen[row]], **EXACT)


def test_has_no_logits(start):
    with pytest.raises(ValueError, match=r"no next-token head.*set `teacher_weight` to 0"):
        make_teacher()(text(1, 4), torch.arange(5), start, return_logits=True)


def test_config_defaults_are_the_causal_teachers():
    config, causal = SMTWindowedTeacherConfig(), SMTTeacherConfig()
    own = set(inspect.signature(SMTWindowedTeacherConfig).parameters)
    shared = own & set(inspect.signature(SMTTeacherConfig).parameters)
    assert own - shared == {"context_length"}
    assert {name: getattr(config, name) for name in shared} == {name: getattr(causal, name) for name in shared}
    assert "sliding_window" not in config.to_dict()


def test_config_of_sizes_only(start):
    teacher = SMTWindowedTeacher(SMTWindowedTeacherConfig(vocab_size=VOCAB, hidden_size=32, memory_size=D))
    assert teacher.layers[0].up_proj.out_features == 128
    assert teacher(text(1, 70), torch.tensor([70]), torch.zeros(4, D)).shape == (1, 1, 4, D)
