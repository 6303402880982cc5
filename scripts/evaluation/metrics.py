"""How good an answer is: the metrics of text-reading benchmarks, as their authors compute them.

Each takes an answer and the right answers, and returns a number from 0 to 1.
"""

import re
from collections.abc import Callable, Sequence

from minimonkey.grounding import parse_boxes


Metric = Callable[[str, Sequence[str]], float]


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Count the fewest insertions, deletions and substitutions between two strings, or lists of words (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def nearest_reference(answer: str, references: Sequence[str]) -> tuple[str, int]:
    """Return the right answer that is closest in edits for its length, and how many edits away it is."""
    distances = [(edit_distance(answer, reference), reference) for reference in references]
    edits, reference = min(distances, key=lambda pair: pair[0] / max(1, len(pair[1])))
    return reference, edits


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 for an answer that is spelled exactly like a right one; case counts."""
    return float(answer in references)


def word_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return 1 less the word error rate against the closest right answer, at least 0; case and punctuation count."""
    words = answer.split()
    rates = [edit_distance(words, right) / max(1, len(right)) for right in map(str.split, references)]
    return max(0.0, 1 - min(rates))


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Return the average normalised Levenshtein similarity to the closest right answer; below `threshold` it is 0.

    Edits are counted without case and runs of spaces, the length that divides them with every space that was written.
    Source: Biten et al., Scene Text Visual Question Answering (arXiv 1905.13648), in the form of the DocVQA evaluation
    script, where a similarity of exactly the threshold counts.
    """
    similarities = []
    for reference in references:
        pair = [" ".join(text.lower().split()) for text in (answer, reference)]
        length = max(len(text.upper()) for text in (answer, reference))  # upper case as in the script: "ß" is two
        similarities.append(1 - edit_distance(*pair) / length if length else 1.0)
    best = max(similarities)
    return best if best >= threshold else 0.0


def relaxed_accuracy(answer: str, references: Sequence[str], tolerance: float = 0.05) -> float:
    """Return 1 for a number within `tolerance` of the right one, or for the same text regardless of case.

    "12%" is read as 0.12; a right answer of zero has to be given as it is written. Source: Methani et al., PlotQA (arXiv
    1909.00997), as Masry et al. use it for ChartQA (arXiv 2203.10244).
    """
    return float(any(_is_close(answer.strip(), reference.strip(), tolerance) for reference in references))


def _is_close(answer: str, reference: str, tolerance: float) -> bool:
    given, right = _number(answer), _number(reference)
    if given is not None and right:
        return abs(given - right) / abs(right) <= tolerance
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def ocrbench(answer: str, references: Sequence[str]) -> float:
    """Return 1 if a right answer occurs in the answer; case and line ends do not count.

    Source: Liu et al., OCRBench (arXiv 2305.07895).
    """
    answer = answer.lower().strip().replace("\n", " ")
    return float(any(reference.lower().strip().replace("\n", " ") in answer for reference in references))


def ocrbench_formula(answer: str, references: Sequence[str]) -> float:
    """Score handwritten formulas as `ocrbench` does, but case counts and spaces do not."""
    answer = "".join(answer.split())
    return float(any("".join(reference.split()) in answer for reference in references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the soft accuracy over several people's answers: min(1, how many others said it / 3), leaving each out in turn.

    Meant for ten answers, and at most 2/3 for three of them; a single answer has to be met. Source: Antol et al., VQA (arXiv
    1505.00468), with the normalisation of the TextVQA evaluation.
    """
    answer, people = normalise_vqa(answer), [normalise_vqa(reference) for reference in references]
    if len(people) == 1:
        return float(answer == people[0])
    agreeing = people.count(answer)
    scores = [min(1.0, (agreeing - (person == answer)) / 3) for person in people]
    return sum(scores) / len(scores) if agreeing else 0.0


NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've
"""
# A word that lacks one of its apostrophes; the official table has one more line, which goes the other way.
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTED.split()
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalise_vqa(text: str) -> str:
    """Normalise to lower case, digits for number words, no punctuation or articles, and apostrophes where they belong."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = text
    for mark in PUNCTUATION:
        is_at_word_end = mark + " " in text or " " + mark in text
        joined = joined.replace(mark, "" if is_at_word_end else " ")
    joined = re.sub(r"\.(?!\d)", "", joined)
    words = [DIGITS.get(word, word) for word in joined.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def same_text(answer: str, references: Sequence[str]) -> float:
    """Return 1 for an answer that is a right one but for case and surrounding spaces, as GQA, RSVQA and VQA-RAD count."""
    return float(answer.strip().lower() in (reference.strip().lower() for reference in references))


LETTER = re.compile(r"(?<![A-Za-z'])\(?([A-H])(?:[).:,]|(?![A-Za-z']))")


def chosen_letter(answer: str) -> str | None:
    """Return the option that an answer names by its letter: "B", "(B)", "B. two", "The answer is B."; None if it names none.

    A letter at the beginning counts; elsewhere "A" and "I" may be words, so the last letter that stands alone does.
    """
    answer = answer.strip().rstrip(".")
    if match := LETTER.match(answer):
        return match[1] if len(answer) < 3 or not re.match(r"A [a-z]", answer) else None
    found = LETTER.findall(answer)
    return found[-1] if found else None


def choice(answer: str, references: Sequence[str]) -> float:
    """Return 1 for the letter of a right option, or for the text of it where a reference gives it as "B. two"."""
    letters = [reference[:1] for reference in references]
    texts = [reference[2:].strip().lower() for reference in references if reference[1:2] == "."]
    return float(chosen_letter(answer) in letters or answer.strip().rstrip(".").lower() in texts)


def chosen_yes_or_no(answer: str) -> str | None:
    """Return "yes" or "no", whichever an answer says alone; None for both or neither."""
    words = set(re.findall(r"[a-z]+", answer.lower())) & {"yes", "no"}
    return words.pop() if len(words) == 1 else None


def yes_no(answer: str, references: Sequence[str]) -> float:
    """Return 1 for an answer that says yes or no as a right one does."""
    return float(chosen_yes_or_no(answer) in [chosen_yes_or_no(reference) for reference in references if reference])


def last_number(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the last number of the answer is the right one, to the decimals that the right one has, or for the same text.

    MathVista's own evaluation lets a language model find the value in the answer; this looks for it.
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", ""))
    for reference in references:
        if same_text(answer, [reference]):
            return 1.0
        right = _number(reference.replace(",", ""))
        decimals = len(reference.partition(".")[2])
        if numbers and right is not None and round(float(numbers[-1]), decimals) == round(right, decimals):
            return 1.0
    return 0.0


def box(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the first box of the answer and that of a right one overlap by more than half (IoU, Acc@0.5)."""
    try:
        given = parse_boxes(answer)
    except ValueError:
        return 0.0
    rights = [parse_boxes(reference)[0].box for reference in references]
    return float(bool(given) and any(box_overlap(given[0].box, right) > 0.5 for right in rights))


def box_overlap(first: Sequence[float], second: Sequence[float], edge: float = 0.0) -> float:
    """Return the IoU of two boxes (left, top, right, bottom); `edge` is 1 for pixels with both edges in the box."""
    across = min(first[2], second[2]) - max(first[0], second[0]) + edge
    down = min(first[3], second[3]) - max(first[1], second[1]) + edge
    shared = max(0.0, across) * max(0.0, down)
    areas = [(right - left + edge) * (bottom - top + edge) for left, top, right, bottom in (first, second)]
    return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0


METRICS: dict[str, Metric] = {
    "same_text": same_text,
    "choice": choice,
    "yes_no": yes_no,
    "last_number": last_number,
    "exact_match": exact_match,
    "word_accuracy": word_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "ocrbench": ocrbench,
    "ocrbench_formula": ocrbench_formula,
    "vqa_accuracy": vqa_accuracy,
    "box": box,
}
