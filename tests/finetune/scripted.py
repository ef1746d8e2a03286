"""Messages, and a model whose answers a test writes."""

from types import SimpleNamespace

from tests.generate.models import tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


class Scripted:
    """In place of a model: answers each prompt by a function of its text and seed."""

    def __init__(self, answer, *, slots=1000):
        self.tokenizer = tokenizer()
        self.engine = SimpleNamespace(slots=slots)
        self.asked = []
        self._answer = answer

    def generate(self, prompts, *, max_new_tokens, sampler, seed, num_samples=1):
        self.asked += [self.tokenizer.decode(ids) for ids in prompts]
        written = [
            self._answer(self.tokenizer.decode(ids), f"{seed[i]}/{sample}")
            for i, ids in enumerate(prompts)
            for sample in range(num_samples)
        ]
        return [
            SimpleNamespace(text=f" {text}", finish_reason=reason)
            for text, reason in (
                answer if isinstance(answer, tuple) else (answer, "stop")
                for answer in written
            )
        ]
