"""sample.py: what a user can ask of it, in process; one run of the command as a process."""

import dataclasses
import io
import itertools
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import sample as S
from lumen import chat, checkpoint, prompts
from lumen import tokenizer as tok
from lumen.errors import UserError
from lumen.models import open_model
from model import ModelConfig, Transformer

T = tok.load("bytes")
SMALL = dict(
    vocab_size=T.n_vocab + 12, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=48
)


def make(seed=0, **changes) -> Transformer:
    model = Transformer(ModelConfig(**SMALL | changes))
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)  # so that the next byte depends on all before it
    return model.eval()


def save(out, step, seed=0, tokenizer=True, model=None, config=None, **state):
    model, final = model or make(seed), checkpoint.step_dir(out, step)
    tmp = Path(f"{final}.tmp")
    pieces = {
        f"model.{n}": [(tuple(p.shape), (0,) * p.dim(), p)] for n, p in model.state_dict().items()
    }
    assert checkpoint.write(tmp, 0, pieces) is None
    config = {"model": dataclasses.asdict(model.cfg)} | (config or {})
    checkpoint.commit(tmp, final, 1, {"step": step, "config": config} | state)
    if tokenizer:
        T.save(Path(out) / "tokenizer.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with steps 1, 2 and 3 (seeds 1, 2, 3), of which 1 is the best."""
    out = tmp_path_factory.mktemp("out") / "run"
    for step in (1, 2, 3):
        save(out, step, seed=step)
    (out / "best.json").write_text(json.dumps({"step": 1}))
    return str(out)


def command(capsys, *argv, stdin=None, monkeypatch=None):
    """(stdout, stderr) of the command in this process, on the CPU in fp32."""
    if stdin is not None:
        monkeypatch.setattr(
            sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False)
        )
    assert S.main([*argv, "--device", "cpu", "--precision", "fp32"]) == 0
    out = capsys.readouterr()
    return out.out, out.err


