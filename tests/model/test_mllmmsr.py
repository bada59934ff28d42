"""MLLM-MSR: what is said, what is asked, what is learnt and how it is scored."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_mm.backbone.batch import collate
from recbole_mm.backbone.generate import Quoted, Request, Shown, write_prompt
from recbole_mm.backbone.prompt import Prompt
from recbole_mm.backbone.wording import Budgets, Wording
from recbole_mm.backbone.yesno import find_answers
from recbole_mm.config import MMConfig
from recbole_mm.data.made_texts import write_texts
from recbole_mm.data.sequences import group_by_user
from recbole_mm.errors import UserError
from recbole_mm.model.layers.sft_stage import Negatives, histories_of, newest_targets
from recbole_mm.model.layers.summaries import Summaries, SummarySettings
from tests.model.msr_world import MsrWorld, msr_world


@pytest.fixture(scope="module")
def msr(mini: Path) -> MsrWorld:
    """Untrained; tests leave its weights alone."""
    return msr_world(mini)


# --- what is said of items and users --------------------------------------------------------------


class Recorder:
    """Answers with what it was asked for, shortened, and remembers the rounds."""

    def __init__(self, name: str) -> None:
        self.name, self.rounds = name, list[list[Request]]()

    def texts(self, requests: list[Request], name: str, show_progress: bool) -> list[str]:
        self.rounds.append(list(requests))
        return [f"{self.name}{len(self.rounds)}.{n}" for n, _ in enumerate(requests)]


def summaries(item_text: str, pref_mode: str = "recurrent", block_size: int = 3) -> Any:
    settings = SummarySettings(item_text, pref_mode, block_size, Wording(), Budgets(9, 9, 9))
    titles = ["", "one", "two", "three", "four", "five", "six", "seven", ""]
    return Summaries(settings, titles, {1, 3}, Recorder("seen"), Recorder("said"))  # type: ignore[arg-type]


def quoted(request: Request) -> list[str]:
    return [part.text for part in request if isinstance(part, Quoted)]


@pytest.mark.parametrize(
    ("item_text", "expected"),
    [
        ("title", ["one", "two", "three", "?"]),
        ("image", ["seen1.0", "two", "seen1.1", "?"]),
        ("title_image", ["seen1.0", "two", "seen1.1", "?"]),
        ("text", ["said1.0", "said1.1", "said1.2", "?"]),
        ("fusion", ["said2.0", "said1.1", "said2.1", "?"]),
    ],
)
def test_descriptions(item_text: str, expected: list[str]) -> None:
    made = summaries(item_text)
    made.describe([1, 2, 3, 8])
    assert [made.descriptions[item] for item in (1, 2, 3, 8)] == expected
    for request in (r for turn in made.seer.rounds for r in turn):
        assert any(isinstance(part, Shown) for part in request)
    if item_text == "fusion":
        assert [quoted(r) for r in made.speaker.rounds[1]] == [
            ["said1.0", "seen1.0"],
            ["said1.2", "seen1.1"],
        ]
    before = [sum(map(len, who.rounds)) for who in (made.seer, made.speaker)]
    made.describe([1, 2, 3, 8])
    after = [sum(map(len, who.rounds)) for who in (made.seer, made.speaker)]
    assert before == after, "each is made once"


def test_a_history_says_title_and_what_the_picture_shows() -> None:
    """Each with a budget of its own, the title once where there is no picture."""
    made = summaries("title_image")
    made.prefer([(1, 2, 3)])
    (request,) = made.speaker.rounds[-1]
    assert quoted(request) == ["one", "seen1.0", "two", "three", "seen1.1"]
    assert {part.max_tokens for part in request if isinstance(part, Quoted)} == {9}


def test_a_picture_is_heard_of_behind_a_title_beyond_its_budget(mini: Path) -> None:
    """In the tiny form, too, where budgets are a few tokens."""
    asked = []
    for item_text in ("title_image", "title"):
        world = msr_world(mini, item_text=item_text, max_summary_tokens=2, brief=True)
        summaries = world.model.summaries
        summaries.titles = [f"{title} " * 9 for title in summaries.titles]
        summaries.describe([1, 2, 3])
        speaker = summaries.speaker
        backbone = speaker.source.get()
        images = speaker._images(backbone)
        prompt = write_prompt(backbone, images, summaries.request((1, 2, 3), None))
        asked.append(prompt.ids.tolist())
    with_pictures, titles = asked
    assert len(with_pictures) > len(titles)


def test_preferences_go_block_by_block() -> None:
    """Round k of all users together, each block with what was said of those before it."""
    made = summaries("title")
    made.prefer([(1, 2, 3, 4, 5, 6, 7), (2, 3), (1, 2, 3, 4)])
    rounds = [turn for turn in made.speaker.rounds if turn]
    assert [list(map(quoted, turn)) for turn in rounds] == [
        [["one", "two", "three"], ["two", "three"], ["one", "two", "three"]],
        [["four", "five", "six", "said1.0"], ["four", "said1.2"]],
        [["seven", "said2.0"]],
    ]
    assert made.preferences == {
        (1, 2, 3, 4, 5, 6, 7): "said3.0",
        (2, 3): "said1.1",
        (1, 2, 3, 4): "said2.1",
    }


@pytest.mark.parametrize(("mode", "size", "calls"), [("direct", 3, 1), ("recurrent", 1, 4)])
def test_other_ways_to_prefer(mode: str, size: int, calls: int) -> None:
    made = summaries("title", mode, size)
    made.prefer([(1, 2, 3, 4)])
    assert len([turn for turn in made.speaker.rounds if turn]) == calls
    assert quoted(made.speaker.rounds[-1][0])[: 4 // calls] == (
        ["one", "two", "three", "four"] if calls == 1 else ["four"]
    )


def test_without_preferences_nothing_is_made() -> None:
    made = summaries("title_image", "none")
    made.prefer([(1, 2)])
    assert quoted(made.user_part((1, 8))) == ["one", "?"]
    assert not made.speaker.rounds
    assert not made.seer.rounds


def test_the_target_is_never_in_what_is_summed_up(mini: Path, tmp_path: Path) -> None:
    """Titles are unique; every request about a user who is asked about lacks its target's."""
    world = msr_world(mini, item_text="title", history_len=10)
    model = world.model
    titles = [f"item number {item}" for item in range(model.n_items)]
    asked: list[Request] = []

    class Listening(Recorder):
        def texts(self, requests: list[Request], name: str, show_progress: bool) -> list[str]:
            asked.extend(requests)
            return ["liked"] * len(requests)

    settings = replace(model.summaries.settings, block_size=3)
    model.summaries = Summaries(settings, titles, (), Listening("a"), Listening("b"))  # type: ignore[arg-type]
    _, stage, sft = world.stages()
    wanted = {
        (model.sample_history(sft.samples, row), int(sft.samples.labels(np.array([row]))[0]))
        for row in range(len(sft.samples))
    }
    for phase in ("valid", "test"):
        rows = world.rows(phase)
        wanted |= {*zip(histories_of(rows, model), rows[model.ITEM_ID].tolist(), strict=True)}
    for history, target in wanted:
        asked.clear()
        model.summaries.preferences.clear()
        model.summaries.prefer([history])
        said = [text for request in asked for text in quoted(request)]
        assert f"item number {target}" not in said
        assert Counter(text for text in said if text != "liked") == Counter(
            titles[item] for item in history
        )
    stage.prepare(world.context(tmp_path))
    assert {history for history, _ in wanted} == {*model.summaries.preferences}


