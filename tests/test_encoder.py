"""The tokenizer: held to tiktoken on the released and the bundled vocabulary, its merges to the plain definition."""

import itertools
import pathlib
import pickle
import random
import sys
import tracemalloc
import unicodedata

import pytest
import tiktoken
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from encoder import Encoder, bytes_to_unicode, get_encoder

TEXTS = [
    "", "Hello, world!", " one  two   three    ", "1234 5.678,90 ½ ² ٣٤ Ⅷ 一二", "👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ 😀😀",
    "'The 'Sir 'Do 'May 'Revel 'Very 'LLama 'VE 'RE 'Tis' 'tHe",
    "I'm you're he's she'll we've they'd can't 'tis IT'S I'LL 's'sss ''' don’t",
    "a \t b\t\tc\r\nd\r\n\r\n e \n\n f\u00a0\u2003g\u3000\u2028\x85h\x0b\x0c\x1c",
    "漢字かな交じり文。中文，한국어 ไทย", "שלום עולם، مرحبا بالعالم \u202eabc\u202c",
    "e\u0301 n\u0303 क्षि ğ\u0327\u0308 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A", "\0 a\0\0b \x7f\x80\x9f", "\uffff\U0010ffff\ue000\u0378",
    "<|endoftext|> a<|endoftext|>b <|endoftext|", "def f(x):\n    return x**2  # comment\n\n\n\tif x != {}: pass",
    "".join(map(chr, range(256))), "".join(bytes_to_unicode().values()), " ".join("ab" * n for n in range(30)),
]  # fmt: skip
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])  # what is unassigned is for each Unicode version to say
PIECES = ["'s", "'ll", "'", " ", "  ", "\t", "\r\n", "\n", "a", "The", "é", "漢", "1", ".", "\u200d", "\u0301", "😀"]
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
    """Ids are tiktoken's, and decoding gives the text and its bytes back."""
    ids = encoder.encode(text)
    assert ids == judge.encode_ordinary(text)
    assert encoder.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[1:20])
def test_by_hand(text, encoder, judge):
    check(text, encoder, judge)


@settings(deadline=None, max_examples=300)
@given(text=TEXT)
def test_any_text(text, encoder, judge):
    check(text, encoder, judge)


def test_every_character(encoder, judge):
    """Each assigned character is a letter, a number, a space or none of them, for both of them."""
    characters = [chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")]
    ordinary = [c for c in characters if not 0x3400 <= ord(c) < 0xD7A4 or ord(c) % 100 == 0]  # some of the ideographs
    for i in range(0, len(ordinary), 1000):
        check("".join(f"a{c}1 {c} " for c in ordinary[i : i + 1000]), encoder, judge)


LONG = {"one letter": "a" * 100_000, "spaces": " " * 2**20, "emoji": "😀" * 2**18}
LONG["letters"] = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_words(text, encoder, judge):
    """One word of 100,000 letters or a megabyte, which a method that grows as n * n would not finish."""
    check(text, encoder, judge)


def test_invalid(encoder):
    """Bytes that are not UTF-8 become U+FFFD, or an error when strict; lone surrogates and unknown ids are errors."""
    byte = encoder.encoder[bytes_to_unicode()[0xFF]]
    assert encoder.decode([byte, encoder.encode("a")[0], byte]) == "\ufffda\ufffd"
    assert encoder.decode([encoder.encoder["<|endoftext|>"]]) == "<|endoftext|>"
    with pytest.raises(UnicodeDecodeError):
        Encoder(encoder.encoder, [*encoder.bpe_ranks], errors="strict").decode([byte])
    with pytest.raises(UnicodeEncodeError):
        encoder.encode("\ud800")
    with pytest.raises(KeyError):
        encoder.decode([len(encoder.encoder)])
    with pytest.raises(ValueError, match="10.?000.?004"):  # refused for its length, before minutes are spent
        encoder.encode("no " + "a" * 10_000_003 + " word")


# ---- Merging --------------------------------------------------------------------------------------------------------


def naive_bpe(pieces, merges):
    """The definition: as long as some merge applies, take the first and join its pair everywhere, left to right."""
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
    """Merges of letters and of what the merges before them make, as training gives them."""
    pieces, merges = list("abc"), []
    for _ in range(draw(st.integers(0, 12))):
        merge = draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces))
        if "".join(merge) not in pieces:
            merges.append(merge)
            pieces.append("".join(merge))
    return merges


@settings(deadline=None, max_examples=500)
@given(merges=merge_tables(), word=st.text("abcd", max_size=40))
def test_bpe_is_the_naive_method(merges, word):
    """The heap gives what the definition gives, from pairs as from lines."""
    assert Encoder({"a": 0}, merges).bpe(word).split() == naive_bpe(word, merges)
    assert Encoder({"a": 0}, [" ".join(merge) for merge in merges]).bpe(word).split() == naive_bpe(word, merges)


def test_ids_are_the_callers():
    """What a caller does to a result does not reach a cache behind it; it can be sent to another process."""
    encoder = get_encoder("2M", ROOT / "models")
    ids = [*encoder.encode(" again")]
    encoder.encode(" again").append(0)
    assert encoder.encode(" again") == pickle.loads(pickle.dumps(encoder)).encode(" again") == ids


@pytest.mark.parametrize("words", [map(str, range(10**5, 170_000)), (chr(2**20 + i) * 50_000 for i in range(6))])
def test_what_is_remembered_is_bounded(words):
    """The words that have been met take less than 9 MB, be they many or long."""
    encoder = get_encoder("2M", ROOT / "models")
    tracemalloc.start()
    for word in words:
        encoder.encode(word)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 9e6


# ---- Parts ----------------------------------------------------------------------------------------------------------


def test_bytes_to_unicode():
    """Printable characters of Latin-1 stand for themselves, other bytes are numbered from 256 on; four by hand."""
    others = (chr(i) for i in range(256, 1000))
    expected = [chr(i) if chr(i).isprintable() and chr(i) != " " else next(others) for i in range(256)]
    assert [bytes_to_unicode()[i] for i in range(256)] == expected
    assert [bytes_to_unicode()[i] for i in b" \n\x00\xad"] == ["Ġ", "Ċ", "Ā", "Ń"]


@pytest.mark.parametrize("data", ["a🙂é漢👩‍👧 z".encode(), b"a\xff\xf0\x9f\x99\x82", b"\xf0\x9f", b"\xf0a", b"\x82"])
def test_decode_steps(encoder, data):
    """Byte by byte, each character comes with its last byte, and all together are what decode() gives."""
    ids = [encoder.encoder[bytes_to_unicode()[byte]] for byte in data]
    pieces = list(encoder.decode_steps(ids))
    assert "".join(pieces) == encoder.decode(ids) == data.decode("utf-8", "replace")
    for i in range(len(data)):
        whole = data[: i + 1].decode("utf-8", "ignore")
        assert "\ufffd" in encoder.decode(ids) or "".join(pieces[: i + 1]) == whole
