"""The tokenizer: held to tiktoken on the released and the bundled vocabulary, its merges to the plain definition."""

import pickle
import random
import tracemalloc

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder import Encoder, bytes_to_unicode, get_encoder

TEXTS = {
    "nothing": "", "spaces": " one  two   three    ", "numbers": "1234 5.678,90 .½'s ² ٣٤ Ⅷ 一二",
    "endings": "I'm you're he's she'll we've they'd can't 'tis IT'S I'LL 's'sss ''' don\u2019t",
    "no endings": "'The 'Sir 'Do 'May 'Revel 'Very 'LLama 'VE 'RE 'Tis' 'tHe",
    "white space": "a \t b\t\tc\r\nd\r\n\r\n e \n\n f\u00a0\u2003g\u3000\u2028\x85h\x0b\x0c\x1c",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ 😀😀", "no spaces": "漢字かな交じり文。中文\uff0c한국어 ไทย",
    "right to left": "שלום עולם، مرحبا بالعالم \u202eabc\u202c",
    "combining": "e\u0301's n\u0303 क्षि ğ\u0327\u0308 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A", "control": "\0 a\0\0b \x7f\x80\x9f",
    "unassigned": "\uffff\U0010ffff\ue000\u0378", "end of text": "<|endoftext|> a<|endoftext|>b <|endoftext|",
    "code": "def f(x):\n    return x**2  # comment\n\n\n\tif x != {}: pass", "the last merge": " gazed",
    "all bytes": "".join(map(chr, range(256))) + "".join(bytes_to_unicode().values()),
    "a word for which n * n steps take for ever": "".join(random.Random(0).choices("abcdefghijklm", k=100_000)),
    "a megabyte of spaces": " " * 2**20, "a megabyte of emoji": "😀" * 2**18,
}  # fmt: skip
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])  # what is unassigned is for each Unicode version to say
PIECES = ["'s", "'ll", "'", " ", "  ", "\t", "\r\n", "\n", "a", "The", "é", "漢", "1", ".", "\u200d", "\u0301", "😀"]
TEXT = st.text(CHARACTERS) | st.lists(st.sampled_from(PIECES) | st.text(CHARACTERS, max_size=3)).map("".join)
SMALL = get_encoder("2M", ROOT / "models")


@pytest.fixture(scope="module", params=["released", "2M"])
def check(request):
    """Ids are those of tiktoken on the same two files, and decoding gives the text back."""
    tiktoken, public = pytest.importorskip("tiktoken"), pytest.importorskip("tiktoken_ext.openai_public")
    folder = request.getfixturevalue("vocabulary") if request.param == "released" else ROOT / "models/2M"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # without this it would keep a copy and read that the next time
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    judge = tiktoken.Encoding("judge", pat_str=public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    encoder = get_encoder(folder.name, folder.parent)

    def check(text):
        ids = encoder.encode(text)
        assert ids == judge.encode_ordinary(text)
        assert encoder.decode(ids) == text

    return check


@pytest.mark.parametrize("name", TEXTS)
def test_by_hand(name, check):
    check(TEXTS[name])


@settings(deadline=None, max_examples=300)
@given(text=TEXT)
def test_any_text(text, check):
    check(text)


def test_invalid():
    """Bytes that are not UTF-8 become U+FFFD, or an error when strict; lone surrogates and unknown ids are errors."""
    byte, end = SMALL.encoder[bytes_to_unicode()[0xFF]], SMALL.encoder["<|endoftext|>"]
    assert SMALL.decode([byte, end, byte]) == "\ufffd<|endoftext|>\ufffd"
    with pytest.raises(UnicodeDecodeError):
        Encoder(SMALL.encoder, [*SMALL.bpe_ranks], errors="strict").decode([byte])
    with pytest.raises(UnicodeEncodeError):
        SMALL.encode("\ud800")
    with pytest.raises(KeyError):
        SMALL.decode([len(SMALL.encoder)])
    with pytest.raises(ValueError, match=r"10.?000.?004"):  # refused for its length, before minutes are spent
        SMALL.encode("no " + "a" * 10_000_003 + " word")


@settings(deadline=None, max_examples=500)
@given(dice=st.randoms())
def test_bpe_is_the_naive_method(dice):
    """As long as some merge applies, take the first and join its pair everywhere, left to right."""
    known, merges = list("abc"), []
    for _ in range(dice.randint(0, 20)):  # a merge joins letters, or what the merges before it make
        merge = dice.choice(known), dice.choice(known)
        if "".join(merge) not in known:
            merges.append(merge)
            known.append("".join(merge))
    word = "".join(dice.choices(known, k=8))
    pieces = list(word)
    while applying := [merge for merge in merges if merge in zip(pieces, pieces[1:])]:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == applying[0]:
                pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
            i += 1
    for given_as in merges, [" ".join(merge) for merge in merges]:  # pairs, lines
        assert Encoder({"a": 0}, given_as).bpe(word).split() == pieces


def test_ids_are_the_callers():
    """What a caller does to a result does not reach a cache behind it; it can be sent to another process."""
    ids = [*SMALL.encode(" again")]
    SMALL.encode(" again").append(0)
    assert SMALL.encode(" again") == pickle.loads(pickle.dumps(SMALL)).encode(" again") == ids


def test_a_vocabulary_of_120_000():
    large = Encoder({**SMALL.encoder, **{f"<{i}>": i for i in range(2048, 120_000)}}, [*SMALL.bpe_ranks])
    assert large.decode([*large.encode("Once"), 119_999]) == "Once<119999>"


def test_what_is_remembered_is_bounded():
    """Of a text with long words and with very many, less than 9 MB stay in memory."""
    words = [*(chr(2**20 + i) * 50_000 for i in range(6)), *map(str, range(100_000, 170_000))]
    encoder, text = get_encoder("2M", ROOT / "models"), " ".join(words)
    tracemalloc.start()
    encoder.encode(text)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 9e6


STEPS = {  # bytes: what comes with each of them and at the end
    "whole": ("a🙂é".encode(), ["a", "", "", "", "🙂", "", "é", ""]),
    "broken": (b"a\xff\xf0\x9fb\xf0\x9f", ["a", "\ufffd", "", "", "\ufffdb", "", "", "\ufffd"]),
}


@pytest.mark.parametrize("name", STEPS)
def test_decode_steps(name):
    """A character comes with the token of its last byte; here each byte is a token."""
    data, pieces = STEPS[name]
    assert [*SMALL.decode_steps(SMALL.encoder[bytes_to_unicode()[byte]] for byte in data)] == pieces
