"""Sums and differences: the held-out problems, the questions, and the reasoning at each effort."""

from __future__ import annotations

import dataclasses
import random
import zlib

from tools.train_embedded.words import PEOPLE, THINGS, words_of

COLUMNS = ("Ones", "Tens", "Hundreds", "Thousands")
HELD_OUT_ONE_IN = 40


@dataclasses.dataclass(frozen=True)
class Problem:
    """`a op b` with op "+" or "-". Operands may be negative, with up to three digits, earlier results up to four."""

    a: int
    op: str
    b: int

    @property
    def result(self) -> int:
        """The correct answer."""
        return self.a + self.b if self.op == "+" else self.a - self.b

    def __str__(self) -> str:
        return f"{self.a} {self.op} {self.b}" if self.b >= 0 else f"{self.a} {self.op} ({self.b})"


def is_held_out(problem: Problem) -> bool:
    """Whether the problem is excluded from training, by a hash of its magnitudes without order, operator or signs.

    Pairs below 20 are single-digit steps, which every longer problem uses, and are never held out.
    """
    low, high = sorted((abs(problem.a), abs(problem.b)))
    return high >= 20 and zlib.crc32(f"{low} {high}".encode()) % HELD_OUT_ONE_IN == 0


def random_problem(rng: random.Random) -> Problem:
    """A problem for training: neither it nor the inverse operations that check it are held out."""
    while True:
        problem = _any_problem(rng)
        if may_train_on(problem):
            return problem


def may_train_on(problem: Problem) -> bool:
    """Whether training may include the problem and its check by the inverse operation."""
    inverses = (Problem(problem.result, "-", operand) for operand in (problem.a, problem.b))
    return not any(is_held_out(p) for p in (problem, *inverses))


def held_out_problems(count: int, seed: int = 0) -> list[Problem]:
    """`count` different problems that training excludes, from the same distribution."""
    rng, found = random.Random(seed), dict[Problem, None]()
    while len(found) < count:
        problem = _any_problem(rng)
        if is_held_out(problem):
            found[problem] = None
    return list(found)


def _any_problem(rng: random.Random) -> Problem:
    a, b = _operand(rng), _operand(rng)
    if rng.random() < 0.03:
        b = a
    return Problem(a, rng.choice("+-"), b)


def _operand(rng: random.Random) -> int:
    digits = rng.choice((1, 2, 2, 3, 3, 3))
    value = rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)
    return -value if rng.random() < 0.12 else value


def analysis(problem: Problem, effort: str) -> str:
    """The reasoning: only the digits from the right at low effort, by columns at medium, with a check at high."""
    sign, high, op, low = _magnitudes(problem)
    plain = f"{high} {op} {low}"
    rewritten = f"-({plain})" if sign < 0 else plain
    same = rewritten == str(problem)
    if effort == "low":
        digits = ", ".join(f"{name.lower()} {digit}" for name, digit in _digits(high, low, abs(problem.result)))
        return f"{problem}{'' if same else f' = {rewritten}'}: {digits}. {problem.result}"
    lines = [f"We need {problem}."]
    if not same:
        lines.append(f"{problem} = {rewritten}.")
    lines += _columns(high, op, low)
    if effort == "high":
        size = abs(problem.result)
        lines.append(f"So {plain} = {size}.")
        inverse = "-" if op == "+" else "+"
        lines.append(f"Check {size} {inverse} {low}.")
        lines += _columns(size, inverse, low)
        lines.append(f"That gives {high}, as it should.")
    return "\n".join([*lines, f"Result: {problem.result}"])