def code(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return error.value.code + " " + error.value.text


class Scripted(Transformer):
    """A model that says what it is told to: scripts are lists of ids, one per sequence, in the
    order in which they begin."""

    def __init__(self, *scripts, context=1000):
        cfg = ModelConfig(T.n_vocab, d_model=8, n_layers=1, n_heads=1, max_seq_len=context)
        super().__init__(cfg)
        self.eval()
        self.scripts, self.prompts, self.steps = list(scripts), [], 0
        self.now = {}  # slot: what it says from here on

    def forward(self, idx, cache):
        first = cache.filled.storage_offset()
        cache.place(idx)
        logits = torch.full((len(idx), T.n_vocab), -1e3)
        self.steps += 1
        for slot, ids in enumerate(idx.tolist(), first):
            ids = [i for i in ids if i >= 0]
            if not ids:
                continue
            if len(ids) > 1 or slot not in self.now:
                script = self.script(ids)
                self.now[slot] = itertools.cycle([math.nan] if script is None else script)
                self.prompts.append(ids)
            token = next(self.now[slot])
            if math.isnan(token):
                logits[slot - first] = math.nan
            else:
                logits[slot - first, token] = 1e3
        return logits

    def script(self, ids):
        """What it says behind these."""
        return self.scripts[len(self.prompts)]


def say(*texts, **options):
    """sample() of a model that says these texts byte by byte; (results, pieces per sequence,
    reasons)."""
    pieces, reasons = [[] for _ in texts], [None] * len(texts)

    def on_text(i, piece, reason):
        assert reasons[i] is None
        pieces[i].append(piece)
        reasons[i] = reason

    scripts = [t if isinstance(t, list) else list(t.encode()) for t in texts]
    options.setdefault("max_new_tokens", max(map(len, scripts)))
    out = S.sample(Scripted(*scripts), T, ["x"] * len(texts), on_text=on_text, **options)
    assert out == ["".join(p) for p in pieces]
    return out, pieces, reasons


# ---------------------------------------------------------------- text comes out right


def test_streams_byte_by_byte_and_holds_unfinished_characters():
    out, pieces, reasons = say("aé€😀b")
    assert out == ["aé€😀b"] and pieces[0] == ["a", "é", "€", "😀", "b"] and reasons == ["length"]
    out, pieces, _ = say(list("a😀".encode())[:-1])
    assert out == ["a\ufffd"] and pieces[0] == ["a", "\ufffd"]
    assert say([97, 0xFF, 98])[0] == ["a\ufffdb"]


def test_holds_what_could_begin_a_stop_string():
    out, pieces, reasons = say("one\n\ntwo", stop=["\n\n"])
    assert out == ["one"] and reasons == ["stop"] and pieces[0] == ["o", "n", "e", ""]
    out, pieces, reasons = say("one\ntwo\n", stop=["\n\n"])
    assert (
        out == ["one\ntwo\n"] and pieces[0][3] == "\nt" and reasons == ["length"]
    )  # given out once it is no stop
    assert say("aaab", stop=["aab"])[0] == ["a"]
    assert say("xaby", stop=["abc", "b"])[0] == ["xa"]
    assert say("x€y", stop=["€"])[0] == ["x"]


def test_stop_strings_do_not_depend_on_the_cut_into_tokens():
    rng = np.random.default_rng(0)

    class Chunks:  # id i stands for the i-th chunk
        n_vocab, eot_id = T.n_vocab, 255

        def __init__(self, text):
            cuts = sorted(rng.integers(0, len(text) + 1, rng.integers(1, len(text))))
            self.parts = [text[a:b].encode() for a, b in zip([0, *cuts], [*cuts, len(text)])]

        def encode(self, text):
            return np.zeros(1, np.uint32)

        def decode_bytes(self, ids):
            return b"".join(self.parts[i] for i in ids)

    for _ in range(300):
        text = "".join(rng.choice(list("abc"), 12))
        stops = [
            "".join(rng.choice(list("abc"), rng.integers(1, 5))) for _ in range(rng.integers(1, 4))
        ]
        want = text
        for n in range(
            len(text), 0, -1
        ):  # the shortest beginning that ends in a stop string, without it
            ended = [len(s) for s in stops if text[:n].endswith(s)]
            want = text[: n - max(ended)] if ended else want
        chunks = Chunks(text)
        script = list(range(len(chunks.parts)))
        got = S.sample(Scripted(script), chunks, ["x"], max_new_tokens=len(script), stop=stops)
        assert got == [want], (text, stops, chunks.parts)


def test_a_sequence_ends_at_eot_unless_told_otherwise():
    script = [*b"ab", T.eot_id, *b"cd"]
    out, _, reasons = say(script, [*b"vwxyz"])
    assert out == ["ab", "vwxyz"] and reasons == ["eot", "length"]
    assert say(script, ignore_eot=True)[0] == ["ab<|endoftext|>cd"]
    model = Scripted(script)
    S.sample(model, T, ["x"], stop=["b"])
    assert model.steps == 2  # nothing is computed for a text that has ended


def test_printer_shows_sequences_in_order(capsys):
    printer = S.Printer(["<1>", "<2>", "<3>"])
    for event in (
        (1, "b", None),
        (0, "a", None),
        (1, "B", "eot"),
        (2, "c", None),
        (0, "A", "stop"),
        (2, "", "length"),
    ):
        printer(*event)
    assert capsys.readouterr().out == "<1>aA\n<2>bB\n<3>c\n"
    printer = S.Printer(["", ""])
    printer(0, "live", None)
    printer(1, "waits", None)
    assert capsys.readouterr().out == "live"


# ---------------------------------------------------------------- sequences are independent


@pytest.mark.parametrize(
    "options", [{}, dict(top_k=0, top_p=0.9), dict(min_p=0.01, repetition_penalty=1.2)], ids=str
)
def test_a_seeded_prompt_gives_the_same_text_alone_and_in_a_batch(options):
    model, prompts = make(), ["def f(", "", "A much longer prompt, é", "x"]
    batch = S.sample(model, T, prompts, max_new_tokens=20, seed=7, num_samples=3, **options)
    assert len(set(batch)) == 12
    for i, prompt in enumerate(prompts):
        for k in range(3):
            alone = S.sample(model, T, [prompt], max_new_tokens=20, seed=7 + k, **options)
            assert alone == [batch[3 * i + k]]
    assert (
        S.sample(model, T, prompts[::-1], max_new_tokens=20, seed=7, **options) == batch[::3][::-1]
    )


def test_cached_text_is_that_of_the_full_forward():
    """Greedy text recomputed without a cache, prompt by prompt."""
    model, prompts = make(), ["abc", "hello world"]
    got = S.sample(model, T, prompts, max_new_tokens=15, temperature=0, ignore_eot=True)
    for prompt, text in zip(prompts, got):
        ids = T.encode(prompt).tolist()
        for _ in range(15):
            ids.append(model(torch.tensor([ids]))[0, -1, : T.n_vocab].argmax().item())
        assert T.decode(ids[len(T.encode(prompt)) :]) == text


def test_never_draws_ids_beyond_the_tokenizer():
    model = make()
    with torch.no_grad():
        model.embed.weight[T.n_vocab :] *= 30
    S.sample(
        model, T, [""], max_new_tokens=40, temperature=3.0, top_k=0, num_samples=8, ignore_eot=True
    )  # or: E113
    out = S.sample(model, None, [[5]], max_new_tokens=40)
    assert max(map(int, out[0].split())) >= T.n_vocab


def test_control_tokens_in_a_prompt_are_plain_text():
    model = Scripted([97], [97])
    S.sample(model, T, ["<|endoftext|>", ""])
    assert model.prompts == [list(b"<|endoftext|>"), [T.eot_id]]


# ---------------------------------------------------------------- limits


def test_generation_stops_at_max_seq_len_with_a_note(run, capsys):
    model, stats = make(), {}
    out = S.sample(model, None, [[1] * 40, [2] * 10, [3] * 47], max_new_tokens=30, stats=stats)
    assert [len(t.split()) for t in out] == [8, 30, 1] and stats["reasons"] == [
        "context",
        "length",
        "context",
    ]
    assert stats["prefill_tokens"] == 97 and stats["decode_tokens"] == 39 - 3
    _, err = command(capsys, run, "--ids", "1 2 3", "--max_new_tokens", "500", "--ignore_eot")
    assert "note: 1 of 1 sequences stopped at the model's max_seq_len, 48 tokens" in err
    _, err = command(capsys, run, "--ids", "1 2 3", "--max_new_tokens", "45", "--ignore_eot")
    assert "note" not in err


@pytest.mark.parametrize("n", (48, 49, 500))
def test_a_prompt_without_room_is_refused_with_both_numbers(n):
    text = code(S.sample, make(), T, ["ok", "x" * n])
    assert (
        text.startswith("E500")
        and "prompt 2" in text
        and f"{n} tokens" in text
        and "max_seq_len is 48" in text
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 101),
        ("top_k", -1),
    ]
    + [
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ]
    + [("num_samples", 0), ("seed", 2**63)],
)
def test_options_out_of_range(run, name, value):
    text = code(S.sample, make(), T, ["a"], **{name: value})
    assert (
        text.startswith("E500")
        and name in text
        and str(value) in text
        and S.RANGES[name][2] in text
    )
    assert code(S.main, [run, "--prompt", "a", f"--{name.replace('_', '-')}={value}"]).startswith(
        "E500"
    )


