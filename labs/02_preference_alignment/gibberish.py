"""Is this text a reply at all? Empty, random letters, loops, word salad and broken markup are not.

`refusals.classify_reply` asks this first: a model damaged by its training answers in gibberish, which is neither help nor
safety. Each check looks for one kind of damage and returns a bool; the thresholds leave room for short answers, lists,
code, formulas and other languages. What they cannot see: words in a wrong order that still fit together in pairs.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter

# A loop fills whatever room it gets: the beginning and the end are enough, and bound the time.
HEAD, TAIL = 6000, 2000

# Pairs of letters that words of European languages all but never have (under 20 in a million in half a million words of
# English, less those that are usual in German, French, Polish, Dutch and their neighbours): first letter → second ones.
RARE_PAIRS = {
    first + second
    for first, seconds in zip(
        "bcdfghijklmnopqrtuvwxyz",
        (
            "cdfghkmnpqwxz bfgjpqvwx bhjpqx bcdghjkmpqvwxz cdfjpqvwxz cfgjkpqxz hwy bcdfghklmnpqrstvwxyz bcdhjpqvwxz "
            "hjqxz "
            "cdghjqvwxz qx q bdgjknqvwxz bcdefghjklmnopqrstvwxyz jqx djqx jqw bcdfghjkmnpqswxz cgjmpquvxz "
            "bdfghjklmnoqrsvwxz ghjqvx cfghjkqrsvx"
        ).split(),
        strict=True,
    )
    for second in seconds
}
WORD = re.compile(r"\w+(?:['’]\w+)*")
LETTERS = re.compile(r"[a-z]+")
FENCED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
FORMULA = re.compile(r"\$\$.{1,400}?\$\$|\$[^$\n]{1,200}\$|\\\[.{1,400}?\\\]|\\\(.{1,200}?\\\)", re.DOTALL)
LINK = re.compile(r"\b(?:https?://|www\.)\S{1,500}|\S{1,80}@\S{1,80}|<[!?][^<>]{0,200}>")
JSON_START = re.compile(r"(?:(?<=[\s>:])|\A)[{\[]")
TAG = re.compile(r"<(/?)([A-Za-z][\w:.-]{0,40})([^<>]{0,300}?)(/?)>")
VOID_TAGS = {
    "br",
    "hr",
    "img",
    "input",
    "meta",
    "link",
    "p",
    "li",
    "td",
    "tr",
    "th",
    "dt",
    "dd",
    "doctype",
    "col",
    "wbr",
}
BLANK = re.compile(r"\S[ \t\r]{60}|\n{20}")
GLUED = re.compile(
    r"[A-Za-z]{3,}\d+(?=[A-Z])|\d[A-Z][a-z]{2,}|[a-z]{2}[A-Z]{2,}[a-z]{2}|[A-Za-z][?!>}\]=:\";](?=[A-Z][a-z])"
)
CRUMB = re.compile(r"\"\s?:|</?$|</\W|<\w+[{\"]")
INLINE_TAGS = {"b", "i", "em", "strong", "code", "a", "u", "s", "sub", "sup", "span", "q", "think"}
LETTER_LOOP = re.compile(r"([^\W\d_]{1,6}?)\1{5,}")
SYMBOL_LOOP = re.compile(r"([{}\[\]<>()@#$%^&|~,:;\"'/\\]{1,3}?)\1{5,}")
# A line of a program, where several stand the rules of language do not hold.
CODE = re.compile(
    r"^\s*(?:def |return\b|import |from \w+ import|for \w|while\b|if\b.*[:{]$|el(?:if|se)\b.*[:{]|class |function |"
    r"const |let |var |"
    r"#include|int |void |public |\w[\w.\[\]]* (?:[-+*/|]?=) .|print\(|\w+(?:\.\w+)*\(.*\);?$|>>> |[{}]$|SELECT |"
    r"INSERT )",
    re.MULTILINE,
)
SENTENCE = re.compile(r"[^.!?\n]+")

ARTICLES = "a an the".split()
PREPOSITIONS = "of in on at by for with from to into about between through under over".split()
VERBS = "is are was were be been has have had do does did can could will would should may might must".split()
PRONOUNS = "i he she they we".split()
OWNERS = "your their my our its".split()
# Function words of English and of other languages in Latin letters: running text without any of them is none.
FUNCTION_WORDS = {
    *ARTICLES, *PREPOSITIONS, *VERBS, *PRONOUNS, *OWNERS,
    *(
        "and or but not no if as so than that this these those it its you me his her them us am who what which when "
        "where how why "
        "there here all any some each more most other such then too very just also now only up out near after before "
        "until while "
        "de la le les el los las un une una y en que es et est du des pour dans ne pas je il elle nous vous der die "
        "das den dem "
        "ein eine und ist nicht mit von zu auf für im sich ich sie wir o os um uma e do da em com não por se lo gli "
        "di che per "
        "non sono het een van niet met op te zijn w z na i nie jest to że og er det på som är att och ve bir bu para "
        "yang dan "
        "con al pero como sin avec mais ou qui sont aus bei nach auch oder sind aber voor maar ikke till av untuk "
        "dari ini itu dengan ya wa kwa ni ang ng sa mga ja on ei az és hogy și cu nu v je ad ut cum"
    ).split(),
}  # fmt: skip


def _pairs(left: str | list[str], right: str | list[str]) -> set[tuple[str, str]]:
    lefts, rights = (each.split() if isinstance(each, str) else each for each in (left, right))
    return {(a, b) for a in lefts for b in rights}


# Pairs that sentences all but never have: "the of", "of was", "they of". One of them proves nothing, several do.
CLASHES = (
    _pairs(ARTICLES, [*ARTICLES, *PREPOSITIONS, *VERBS[:13], *PRONOUNS, *OWNERS])  # "a can", "the will" are things
    | _pairs(ARTICLES, "and or but it you not if because that this which than as so there")
    | _pairs("of from into with at", "is are was were has have and or of to be with from")
    | _pairs("and or", "and or of")
    | _pairs("is are was were be", "is are was were have has")
    | _pairs("could would should may must", "is are was of the a an and to can will for by")
    | _pairs(OWNERS, "is are of to and or the a an in it can with for i he they as not was " + " ".join(OWNERS))
    | _pairs(PRONOUNS, "of the a an to for by i he as " + " ".join(OWNERS))
    | _pairs("to for", "of is are was and or to for")
    | _pairs("in", "is of and or are was")
    | _pairs("it", "of and they he it") | _pairs("you", "of is you") | _pairs("that not as", "of")
    | _pairs("not", "is are") | _pairs("as", "is are and or")
)  # fmt: skip
MISPLACED = re.compile(
    r"[a-z,] (?:The|It|They|He|She|We|This|That|These|There|However|Additionally|Instead|And|But|If|Is|Are|As|You|Your|When|"
    r"In|On|It's|Its|For|His|Her|To|Some|What|How|Yes|While) [a-z]"
)
COMMAND = re.compile(
    r"\s*(?:\$ |pip3?|npm|git|apt|sudo|docker|conda|python3?|uv|brew|cargo|echo|curl|make|cd|ls|cp|mv)\b"
)
# Said twice in a row on purpose.
DOUBLED = set(
    "in on yes that had is it very no so ha bye bora yo la na so far big much really well there now duran ho hi ok row".split()
)


def is_gibberish(text: str) -> bool:
    """Whether the text is empty, gibberish, a loop or broken markup. Never raises for a str; time linear in at most "
    "8 kB."""
    text = text.strip()
    if len(text) > HEAD + TAIL:
        text = text[:HEAD] + "\n" + text[-TAIL:]
    if not any(character.isalnum() for character in text):
        return not _is_json(text)  # [] and {} are answers
    if _is_broken_unicode(text):
        return True
    if text[0] in "{[" and _is_json(text):
        return False
    unfenced = LINK.sub(" x ", FORMULA.sub(" x ", FENCED.sub(" x ", text)))
    prose = _without_json(unfenced)
    words = WORD.findall(prose.lower())
    code = len(CODE.findall(prose))
    if code > 1 or (code and len(text.splitlines()) == 1 and "(" in text):
        return _loops(words, least=0.1)
    return (
        _has_character_loop(prose)
        or _has_broken_markup(prose, whole=unfenced == text)
        or _loops(words)
        or _repeats_sentences(prose)
        or _is_letter_soup(TAG.sub(" ", prose))
        or _is_word_salad(prose, words)
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _without_json(text: str) -> str:
    """The text with an x for each whole JSON object or array, as tool calls are written; the first twenty."""
    parts, done = [], 0
    for match in itertools.islice(JSON_START.finditer(text), 20):
        if match.start() < done:
            continue
        try:
            _, end = json.JSONDecoder().raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if not text[end : end + 1].isalnum():
            parts += [text[done : match.start()], " x "]
            done = end
    return "".join([*parts, text[done:]])


def _is_broken_unicode(text: str) -> bool:
    """Replacement, unassigned and control characters, lone surrogates; or letters of many scripts in a jumble."""
    broken, scripts = 0, Counter()
    text = text[:2000].removesuffix("\ufffd")  # a last character that was cut in two
    for character in text:
        if character.isascii():
            broken += character < " " and character not in "\t\n\r\f"
        elif character == "\ufffd" or unicodedata.category(character) in ("Cn", "Co", "Cs", "Cc"):
            broken += 1
        elif character.isalpha():
            scripts[unicodedata.name(character, "?").partition(" ")[0]] += 1
    common = sum(count for _, count in scripts.most_common(3))  # Japanese writes in three
    jumble = len(scripts) > 3 and sum(scripts.values()) - common > 2
    return broken > 0.002 * len(text) or jumble or len(re.findall(r"\r(?!\n)", text)) > 2 or bool(BLANK.search(text))


def _has_character_loop(text: str) -> bool:
    """aaaaaaaa, abababababab, {{{{{{{{: a third of the text, or a few dozen characters of it."""
    letters, symbols = (sum(len(match.group()) for match in loop.finditer(text)) for loop in (LETTER_LOOP, SYMBOL_LOOP))
    return letters > 24 or letters * 3 > len(text) or symbols > 60 or (symbols * 5 > len(text) and symbols > 3)


def _has_broken_markup(text: str, whole: bool) -> bool:
    """Tags and brackets that do not close one another, or a text mostly of symbols. `whole`: nothing was fenced off."""
    solid = len(re.sub(r"\s", "", text)) or 1
    structural = sum(text.count(symbol) for symbol in '{}[]<>"=|\\/:@#$%^&*~')
    dense = structural / solid
    opened: list[str] = []
    stray = tags = 0
    for match in TAG.finditer(text):
        closing, name, attributes, empty = match.groups()
        name = name.lower()
        tags += 1
        stray += match.start() == 0 and "=" not in attributes and len(attributes.split()) > 1
        if closing:
            if name in opened[-8:]:
                while opened.pop() != name:
                    stray += name not in VOID_TAGS
            elif name not in VOID_TAGS and match.start() and text[match.start() - 1] not in " \n\t\"'(“":
                stray += 1  # "use </b>" speaks about a tag; "job</b>" is a broken one
        elif not empty and name not in VOID_TAGS:
            opened.append(name)
    short = len(text) < 600  # a long answer may have been cut off by the limit of new tokens
    if text[0] == "<" and text[1:2].isalpha() and not TAG.match(text):
        return True
    if stray or (opened and tags > 1 and text[0] == "<" and short and whole):
        return True
    if text[0] == "<" and tags and dense > 0.2 and not opened and not stray:
        return _is_soup(TAG.sub(" ", text))
    root = TAG.match(text)
    if root and root[2].lower() not in INLINE_TAGS and re.search(rf"</{re.escape(root[2])}>[\w=]", text):
        return True
    if whole and "{" not in text and len(CRUMB.findall(text)) > 1:
        return True
    if text[0] == "{" and re.search(r"\}[A-Za-z\d]", text):  # an object, and then it babbles on
        return True
    if dense < 0.12 or "\\" in text and structural < 8:
        return False
    if _is_noise(text):
        return True
    unclosed, mismatched = _brackets(text)
    if mismatched or (unclosed and short and (text[0] in '{[<"' or dense > 0.2)):
        return True
    if text[0] in "{[" and whole and short and dense > 0.25 and ":" in text:
        return not re.match(
            r"[\[{].{0,80}?(?:\bfor\b|=>|;|')", text, re.DOTALL
        )  # balanced, and still not JSON: or code
    return dense > 0.5 and len(text) > 3 and not re.search(r"\w\(|\|.*\||://|\d", text)


def _is_noise(text: str) -> bool:
    """Many kinds of symbols between crumbs of words, as when characters are drawn at random."""
    kinds = set(re.findall(r"[{}\[\]<>|\\^~@#$%&*_=+;`]", text))
    words = sum(len(word) for word in re.findall(r"[A-Za-z]+", text) if word[1:].islower() and len(word) > 2)
    return len(kinds) >= 5 and words < 0.3 * sum(map(str.isalpha, text))


def _is_soup(text: str) -> bool:
    """Between the tags of a record stand values; here stand crumbs of markup."""
    return bool(re.search(r"[<>{}]|\w+>|</?\w", text))


def _brackets(text: str) -> tuple[int, int]:
    """How many { and [ are never closed, and how many } and ] close nothing or another."""
    opened: list[str] = []
    mismatched = 0
    for bracket in re.findall(r"[{}\[\]]", text):
        if bracket in "{[":
            opened.append(bracket)
        elif opened and opened[-1] + bracket in ("{}", "[]"):
            opened.pop()
        else:
            mismatched += 1
    return len(opened), mismatched


def _loops(words: list[str], least: float = 0.34) -> bool:
    """The same words over and over: in all of the text, or at its end."""
    n = len(words)
    if n < 3:
        return False
    kinds = len(set(words))
    if n == 3 and words[0] in DOUBLED:  # "Yes, yes, yes!"
        return False
    if kinds == 1 and not words[0].isdigit() or n >= 4 and kinds / n <= 0.26 and n < 16:
        return True
    most, times = Counter(words).most_common(1)[0]
    if n >= 4 and times > 0.7 * n and not most.isdigit():
        return True
    if n >= 12:
        fours = [tuple(words[i : i + 4]) for i in range(n - 3)]
        if len(set(fours)) / len(fours) <= least:
            return True
    for period in range(1, min(12, n // 4) + 1):  # a tail of at least four equal pieces
        run = 0
        while run + period < n and words[n - 1 - run] == words[n - 1 - run - period]:
            run += 1
        covered = run + period
        if run >= 3 * period and covered >= 5 and (covered >= 12 or covered / n > 0.4):
            return any(not word.isdigit() for word in words[n - period :])
    return False


def _repeats_sentences(text: str) -> bool:
    """One sentence makes up most of the text, at least three times; numbers before it do not count."""
    sentences = [re.sub(r"[\W\d]+", " ", sentence).strip().lower() for sentence in SENTENCE.findall(text)]
    sentences = [sentence for sentence in sentences if sentence.count(" ") >= 2]
    if len(sentences) < 3:
        return False
    times = Counter(sentences).most_common(1)[0][1]
    return times >= 3 and times > 0.5 * len(sentences)


def _is_letter_soup(text: str) -> bool:
    """Words that are none, by pairs of letters and missing vowels. Of the Latin alphabet only."""
    pairs = strange = 0
    for word in re.findall(r"[A-Za-z]{2,}", text[:3000]):
        if word[:-1].isupper() and len(word) < 6:
            continue  # XML, HTTPS, DVDs
        letters = word.lower()
        pairs += len(letters) - 1
        strange += sum(letters[i : i + 2] in RARE_PAIRS for i in range(len(letters) - 1))
        strange += 2 * (len(letters) > 3 and not re.search("[aeiouy]", letters))
        strange += bool(re.search("[bcdfghjklmnpqrstvwxz]{6}", letters))
        strange += 2 * bool(re.search("[a-z][A-Z][a-z]+[A-Z][a-z]?[A-Z]", word))
    words = len(text.split())
    digits = len(re.findall(r"[A-Za-z]\d+[A-Za-z]", text))
    if digits > 2 and digits > 0.3 * words or len(GLUED.findall(text)) > max(1, 0.04 * words):
        return True
    return strange >= 2 and strange > 0.08 * pairs


def _is_word_salad(text: str, words: list[str]) -> bool:
    """Pairs of function words that no sentence has, words doubled, or long runs of words without any function word."""
    n = len(words)
    if n < 4:
        return False
    clashes, doubled = 0, set()
    parts = re.split(r"([.!?:;,\n()\"|<>{}\[\]=*/-]+)", text.lower())
    for segment, end in zip(parts[::2], [*parts[1::2], ""], strict=True):
        inner = WORD.findall(segment)
        for pair in zip(inner, inner[1:], strict=False):
            clashes += pair in CLASHES and pair[0] != pair[1]
            if pair[0] == pair[1] and pair[0] not in DOUBLED and len(pair[0]) > 1 and not pair[0].isdigit():
                doubled.add(pair[0])
        clashes += len(inner) > 1 and end[:1] in (".", "!", "?", ";", ",") and inner[-1] in ("the", "a", "an", "and")
        # A list of names has commas; a sentence has a function word in every few.
        plain = sum(map(str.isalpha, inner))
        if plain >= 9 and segment.isascii() and not COMMAND.match(segment):
            clashes += 2 * (sum(word in FUNCTION_WORDS for word in inner) <= (0.2 if plain >= 14 else 0.15) * plain)
    misplaced = len(MISPLACED.findall(text))  # "must However": words that begin sentences, amid one
    if misplaced:
        clashes += misplaced + len(re.findall(r"[a-z]{3}[.!?] [a-z]", text))
    strange = clashes + len(doubled)
    return strange >= 2 and strange > 0.035 * n
