"""The tokenizer: held to tiktoken on the released and the bundled vocabulary, and its merges to the plain definition."""

import itertools
import pathlib
import random
import sys
import unicodedata

import pytest
import tiktoken
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from encoder import Encoder, bytes_to_unicode, get_encoder, get_pairs

TEXTS = [
    "",
    "Hello, world!",
    "I'm you're he's she'll we've they'd can't 'tis IT'S I'LL 's'sss ''' don’t",
    " one  two   three    ",
    "a \t b\t\tc\r\nd\r\n\r\n e \n\n f\u00a0\u2003g\u3000\u2028\x85h\x0b\x0c\x1c",
    "1234 5.678,90 ½ ² ٣٤ Ⅷ 一二",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ 😀😀",
    "漢字かな交じり文。中文，한국어 ไทย",
    "שלום עולם، مرحبا بالعالم \u202eabc\u202c",
    "e\u0301 n\u0303 क्षि ğ\u0327\u0308 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A",
    "\0 a\0\0b \x7f\x80\x9f",
    "<|endoftext|> a<|endoftext|>b <|endoftext|",
    "def f(x):\n    return x**2  # comment\n\n\n\tif x != {}: pass",
    "".join(map(chr, range(256))),
    "".join(bytes_to_unicode().values()),
    "\uffff\U0010ffff\ue000\u0378",
]
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])  # what is unassigned is for each Unicode version to say
PIECES = [
    "'s",
    "'ll",
    "'",
    " ",
    "  ",
    "\t",
    "\r\n",
    "\n",
    "a",
    "The",
    "é",
    "漢",
    "1",
    ".",
    "!?",
    "\u200d",
    "\u0301",
    "😀",
]
TEXT = st.text(CHARACTERS) | st.lists(st.sampled_from(PIECES) | st.text(CHARACTERS, max_size=3)).map("".join)


@pytest.fixture(scope="module", params=["released", "2M"])
def folder(request, vocabulary):
    return vocabulary if request.param == "released" else ROOT / "models/2M"


@pytest.fixture(scope="module")
def encoder(folder):
    return get_encoder(folder.name, folder.parent)


@pytest.fixture(scope="module")
def judge(folder):
    """tiktoken on the same two files, with its own pattern for GPT-2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiktoken.load.read_file_cached", lambda path, *_: pathlib.Path(path).read_bytes())
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding(folder.name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def check(text, encoder, judge):
    ids = encoder.encode(text)
    assert ids == judge.encode_ordinary(text)
    assert encoder.decode(ids) == text
    assert encoder.decode_bytes(ids) == text.encode()
    assert len(ids) * encoder.longest >= len(text)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[1:20])
def test_by_hand(text, encoder, judge):
    """Ids are tiktoken's, and decoding gives the text and its bytes back."""
    check(text, encoder, judge)


@settings(deadline=None, max_examples=300)
@given(text=TEXT)
def test_any_text(text, encoder, judge):
    """The same on whatever hypothesis comes up with."""
    check(text, encoder, judge)


def test_every_character(encoder, judge):
    """Each assigned character is a letter, a number, a space or none of them for both (between a letter and a digit)."""
    characters = [chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")]
    ordinary = [c for c in characters if not 0x3400 <= ord(c) < 0xD7A4 or ord(c) % 100 == 0]  # some of the ideographs
    for i in range(0, len(ordinary), 1000):
        check("".join(f"a{c}1 {c} " for c in ordinary[i : i + 1000]), encoder, judge)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000)), id="letters"),
        pytest.param("a" * 100_000, id="a"),
        pytest.param(" " * 2**20, id="spaces"),
        pytest.param("😀" * 2**18, id="emoji"),
    ],
)
def test_long_words(text, encoder, judge):
    """One word of 100,000 letters or a megabyte, which a method that grows as n * n would not finish."""
    check(text, encoder, judge)


def test_invalid(encoder):
    """Bytes that are no UTF-8 become U+FFFD, or an error when strict; lone surrogates and unknown ids are errors."""
    byte = encoder.encoder[bytes_to_unicode()[0xFF]]
    assert encoder.decode([byte, encoder.encode("a")[0], byte]) == "\ufffda\ufffd"
    assert encoder.decode_bytes([byte]) == b"\xff"
    assert encoder.decode([encoder.encoder["<|endoftext|>"]]) == "<|endoftext|>"
    with pytest.raises(UnicodeDecodeError):
        Encoder(encoder.encoder, encoder.bpe_ranks, errors="strict").decode([byte])
    with pytest.raises(UnicodeEncodeError):
        encoder.encode("\ud800")
    with pytest.raises(KeyError):
        encoder.decode([len(encoder.encoder)])


