"""The tokenizer among threads."""
import threading
from concurrent.futures import ThreadPoolExecutor

from inputs import tokenizer

TOK = tokenizer.train_vocab(["a cat and a dog, number 0123456789"], 200)


class Interrupted(dict):
    """A cache at whose first look-up another thread gets its turn, before the answer is used."""
    def __init__(self, words, other):
        super().__init__(words)
        self.other = other

    def turn(self):
        if other := self.other:
            self.other = None
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    def __contains__(self, word):
        found = super().__contains__(word)
        self.turn()
        return found

    def get(self, word, default=None):
        found = super().get(word, default)
        self.turn()
        return found


def test_a_full_cache_is_emptied_while_another_thread_reads_it(monkeypatch):
    monkeypatch.setattr(tokenizer, "MOST_KNOWN", 9, raising=False)
    tok = tokenizer.from_state(TOK.state)
    wanted = tok.encode_pieces("cat")

    words = {f"w{n}": [9] for n in range(1 << 17)} | {"cat": wanted}
    tok.known = Interrupted(words, lambda: tok.encode_pieces("new"))
    assert tok.encode_pieces("cat") == wanted
    assert len(tok.known) < 100  # emptied it was


def test_many_threads_give_the_ids_of_one(monkeypatch):
    monkeypatch.setattr(tokenizer, "MOST_KNOWN", 20, raising=False)
    texts = [f"a cat {n % 37} and dog {n % 91}" for n in range(4000)]
    plain = [TOK.encode_pieces(text) for text in texts]
    tok = tokenizer.from_state(TOK.state)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tok.encode_pieces, texts)) == plain
    assert len(tok.known) <= 20 + 8  # a word of each thread may come on top
