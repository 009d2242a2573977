"""Generated tasks whose answers a program can check.

The three models that calculate are trained on these tasks, the demo streams them, and the tests use them as ground
truth. What a language model can do is in talk.py.

A task is a question in words. `reply` writes the answer that a model of a given size is trained to give: `nano`
answers directly, `small` writes the steps of three medium kinds, `large` writes the steps of all medium and hard kinds.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

EASY = ("add", "compare", "copy", "initial")
MEDIUM = ("count", "reverse", "sort", "sum")
HARD = ("chain", "multiply", "story")
KINDS = EASY + MEDIUM + HARD

SIZES = ("nano", "small", "large")
# kinds that a size answers step by step
WORKED: dict[str, tuple[str, ...]] = {
    "nano": (),
    "small": ("count", "reverse", "sum"),
    "large": MEDIUM + HARD,
}

LETTERS = "abcdefghijklmnopqrstuvwxyz"
THINGS = ("apples", "books", "coins", "eggs", "pens", "shells")
NAMES = ("Ann", "Bob", "Eve", "Kim", "Max", "Tom")
# words before a question, from which the profiler reads urgency and care
WISHES = (
    "",
    "",
    "",
    "Please be exact. ",
    "This must be right. ",
    "Take care and check it. ",
    "Quick: ",
    "As fast as you can: ",
    "Hello! ",
)


RESERVED_SHARE = 10  # one question in so many is reserved for calibration


@dataclass(frozen=True)
class Task:
    """A question with its answer.

    kind: one of KINDS.
    question: the prompt of the user.
    answer: the only right answer, without surrounding words.
    numbers, text: operands of the question, for the worked reply.
    rule: a regular expression that the whole right reply matches in any case; "" if the reply ends in the answer.
    """

    kind: str
    question: str
    answer: str
    numbers: tuple[int, ...] = ()
    text: str = ""
    rule: str = ""


def is_reserved(question: str) -> bool:
    """Whether a question, without words of urgency or care, is reserved for calibration."""
    digest = blake2b(question.encode(), digest_size=4).digest()
    return int.from_bytes(digest) % RESERVED_SHARE == 0


def make_task(
    rng: random.Random,
    kind: str | None = None,
    wishes: bool = True,
    reserved: bool = False,
) -> Task:
    """Draw a task.

    Every question is either reserved for calibration or not. So the bundled prompts for calibration share no question
    with any stream of tasks, whatever its seed. A question of the wrong sort is replaced by one that depends on its
    text alone: the tasks after it stay the same.

    Args:
        rng: draws the task.
        kind: one of KINDS; by default a random one.
        wishes: add words of urgency or care to some questions.
        reserved: draw a task whose question is reserved.
    """
    task = draw(rng, _MAKERS[kind or rng.choice(KINDS)], reserved)
    wish = rng.choice(WISHES) if wishes else ""
    return Task(task.kind, wish + task.question, task.answer, task.numbers, task.text)


def draw(
    rng: random.Random, maker: Callable[[random.Random], Task], reserved: bool
) -> Task:
    """A task of this maker whose question is reserved, or is not."""
    task = maker(rng)
    other = random.Random(task.question)
    while is_reserved(task.question) != reserved:
        task = maker(other)
    return task


def level_of(kind: str) -> str:
    """Difficulty of a kind: `easy`, `medium` or `hard`."""
    if kind in EASY:
        return "easy"
    if kind in HARD:
        return "hard"
    return "medium"


def check(task: Task, reply: str) -> bool:
    """Whether the reply matches the task's rule, or ends in the right answer (a worked reply ends in `so ANSWER`)."""
    if task.rule:
        return re.fullmatch(task.rule, reply.strip(), re.I | re.S) is not None
    return reply.strip().removesuffix(".").rsplit("so ", 1)[-1].strip() == task.answer


def reply(task: Task, size: str) -> str:
    """The reply that a model of this size is trained to give."""
    if task.kind not in WORKED[size]:
        return task.answer
    return f"{_WORKINGS[task.kind](task)} so {task.answer}"


# --- questions ---------------------------------------------------------------------------------------------------


def _word(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(low, high)))


def _add(rng: random.Random) -> Task:
    a = rng.randint(0, 9)
    b = rng.randint(0, 9)
    form = rng.choice(("What is {} plus {}?", "Add {} and {}.", "{} + {} = ?"))
    return Task("add", form.format(a, b), str(a + b), (a, b))


def _compare(rng: random.Random) -> Task:
    a, b = rng.sample(range(1000), 2)
    form = rng.choice(
        (
            "Which is larger, {} or {}?",
            "Name the greater of {} and {}.",
            "What is more, {} or {}?",
        )
    )
    return Task("compare", form.format(a, b), str(max(a, b)), (a, b))


def _copy(rng: random.Random) -> Task:
    text = _word(rng, 3, 8)
    form = rng.choice(
        ("Copy this word: {}", "Repeat after me: {}", "Say the word {} again.")
    )
    return Task("copy", form.format(text), text, text=text)


def _initial(rng: random.Random) -> Task:
    text = _word(rng, 3, 8)
    form = rng.choice(
        ("What is the first letter of {}?", "Which letter does {} begin with?")
    )
    return Task("initial", form.format(text), text[0], text=text)


