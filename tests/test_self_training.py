"""Training on one's own right answers: what is right, what is kept, how rounds go on, and what a resumed run is."""

import json

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file

from minimonkey.scripts import self_train
from minimonkey.scripts.repository import load_model, load_processor
from minimonkey.scripts.selftraining import rewards
from minimonkey.scripts.selftraining.loop import SelfTraining
from minimonkey.scripts.selftraining.process import ranked_right, step_labels
from minimonkey.scripts.selftraining.questions import Queries
from minimonkey.scripts.selftraining.recipe import GRID, SelfRecipe, read_self_recipe
from minimonkey.scripts.selftraining.rewards import (
    Sample,
    final_answer,
    pass_at_k,
    process_reward,
    reward_pass_at_k,
    same_value,
    select,
)
from minimonkey.scripts.synthetic.documents import document


BILLS = {"synthetic": "bill", "length": 6, "seed": 1}
SMALL = {
    **{
        "model": str(ROOT),
        "questions": BILLS,
        "validation": {**BILLS, "seed": 2},
        "test": {**BILLS, "seed": 3, "split": "held_out"},
    },
    **{
        "rounds": 2,
        "queries": 4,
        "samples": 2,
        "retune_every": 1,
        "temperatures": [0.5, 1.0],
        "tile_ranges": [[1, 1, 1, 1]],
    },
    **{"max_new_tokens": 4, "learning_rate": 1e-3, "batch_size": 2, "micro_batch": 2, "device": "cpu"},
}


def samples(*kinds: str) -> list[Sample]:
    """Of kinds like "r1 text": right or wrong, process reward, text."""
    return [Sample(text, kind[0] == "r", float(kind[1:])) for kind, text in (entry.split(" ", 1) for entry in kinds)]


# --- rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("tea 3\nmilk 5\n3 + 5 = 8", "8"),
        ("3 + 5 = 8\n20 - 8 = 12\n\n", "12"),
        ("tea 3\nmilk", "milk"),
        ("The answer is B.", "B"),
        ("", ""),
    ],
)
def test_final_answers(text, result):
    assert final_answer(text) == result


@pytest.mark.parametrize(
    ("given", "right", "is_same"),
    [
        ("3.0", "3", True),
        ("1/2", "0.5", True),
        ("$2.38", "2.38", True),
        ("Milk", "milk", True),
        ("1/0", "1", False),
        ("8", "9", False),
    ],
)
def test_what_is_the_same_value(given, right, is_same):
    assert same_value(given, right) is is_same


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("3 + 5 = 8\n20 - 8 = 12", 1),
        ("3 + 5 = 9\n20 - 8 = 12", 0),
        ("tea 3\nmilk", 1),
        ("1 / 0 = 1", 0),
        ("6/4=1.5, 2*3=6", 1),
        ("", 0),
    ],
)
def test_a_step_that_does_not_hold_spoils_an_answer(text, reward):
    assert process_reward(text) == reward


def test_selection_by_hand():
    assert select(samples("w1 a", "w1 b"), 2) == []
    assert [s.text for s in select(samples("r0 a", "w1 b"), 2)] == ["a"]
    assert select(samples("r0 a", "w1 b"), 2, threshold=0.5) == []
    # By process reward, then the shorter, then the earlier; the same text counts once.
    chosen = select(samples("r0.5 long", "r1 cccc", "r1 bb", "r1 bb", "r1 aa"), 3)
    assert [s.text for s in chosen] == ["bb", "aa", "cccc"]


def test_monitors_by_hand():
    asked = [samples("w1 a", "w0.5 b", "r0.2 c"), samples("r1 a", "w0 b", "w0 c"), samples("w1 a", "w1 b", "w1 c")]
    assert pass_at_k(asked) == pytest.approx(2 / 3)
    assert reward_pass_at_k(asked, 2) == pytest.approx(1 / 3)  # the first question's right answer ranks third


def test_records_are_the_same_whatever_their_order():
    assert rewards.REWARDS["json"]('{"a": 1, "b": 2}', '{"b": 2, "a": 1}')
    assert not rewards.REWARDS["json"]('{"a": 1', '{"a": 1}')


# --- questions -------------------------------------------------------------------------------------------------------


def test_bills_have_worked_answers_that_hold():
    for index in range(60):
        for asked in document("bill", index, 1, "training", index / 59).questions:
            assert process_reward(asked.answer) == 1 and final_answer(asked.answer)
    query = Queries(BILLS)[0]
    assert final_answer(query.worked) == query.right


