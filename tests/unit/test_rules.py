"""What the rules keep and what they drop, at their limits and in other scripts; masks, mending,
language, quality, the dry run; evaluation text."""

import json
import pickle
import random
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen import measures, rules
from lumen.clean import clean, plain_words, written_words
from lumen.decontaminate import Contaminated
from lumen.errors import UserError
from lumen.measures import Measures
from lumen.pii import mask
from lumen.rules import RULES, Examples, Rules, complete

PROSE = {
    "en": "The city lies on the river and it is known for its old houses, which were built with "
    "stone that came from the hills nearby. Every summer people come to have a look at them.",
    "de": "Berlin ist die Hauptstadt der Bundesrepublik Deutschland und zugleich eines ihrer Länder. "
    "Die Stadt ist bekannt für ihre Museen und ihre lebendige Kunstszene.",
    "zh": "北京是中华人民共和国的首都，也是全国的政治、文化和国际交往中心。这座城市有三千多年的建城史和八百多年的建都史，"
    "拥有众多历史古迹和人文景观。每年都有数以百万计的游客从世界各地来到这里，参观故宫、长城和天坛。",
    "ja": "東京は日本の首都であり、世界でも最も人口の多い都市の一つです。古い寺院や神社と近代的な高層ビルが並び、訪れる人々を"
    "魅了します。春には桜が咲き、多くの人が公園で花見を楽しみます。",
    "th": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย เป็นศูนย์กลางการปกครอง การศึกษา การคมนาคมขนส่ง "
    "และการเงินการธนาคาร เมืองนี้ตั้งอยู่บนสามเหลี่ยมปากแม่น้ำเจ้าพระยา",
    "ru": "Москва является столицей России и крупнейшим городом страны. Здесь расположены важнейшие "
    "органы государственной власти, университеты, театры и музеи.",
    "ar": "القاهرة هي عاصمة جمهورية مصر العربية وأكبر مدنها من حيث عدد السكان. تقع المدينة على ضفاف "
    "نهر النيل، وتضم العديد من المعالم التاريخية والأثرية.",
    "hi": "दिल्ली भारत की राजधानी है और देश का एक महत्वपूर्ण सांस्कृतिक केंद्र भी है। यहाँ हर साल लाखों "
    "पर्यटक लाल किला, कुतुब मीनार और इंडिया गेट देखने आते हैं।",
    "ml": "തിരുവനന്തപുരം കേരളത്തിന്റെ തലസ്ഥാനനഗരമാണ്. അനന്തപത്മനാഭസ്വാമിക്ഷേത്രത്തിന്റെ സാന്നിദ്ധ്യമാണ് "
    "നഗരത്തിന് ഈ പേരു നൽകിയത്. സംസ്ഥാനത്തെ ഏറ്റവും ജനസംഖ്യയുള്ള നഗരങ്ങളിലൊന്നാണിത്.",
}


def words(n: int, first: int = 0) -> list[str]:
    """Different ones, of five letters."""
    letters = "bcdfghjklm"
    return [f"w{''.join(letters[int(d)] for d in f'{i:04}')}" for i in range(first, first + n)]


def with_repeats(n: int, times: int) -> str:
    """100 words, of which the first n come `times` times, each time behind another word."""
    fresh = iter(words(200, 100))
    text = []
    for _ in range(times):
        text += [*words(n), next(fresh)]
    while len(text) < 100:
        text.append(next(fresh))
    return " ".join(text)


def with_copy(n: int) -> str:
    """100 words of which the last n are the first n again."""
    return " ".join(words(100 - n) + words(n))


def lines(n: int, long: str) -> str:
    """100 lines, n of which end in `long` and are longer than 30 characters."""
    first = [f"line {i} of a text that goes on and on {i}" for i in range(100)]
    return "\n".join([*(line + long for line in first[:n]), *first[n:]])


def repeated(n: int) -> str:
    """Ten paragraphs, n of which came before."""
    different = [" ".join(words(20, 20 * i)) for i in range(10 - n)]
    return "\n\n".join(different + different[:n])


