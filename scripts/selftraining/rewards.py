"""Which of its own answers a model learns from: right results, steps that hold, the best few.

    final_answer("tea 3\\nmilk 5\\n3 + 5 = 8")        # "8"
    process_reward("3 + 5 = 8\\n20 - 8 = 11")         # 0.0

Source: M-STaR (arXiv 2412.17451), section 3. Its process reward is a trained model; a rule that any reader can check stands
here, a head that is trained in process.py, and another function of an answer may take its place. Ours, since the paper leaves
them open: the form of the final answer, what equal means, that equal answers count once, and ties, which go to the shorter
answer and then to the earlier.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


NUMBER = r"-?\d+(?:\.\d+)?"
EQUATION = re.compile(rf"({NUMBER})\s*([-+*/])\s*({NUMBER})\s*=\s*({NUMBER})")
SAID = re.compile(r"(?:the )?answer(?: is|:)\s*", re.IGNORECASE)
ROUNDING = 0.005

ProcessReward = Callable[[str], float]


@dataclass(frozen=True)
class Sample:
    """One sampled answer: its text, whether its result is right, and its process reward."""

    text: str
    is_right: bool
    process: float


def final_answer(text: str) -> str:
    """Return the result of an answer with steps: what follows "=" or "answer is" in its last line, or that line."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return SAID.split(last)[-1].rpartition("=")[2].strip().rstrip(".").strip()


def same_value(given: str, right: str) -> bool:
    """Tell whether two results are the same number (3 and 3.0, 1/2 and 0.5), or the same text regardless of case."""
    numbers = [_number(text) for text in (given, right)]
    if None not in numbers:
        return abs(numbers[0] - numbers[1]) < ROUNDING
    return given.strip().lower() == right.strip().lower()


def _number(text: str) -> float | None:
    text = text.strip().replace(",", "").lstrip("$€£")
    try:
        if match := re.fullmatch(rf"({NUMBER})\s*/\s*({NUMBER})", text):
            return float(match[1]) / float(match[2])
        return float(text)
    except (ValueError, ZeroDivisionError):
        return None


def same_record(given: str, right: str) -> bool:
    """Tell whether two texts are the same JSON value: the same fields with the same contents."""
    try:
        return json.loads(given) == json.loads(right)
    except ValueError:
        return False


def value_reward(answer: str, right: str) -> bool:
    """Tell whether the result of an answer is right."""
    return same_value(final_answer(answer), right)


REWARDS: dict[str, Callable[[str, str], bool]] = {"value": value_reward, "json": same_record}


def process_reward(text: str) -> float:
    """Return the least reward of an answer's steps, one a line: 0 for an equation that does not hold, else 1."""
    return min([_step_reward(line) for line in text.splitlines() if line.strip()], default=0.0)


def _step_reward(step: str) -> float:
    for first, sign, second, result in EQUATION.findall(step):
        a, b = float(first), float(second)
        if sign == "/" and not b:
            return 0.0
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b
        if abs(value - float(result)) > ROUNDING:
            return 0.0
    return 1.0


def ranked(samples: Sequence[Sample]) -> list[Sample]:
    """Return samples by process reward, the best first."""
    return sorted(samples, key=lambda sample: (-sample.process, len(sample.text)))


def select(samples: Sequence[Sample], keep: int, threshold: float | None = None) -> list[Sample]:
    """Return the right samples of a question that are learned from: above the threshold, each text once, the best `keep`."""
    right = {sample.text: sample for sample in reversed(samples) if sample.is_right}
    in_order = [sample for sample in samples if right.get(sample.text) is sample]
    passing = [sample for sample in in_order if threshold is None or sample.process > threshold]
    return ranked(passing)[:keep]


def pass_at_k(samples: Sequence[Sequence[Sample]]) -> float:
    """Return the share of questions of which any sample is right."""
    return sum(any(sample.is_right for sample in of_question) for of_question in samples) / len(samples)


def reward_pass_at_k(samples: Sequence[Sequence[Sample]], k: int = 2) -> float:
    """Return the share of questions with a right sample among the `k` best by process reward; right ones are not preferred."""
    return pass_at_k([ranked(of_question)[:k] for of_question in samples])
