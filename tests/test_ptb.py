import json
from pathlib import Path

import pytest

from eval.ptb import words

# What the Java tokenizer of the protocol makes of each text, punctuation dropped.
SEEN = {
    "A man's dogs' ball isn't in the U.S.": "a man 's dogs ball is n't in the u.s.",
    "I'm sure they've said we'd won't CAN'T": "i 'm sure they 've said we 'd wo n't ca n't",
    "cannot gonna gotta wanna-be 'twas 'em": "can not gon na got ta wanna-be 't was 'em",
    "o'clock O'Brien y'all rock'n'roll ma'am": "o'clock o'brien y' all rock 'n' roll ma'am",
    "“It’s” – ‘fine’… don`t": "it 's fine do n`t",
    "(a) [b] {c} what?! yes!! no?": "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- what ?! yes !! no",
    "Mr. Smith, Dr. No. 5 on the st. near Main Ave.": "mr. smith dr. no. 5 on the st. near main ave.",
    "no. The end, on plan b. The man and b. the": "no the end on plan b the man and b. the",
    "LA. la. Pa. pa. etc. wow.,": "la. la pa. pa etc. wow.",
    "at 10:30 a.m. 1,000 x 3.5 = 1/2 of 50% $5 #1": "at 10:30 a.m. 1,000 x 3.5 = 1/2 of 50 % $ 5 # 1",
    "the '70s, 1950's, '99, 4-year-old 2nd-floor": "the '70s 1950 's 99 4-year-old 2nd-floor",
    "black/white w/ AT&T b&w half-eaten- a": "black/white w / at&t b & w half-eaten a",
    "fork.A knife cat,dog cat;dog a--b": "fork.a knife cat dog cat dog a b",
    "<unk> me@there.com http://a.b/c *** ½ cup £5": "<unk> me@there.com http://a.b/c *** 1/2 cup # 5",
    "grey colour\ntheatre  naïve": "grey colour theatre naïve",
    "": "",
    " . , -- ' \" ": "",
}


@pytest.mark.parametrize("text", SEEN, ids=repr)
def test_words_as_the_java_tokenizer_was_seen_to_split_them(text):
    assert " ".join(words(text)) == SEEN[text]


def test_words_of_known_captions():
    data = json.loads((Path(__file__).parent / "golden" / "caption_fakecap129.json").read_text())
    for key in map(str, data["images"]):
        assert [" ".join(words(text)) for text in data["refs"][key]] == data["tok_refs"][key]
        assert [" ".join(words(data["hyps"][key]))] == data["tok_hyps"][key]
