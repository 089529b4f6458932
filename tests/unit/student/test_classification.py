"""One answer a text, and the memory as its embedding."""

import pytest
import torch
import torch.nn.functional as F

from smt_hf import SMTRecurrentForSequenceClassification
from tests.conftest import UPDATERS, student_config, wake


@pytest.fixture(params=UPDATERS)
def classifier(request):
    torch.manual_seed(0)
    config = student_config(updater_type=request.param, num_labels=4)
    return wake(SMTRecurrentForSequenceClassification(config)).eval()


def padded(tokens, side):
    """Rows of 12, 7 and 4 tokens, filled up with the padding token 0."""
    ids, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate((12, 7, 4)):
        place = slice(0, length) if side == "right" else slice(12 - length, 12)
        ids[row, place], mask[row, place] = tokens[row, :length], 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(classifier, tokens, side):
    ids, mask = padded(tokens, side)
    logits = classifier(ids, attention_mask=mask).logits
    memories = classifier.model.final_memory(ids, mask)
    assert logits.shape == (3, 4) and memories.shape == (3, 3, 16)
    for row, length in enumerate((12, 7, 4)):
        alone = tokens[row : row + 1, :length]
        torch.testing.assert_close(logits[row], classifier(alone).logits[0])
        torch.testing.assert_close(memories[row], classifier.model.final_memory(alone)[0])
    if side == "right":
        torch.testing.assert_close(classifier(ids).logits, logits)  # trailing pad tokens are known by their number


def test_losses(classifier, tokens):
    logits = classifier(tokens).logits
    classes = torch.tensor([0, 3, 1])
    torch.testing.assert_close(classifier(tokens, labels=classes).loss, F.cross_entropy(logits, classes))
    several = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    classifier.config.problem_type = "multi_label_classification"
    loss = classifier(tokens, labels=several).loss
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, several))
    loss.backward()
    assert classifier.score.weight.grad.abs().sum() > 0 and classifier.model.initial_memory.grad.abs().sum() > 0


def test_learns(tokens):
    """Whether the last token is even."""
    torch.manual_seed(0)
    classifier = SMTRecurrentForSequenceClassification(student_config(updater_type="mlp", num_labels=2))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=4e-3)
    for _ in range(150):
        ids = torch.randint(1, 37, (32, 5))
        loss = classifier(ids, labels=ids[:, -1] % 2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.3
