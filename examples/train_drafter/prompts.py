"""Training prompts: templates whose slots are filled from word lists.

``templates.txt`` has one template a line, its slots in braces, ``\\n`` for a new line. ``{name}`` is another
word at every place, ``{name1}`` the same word wherever it has that number. ``words.txt`` has one list a line,
``slot: word | word | …``. The held-out prompts are a file of their own (:data:`HELD_OUT`): no training prompt
equals one of them, and no word list has one of their topics.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dflash_export.errors import RecipeError
from dflash_rt.text.prompt_files import read_prompts, read_text

__all__ = [
    "HELD_OUT",
    "Template",
    "lines_of",
    "normalised",
    "own_prompts",
    "read_templates",
    "read_words",
    "training_prompts",
]

_FOLDER = Path(__file__).parent
HELD_OUT = _FOLDER.parent / "smollm2-135m-instruct-dflash" / "heldout_prompts.json"
_SLOT = re.compile(r"\{([a-z]+)(\d*)\}")
_TRIES = 20  # draws before a template counts as used up


@dataclass(frozen=True)
class Template:
    """One template. ``slots`` has for each list how many words of it are needed."""

    text: str
    slots: Mapping[str, int]

    def fill(self, words: Mapping[str, Sequence[str]], draw: random.Random) -> str:
        """A prompt with words drawn at random, no word of a list twice."""
        drawn = {slot: draw.sample(words[slot], count) for slot, count in self.slots.items()}
        numbered: dict[str, str] = {}

        def word(match: re.Match[str]) -> str:
            if match[0] in numbered:
                return numbered[match[0]]
            chosen = drawn[match[1]].pop()
            if match[2]:
                numbered[match[0]] = chosen
            return chosen

        return _SLOT.sub(word, self.text)


def normalised(prompt: str) -> str:
    """Letters and digits alone, in lower case: prompts that differ in nothing else count as the same."""
    return re.sub(r"\W+", " ", prompt.casefold()).strip()


def read_words(path: Path) -> dict[str, tuple[str, ...]]:
    """The word lists by slot. Raises RecipeError for a malformed line or a repeated list or word."""
    words: dict[str, tuple[str, ...]] = {}
    for number, line in lines_of(path):
        slot, colon, rest = line.partition(":")
        found = tuple(word.strip() for word in rest.split("|"))
        if not colon or slot in words or not all(found) or len(set(found)) < len(found):
            raise RecipeError(
                f"line {number} of {path.name} is wrong",
                found=line[:80],
                expected="slot: word | word | …, each slot and each of its words once",
                remedy="correct the line",
            )
        words[slot] = found
    return words


def read_templates(words: Mapping[str, Sequence[str]], path: Path) -> list[Template]:
    """All templates. Raises RecipeError for a slot without a word list."""
    templates = []
    for number, line in lines_of(path):
        text = line.replace(r"\n", "\n")
        places = [
            (match[1], match[0] if match[2] else str(at)) for at, match in enumerate(_SLOT.finditer(text))
        ]
        slots = Counter(slot for slot, _ in set(places))
        missing = [slot for slot, count in slots.items() if count > len(words.get(slot, ()))]
        if missing or _SLOT.sub("", text).count("{"):
            raise RecipeError(
                f"line {number} of {path.name} has a slot that can't be filled",
                found=", ".join(sorted(missing)) or line[:80],
                expected=f"slots of words.txt: {', '.join(sorted(words))}",
                remedy="correct the slot, or add words to its list",
            )
        templates.append(Template(text, slots))
    return templates


def training_prompts(
    count: int, *, seed: int, held_out: Collection[str], folder: Path = _FOLDER
) -> list[str]:
    """``count`` distinct prompts, templates in turn; the same for the same arguments.

    A higher ``count`` gives the same prompts and then more. ``folder`` has ``templates.txt`` and
    ``words.txt``. Raises RecipeError when the lists don't give as many.
    """
    words = read_words(folder / "words.txt")
    templates = read_templates(words, folder / "templates.txt")
    draw = random.Random(seed)
    seen = {normalised(prompt) for prompt in held_out}
    prompts: list[str] = []
    draw.shuffle(templates)
    while templates and len(prompts) < count:
        for template in list(templates):
            prompt = _new_prompt(template, words, draw, seen)
            if prompt is None:
                templates.remove(template)
            elif len(prompts) < count:
                prompts.append(prompt)
    if len(prompts) < count:
        raise RecipeError(
            "the templates don't give that many prompts",
            found=f"{count} prompts wanted",
            expected=f"at most about {len(prompts)}",
            remedy="ask for fewer prompts, or add templates and words",
        )
    return prompts


def own_prompts(path: Path, held_out: Collection[str]) -> list[str]:
    """Prompts from a file, as ``dflash-bench run`` reads them. RecipeError for a held-out one."""
    prompts = read_prompts(path)
    known = {normalised(prompt) for prompt in held_out}
    if leaks := [prompt for prompt in prompts if normalised(prompt) in known]:
        raise RecipeError(
            f"{path} has held-out prompts in it",
            found=f"{len(leaks)}, such as {leaks[0][:80]!r}",
            expected="training prompts that the evaluation doesn't ask",
            remedy="remove them from one of the two files",
        )
    return prompts


def _new_prompt(
    template: Template, words: Mapping[str, Sequence[str]], draw: random.Random, seen: set[str]
) -> str | None:
    for prompt in itertools.islice(iter(lambda: template.fill(words, draw), None), _TRIES):
        if (key := normalised(prompt)) not in seen:
            seen.add(key)
            return prompt
    return None


def lines_of(path: Path) -> list[tuple[int, str]]:
    """Lines with their numbers, without empty ones and comments (``#``). Raises PromptError."""
    lines = enumerate(read_text(path).splitlines(), 1)
    return [(number, line) for number, line in lines if line.strip() and not line.startswith("#")]