def test_slices_go_round_and_shuffle_each_time():
    queries = Queries(BILLS)
    ids = [query.id for query in queries.slice(0, 12, seed=1)]
    assert sorted(ids[:6]) == sorted(ids[6:]) and ids[:6] != ids[6:] and len(set(ids)) == 6
    assert [query.id for query in queries.slice(4, 3, seed=1)] == ids[4:7]


# --- rounds ----------------------------------------------------------------------------------------------------------


def training(tmp_path, **options) -> SelfTraining:
    recipe = SelfRecipe(**{**SMALL, "output_dir": str(tmp_path / "out"), **options})
    return SelfTraining(load_model(ROOT, dtype=torch.float32), load_processor(ROOT), recipe)


def test_the_temperature_with_the_best_reward_pass_is_taken(tmp_path, monkeypatch):
    run = training(tmp_path, temperatures=[0.4, 0.7, 1.0, 1.3], temperature=1.0)
    best = {0.4: "r1 a", 0.7: "w1 a", 1.0: "w1 a", 1.3: "r1 a"}
    asked = []
    monkeypatch.setattr(run, "sample", lambda queries, t, purpose: asked.append(t) or [samples(best[t])] * len(queries))
    assert run.choose_temperature() == {0.4: 1, 0.7: 0, 1.0: 0, 1.3: 1}
    assert run.temperature == 1.3 and asked == [0.4, 0.7, 1.0, 1.3]  # the nearer of two equal ones
    assert len(GRID) == 14 and (GRID[0], GRID[-1]) == (0.3, 1.6)


def test_continuous_rounds_are_one_run_over_all_their_data(tmp_path):
    """The optimizer goes on; with a new one the weights differ."""
    pairs = [(Queries(BILLS)[index], f"{index} + 1 = {index + 1}") for index in range(4)]

    def learned(renew: bool, parts: list) -> torch.Tensor:
        run = training(tmp_path)
        for part in parts:
            run.learn(part)
            if renew:
                run.optimizer = run._new_optimizer()
        return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])

    each = [[pair] * 2 for pair in pairs]  # a step each, whatever the order within
    whole, again, renewed = learned(False, each), learned(False, each), learned(True, each)
    assert torch.equal(whole, again) and not torch.equal(whole, renewed)
    run = training(tmp_path)
    run.learn(each[0])
    moments = {name: state["step"].item() for name, state in run.optimizer.state_dict()["state"].items()}
    run.learn(each[1])
    assert all(state["step"].item() == moments[name] + 1 for name, state in run.optimizer.state_dict()["state"].items())


def test_restart_begins_with_the_first_model_and_all_right_answers(tmp_path, monkeypatch):
    run = training(tmp_path, mode="restart", retune_every=0)
    monkeypatch.setattr(run, "sample", lambda queries, t, purpose: [samples("r1 3 + 5 = 8")] * len(queries))
    counts = []
    monkeypatch.setattr(run, "learn", lambda pairs: counts.append(len(pairs)) or 0.0)
    run.run_round()
    run.run_round()
    assert counts == [4, 8]
    assert all(torch.equal(value, run.first[name]) for name, value in run.model.state_dict().items())


def write(tmp_path, name: str, **options):
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({**SMALL, "output_dir": str(tmp_path / name), **options}))
    return recipe


def test_the_command_trains_resumes_and_compares(tmp_path, capsys, monkeypatch):
    """An interrupted run ends with the weights and monitors of the other."""
    monkeypatch.setattr(rewards, "REWARDS", rewards.REWARDS)
    monkeypatch.setitem(rewards.REWARDS, "value", lambda answer, right: len(answer) % 2 == 0)  # so that some are right
    assert self_train.main([str(write(tmp_path, "whole"))]) == 0
    broken = write(tmp_path, "broken")
    assert self_train.main([str(broken), "--set", "rounds=1"]) == 0
    with pytest.raises(SystemExit):
        self_train.main([str(broken)])
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        self_train.main([str(broken), "--resume", "--set", "seed=2"])
    assert "another seed" in capsys.readouterr().err
    (tmp_path / "broken" / "round-002.partial").mkdir()  # as a killed run leaves it
    (tmp_path / "broken" / "model").rename(tmp_path / "first")
    assert self_train.main([str(broken), "--resume"]) == 0
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "broken")]
    assert metrics[0] == metrics[1] and len(metrics[0]["rounds"]) == 2
    assert metrics[0]["rounds"][1]["reward_pass_at_2_by_temperature"].keys() == {"0.5", "1.0"}
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (tmp_path / "whole" / "monitors.png").exists()
    for number, monitor in enumerate(metrics[0]["rounds"], 1):
        kept = [(tmp_path / name / f"pairs-{number:03}.jsonl").read_text() for name in ("whole", "broken")]
        assert kept[0] == kept[1] and kept[0].count("\n") == monitor["pairs"]
    from minimonkey.scripts import evaluate

    assert evaluate.main(["compare", *(str(tmp_path / "whole" / f"{name}.jsonl") for name in ("before", "after"))]) == 0