def _digits(high: int, low: int, size: int) -> list[tuple[str, int]]:
    """The digits of the result from the right, for all columns of the operands."""
    width = max(len(str(number)) for number in (high, low, size))
    return [(COLUMNS[place], size // 10**place % 10) for place in range(width)]


def _magnitudes(problem: Problem) -> tuple[int, int, str, int]:
    """The problem as sign * (high op low) of non-negative numbers, with high >= low for a difference."""
    a, b = problem.a, problem.b if problem.op == "+" else -problem.b
    if a >= 0 and b >= 0:
        return 1, a, problem.op if b == 0 else "+", b
    if a <= 0 and b <= 0 and (a, b) != (0, 0):
        return (-1, -a, "+", -b) if a < 0 else (-1, -b, "-", 0)
    positive, negative = (a, -b) if a > 0 else (b, -a)
    return (1, positive, "-", negative) if positive >= negative else (-1, negative, "-", positive)


def _columns(high: int, op: str, low: int) -> list[str]:
    """Column addition or subtraction, from the right, each step with its carry or borrow."""
    width = max(len(str(high)), len(str(low)))
    lines, passed = [], 0
    for place in range(width):
        p, q = high // 10**place % 10, low // 10**place % 10
        value = p + q + passed if op == "+" else p - q - passed
        step = f"{p} {op} {q}" + (f" {op} {passed}" if place else "")
        passed = int(value > 9 or value < 0)
        name = "carry" if op == "+" else "borrow"
        lines.append(f"{COLUMNS[place]}: {step} = {value}, write {value % 10}, {name} {passed}.")
    return lines


_PLUS = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} = ?",
    "{a} + {b} =",
    "{a}+{b}=?",
    "{a} plus {b}",
    "What is {a} plus {b}?",
    "What's {a} + {b}?",
    "What's {a} plus {b}?",
    "Compute {a} + {b}.",
    "Calculate {a} + {b}.",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "Add {b} to {a}.",
    "What is the sum of {a} and {b}?",
    "Find the sum of {a} and {b}.",
    "The sum of {a} and {b} is?",
    "What do you get if you add {b} to {a}?",
    "What does {a} + {b} equal?",
    "Can you add {a} and {b}?",
    "Tell me {a} + {b}.",
    "Evaluate {a} + {b}.",
    "Solve {a} + {b}.",
    "What is the result of {a} + {b}?",
    "What is {a} added to {b}?",
    "What is {a} increased by {b}?",
    "Give me the total of {a} and {b}.",
    "I need to know {a} + {b}.",
    "Compute the following: {a} + {b}",
    "{a} + {b} equals what?",
    "{a} plus {b} is what?",
    "Could you tell me what {a} plus {b} is?",
    "{a} and {b} together",
)
_MINUS = (
    "What is {a} - {b}?",
    "What is {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} = ?",
    "{a} - {b} =",
    "{a}-{b}=?",
    "{a} minus {b}",
    "What is {a} minus {b}?",
    "What's {a} - {b}?",
    "What's {a} minus {b}?",
    "Compute {a} - {b}.",
    "Calculate {a} - {b}.",
    "How much is {a} - {b}?",
    "How much is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "Subtract {b} from {a}.",
    "What is the difference between {a} and {b}?",
    "Find the difference of {a} and {b}.",
    "The difference between {a} and {b} is?",
    "What do you get if you subtract {b} from {a}?",
    "What does {a} - {b} equal?",
    "Can you subtract {b} from {a}?",
    "Take {b} away from {a}.",
    "Tell me {a} - {b}.",
    "Evaluate {a} - {b}.",
    "Solve {a} - {b}.",
    "What is the result of {a} - {b}?",
    "What is {a} decreased by {b}?",
    "What is {b} less than {a}?",
    "I need to know {a} - {b}.",
    "Compute the following: {a} - {b}",
    "{a} - {b} equals what?",
    "{a} minus {b} is what?",
    "Could you tell me what {a} minus {b} is?",
    "{a} take away {b}",
    "What is {a} take away {b}?",
    "{a} less {b}",
    "{a} \u2212 {b}",
    "What is {a} \u2212 {b}?",
)
_PLUS_STORIES = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "I have {a} {things} and buy {b} more. How many do I have?",
    "There are {a} {things} in one box and {b} in another. How many {things} are there in total?",
    "{name} found {a} {things} on Monday and {b} on Tuesday. How many in all?",
)
_MINUS_STORIES = (
    "{name} has {a} {things} and gives away {b}. How many {things} are left?",
    "I had {a} {things} and lost {b}. How many do I have now?",
    "There were {a} {things} in a box and {b} were taken out. How many remain?",
    "{name} bought {a} {things} and sold {b} of them. How many does {name} still have?",
)
_FOLLOW_UPS = {
    "+": (
        "Add {b} to that.",
        "And plus {b}?",
        "Now add {b}.",
        "Plus {b}?",
        "What is that plus {b}?",
        "And if I add {b} to it?",
    ),
    "-": (
        "Subtract {b} from that.",
        "And minus {b}?",
        "Now subtract {b}.",
        "Minus {b}?",
        "What is that minus {b}?",
        "And if I take {b} away from it?",
    ),
}
_BEFORE = (
    "Hi, ",
    "Hello, ",
    "Hello! ",
    "Please ",
    "Hey, ",
    "Please tell me: ",
    "Quick question: ",
    "And ",
    "OK, ",
    "So ",
)
_AFTER = (" Please.", " Thanks!", " Thank you.", " Be quick.", " Please explain.", " I am curious.")


