"""Requests in sixteen languages, drawn from templates, with the labels that the profiler's classifier learns.

assets/templates/ has a file for each language, written for this project. `train` and `held_out` share no template and
no word that fills one; `natural` has whole requests.
"""

import random
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from policies.profiling.classifier import LANGUAGES
from policies.profiling.features import KINDS

FOLDER = Path(__file__).parent / "templates"
TRAIN, HELD_OUT, NATURAL = "train", "held_out", "natural"

_SLOT = re.compile(r"\{(topic|word|text|to|code|n|letters|digits|expr|passage)\}")
_LATIN = re.compile(r"[A-Za-z]")
CODE = {
    TRAIN: (
        "def area(r):\n    return 3.14 * r ** 2",
        "for (int i = 0; i < 10; i++) { sum += a[i]; }",
        "SELECT name FROM users WHERE age > 30;",
        "const total = items.reduce((a, b) => a + b, 0);",
        "class Stack:\n    def push(self, x):\n        self.items.append(x)",
        '#include <stdio.h>\nint main() { printf("%d\\n", x); return 0; }',
        'fn main() {\n    let v = vec![1, 2, 3];\n    println!("{:?}", v);\n}',
        'while read line; do echo "$line"; done < file.txt',
        "try:\n    x = int(s)\nexcept ValueError:\n    x = None",
        'public static void main(String[] args) { System.out.println("hi"); }',
        "Traceback (most recent call last):\nValueError: invalid literal for int(): 'a'",
        "KeyError: 'name'",
        'Exception in thread "main" java.lang.NullPointerException at Main.java:12',
        "error: expected ';' before '}' token",
        "IndexError: list index out of range",
        "import numpy as np\n# 计算平均值\nprint(np.mean(values))",
        "func add(a int, b int) int {\n\treturn a + b // сумма\n}",
    ),
    HELD_OUT: (
        "let xs = [3, 1, 2];\nxs.sort();\nconsole.log(xs);",
        "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)",
        "UPDATE orders SET paid = 1 WHERE id = 7;",
        "template <typename T> T biggest(T a, T b) { return a > b ? a : b; }",
        "import os\nfor f in os.listdir('.'):  # 列出文件\n    print(f)",
    ),
}
SOUNDS = {
    TRAIN: (
        "ok",
        "hm",
        "???",
        "...",
        "!!!",
        "😀",
        "👍👍",
        "❤️",
        "🎉🎉🎉",
        "asdf",
        "xx",
        "😂",
        "🙏",
        ":)",
    ),
    HELD_OUT: ("hmm", "??", "…", "😎", "👏", "💙", "qwe", "🤔🤔", ";-)"),
}


@dataclass(frozen=True)
class LabelledRequest:
    """A request with its labels.

    text: what the user writes.
    language: of the template, one of LANGUAGES.
    template: as its file has it; "" where there is none.
    kind: one of features.KINDS.
    care, haste: whether it asks for accuracy, asks for speed.
    """

    text: str
    language: str
    template: str
    kind: str
    care: bool = False
    haste: bool = False


@cache
def lines(language: str, part: str) -> Mapping[str, tuple[str, ...]]:
    """The lines of one part of a language's file, by their name; each line once."""
    sections = tomllib.loads((FOLDER / f"{language}.toml").read_text())
    return {
        name: tuple(
            line.replace(r"\n", "\n") for line in text.splitlines() if line.strip()
        )
        for name, text in sections[part].items()
    }


def natural() -> list[LabelledRequest]:
    """The whole requests of all languages; those that ask for accuracy or speed have the kind ""."""
    return [
        LabelledRequest(
            text,
            language,
            "",
            name if name in KINDS else "",
            care=name == "care",
            haste=name == "haste",
        )
        for language in LANGUAGES
        for name, texts in lines(language, NATURAL).items()
        for text in texts
    ]


def templates(part: str) -> list[tuple[str, str, str]]:
    """Language, kind and template of all templates of a part."""
    return [
        (language, kind, template)
        for language in LANGUAGES
        for kind in KINDS
        for template in lines(language, part)[kind]
    ]


