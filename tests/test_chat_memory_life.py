"""How `chat` memories live: branches, several conversations and their limit, copies, threads, garbage."""

import copy
import gc
import json
import pickle
import threading
import weakref

import pytest
from chat_helpers import CHAT, QUESTION, SCM, SETTINGS, ask, assert_equal, new_tokens, remembers, watch, work_of


@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_branches_of_one_history(model, small, pictures, settings):
    options = SETTINGS[settings]
    first = ask(model, small, pictures[0], QUESTION, **options)
    before = list(first.history)
    left = work_of(model, small, pictures[0], "And left of it?", first.history, **options)
    right = work_of(model, small, pictures[0], "And right?", first.history, **options)
    assert right.tiles == 0
    assert right.read[0] <= new_tokens(small, "And right?") + 3
    assert first.history == before
    again = work_of(model, small, pictures[0], "Why?", left.answer.history, **options)
    ask(model, small, pictures[:2], "Then <image>?", right.answer.history, **options)
    assert again.tiles == 0


def test_a_question_asked_twice(model, small, pictures):
    """The whole prompt is in the cache; its last token is computed all the same."""
    first = ask(model, small, pictures[0], QUESTION, **SCM)
    second = work_of(model, small, pictures[0], "And?", first.history, **SCM)
    again = work_of(model, small, pictures[0], "And?", first.history, **SCM)
    assert again.read[0] == 1
    assert again.answer.token_ids == second.answer.token_ids


@pytest.fixture
def own_limit(model):
    yield model
    model.__dict__.pop("remembered_conversations", None)


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_conversations_by_turns(own_limit, small, pictures, limit):
    model = own_limit
    model.remembered_conversations = limit
    histories = [ask(model, small, picture, QUESTION).history for picture in pictures[:3]]
    for question in ("And?", "Why?"):
        for number, picture in enumerate(pictures[:3]):
            work = work_of(model, small, picture, question, histories[number])
            histories[number] = work.answer.history
            assert (work.tiles == 0) == (limit == 3)


@pytest.fixture
def few_objects():
    """Everything that exists so far is left out when garbage is collected and counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def caches() -> int:
    gc.collect()
    return sum(type(thing).__name__ == "DynamicCache" for thing in gc.get_objects())


def test_how_many_conversations_are_kept(own_limit, small, pictures, few_objects):
    model, before = own_limit, caches()
    model.remembered_conversations = 2
    histories = [model.chat(small, None, f"Hello {i}", return_history=True, **CHAT)[1] for i in range(4)]
    assert caches() == before + 2
    model.chat(small, None, "And?", history=histories[0], return_history=True, **CHAT)
    assert caches() == before + 2
    model.remembered_conversations = 1
    histories.append(model.chat(small, None, "New", return_history=True, **CHAT)[1])
    assert caches() == before + 1
    model.remembered_conversations = 0
    histories.append(model.chat(small, None, "Newer", return_history=True, **CHAT)[1])
    assert histories[-1].memory is None
    assert caches() == before


def test_forget_and_garbage(model, small, pictures, few_objects):
    before = caches()
    history = model.chat(small, pictures[0], QUESTION, return_history=True, **CHAT, **SCM)[1]
    assert caches() == before + 1
    history.forget()
    assert caches() == before
    work = work_of(model, small, pictures[0], "And?", history, **SCM)
    assert work.tiles > 0
    history = work.answer.history
    assert caches() == before + 1
    features = [weakref.ref(tensor) for tensor in history.memory.features.values()]
    assert all(ref() is not None for ref in features)
    del history, work
    assert caches() == before
    assert all(ref() is None for ref in features)


def test_nothing_is_kept_without_a_history(model, small, pictures, few_objects):
    before = caches()
    model.chat(small, pictures[2], QUESTION, **CHAT)
    model.chat(small, pictures[2], QUESTION, return_dict=True, **CHAT)
    kept = model.chat(small, pictures[2], QUESTION, return_dict=True, remember=False, **CHAT)
    assert kept.history.memory is None
    kept.history.forget()
    assert caches() == before


def test_a_history_does_not_keep_its_model(model, small):
    own = copy.deepcopy(model)
    history, ref = own.chat(small, None, "Hello", return_history=True, **CHAT)[1], weakref.ref(own)
    del own
    gc.collect()
    assert ref() is None
    history.forget()
    assert model.chat(small, None, "And?", history=history, **CHAT)


def test_copies_are_plain_lists(model, small, pictures):
    history = model.chat(small, pictures[2], QUESTION, return_history=True, **CHAT)[1]
    assert remembers(history)
    plain = [tuple(turn) for turn in history]
    others = [copy.copy(history), copy.deepcopy(history), pickle.loads(pickle.dumps(history)), history[:], [*history]]
    others += [list(history), history + [], history.copy()]
    for other in others:
        assert type(other) is list
        assert other == plain
    assert json.loads(json.dumps(history)) == [list(turn) for turn in plain]
    answer = model.chat(small, pictures[2], QUESTION, return_dict=True, **CHAT)
    restored = pickle.loads(pickle.dumps(answer))
    assert type(restored.history) is list
    assert (restored.text, restored.confidence) == (answer.text, answer.confidence)
    work = work_of(model, small, pictures[2], "And?", copy.copy(history))
    assert work.tiles == 1


def test_a_model_with_memories_can_be_copied(model, small, pictures):
    own = copy.deepcopy(model)
    own.chat(small, pictures[2], QUESTION, remember=False, **CHAT)
    before = set(vars(own))
    history = own.chat(small, pictures[2], QUESTION, return_history=True, **CHAT)[1]
    assert set(vars(own)) == before
    other = copy.deepcopy(own)
    with watch(other) as work:
        answer = other.chat(small, pictures[2], "And?", history=history, **CHAT)
    assert work.tiles == 1
    assert answer == own.chat(small, pictures[2], "And?", history=history, **CHAT)


def test_turns_of_one_history_at_the_same_time(model, small, pictures):
    first = ask(model, small, pictures[0], QUESTION, **SCM)
    questions, answers = ["And left?", "Why?", "And right of it?", "So?"], {}

    def turn(question):
        options = {**CHAT, **SCM, "return_dict": True}
        answers[question] = model.chat(small, pictures[0], question, history=first.history, **options)

    threads = [threading.Thread(target=turn, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for question in questions:
        options = {**CHAT, **SCM, "return_dict": True, "remember": False}
        expected = model.chat(small, pictures[0], question, history=list(first.history), **options)
        assert_equal(answers[question], expected)
        ask(model, small, pictures[0], "Then?", answers[question].history, **SCM)


def test_a_forgotten_conversation_takes_no_place(model, processor):
    model.remembered_conversations = 2
    try:
        histories = [model.chat(processor, None, text, return_history=True, max_new_tokens=2)[1] for text in "ab"]
        histories[1].forget()
        histories.append(model.chat(processor, None, "c", return_history=True, max_new_tokens=2)[1])
        assert [bool(history.memory.nbytes()) for history in histories] == [True, False, True]
    finally:
        del model.remembered_conversations