STOPLESS = " ".join(
    w for w in PROSE["en"].split() if w not in ("the", "and", "to", "with", "that", "have")
)
# name: (kept, dropped), both next to the limit
LIMITS = {
    "words_50_to_100000": (" ".join(words(50)), " ".join(words(49))),
    "mean_word_length_3_to_10": ("abc " * 60, "abc " * 60 + "ab"),
    "hashes_at_most_10_percent": (
        "# word two three four five six seven eight ten",
        "# # " + "a " * 17,
    ),
    "ellipses_at_most_10_percent": ("a b c d e f g h i j…", "a b c d e f g h i…"),
    "bullets_at_most_90_percent": ("• a\n" * 9 + "b", "- a\n" * 10),
    "trailing_off_at_most_30_percent": ("a...\n" * 3 + "b\n" * 7, "a…\n" * 4 + "b\n" * 6),
    "letters_in_80_percent_of_words": ("a b2 c d 1 e f g h 2", "a b c d 1 e f g ; 2"),
    "two_stop_words": (f"{STOPLESS} the of", f"{STOPLESS} the"),
    "punctuation_ends_12_percent_of_lines": (lines(12, "."), lines(11, "。")),
    "short_lines_at_most_67_percent": (
        "\n".join(["a" * 30] * 67 + ["a" * 31] * 33),
        "\n".join(["a" * 30] * 68 + ["a" * 31] * 32),
    ),
    "duplicate_line_characters_at_most_1_percent": (
        "\n".join([*words(98), "wbbbb"]) + "a" * 5,
        "\n".join([*words(98), "wbbbb"]),
    ),
    "line_ends_at_most_30_percent": ("a b c d e f g h i j\n\n\n", "a b c d e f g h i\n\n\n"),
    "no_lorem_ipsum": ("Lorem  ipsum", "A Lorem Ipsum"),
    "no_curly_bracket": ("a } (", "a {"),
    "duplicate_lines_at_most_30_percent": (repeated(3), repeated(4)),
    "duplicate_paragraphs_at_most_30_percent": (repeated(3), repeated(4)),
    "duplicate_line_characters_at_most_20_percent": (repeated(2), repeated(3)),
    "duplicate_paragraph_characters_at_most_20_percent": (repeated(2), repeated(3)),
    "top_2_gram_at_most_20_percent": (with_repeats(2, 10), with_repeats(2, 11)),
    "top_3_gram_at_most_18_percent": (with_repeats(3, 6), with_repeats(3, 7)),
    "top_4_gram_at_most_16_percent": (with_repeats(4, 4), with_repeats(4, 5)),
    **{
        f"repeated_{n}_grams_at_most_{percent}_percent": (
            with_copy(percent),
            with_copy(percent + 1),
        )
        for n, percent in ((5, 15), (6, 14), (7, 13), (8, 12), (9, 11), (10, 10))
    },
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_at_its_limit(name):
    kept, dropped = LIMITS[name]
    check = RULES[name].check
    assert check(Measures(kept, 0.5)) == ""
    why = check(Measures(dropped, 0.5))
    assert why and len(why) < 40
    # the same alone, among all, and in look_all
    chosen = Rules({"rules": [name], "language_threshold": 0.5})
    assert [rule.name for rule in chosen.rules] == [name] and name in chosen.explain()[0]
    assert chosen.look(kept).dropped == "" and chosen.look(dropped)[1:3] == (name, why)
    assert chosen.look_all(dropped) == {name: why}


def test_the_other_end_of_what_has_two():
    assert RULES["words_50_to_100000"].check(Measures("ab " * 100_000, 0)) == ""
    assert RULES["words_50_to_100000"].check(Measures("ab " * 100_001, 0)) == "100,001 > 100,000"
    assert RULES["mean_word_length_3_to_10"].check(Measures("a" * 10, 0)) == ""
    assert RULES["mean_word_length_3_to_10"].check(Measures("a" * 11, 0)) == "11 > 10"
    # no language but English needs English stop words
    assert RULES["two_stop_words"].check(Measures(PROSE["de"], 0.5)) == ""


@pytest.mark.parametrize("language", PROSE)
def test_prose_of_any_script_is_kept(language):
    """But for its length: letters are letters, full stops are full stops, and what is written
    without blanks is not one giant word."""
    text = PROSE[language]
    chosen = Rules({"preset": "web", "ftfy": False, "rules": ["-words_50_to_100000"]})
    assert chosen.look_all(text) == {}
    numbers = Measures(text, 0.8)
    assert numbers.words_with_letters == 1 and numbers.letters > 0.9
    assert 12 <= numbers.n_words <= len(text) / 1.9
    assert numbers.ended_lines == 1
    # numbers and signs are no letters, there either
    assert "letters_in_80_percent_of_words" in chosen.look_all(f"{text} {'3 + 4 ; ' * 60}")


def test_what_words_are():
    assert written_words("你好，世界! Hello, «да» 「日本」") == [
        "你",
        "好，",
        "世",
        "界!",
        "Hello,",
        "«да»",
        "「",
        "日",
        "本」",
    ]
    assert written_words("a\u00a0b\u3000c\n d") == list("abcd")
    plain = [word.decode() for word in plain_words("Don’t_STOP: हिन्दी 「日本」 STRAßE ÉTÉ, 3.5 วัน")]
    assert plain == ["don", "t", "stop", "हिन्दी", "日", "本", "straße", "été", "3", "5", "วั", "น"]
    assert Measures("你好世界，早上好", 0).n_words == 4  # two letters each, for seven: 7 - 3


def naive_repeated(text: str, n: int) -> float:
    """Characters in n words in a row that came before, each once."""
    parts = text.split()
    seen, inside = set(), set()
    for i in range(len(parts) - n + 1):
        ngram = tuple(parts[i : i + n])
        if ngram in seen:
            inside.update(range(i, i + n))
        seen.add(ngram)
    return sum(len(parts[i]) for i in inside) / max(1, sum(map(len, parts)))


def naive_top(text: str, n: int) -> float:
    parts = text.split()
    counts = Counter(tuple(parts[i : i + n]) for i in range(len(parts) - n + 1))
    most = max(counts.values(), default=0)
    longest = max((len("".join(gram)) for gram, k in counts.items() if k == most), default=0)
    return most * longest / max(1, sum(map(len, parts))) if most > 1 else 0.0


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=12))
@settings(max_examples=200, deadline=None)
def test_repetition_is_what_counting_says(slices):
    """The shortcuts over hashes decide as a count over tuples does."""
    base = [word * (1 + i % 3) for i, word in enumerate(words(40))]
    text = " ".join(word for start, n in slices for word in base[start : start + n])
    numbers = Measures(text, 0)
    for n, limit in ((2, 0.2), (3, 0.18), (4, 0.16)):
        assert (numbers.top_ngram(n, limit) > limit) == (naive_top(text, n) > limit)
    for n, limit in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1)):
        found = numbers.repeated(n, limit)
        assert (found > limit) == (naive_repeated(text, n) > limit)
        assert found <= limit or found == pytest.approx(naive_repeated(text, n))


