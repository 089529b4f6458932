"""The model `smt_rnn` of lm-eval: any causal language model, read as `recipes/evaluate.py` reads it.

It differs from lm-eval's `hf` in four ways. A prompt is read in chunks with the state carried on, so that memory does
not grow with it where the state does not. `loglikelihood_rolling` is one stream from the first token to the last
instead of windows that begin anew. `max_length` is exact, and without one a recurrent model has none. A text that is
longer is an error; `hf` cuts its beginning, and with it the needle.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm.auto import tqdm

from smt_hf.errors import InputError
from smt_hf.evaluation.long_context.loading import load_language_model
from smt_hf.evaluation.long_context.manners import find_manner
from smt_hf.evaluation.long_context.reading import Reader

_NUM_GENERATED = 256  # where a task does not say, as in lm-eval


@register_model("smt_rnn")
class CarriedStateLM(TemplateLM):
    """A checkpoint that is read in chunks, its state carried on.

    Args:
        pretrained: folder or Hub repository.
        tokenizer: likewise; default: the checkpoint.
        batch_size: texts side by side.
        device, dtype: as in `load_language_model`.
        chunk_size: most tokens of one forward.
        max_length: most tokens of a text and what is written after it; default: the model's positions, no limit for a
            recurrent model.
        max_batch_size: lm-eval passes it; not used.

    Raises:
        InputError: the checkpoint cannot be loaded or read, or `batch_size` is no number.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        batch_size: int | str | None = 8,
        device: str | None = None,
        dtype: str = "float32",
        chunk_size: int = 512,
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size or 8).isdigit():
            raise InputError(f"`batch_size` must be a number, got {batch_size!r}: `auto` is not searched for.")
        self.loaded = load_language_model(pretrained, tokenizer, device, dtype)
        self.tokenizer = self.loaded.tokenizer
        self.reader = Reader(self.loaded.model, find_manner(self.loaded.model), int(chunk_size))
        self.batch_size = int(batch_size or 8)
        self.max_length = self.loaded.most_tokens if max_length is None else int(max_length)
        self._device = self.loaded.model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text of which all tokens are scored.

        Raises:
            InputError: the tokenizer has none that could stand there.
        """
        tokens = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in tokens if token is not None), None)
        if found is None:
            raise InputError(
                "the tokenizer has neither a token of the beginning nor one of the end to put before texts."
            )
        return found

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        shape = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **shape)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.loaded.encoded(string) if add_special_tokens is False else self.loaded.prompt(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        contexts: dict[tuple[int, ...], list[int]] = {}  # read once, for all continuations
        for number, (_, context, continuation) in enumerate(requests):
            self._check(len(context) + len(continuation))
            contexts.setdefault(tuple(context), []).append(number)
        prompts, found = list(contexts), [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for batch in self._batches(prompts):
                reading = self.reader.read([prompts[index] for index in batch])
                asked = [contexts[prompts[index]] for index in batch]
                for place in range(max(map(len, asked))):
                    numbers = [some[min(place, len(some) - 1)] for some in asked]
                    losses = reading.copy().losses([requests[number][2] for number in numbers])
                    for number, (nats, hits) in zip(numbers, losses):
                        found[number] = (-float(nats.sum()), bool(hits.all()))
                bar.update(sum(map(len, asked)))
        for (texts, _, _), result in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        ids = [self.loaded.encoded(text) for text in texts]
        found = [0.0] * len(texts)
        order = sorted((index for index in range(len(ids)) if ids[index]), key=lambda index: -len(ids[index]))
        most = 1 if len(self.reader.batches([1, 1], 2)) > 1 else self.batch_size
        for begin in tqdm(range(0, len(order), most), desc="loglikelihood_rolling", disable=disable_tqdm):
            batch = order[begin : begin + most]
            self._check(1 + len(ids[batch[0]]))
            reading = self.reader.read([[self.prefix_token_id]] * len(batch))
            for index, (nats, _) in zip(batch, reading.losses([ids[index] for index in batch])):
                found[index] = -float(nats.sum())
        for text, result in zip(texts, found):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}  # requests that are written alike
        for number, request in enumerate(requests):
            groups.setdefault(_how_to_write(request.args[1]), []).append(number)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for (num_tokens, stops), numbers in groups.items():
                prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
                for prompt in prompts:
                    self._check(len(prompt) + num_tokens)
                for batch in self._batches(prompts):
                    for place, text in zip(batch, self._written([prompts[at] for at in batch], num_tokens, stops)):
                        found[numbers[place]] = text
                    bar.update(len(batch))
        for request, text in zip(requests, found):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def _written(self, prompts: Sequence[Sequence[int]], num_tokens: int, stops: tuple[str, ...]) -> list[str]:
        def decoded(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=True)

        is_done = (lambda ids: any(stop in decoded(ids) for stop in stops)) if stops else None
        texts = [decoded(ids) for ids in self.reader.read(prompts).write(num_tokens, self.loaded.ends, is_done)]
        for stop in stops:
            texts = [text.partition(stop)[0] for text in texts]
        return texts

    def _batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return self.reader.batches([len(prompt) for prompt in prompts], self.batch_size)

    def _check(self, num_tokens: int) -> None:
        if self.max_length is not None and num_tokens > self.max_length:
            raise InputError(
                f"a text has {num_tokens:,} tokens, with what is written after it, and `max_length` is "
                f"{self.max_length:,}: nothing is cut. Give a larger one if the model has as many positions."
            )


def _how_to_write(settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Tokens to write, and texts that end them.

    Raises:
        InputError: the task samples.
    """
    if settings.get("do_sample") and settings.get("temperature") != 0:
        raise InputError("`smt_rnn` writes the most likely tokens: a task with `do_sample` needs lm-eval's model `hf`.")
    stops = settings.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)
    return int(settings.get("max_gen_toks", settings.get("max_new_tokens", _NUM_GENERATED))), stops