def test_what_the_stages_leave_is_read_back(mini: Path, tmp_path: Path) -> None:
    first = msr_world(mini)
    items, users, _ = first.stages()
    for stage in (items, users):
        stage.prepare(first.context(tmp_path))
        stage.finish(first.context(tmp_path))
    path = tmp_path / "item_summary" / "texts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["items"][0] for line in lines} == {*first.model.item_tokens[1:]}
    lines[0]["text"] = "made elsewhere"
    other = tmp_path / "given.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    second = msr_world(mini, item_summary_file=str(other))
    stage = second.stages()[0]
    stage.prepare(second.context(tmp_path / "elsewhere"))
    found = second.model.summaries.descriptions
    item = second.model.item_tokens.index(lines[0]["items"][0])
    assert found.pop(item) == "made elsewhere"
    made = {i: t for i, t in first.model.summaries.descriptions.items() if i != item}
    assert found == made
    third = msr_world(mini, cache_dir=str(tmp_path / "lost"))  # a run has its texts without it
    for stage in third.stages()[:2]:
        stage.prepare(third.context(tmp_path))
    assert not (tmp_path / "lost").exists()
    assert third.model.summaries.descriptions == first.model.summaries.descriptions


# --- questions ------------------------------------------------------------------------------------


def text_of(world: MsrWorld, prompt: Prompt) -> str:
    return str(world.model.scorer.backbone.tokenizer.decode(prompt.ids))