def test_other_refusals():
    model = make()
    assert code(S.sample, model, T, ["a"], stop=[""]).startswith("E500")
    assert code(S.sample, model, None, ["a"]).startswith("E501")
    assert code(S.sample, model, None, [[]]).startswith("E501")
    assert "they must be 0 to 271" in code(S.sample, model, None, [[3, 272]])
    assert code(S.sample, model, None, [[-1, 2]]).startswith("E500")
    assert code(S.sample, make(vocab_size=100), T, ["a"]).startswith("E113")
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    assert "NaN" in code(S.sample, model, T, ["a"])


# ---------------------------------------------------------------- the command


def test_options_reach_the_sampler_in_both_spellings(run, capsys):
    model, tokenizer, step = S.load(run, device="cpu", precision="fp32")
    assert step == 3
    options = dict(
        max_new_tokens=9,
        temperature=1.3,
        top_k=7,
        top_p=0.8,
        min_p=0.01,
        repetition_penalty=1.5,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        seed=5,
    )
    want = S.sample(model, tokenizer, ["def "], **options)[0]
    default = S.sample(model, tokenizer, ["def "], max_new_tokens=9, seed=5)[0]
    assert want != default
    for spell in (lambda n: n, lambda n: n.replace("_", "-")):
        argv = [x for n, v in options.items() for x in (f"--{spell(n)}", str(v))]
        out, err = command(capsys, run, "--prompt", "def ", *argv)
        assert out.encode() == ("def " + want + "\n").encode()
        assert (
            "step 3" in err
            and "prefill 4 tokens" in err
            and "decode 8 tokens" in err
            and "tokens/s" in err
        )
    assert set(S.RANGES) == set(options) | {"num_samples"}