def draw(
    rng: random.Random, language: str, kind: str, template: str, part: str
) -> LabelledRequest:
    """A request from a template, with wishes, greetings and the ways in which people write."""
    # what is translated is often in another language than the request; otherwise that is rare
    other = 0.5 if kind == "translation" else 0.125
    words = rng.choice(LANGUAGES) if rng.random() < other else language
    text = _filled(rng, template, language, words, part)
    if kind == "question" and rng.random() < 0.12:
        text = _with_options(rng, text, words, part)
    if kind == "other" and rng.random() < 0.15:
        text = rng.choice(SOUNDS[part])
    own = lines(language, part)
    found = LabelledRequest(text, language, template, kind)
    if kind != "other":
        found = _with_wishes(rng, found, own)
    if rng.random() < 0.12:
        found = replace(found, text=f"{rng.choice(own['hello'])} {found.text}")
    return replace(found, text=_as_typed(rng, found.text))


def _filled(
    rng: random.Random, template: str, language: str, words: str, part: str
) -> str:
    values = lines(words, part)

    def fill(slot: re.Match[str]) -> str:
        name = slot.group(1)
        if name == "to":
            return rng.choice(lines(language, part)["to"])
        if name == "code":
            return _code(rng, part)
        if name == "passage":
            sentences = rng.choices(values["text"], k=rng.randint(0, 8))
            return " ".join(sentences) or "..."
        if name in values:
            return rng.choice(values[name])
        return _generated(rng, name)

    return _SLOT.sub(fill, template)


def _code(rng: random.Random, part: str) -> str:
    code = rng.choice(CODE[part])
    return f"\n```\n{code}\n```" if rng.random() < 0.5 else f"\n{code}"


def _number(rng: random.Random) -> str:
    number = rng.randrange(10 ** rng.randint(1, 4))
    return f"{number / 10:.1f}" if rng.random() < 0.06 else str(number)


def _generated(rng: random.Random, name: str) -> str:
    """Numbers and letters, which no language has."""
    if name == "n":
        return _number(rng)
    if name == "letters":
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9)))
    if name == "digits":
        mark = rng.choice((" ", ", "))
        return mark.join(_number(rng) for _ in range(rng.randint(4, 8)))
    space = rng.choice(("", " "))
    signs = rng.choices("+-*/×÷^", k=rng.randint(1, 3))
    return _number(rng) + "".join(f"{space}{s}{space}{_number(rng)}" for s in signs)


def _with_options(rng: random.Random, text: str, words: str, part: str) -> str:
    values = lines(words, part)
    options = rng.choices(values["topic"] + values["word"] + values["text"], k=4)
    if rng.random() < 0.25:
        options = [_number(rng) for _ in options]
    mark = rng.choice(("{}. ", "{}) ", "({}) ", "{}: "))
    return text + "".join(
        f"\n{mark.format(letter)}{option}"
        for letter, option in zip("ABCD", options, strict=True)
    )


def _with_wishes(
    rng: random.Random, found: LabelledRequest, own: Mapping[str, tuple[str, ...]]
) -> LabelledRequest:
    for name in ("care", "haste"):
        if rng.random() < 0.2:
            wish = rng.choice(own[name])
            text = f"{found.text} {wish}"
            if rng.random() < 0.5:
                if rng.random() < 0.3:
                    wish = re.sub(r"[.!。]+$", ":", wish)
                text = f"{wish} {found.text}"
            found = replace(found, text=text, **{name: True})
    return found


def _as_typed(rng: random.Random, text: str) -> str:
    """The text as some people type: without capitals, accents or full stops, with a slip, or without a word."""
    words = text.split(" ")
    if rng.random() < 0.3 and len(words) > 3:
        words.pop(rng.randrange(len(words)))
        text = " ".join(words)
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.1:
        text = re.sub(r"[.!?。؟？।]+$", "", text)
    if rng.random() < 0.08 and _LATIN.search(text):
        parts = unicodedata.normalize("NFD", text)
        bare = "".join(c for c in parts if not 0x300 <= ord(c) <= 0x36F)
        text = unicodedata.normalize("NFC", bare)
    if rng.random() < 0.08 and len(text) > 8:
        at = rng.randrange(len(text) - 1)
        text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text