def test_one_template(msr: MsrWorld) -> None:
    model = msr.model
    model.summaries.preferences[(1, 2)] = "kites"
    said = text_of(msr, model.prompt((1, 2), 3))
    title = model.summaries.titles[3]
    assert said.startswith("<s>[INST] A user prefers: kites\nA product:")
    assert " ".join(title.split()[:1]) in said
    assert said.endswith("Will the user buy this product next? Answer Yes or No. [/INST]")
    assert said.count("<image>") == 5


def test_a_brief_question_has_texts_and_picture_alone(mini: Path) -> None:
    model = msr_world(mini, brief=True, pref_mode="none").model
    prompt = model.prompt((1, 2), 3)
    said = str(model.scorer.backbone.tokenizer.decode(prompt.ids))
    assert said.startswith("<s>[INST] ")
    assert said.endswith("<image>? [/INST]")
    assert "user" not in said
    assert [slot.item for slot in prompt.slots] == [3]


@pytest.mark.parametrize("order", ["pref_first", "item_first"])
def test_shared_beginnings_change_no_score(mini: Path, order: str) -> None:
    """Each question alone, all from one beginning, and all of one batch: within 1e-5."""
    world = msr_world(mini, order=order)
    model, rows = world.model, world.rows()[:6]
    items = torch.from_numpy(
        np.random.default_rng(0).choice(np.arange(1, model.n_items), (6, 9), replace=True)
    )
    items[:, 0] = 5  # one item of several users
    scorer = model.scorer
    scorer.worth_sharing = 0.0
    shared = model.candidate_scores(rows, items)
    expected = torch.empty(items.shape)
    for row, history in enumerate(histories_of(rows, model)):
        for column, item in enumerate(items[row].tolist()):
            batch = collate([model.prompt(history, item)], scorer.backbone.pad_id)
            with torch.no_grad():
                hidden = scorer.backbone.hidden(batch, scorer.images)[0, 0]
            logits = scorer.backbone.head(hidden)
            p = logits[[scorer.answers.yes, scorer.answers.no]].softmax(0)[0]
            expected[row, column] = p.logit()
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3
    for change in ({"worth_sharing": 1e9}, {"worth_sharing": 0.0, "max_tokens": 1}):
        model.forget()
        vars(scorer).update(change)
        torch.testing.assert_close(model.candidate_scores(rows, items), expected, atol=1e-5, rtol=0)


def test_scores_of_one_row_are_those_of_many(msr: MsrWorld) -> None:
    model, rows = msr.model, msr.rows()[:5]
    many = model.full_sort_predict(rows)
    assert torch.isinf(many[:, 0]).all()
    for row in range(5):
        model.forget()
        one = model.full_sort_predict(rows[row : row + 1])
        torch.testing.assert_close(one[0], many[row], atol=1e-5, rtol=0)
    target = rows[model.ITEM_ID]
    expected = many.gather(1, target[:, None])[:, 0].sigmoid()
    torch.testing.assert_close(model.predict(rows), expected, atol=1e-6, rtol=0)


# --- learning -------------------------------------------------------------------------------------


def test_the_loss_is_of_the_answer_and_its_end(msr: MsrWorld) -> None:
    """Against the equation written out, with the gradient of every weight."""
    model, scorer = msr.model, msr.model.scorer
    history = histories_of(msr.rows(), model)[0]
    prompts = [model.prompt(history, item) for item in (1, 2, 3)]
    is_yes = np.array([True, False, True])
    for loss_on in ("answer", "all"):
        scorer.loss_on = loss_on
        scorer.zero_grad()
        ours = scorer.loss(prompts, is_yes)
        ours.backward()
        found = {n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None}
        scorer.zero_grad()
        terms = []
        for prompt, yes in zip(prompts, is_yes, strict=True):
            ids = [*prompt.ids.tolist(), scorer.answers.yes if yes else scorer.answers.no]
            ids.append(scorer.answers.end)
            whole = Prompt(np.array(ids), np.arange(len(ids))[None], len(ids), prompt.slots)
            batch = collate([whole], scorer.backbone.pad_id)
            states = scorer.backbone.hidden(batch, scorer.images, len(ids))[0]
            log_p = scorer.backbone.head(states).log_softmax(1)
            pictured = {slot.start + n for slot in prompt.slots for n in range(slot.count)}
            first = len(prompt) if loss_on == "answer" else 1
            terms += [-log_p[t - 1, ids[t]] for t in range(first, len(ids)) if t not in pictured]
        naive = torch.stack(terms).mean()
        naive.backward()
        torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-5)
        for name, parameter in scorer.named_parameters():
            if parameter.grad is not None and name in found:
                torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)
        scorer.zero_grad(set_to_none=True)
    scorer.loss_on = "answer"


