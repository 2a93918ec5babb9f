"""Writes demo*.jsonl beside this file: small-world questions that a tiny model can learn.

demo.jsonl answers plainly (sums, weekdays, opposites, animal sounds, spelling forwards and backwards);
demo_pirate.jsonl answers a part of the same questions like a pirate, for the LoRA sequel. demo_quiz.jsonl asks some of
them with four choices, demo_answers.jsonl others with the whole answer, for demo_eval.yaml.
"""

import json
import random
from pathlib import Path

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "wet": "dry", "old": "young", "fast": "slow",
    "happy": "sad", "left": "right", "full": "empty", "open": "closed", "hard": "soft", "early": "late",
    "high": "low", "light": "dark", "loud": "quiet", "near": "far", "rich": "poor", "strong": "weak", "thick": "thin",
}  # fmt: skip
SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink", "horse": "neigh",
    "bee": "buzz", "frog": "ribbit", "owl": "hoot", "snake": "hiss", "lion": "roar", "mouse": "squeak",
}  # fmt: skip
COLOURS = {
    "banana": "yellow", "tomato": "red", "grass": "green", "snow": "white", "coal": "black", "sky": "blue",
    "carrot": "orange", "plum": "purple", "lemon": "yellow", "leaf": "green",
}  # fmt: skip
WORDS = (
    "apple arrow baker bird boat book bread brick bridge candle castle chair cheese circle cloud coin corn crown "
    "dance desk door dream drum eagle earth farm feather field fire fish flag flower forest garden ghost glass gold "
    "grape hammer hand harbor heart hill honey house island jacket jungle kettle king kite ladder lake lamp letter "
    "map market melon milk mirror moon mountain music needle nest ocean onion paint paper path pearl pencil piano "
    "planet pocket potato queen rain river road rocket room rope rose salt sand ship silver spoon star stone storm "
    "sugar summer sun table tiger tower train tree valley village violin wagon water wheel wind window winter wolf"
).split()


def facts() -> list[tuple[str, str]]:
    """All (question, answer) pairs, in a fixed order."""
    pairs = [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(11) for b in range(11)]
    for i, day in enumerate(DAYS):
        pairs.append((f"What day comes after {day}?", f"{DAYS[(i + 1) % 7]} comes after {day}."))
        pairs.append((f"What day comes before {day}?", f"{DAYS[i - 1]} comes before {day}."))
    for a, b in [*OPPOSITES.items(), *((b, a) for a, b in OPPOSITES.items())]:
        pairs.append((f"What is the opposite of {a}?", f"The opposite of {a} is {b}."))
    pairs += [(f"What does a {a} say?", f"A {a} says {s}.") for a, s in SOUNDS.items()]
    pairs += [(f"What colour has {t}?", f"It is {c}.") for t, c in COLOURS.items()]
    pairs += [(f"Spell {w}.", "-".join(w)) for w in WORDS]
    pairs += [(f"Spell {w} backwards.", "-".join(reversed(w))) for w in WORDS]
    return pairs


def pirate(answer: str) -> str:
    return f"Arr! {answer.rstrip('.')}, matey!"


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for question, answer in pairs:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": turns}) + "\n")


def write_quiz(path: Path, pairs: list[tuple[str, str]], rng: random.Random) -> None:
    """Questions with the right answer among three of other questions of the same kind."""
    with path.open("w", encoding="utf-8") as out:
        for question, answer in pairs:
            kind = " ".join(question.split()[:3])
            others = sorted({a for q, a in facts() if q.startswith(kind) and a != answer})
            choices = [answer, *rng.sample(others, 3)]
            rng.shuffle(choices)
            out.write(json.dumps({"question": question, "choices": choices, "answer": choices.index(answer)}) + "\n")


def write_answers(path: Path, pairs: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"prompt": question, "answer": answer}) + "\n" for question, answer in pairs)


def main() -> None:
    here, pairs = Path(__file__).parent, facts()
    random.Random(0).shuffle(pairs)
    write(here / "demo.jsonl", pairs)
    write(here / "demo_pirate.jsonl", [(q, pirate(a)) for q, a in pairs[::2]])
    short = [(q, a) for q, a in pairs if not q.startswith("Spell")]
    write_quiz(here / "demo_quiz.jsonl", short[:60], random.Random(1))
    write_answers(here / "demo_answers.jsonl", short[60:100])


if __name__ == "__main__":
    main()
