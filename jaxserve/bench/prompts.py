"""Varied prompts whose real answers differ widely in length.

Made from templates, so that no data set has to be downloaded: what is asked for (a greeting, a
word, a sum, n sentences, a story, code, ...) and about what are drawn independently.
"""

import dataclasses
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """One conversation to be answered.

    Attributes:
        kind: the family of templates it comes from.
        messages: for `LLM.chat`: roles and contents.
    """

    kind: str
    messages: tuple[dict[str, str], ...]


def make_prompts(count: int, *, seed: int = 0) -> list[ChatPrompt]:
    """Draw `count` different prompts, all kinds about equally often, in random order.

    Args:
        count: how many.
        seed: the same seed gives the same prompts.

    Raises:
        ConfigError: there are not that many different ones, or none are asked for.
    """
    if count < 1:
        raise ConfigError(f"there must be at least one prompt, got {count}")
    rng = random.Random(seed)
    found: dict[str, ChatPrompt] = {}
    kinds = list(KINDS)
    for attempt in range(100 * count):  # a drawn twin is thrown away
        kind = kinds[attempt % len(kinds)]
        text = KINDS[kind](rng)
        found.setdefault(text, ChatPrompt(kind, ({"role": "user", "content": text},)))
        if len(found) == count:
            prompts = list(found.values())
            rng.shuffle(prompts)
            return prompts
    raise ConfigError(f"the templates give only {len(found)} different prompts, not {count}")


def tokenize_prompts(config: EngineConfig, prompts: Iterable[ChatPrompt]) -> list[list[int]]:
    """Token ids of prompts as the chat template of the config's model renders them.

    Raises:
        JaxserveError: the model has no tokenizer, or no template.
    """
    from jaxserve.checkpoints.load import open_checkpoint
    from jaxserve.checkpoints.pull import resolve_model
    from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
    from jaxserve.tokenizers.loading import load_tokenizer

    if config.tokenizer is not None:
        tokenizer = load_tokenizer(Path(config.tokenizer))
    elif config.random_weights:
        tokenizer = ByteTokenizer()
    else:
        path, allowed = resolve_model(config.model), config.allow_unknown_config
        checkpoint = open_checkpoint(path, allow_unknown=allowed)
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    return [tokenizer.apply_chat_template(prompt.messages) for prompt in prompts]