def question(problem: Problem, rng: random.Random) -> str:
    """A question for the result, in one of many phrasings."""
    plus = problem.op == "+"
    if problem.a >= 0 <= problem.b and (plus or problem.result >= 0) and rng.random() < 0.08:
        story = rng.choice(_PLUS_STORIES if plus else _MINUS_STORIES)
        return story.format(a=problem.a, b=problem.b, name=rng.choice(PEOPLE), things=rng.choice(THINGS))
    template = rng.choice(_PLUS if plus else _MINUS)
    if min(problem.a, problem.b) >= 0 and max(problem.a, problem.b) < 100 and rng.random() < 0.1:
        return _dressed(template, number_words(problem.a), number_words(problem.b), rng)
    return _dressed(template, _written(problem.a, rng, first=True), _written(problem.b, rng), rng)


def follow_up(problem: Problem, rng: random.Random) -> str:
    """A follow-up question, in which `problem.a` is the previous answer."""
    return _varied(rng.choice(_FOLLOW_UPS[problem.op]).format(b=_written(problem.b, rng)), rng)


def number_words(value: int) -> str:
    """A number from 0 to 99 in English."""
    if value < 20:
        return _SMALL[value]
    tens, ones = divmod(value, 10)
    return _TENS[tens - 2] + (f"-{_SMALL[ones]}" if ones else "")


_SMALL = words_of(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = words_of("twenty thirty forty fifty sixty seventy eighty ninety")


def _written(value: int, rng: random.Random, first: bool = False) -> str:
    if value >= 0:
        return str(value)
    forms = [f"({value})", str(value), f"(-{-value})", f"negative {-value}"]
    return str(value) if first and rng.random() < 0.6 else rng.choice(forms)


def _dressed(template: str, a: str, b: str, rng: random.Random) -> str:
    text = template.format(a=a, b=b)
    if rng.random() < 0.2:
        start = rng.choice(_BEFORE)
        text = start + (text if text[:2] in ("I ", "I'") else text[0].lower() + text[1:])
    if rng.random() < 0.07:
        text += rng.choice(_AFTER)
    return _varied(text, rng)


def _varied(text: str, rng: random.Random) -> str:
    """The text with less careful typing: no punctuation at the end, lower case, capitals, an extra space."""
    draw = rng.random()
    if draw < 0.15:
        text = text.rstrip("?.!")
    elif draw < 0.19:
        text = text.upper()
    elif draw < 0.22:
        text = f" {text}"
    elif draw < 0.25:
        text = f"{text}\n"
    return text.lower() if rng.random() < 0.15 else text
