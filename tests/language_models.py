"""Tiny random language models of several kinds, plain passes over them, and a task made by hand."""

import random
from dataclasses import dataclass, field, replace

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from smt_hf.data import byte_tokenizer
from smt_hf.errors import InputError
from smt_hf.evaluation.long_context.loading import LanguageModel
from smt_hf.evaluation.long_context.sample import Needle, Sample
from tests.conftest import make_student

_TOKENS = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def make_llama(**fields):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return _made(LlamaForCausalLM, LlamaConfig(**{**_TOKENS, **sizes, "max_position_embeddings": 512, **fields}))


def make_gpt2():
    return _made(GPT2LMHeadModel, GPT2Config(**_TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=512))


def make_mamba(scale=3):
    config = MambaConfig(**_TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4)
    return _made(MambaForCausalLM, config, scale)


def make_mamba2():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 8}
    return _made(Mamba2ForCausalLM, Mamba2Config(**_TOKENS, **sizes, n_groups=2, chunk_size=4))


def make_rwkv():
    return _made(RwkvForCausalLM, RwkvConfig(**_TOKENS, hidden_size=16, num_hidden_layers=2))


def make_ours(**fields):
    return make_student(vocab_size=258, **fields)


def _made(model_class, config, scale=3):
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():  # at their own size the states of random models matter to no logit
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def language_model(model) -> LanguageModel:
    """A model of bytes."""
    return LanguageModel("tiny", model, byte_tokenizer())


@torch.inference_mode()
def plain_logits(model, ids):
    """Of one pass over all tokens, without a state: `(T, V)`."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def plain_continuation(model, ids, num_tokens):
    """The most likely tokens, each of a pass over everything before it."""
    ids = list(ids)
    for _ in range(num_tokens):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
    return ids[len(ids) - num_tokens :]


@dataclass(frozen=True)
class HandTask:
    """A number between letters. `known` are other answers, by index."""

    name: str = "hand"
    suite: str = "hand"
    num_generated: int = 4
    metric: str = "string_match_all"
    num_samples: int | None = None
    known: dict = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    def sample(self, length, index, seed, count):
        rng = random.Random(f"{seed} {index}")
        number, depth = str(rng.randrange(100, 1000)), (index % 10 + 0.5) / 10
        haystack = length - self.num_generated - len("<000> ?") - index % 3
        if haystack < 2:
            raise InputError(f"`hand` does not fit in a length of {length}: the smallest is {13 + index % 3}.")
        begin = int(depth * haystack)
        letters = [rng.choice("abcdefgh") for _ in range(haystack)]
        context = "".join(letters[:begin]) + f"<{number}>" + "".join(letters[begin:])
        answers = (self.known.get(index, number),)
        facts = {"context": [0, len(context)], "completion": " " + answers[0]}
        needles = (Needle(begin, begin + 5, depth),)
        return Sample(self.name, length, index, context + " ?", answers, needles, self.labels, facts)

    def without_needles(self, sample):
        (needle,) = sample.needles
        prompt = sample.prompt[: needle.start] + "h" * 5 + sample.prompt[needle.end :]
        return replace(sample, prompt=prompt, needles=())

    def score(self, sample, written):
        return float(sample.answers[0] in written)

    def chance(self, sample):
        return 0.001

    def shortcut(self, sample):
        return sample.answers[0] if sample.needles[0].depth > 0.9 else ""