_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ines", "Jonas", "Kim",
    "Leo", "Maria", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Yusuf",
)  # fmt: skip
_THINGS = (
    "a dog", "the moon", "a lighthouse", "an old clock", "a river", "a robot", "a lost key",
    "bread", "a mountain", "winter", "a small boat", "a library", "the sea", "a garden", "a train",
    "music", "a friendly dragon", "a violin", "the desert", "a bakery", "a letter", "an island",
    "the rain", "a bicycle", "a clever fox", "a market", "the night sky", "a teacher", "a forest",
    "an apple",
)  # fmt: skip
_TOPICS = (
    "photosynthesis", "gravity", "the water cycle", "inflation", "vaccines", "evolution", "magnets",
    "the French Revolution", "black holes", "democracy", "earthquakes", "electricity", "recycling",
    "the immune system", "computer memory", "rainbows", "the printing press", "supply and demand",
    "plate tectonics", "the internet", "batteries", "volcanoes", "the Roman Empire", "tides",
    "climate change", "the solar system", "DNA", "steam engines", "friction", "the human heart",
)  # fmt: skip
_GROUPS = (
    "fruits", "animals", "countries in Europe", "colors", "sports", "vegetables", "planets",
    "birds", "kitchen tools", "musical instruments", "professions", "cities in Asia",
    "things in a school bag", "ways to save money", "healthy breakfasts", "uses for a brick",
    "reasons to read books", "famous scientists", "board games", "tips for a job interview",
)  # fmt: skip
_FACTS = (
    ("capital of", ("France", "Japan", "Italy", "Egypt", "Canada", "Spain", "Norway", "Peru",
                    "Kenya", "India", "Greece", "Cuba")),
    ("chemical symbol of", ("gold", "iron", "oxygen", "sodium", "silver", "carbon", "helium")),
    ("opposite of", ("hot", "early", "heavy", "brave", "empty", "loud", "narrow", "ancient")),
    ("color of", ("the sky", "grass", "snow", "a ripe banana", "coal", "blood", "the sun")),
    ("plural of", ("mouse", "child", "leaf", "goose", "city", "box", "man", "foot")),
)  # fmt: skip
_SENTENCES = (
    "The cat sleeps on the chair.", "Where is the train station?", "I would like a cup of coffee.",
    "We are going to the beach tomorrow.", "My brother works in a hospital.",
    "It is very cold today.", "The book is on the table.", "How much does this cost?",
    "She has lived here for ten years.",
    "Please close the window.", "They have three children.", "I lost my umbrella.",
)  # fmt: skip
_PARAGRAPHS = (
    "The city council voted on Tuesday to turn the old railway line into a park. Work begins in "
    "spring and should take two years. Residents welcomed the plan, but some shop owners worry "
    "about parking during construction. The council promised a free shuttle bus.",
    "Honey bees live in colonies with one queen and thousands of workers. The workers collect "
    "nectar, feed the young and guard the hive. In winter the colony forms a cluster to stay warm "
    "and lives on the honey it has stored.",
    "A new study followed 2,000 adults over ten years. Those who walked at least thirty minutes a "
    "day reported better sleep and less stress. The authors warn that the study cannot prove that "
    "walking is the cause.",
    "The museum's oldest painting was found in a farmhouse in 1921, behind a cupboard. Experts "
    "cleaned it for six months. Today it hangs in the main hall and draws half a million visitors "
    "each year.",
    "Our company sold 12 percent more bicycles this year than last. Most of the growth came from "
    "electric models. Repairs, however, took longer because spare parts were scarce, and two "
    "shops had to close for a month.",
    "Mountain rivers carry stones, sand and clay into the valley. Where the river slows down, the "
    "heaviest pieces sink first. Over thousands of years these layers become flat and fertile "
    "land that farmers value.",
)  # fmt: skip
_FUNCTIONS = (
    "reverses a string", "checks whether a number is prime", "sorts a list of numbers",
    "counts the vowels in a text", "computes the factorial of n",
    "finds the largest number in a list", "merges two dictionaries",
    "removes duplicates from a list", "converts Celsius to Fahrenheit",
    "reads a file and counts its lines", "checks whether a word is a palindrome",
    "computes the n-th Fibonacci number", "adds two matrices", "flattens a nested list",
)  # fmt: skip
_ERRANDS = (
    "asking for a day off", "thanking a colleague for help", "cancelling a meeting",
    "complaining about a late delivery", "inviting a friend to dinner", "applying for a job",
    "asking a neighbor to water the plants", "reporting a broken heater", "asking for a refund",
    "announcing a new product", "apologizing for a mistake", "introducing a new team member",
)  # fmt: skip
_GREETINGS = (
    "Hi!", "Hello there.", "Good morning!", "Hey, how are you?", "Good evening.", "Thanks!",
    "Thank you very much for your help.", "Bye!", "See you tomorrow.", "What's up?",
    "Nice to meet you.", "Good night!", "Hello, my name is {name}.", "Hi, I am {name}. And you?",
    "Good afternoon, {name} here.", "Happy birthday!", "Greetings from {name}!", "Are you there?",
)  # fmt: skip
_LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese")


def _greeting(rng: random.Random) -> str:
    return rng.choice(_GREETINGS).format(name=rng.choice(_NAMES))


def _fact(rng: random.Random) -> str:
    relation, things = rng.choice(_FACTS)
    ask = rng.choice(("What is the {}?", "What is the {}? Answer with one word.", "Name the {}."))
    return ask.format(f"{relation} {rng.choice(things)}")


def _arithmetic(rng: random.Random) -> str:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return rng.choice((
        f"What is {a} + {b}?", f"Compute {a} times {b}.", f"{a + b} - {b} = ?",
        f"What is {a} + {b}? Reply with the number only.",
        f"{rng.choice(_NAMES)} has {a} apples and buys {b} more. How many apples are there now? "
        "Explain step by step.",
    ))  # fmt: skip


def _yes_or_no(rng: random.Random) -> str:
    a, b = rng.sample(_THINGS, 2)
    return rng.choice((
        f"Yes or no: is {a} bigger than {b}?", f"True or false: {a} can be heavier than {b}.",
        f"Answer with yes or no only. Have you ever seen {a}?",
    ))  # fmt: skip


