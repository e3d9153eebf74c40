"""lumen/harness.py: lm-eval over our scorer says what it says of the exported folder through
transformers, request by request, and without a network."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from test_export import config, save_run

from lumen import chat, tokenizer
from lumen.errors import UserError

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402

import export  # noqa: E402
from lumen import harness, models  # noqa: E402
from lumen.lm_eval_model import MARK, LumenLM, asked_of  # noqa: E402
from lumen.questions import Options  # noqa: E402
from lumen.texts import TextTask  # noqa: E402

CLOSE = 1e-4  # nats; the issue asks for 1e-3
WORDS = "the quick brown fox jumps over a lazy dog and runs home to eat some good bread".split()
TEXTS = [" ".join(WORDS[i % 7 :: 1 + i % 3]) for i in range(12)]


@pytest.fixture(scope="module")
def own():
    return tokenizer.train_bpe(TEXTS * 4, 330)


@pytest.fixture(scope="module")
def path(own, tmp_path_factory):
    """A run of a random model, and its exported folder."""
    path = tmp_path_factory.mktemp("made")
    save_run(path / "run", config(vocab_size=own.n_vocab), tokenizer=own)
    export.to_hf(path / "run", path / "hf", say=str)
    return path


@pytest.fixture(scope="module")
def pair(path):
    """(our LM, lm-eval's hf model)."""
    from lm_eval.models.huggingface import HFLM

    opened = models.open_model(path / "run", device="cpu", precision="fp32", say=str)
    theirs = HFLM(str(path / "hf"), device="cpu", dtype="float32", batch_size=3)
    return harness.language_model(asked_of(opened), opened), theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks over a local file, one of each kind."""
    path = tmp_path_factory.mktemp("tasks")
    rows = []
    for i, text in enumerate(TEXTS):
        choices = [f" {word}" for word in WORDS[i : i + 2 + i % 3]]
        rows.append({"text": f"{text} ", "choices": choices, "answer": i % len(choices)})
    (path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"test": str(path / "rows.jsonl")}
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": data}, "test_split": "test"}
    common["target_delimiter"] = ""
    tasks = {
        "own_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "num_fewshot": 2,
            "fewshot_split": "test",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "own_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text * 8}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
        "own_replies": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": [" t", "o"], "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, keys in tasks.items():
        (path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | keys))
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def asked_for(pairs, kind="loglikelihood") -> list:
    """lm-eval's requests, each of a document of its own."""
    return [Instance(kind, {}, args, 0, ("task", i, 1)) for i, args in enumerate(pairs)]


def same(ours, theirs) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (mine, _), (other, _) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=CLOSE)