def any_text(examples):
    alphabet = st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n.a你ก@1:")
    return lambda test: given(st.text(alphabet, max_size=200))(
        settings(max_examples=examples, deadline=None)(test)
    )


EVERYTHING = {"preset": "web", "rules": ["no_curly_bracket"], "language": ["en"], "pii": "mask"}
EVERYTHING |= {"quality_threshold": 0.3, "min_chars": 2, "max_chars": 8}


def check_any_text(text):
    text = clean(text)
    assert clean(text) == text
    every = Rules(EVERYTHING)
    verdict = every.look(text)
    failed = every.look_all(text)
    assert verdict.dropped == next(iter(failed), "") and verdict.why == failed.get(
        verdict.dropped, ""
    )
    masked, n = mask(text)
    assert mask(masked) == (masked, 0) and (n > 0 or masked == text)
    assert Rules({}).look(text).text is text


@any_text(40)
def test_no_text_breaks_a_rule(text):
    check_any_text(text)


@pytest.mark.nightly
@any_text(5000)
def test_no_text_breaks_a_rule_long(text):
    check_any_text(text)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"presets": "web"}, "did you mean preset"),
        ({"preset": "fineweb"}, "clean.preset: 'fineweb' is not none or web"),
        ({"rules": ["two_stop_word"]}, "did you mean two_stop_words"),
        ({"rules": ["-mean_word_length"]}, "did you mean mean_word_length_3_to_10"),
        ({"rules": [1]}, "clean.rules"),
        ({"rules": {"a": 1}}, "clean.rules"),
        ({"language": ["english"]}, "no 'english'"),
        ({"language": 1}, "clean.language"),
        ({"language_threshold": 1.5}, "clean.language_threshold"),
        ({"language_threshold": None}, "clean.language_threshold"),
        ({"ftfy": "yes"}, "clean.ftfy"),
        ({"pii": True}, "clean.pii: True is not null or mask"),
        ({"min_chars": 0}, "clean.min_chars"),
        ({"max_chars": 1.5}, "clean.max_chars"),
        ({"min_chars": 9, "max_chars": 8}, "nothing would be left"),
        ({"quality_threshold": True}, "clean.quality_threshold"),
    ],
)
def test_settings_that_cannot_be(wrong, said):
    with pytest.raises(UserError, match="E002") as error:
        Rules(wrong)
    assert said in str(error.value)


