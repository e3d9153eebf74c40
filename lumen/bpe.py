"""Byte-level BPE (Sennrich et al. 2016, in GPT-2's form): which merges a text asks for, and which
merge leads to a token."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from operator import add

import regex

from lumen.patterns import CL100K_PATTERN

# A run of N in a genome, of = in a log: without a limit its merges double to tokens of any length,
# seldom met again. 128 bytes hold what words, indentation and ruled lines need: the longest piece
# in the standard library has 95.
LONGEST_TOKEN = 128
# characters: a longer one is trained on in pieces, else each merge would go over all of it
LONGEST_PIECE = 1000


def learn(texts: Iterable[str], n_tokens: int, max_chars: int | None = None) -> list[bytes]:
    """The tokens in the order of their ids: 256 bytes, then merges of the texts (the first
    max_chars characters of each).

    The next merge is that of the most frequent pair, of equals the one with the smallest ids, so
    the result depends on the texts only, not on their order. Takes memory for the distinct pieces
    of the texts, not for the texts. Fewer than n_tokens where the texts have too few pairs. No
    token is longer than LONGEST_TOKEN bytes.
    """
    words = Words(count_pieces(texts, max_chars))
    pair_count = words.pair_count
    tokens = [bytes([byte]) for byte in range(256)]
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < n_tokens:
        count, pair = heapq.heappop(heap)
        # counts fall and the heap is not told, so look again when the pair comes up
        if -count != pair_count[pair]:
            if pair_count[pair] > 0:
                heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        token = tokens[ord(pair[0])] + tokens[ord(pair[1])]
        if len(token) > LONGEST_TOKEN:
            continue
        new = chr(len(tokens))
        tokens.append(token)
        for come in words.merge(pair, new):
            heapq.heappush(heap, (-pair_count[come], come))
    return tokens


def count_pieces(texts: Iterable[str], max_chars: int | None) -> Counter:
    """How often each piece occurs; long ones in parts of LONGEST_PIECE characters."""
    find = regex.compile(CL100K_PATTERN).findall
    pieces = Counter()
    for text in texts:
        pieces.update(find(text[:max_chars]))
    for piece in [piece for piece in pieces if len(piece) > LONGEST_PIECE]:
        times = pieces.pop(piece)
        for i in range(0, len(piece), LONGEST_PIECE):
            pieces[piece[i : i + LONGEST_PIECE]] += times
    return pieces


class Words:
    """The distinct pieces of a text as strings of tokens, one character each: chr(id).

    pair_count: how often two tokens stand side by side in the text, by the string of both. where:
    numbers of the words that hold, or once held, the pair.
    """

    def __init__(self, pieces: Counter):
        pair_count, where = Counter(), defaultdict(set)
        words = [piece.encode("utf-8", "replace").decode("latin-1") for piece in pieces]
        for i, (word, count) in enumerate(zip(words, pieces.values())):
            for pair in map(add, word, word[1:]):
                pair_count[pair] += count
                where[pair].add(i)
        self.counts, self.words = list(pieces.values()), words
        self.pair_count, self.where = pair_count, where

    def merge(self, pair: str, new: str) -> set[str]:
        """Both tokens become `new` wherever they stand side by side; the pairs that came up."""
        counts, words = self.counts, self.words
        pair_count, where = self.pair_count, self.where
        first, second = pair
        touched = set()
        for i in where.pop(pair):
            count = counts[i]
            between = words[i].split(pair)  # from left to right, without overlap, as BPE
            words[i] = new.join(between)
            come = []
            # pairs change beside an occurrence only
            for n, (left, right) in enumerate(zip(between, between[1:])):
                if left:
                    pair_count[left[-1] + first] -= count
                    come.append(left[-1] + new)
                elif n:  # the occurrence before it ends here
                    pair_count[second + first] -= count
                    come.append(new + new)
                if right:
                    pair_count[second + right[0]] -= count
                    come.append(new + right[0])
            for made in come:
                pair_count[made] += count
                where[made].add(i)
            touched.update(come)
        del pair_count[pair]
        return touched


def parts(token: bytes, ranks: dict) -> list[bytes]:
    """What BPE makes of the token's bytes with the ranks below its own. Two parts are the pair
    whose merge it is; more mean that no merge ever leads to it. When each merge is this pair,
    merging by rank (tiktoken) and by a list of pairs (tokenizers) are the same: before the merge's
    turn, its bytes are in just this state wherever they stand."""
    own, n = ranks[token], len(token)
    ends = list(range(1, n + 1))  # of the part that starts there
    starts = list(range(-1, n))  # of the part that ends there
    heap = [
        (rank, i, i + 2) for i in range(n - 1) if (rank := ranks.get(token[i : i + 2], own)) < own
    ]
    heapq.heapify(heap)
    # the lowest rank, of equals the first: linear but for the heap, however long the token is
    while heap:
        _, i, end = heapq.heappop(heap)
        middle = ends[i]
        # one of its parts is in another part since
        if middle is None or middle >= n or ends[middle] != end:
            continue
        ends[i], ends[middle], starts[end] = end, None, i
        for a, b in ((starts[i], end), (i, ends[end] if end < n else n)):
            if a >= 0 and b - a > end - i and (rank := ranks.get(token[a:b], own)) < own:
                heapq.heappush(heap, (rank, a, b))
    found, i = [], 0
    while i < n:
        found.append(token[i : ends[i]])
        i = ends[i]
    return found
