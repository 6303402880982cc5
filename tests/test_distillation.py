"""A small vision tower learns from a larger one: losses by hand, and the command from start to a loaded model."""

import json

import pytest
import torch
from model_helpers import tiny_model
from torch import nn
from transformers import AutoModel

from minimonkey.scripts import distill_vision
from minimonkey.scripts.distill_vision import make_student
from minimonkey.scripts.training.distillation import (
    TowerRecorder,
    cosine_loss,
    hidden_loss,
    layer_pairs,
    relation_loss,
    soft_cross_entropy,
)


def test_soft_cross_entropy_by_hand():
    student, teacher = (
        torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[9.0, 1.0, 2.0], [0.0, 0.0, 0.0]]),
    )
    assert soft_cross_entropy(student, teacher).item() == pytest.approx(torch.tensor(3.0).log().item())
    student = torch.tensor([[2.0, 0.0, 0.0]])
    target = torch.tensor([[1.0, 0.0, 0.0]]).mul(50)
    assert soft_cross_entropy(student, target).item() == pytest.approx(-student.log_softmax(-1)[0, 0].item())


def test_losses_are_least_where_towers_are_alike():
    torch.manual_seed(0)
    states = [torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(3)]
    relations = [a @ b.transpose(1, 2) / 8**0.5 for a in states for b in states]
    entropy = sum(-(r.softmax(-1) * r.log_softmax(-1)).sum(-1).mean() for r in relations) / 9
    assert relation_loss(states, states).item() == pytest.approx(entropy.item(), rel=1e-5)
    assert relation_loss([torch.randn_like(s) for s in states], states) > entropy
    assert hidden_loss(states[0], states[0]) == 0 < hidden_loss(states[0], states[1])
    assert cosine_loss(states[0], 3 * states[0]).item() == pytest.approx(0, abs=1e-6)


def test_relations_do_not_hang_on_rotation_or_width():
    torch.manual_seed(0)
    states = [torch.randn(2, 5, 8) for _ in range(3)]
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    turned = [s @ turn for s in states]
    other = [torch.randn(2, 5, 8) for _ in range(3)]
    assert torch.allclose(relation_loss(turned, other), relation_loss(states, other), atol=1e-5)
    assert torch.allclose(hidden_loss(turned[0], other[0]), hidden_loss(states[0], other[0]), atol=1e-5)
    assert relation_loss([torch.randn(2, 5, 4) for _ in range(3)], states).isfinite()


def test_layers_learn_from_those_at_their_height():
    assert layer_pairs(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs(2, 6) == [(0, 2), (1, 5)]
    assert layer_pairs(4, 8, last=2) == [(2, 5), (3, 7)]
    for arguments in ((3, 2), (2, 4, 3)):
        with pytest.raises(ValueError, match="cannot learn|is more than"):
            layer_pairs(*arguments)


def test_a_short_distillation_of_a_shared_tower_falls():
    teacher = tiny_model()
    student = make_student(teacher, None, 2, "heads")
    towers = student.model.vision_tower, teacher.model.vision_tower
    recorders = [TowerRecorder(tower) for tower in towers]
    optimizer = torch.optim.AdamW(towers[0].parameters(), 3e-3)
    pixels = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(50):
        with torch.no_grad():
            towers[1](pixels)
        towers[0](pixels)
        pairs = [(recorders[0].hidden[i], recorders[1].hidden[i]) for i in range(2)]
        loss = sum(hidden_loss(*pair) for pair in pairs)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert not any(parameter.grad is not None for parameter in towers[1].parameters())


SHORT = (
    "max_steps=2",
    "batch_size=2",
    "per_device_train_batch_size=1",
    "save_steps=1",
    "logging_steps=1",
    "bf16=false",
)
WORDS = 'data={"words": {"synthetic": "word", "length": 4, "tile_ranges": [[1, 1, 1, 1]]}}'


def arguments(out, *options: str) -> list[str]:
    return [".", str(out), *options, *(word for change in (*SHORT, WORDS) for word in ("--set", change))]


def test_the_command_and_its_resumption_give_the_same_tower(tmp_path, monkeypatch):
    monkeypatch.chdir(distill_vision.RECIPE.parents[3])
    sharing = ("--share-layers", "3", "--share-transform", "heads")
    assert distill_vision.main(arguments(tmp_path / "once", *sharing)) == 0
    model = AutoModel.from_pretrained(tmp_path / "once" / "model", trust_remote_code=True)
    assert model.config.vision_share_layers == 3
    recorded = json.loads((tmp_path / "once" / "run.json").read_text())
    assert recorded["recipe"]["teacher"] == "."
    stopped = tmp_path / "stopped"
    interrupt_after_the_first_step(monkeypatch)
    assert distill_vision.main(arguments(stopped, *sharing)) == 130
    monkeypatch.undo()
    monkeypatch.chdir(distill_vision.RECIPE.parents[3])
    assert distill_vision.main(arguments(stopped, *sharing, "--resume")) == 0
    again = AutoModel.from_pretrained(stopped / "model", trust_remote_code=True)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    teacher = AutoModel.from_pretrained(".", trust_remote_code=True)
    assert torch.equal(teacher.lm_head.weight.bfloat16(), model.lm_head.weight.bfloat16())


def interrupt_after_the_first_step(monkeypatch) -> None:
    from minimonkey.scripts.training.trainer import FineTuner

    step = FineTuner.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(FineTuner, "training_step", stopping)


def test_fewer_layers_by_the_cosine(tmp_path, monkeypatch):
    monkeypatch.chdir(distill_vision.RECIPE.parents[3])
    options = ("--layers", "2", "--set", "distillation=cosine", "--set", "distilled_layers=1")
    assert distill_vision.main(arguments(tmp_path / "out", *options)) == 0
    model = AutoModel.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True)
    assert model.config.vision_config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Nothing would be smaller"),
        (("--layers", "9"), "--layers 9: the vision tower has 3"),
        (("--share-layers", "2", "--set", "train=[projector]"), "vision tower alone"),
        (("--share-layers", "2", "--set", "compile_layers=true"), "leave out compile_layers"),
        (("--layers", "1", "--set", "distilled_layers=2"), "more than the 1 layers"),
    ],
)
def test_what_cannot_be_is_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(distill_vision.RECIPE.parents[3])
    try:
        status = distill_vision.main(arguments(tmp_path / "out", *options))
    except SystemExit as error:
        status = error.code
    assert status == 1
    assert message in capsys.readouterr().err


def test_a_shared_tower_is_not_shared_again():
    with pytest.raises(ValueError, match="shares its layers' weights already"):
        make_student(make_student(tiny_model(), None, 2, "none"), None, 2, "heads")


def test_the_teacher_is_neither_trained_nor_saved():
    recorder = TowerRecorder(tiny_model().model.vision_tower)
    assert not isinstance(recorder, nn.Module)