def test_settings_are_complete_and_stay_so():
    web = {"preset": "web", "rules": ["-two_stop_words", "no_curly_bracket"], "language": "de"}
    full = complete(web)
    assert complete(json.loads(json.dumps(full))) == full and full["version"] == 1
    assert full["ftfy"] and full["min_chars"] == 50 and full["language"] == ["de"]
    assert complete(web | {"min_chars": None, "ftfy": False})["min_chars"] is None  # said: not 50
    names = [rule.name for rule in Rules(web).rules]
    assert "no_curly_bracket" in names and "two_stop_words" not in names
    assert names[0] == "characters_50_or_more" and names[-1] == "language_de"
    assert not Rules({}).active and Rules({}).explain() == []
    assert complete({"language": ["en", "de", "en"]}) == complete({"language": ["de", "en"]})
    chosen = pickle.loads(pickle.dumps(Rules(web)))
    assert chosen.look(PROSE["en"]) == Rules(web).look(PROSE["en"])


@pytest.mark.parametrize(
    "wanted, package", [({"ftfy": True}, "ftfy"), ({"language": ["en"]}, "py3langid")]
)
def test_a_missing_package_is_named(monkeypatch, wanted, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.langid", None)
    measures.identifier.cache_clear()
    rules.fixer.cache_clear()
    with pytest.raises(UserError, match=f"E003.*pip install '?{package}"):
        Rules(wanted)
    Rules({"preset": "web", "ftfy": False, "rules": ["-two_stop_words"]})


def test_no_rules_measure_nothing(monkeypatch):
    """What is on without being asked for costs nothing."""
    monkeypatch.setattr("lumen.rules.Measures", None)
    assert Rules({}).look("text") == ("text", "", "", "", -1, 0)


# ---------------------------------------------------------------- language, mending, quality, masks


def test_language():
    """Another language is dropped; what is too short, or none at all, is undecided and kept."""
    chosen = Rules({"language": ["en", "hi"]})
    assert [chosen.look(PROSE[code]).language for code in ("en", "hi")] == ["en", "hi"]
    verdict = chosen.look(PROSE["de"])
    assert verdict.dropped == "language_en_or_hi" and verdict.language == "de"
    assert verdict.why.startswith("de, 1.00")
    for text in ("ok", "!!!", "1 2 3 4", "x[i] += foo(bar)"):
        assert chosen.look(text)[1:4] == ("", "", "und")
    sure = Rules({"language": ["en"], "language_threshold": 0})
    assert sure.look("x[i] += foo(bar)").language != "und"
    # only the first 1,000 characters are looked at
    assert chosen.look(PROSE["en"] * 6 + PROSE["de"] * 50).language == "en"


def test_wrong_decodings_are_mended_and_nothing_else():
    mending = Rules({"ftfy": True})
    assert mending.look("It doesnâ€™t matter, cafÃ©.").text == "It doesn’t matter, café."
    for text in ("“quotes” ‘stay’", "ｗｉｄｅ，ｔｏｏ", "ﬁsh and ﬂour", PROSE["zh"], PROSE["hi"]):
        assert mending.look(text).text == text
    assert mending.look("AT&amp;T\n&lt;3 it&#39;s").text == "AT&T\n<3 it's"
    assert mending.look("AT&amp;T is &lt;b> in\n<b>").text == "AT&amp;T is &lt;b> in\n<b>"


def test_quality_is_the_mean_of_named_parts():
    good = Rules({"quality_threshold": 0.9})
    verdict = good.look(PROSE["en"] * 2)
    assert verdict.dropped == "" and 0.9 < verdict.score <= 1
    bad = "buy now 50 % ###\n" * 30
    verdict = good.look(bad)
    assert verdict.dropped == "quality_0.9_or_more" and verdict.score < 0.6
    for part in ("rules", "letters", "lines_that_end", "new_lines"):
        assert f"{part} 0." in verdict.why and part in good.explain()[0]
    mean = sum(float(part.split()[-1]) for part in verdict.why.partition(": ")[2].split(",")) / 4
    assert mean == pytest.approx(verdict.score, abs=0.01)
    assert Rules({}).look(bad).score == -1


MASKED = {
    "mail a.b+c@sub.host.co.uk.": "mail email@example.com.",
    "http://85.1.2.133:80/x": "http://192.0.2.1:80/x",
    "at 2a00:1450:4001:82b::200e,": "at 2001:db8::1,",
    "call +49 30 1234567 or +1 (555) 123-4567!": "call +1-202-555-0100 or +1-202-555-0100!",
    "<müller@uni-köln.de>, x@mail.example.de": "<email@example.com>, x@mail.example.de",
}
CODE = [
    "git clone git@github.com:x/y",
    "version 1.2.3.4, v10.200.3.4, ==1.2.3.143, Chrome/120.1.2.3, section 23.2.2.11",
    "192.168.1.100 10.0.0.200 127.0.0.1 255.255.255.255 224.0.0.251 300.1.1.1 1.2.3.4.150",
    "@property\nx = a@b.dot(c) @ d; std::add a::b x[::2] 12:34:56 00:1a:2b:3c:4d:5e",
    "t = +12 - 345; '+1980-02-29 01:02:03'; +00:30; 2001:db8::7; user@example.com; user@localhost",
]


def test_addresses_are_masked_and_code_is_not():
    masking = Rules({"pii": "mask"})
    for text, after in MASKED.items():
        assert mask(after) == (after, 0)
        verdict = masking.look(text)
        assert verdict.text == after and verdict.masked >= 1
    for text in CODE:
        assert masking.look(text)[0::5] == (text, 0)
    # what is dropped is not counted
    both = Rules({"pii": "mask", "max_chars": 5})
    assert both.look("x@y.org").masked == 0


# ---------------------------------------------------------------- the dry run


def stdlib_files(n: int) -> list[Path]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file for file in files if 2000 < file.stat().st_size < 100_000][:n]