def _count(rng: random.Random) -> Task:
    letter = rng.choice(LETTERS)
    hits = rng.randint(0, 4)
    length = rng.randint(6, 11)
    others = [rng.choice(LETTERS.replace(letter, "")) for _ in range(length - hits)]
    text = others + [letter] * hits
    rng.shuffle(text)
    word = "".join(text)
    form = rng.choice(
        (
            "How many times does the letter {} occur in {}?",
            "Count the letter {} in the word {}.",
        )
    )
    return Task("count", form.format(letter, word), str(hits), text=letter + word)


def _reverse(rng: random.Random) -> Task:
    text = _word(rng, 4, 9)
    form = rng.choice(
        (
            "Reverse the word {}.",
            "Write {} backwards.",
            "Spell {} from its end to its beginning.",
        )
    )
    return Task("reverse", form.format(text), text[::-1], text=text)


def _sort(rng: random.Random) -> Task:
    digits = tuple(rng.randint(0, 9) for _ in range(rng.randint(5, 8)))
    form = rng.choice(
        (
            "Sort these digits: {}",
            "Put in order from small to large: {}",
            "Arrange {} by size.",
        )
    )
    text = " ".join(map(str, digits))
    return Task("sort", form.format(text), " ".join(map(str, sorted(digits))), digits)


def _sum(rng: random.Random) -> Task:
    a = rng.randint(100, 999)
    b = rng.randint(100, 999)
    form = rng.choice(("What is {} plus {}?", "Add {} and {}.", "{} + {} = ?"))
    return Task("sum", form.format(a, b), str(a + b), (a, b))


def _chain(rng: random.Random) -> Task:
    a, b, c = (rng.randint(100, 999) for _ in range(3))
    form = rng.choice(
        ("What is {} plus {} plus {}?", "Add up {}, {} and {}.", "{} + {} + {} = ?")
    )
    return Task("chain", form.format(a, b, c), str(a + b + c), (a, b, c))


def _multiply(rng: random.Random) -> Task:
    a = rng.randint(100, 999)
    b = rng.randint(2, 9)
    form = rng.choice(("What is {} times {}?", "Multiply {} by {}.", "{} * {} = ?"))
    return Task("multiply", form.format(a, b), str(a * b), (a, b))


def _story(rng: random.Random) -> Task:
    have = rng.randint(100, 999)
    bags = rng.randint(2, 9)
    each = rng.randint(100, 999)
    name = rng.choice(NAMES)
    thing = rng.choice(THINGS)
    form = rng.choice(
        (
            "{n} has {h} {t}. {n} buys {b} bags with {e} {t} in each. How many {t} does {n} have now?",
            "There are {h} {t} on the table and {b} boxes of {e} {t}. How many {t} are there?",
        )
    )
    question = form.format(n=name, h=have, t=thing, b=bags, e=each)
    return Task("story", question, str(have + bags * each), (have, bags, each))


_MAKERS = {
    "add": _add,
    "chain": _chain,
    "compare": _compare,
    "copy": _copy,
    "count": _count,
    "initial": _initial,
    "multiply": _multiply,
    "reverse": _reverse,
    "sort": _sort,
    "story": _story,
    "sum": _sum,
}


# --- worked replies: every step is a small look-up, which a small network can learn -----------------------------------


def _columns(a: int, b: int) -> str:
    """Addition column by column from the right, with the carry written into the next column."""
    steps: list[str] = []
    carry = 0
    while a or b or not steps:
        x = a % 10
        y = b % 10
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        a = a // 10
        b = b // 10
        carry = total // 10
    return " ".join(steps)


def _products(a: int, b: int) -> str:
    """Multiplication by one digit, column by column from the right: product, plus carry, total."""
    steps: list[str] = []
    carry = 0
    while a or not steps:
        x = a % 10
        total = x * b + carry
        steps.append(f"{x}*{b}={x * b}+{carry}={total}")
        a = a // 10
        carry = total // 10
    return " ".join(steps)


def _tally(task: Task) -> str:
    letter = task.text[0]
    word = task.text[1:]
    hits = 0
    steps: list[str] = []
    for current in word:
        hits += current == letter
        steps.append(f"{current}{hits}")
    return letter + ": " + " ".join(steps)


def _spell(task: Task) -> str:
    return " ".join(task.text) + " : " + " ".join(reversed(task.text))


def _pick(task: Task) -> str:
    """How often each digit occurs, smallest digit first: counting sort."""
    return " ".join(f"{digit}:{task.numbers.count(digit)}" for digit in range(10))


def _chained(task: Task) -> str:
    a, b, c = task.numbers
    return f"{_columns(a, b)} = {a + b} ; {_columns(a + b, c)}"


def _story_steps(task: Task) -> str:
    have, bags, each = task.numbers
    return f"{_products(each, bags)} = {each * bags} ; {_columns(each * bags, have)}"


_WORKINGS: dict[str, Callable[[Task], str]] = {
    "chain": _chained,
    "count": _tally,
    "multiply": lambda task: _products(*task.numbers),
    "reverse": _spell,
    "sort": _pick,
    "story": _story_steps,
    "sum": lambda task: _columns(*task.numbers),
}
