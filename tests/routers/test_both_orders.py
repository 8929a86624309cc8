"""What an answer is worth that was judged in both orders, and nothing where one of them is missing; wherever that is asked."""

import asyncio

import pytest

from anabranch.errors import DataError, InputError
from anabranch.routers.both_orders import LOSS, TIE, WIN, of_both_orders
from anabranch.routers.coe.quality import Judgement, table_of_judgements
from anabranch.routers.data import load_judgements
from anabranch.routers.judges import ModelJudge

# Of the answer, where it was shown first and second, and what that comes to.
CASES = [(WIN, WIN, 1.0), (WIN, LOSS, 0.5), (LOSS, WIN, 0.5), (TIE, WIN, 0.75), (LOSS, TIE, 0.25), (LOSS, LOSS, 0.0)]
HALF = [(WIN, None, None), (None, LOSS, None), (None, None, None)]


@pytest.mark.parametrize(("first", "second", "worth"), CASES + HALF)
def test_both_orders_or_nothing(first, second, worth):
    assert of_both_orders(first, second) == worth


@pytest.mark.parametrize(("first", "second", "worth"), CASES + HALF)
def test_files_of_verdicts(tmp_path, first, second, worth):
    (tmp_path / "question.jsonl").write_text('{"question_id": 1, "category": "c", "turns": ["?"]}\n')
    words = {WIN: '"model_1"', LOSS: '"model_2"', TIE: '"tie"', None: '"error"'}
    games = f'"g1_winner": {words[first]}, "g2_winner": {words[second]}'
    (tmp_path / "pairs.jsonl").write_text(f'{{"question_id": 1, "model_1": "a", "model_2": "b", {games}}}\n')
    if worth is None:
        with pytest.raises(DataError, match="no judgement that counts"):
            load_judgements(tmp_path)
        return
    data = load_judgements(tmp_path)
    assert dict(zip(data.models, data.score_NM[0].tolist(), strict=True)) == {"a": worth, "b": 1 - worth}


@pytest.mark.parametrize(("first", "second", "worth"), CASES + HALF)
def test_tables_of_experts(first, second, worth):
    words = {WIN: "yes", LOSS: "no", TIE: "tie"}
    said = [
        Judgement(question="1", category="c", expert="a", won=words[one], expert_first=is_first)
        for one, is_first in ((first, True), (second, False))
        if one is not None
    ]
    if worth is not None:
        assert table_of_judgements(said).quality_CE.item() == worth
        return
    with pytest.raises(InputError, match="no pair was judged in both orders"):
        table_of_judgements(said)
    if said:
        assert table_of_judgements(said, one_order=True).quality_CE.item() in (first, second)


@pytest.mark.parametrize(("first", "second", "worth"), CASES + HALF)
def test_a_judge(first, second, worth):
    # Of the one that is shown first; the answer is that one in the first order alone.
    words = {WIN: "A", LOSS: "B", TIE: "tie", None: "?"}
    back = {"A": "B", "B": "A"}
    answers = [words[first], back.get(words[second], words[second])]

    async def ask(model, prompt):
        return f"verdict: {answers.pop(0)}"

    found = asyncio.run(ModelJudge("judge", "b").scores("?", {"a": "x", "b": "y"}, ask))
    assert found == (None if worth is None else {"a": worth, "b": 0.5})