def test_three_kinds_of_local_tasks_say_what_the_exported_folder_says(pair, folder):
    ours, theirs = pair
    tasks = ["own_choice", "own_rolling", "own_replies"]
    found = harness.run(ours.asked, tasks, folder)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    wanted = simple_evaluate(theirs, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    for name in tasks:
        pairs = zip(found["samples"][name], wanted["samples"][name], strict=True)
        for mine, other in pairs:
            assert mine["arguments"] == other["arguments"]
            if name == "own_choice":
                same([r[0] for r in mine["resps"]], [r[0] for r in other["resps"]])
            elif name == "own_rolling":
                assert mine["resps"][0][0] == pytest.approx(other["resps"][0][0], abs=CLOSE)
            else:
                assert mine["resps"] == other["resps"]
        for key, value in wanted["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][key] == pytest.approx(value, rel=1e-4), key
    replies = [sample["resps"][0][0] for sample in found["samples"]["own_replies"]]
    assert any(replies) and len(set(replies)) > 1
    rows = {(row.task, row.metric): row for row in harness.rows(found)}
    row = rows["lm-eval/own_choice", "acc"]
    assert row.headline and not rows["lm-eval/own_choice", "acc_norm"].headline
    assert row.value == wanted["results"]["own_choice"]["acc,none"]
    assert row.n == len(TEXTS) and row.low <= row.value <= row.high and row.control is None
    assert row.chance == pytest.approx((4 * 1 / 2 + 4 * 1 / 3 + 4 * 1 / 4) / 12)
    answers = [i % (2 + i % 3) for i in range(12)]
    assert row.majority == max(map(answers.count, answers)) / 12
    row = rows["lm-eval/own_rolling", "bits_per_byte"]
    assert row.better == "lower" and row.chance is None
    assert row.low is None and not row.verdict  # lm-eval has no error of it, and n is not 1


EDGES = {
    "a border inside a word": ("the quick brow", "n fox jumps over"),
    "blanks at the end": ("the quick  ", " brown fox"),
    "no context": ("", "the quick brown"),
    "one token": ("the", " "),
    "cut from the left": (" ".join(WORDS * 20), " brown fox"),
    "just not cut": ("x" * 58, "y" * 7),
    "just cut": ("x" * 59, "y" * 7),
    "fills the context": ("the", "z" * 64),
}


@pytest.mark.parametrize("edge", EDGES)
def test_borders_and_what_is_too_long(edge, pair):
    ours, theirs = pair
    requests = asked_for([EDGES[edge]])
    same(ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True))


def test_a_text_of_several_windows(pair):
    ours, theirs = pair
    texts = [(" ".join(WORDS * 9),), ("x" * 64,), ("x" * 65,), ("a",)]
    requests = asked_for(texts, "loglikelihood_rolling")
    mine = ours.loglikelihood_rolling(requests)
    assert mine == pytest.approx(theirs.loglikelihood_rolling(requests, True), abs=CLOSE)
    assert ours.loglikelihood_rolling(asked_for([("",)], "loglikelihood_rolling")) == [0.0]
    # and those of the built-in texts
    documents = [text for (text,) in texts]
    lines = TextTask("texts", Options(control=False), documents=documents)
    assert mine == pytest.approx([-lines.line(i, ours.asked)["nats"] for i in range(4)], abs=CLOSE)


def test_blanks_alone_begin_as_no_context_does(pair):
    """lm-eval's hf model has no answer here."""
    ours, _ = pair
    assert ours.loglikelihood(asked_for([("  ", "a")])) == ours.loglikelihood(
        asked_for([("", "  a")])
    )


def test_a_request_depends_on_its_own_question_alone(pair):
    ours, _ = pair
    questions = [(f"{text} so", f" {word}") for text in TEXTS[:3] for word in WORDS[:3]]
    requests = [Instance("l", {}, args, 0, ("t", i // 3, 1)) for i, args in enumerate(questions)]
    alone = [answer for i in (6, 3, 0) for answer in ours.loglikelihood(requests[i : i + 3])]
    together = ours.loglikelihood(requests)
    assert alone == together[6:] + together[3:6] + together[:3]  # to the bit
    # documents that begin alike are not one question
    twins = asked_for([("the", " fox"), ("the", " dog and a lot"), ("the", " bread")])
    assert ours.loglikelihood(twins) == [ours.loglikelihood([one])[0] for one in twins]


def test_what_cannot_be_asked(pair, folder, tmp_path, monkeypatch):
    ours, _ = pair
    for requests in (asked_for([("a", "z" * 70)]), asked_for([("a", "")])):
        with pytest.raises(UserError, match="E127.*continuation of"):
            ours.loglikelihood(requests)
    for given, word in (({"max_gen_toks": 64}, "max_gen_toks"), ({"num_beams": 3}, "num_beams")):
        with pytest.raises(UserError, match=f"E127.*task.*{word}"):
            ours.generate_until(asked_for([("a", given)], "generate_until"))
    with pytest.raises(UserError, match="E127.*no such folder"):
        harness.run(ours.asked, ["own_choice"], tmp_path / "none")
    far = {"task": "far", "dataset_path": "nobody/nothing", "output_type": "multiple_choice"}
    far |= {"doc_to_text": "", "doc_to_choice": "", "doc_to_target": "", "test_split": "test"}
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(far))
    with pytest.raises(UserError, match="(?s)E127.*far: its data.*local files"):
        harness.run(ours.asked, ["far"], tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"q": "a"}\n{"q": "b"}\n')
    lacks = far | {"task": "lacks", "dataset_path": "json", "doc_to_text": "{{nosuch}}"}
    lacks["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    lacks |= {"doc_to_choice": ["a", "b"], "doc_to_target": 0}
    (tmp_path / "lacks.yaml").write_text(yaml.safe_dump(lacks))
    with pytest.raises(UserError, match="E127.*lacks: it cannot be asked.*nosuch"):
        harness.run(ours.asked, ["lacks"], tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="E003.*pip install 'lm-eval"):
        harness.language_model(ours.asked)


def test_replies_are_greedy_or_drawn_by_their_seed(pair):
    ours, theirs = pair
    texts = [*TEXTS, " ".join(WORDS * 20)]  # the last is cut from the left
    greedy = asked_for([(text, {"max_gen_toks": 9}) for text in texts], "generate_until")
    assert ours.generate_until(greedy) == theirs.generate_until(greedy, disable_tqdm=True)
    how = {"max_gen_toks": 9, "temperature": 1.5, "do_sample": True, "seed": 3, "num_beams": 1}
    one = asked_for([("the quick", how)], "generate_until")
    drawn = ours.generate_until(one * 4)
    assert len(set(drawn)) > 1 and drawn == ours.generate_until(one * 4)
    assert drawn[0] == ours.generate_until(one)[0]  # whatever is asked beside it
    other = asked_for([("the quick", how | {"seed": 4})], "generate_until")
    assert ours.generate_until(other)[0] == drawn[1]
    likeliest = asked_for([("the quick", how | {"top_k": 1})], "generate_until")
    best = asked_for([("the quick", {"max_gen_toks": 9})], "generate_until")
    assert ours.generate_until(likeliest) == ours.generate_until(best)


TALK = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": "the <|im_end|> fox?"},
    {"role": "assistant", "content": "a dog"},
    {"role": "user", "content": f"and{MARK}<|im_end|> now?"},
]


@pytest.mark.parametrize("name", ["chatml", "chat"])
def test_a_conversation_through_lm_evals_strings_has_the_renderers_ids(name, pair):
    ours, _ = pair
    asked = ours.asked
    talking = LumenLM(type(asked)(asked.model, asked.tokenizer, name, 0, asked.scorer))
    text = talking.apply_chat_template(TALK)
    messages = [chat.Message(m["role"], m["content"].replace(MARK, "\ufffd")) for m in TALK]
    ids, _ = chat.render(messages, name, asked.tokenizer, open_reply=True)
    assert talking.tok_encode(text) == ids.tolist()
    begun = talking.apply_chat_template(TALK[:3], add_generation_prompt=False)
    assert text.startswith(begun) and begun.endswith("a dog")
    assert "im_start" in talking.chat_template(True) or name == "chat"
    # what stands behind a conversation is text
    end = asked.tokenizer.control("<|im_end|>")
    assert end not in talking._encode_pair(text, f" {MARK}<|im_end|>")[1]
    assert end not in talking.tok_encode(f"{MARK}<|im_end|>", add_special_tokens=False)
    with pytest.raises(UserError, match="E127.*template"):
        LumenLM(asked).apply_chat_template(TALK)


def test_bf16_asks_one_prompt_at_a_time(pair, monkeypatch):
    ours, _ = pair
    sizes = []
    monkeypatch.setattr(ours, "replies", lambda texts, *_: sizes.append(len(texts)) or texts)
    requests = asked_for([(text, {"max_gen_toks": 4}) for text in TEXTS], "generate_until")
    ours.generate_until(requests)
    monkeypatch.setattr(ours.model, "compute_dtype", torch.bfloat16)
    ours.generate_until(requests)
    assert sizes == [8, 4] + [1] * 12


def test_lm_evals_command_line_knows_lumen(pair, path):
    from lm_eval.api.registry import get_model

    ours, _ = pair
    requests = asked_for([(text, " dog") for text in TEXTS])
    words = f"path={path / 'run'},precision=fp32,template=chat"
    made = get_model("lumen").create_from_arg_string(words, {"device": "cuda:0", "batch_size": 4})
    assert made.loglikelihood(requests) == ours.loglikelihood(requests)
    assert made.asked.template == chat.find_template("chat")
    other = get_model("lumen").create_from_arg_obj({"path": str(path / "hf"), "device": "cpu"})
    assert other.prefix_token_id == ours.eot_token_id  # what the folder calls bos_token
    for words in ("precision=fp32", f"path={path / 'run'},pretrained=1"):
        with pytest.raises(UserError, match="E002.*model_args"):
            get_model("lumen").create_from_arg_string(words)


def test_a_foreign_folder_begins_texts_with_its_own_token(path, tmp_path):
    """Where the bos_token is none of ours: SmolLM2's is <|im_start|>."""
    shutil.copytree(path / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for told in ("<|im_start|>", {"content": "<|im_start|>"}):
        file.write_text(json.dumps(config | {"bos_token": told}))
        opened = models.open_model(tmp_path / "hf", device="cpu", say=str)
        made = harness.language_model(asked_of(opened), opened)
        assert made.prefix_token_id == opened.tokenizer.im_start_id != made.eot_token_id
    opened.kind, opened.state = "run", {"imported": {"bos_token_id": 5}}
    assert harness.language_model(asked_of(opened), opened).prefix_token_id == 5
    opened.tokenizer = None
    with pytest.raises(UserError, match="E501"):
        asked_of(opened)