def test_prompts_from_options_files_and_stdin(run, capsys, monkeypatch, tmp_path):
    greedy = ("--temperature", "0", "--max-new-tokens", "5", "--ignore-eot")
    file = tmp_path / "p.txt"
    file.write_bytes(b"from a file\n")
    three = ("--prompt", "one", "--prompt", "-", "--prompt_file", str(file), "--num_samples", "2")
    out, _ = command(capsys, run, *three, *greedy, stdin=b"from stdin", monkeypatch=monkeypatch)
    heads = [line for line in out.split("\n") if line.startswith("--- prompt")]
    assert heads == [f"--- prompt {p}, sample {s} ---" for p in (1, 2, 3) for s in (1, 2)]
    model, tokenizer, _ = S.load(run, device="cpu", precision="fp32")
    options, prompts = (
        dict(max_new_tokens=5, temperature=0, ignore_eot=True),
        ["one", "from stdin", "from a file"],
    )
    texts = S.sample(model, tokenizer, prompts, **options)
    for prompt, text in zip(prompts, texts):
        assert out.count(f"---\n{prompt}{text}\n") == 2
    piped, said = command(capsys, run, *greedy, stdin=b"one\n", monkeypatch=monkeypatch)
    assert piped == f"one{texts[0]}\n" and "a new text is begun" not in said
    nothing, said = command(capsys, run, *greedy, stdin=b"", monkeypatch=monkeypatch)
    assert "no --prompt: a new text is begun" in said
    start = S.sample(model, tokenizer, [[T.eot_id]], **options)[0]
    assert nothing == T.decode(list(map(int, start.split()))) + "\n"
    monkeypatch.setattr(
        sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"\xff"), isatty=lambda: False)
    )
    assert "UTF-8" in code(S.main, [run])
    assert code(S.main, [run, "--prompt_file", str(tmp_path / "no")]).startswith("E500")


def test_ids_in_ids_out(tmp_path, capsys):
    save(tmp_path, 1, tokenizer=False)
    out, _ = command(capsys, str(tmp_path), "--ids", "1, 2 3", "--max_new_tokens", "4")
    assert out.startswith("1 2 3 ") and len([int(i) for i in out.split()]) == 7
    assert code(S.main, [str(tmp_path), "--prompt", "a"]).startswith("E501")
    assert code(S.main, [str(tmp_path), "--ids", "1 a"]).startswith("E500")
    T.save(tmp_path / "elsewhere.json")
    with_file, _ = command(
        capsys,
        str(tmp_path),
        "--prompt",
        "a",
        "--tokenizer",
        str(tmp_path / "elsewhere.json"),
        "--temperature",
        "0",
    )
    assert with_file.startswith("a") and len(with_file) > 2


def test_newest_best_and_step(run, capsys):
    weights = {seed: make(seed).embed.weight for seed in (1, 2, 3)}
    for options, seed in (({}, 3), (dict(best=True), 1), (dict(step=2), 2)):
        model, tokenizer, step = S.load(run, **options, device="cpu", precision="fp32")
        assert (
            step == seed
            and torch.equal(model.embed.weight, weights[seed])
            and tokenizer.n_vocab == T.n_vocab
        )
    assert S.load(f"{run}/step_00000001", device="cpu")[2] == 1
    assert "step 1," in command(capsys, run, "--best", "--prompt", "a")[1]
    assert "step 2," in command(capsys, run, "--step", "2", "--prompt", "a")[1]
    assert code(S.load, run, best=True, step=1).startswith("E002")
    assert code(S.load, run, step=9).startswith("E304")
    assert code(S.main, [f"{run}x", "--prompt", "a"]).startswith("E304")


def test_a_damaged_checkpoint_is_passed_over_and_one_that_does_not_fit_is_named(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step, seed=step)
    file = tmp_path / "step_00000002" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    _, err = command(capsys, str(tmp_path), "--prompt", "a")
    assert "E303" in err and "step 1," in err
    assert code(S.load, tmp_path, step=2).startswith("E303")
    model = make()
    model.cfg.d_model = 16  # what state.json says is not what the tensors are
    save(tmp_path, 3, model=model)
    assert code(S.load, tmp_path).startswith("E305")
    model.cfg.norm_order = "later"
    save(tmp_path, 4, model=model)
    assert code(S.load, tmp_path).startswith("E306")