# ---- Merging --------------------------------------------------------------------------------------------------------


def naive_bpe(pieces, merges):
    """The definition: as long as some merge applies, take the first such and join its pair everywhere, left to right."""
    pieces = list(pieces)
    while applying := [merge for merge in merges if merge in itertools.pairwise(pieces)]:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == applying[0]:
                pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
            i += 1
    return pieces


@st.composite
def merge_tables(draw):
    """Merges of letters and of what other merges make, in any order: what a merge needs may come after it."""
    pieces, merges = list("abc"), []
    for _ in range(draw(st.integers(0, 12))):
        merge = draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces))
        if merge not in merges:
            merges.append(merge)
            pieces.append("".join(merge))
    return draw(st.permutations(merges))


@settings(deadline=None, max_examples=500)
@given(merges=merge_tables(), word=st.text("abcd", max_size=40))
def test_bpe_is_the_naive_method(merges, word):
    """On any table, also one that no training would give."""
    assert Encoder({"a": 0}, merges).bpe(word).split() == naive_bpe(word, merges)


@pytest.mark.parametrize(
    "merges, word, expected",
    [
        ([], "abc", "a b c"),
        ([("a", "a")], "aaaaa", "aa aa a"),
        ([("ab", "c"), ("b", "c"), ("a", "b")], "abc", "a bc"),
        ([("ab", "ab"), ("a", "b")], "abababa", "abab ab a"),
        ([("aa", "a"), ("a", "a")], "aaaaa", "aa aaa"),  # all pairs of "a" are joined before "aa" and "a" are
        ([("a", "b"), ("b", "a")], "bab", "b ab"),
        ([("b", "c"), ("a", "bc"), ("a", "b")], "abcab", "abc ab"),
        (["N o", "n e", "No ne", "t h", "X None", "None th"], "XNoneth", "XNone th"),  # as lines; a piece named "None"
    ],
)
def test_bpe_by_hand(merges, word, expected):
    """Cases worked out on paper, which the naive method must give too."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
    assert Encoder({"a": 0}, merges).bpe(word) == expected == " ".join(naive_bpe(word, pairs))


class Counting(dict):
    """A dict that counts how often it is asked."""

    asked = 0

    def __contains__(self, key):
        self.asked += 1
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked += 1
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked += 1
        return super().get(key, default)


@pytest.mark.parametrize("letters", ["a", " ", "abcdefghijklmnopqrstuvwxyz"])
def test_work_grows_with_the_length(letters, folder):
    """The merge table is asked as often per letter in a word of 100,000 letters as in one of 1,000."""

    def asked_per_letter(length):
        encoder = get_encoder(folder.name, folder.parent)
        encoder.bpe_ranks = Counting(encoder.bpe_ranks)
        encoder.encode("".join(random.Random(0).choices(letters, k=length)))
        return encoder.bpe_ranks.asked / length

    assert 0.5 < asked_per_letter(100_000) < 1.2 * asked_per_letter(1_000)


def test_cache_is_bounded(folder):
    """The cache of words helps with short words and neither grows beyond its size nor keeps long words."""
    encoder = get_encoder(folder.name, folder.parent)
    info = encoder.ids_of_short_word.cache_info
    encoder.encode("again again again")
    assert (info().hits, info().currsize) == (1, 2)  # "again", " again" twice
    encoder.encode("a" * 1000)
    assert info().currsize == 2
    encoder.encode(" ".join(map(str, range(40_000))))
    assert 2 < info().currsize == info().maxsize <= 2**16


def test_ids_are_the_callers(encoder):
    """What a caller does to a result does not reach the cache behind it."""
    ids = encoder.encode(" again")
    encoder.encode(" again").append(0)
    assert encoder.encode(" again") == ids


# ---- Parts ----------------------------------------------------------------------------------------------------------


def test_bytes_to_unicode():
    """Printable characters of Latin-1 stand for themselves, the other bytes are numbered from 256 on; OpenAI's examples."""
    others = (chr(i) for i in range(256, 1000))
    expected = [chr(i) if chr(i).isprintable() and chr(i) != " " else next(others) for i in range(256)]
    assert [bytes_to_unicode()[i] for i in range(256)] == expected
    assert [bytes_to_unicode()[i] for i in b" \n\x00\xad"] == ["Ġ", "Ċ", "Ā", "Ń"]


@pytest.mark.parametrize("word", ["", "a", "ab", "abab", "aaa", ("lo", "w", "er", "lo", "w")], ids=repr)
def test_get_pairs(word):
    """All neighbours, in their order."""
    assert get_pairs(word) == {(word[i], word[i + 1]) for i in range(len(word) - 1)}