def _list(rng: random.Random) -> str:
    count, group = rng.choice((2, 3, 5, 7, 10, 15, 20)), rng.choice(_GROUPS)
    return rng.choice((
        f"List {count} {group}.", f"Name {count} {group}, separated by commas.",
        f"Give me {count} {group} and explain each one.",
        f"Write a numbered list of {count} {group}.",
    ))  # fmt: skip


def _story(rng: random.Random) -> str:
    thing, name = rng.choice(_THINGS), rng.choice(_NAMES)
    return rng.choice((
        f"Write a long story about {thing} and {name}.",
        f"Tell me a story about {thing} in {rng.choice(('two', 'three', 'four'))} sentences.",
        f"Write a very short story about {thing}.",
        f"Write the first chapter of a novel in which {name} finds {thing}.",
        f"Write a one-sentence story about {name} and {thing}.",
    ))  # fmt: skip


def _explanation(rng: random.Random) -> str:
    topic = rng.choice(_TOPICS)
    return rng.choice((
        f"Explain {topic} in {rng.choice(('one', 'two', 'three', 'five'))} sentences.",
        f"Explain {topic} to a five-year-old.", f"Explain {topic} in detail.",
        f"What is {topic}? Answer in one short sentence.",
        f"Write an essay of 500 words about {topic}.",
    ))  # fmt: skip


def _code(rng: random.Random) -> str:
    language = rng.choice(("Python", "Python", "JavaScript", "C"))
    task = f"a {language} function that {rng.choice(_FUNCTIONS)}"
    return rng.choice((
        f"Write {task}.", f"Write {task}. Only code, no explanation.",
        f"Write {task}, with comments and an example.",
    ))  # fmt: skip


def _translation(rng: random.Random) -> str:
    language, count = rng.choice(_LANGUAGES), rng.choice((1, 1, 2, 4))
    return f"Translate into {language}: {' '.join(rng.sample(_SENTENCES, count))}"


def _summary(rng: random.Random) -> str:
    paragraphs = rng.sample(_PARAGRAPHS, rng.choice((1, 1, 2)))
    ask = rng.choice((
        "Summarize this in one sentence:", "Summarize the following text:",
        "What is the main point of this text?", "Write a title for this text:",
        "List the key points of this text:", "Rewrite this text in simpler words:",
    ))  # fmt: skip
    return "\n\n".join([ask, *paragraphs])


def _poem(rng: random.Random) -> str:
    form = rng.choice(
        ("a haiku", "a poem", "a four-line poem", "a long poem", "a limerick", "a song")
    )
    return f"Write {form} about {rng.choice(_THINGS)}."


def _email(rng: random.Random) -> str:
    size = rng.choice(("an email", "a short email", "a formal letter", "a two-sentence message"))
    return f"Write {size} to {rng.choice(_NAMES)} {rng.choice(_ERRANDS)}."


def _rewrite(rng: random.Random) -> str:
    sentence = rng.choice(_SENTENCES)
    return rng.choice((
        f"Correct the grammar: {sentence.lower()}", f"Repeat exactly: {sentence}",
        f"Write in capital letters: {sentence}", f"How many words are in this sentence? {sentence}",
        f"Say this in five different ways: {sentence}",
    ))  # fmt: skip


def _advice(rng: random.Random) -> str:
    topic, count = rng.choice(_TOPICS), rng.choice((3, 5))
    return rng.choice((
        f"What should I read to learn about {topic}?",
        f"Give me {count} exam questions on {topic}.",
        f"Make a lesson plan for one hour on {topic}.", f"Why does {topic} matter?",
        f"Compare {topic} and {rng.choice(_TOPICS)}.", f"Invent a title for a talk on {topic}.",
    ))  # fmt: skip


KINDS: dict[str, Callable[[random.Random], str]] = {
    "greeting": _greeting,
    "fact": _fact,
    "arithmetic": _arithmetic,
    "yes-or-no": _yes_or_no,
    "list": _list,
    "story": _story,
    "explanation": _explanation,
    "code": _code,
    "translation": _translation,
    "summary": _summary,
    "poem": _poem,
    "email": _email,
    "rewrite": _rewrite,
    "advice": _advice,
}
