"""The rounds of self-training: sample answers, keep the right ones, learn from them, and again.

Every random choice follows from the seed, the round and what it is for, so that a resumed run is the run that was not
interrupted.

Source: M-STaR (arXiv 2412.17451), sections 3 and 4; STaR (arXiv 2203.14465) for `restart`.
"""

import copy
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from minimonkey.conversation import IMAGE_PLACEHOLDER
from minimonkey.scripts.evaluation.intervals import wilson_interval
from minimonkey.scripts.selftraining.process import StepReward
from minimonkey.scripts.selftraining.questions import Queries, Query
from minimonkey.scripts.selftraining.recipe import SelfRecipe
from minimonkey.scripts.selftraining.rewards import (
    REWARDS,
    ProcessReward,
    Sample,
    final_answer,
    pass_at_k,
    process_reward,
    reward_pass_at_k,
    select,
)
from minimonkey.scripts.training.collator import Collator
from minimonkey.scripts.training.encode import IGNORED, Conversation, Encoder
from minimonkey.scripts.training.packing import weighted_loss
from minimonkey.tiling import RANGE_NAMES


Pair = tuple[Query, str]
"""A question and an answer to learn."""


class SelfTraining:
    """A policy, its optimizer, and how far it has come.

    Args:
        model, processor: The policy, on its device.
        recipe: What decides the run.
        process: The process reward of an answer.
    """

    def __init__(self, model, processor, recipe: SelfRecipe, process: ProcessReward = process_reward):
        self.model, self.processor, self.recipe, self.process = model, processor, recipe, process
        self.questions, self.validation, self.test = map(Queries, (recipe.questions, recipe.validation, recipe.test))
        self.encoder = Encoder(processor, model.config)
        self.collate = Collator(
            processor.tokenizer.pad_token_id,
            model.config.image_token_id,
            processor.image_seq_length,
            model.config.tile_size,
            always_with_tile=False,
        )
        self.step_reward = None
        if recipe.process == "learned":
            self.step_reward = StepReward(model, self._encoded, self.collate, processor.tokenizer.decode)
        self.first = copy.deepcopy(model.state_dict()) if recipe.mode == "restart" else None
        self.optimizer = self._new_optimizer()
        self.temperature, self.round, self.learned = recipe.temperature, 0, []
        self.monitors: list[dict] = []
        self.pairs: list[Pair] = []  # of the last round

    def _new_optimizer(self) -> torch.optim.Optimizer:
        # The rate is constant, so that the optimizer's state is all of the schedule.
        return torch.optim.AdamW(
            self.model.parameters(), lr=self.recipe.learning_rate, weight_decay=self.recipe.weight_decay
        )

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.recipe.bf16)

    # --- asking ------------------------------------------------------------------------------------------------------

    def ask(
        self, queries: Sequence[Query], times: int = 1, temperature: float = 0.0, purpose: str = ""
    ) -> list[list[str]]:
        """Return `times` answers to each question, sampled at a temperature; greedily at 0."""
        self.model.eval()
        asked = [query for query in queries for _ in range(times)]
        ranges = dict(zip(RANGE_NAMES, self.recipe.tile_ranges[0]))
        # Without top-k and top-p, whatever the model's own settings are: the temperature alone decides.
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        torch.manual_seed(_seed(self.recipe.seed, self.round, purpose, temperature))
        answers: list[str] = []
        for start in range(0, len(asked), self.recipe.ask_at_once):
            batch = asked[start : start + self.recipe.ask_at_once]
            with self._precision():
                answers += self.model.batch_chat(
                    self.processor,
                    [query.images for query in batch],
                    [query.question for query in batch],
                    max_new_tokens=self.recipe.max_new_tokens,
                    images_kwargs=ranges,
                    **sampling,
                )
        return [answers[start : start + times] for start in range(0, len(answers), times)]

    def judge(self, query: Query, answers: Sequence[str]) -> list[Sample]:
        """Return answers with their rewards."""
        if self.step_reward is None or not self.step_reward.head:
            rewards = [self.process(text) for text in answers]
        else:
            with self._precision():
                rewards = self.step_reward(query, answers)
        return [Sample(text, self._is_right(query, text), reward) for text, reward in zip(answers, rewards)]

    def _is_right(self, query: Query, answer: str) -> bool:
        return REWARDS[self.recipe.reward](answer, query.right)

    def learn_process(self, path: Path) -> dict[str, float | None]:
        """Learn the process reward from answers of the first policy, or read it where `path` is; return how well it ranks."""
        if path.exists():
            self.step_reward.load(path)
            return {}
        # From the end of the sequence, which a run does not reach.
        begin = max(0, self.questions.length - self.recipe.process_queries)
        queries = self.questions.slice(begin, self.recipe.process_queries, self.recipe.seed)
        with self._precision():
            figures = self.step_reward.fit(queries, self.sample(queries, self.temperature, "process"))
        self.step_reward.save(path)
        return figures

    def sample(self, queries: Sequence[Query], temperature: float, purpose: str) -> list[list[Sample]]:
        """Sample and judge the recipe's number of answers to each question."""
        answers = self.ask(queries, self.recipe.samples, temperature, purpose)
        return [self.judge(query, texts) for query, texts in zip(queries, answers)]

    def choose_temperature(self) -> dict[float, float]:
        """Take the temperature with the best Reward-Pass@2 on the validation questions; return all of them by temperature."""
        queries = [self.validation[index] for index in range(len(self.validation))]
        found = {t: reward_pass_at_k(self.sample(queries, t, "retune")) for t in self.recipe.temperatures}
        self.temperature = min(found, key=lambda t: (-found[t], abs(t - self.temperature)))
        return found

    # --- learning ----------------------------------------------------------------------------------------------------

    def gather(self, queries: Sequence[Query]) -> tuple[list[Pair], dict]:
        """Return what a round learns from, and figures about it."""
        if self.recipe.mode == "supervised":
            missing = [query.id for query in queries if query.worked is None]
            if missing:
                raise ValueError(f"mode: supervised learns worked answers, which {missing[0]} does not have.")
            return [(query, query.worked) for query in queries], {}
        sampled = self.sample(queries, self.temperature, "sample")
        chosen = [select(samples, self.recipe.keep, self.recipe.threshold) for samples in sampled]
        pairs = [(query, sample.text) for query, samples in zip(queries, chosen) for sample in samples]
        right = [sample.is_right for samples in sampled for sample in samples]
        figures = {"sampled_right": sum(right) / len(right), "questions_learned": sum(map(bool, chosen))}
        return pairs, figures | {"mean_length": sum(len(text) for _, text in pairs) / max(1, len(pairs))}

    def learn(self, pairs: Sequence[Pair]) -> float:
        """Take one pass over pairs in a random order; return the mean loss of its steps."""
        recipe = self.recipe
        self.model.train()
        order = random.Random(_seed(recipe.seed, self.round, "learn", 0)).sample(list(pairs), len(pairs))
        losses = []
        for start in range(0, len(order), recipe.batch_size):
            samples = [self._encoded(pair) for pair in order[start : start + recipe.batch_size]]
            total = torch.tensor(float(sum((sample["labels"][1:] != IGNORED).sum() for sample in samples)))
            self.optimizer.zero_grad()
            loss_of_step = 0.0
            for at in range(0, len(samples), recipe.micro_batch):
                loss = self._loss(samples[at : at + recipe.micro_batch], total)
                loss.backward()
                loss_of_step += loss.item()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            losses.append(loss_of_step)
        return sum(losses) / max(1, len(losses))

    def _encoded(self, pair: Pair) -> dict:
        query, text = pair
        reader = self.processor.image_processor
        images = [reader.process_image(reader.fetch_images(image)) for image in query.images]
        asked = f"{IMAGE_PLACEHOLDER}\n" * len(images) + query.question
        return self.encoder(Conversation(((asked, text),)), images, tuple(self.recipe.tile_ranges[0]))

    def _loss(self, samples: list[dict], total: torch.Tensor) -> torch.Tensor:
        batch = self.collate(samples)
        batch.pop("redrawn")
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        weights = (batch["labels"] != IGNORED).float()
        with self._precision():
            loss, _ = weighted_loss(self.model, batch | {"use_cache": False}, weights, total.to(self.model.device))
        return loss

    # --- rounds ------------------------------------------------------------------------------------------------------

    def run_round(self) -> dict:
        """Run one round; return its monitors."""
        recipe, figures = self.recipe, {"round": self.round}
        is_retuned = (
            recipe.mode != "supervised" and recipe.retune_every and self.round and not self.round % recipe.retune_every
        )
        if is_retuned:
            figures["reward_pass_at_2_by_temperature"] = {str(t): v for t, v in self.choose_temperature().items()}
        queries = self.questions.slice(self.round * recipe.queries, recipe.queries, recipe.seed)
        pairs, more = self.gather(queries)
        self.pairs = pairs
        if recipe.mode == "restart":
            self.learned += [(query.id, text) for query, text in pairs]
            self.model.load_state_dict(self.first)
            self.optimizer = self._new_optimizer()
            by_id = {
                query.id: query for query in self.questions.slice(0, (self.round + 1) * recipe.queries, recipe.seed)
            }
            pairs = [(by_id[name], text) for name, text in self.learned]
        figures |= more | {"temperature": self.temperature, "pairs": len(pairs), "loss": self.learn(pairs)}
        self.round += 1
        figures |= self.monitor()
        self.monitors.append(figures)
        return figures

    def monitor(self) -> dict:
        """Return accuracy, Pass@K and Reward-Pass@2 on the validation questions."""
        queries = [self.validation[index] for index in range(len(self.validation))]
        greedy = [self._is_right(query, text) for query, (text,) in zip(queries, self.ask(queries))]
        sampled = self.sample(queries, self.temperature, "monitor")
        accuracy = sum(greedy) / len(greedy)
        passed = pass_at_k(sampled)
        return {
            "greedy": accuracy,
            "pass_at_k": passed,
            "pass_at_k_less_greedy": passed - accuracy,
            "reward_pass_at_2": reward_pass_at_k(sampled),
        }

    def measure(self) -> tuple[dict, list[dict]]:
        """Return the accuracy on the test questions with its 95% interval, and one prediction for each."""
        queries = [self.test[index] for index in range(len(self.test))]
        lines = []
        for query, (text,) in zip(queries, self.ask(queries)):
            asked = {"id": query.id, "question": query.question, "answers": [query.right]}
            given = {
                "answer": final_answer(text),
                "text": text,
                "metric": "same_text",
                "score": float(self._is_right(query, text)),
            }
            lines.append(asked | given)
        right = sum(line["score"] for line in lines)
        low, high = wilson_interval(round(right), len(lines))
        return {"accuracy": right / len(lines), "low": low, "high": high, "items": len(lines)}, lines

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the state after a round; it is there whole or not at all, and that of the round before goes.

        What each round learned from stays, in pairs-NNN.jsonl.
        """
        target = folder / f"round-{self.round:03}"
        begun = target.with_suffix(".partial")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        state = {
            "temperature": self.temperature,
            "round": self.round,
            "learned": self.learned,
            "monitors": self.monitors,
        }
        (begun / "state.json").write_text(json.dumps(state | {"recipe": asdict(self.recipe)}))
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, begun / "state.pt")
        lines = [{"id": query.id, "question": query.question, "answer": text} for query, text in self.pairs]
        written = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"pairs-{self.round:03}.jsonl").write_text(written, encoding="utf-8")
        begun.rename(target)
        shutil.rmtree(folder / f"round-{self.round - 1:03}", ignore_errors=True)

    def resume(self, folder: Path) -> bool:
        """Take up the state of the last whole round in a folder; return whether there is one.

        Raises:
            ValueError: It belongs to another recipe.
        """
        found = sorted(path for path in folder.glob("round-*") if path.suffix != ".partial")
        if not found:
            return False
        state = json.loads((found[-1] / "state.json").read_text())
        now = json.loads(json.dumps(asdict(self.recipe)))
        changed = [
            name
            for name, value in now.items()
            if name not in ("output_dir", "rounds") and state["recipe"].get(name, value) != value
        ]
        if changed:
            raise ValueError(f"The run in {folder} had another {', '.join(changed)}; take another output_dir.")
        tensors = torch.load(found[-1] / "state.pt", map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.temperature, self.round, self.monitors = state["temperature"], state["round"], state["monitors"]
        self.learned = [tuple(pair) for pair in state["learned"]]
        return True


def _seed(seed: int, round_: int, purpose: str, temperature: float) -> int:
    return random.Random(f"{seed}/{round_}/{purpose}/{temperature}").randrange(2**31)