def test_a_dry_run_shows_how_web_rules_eat_code():
    """Of the interpreter's own library next to nothing would be left, and the table says by what."""
    web = Rules({"preset": "web", "ftfy": False})
    seen = Examples()
    files = stdlib_files(60)
    for file in files:
        text = clean(file.read_text(encoding="utf-8"))
        seen.add(file.name, text, web.look_all(text))
    dropped = seen.to_json()["dropped"]
    assert seen.documents == len(files) > 50
    assert dropped["any of them"]["documents"] > 0.9 * len(files)
    lines = seen.lines()
    table = "\n".join(lines)
    assert "line_ends_at_most_30_percent" in table and f"of {len(files)} documents" in table
    ends = dropped["line_ends_at_most_30_percent"]
    assert ends["documents"] > 5 and len(ends["examples"]) == 3
    example = ends["examples"][0]
    assert float(example["why"].partition(" > ")[0]) > 0.3 and len(example["excerpt"]) <= 100
    assert f"{example['file']}: {example['why']}: {example['excerpt']}" in table
    # the same code is left alone by what is on without being asked for
    assert not any(Rules({}).look_all(file.read_text(encoding="utf-8")) for file in files[:5])


def test_a_dry_run_is_the_same_in_any_order():
    documents = [
        (f"f{i}.txt:{i}", f"text {i} é", {"a": str(i)} if i % 2 else {}) for i in range(40)
    ]
    documents += [(f"g{i}", f"text {i}", {"a": "1", "b": "2"}) for i in range(2)]
    whole = Examples()
    for document in documents:
        whole.add(*document)
    for seed in range(3):
        random.Random(seed).shuffle(documents)
        parts = [Examples() for _ in range(4)]
        for i, document in enumerate(documents):
            parts[i % 3].add(*document)
        total = Examples()
        for part in pickle.loads(pickle.dumps(parts)):
            total.merge(part)
        assert total.to_json() == whole.to_json() and total.lines() == whole.lines()
    counted = whole.to_json()["dropped"]
    assert list(counted) == ["any of them", "a", "b"] and counted["a"]["documents"] == 22
    assert len(counted["a"]["examples"]) == 3 and len(counted["b"]["examples"]) == 2
    assert whole.bytes == sum(len(text.encode()) for _, text, _ in documents)
    assert Examples().lines()[-1] == "nothing"


# ---------------------------------------------------------------- evaluation text


