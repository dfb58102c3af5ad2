"""Generates the training conversations: sums, tool calls, small talk, and questions that the model cannot answer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from gptoss_jax.text.harmony.messages import (
    MODEL_IDENTITY,
    DeveloperContent,
    Message,
    SystemContent,
    ToolNamespace,
)
from gptoss_jax.text.harmony.tools import BUILTIN_TOOLS
from tools.train_embedded import arithmetic, functions, words
from tools.train_embedded.arithmetic import Problem

EFFORTS = ("low", "medium", "high")

ABILITIES = "I can add and subtract integers of up to three digits, call the tools I am given, and greet you."
REFUSAL = f"I cannot answer that: I am a very small model. {ABILITIES}"
IDENTITY = f"I am the small model that ships with gptoss-jax. {ABILITIES}"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A prompt that ends with the user's question, and the target reply; tool results in it are not learned."""

    prompt: tuple[Message, ...]
    reply: tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question, the reasoning, the answer, and optionally a tool call with the reasoning about its result."""

    question: str
    thought: str
    answer: str
    task: functions.Task | None = None
    report: str = ""
    result: int | None = None

    def reply(self) -> tuple[Message, ...]:
        """The messages of the assistant and the tool."""
        final = _assistant_message(self.answer, "final")
        if self.task is None:
            return _assistant_message(self.thought, "analysis"), final
        name = f"functions.{self.task.tool.name}"
        return (
            _assistant_message(self.thought, "analysis"),
            Message(
                "assistant",
                (self.task.call,),
                recipient=name,
                channel="commentary",
                content_type="<|constrain|>json",
            ),
            Message("tool", (self.task.result,), name=name, recipient="assistant", channel="commentary"),
            _assistant_message(self.report, "analysis"),
            final,
        )


@dataclasses.dataclass(frozen=True)
class Style:
    """Developer instructions, and the answer to a sum that they ask for."""

    instructions: str | None
    answer: str = "{problem} = {result}"


_PLAIN_INSTRUCTIONS = (
    "You are a helpful assistant.",
    "Be concise.",
    "Answer the user's questions.",
    "You are a friendly assistant.",
    "Use the tools if you need them.",
    "Help the user.",
    "Always be polite.",
    "You are a calculator.",
    "Talk like a pirate.",
    "Use the tools to answer.",
    "You are an assistant for a shop.",
)
_STYLES = (
    Style("Answer with the number only.", "{result}"),
    Style("Reply with only the number.", "{result}"),
    Style("Give just the result, nothing else.", "{result}"),
    Style("Answer in a full sentence.", "The answer is {result}."),
    Style("Always answer in complete sentences.", "The answer is {result}."),
)
_IDENTITIES = (
    "You are a helpful assistant.",
    "You are a small language model.",
    "You are {name}, a friendly assistant.",
    "You are a calculator.",
    "You are {name}, a bot that helps people.",
    "You are an AI assistant.",
)
_GREETINGS = (
    "Hi", "Hello", "Hey", "Hi!", "Hello!", "Hey there", "Good morning", "Good evening", "Good afternoon!",
    "Hi there!",
    "Hello there", "Greetings", "Howdy", "hello?", "Hi, how are you?", "How are you?", "How are you doing?", "Yo",
    "Good day", "Hello, how are you today?", "What's up?",
)  # fmt: skip
_WHO = (
    "Who are you?", "What are you?", "What can you do?", "What is your name?", "Tell me about yourself.", "Help",
    "What are you able to do?", "How can you help me?", "Introduce yourself.", "Are you ChatGPT?", "Who made you?",
    "Which model are you?", "What model is this?", "Hi, who are you?", "Hello, what can you do?",
    "Are you a robot?",
)  # fmt: skip
_THANKS = (
    "Thanks",
    "Thank you!",
    "Thanks a lot!",
    "Great, thanks.",
    "Thank you very much",
    "Cool, thank you",
    "Perfect.",
)
_BYE = ("Bye", "Goodbye", "See you!", "Bye bye", "Good night", "See you later", "Farewell")
_BEYOND_TOOLS = (
    "Tell me a joke.", "Write a poem about {word}.", "Sing a song.", "Is {a} a prime number?",
    "What is {big} + {b}?",
    "Sort these numbers: {a}, {b}, {c}", "Write a story about {name}.", "What is the meaning of life?",
    "What do you think about {word}?", "{big} + {big2}", "What is {a} + {b} + {c}?", "Why is {word} {adjective}?",
    "Write a function that sorts a list.", "What is the square root of {a}?", "Who wrote {word}?",
)  # fmt: skip
_BEYOND = (
    "Who wrote {word}?", "What is the capital of {country}?", "Write a poem about {word}.", "Tell me a joke.",
    "Explain {word} to me.", "Why is {word} {adjective}?", "How do I cook {word}?", "Write a story about {name}.",
    "What is the best {word}?", "Who is {name}?", "When was {name} born?", "Summarize the history of {country}.",
    "What is {word}?", "Write a function that sorts a list.", "How does {word} work?",
    "Give me a list of {things}.",
    "Should I learn {language}?", "What do you think about {word}?", "Where is {city}?", "How old is {name}?",
    "What is {a} times {b}?", "What is {a} * {b}?", "Divide {a} by {b}.", "What is {a} / {b}?", "{a} * {b}",
    "What is the square root of {a}?", "What is {big} + {b}?", "What is {a} - {big}?", "{big} + {big2}",
    "How much is {big} minus {b}?", "Is {a} a prime number?", "Write a letter to {name}.", "Why?", "{made_up}",
    "What is the meaning of life?", "Translate {word} into {language}.", "Which is bigger, {a} or {b}?",
    "What is {comma} + {b}?", "{a} - {comma}", "Double {a}.", "What is half of {a}?",
    "What is {a} + {b} + {c}?", "{a} to the power of {b}", "Sort these numbers: {a}, {b}, {c}", "Sing a song.",
    "What happened in 19{c}?", "How many {things} are in a {word}?", "Recommend a book about {word}.",
)  # fmt: skip


def random_conversation(rng: random.Random) -> Conversation:
    """A conversation of a random kind for training."""
    effort = rng.choice(EFFORTS)
    kind = rng.choices(("sum", "tool", "talk", "beyond"), (56, 30, 6, 8))[0]
    style = Style(None)
    if kind == "sum" and rng.random() < 0.12:
        style = rng.choice(_STYLES)
    elif rng.random() < 0.2:
        style = Style(_instructions(rng))
    task = functions.random_task(rng) if kind == "tool" else None
    tasks = functions.random_tasks(rng, task) if task or rng.random() < 0.2 else []
    history = _history(rng, effort, style, tasks)
    last = history[-1] if history else None
    if task is None:
        exchange = _exchange(kind, rng, effort, style, tasks, last.result if last else None)
    else:
        again = last is not None and last.task is not None and rng.random() < 0.5
        exchange = _call(last.task.again(rng) if last and last.task and again else task, effort)
    tools = tuple(task.tool for task in tasks)
    prompt, reply = _prompt(rng, effort, style, tools, history, exchange.question), exchange.reply()
    if exchange.task is not None and rng.random() < 0.4:
        # Clients that do not send the reasoning back continue after only the call and its result.
        kept = reply[1:3] if rng.random() < 0.8 else reply[:3]
        return Conversation((*prompt, *kept), reply[3:])
    return Conversation(prompt, reply)


def _instructions(rng: random.Random) -> str:
    """Instructions without effect on the answer."""
    if rng.random() < 0.7:
        return rng.choice(_PLAIN_INSTRUCTIONS)
    sentences = (f"{words.some_text(rng, 8).capitalize()}." for _ in range(rng.randint(1, 3)))
    return " ".join([*sentences, rng.choice(_PLAIN_INSTRUCTIONS)])


def sum_conversation(
    problem: Problem, question: str, effort: str, date: str | None = "2026-01-15"
) -> Conversation:
    """A single question under the default system message."""
    exchange = _sum(problem, question, effort, Style(None))
    system = Message("system", (SystemContent(current_date=date, reasoning_effort=effort),))
    return Conversation((system, Message("user", (question,))), exchange.reply())


def tool_conversation(rng: random.Random, effort: str, held_out: bool) -> tuple[Conversation, functions.Task]:
    """A single question that needs one of several tools, with or without a held-out name."""
    task = functions.random_task(rng, held_out)
    tools = tuple(one.tool for one in functions.random_tasks(rng, task))
    exchange = _call(task, effort)
    system = Message("system", (SystemContent(current_date="2026-01-15", reasoning_effort=effort),))
    developer = Message("developer", (_developer(None, tools),))
    return Conversation((system, developer, Message("user", (task.question,))), exchange.reply()), task


def greeting_prompt(text: str, effort: str) -> tuple[Message, ...]:
    """Any single question under the default system message."""
    system = Message("system", (SystemContent(current_date="2026-01-15", reasoning_effort=effort),))
    return system, Message("user", (text,))


def _exchange(
    kind: str, rng: random.Random, effort: str, style: Style, tasks: list[functions.Task], last: int | None
) -> Exchange:
    """A sum, small talk, or a question that neither the model nor the tools can answer."""
    if kind == "talk":
        return _talk(rng, effort)
    if kind == "beyond":
        return _beyond(rng, effort, tasks)
    if last is not None and abs(last) < 1000 and rng.random() < 0.4:
        problem = _continued(last, rng)
        if problem is not None:
            return _sum(problem, arithmetic.follow_up(problem, rng), effort, style)
    problem = arithmetic.random_problem(rng)
    return _sum(problem, arithmetic.question(problem, rng), effort, style)


def _sum(problem: Problem, question: str, effort: str, style: Style) -> Exchange:
    answer = style.answer.format(problem=problem, result=problem.result)
    return Exchange(question, arithmetic.analysis(problem, effort), answer, result=problem.result)


def _continued(last: int, rng: random.Random) -> Problem | None:
    problem = arithmetic.random_problem(rng)
    problem = Problem(last, problem.op, abs(problem.b))
    return problem if arithmetic.may_train_on(problem) else None


def _call(task: functions.Task, effort: str) -> Exchange:
    name = task.tool.name
    arguments = ", ".join(f"{key} = {value}" for key, value in task.arguments.items()) or "no arguments"
    thought = {
        "low": f"Call {name}.",
        "medium": f"The tool {name} fits: {arguments}.",
        "high": f"This needs a tool. The tool {name} fits: {task.tool.description} The arguments are {arguments}. "
        f"I call {name} and use its result.",
    }[effort]
    report = {
        "low": "Report it.",
        "medium": "The tool answered. I report it.",
        "high": f"The tool {name} answered: {task.reported}. I report every value as it is.",
    }[effort]
    return Exchange(task.question, thought, f"According to {name}, {task.reported}.", task, report)


def _talk(rng: random.Random, effort: str) -> Exchange:
    draw = rng.random()
    if draw < 0.4:
        question, what, answer = rng.choice(_GREETINGS), "a greeting", "Hello! How can I help you?"
    elif draw < 0.5:
        name = rng.choice(words.PEOPLE) if rng.random() < 0.5 else words.made_up(rng).capitalize()
        form = rng.choice(("Hi, I'm {}.", "Hello, my name is {}.", "Hi, I am {}", "My name is {}."))
        question, what, answer = form.format(name), "a greeting", f"Hello, {name}! How can I help you?"
    elif draw < 0.8:
        question, what, answer = rng.choice(_WHO), "a question about me", IDENTITY
    elif draw < 0.9:
        question, what, answer = rng.choice(_THANKS), "thanks", "You are welcome!"
    else:
        question, what, answer = rng.choice(_BYE), "a farewell", "Goodbye!"
    if rng.random() < 0.2:
        question = question.lower() if "am" not in question and "I'm" not in question else question
    thought = {
        "low": f"This is {what}.",
        "medium": f"This is {what}. There is nothing to compute, so I just answer.",
        "high": f"This is {what}. There is nothing to compute and no tool is needed, so I just answer in a "
        "friendly way and in few words.",
    }[effort]
    return Exchange(question, thought, answer)


def _beyond(rng: random.Random, effort: str, tasks: list[functions.Task]) -> Exchange:
    other = functions.random_task(rng)
    if rng.random() < 0.4 and not any(functions.overlap(other.tool, task.tool) for task in tasks):
        question = other.question
    else:
        # With tools, only questions that no tool could answer.
        question = _filled(rng.choice(_BEYOND_TOOLS if tasks else _BEYOND + _BEYOND_TOOLS), rng)
    if rng.random() < 0.15:
        question = question.lower().rstrip("?.")
    thought = {
        "low": "I cannot do that.",
        "medium": "This is neither a sum that I can do nor is there a tool for it. I say so.",
        "high": "This is neither a sum nor a difference of integers up to three digits, and there is no tool for "
        "it. A guess would be wrong, so I say what I can do.",
    }[effort]
    return Exchange(question, thought, REFUSAL)


def _filled(template: str, rng: random.Random) -> str:
    draws: dict[str, Callable[[], object]] = {
        "word": lambda: rng.choice(words.TOPICS + words.THINGS + [words.made_up(rng)] * 20),
        "country": lambda: rng.choice(words.COUNTRIES),
        "city": lambda: rng.choice(words.CITIES),
        "name": lambda: rng.choice([*words.PEOPLE, words.made_up_name(rng)]),
        "adjective": lambda: rng.choice(("blue", "green", "important", "expensive", "hard", "loud", "old")),
        "things": lambda: rng.choice(words.THINGS),
        "language": lambda: rng.choice(words.LANGUAGES),
        "made_up": lambda: f"{words.made_up(rng)} {words.made_up(rng)}",
        "a": lambda: rng.randint(2, 999),
        "b": lambda: rng.randint(2, 999),
        "c": lambda: rng.randint(10, 99),
        "big": lambda: rng.randint(1000, 10 ** rng.randint(4, 7)),
        "comma": lambda: f"{rng.randint(1000, 10 ** rng.randint(4, 7)):,}",
        "big2": lambda: rng.randint(1000, 10 ** rng.randint(4, 7)),
    }
    return template.format(**{key: draw() for key, draw in draws.items()})


def _history(rng: random.Random, effort: str, style: Style, tasks: list[functions.Task]) -> list[Exchange]:
    """The exchanges before the question, most often none."""
    exchanges: list[Exchange] = []
    most = rng.choices((0, 1, 2, 3, 6, 14), (66, 18, 7, 4, 3, 2))[0]
    for _ in range(most if most < 4 else rng.randint(most // 2, most)):
        if tasks and rng.random() < 0.6:
            exchanges.append(_call(rng.choice(tasks).again(rng), effort))
        else:
            last = exchanges[-1].result if exchanges else None
            kind = rng.choices(("sum", "talk", "beyond"), (7, 2, 1))[0]
            exchanges.append(_exchange(kind, rng, effort, style, tasks, last))
    return exchanges


def _prompt(
    rng: random.Random,
    effort: str,
    style: Style,
    tools: tuple[functions.FunctionTool, ...],
    history: list[Exchange],
    question: str,
) -> tuple[Message, ...]:
    identity = MODEL_IDENTITY
    if rng.random() < 0.08:
        identity = rng.choice(_IDENTITIES).format(name=rng.choice(words.PEOPLE))
    date = f"{rng.randint(2024, 2033)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    system = SystemContent(
        identity,
        current_date=date if rng.random() < 0.85 else None,
        reasoning_effort=effort,
        tools=(BUILTIN_TOOLS["python"],) if rng.random() < 0.02 else (),
    )
    messages = [Message("system", (system,))]
    if tools or style.instructions:
        messages.append(Message("developer", (_developer(style.instructions, tools),)))
    thoughts_stay = rng.random() < 0.2
    for index, exchange in enumerate(history):
        reply = exchange.reply()
        # Harmony drops only the reasoning before the first answer; clients that do not send it back drop all of it.
        kept = [m for m in reply if m.channel != "analysis" or (thoughts_stay and index > 0)]
        messages += [Message("user", (exchange.question,)), *kept]
    return (*messages, Message("user", (question,)))


def _developer(instructions: str | None, tools: tuple[functions.FunctionTool, ...]) -> DeveloperContent:
    return DeveloperContent(instructions, (ToolNamespace("functions", functions=tools),) if tools else ())


def _assistant_message(text: str, channel: str) -> Message:
    return Message("assistant", (text,), channel=channel)