def test_it_learns_eight_users(mini: Path, tmp_path: Path) -> None:
    world = msr_world(mini, sft_batch_size=8, pref_mode="none", history_len=2)
    stage = world.stages()[2]
    batch = stage.plan(0)[0]  # the same negatives each time
    optimizer = torch.optim.AdamW(stage.param_groups(), lr=2e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = stage.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    model = world.model
    model.forget()
    rng = np.random.default_rng(batch.seed)
    negatives = stage.negatives.draw(stage.samples.users[batch.samples], rng)
    targets = stage.samples.labels(batch.samples)
    pairs = [
        (model.sample_history(stage.samples, row), int(item))
        for items in (targets, negatives)
        for row, item in zip(batch.samples, items, strict=True)
    ]
    odds = np.array(model._ask(pairs))
    assert odds[:8].min() > odds[8:].max()


def test_samples_are_the_newest() -> None:
    sequences = group_by_user(np.array([1, 1, 1, 1, 2, 3, 3]), np.array([4, 5, 6, 7, 8, 9, 10]))
    samples = newest_targets(sequences, 2)
    found = [
        (int(samples.users[row]), samples.history(row, 9).tolist(), int(samples.labels(row)))  # type: ignore[call-overload]
        for row in range(len(samples))
    ]
    assert found == [(1, [4, 5, 6], 7), (1, [4, 5], 6), (3, [9], 10)]


@pytest.mark.parametrize("source", ["uniform", "popularity"])
def test_negatives_were_never_taken(source: str) -> None:
    users = np.repeat([1, 2], [5, 3])
    sequences = group_by_user(users, np.array([1, 2, 3, 4, 5, 5, 5, 5]))
    drawn = Negatives(sequences, 9, source).draw(np.full(4000, 1), np.random.default_rng(0))
    assert {*drawn.tolist()} == {6, 7, 8}
    other = Negatives(sequences, 9, source).draw(np.full(6000, 2), np.random.default_rng(0))
    share = np.bincount(other, minlength=9) / 6000
    assert share[0] == share[5] == 0
    # counts of items 1 to 4 are 1, of 6 to 8 zero
    weights = np.array([1, 1, 1, 1, 1, 1, 1] if source == "uniform" else [2, 2, 2, 2, 1, 1, 1])
    expected = weights / weights.sum()
    np.testing.assert_allclose(share[[1, 2, 3, 4, 6, 7, 8]], expected, atol=0.02)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"eval_candidates": "full", "metrics": ["NDCG"], "valid_metric": "NDCG@5"},
         "eval_candidates is full, but every item of every user would be a question"),
        ({"stages": ["item_summary"]}, "stages ends with item_summary, which ranks nothing"),
        ({"answers": ["Yes", "Not at all"]},
         r"writes 'Not at all' in 3 tokens: take words of one token"),
        ({"answers": ["Yes"]}, "answers has 1 words: name two"),
        ({"answers": ["Yes", "Yes"]}, "answers: Yes and Yes are one token"),
        ({"backbone": "tiny-llama-2", "text_backbone": "tiny"},
         r"reads text alone and can be shown no pictures: set use_candidate_image: False and item"),
        ({"max_pref_tokens": 40000}, r"A question takes up to \d+ tokens, 13 of them the item's"),
        ({"backbone": "tiny-qwen2-vl", "max_pixels": 40_000_000},
         r"A question takes up to \d+ tokens, 51\d\d\d of them the item's picture, which is never"),
        ({"attributes": ["brnd"], "use_candidate_image": False}, "MLLM-MSR reads brnd, but"),
        ({"wording": {"thing": "film"}}, "wording has no word 'thing'"),
        ({"item_text": "pictures"}, "item_text is 'pictures': use title, image"),
        ({"text_backbone": "llama"}, r"--text_backbone: there is no backbone 'llama'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_made(
    mini: Path, keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        msr_world(mini, **keys)


def test_texts_of_another_dataset_are_refused(mini: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"items": ["B0001"], "text": "A lamp."}\n')
    world = msr_world(mini, item_summary_file=str(path))
    with pytest.raises(
        UserError, match=r"not one of its lines is about items of mini.* set item_s"
    ):
        world.stages()[0].prepare(world.context(tmp_path))
    path.write_text('{"items": ["B0001"], "text": "A lamp."}\n{"item": 3}\n')
    with pytest.raises(UserError, match=r"other.jsonl, line 2: expected"):
        world.stages()[0].prepare(world.context(tmp_path))


@pytest.mark.parametrize("key", ["item_summary_file", "user_summary_file", "item_summary_from"])
def test_texts_of_another_dataset_with_the_same_ids_are_refused(
    mini: Path, tmp_path: Path, key: str
) -> None:
    """Numbers match in any two datasets: what a run leaves says whose texts they are."""
    run = tmp_path / "run"
    path = run / "item_summary" / "texts.jsonl" if key.endswith("from") else tmp_path / "o.jsonl"
    tokens = msr_world(mini).model.item_tokens
    write_texts(path, {(1,): "A lamp.", (2,): "A cup."}, tokens, "others")
    world = msr_world(mini, **{key: str(run if key.endswith("from") else path)})
    stage = world.stages()[key.startswith("user")]
    told = rf"jsonl, line 1: it is of the dataset others, not of mini: set {key} to texts of mini\."
    with pytest.raises(UserError, match=told):
        stage.prepare(world.context(tmp_path / "mine"))
    write_texts(path, {(1,): "A lamp.", (2,): "A cup."}, tokens, "mini")
    given = stage.given(world.context(tmp_path / "mine"))
    path.write_text(path.read_text().replace('"dataset": "mini", ', ""))
    assert '"dataset"' not in path.read_text()
    assert (
        stage.given(world.context(tmp_path / "mine")) == given == {(1,): "A lamp.", (2,): "A cup."}
    )


def test_the_answers_are_found_behind_the_prompt(msr: MsrWorld) -> None:
    backbone = msr.model.scorer.backbone
    answers = find_answers(backbone, ["Yes", "No"])
    words = backbone.tokenizer.convert_ids_to_tokens([answers.yes, answers.no])
    assert words == ["ĠYes", "ĠNo"]  # behind [/INST] stands a space
    assert backbone.tokenizer.convert_ids_to_tokens(answers.end) == "</s>"


def test_text_backbone_follows_the_rules_of_backbone() -> None:
    config = MMConfig("MLLMMSR", "nowhere", (), {})
    assert config["text_backbone_spec"]["family"] == "chat_lm"
    assert config["text_backbone_spec"]["name"] == "llama-3-8b"
    tiny = MMConfig("MLLMMSR", "nowhere", (), {"backbone": "tiny"})
    assert tiny["text_backbone_spec"]["is_tiny"]
    other = MMConfig("MLLMMSR", "nowhere", (), {"backbone": "tiny", "text_backbone": "qwen2-vl-2b"})
    assert other["text_backbone_spec"]["max_pixels"] == 28224
    assert tiny.hash() != other.hash()
    small = MMConfig("MLLMMSR", "nowhere", (), {"quantize": "nf4"})
    assert small["text_backbone_spec"]["quantize"] == small["quantize"] == "nf4"
    assert config["text_backbone_spec"]["quantize"] == "none"
    mixed = MMConfig("MLLMMSR", "nowhere", (), {"quantize": "nf4", "text_backbone": "tiny"})
    assert mixed["text_backbone_spec"]["quantize"] == "none"  # which has no bits to save
    wide = MMConfig("MLLMMSR", "nowhere", (), {"dtype": "float32"})
    assert wide["text_backbone_spec"]["dtype"] == wide["dtype"] == "float32"
    assert config["text_backbone_spec"]["dtype"] == config["dtype"] == "bfloat16"
    assert tiny["text_backbone_spec"]["dtype"] == tiny["dtype"] == "float32"
