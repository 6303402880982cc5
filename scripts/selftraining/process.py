"""A process reward that is learned from the policy's own traces: how likely the result is right, after each step.

The label of a step is the share of right answers among the sampled answers to the question that begin with the same steps: the
Monte Carlo estimate of the paper, without sampling each prefix anew. A linear head on the hidden states of the first policy,
which stays as it is, learns these labels; an answer's reward is its worst step's.

Source: M-STaR (arXiv 2412.17451), section 4, whose reward model is another one of 8B. Ours: the head, its loss, steps as lines.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minimonkey.scripts.selftraining.questions import Query
from minimonkey.scripts.selftraining.rewards import Sample
from minimonkey.scripts.training.encode import IGNORED


AT_ONCE = 64  # answers
DECAY = 1e-3
MOST_ITERATIONS = 100
HELD_OUT_SHARE = 5  # one question in five tells how good the head is


def steps(text: str) -> list[str]:
    """Return an answer up to the end of each of its steps, one a line: "a", "a\\nb", ..."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return ["\n".join(lines[: number + 1]) for number in range(len(lines))]


def step_labels(samples: Sequence[Sample]) -> list[list[float]]:
    """Return for each step of each answer to a question the share of right answers that begin with the same steps."""
    right = defaultdict(list)
    for sample in samples:
        for prefix in steps(sample.text):
            right[prefix].append(sample.is_right)
    return [[sum(right[prefix]) / len(right[prefix]) for prefix in steps(sample.text)] for sample in samples]


def ranked_right(judged: Sequence[Sequence[Sample]]) -> float | None:
    """Return how often a right answer has more reward than a wrong one to the same question (a tie is half); None if never."""
    wins = [
        (right.process > wrong.process) + 0.5 * (right.process == wrong.process)
        for samples in judged
        for right in samples
        for wrong in samples
        if right.is_right and not wrong.is_right
    ]
    return sum(wins) / len(wins) if wins else None


class StepReward:
    """The head and the model that it reads.

    Args:
        model: The first policy, which is copied.
        encode: Of a question and an answer, as training does.
        collate: Of such samples.
        decode: Of token ids.
    """

    def __init__(self, model, encode: Callable[[tuple[Query, str]], dict], collate, decode: Callable[[Any], str]):
        self.model = copy.deepcopy(model).eval()
        self.encode, self.collate, self.decode = encode, collate, decode
        self.head: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def states(self, query: Query, texts: Sequence[str]) -> list[torch.Tensor]:
        """Return the hidden state at the end of each step of each answer, (steps, D)."""
        found = []
        for start in range(0, len(texts), AT_ONCE):
            part = texts[start : start + AT_ONCE]
            samples = [self.encode((query, "\n".join(steps(text)[-1:]))) for text in part]
            batch = self.collate(samples)
            batch = {n: v.to(self.model.device) for n, v in batch.items() if n not in ("labels", "redrawn")}
            output = self.model(**batch, use_cache=False, output_hidden_states=True, logits_to_keep=1)
            hidden = output.hidden_states[-1].float().cpu()
            found += [row[self._ends(sample, text)] for row, sample, text in zip(hidden, samples, part)]
        return found

    def _ends(self, sample: dict, text: str) -> list[int]:
        """Return the place of the last token of each step."""
        places = (sample["labels"] != IGNORED).nonzero().flatten().tolist()
        lengths = [len(self.decode(sample["input_ids"][places[: n + 1]])) for n in range(len(places))]
        reached = list(zip(places, lengths))
        return [next((p for p, n in reached if n >= len(prefix)), places[-1]) for prefix in steps(text)]

    def fit(self, queries: Sequence[Query], sampled: Sequence[Sequence[Sample]]) -> dict[str, float | None]:
        """Learn the head from sampled answers; return how well it ranks answers to questions that it did not learn from.

        Raises:
            ValueError: All answers are right, or all wrong.
        """
        if len({sample.is_right for samples in sampled for sample in samples}) < 2:
            raise ValueError(
                "A process reward is learned from right and wrong answers; the samples are all of one kind."
            )
        traces = list(zip(queries, sampled))
        features, labels = [], []
        for number, (query, samples) in enumerate(traces):
            if number % HELD_OUT_SHARE:
                features += self.states(query, [sample.text for sample in samples])
                labels += [torch.tensor(values) for values in step_labels(samples)]
        self._solve(torch.cat(features), torch.cat(labels))
        held_out = [
            [Sample(s.text, s.is_right, reward) for s, reward in zip(samples, self(query, [s.text for s in samples]))]
            for query, samples in traces[::HELD_OUT_SHARE]
        ]
        rule = ranked_right([samples for _, samples in traces[::HELD_OUT_SHARE]])
        return {"steps": len(torch.cat(labels)), "ranked_right": ranked_right(held_out), "ranked_right_by_rule": rule}

    def _solve(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Fit a logistic regression, which has one solution, to features of mean 0 and deviation 1."""
        mean, deviation = features.mean(0), features.std(0).clamp_min(1e-4)
        weight, bias = torch.zeros(features.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=MOST_ITERATIONS, line_search_fn="strong_wolfe")
        inputs = (features - mean) / deviation

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            logits = inputs @ weight + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels) + DECAY * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self.head = {"weight": weight.detach(), "bias": bias.detach(), "mean": mean, "deviation": deviation}

    def __call__(self, query: Query, texts: Sequence[str]) -> list[float]:
        """Return the least reward of each answer's steps; 0 for an answer without any."""
        written = [text for text in texts if steps(text)]
        rewards = iter([self._least(states) for states in self.states(query, written)])
        return [next(rewards) if steps(text) else 0.0 for text in texts]

    def _least(self, states: torch.Tensor) -> float:
        head = self.head
        logits = ((states - head["mean"]) / head["deviation"]) @ head["weight"] + head["bias"]
        return torch.sigmoid(logits).min().item()

    def save(self, path: Path) -> None:
        """Write the head; the model is the run's first."""
        torch.save(self.head, path)

    def load(self, path: Path) -> None:
        """Read the head of `save`."""
        self.head = torch.load(path, weights_only=True)
