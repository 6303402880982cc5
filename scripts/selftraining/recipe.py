"""What decides a run of self-training, as a YAML file of these names."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from minimonkey.scripts.selftraining.rewards import REWARDS
from minimonkey.scripts.training.recipe import check_ranges, read_options, read_overrides


MODES = ("continuous", "restart", "supervised")
PROCESS = ("rule", "learned")
GRID = [round(0.3 + 0.1 * step, 1) for step in range(14)]  # 0.3 to 1.6, as published


@dataclass(kw_only=True)
class SelfRecipe:
    """A run of scripts/self_train.py; the defaults are the published figures where there are any.

    Attributes:
        model: Folder or Hub id of the policy to begin with, which should already answer in steps.
        questions, validation, test: See questions.py; the last two are never learned from.
        mode: "continuous" keeps weights, optimizer and schedule from round to round (M-STaR). "restart" begins each round with
            the first model and learns from all right answers so far (STaR). "supervised" learns worked answers instead.
        queries: Questions of a round; published are 45,000, a quarter of them.
        samples, keep, threshold: How many answers of a question are sampled; how many of the right ones are learned, by process
            reward, above the threshold.
        temperature, retune_every, temperatures: Of sampling; every so many rounds (0: never) the one of these with the best
            Reward-Pass@2 on the validation questions is taken, on a tie the nearest to the present one (ours).
        reward: What right means, see rewards.py.
        process: What ranks right answers: "rule", see rewards.py, or "learned", a head trained before the first round on the
            answers sampled to `process_queries` questions, see process.py.
        batch_size, micro_batch: Answers of a step, and of them at once.
        dtype, bf16: Type of the weights; whether to compute in bfloat16 whatever they are, as Trainer's `bf16` does.
    """

    model: str
    output_dir: str
    questions: dict[str, Any] | str
    validation: dict[str, Any] | str
    test: dict[str, Any] | str
    mode: str = "continuous"
    rounds: int = 14
    queries: int = 45000
    samples: int = 16
    keep: int = 2
    threshold: float | None = None
    temperature: float = 1.0
    retune_every: int = 2
    temperatures: list[float] = field(default_factory=lambda: list(GRID))
    reward: str = "value"
    process: str = "rule"
    process_queries: int = 3000
    max_new_tokens: int = 256
    tile_ranges: list[list[int]] = field(default_factory=lambda: [[1, 12, 1, 1]])
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    batch_size: int = 128
    micro_batch: int = 8
    ask_at_once: int = 32
    seed: int = 1
    device: str = "auto"
    dtype: str = "float32"
    bf16: bool = False

    def __post_init__(self):
        for name in (
            "rounds",
            "queries",
            "samples",
            "keep",
            "max_new_tokens",
            "batch_size",
            "micro_batch",
            "ask_at_once",
            "process_queries",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in ("model", "output_dir"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}.")
        if not isinstance(self.bf16, bool):
            raise ValueError(f"bf16 is true or false, got {self.bf16!r}.")
        for name in ("temperature", "learning_rate"):
            if not isinstance(getattr(self, name), (int, float)) or getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)!r}.")
        if self.mode not in MODES or self.reward not in REWARDS:
            raise ValueError(
                f"mode is {', '.join(MODES)}, reward {', '.join(REWARDS)}; got {self.mode!r}, {self.reward!r}."
            )
        if self.process not in PROCESS:
            raise ValueError(f"process is {' or '.join(PROCESS)}, got {self.process!r}.")
        if self.retune_every < 0 or not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError(
                f"retune_every is at least 0, temperatures are above 0: {self.retune_every}, {self.temperatures}."
            )
        check_ranges(self.tile_ranges, "tile_ranges")
        if len(self.tile_ranges) != 1:
            raise ValueError(f"tile_ranges is one [min, max, adaptive min, adaptive max], got {self.tile_ranges}.")


def read_self_recipe(path: Path, overrides: list[str]) -> SelfRecipe:
    """Read a recipe, with `name=value` put in.

    Raises:
        ValueError: No such file, or names or values that there are not.
    """
    options = read_options(path) | read_overrides(overrides)
    known = {entry.name for entry in fields(SelfRecipe)}
    unknown = [str(name) for name in options if name not in known]
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
    try:
        return SelfRecipe(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
