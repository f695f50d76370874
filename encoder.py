"""Byte-level byte pair encoding, GPT-2's tokenizer: text <-> token ids, without loss for any text.

Byte pair encoding for language: Sennrich et al., 2016, https://arxiv.org/abs/1508.07909. On bytes: section 2.2 of the
GPT-2 paper. What the two files hold, and how text is cut into words: src/encoder.py of https://github.com/openai/gpt-2.

text -> words (a regular expression) -> UTF-8 bytes, each written as a printable character -> the pair of neighbours
with the lowest rank in vocab.bpe is joined, again and again -> encoder.json has the id of each piece that is left.
"""

import functools
import heapq
import itertools
import json
import os

import regex

# A word keeps the space before it; contractions are split off; the last space of a run goes to the next word.
WORDS = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@functools.cache
def bytes_to_unicode():
    """The character that stands for each of the 256 bytes in the vocabulary: {byte: character}.

    A printable byte of Latin-1 stands for itself; the others, spaces among them, get the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def get_pairs(word):
    """The set of neighbours in a word, which is a sequence of pieces: "abb" -> {("a", "b"), ("b", "b")}."""
    return set(itertools.pairwise(word))


class Encoder:
    """A vocabulary {piece: id}, the merges in their order, and how decode treats invalid UTF-8.

    A merge is a pair (left, right), or "left right" as in vocab.bpe. As text it takes less time and memory to load.
    """

    def __init__(self, encoder, bpe_merges, errors="replace"):
        self.encoder = encoder
        self.decoder = {id: piece for piece, id in encoder.items()}
        self.errors = errors
        merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in bpe_merges)
        self.bpe_ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.to_unicode = bytes_to_unicode()
        self.to_byte = {ord(character): byte for byte, character in self.to_unicode.items()}
        self.longest = max(map(len, encoder))  # bytes of the longest token: no text has fewer than bytes / longest
        self.ids_of_short_word = functools.lru_cache(2**15)(self.ids_of_word)

    def rank(self, left, right):
        """The place of a merge in the list, from 0; None: there is no such merge."""
        return self.bpe_ranks.get(f"{left} {right}")

    def bpe(self, token):
        """Join the pieces of a word, given in the characters of bytes_to_unicode(): "lower" -> "low er".

        Equal to joining every occurrence of the pair of lowest rank, from left to right, until no pair has a rank; but
        a heap knows where that pair stands, so the time grows as n log n with the word's length and not as n * n.
        """
        pieces = list(token)
        before = list(range(-1, len(pieces) - 1))  # pieces[before[i]] is the left neighbour of pieces[i]
        after = list(range(1, len(pieces) + 1))  # len(pieces): none
        ranks = enumerate(map(self.rank, pieces, pieces[1:]))
        heap = [(rank, i) for i, rank in ranks if rank is not None]
        heapq.heapify(heap)
        while heap:
            rank, places = heap[0][0], []
            while heap and heap[0][0] == rank:  # all places of this pair, before the joins make new ones
                places.append(heapq.heappop(heap)[1])
            for i in places:
                j = after[i]
                if j == len(pieces) or self.rank(pieces[i], pieces[j]) != rank:
                    continue  # one of the two was joined with another piece meanwhile
                pieces[i], pieces[j], after[i] = pieces[i] + pieces[j], "", after[j]
                if after[i] < len(pieces):
                    before[after[i]] = i
                for left, right in ((before[i], i), (i, after[i])):
                    new = self.rank(pieces[left], pieces[right]) if left >= 0 and right < len(pieces) else None
                    if new is not None:
                        heapq.heappush(heap, (new, left))
        return " ".join(filter(None, pieces))

    def ids_of_word(self, word):
        characters = "".join(map(self.to_unicode.__getitem__, word.encode("utf-8")))
        return [self.encoder[piece] for piece in self.bpe(characters).split(" ")]

    def encode(self, text):
        """text -> ids. <|endoftext|> is text like any other. UnicodeEncodeError: the text holds a lone surrogate."""
        ids = []
        for word in WORDS.findall(text):
            ids += self.ids_of_short_word(word) if len(word) < 64 else self.ids_of_word(word)
        return ids

    def decode_bytes(self, ids):
        """ids -> bytes; those of one token need not be whole characters. KeyError: no such id."""
        return bytes(self.to_byte[ord(c)] for id in ids for c in self.decoder[id])

    def decode(self, ids):
        """ids -> text. KeyError: no such id."""
        return self.decode_bytes(ids).decode("utf-8", errors=self.errors)


def get_encoder(model_name, models_dir):
    """The Encoder of the model in models_dir/model_name. ValueError: encoder.json or vocab.bpe is damaged."""
    path, name = os.path.join(models_dir, model_name), "encoder.json"
    try:
        with open(os.path.join(path, name), encoding="utf-8") as f:
            encoder = json.load(f)
        if sorted(encoder.values()) != list(range(len(encoder))) or set(map(type, encoder.values())) != {int}:
            raise ValueError("the ids are not 0, 1, 2, …")
        name = "vocab.bpe (or encoder.json)"
        with open(os.path.join(path, "vocab.bpe"), encoding="utf-8") as f:
            text = f.read().partition("\n")[2].rstrip("\n")  # the first line names the version
        merges = text.split("\n")  # "left right"
        ids = {encoder[piece] for piece in (*bytes_to_unicode().values(), "<|endoftext|>")}
        ids.update(map(encoder.__getitem__, text.replace(" ", "").split("\n")))  # a token of its own for each merge
        one_space = {merge.count(" ") for merge in merges} == {1}
        if not (one_space and len(ids) == 257 + len(merges) == len(encoder)):
            raise ValueError("they do not fit each other")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{os.path.join(path, name)} is damaged ({type(error).__name__}: {error})") from None
    return Encoder(encoder, merges)