def test_evaluation_text_is_found(tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text(" ".join(words(30)))
    row = {
        "id": 7,
        "q": "One two, three: four five SIX seven eight?",
        "more": [{"a": ["Yes it is"]}],
    }
    rows.write_text(json.dumps(row) + "\n\n" + json.dumps(PROSE["zh"][:20]) + "\n")
    found = Contaminated([str(text), str(rows)])
    found = pickle.loads(pickle.dumps(found))
    assert found.texts == 3 and found.short == 1
    told = "\n".join(found.explain())
    assert "13 words in a row of 3" in told and "8 to 12 words" in told and "1 shorter" in told
    # 13 words in a row, in other case and punctuation; 12 are not enough
    inside = ", ".join(words(13, 10)).upper()
    assert found.hits(f"before {inside}; after") == " ".join(words(13, 10))
    assert found.hits(f"before {', '.join(words(12, 10))}; after") == ""
    assert found.hits(" ".join(words(6) + ["not"] + words(12, 6))) == ""
    # a text of eight words, whole; not seven of them; not one of three
    assert (
        found.hits("x ONE two three four five six seven, eight x")
        == "one two three four five six seven eight"
    )
    assert found.hits("one two three four five six seven nine") == ""
    assert found.hits("yes it is") == "" and found.hits("") == "" and found.hits("你") == ""
    assert found.hits("甲" + PROSE["zh"][:20]) and not found.hits(PROSE["zh"][20:])
    # the first of two
    assert found.hits(f"one two three four five six seven eight {inside}").startswith("one")
    nothing = Contaminated([])
    assert nothing.hits(inside) == ""


def test_every_ngram_of_an_evaluation_is_found(tmp_path):
    """Any 13 words in a row of the file, in any text; never 13 words that are not in a row there."""
    chance = random.Random(0)
    vocabulary = words(20)
    text = [chance.choice(vocabulary) for _ in range(200)]
    (tmp_path / "a.txt").write_text(" ".join(text))
    found = Contaminated([str(tmp_path / "a.txt")])
    there = {tuple(text[i : i + 13]) for i in range(188)}
    for _ in range(200):
        i, n = chance.randrange(180), chance.randrange(8, 20)
        around = [chance.choice(vocabulary) for _ in range(40)]
        document = [*around[:20], *text[i : i + n], *around[20:]]
        grams = [tuple(document[k : k + 13]) for k in range(len(document) - 12)]
        first = next((gram for gram in grams if gram in there), ())
        assert found.hits(" ".join(document)) == " ".join(first)


@pytest.mark.parametrize(
    "name, data, code, said",
    [
        ("a.csv", b"x", "E002", "is no .txt or .jsonl"),
        ("a.jsonl", b'{"a": 1}\n{"a\n', "E101", "a.jsonl:2"),
        ("a.txt", b"ab\xff", "E103", "byte 2"),
        ("none.txt", None, "E108", "No such file"),
    ],
)
def test_evaluation_files_that_cannot_be(tmp_path, name, data, code, said):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=code) as error:
        Contaminated([str(tmp_path / name)])
    assert said in str(error.value)


# ---------------------------------------------------------------- any process


SCRIPT = """
import sys, json
sys.path.insert(0, sys.argv[1])
from lumen.rules import Rules, Examples
from lumen.decontaminate import Contaminated
from lumen.near import bands_of, DEFAULTS
texts = json.loads(sys.stdin.read())
rules = Rules({"preset": "web", "language": ["en"], "quality_threshold": 0.5, "pii": "mask"})
seen = Examples()
for i, text in enumerate(texts):
    seen.add(str(i), text, rules.look_all(text))
found = Contaminated([sys.argv[2]])
hashes = {n: found.hashes[n].tolist() for n in found.hashes}
bands = [bands_of(text, DEFAULTS).tolist() for text in texts]
print(json.dumps([seen.lines(), [rules.look(text) for text in texts], hashes, bands]))
"""


def test_another_process_decides_the_same(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(words(30)))
    texts = [*PROSE.values(), "ok", "", with_copy(20), *(repeated(n) for n in (2, 5))]
    said = set()
    for seed in ("1", "2"):
        made = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(ROOT), str(tmp_path / "a.txt")],
            input=json.dumps(texts),
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        said.add(made.stdout)
    assert len(said) == 1 and "language_en" in said.pop()


def test_without_py3langid_the_message_serves_language_and_preset(monkeypatch):
    """It is asked for by --language too, which no rule taken out would do without."""
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    measures.identifier.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'py3langid.*no language, and of preset web"):
        measures.identifier()
