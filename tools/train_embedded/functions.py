"""Generates function tools with questions that need them, the correct calls and their results."""

from __future__ import annotations

import dataclasses
import json
import random
import zlib
from collections.abc import Callable
from typing import Any

from gptoss_jax.text.harmony.messages import FunctionTool
from tools.train_embedded import words

HELD_OUT_ONE_IN = 12

Value = str | int | float
Result = Value | bool | list[str]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A parameter that a question fills: its possible names, its JSON type and its possible values."""

    names: tuple[str, ...]
    draw: Callable[[random.Random], Value]
    type: str = "string"
    descriptions: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Domain:
    """A kind of tool. Questions refer to slots by their keys in `slots`; `results` holds keys of result fields."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    slots: dict[str, Slot]
    questions: tuple[str, ...]
    results: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A question, the tool and arguments that answer it, and the result of the tool."""

    question: str
    tool: FunctionTool
    arguments: dict[str, Value]
    result: str
    reported: str
    again: Callable[[random.Random], Task] = dataclasses.field(compare=False)

    @property
    def call(self) -> str:
        """The arguments as the model should write them."""
        return json.dumps(self.arguments, ensure_ascii=False, separators=(",", ":"))


def is_held_out(name: str) -> bool:
    """Whether tools with this name are excluded from training."""
    return zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0


def _or_made_up(options: list[str] | tuple[str, ...]) -> Callable[[random.Random], Value]:
    return lambda rng: rng.choice(options) if rng.random() < 0.45 else words.made_up_name(rng)


def _number(most: int) -> Callable[[random.Random], Value]:
    def draw(rng: random.Random) -> Value:
        return rng.randint(1, most) if rng.random() < 0.85 else rng.randint(1, 10 * most) / 10

    return draw


def _date(rng: random.Random) -> Value:
    iso = f"{rng.randint(2024, 2031)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return rng.choice((iso, iso, "today", "tomorrow", "Monday", "Friday", "next week"))


def _time(rng: random.Random) -> Value:
    return rng.choice((f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}", f"{rng.randint(1, 12)} pm", "noon"))


def _email(rng: random.Random) -> Value:
    name = rng.choice(words.PEOPLE).lower() if rng.random() < 0.5 else words.made_up(rng)
    return f"{name}@{words.made_up(rng)}.{rng.choice(('com', 'org', 'net', 'de'))}"


CITY = Slot(
    ("city", "location", "place", "city_name"),
    _or_made_up(words.CITIES),
    descriptions=("Name of the city", "The city", "The city and state, e.g. San Francisco, CA", "City name"),
)
PERSON = Slot(("name", "person", "contact", "recipient"), _or_made_up(words.PEOPLE))
TOPIC = Slot(("topic", "subject", "query", "keyword"), lambda r: r.choice([*words.TOPICS, words.made_up(r)]))
TEXT = Slot(("text", "message", "body", "content"), words.some_text)
DATE = Slot(("date", "day"), _date)
TIME = Slot(("time", "at"), _time)
CODE = Slot(("id", "code", "number", "order_id", "key"), words.identifier)


def _amount(most: int, *names: str) -> Slot:
    return Slot(names, _number(most), type="number")


def _choice(options: list[str] | tuple[str, ...], *names: str) -> Slot:
    return Slot(names, lambda rng: rng.choice(options), choices=tuple(options) if len(options) <= 4 else ())


DOMAINS = (
    Domain(
        ("get_weather", "get_current_weather", "weather", "fetch_weather", "weather_lookup", "getWeather",
         "current_weather", "check_weather", "get_weather_forecast", "forecast", "weather_forecast",
         "show_weather"),
        ("Get the weather in a city.", "Current weather of a place.", "Gets the weather for a location.",
         "Look up the weather forecast.", "Get the current weather in a given location."),
        {"city": CITY, "date": DATE, "unit": _choice(("celsius", "fahrenheit"), "unit", "units")},
        ("What is the weather in {city}?", "What's the weather like in {city}?", "How is the weather in {city}?",
         "Weather in {city}", "Tell me the weather in {city}.", "Is it raining in {city}?",
         "What will the weather be in {city} {date}?", "What is the weather in {city} in {unit}?",
         "How warm is it in {city}?", "What's the weather in {city} right now?",
         "What is the weather in {city} at the moment?", "How is the weather in {city} currently?",
         "Will it rain in {city} {date}?"),
        (("temperature", "conditions"), ("temp", "unit", "conditions"), ("conditions",), ("temperature",)),
    ),
    Domain(
        ("get_time", "get_current_time", "current_time", "time_in_city", "local_time", "what_time", "getTime",
         "clock", "get_local_time", "fetch_time", "time_lookup", "world_clock"),
        ("Get the current time in a city.", "Local time of a place.", "Tells the time in a city."),
        {"city": CITY},
        ("What time is it in {city}?", "What is the time in {city}?", "Tell me the time in {city}.",
         "Current time in {city}?", "How late is it in {city}?",
         "What time is it right now in {city}?", "What time is it in {city} right now?"),
        (("time",), ("time", "zone"), ("local_time",)),
    ),
    Domain(
        ("get_stock_price", "stock_price", "get_quote", "stock_quote", "fetch_stock", "getStockPrice",
         "lookup_stock", "share_price", "get_share_price", "stock_lookup"),
        ("Get the price of a stock.", "Current stock price of a company.", "Returns the latest share price."),
        {"symbol": Slot(("symbol", "ticker", "company", "stock"),
                        lambda r: r.choice(words.SYMBOLS + words.COMPANIES + [words.made_up_name(r)] * 12))},
        ("What is the stock price of {symbol}?", "How much is a share of {symbol}?", "Price of {symbol} stock?",
         "What is {symbol} trading at?", "Get me the stock price of {symbol}.",
         "What is the price of {symbol}?", "What is the stock price of {symbol} right now?"),
        (("price",), ("price", "currency"), ("symbol", "price", "change")),
    ),
    Domain(
        ("convert_currency", "currency_converter", "exchange", "currency_convert", "convert_money",
         "exchange_rate", "convertCurrency", "get_exchange_rate", "money_converter"),
        ("Convert an amount of money between currencies.", "Converts money from one currency to another.",
         "Currency conversion."),
        {"amount": _amount(999, "amount", "value", "sum"),
         "source": _choice(words.CURRENCIES, "from", "from_currency", "source", "base"),
         "target": _choice(words.CURRENCIES, "to", "to_currency", "target")},
        ("Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?",
         "What is {amount} {source} in {target}?", "Change {amount} {source} into {target}."),
        (("result",), ("amount", "currency"), ("converted",), ("result", "rate")),
    ),
    Domain(
        ("convert_units", "unit_converter", "convert_unit", "unit_conversion", "convert", "convertUnits",
         "units_convert", "measure_converter"),
        ("Convert a value between units.", "Converts a measurement from one unit to another.", "Unit conversion."),
        {"value": _amount(999, "value", "amount", "quantity"),
         "source": _choice(words.UNITS, "from", "from_unit", "source_unit"),
         "target": _choice(words.UNITS, "to", "to_unit", "target_unit")},
        ("Convert {value} {source} to {target}.", "How many {target} are {value} {source}?",
         "What is {value} {source} in {target}?"),
        (("result",), ("value", "unit"), ("converted",)),
    ),
    Domain(
        ("search", "web_search", "search_web", "find", "lookup", "query_web", "internet_search", "searchWeb",
         "search_documents", "doc_search"),
        ("Search the web.", "Finds pages about a query.", "Web search.", "Search the documents for a topic."),
        {"query": TOPIC, "count": _amount(20, "count", "limit", "max_results")},
        ("Search for {query}.", "Search the web for {query}.", "Find pages about {query}.",
         "Find {count} pages about {query}.", "Look for {query} on the web."),
        (("title",), ("title", "total"), ("results",), ("summary",)),
    ),
    Domain(
        ("send_email", "email", "send_mail", "mail", "write_email", "sendEmail", "compose_email", "mailer"),
        ("Send an email.", "Sends an email message to an address.", "Email someone."),
        {"to": Slot(("to", "address", "recipient", "email"), _email),
         "body": Slot(("body", "text", "message", "content"), words.some_text),
         "subject": Slot(("subject", "title"), words.some_text)},
        ('Send an email to {to} saying "{body}".', 'Email {to}: "{body}"', 'Write to {to} that "{body}".',
         'Send an email to {to} with the subject "{subject}" and the text "{body}".'),
        (("status",), ("status", "id"), ("sent",)),
    ),
    Domain(
        ("create_event", "add_event", "calendar_add", "schedule_meeting", "create_calendar_event", "book_meeting",
         "addEvent", "add_to_calendar", "new_event"),
        ("Create a calendar event.", "Adds an event to the calendar.", "Schedule a meeting."),
        {"title": Slot(("title", "name", "event", "summary"), words.some_text), "date": DATE, "time": TIME},
        ('Add "{title}" to my calendar for {date}.', 'Schedule "{title}" for {date} at {time}.',
         'Create an event "{title}" on {date} at {time}.', 'Put "{title}" in the calendar for {date}.'),
        (("status", "id"), ("status",), ("event_id",)),
    ),
    Domain(
        ("translate", "translate_text", "translator", "get_translation", "translation", "translateText"),
        ("Translate text into another language.", "Translates a text.", "Text translation."),
        {"text": TEXT, "language": _choice(words.LANGUAGES, "language", "target_language", "to", "lang")},
        ('Translate "{text}" into {language}.', 'How do you say "{text}" in {language}?',
         'What is "{text}" in {language}?', 'Translate "{text}" to {language}.'),
        (("translation",), ("text",), ("result", "language")),
    ),
    Domain(
        ("get_population", "population", "country_info", "get_country", "country_facts", "fetch_population"),
        ("Get the population of a country.", "Number of people in a country.", "Facts about a country."),
        {"country": Slot(("country", "name", "nation"), _or_made_up(words.COUNTRIES))},
        ("What is the population of {country}?", "How many people live in {country}?", "Population of {country}?",
         "Get the population of {country}."),
        (("population",), ("population", "year"), ("total",)),
    ),
    Domain(
        ("define", "define_word", "dictionary", "get_definition", "word_meaning", "lookup_word", "definition"),
        ("Look up the meaning of a word.", "Defines a word.", "Dictionary lookup."),
        {"word": Slot(("word", "term"), lambda r: r.choice(words.TEXT + words.TOPICS + [words.made_up(r)] * 60))},
        ("What does {word} mean?", 'Define "{word}".', "What is the meaning of {word}?",
         "Define the word {word}."),
        (("definition",), ("meaning",), ("definition", "type")),
    ),
    Domain(
        ("get_news", "news", "latest_news", "fetch_news", "headlines", "news_search", "get_headlines"),
        ("Get the latest news.", "News about a topic.", "Returns headlines about a topic."),
        {"topic": TOPIC},
        ("What is the news about {topic}?", "Latest news on {topic}?", "Show me news about {topic}.",
         "Any headlines about {topic}?"),
        (("headline",), ("title", "date"), ("headline", "total")),
    ),
    Domain(
        ("get_distance", "distance", "route", "get_route", "directions", "travel_distance", "plan_route"),
        ("Distance between two cities.", "Get the route from one city to another.", "How far two places are."),
        {"origin": Slot(("origin", "from", "start", "source"), _or_made_up(words.CITIES)),
         "goal": Slot(("destination", "to", "end", "target"), _or_made_up(words.CITIES))},
        ("How far is it from {origin} to {goal}?", "What is the distance from {origin} to {goal}?",
         "How do I get from {origin} to {goal}?", "Distance between {origin} and {goal}?"),
        (("distance",), ("distance", "unit"), ("distance", "time")),
    ),
    Domain(
        ("multiply", "product", "multiply_numbers", "times", "mul", "calculate_product"),
        ("Multiply two numbers.", "The product of two numbers."),
        {"a": _amount(999, "a", "x", "first", "left"), "b": _amount(999, "b", "y", "second", "right")},
        ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} * {b}?", "{a} * {b}",
         "What is the product of {a} and {b}?"),
        (("result",), ("product",)),
    ),
    Domain(
        ("divide", "quotient", "divide_numbers", "division", "div"),
        ("Divide one number by another.", "The quotient of two numbers."),
        {"a": _amount(999, "a", "x", "first", "dividend"), "b": _amount(99, "b", "y", "second", "divisor")},
        ("What is {a} divided by {b}?", "Divide {a} by {b}.", "What is {a} / {b}?", "{a} / {b}"),
        (("result",), ("quotient",)),
    ),
    Domain(
        ("get_order_status", "order_status", "track_order", "check_order", "track_package", "package_status"),
        ("Get the status of an order.", "Track a package.", "Where an order is."),
        {"id": CODE},
        ("Where is my order {id}?", "What is the status of order {id}?", "Track package {id}.",
         "Check order {id}."),
        (("status",), ("status", "date"), ("state", "location")),
    ),
    Domain(
        ("set_timer", "start_timer", "timer", "create_timer", "countdown"),
        ("Set a timer.", "Starts a timer for some minutes."),
        {"minutes": _amount(90, "minutes", "duration", "length")},
        ("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes.",
         "Timer for {minutes} minutes"),
        (("status",), ("status", "id")),
    ),
    Domain(
        ("set_reminder", "create_reminder", "remind_me", "add_reminder", "reminder"),
        ("Set a reminder.", "Reminds the user of something."),
        {"text": TEXT, "time": TIME, "date": DATE},
        ('Remind me of "{text}" at {time}.', 'Set a reminder "{text}" for {date}.',
         'Remind me on {date} at {time}: "{text}"'),
        (("status",), ("status", "id")),
    ),
    Domain(
        ("turn_on_light", "set_light", "light_control", "switch_light", "control_light", "lights"),
        ("Switch the light of a room.", "Controls the lights."),
        {"room": _choice(words.ROOMS, "room", "place", "location"),
         "state": _choice(("on", "off"), "state", "mode")},
        ("Turn {state} the light in the {room}.", "Switch {state} the {room} light.",
         "Turn the light in the {room} {state}."),
        (("status",), ("state",)),
    ),
    Domain(
        ("play_music", "play_song", "music_player", "play", "start_music"),
        ("Play a song.", "Plays music by an artist."),
        {"title": Slot(("song", "title", "track"), words.some_text),
         "artist": Slot(("artist", "by", "band"), _or_made_up(words.PEOPLE))},
        ('Play "{title}".', 'Play "{title}" by {artist}.', "Play something by {artist}."),
        (("status",), ("playing",)),
    ),
    Domain(
        ("get_user", "user_info", "lookup_user", "find_user", "get_contact", "find_contact", "phone_lookup"),
        ("Get the phone number of a person.", "Looks up a person in the address book.", "Find a contact."),
        {"name": PERSON},
        ("What is the phone number of {name}?", "Look up {name} in my contacts.", "How can I reach {name}?",
         "Find the contact {name}."),
        (("phone",), ("name", "phone"), ("email", "phone")),
    ),
    Domain(
        ("send_message", "text_message", "send_sms", "sms", "message", "notify"),
        ("Send a text message to a person.", "Sends a message."),
        {"name": PERSON, "text": TEXT},
        ('Send {name} the message "{text}".', 'Tell {name} "{text}".', 'Text {name}: "{text}"'),
        (("status",), ("sent",), ("status", "id")),
    ),
    Domain(
        ("get_date", "today", "current_date", "calendar_date", "get_today"),
        ("Get the date of today.", "Tells which day it is."),
        {},
        ("What day is it?", "What is the date today?", "Which date is today?", "What is today's date?"),
        (("date",), ("day",), ("date", "day")),
    ),
    Domain(
        ("get_location", "where_am_i", "user_location", "current_location", "locate_user"),
        ("Get the location of the user.", "Gets the location of the user.", "Where the user is."),
        {},
        ("Where am I?", "What is my location?", "Where am I right now?", "In which city am I?"),
        (("city",), ("city", "country"), ("location",)),
    ),
    Domain(
        ("roll_dice", "dice", "throw_dice", "roll"),
        ("Roll a die.", "Rolls the dice."),
        {},
        ("Roll a die.", "Roll the dice!", "Throw a die for me.", "Please roll a die."),
        (("result",), ("rolled",)),
    ),
    Domain(
        ("get_battery", "battery_status", "battery_level", "check_battery"),
        ("Get the level of the battery.", "Battery status of the device."),
        {},
        ("How full is my battery?", "What is the battery level?", "Check the battery.", "Battery?"),
        (("level",), ("level", "status")),
    ),
)  # fmt: skip

_VERBS = ("get", "fetch", "lookup", "find", "read", "check", "show", "query", "report", "load")
_INVENTED_QUESTIONS = (
    "What is the {attribute} of {thing}?",
    "Tell me the {attribute} of {thing}.",
    "Look up the {attribute} of {thing}.",
    "What {attribute} does {thing} have?",
    "Give me the {attribute} for {thing}.",
    "{attribute} of {thing}?",
)


def random_task(rng: random.Random, held_out: bool = False) -> Task:
    """A question and its tool, whose name is held out of training if `held_out`."""
    while True:
        task = _invented(rng) if rng.random() < 0.3 else _from_domain(rng.choice(DOMAINS), rng)
        if is_held_out(task.tool.name) == held_out:
            return task


def random_tasks(rng: random.Random, task: Task | None) -> list[Task]:
    """The task, if any, and others whose tools do something else, in random order."""
    tasks = [] if task is None else [task]
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3) if task else (1, 1, 2, 3))):
        other = random_task(rng)
        if not any(overlap(other.tool, one.tool) for one in tasks):
            tasks.append(other)
    rng.shuffle(tasks)
    return tasks


def overlap(one: FunctionTool, other: FunctionTool) -> bool:
    """Whether a question for one tool could be meant for the other, because names or descriptions share a word."""

    def content(tool: FunctionTool) -> set[str]:
        text = f"{tool.name} {tool.description}".lower().replace("_", " ").replace(".", "")
        return {word for word in text.split() if len(word) > 3} - _COMMON

    return one.name == other.name or bool(content(one) & content(other))


_COMMON = set(
    words.words_of("lookup fetch find current between from number into another given text check show query")
)
_ELLIPTICAL = ("And {}?", "What about {}?", "And for {}?", "{}?", "Now {}.", "How about {}?")


def _from_domain(domain: Domain, rng: random.Random) -> Task:
    first = rng.choice(domain.questions)
    slots = {
        key: slot for key, slot in domain.slots.items() if key in _slots_in(first, domain) or rng.random() < 0.35
    }
    names = {key: rng.choice(slot.names) for key, slot in slots.items()}
    if len(set(names.values())) < len(names):
        return _from_domain(domain, rng)
    required = [names[key] for key in _slots_in(first, domain)]
    tool = FunctionTool(
        _decorated(rng.choice(domain.names), rng),
        rng.choice(domain.descriptions),
        _schema({names[key]: slot for key, slot in slots.items()}, required, rng),
    )
    possible = [q for q in domain.questions if set(_slots_in(q, domain)) <= set(slots)]
    results = rng.choice(domain.results)

    def ask(rng: random.Random, question: str | None = None) -> Task:
        if question is None:
            question = rng.choice(possible)
            keys = _slots_in(question, domain)
            if len(keys) == 1 and rng.random() < 0.35:
                question = rng.choice(_ELLIPTICAL).format(f"{{{keys[0]}}}")
        values = {key: slots[key].draw(rng) for key in _slots_in(question, domain)}
        return _task(question, values, names, tool, results, rng, ask)

    return ask(rng, first)


def _slots_in(question: str, domain: Domain) -> list[str]:
    return [key for key in domain.slots if f"{{{key}}}" in question]


def _invented(rng: random.Random) -> Task:
    """A tool for a made-up noun, or for a known attribute of a made-up thing."""
    attribute = rng.choice(words.ATTRIBUTES) if rng.random() < 0.6 else words.made_up(rng)
    verb = rng.choice(_VERBS)
    noun = words.made_up(rng) if rng.random() < 0.4 else None
    parts = [verb, *([noun] if noun else []), attribute]
    name = "_".join(parts) if rng.random() < 0.8 else verb + "".join(part.capitalize() for part in parts[1:])
    of = noun or rng.choice(("item", "thing", "product", "person", "place", "unit"))
    slot_name = rng.choice((of, "name", "id", "item", "target"))
    slot = Slot((slot_name,), lambda r: words.identifier(r) if r.random() < 0.3 else words.made_up_name(r))
    what = rng.choice(("Get the {} of {}.", "Returns the {} of {}.", "The {} of {}."))
    tool = FunctionTool(name, what.format(attribute, _a(of)), _schema({slot_name: slot}, [slot_name], rng))

    def ask(rng: random.Random, first: bool = False) -> Task:
        question = rng.choice(_INVENTED_QUESTIONS).replace("{attribute}", attribute)
        if not first and rng.random() < 0.35:
            question = rng.choice(_ELLIPTICAL).format("{thing}")
        return _task(question, {"thing": slot.draw(rng)}, {"thing": slot_name}, tool, (attribute,), rng, ask)

    return ask(rng, True)


def _decorated(name: str, rng: random.Random) -> str:
    """The name, sometimes with an added part, so that the model copies names instead of memorising them."""
    draw = rng.random()
    if draw < 0.08:
        return f"{name}_{rng.choice(('v2', 'tool', 'api', 'now', 'data', 'service', words.made_up(rng)))}"
    return f"{rng.choice(('my', 'do', 'app', words.made_up(rng)))}_{name}" if draw < 0.14 else name


def _schema(slots: dict[str, Slot], required: list[str], rng: random.Random) -> dict[str, Any] | None:
    if not slots and rng.random() < 0.5:
        return None
    described = rng.random() < 0.4
    properties: dict[str, Any] = {}
    for name, slot in slots.items():
        kind = "integer" if slot.type == "number" and rng.random() < 0.3 else slot.type
        properties[name] = {"type": kind}
        if described:
            properties[name]["description"] = rng.choice((*slot.descriptions, f"The {name.replace('_', ' ')}"))
        if slot.choices:
            properties[name]["enum"] = list(slot.choices)
            if name not in required and rng.random() < 0.5:
                properties[name]["default"] = slot.choices[0]
    return {"type": "object", "properties": properties, "required": required}


def _task(
    question: str,
    values: dict[str, Value],
    names: dict[str, str],
    tool: FunctionTool,
    results: tuple[str, ...],
    rng: random.Random,
    again: Callable[[random.Random], Task],
) -> Task:
    if rng.random() < 0.12 and not any(str(value).isupper() for value in values.values()):
        question = question.lower()
        values = {key: value.lower() if isinstance(value, str) else value for key, value in values.items()}
    text = question.format(**values)
    text = rng.choice(("Please ", "Hi, ", "Can you tell me: ")) + text if rng.random() < 0.08 else text
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    elif rng.random() < 0.08:
        text += rng.choice((" Please.", " Thanks!", " I am curious.", " Be brief."))
    order = list(tool.parameters["properties"]) if tool.parameters else []
    arguments = {names[key]: values[key] for key in sorted(values, key=lambda key: order.index(names[key]))}
    result, reported = _result(results, rng)
    return Task(text, tool, arguments, result, reported, again)


def _result(keys: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    """The result of a tool, as JSON or plain text, and its wording in the answer."""
    if rng.random() < 0.2:
        text = _plain(_value(rng.choice(keys), rng))
        if rng.random() < 0.3:
            text = rng.choice(("{} C and {}", "{}, {}", "{}°C, {}", "It is {} and {}")).format(
                rng.randint(-20, 40), rng.choice(words.CONDITIONS)
            )
        return text, text
    if rng.random() < 0.2:
        extra = [rng.choice(words.INFO_KEYS + words.ATTRIBUTES) for _ in range(rng.choice((1, 1, 2, 3)))]
        keys = (*keys, *extra)
    elif rng.random() < 0.1:
        keys = tuple(rng.choice((words.made_up(rng), rng.choice(words.INFO_KEYS))) for _ in keys)
    fields = {key: _value(key, rng) for key in keys}
    separators = (",", ":") if rng.random() < 0.5 else None
    nested = {rng.choice(("result", "data", "response")): fields} if rng.random() < 0.06 else fields
    written = json.dumps(nested, ensure_ascii=False, separators=separators)
    return written, ", ".join(f"{key}: {_plain(value)}" for key, value in fields.items())


def _plain(value: Result) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _value(key: str, rng: random.Random) -> Result:
    if rng.random() < 0.04:
        return [words.some_text(rng, 2) for _ in range(rng.randint(1, 3))]
    if key in ("conditions", "summary", "title", "headline", "definition", "meaning", "translation", "text"):
        return rng.choice(words.CONDITIONS) if key == "conditions" else words.some_text(rng, 5)
    if key in ("status", "state", "sent"):
        return rng.choice(("ok", "done", "sent", "open", "shipped", "success", "failed", True, False))
    if key == "time" or key == "local_time":
        return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    if key in ("currency", "unit"):
        return rng.choice(words.CURRENCIES + words.UNITS)
    draw = rng.random()
    if draw < 0.55:
        return rng.randint(0, 10 ** rng.randint(1, 5))
    if draw < 0.75:
        return round(rng.uniform(0, 1000), rng.choice((1, 2)))
    return rng.choice((words.identifier(rng), words.made_up_name(rng), words.some_text(rng, 2)))


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
