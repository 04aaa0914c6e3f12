"""What counts as a vote in what a teacher said, and the prompt that it was asked with."""

from pathlib import Path

import pytest

from lorapar.errors import InputError
from lorapar.labeling.parsing import read_answer
from lorapar.labeling.prompt import make_prompt, question_and_answer


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ('{"reason": "one step", "system": "System1"}', 1),
        ('{"system": "System2", "reason": "unlike System1 it has steps"}', 2),
        ('Sure!\n```json\n{"label": "system 2"}\n```\nHope it helps.', 2),
        ('{"SYSTEM": "s1"}', 1),
        ('{"classification": 2}', 2),
        ('{"reason": "a {brace} and a \\"quote\\"", "system": "System1"}', 1),
        ('{"reason": "line\nbreak", "system": "System1"}', 1),
        ('{"reason": "first thought", "system": "System2"} {"reason": "again", "system": "System2"}', 2),
        ('{"thought": {"depth": 3}} {"system": "System1"}', 1),
        ('{"system": "System2", "reason": "needs sev', 2),
        ('```json\n{"reason": "x", "system": "System1"', 1),
        ("System2", 2),
        ("**System 1**", 1),
        ("2", 2),
        ("System1.", 1),
        ("This one is System 2 because of the two sums.", 2),
        ("SYSTEM_1 - one step", 1),
        ("<think>System 1? No, it has steps.</think>System 2", 2),
    ],
)
def test_a_vote(text, vote):
    reading = read_answer(text)
    assert (reading.vote, reading.outcome) == (vote, "answered")


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("It could be System 1 or System 2.", "both"),
        ('{"system": "System1"} or {"system": "System2"}', "both"),
        ('{"system": "System1", "x": 1}\n{"system": "System2"', "both"),
        ('{"system": "System1 or System2"}', "both"),
        ('{"system": "System1 or Sys', "unparseable"),
        ('{"reason": "System1 is too', "unparseable"),
        ('{"reason": "System1 or System2, let me th', "unparseable"),
        ('{"system": "System3"}', "unparseable"),
        ('{"system": null}', "unparseable"),
        ('{"thought": "System1"}', "unparseable"),
        ("This is not System 1.", "unparseable"),
        ("It isn't a System 1 question", "unparseable"),
        ("Rather than System 2, I would think twice.", "unparseable"),
        ("", "unparseable"),
        ("   \n", "unparseable"),
        ("A fine question about 12 apples and 1 pear.", "unparseable"),
        ("Dies ist eine Aufgabe in mehreren Schritten.", "unparseable"),
        ("这是一个需要多步推理的问题。", "unparseable"),
        ("I'm sorry, but I can't help with that.", "refused"),
        ("I’m unable to label this as System 2.", "refused"),
        ("As an AI, I cannot assist.", "refused"),
        # Asked again rather than guessed.
        ("I cannot see how it could be other. System 2", "refused"),
        ("<think>System 1, and then", "unparseable"),
        ("{" * 5000, "unparseable"),
    ],
)
def test_no_vote(text, outcome):
    reading = read_answer(text)
    assert (reading.vote, reading.outcome) == (None, outcome)


def test_a_refusal_marked_by_the_endpoint_is_one_whatever_the_text():
    reading = read_answer('{"system": "System1"}', refusal="policy")
    assert (reading.vote, reading.outcome, reading.reason) == (None, "refused", "policy")


def test_the_reason_is_kept_and_bounded():
    assert read_answer('{"reason": "two sums", "system": "System2"}').reason == "two sums"
    assert len(read_answer("System 2 " + "because " * 5000).reason) == 2000


# The prompt


def test_role_play_names_the_target_and_its_habits():
    text = make_prompt(None, True, "Llama-2-7B", "concise, stepwise").fill("How many {apples}?", "3 {of} them")
    assert "act as another language model: Llama-2-7B. Its habits: concise, stepwise." in text
    assert "How many {apples}?" in text
    assert "3 {of} them" in text
    assert '{"reason": "one short sentence", "system": "System1" or "System2"}' in text
    plain = make_prompt(None, False, "Llama-2-7B", None).fill("How many?", "3")
    assert "Llama" not in plain
    assert "System2" in plain
    assert "{" not in make_prompt(None, True, "x", None).fill("", "").split("Reply with")[0]


def test_what_a_vote_depends_on_is_in_the_digest_and_nothing_else(tmp_path: Path):
    mine = tmp_path / "mine.txt"
    mine.write_text("{target} {question} {answer}")
    digests = {
        make_prompt(None, True, "a", None).digest,
        make_prompt(None, True, "b", None).digest,
        make_prompt(None, True, "a", "terse").digest,
        make_prompt(None, False, "a", None).digest,
        make_prompt(str(mine), True, "a", None).digest,
    }
    assert len(digests) == 5
    assert make_prompt(None, False, "a", None).digest == make_prompt(None, False, "b", None).digest


@pytest.mark.parametrize(
    ("text", "role_play", "says"),
    [
        ("{question} {target}", True, "lacks the field {answer}; it needs {question}, {answer}, {target}"),
        ("{question} {answer}", True, "lacks the field {target}"),
        ("{answer}", False, "lacks the field {question}; it needs {question}, {answer}"),
        ("{question} {answer} {target}", False, "has the field {target}; allowed: {question}, {answer}"),
        ("{question} {answer} {target} {qestion}", True, "has the field {qestion}"),
        ("{question} {answer} {", False, "is no template for str.format"),
    ],
)
def test_a_template_that_cannot_serve(tmp_path: Path, text, role_play, says):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(InputError, match="label.template") as raised:
        make_prompt(str(tmp_path / "t.txt"), role_play, "x", None)
    assert says in str(raised.value)


def test_habits_need_a_place_and_a_template_must_be_there(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        make_prompt(str(tmp_path / "gone.txt"), True, "x", None)
    with pytest.raises(InputError, match="label.habits: given, but .* has no field {habits}"):
        make_prompt(None, False, "x", "terse")


def test_chats_are_text_to_a_teacher():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    row = {"prompt": turns, "completion": [{"role": "assistant", "content": "4"}]}
    assert question_and_answer(row) == ("system: Be brief.\n\nuser: 2 + 2?", "4")
    assert question_and_answer({"prompt": "2 + 2?", "completion": "4"}) == ("2 + 2?", "4")
