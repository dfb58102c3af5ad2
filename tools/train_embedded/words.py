"""Words for the generated conversations, and random strings for the model to copy."""

from __future__ import annotations

import random


def words_of(text: str) -> list[str]:
    """The words of a line."""
    return text.split()


CITIES = words_of(
    "Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Stockholm Helsinki Copenhagen Amsterdam "
    "Brussels Zurich Geneva Prague Warsaw Budapest Athens Istanbul Cairo Lagos Nairobi Dubai Mumbai Delhi Bangkok "
    "Singapore Tokyo Osaka Seoul Beijing Shanghai Sydney Melbourne Auckland Toronto Montreal Vancouver Boston "
    "Chicago Denver Seattle Austin Miami Lima Bogota Santiago Hamburg Munich Cologne Lyon Nice Milan Naples Porto "
    "Basel Kyoto"
)
CITIES += ["New York", "San Francisco", "Los Angeles", "Hong Kong", "Rio de Janeiro", "Mexico City", "Cape Town"]
CITIES += ["San Francisco, CA", "Boston, MA", "Austin, Texas", "Paris, France", "Sao Paulo", "Buenos Aires"]
COUNTRIES = words_of(
    "France Germany Spain Italy Portugal Ireland Norway Sweden Finland Denmark Austria Poland Greece Turkey Egypt "
    "Kenya India Thailand Japan China Australia Canada Brazil Peru Chile Mexico Iceland Belgium Hungary Morocco"
)
PEOPLE = words_of(
    "Anna Ben Carla David Emma Felix Grace Hugo Ines Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tom Uma Victor "
    "Wendy Yara Zoe Alice Bob Carol Dan Eve Frank Lena Max Mia Noah Olga Peter Ruth Sara Tim Lucy"
)
CURRENCIES = words_of("USD EUR GBP JPY CHF CAD AUD CNY INR SEK NOK DKK PLN BRL MXN ZAR KRW TRY")
UNITS = words_of(
    "meters feet inches miles kilometers kilograms pounds ounces grams liters gallons yards celsius fahrenheit"
)
COMPANIES = words_of(
    "Apple Google Microsoft Amazon Tesla Nvidia Intel Toyota Siemens Nestle Shell Sony Samsung IBM"
)
SYMBOLS = words_of("AAPL GOOG MSFT AMZN TSLA NVDA INTC IBM SONY META NFLX ORCL AMD SAP NKE KO")
LANGUAGES = words_of("French German Spanish Italian Portuguese Dutch Greek Polish Japanese Korean Chinese Arabic")
THINGS = words_of(
    "apples books coins stamps pencils marbles cards eggs cookies flowers shells stickers tickets chairs bottles "
    "cups oranges balls toys keys"
)
TOPICS = words_of(
    "music history football chess gardening physics cooking sailing robots dogs cats birds rivers planets trains "
    "coffee tea bread cheese energy climate health art money travel science movies games weather space"
)
TEXT = words_of(
    "meeting lunch dinner report project update team call review plan budget order invoice holiday party birthday "
    "travel notes draft slides deadline question answer hello good morning thanks see you soon today tomorrow the "
    "new old blue red green big small open close start end first last next happy cold warm fresh"
)
CONDITIONS = words_of("sunny cloudy rainy windy snowy foggy stormy clear overcast misty humid")
ROOMS = ("kitchen", "bedroom", "office", "garage", "hall", "bathroom", "living room", "garden")
ATTRIBUTES = words_of(
    "price level status score rank color size weight height length speed owner age value code count limit mood "
    "pressure capacity balance rating version temperature salary address location delay discount stock quota"
)
INFO_KEYS = words_of(
    "result value status name total count price score date time unit message state level code type summary title"
)

_CONSONANTS = words_of("b c d f g h j k l m n p r s t v w z br dr fl gr kl pr sh st tr")
_VOWELS = words_of("a e i o u a e i o ai ou")
_ENDS = ("", "", "", "n", "r", "l", "s", "x", "k", "t")


_STARTS = words_of(
    "spring west east north south wood green lake hill stone rock river king queen oak ash black white bright"
)
_TAILS = words_of(
    "field brook ton ville ford land port burg shire view wood stone bridge dale mouth ham ley worth side gate"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def made_up(rng: random.Random) -> str:
    """A lower-case word without meaning: syllables, parts of place names, letter sequences like those of real words,
    or random letters."""
    draw = rng.random()
    if draw < 0.5:
        syllables = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2, 2, 3))))
        return "".join(syllables) + rng.choice(_ENDS)
    if draw < 0.6:
        return rng.choice(_STARTS) + rng.choice(_TAILS)
    if draw < 0.92:
        return _likely(rng)
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 7)))


def _likely(rng: random.Random) -> str:
    """A random walk over the letter pairs of real words."""
    word = rng.choice(_REAL)[: rng.choice((1, 2, 2, 3))]
    goal = rng.randint(3, 10)
    while len(word) < goal:
        following = _FOLLOWING.get(word[-2:]) or _FOLLOWING.get(word[-1:])
        if not following:
            break
        word += rng.choice(following)
    return word


_REAL = [
    word.lower()
    for words in (CITIES, COUNTRIES, PEOPLE, COMPANIES, LANGUAGES, THINGS, TOPICS, TEXT, ATTRIBUTES)
    for word in words
    if word.isalpha()
]
_FOLLOWING: dict[str, list[str]] = {}
for _word in _REAL:
    for _end in range(1, len(_word)):
        for _start in range(max(0, _end - 2), _end):
            _FOLLOWING.setdefault(_word[_start:_end], []).append(_word[_end])


def made_up_name(rng: random.Random) -> str:
    """A made-up name: one capitalised word, sometimes two."""
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
