"""GPT-2's tokenizer, byte-level byte pair encoding (BPE): text to token ids and back, without loss for any text.

BPE for text is from Sennrich et al., 2016 (https://arxiv.org/abs/1508.07909); on bytes, from section 2.2 of the GPT-2
paper. The file formats and the rule for words are those of src/encoder.py in https://github.com/openai/gpt-2.

    "the kindest"  -> words       "the", " kindest"
                   -> characters  "the", "Ġkindest"         one for each byte; Ġ stands for the space
                   -> pieces      "the", "Ġkind", "est"     neighbours joined, in the order of vocab.bpe
                   -> ids         1169,  1611,    395       from encoder.json
"""

import codecs
import heapq
import json
import os
from pathlib import Path

import regex

# A word is an ending such as 's or 'll, or a run of letters, digits or other signs, with the space before it if there
# is one, or a run of white space (but for the space that goes with the next word).
WORDS = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def bytes_to_unicode():
    """The character that stands for each of the 256 bytes: {byte: character}.

    In vocab.bpe a line is a merge, two pieces with a space between, so no piece may contain a space or a line end. A
    byte that can be printed stands for itself (in Latin-1), the other 68 get characters from 256 on: "Ġ" is the space.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Encoder:
    """A tokenizer made from its vocabulary.

    encoder is {piece: id}. bpe_merges are the pairs of pieces to join, as ("l", "ow") or as "l ow", in the order in
    which they were learned: each time the most frequent pair of a training text. errors is as in bytes.decode().
    """

    def __init__(self, encoder, bpe_merges, errors="replace"):
        self.encoder = encoder
        self.decoder = dict(zip(encoder.values(), encoder))  # {id: piece}
        self.errors = errors
        if bpe_merges and not isinstance(bpe_merges[0], str):
            bpe_merges = [" ".join(merge) for merge in bpe_merges]
        self.bpe_ranks = dict(zip(bpe_merges, range(len(bpe_merges))))  # {"l ow": its place in the list}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        self.cache = {}  # {word: its ids}, since most words of a text come again

    def rank(self, left, right):
        """The place of a merge in the list, from 0, or None if there is no such merge."""
        return self.bpe_ranks.get(f"{left} {right}")

    def bpe(self, token):
        """Split a word, written in the characters of bytes_to_unicode(), into its pieces: "lower" -> "low er".

        Start with single characters. Of all neighbours that may be joined, join the pair that was learned first (the
        leftmost, if it is there more than once). Repeat until no two neighbours may be joined. To search the whole word
        for that pair after every join takes n * n steps; with a heap (a sorted list is one) it takes n log n.
        """
        pieces = [*token, ""]  # l o w and an empty piece, which marks the end and is in no merge
        after = [*range(1, len(pieces)), 0]  # 1 2 3 0, a ring: the right neighbour of pieces[i] is pieces[after[i]]
        before = [*range(-1, len(token))]  # -1 0 1 2: the left one is pieces[before[i]]; pieces[-1] is the end piece
        heap = sorted((rank, i) for i, rank in enumerate(map(self.rank, pieces, pieces[1:])) if rank is not None)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if self.rank(pieces[i], pieces[j]) != rank:
                continue  # out of date: one of the two has grown or been swallowed (it is "" then) since
            pieces[i], pieces[j] = pieces[i] + pieces[j], ""
            after[i] = after[j]
            before[after[j]] = i
            for left in (before[i], i):  # the joined piece makes a new pair with each neighbour
                rank = self.rank(pieces[left], pieces[after[left]])
                if rank is not None:
                    heapq.heappush(heap, (rank, left))
        return " ".join(piece for piece in pieces if piece)

    def encode_word(self, word):
        if word in self.cache:
            return self.cache[word]
        if len(word) > 2**21:  # this many take 6 seconds and 0.7 GB
            raise ValueError(f"a word of {len(word):,} characters is too long to be split")
        characters = "".join(self.byte_encoder[byte] for byte in word.encode("utf-8"))
        ids = [self.encoder[piece] for piece in self.bpe(characters).split(" ")]
        if len(ids) < 16 and len(self.cache) < 2**15:  # ten megabytes at most
            self.cache[word] = ids
        return ids

    def encode(self, text):
        """text -> ids; "<|endoftext|>" is split like any text. ValueError: a word of megabytes, or a lone surrogate."""
        return [id for word in WORDS.findall(text) for id in self.encode_word(word)]

    def decode_steps(self, ids):
        """ids -> pieces of text. A character that is split over several tokens comes with the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        for id in ids:
            yield decoder.decode(bytes(self.byte_decoder[character] for character in self.decoder[id]))
        yield decoder.decode(b"", final=True)

    def decode(self, ids):
        """ids -> text. Raises KeyError for an unknown id."""
        return "".join(self.decode_steps(ids))


def get_encoder(model_name, models_dir):
    """The Encoder of models_dir/model_name. Raises OSError or ValueError if its two files cannot be read."""
    folder = Path(os.path.expanduser(models_dir)) / model_name
    encoder = json.loads((folder / "encoder.json").read_bytes())
    merges = (folder / "vocab.bpe").read_text("utf-8").splitlines()[1:]  # the first line is the file's version
    return Encoder(encoder, merges)
