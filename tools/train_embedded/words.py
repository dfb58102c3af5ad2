"""Words that the made-up conversations are filled with, and random strings to copy."""

from __future__ import annotations

import random

CITIES = ["Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Lisbon", "Dublin", "Oslo", "Stockholm", "Helsinki", "Copenhagen", "Amsterdam", "Brussels", "Zurich", "Geneva", "Prague", "Warsaw", "Budapest", "Athens", "Istanbul", "Cairo", "Lagos", "Nairobi", "Dubai", "Mumbai", "Delhi", "Bangkok", "Singapore", "Tokyo", "Osaka", "Seoul", "Beijing", "Shanghai", "Sydney", "Melbourne", "Auckland", "Toronto", "Montreal", "Vancouver", "Boston", "Chicago", "Denver", "Seattle", "Austin", "Miami", "Lima", "Bogota", "Santiago", "Hamburg", "Munich", "Cologne", "Lyon", "Nice", "Milan", "Naples", "Porto", "Basel", "Kyoto"] + ["New York", "San Francisco", "Los Angeles", "Hong Kong", "Rio de Janeiro", "Mexico City", "Cape Town"]
CITIES += ["San Francisco, CA", "Boston, MA", "Austin, Texas", "Paris, France", "Sao Paulo", "Buenos Aires"]
COUNTRIES = ["France", "Germany", "Spain", "Italy", "Portugal", "Ireland", "Norway", "Sweden", "Finland", "Denmark", "Austria", "Poland", "Greece", "Turkey", "Egypt", "Kenya", "India", "Thailand", "Japan", "China", "Australia", "Canada", "Brazil", "Peru", "Chile", "Mexico", "Iceland", "Belgium", "Hungary", "Morocco"]
PEOPLE = ["Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jack", "Kate", "Leo", "Maria", "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tom", "Uma", "Victor", "Wendy", "Yara", "Zoe", "Alice", "Bob", "Carol", "Dan", "Eve", "Frank", "Lena", "Max", "Mia", "Noah", "Olga", "Peter", "Ruth", "Sara", "Tim", "Lucy"]
CURRENCIES = ["USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD", "CNY", "INR", "SEK", "NOK", "DKK", "PLN", "BRL", "MXN", "ZAR", "KRW", "TRY"]
UNITS = ["meters", "feet", "inches", "miles", "kilometers", "kilograms", "pounds", "ounces", "grams", "liters", "gallons", "yards", "celsius", "fahrenheit"]
COMPANIES = ["Apple", "Google", "Microsoft", "Amazon", "Tesla", "Nvidia", "Intel", "Toyota", "Siemens", "Nestle", "Shell", "Sony", "Samsung", "IBM"]
SYMBOLS = ["AAPL", "GOOG", "MSFT", "AMZN", "TSLA", "NVDA", "INTC", "IBM", "SONY", "META", "NFLX", "ORCL", "AMD", "SAP", "NKE", "KO"]
LANGUAGES = ["French", "German", "Spanish", "Italian", "Portuguese", "Dutch", "Greek", "Polish", "Japanese", "Korean", "Chinese", "Arabic"]
THINGS = ["apples", "books", "coins", "stamps", "pencils", "marbles", "cards", "eggs", "cookies", "flowers", "shells", "stickers", "tickets", "chairs", "bottles", "cups", "oranges", "balls", "toys", "keys"]
TOPICS = ["music", "history", "football", "chess", "gardening", "physics", "cooking", "sailing", "robots", "dogs", "cats", "birds", "rivers", "planets", "trains", "coffee", "tea", "bread", "cheese", "energy", "climate", "health", "art", "money", "travel", "science", "movies", "games", "weather", "space"]
TEXT = ["meeting", "lunch", "dinner", "report", "project", "update", "team", "call", "review", "plan", "budget", "order", "invoice", "holiday", "party", "birthday", "travel", "notes", "draft", "slides", "deadline", "question", "answer", "hello", "good", "morning", "thanks", "see", "you", "soon", "today", "tomorrow", "the", "new", "old", "blue", "red", "green", "big", "small", "open", "close", "start", "end", "first", "last", "next", "happy", "cold", "warm", "fresh"]
CONDITIONS = ["sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy", "clear", "overcast", "misty", "humid"]
ROOMS = ("kitchen", "bedroom", "office", "garage", "hall", "bathroom", "living room", "garden")
ATTRIBUTES = ["price", "level", "status", "score", "rank", "color", "size", "weight", "height", "length", "speed", "owner", "age", "value", "code", "count", "limit", "mood", "pressure", "capacity", "balance", "rating", "version", "temperature", "salary", "address", "location", "delay", "discount", "stock", "quota"]
INFO_KEYS = ["result", "value", "status", "name", "total", "count", "price", "score", "date", "time", "unit", "message", "state", "level", "code", "type", "summary", "title"]

_CONSONANTS = ["b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "dr", "fl", "gr", "kl", "pr", "sh", "st", "tr"]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ou"]
_ENDS = ("", "", "", "n", "r", "l", "s", "x", "k", "t")


def made_up(rng: random.Random) -> str:
    """A lower-case word that means nothing, of one to three syllables."""
    syllables = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2, 2, 3))))
    return "".join(syllables) + rng.choice(_ENDS)


def made_up_name(rng: random.Random) -> str:
    """A made-up word as a name: mostly capitalised, at times two words."""
    name = made_up(rng).capitalize()
    return f"{name} {made_up(rng).capitalize()}" if rng.random() < 0.15 else name


def some_text(rng: random.Random, most: int = 4) -> str:
    """One to `most` words."""
    return " ".join(rng.choice(TEXT) for _ in range(rng.randint(1, most)))


def identifier(rng: random.Random) -> str:
    """A short code of letters and digits, such as an order number."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
    return letters + rng.choice(("", "-")) + digits