def test_bf16_weights_are_cast_once(run):
    model, tokenizer, _ = S.load(run, device="cpu", precision="bf16")
    assert {p.dtype for p in model.parameters()} == {model.compute_dtype} == {torch.bfloat16}
    assert len(S.sample(model, tokenizer, ["a"], max_new_tokens=5, ignore_eot=True)[0]) >= 1


def test_unknown_options_and_missing_run():
    for argv in ([], ["run", "--foo"], ["run", "--top_k", "many"], ["run", "--temp", "1"]):
        assert code(S.main, argv).startswith("E002")


def test_as_a_process(run):
    go = [
        sys.executable,
        "sample.py",
        run,
        "--max_new_tokens",
        "8",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    root = ROOT
    done = subprocess.run([*go, "--stop", "zz"], cwd=root, input=b"def ", capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"def ") and b"tokens/s" in done.stderr
    done = subprocess.run(
        [*go, "--prompt", "a", "--top_p", "7"], cwd=root, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.startswith("error E500: top_p: 7.0")
    )
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- conversations

HI = [chat.Message("user", "hi")]


def reply(text, **options):
    """(sample() of a conversation, what the model was given, reasons); the model says this text,
    bytes or ids."""
    model, stats = Scripted(text if isinstance(text, list) else list(text.encode())), {}
    options.setdefault("max_new_tokens", len(model.scripts[0]))
    out = S.sample(model, T, [HI], stats=stats, **options)
    return out[0], model.prompts[0], stats["reasons"][0]


def test_a_conversation_goes_through_the_one_renderer_and_ends_where_replies_end():
    for name in chat.FORMATS:
        text, given, reason = reply(" ok\n", template=name)
        want, _ = chat.render(HI, name, T, open_reply=True)
        assert given == want.tolist() and text == "ok" and reason == "length"
        for end in chat.stop_ids(name, T):
            assert reply([*b" yes", end, *b"more"], template=name)[::2] == ("yes", "eot")
    assert reply([*b"a", T.im_end_id, *b"b"], template="instruct")[0] == "a<|im_end|>b"
    gone_on = "ok\n\n### Instruction:\nmore"
    assert reply(gone_on, template="instruct")[::2] == ("ok", "stop")
    assert reply(gone_on, template="instruct", ignore_eot=True)[0] == gone_on
    assert reply(gone_on, template="chatml")[0] == gone_on
    assert "E105" in code(S.sample, Scripted([97]), T, [[("pirate", "x")]])
    assert "E501" in code(S.sample, Scripted([97]), None, [HI])


def test_chat_command(run, capsys, tmp_path):
    options = ("--max_new_tokens", "6", "--temperature", "0", "--ignore_eot")
    model, tokenizer, _ = S.load(run, device="cpu", precision="fp32")
    talk = [chat.Message("system", "s"), *HI]
    want = S.sample(model, tokenizer, [talk], 6, temperature=0, ignore_eot=True, template="chat")[0]
    words = ("--chat", "--system", "s", "--prompt", "hi", *options)
    out, err = command(capsys, run, *words, "--template", "chat")
    assert out.strip() == want and "note: a base model" in err and "taken" not in err
    out, err = command(capsys, run, *words)
    assert "a base model" in err and "taken: template chatml" in err and "finetune.py" in err
    out, _ = command(capsys, run, *words, "--prompt", "ho")
    assert "--- prompt 2, sample 1 ---\nho\n\n" in out
    assert "E500" in code(S.main, [run, "--chat", "--ids", "1"])
    assert "E002" in code(S.main, [run, "--chat", "--prompt", "x", "--template", "chatlm"])


def test_the_template_is_the_models(tmp_path):
    said = []
    data = {"data_dir": str(tmp_path / "data")}
    save(tmp_path, 0, config=data, template=chat.describe("instruct"))
    save(tmp_path, 1, config=data)

    def choose(step, asked):
        opened = open_model(tmp_path, step=step, device="cpu")
        return prompts.choose_template(opened, asked, said.append).name

    assert choose(0, None) == "instruct" and not said
    assert choose(0, "chat") == "chat" and "trained with chat template instruct" in said[0]
    assert choose(1, None) == "chatml" and len(said) == 4
    assert "perhaps a base model" in said[1] and said[1].endswith(f"not here: {tmp_path}/data")
    assert choose(1, "raw") == "raw" and "a base model" in said[4] and len(said) == 6
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"template": chat.describe("raw")}))
    assert choose(1, None) == "raw" and len(said) == 6