def test_supervised_learns_worked_answers(tmp_path):
    run = training(tmp_path, mode="supervised")
    pairs, _ = run.gather([run.questions[0]])
    assert pairs[0][1] == run.questions[0].worked
    losses = [run.learn(pairs * 2) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "other"}, "mode is continuous"),
        ({"samples": 0}, "samples must be a whole number"),
        ({"no_such": 1}, "unknown no_such"),
        ({"temperatures": []}, "temperatures are above 0"),
        ({"process": "other"}, "process is rule or learned"),
        ({"bf16": "yes"}, "bf16 is true or false"),
        ({"tile_ranges": [[1, 1, 1, 1], [1, 2, 1, 1]]}, "tile_ranges is one"),
        ({"model": None}, "model must be text"),
    ],
)
def test_wrong_recipes(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read_self_recipe(write(tmp_path, "wrong", **options), [])


@pytest.mark.parametrize(
    "source", [{"synthetic": "nothing", "length": 3}, {"synthetic": "bill", "length": 0}, {"length": 3}, "none.jsonl"]
)
def test_wrong_questions(source):
    with pytest.raises(ValueError, match="none.jsonl|known are|synthetic, length"):
        Queries(source)


# --- learned process reward ------------------------------------------------------------------------------------------


def test_labels_of_steps_by_hand():
    """A step's label is the share of right answers among those that begin with the same steps."""
    asked = samples("r1 a 3\nb 5\n8", "w1 a 3\nb 6\n9", "w1 a 3\nb 5\n9")
    third = pytest.approx(1 / 3)
    assert step_labels(asked) == [[third, 0.5, 1], [third, 0, 0], [third, 0.5, 0]]
    assert ranked_right([samples("r0.9 a", "w0.1 b", "w0.9 c"), samples("r1 a")]) == 0.75
    assert ranked_right([samples("r1 a")]) is None


def test_a_learned_reward_tells_steps_that_lead_to_right_results(tmp_path):
    """Answers that are wrong from their second step on have less reward than right ones, on questions not learned from."""
    run = training(tmp_path, process="learned", questions={**BILLS, "length": 40})
    queries = [run.questions[index] for index in range(40)]
    sampled = [samples(f"r1 {query.worked}", f"w1 {wrong(query.worked)}") for query in queries]
    figures = run.step_reward.fit(queries, sampled)
    assert figures["ranked_right"] > 0.8 and figures["ranked_right_by_rule"] == 0.5
    rewards = run.step_reward(queries[0], ["", queries[0].worked])
    assert rewards[0] == 0 and 0 < rewards[1] <= 1
    run.step_reward.save(tmp_path / "process.pt")
    other = training(tmp_path, process="learned")
    assert other.learn_process(tmp_path / "process.pt") == {}
    assert other.judge(queries[0], [queries[0].worked])[0].process == pytest.approx(rewards[1], abs=1e-5)
    with pytest.raises(ValueError, match="all of one kind"):
        run.step_reward.fit(queries[:2], [samples("r1 a"), samples("r1 b")])


def wrong(worked: str) -> str:
    """The answer with "no" in place of what its second line says."""
    first, _, *rest = worked.splitlines()
    return "\n".join([first, "no", *rest])


def test_the_command_learns_the_process_reward_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "value", lambda answer, right: len(answer) % 2 == 0)
    options = {"process": "learned", "bf16": True, "process_queries": 5, "samples": 6, "rounds": 1, "retune_every": 0}
    recipe = write(tmp_path, "learned", **options)
    assert self_train.main([str(recipe)]) == 0
    assert '"ranked_right"' in capsys.readouterr().out
    assert (tmp_path / "learned" / "process.pt").exists()
    (tmp_path / "learned" / "model").rename(tmp_path / "first")
    assert self_train.main([str(recipe), "--resume", "--set", "rounds=2"]) == 0
    assert '"ranked_right"' not in capsys.readouterr().out
